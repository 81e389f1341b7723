"""What a language model in bfloat16 gains and costs:  python -m benchmarks.bench_half --minilm MINILM

Trains SAEs on activations of pygpt and MiniLM in float32 and in bfloat16, by turns, with two seeds each, and measures
all of them inside the model in float32 as well. Writes benchmarks/results/bench_half.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import about

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bench_half.json"
TOKENS, EVAL_TOKENS, SEEDS, DTYPES = 400_000, 65_536, (0, 1), ("float32", "bfloat16")
PACE = re.compile(r"([\d,]+) tokens/s, (\d+)% of the bound \(forwards ([\d.]+) s, steps ([\d.]+) s of")
KEYS = ("explained_variance", "dead_fraction", "ce_clean", "ce_sae", "ce_score_mean")


def script(name: str, *flags: object) -> str:
    command = [sys.executable, "-m", f"scripts.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def measured(run: Path, out: Path, dtype: str) -> dict[str, Any]:
    script("sae_eval", "--sae_path", run, "--output_dir", out, "--model_dtype", dtype, "--eval_tokens", EVAL_TOKENS)
    report = json.loads((out / "eval.json").read_text())
    return {key: report[key] for key in KEYS}


def row(model: str, layer: int, dtype: str, seed: int, tmp: Path) -> dict[str, Any]:
    name = f"{Path(model).name}_{dtype}_{seed}"
    seen = ["--model", model, "--layer", layer, "--model_dtype", dtype, "--max_tokens", TOKENS]
    said = script("sae_train", *seen, "--seed", seed, "--save_dir", tmp, "--run_name", name)
    pace = PACE.search(said)
    assert pace is not None, said
    return {
        "layer": layer,
        "dtype": dtype,
        "seed": seed,
        "tokens_per_s": int(pace[1].replace(",", "")),
        "share_of_bound": int(pace[2]) / 100,
        "forwards_s": float(pace[3]),
        "steps_s": float(pace[4]),
        "own": measured(tmp / name, tmp / name / "own", dtype),
        "in_float32": measured(tmp / name, tmp / name / "float32", "float32"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", required=True, help="folder of MiniLM's weights")
    models = {"pygpt": ("pygpt", 10), "MiniLM": (parser.parse_args().minilm, 3)}
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for name, (model, layer) in models.items():
            for seed in SEEDS:
                for dtype in DTYPES:
                    rows.append({"model": name, **row(model, layer, dtype, seed, Path(tmp))})
                    print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps({"about": about() | {"tokens": TOKENS}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
