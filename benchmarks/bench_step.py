"""A training step of nanoSAE beside its peers', on the CPU at hand:

    python -m venv PEERS     (and in it: pip install torch sae-lens eai-sparsify dictionary-learning)
    python -m benchmarks.bench_step --peers_python PEERS/bin/python [--shapes S M L] [--rounds 3]

Contenders take turns, each in a process of its own that runs a few steps (step_runner.py), so that noise of the machine
falls on all alike; a contender's time is the median over the steps of all rounds, the first ones of a process left out.
Twice: as shipped, and with glibc's allocator told to keep memory, which spares peers the paging of every large tensor
(nanoSAE tells it so itself). Writes benchmarks/results/bench_step.json; on another processor, --out another file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import about
from benchmarks.peers import ALLOCATOR

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {
    "S": {"B": 4096, "D": 128, "F": 2048, "K": 16, "steps": 24},
    "M": {"B": 4096, "D": 384, "F": 6144, "K": 32, "steps": 9},
    "L": {"B": 4096, "D": 768, "F": 24576, "K": 32, "steps": 5},
}
SKIPPED = 2  # steps of a process that warm up
CONTENDERS: dict[str, dict[str, str]] = {
    "nanosae": {"library": "nanosae", "kernels": "auto"},
    "nanosae plain": {"library": "nanosae", "kernels": "plain"},
    "sparsify adam": {"library": "eai-sparsify", "optimizer": "adam"},
    "sparsify signum": {"library": "eai-sparsify", "optimizer": "signum"},
    "dictionary-learning": {"library": "dictionary-learning"},
    "sae-lens": {"library": "sae-lens"},
}


def run_job(job: dict[str, Any], allocator: str, peers_python: str) -> dict[str, Any]:
    """What step_runner.py finds, in a process of its own."""
    python = sys.executable if job["library"] == "nanosae" else peers_python
    env = {**os.environ, **(ALLOCATOR if allocator == "tuned" else {})}
    if job["library"] == "nanosae":
        env["PYTHONPATH"] = str(ROOT)
    command = [python, str(ROOT / "benchmarks" / "step_runner.py"), json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One contender on one shape, over its rounds."""
    steps = [s for r in runs for s in r["seconds"][SKIPPED:]]
    pieces: dict[str, float] = {}
    if "encoder" in runs[0]:
        of_steps = [s for r in runs for s in r["encoder"][SKIPPED:]]
        pieces = {
            "product": 1e3 * statistics.median(s for r in runs for s in r["product"]),
            "encoder": 1e3 * statistics.median(of_steps),
            "step_over_encoder": statistics.median(a / b for a, b in zip(steps, of_steps, strict=True)),
        }
    return {
        "step_ms": 1e3 * statistics.median(steps),
        "least_ms": 1e3 * min(steps),
        "n_steps": len(steps),
        "peak_mib": max(r["peak_mib"] for r in runs),
        **pieces,
        **{name: runs[0][name] for name in ("version", "kernels", "torch", "threads") if name in runs[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers_python", default=sys.executable)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--allocators", nargs="+", default=["shipped", "tuned"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="bench_step.json")
    given = parser.parse_args()
    out = RESULTS / given.out
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    for shape in given.shapes:
        for allocator in given.allocators:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
            for _ in range(given.rounds):
                for name in given.only:
                    runs[name].append(run_job(CONTENDERS[name] | SHAPES[shape], allocator, given.peers_python))
            for name, done in runs.items():
                row = {"shape": shape, "allocator": allocator, "contender": name, **SHAPES[shape], **summary(done)}
                row["tokens_per_s"] = row["B"] / row["step_ms"] * 1e3
                rows = [r for r in rows if (r["shape"], r["allocator"], r["contender"]) != (shape, allocator, name)]
                rows.append(row)
                print(
                    f"{shape} {allocator:8} {name:20} {row['step_ms']:9.1f} ms {row['tokens_per_s']:9.0f} tokens/s "
                    f"{row['peak_mib']:6.0f} MiB",
                    flush=True,
                )
            out.write_text(json.dumps({"about": about() | {"rounds": given.rounds}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
