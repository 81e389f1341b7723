"""Time the README's demo and keep its figures:  python -m benchmarks.demo

Runs runs/demo.sh in a fresh clone. Its first run installs, so the demo is run a second time and that one is timed.
Writes benchmarks/results/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.machine import about

ROOT = Path(__file__).resolve().parent.parent
KEYS = (
    "n_tokens l0 explained_variance dead_fraction ce_clean ce_sae ce_zero ce_mean ce_score_zero ce_score_mean"
    " kl_score_zero"
).split()


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        clone = Path(tmp) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        install = ["bash", "-c", "source runs/setup.sh"]
        subprocess.run(install, cwd=clone, check=True)
        start = time.perf_counter()
        subprocess.run(["bash", "runs/demo.sh"], cwd=clone, check=True)
        seconds = time.perf_counter() - start
        report = json.loads((clone / "sae_models" / "layer_10" / "eval.json").read_text())
        pages = len((clone / "sae_models" / "layer_10" / "features" / "features.jsonl").read_text().splitlines())
    result = {
        "about": about(),
        "seconds": round(seconds, 1),
        "limit_s": 300,
        "pages": pages,
        "eval": {key: report[key] for key in KEYS},
    }
    path = ROOT / "benchmarks" / "results" / "demo.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
