"""What the layer for several processes costs a run of one: steps with it and with it taken out, by turns:

    torchrun --standalone --nproc_per_node 1 -m benchmarks.bench_world [--device cuda]

"Taken out": every operation of an Axis is replaced by one that gives back what it got. Writes
benchmarks/results/bench_world.json, a row for each device it was run on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import about
from benchmarks.scale_model import SHAPE, trainer
from sae import distributed
from sae.config import SAEConfig
from sae.distributed import Axis, World
from sae.trainer import SAETrainer

RESULTS = Path(__file__).resolve().parent / "results" / "bench_world.json"
SAME: Callable[[Any, Any], Any] = lambda self, x: x  # noqa: ARG005
BARE = {
    **dict.fromkeys(("sum_", "sum", "share", "broadcast_", "sum_all_"), SAME),
    "mean": lambda self, x: x.mean(0),  # noqa: ARG005
    "objects": lambda self, x: [x],  # noqa: ARG005
}
OWN = {name: getattr(Axis, name) for name in BARE}
STEPS = 150


def seconds_of_step(t: SAETrainer, batch: Any, operations: dict[str, Any]) -> float:
    for name, operation in operations.items():
        setattr(Axis, name, operation)
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
    start = time.perf_counter()
    t._step(batch)
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    c = SAEConfig(**SHAPE)  # type: ignore[arg-type]
    t = trainer(c, World(distributed.join(device), device=device))
    t._begin_run()
    batch = next(t.stream)
    taken: dict[str, list[float]] = {"with": [], "without": []}
    for i in range(2 * STEPS):
        name = ("with", "without")[(i + i // 2) % 2]  # with, without, without, with: both follow both
        taken[name].append(seconds_of_step(t, batch, OWN if name == "with" else BARE))
    took = {name: statistics.median(seconds[5:]) for name, seconds in taken.items()}
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    row = {"device": what, **took, "ratio": took["with"] / took["without"], "date": time.strftime("%Y-%m-%d")}
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    rows = [r for r in old if r["device"] != what] + [row]
    RESULTS.write_text(json.dumps({"about": about() | {"shape": SHAPE, "steps": STEPS}, "rows": rows}, indent=1) + "\n")
    print(row)


if __name__ == "__main__":
    main()
