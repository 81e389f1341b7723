"""What a training step's time and memory grow with, on the CPU at hand:  python -m benchmarks.bench_scaling

All cases take turns in one process, so that noise falls on all alike, a few steps at a time, of which the first, which
finds another case's memory in the caches, doesn't count; medians. Around D=384 F=6144 k=32 B=4096: one of F, D and B at
a time (slopes fitted in log-log); and around it and D=768 F=24576: k doubled, and AuxK with 1% and with 10% of the
latents dead, on and off by turns in one and the same SAE (two alike differ by up to a fifth). And of each of
bench_step's shapes, in a process of its own, the peak memory of a step, beside what it cannot do without: weights,
gradients, optimiser, inputs, and one block of 2^25 pre-activations, at most. Writes
benchmarks/results/bench_scaling.json and .png.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_step import SHAPES
from benchmarks.machine import about
from benchmarks.step_runner import data
from sae.config import SAEConfig
from sae.kernels import native
from sae.learner import Learner
from sae.models import create_sae

RESULTS = Path(__file__).resolve().parent / "results" / "bench_scaling.json"
BASE = {"B": 4096, "D": 384, "F": 6144, "K": 32}
GROWS = {"F": (1536, 3072, 6144, 12288, 24576), "D": (96, 192, 384, 768), "B": (1024, 2048, 4096, 8192)}
AROUND = {"M": {}, "L": {"D": 768, "F": 24576}}
DEAD = (0.01, 0.1)  # shares of the latents
ROUNDS, STEPS = 12, 4
BLOCK = 2**25  # pre-activations of a block that counts as needed: 128 MiB


class Case:
    """A learner of some size, and the seconds of its steps without AuxK (False) and with it (True)."""

    def __init__(self, *, dead: float = 0.0, **size: int):
        self.size, self.step = BASE | size, 0
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        B, D, F, K = (self.size[key] for key in "BDFK")
        self.x = data(D, 2 * B).split(B)
        c = SAEConfig(d_in=D, d_sae=F, k=K, batch_size=B)
        self.learner = Learner(create_sae(c), c, 1000, torch.device("cpu"))
        self.learner.start_from({"": self.x[0]})
        self.dead = torch.arange(F) < dead * F
        with torch.no_grad():
            self.learner.sae.b_enc[self.dead] -= 100.0

    def take_turn(self, auxk: bool) -> None:
        self.learner.firing.is_dead = lambda: self.dead & auxk  # type: ignore[method-assign]
        self.learner.firing.list_()
        self.seconds[auxk] += [self.take_step() for _ in range(STEPS)][1:]

    def take_step(self) -> float:
        """Seconds."""
        start = time.perf_counter()
        self.learner.learn({"": self.x[self.step % 2]}, self.step)
        self.learner.update(self.step)
        self.step += 1
        return time.perf_counter() - start

    def ms(self, auxk: bool = False) -> float:
        return 1e3 * statistics.median(self.seconds[auxk])


def slope(points: list[tuple[int, float]]) -> float:
    """Of a line through points in log-log, by least squares."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def resident() -> tuple[float, float]:
    """Memory of this process in MiB: now, and the most since the last reset_peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def memory(shape: str, path: str) -> dict[str, float]:
    """Peak memory of a step beside what it needs, MiB. Runs in a process of its own: what was freed stays."""
    B, D, F, K = (SHAPES[shape][key] for key in "BDFK")
    native.enabled = path == "auto"
    native.keep_memory()
    Case(B=64, D=32, F=256, K=2).take_step()  # loads all code
    x = data(D, B)
    ctypes.CDLL(None).malloc_trim(0)  # what was used and is free must not hide what a step takes
    before = resident()[0]
    c = SAEConfig(d_in=D, d_sae=F, k=K, batch_size=B)
    learner = Learner(create_sae(c), c, 1000, torch.device("cpu"))
    learner.start_from({"": x})
    for step in range(3):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        learner.learn({"": x}, step)
        learner.update(step)
    weights = sum(p.numel() for p in learner.sae.parameters())
    need = 4 * (4 * weights + B * D + min(B * F, BLOCK)) / 2**20
    return {"peak_mib": resident()[1] - before, "needed_mib": need}


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis, (name, found) in zip(axes, results["grows"].items(), strict=True):
        xs, ys = zip(*found["points"], strict=True)
        axis.loglog(xs, ys, "o-", color="#3b6fb6")
        middle = len(xs) // 2
        axis.loglog(xs, [ys[middle] * x / xs[middle] for x in xs], ":", color="#888888", label="linear")
        axis.set_title(f"slope {found['slope']:.2f}")
        axis.set_xlabel(name)
        axis.set_xticks(xs, [str(x) for x in xs])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms per step")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(memory(*sys.argv[1:])))
        return
    native.keep_memory()
    cases: dict[tuple[str, Any], Case] = {(name, n): Case(**{name: n}) for name, sizes in GROWS.items() for n in sizes}
    for name, size in AROUND.items():
        cases |= {(name, 0): Case(**size), (name, "K"): Case(**size, K=2 * BASE["K"])}
        cases |= {(name, share): Case(**size, dead=share) for share in DEAD}
    for _ in range(ROUNDS):
        for case in cases.values():
            for auxk in (False, True) if case.dead.any() else (False,):
                case.take_turn(auxk)
    grows = {}
    for name, sizes in GROWS.items():
        points = [(n, cases[name, n].ms()) for n in sizes]
        grows[name] = {"slope": slope(points), "points": points}
    used = {}
    for shape in SHAPES:
        for path in ("auto", "plain"):
            command = [sys.executable, "-m", "benchmarks.bench_scaling", shape, path]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            used[f"{shape} {path}"] = json.loads(done.stdout)
    results = {
        "about": about() | {"kernels": native.status(), "rounds": ROUNDS, "steps": STEPS - 1},
        "base": {name: {**case.size, "step_ms": case.ms()} for name in AROUND for case in (cases[name, 0],)},
        "grows": grows,
        "k_doubled": {name: cases[name, "K"].ms() / cases[name, 0].ms() for name in AROUND},
        "auxk": {
            name: {str(dead): cases[name, dead].ms(True) / cases[name, dead].ms() for dead in DEAD} for name in AROUND
        },
        "memory": used,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, RESULTS.with_suffix(".png"))
    print(json.dumps({key: value for key, value in results.items() if key != "about"}, indent=1))


if __name__ == "__main__":
    main()
