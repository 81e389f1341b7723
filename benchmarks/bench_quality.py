"""Seconds of training until nanoSAE is as good as sparsify is after a given time, on the same activations and the CPU
at hand:

    python -m benchmarks.bench_quality --peers_python PEERS/bin/python [--shapes S M]

sparsify (with Adam, no warm-up, its step size falling to 0 at the end of its time, at each of a few peak step sizes)
trains for 24 s on S and for 120 s on M. nanoSAE trains for a share of that, a whole schedule of its own, at the same
step sizes and batches; the shares grow until its fraction of variance unexplained, on tokens held out from both, is no
higher, and are then halved three times between the last that fell short and the first that did not. The time is that
of the training steps, as measured, in processes of their own, one after the other. Writes
benchmarks/results/bench_quality.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench_step import SHAPES, SKIPPED, run_job
from benchmarks.machine import about

RESULTS = Path(__file__).resolve().parent / "results" / "bench_quality.json"
SECONDS = {"S": 24.0, "M": 120.0}
N_TOKENS = 2**18 + 4096  # the last ones are held out
LEARNING_RATES = (1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
SHARES = (1 / 24, 1 / 16, 1 / 10, 1 / 7, 1 / 5, 1 / 4, 1 / 3)
PEER = {"library": "eai-sparsify", "optimizer": "adam"}
OURS = {"library": "nanosae", "kernels": "auto"}


def step_seconds(job: dict[str, Any], peers_python: str) -> float:
    """A step's, as the median of a few."""
    return statistics.median(run_job(job | {"steps": 12}, "shipped", peers_python)["seconds"][SKIPPED:])


def train(job: dict[str, Any], seconds: float, step: float, lr: float, peers_python: str) -> dict[str, Any]:
    """One run of about so many seconds, and what it came to."""
    steps = max(2, round(seconds / step))
    found = run_job(job | {"steps": steps, "lr": lr, "fvu": True, "n_tokens": N_TOKENS}, "shipped", peers_python)
    return {"lr": lr, "steps": steps, "seconds": sum(found["seconds"]), "fvu": found["fvu"]}


def shares(
    job: dict[str, Any], most: float, peer: dict[str, Any], best: float, step: float, peers_python: str
) -> list[dict[str, Any]]:
    """Our runs of a job at the peer's step size, by share of its time, `most`: until one is as good as `best`, and
    three nearer to where they become as good as this peer."""
    tried: dict[float, dict[str, Any]] = {}

    def attempt(share: float) -> dict[str, Any]:
        run = tried[share] = train(job, share * most, step, peer["lr"], peers_python)
        print(
            f"D={job['D']} lr {peer['lr']:g}: sparsify {peer['fvu']:.4f} after {peer['seconds']:.1f} s; nanoSAE "
            f"{run['fvu']:.4f} after {run['seconds']:.1f} s",
            flush=True,
        )
        return run

    for share in SHARES:
        if attempt(share)["fvu"] <= best:
            break
    for _ in range(3):
        enough = [share for share, run in tried.items() if run["fvu"] <= peer["fvu"]]
        short = [share for share in tried if enough and share < min(enough)]
        if short:
            attempt((max(short) * min(enough)) ** 0.5)
    return [tried[share] for share in sorted(tried)]


def compare(shape: str, peers_python: str) -> dict[str, Any]:
    """Both at every step size; ours in growing shares of the peer's time until it is as good as the peer's best."""
    size = {key: value for key, value in SHAPES[shape].items() if key != "steps"}
    peer_step, our_step = (step_seconds(one | size, peers_python) for one in (PEER, OURS))
    peers = [train(PEER | size, SECONDS[shape], peer_step, lr, peers_python) for lr in LEARNING_RATES]
    best = min(run["fvu"] for run in peers)
    ours = [shares(OURS | size, SECONDS[shape], peer, best, our_step, peers_python) for peer in peers]
    rows = [{"lr": peer["lr"], "sparsify": peer, "nanosae": runs} for peer, runs in zip(peers, ours, strict=True)]
    same_lr = [
        min(
            (r["seconds"] / row["sparsify"]["seconds"] for r in row["nanosae"] if r["fvu"] <= row["sparsify"]["fvu"]),
            default=None,
        )
        for row in rows
    ]
    spent = min(row["sparsify"]["seconds"] for row in rows if row["sparsify"]["fvu"] == best)
    reached = [r["seconds"] for row in rows for r in row["nanosae"] if r["fvu"] <= best]
    return {
        "shape": shape,
        **size,
        "rows": rows,
        "share_at_equal_lr": same_lr,
        "share_at_best_lr": min(reached) / spent if reached else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers_python", default=sys.executable)
    parser.add_argument("--shapes", nargs="+", default=list(SECONDS))
    given = parser.parse_args()
    shapes = json.loads(RESULTS.read_text())["shapes"] if RESULTS.is_file() else {}
    for shape in given.shapes:
        shapes[shape] = compare(shape, given.peers_python)
        print(json.dumps({key: value for key, value in shapes[shape].items() if key != "rows"}))
        RESULTS.write_text(json.dumps({"about": about(), "shapes": shapes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
