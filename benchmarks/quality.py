"""How good trained SAEs are: gathers runs that sae_train and sae_eval made into a table for the README.

    python -m scripts.sae_train --layer 10 --expansion_factor 16      (and so on, then sae_eval on each)
    python -m benchmarks.quality pygpt sae_models/layer_10 ...

Every figure is read from a run's eval.json, config.json and metrics.jsonl; nothing is computed anew. Writes
benchmarks/results/quality_<name>.json, from which benchmarks/render.py makes the table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.machine import about

RESULTS = Path(__file__).parent / "results"
KEYS = (
    "architecture k d_sae n_tokens l0 explained_variance explained_variance_legacy dead_fraction ce_clean ce_sae"
    " ce_score_zero ce_score_mean kl_score_zero"
).split()


def command(argv: list[str]) -> str:
    """What was typed, without the folders of the machine it was typed on."""
    words, skip = [], False
    for before, word in zip(["", *argv[1:]], argv[1:], strict=False):
        skip = word in ("--save_dir", "--run_name", "--overwrite") or (skip and not word.startswith("--"))
        if not skip:
            words.append("<MiniLM>" if before == "--model" and "minilm" in word.lower() else word)
    return " ".join(["sae_train", *words])


def row(folder: Path) -> dict:
    """One run's figures."""
    settings = json.loads((folder / "config.json").read_text())
    report = json.loads((folder / "eval.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [(r["tokens"], r["tokens_per_s"]) for r in records if "tokens_per_s" in r]
    starts = [0, *(tokens for tokens, _ in logged)]
    seconds = sum((tokens - start) / rate for start, (tokens, rate) in zip(starts, logged, strict=False))
    return {
        "command": command(settings["argv"]),
        "seed": settings["config"]["seed"],
        "commit": settings["git_commit"],
        "train_seconds": round(seconds, 1),
        "train_tokens": settings["resolved"]["n_tokens"],
        "uses": settings["config"]["num_epochs"],
        "torch": settings["versions"]["torch"],
        **{key: report[key] for key in KEYS},
    }


def main() -> None:
    name, *folders = sys.argv[1:]
    result = {"about": about(), "rows": [row(Path(folder)) for folder in folders]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"quality_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
