"""How a step scales: predicted from kernel times and links, checked against what runs here, drawn for large clusters.

    python -m benchmarks.scale_model [--measure] [--d_in 12288 --d_sae 16777216 --batch 131072]

A step of a process takes its kernels on b = B / R tokens and F / S latents, and for every axis a latency per collective
and its bytes (wire_bytes) over the link. --measure runs R x S processes over gloo: times the same kernels without the
others, the links without the kernels, and then the real steps; the difference is the error. For a cluster the kernels
are counted: one product for the encoder, four passes over what Adam keeps, the rest a third of the product.
Writes benchmarks/results/scale_model.json and assets/scale.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import about
from sae import distributed, plan
from sae.config import SAEConfig
from sae.data.activations import Stream, TensorSource
from sae.distributed import ALONE, CAPACITY, DIGIT_BITS, Axis, World
from sae.kernels import native
from sae.models import create_sae
from sae.schedules import n_latents, tokens_per_step
from sae.trainer import SAETrainer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scale_model.json"
PICTURE = ROOT / "assets" / "scale.png"
SHAPE = {"d_in": 256, "d_sae": 4096, "k": 32, "batch_size": 2048}  # what is measured here
LAYOUTS = ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4))  # replicas, shards
N_STEPS = 8
CALLS = {"data": 4, "latents": 5, "everyone": 1}  # collectives in a step of a TopK SAE


def wire_bytes(c: SAEConfig, replicas: int = 1, shards: int = 1, *, any_dead: bool = False) -> dict[str, int]:
    """Bytes that one process hands to the collectives in a step of one SAE, by axis, with no micro-batches.

    data      4 (parameters + F/S + 2) gradients and firing counts; 8 (D + 2) the batch's variance
    latents   4 b D (1 + x) partial reconstructions, x further ones: matryoshka's prefixes, gated's gate, multi-TopK;
              8 b L0 of tokens; 4 D gradient of b_dec; 8 the gradient's norm; 4 each penalty;
              4 b min(k, ceil(4 k / S)) candidates of TopK (4k of them too for multi-TopK), and when latents are dead
              as many candidates, 4 b D and 8 for AuxK
    team      8 + 8 (2^11 + 2^11 + 2^10) + 4 the threshold of BatchTopK; 8 the L0 of jumprelu's quadratic penalty

    Nothing has F times D numbers but the gradients, which cross `data` alone. Beside that the delivery of a batch takes
    4 B D S per hookpoint, what stays where it is included, over all processes (buffer.py).
    """
    b, D, k = tokens_per_step(c) // replicas, c.d_out or c.d_in or 0, c.k
    kind, matryoshka = c.activation, c.activation == "matryoshka"
    selects = kind in ("topk", "abstopk") or (matryoshka and c.matryoshka_base == "topk")
    by_batch = kind == "batchtopk" or (matryoshka and not selects)
    found = {"data": 0, "latents": 0, "team": 0}
    if replicas > 1:
        found["data"] = 4 * (plan.parameters(c, shards) + n_latents(c) // shards + 2)
        found["data"] += 8 * (D + 2) if c.loss_fn == "fvu" else 0
    if shards > 1:
        room = min(k, -(-CAPACITY * k // shards))
        further = len(c.matryoshka_prefixes) if matryoshka else int(kind == "gated" or c.multi_topk)
        penalties = int(kind in ("relu", "gated", "jumprelu"))
        found["latents"] = 4 * b * D * (1 + further) + 8 * b + 4 * D + 8 + 4 * penalties
        found["latents"] += 4 * b * room if selects else 0
        found["latents"] += 4 * b * min(4 * k, -(-CAPACITY * 4 * k // shards)) if c.multi_topk else 0
        if any_dead and c.auxk_alpha > 0 and kind not in ("relu", "gated"):
            found["latents"] += 4 * b * room + 4 * b * D + 8
    if replicas * shards > 1:
        found["team"] = (8 + 8 * sum(2**bits for bits in DIGIT_BITS) + 4) if by_batch else 0
        found["team"] += 8 if kind == "jumprelu" and c.jumprelu_penalty == "quadratic" else 0
    return found


def delivery(batch: int, widths: list[int], shards: int) -> int:
    """Bytes of a batch on its way to who learns from it, over all processes, per step."""
    return 4 * batch * sum(widths) * shards


class Cluster(NamedTuple):
    """GPUs in nodes: per GPU floating point operations and bytes of memory per second, bytes of memory, bytes per
    second to others inside a node and outside, and seconds per collective. As published for H100 SXM, at half rate."""

    flops: float = 2.0e14
    memory_rate: float = 2.5e12
    memory: float = 75e9
    inside: float = 2.0e11
    outside: float = 2.5e10
    latency: float = 3e-5
    per_node: int = 8


def step_on(cluster: Cluster, c: SAEConfig, replicas: int, shards: int) -> dict[str, float] | None:
    """Seconds of a step by part; None where weights, gradients and moments do not fit."""
    n, b, D = replicas * shards, c.batch_size / replicas, c.d_in or 0
    numbers = plan.parameters(c, shards)
    if 16 * numbers + 24 * b * D > cluster.memory:
        return None
    wire = wire_bytes(c, replicas, shards)
    # shards of an SAE sit side by side; replicas of them reach across nodes
    rate = lambda size: cluster.inside if size <= cluster.per_node else cluster.outside
    product = 2 * b * D * (c.d_sae or 0) / shards / cluster.flops
    around = lambda n_bytes, size: 2 * n_bytes * (size - 1) / size
    return {
        "kernels": product * 4 / 3 + 16 * numbers / cluster.memory_rate,
        "data": around(wire["data"], replicas) / rate(n) + CALLS["data"] * cluster.latency * (replicas > 1),
        "latents": around(wire["latents"], shards) / rate(shards) + CALLS["latents"] * cluster.latency * (shards > 1),
        "delivery": delivery(c.batch_size, [D], shards) / n / rate(n) + cluster.latency * (n > 1),
    }


def best_mesh(cluster: Cluster, c: SAEConfig, n: int) -> dict[str, Any] | None:
    """The quickest mesh of n GPUs."""
    found = []
    for shards in (2**i for i in range(int(math.log2(n)) + 1)):
        parts = step_on(cluster, c, n // shards, shards)
        if parts is not None:
            seconds = sum(parts.values())
            rate = c.batch_size / seconds
            found.append({"gpus": n, "replicas": n // shards, "shards": shards, **parts, "tokens_per_s": rate})
    return max(found, key=lambda f: f["tokens_per_s"], default=None)


# --------------------------------------------------------------------------------------------------
# what can be measured here


def trainer(c: SAEConfig, world: World) -> SAETrainer:
    x = torch.randn(c.batch_size * (N_STEPS + 4), c.d_in or 0, generator=torch.Generator().manual_seed(0))
    stream = Stream(
        TensorSource({"": x}),
        n_tokens=len(x),
        batch_size=c.batch_size,
        buffer_tokens=len(x),
        world=world,
        device=world.device,
    )
    return SAETrainer({"": create_sae(c, world=world)}, c, stream, device=world.device, world=world)


def seconds_of_steps(t: SAETrainer, everyone: Axis) -> float:
    """Median over steps, each begun by all together."""
    t._begin_run()
    taken = []
    for _ in range(N_STEPS + 2):
        everyone.barrier()
        start = time.perf_counter()
        t._step(next(t.stream))
        t.step += 1
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def link(axis: Axis) -> tuple[float, float]:
    """Seconds that a sum over an axis takes however small it is, and per byte; of processes that come to it from work,
    as in a step, and wait for the last of them."""
    if axis.size == 1:
        return 0.0, 0.0
    matrix, taken = torch.randn(512, 512), []
    for n in (0, 16, 1 << 20):
        x, seconds = torch.zeros(n), []
        for _ in range(30):
            start = time.perf_counter()
            _ = matrix @ matrix
            if n:
                axis.sum_(x)
            seconds.append(time.perf_counter() - start)
        taken.append(statistics.median(seconds[5:]))
    return max(0.0, taken[1] - taken[0]), max(0.0, taken[2] - taken[1]) / (4 << 20)


def work(replicas: int, shards: int) -> None:
    """In each of the processes: print what is predicted and what is, from the first."""
    torch.set_num_threads(1)
    everyone = distributed.join(torch.device("cpu"))
    world = World(everyone, (1, replicas, shards))
    c = SAEConfig(**SHAPE, auxk_alpha=0.0)  # type: ignore[arg-type]
    part = SAEConfig(**{**SHAPE, "d_sae": c.d_sae // shards, "batch_size": c.batch_size // replicas}, auxk_alpha=0.0)  # type: ignore[arg-type, operator]
    kernels = seconds_of_steps(trainer(part, ALONE), everyone)
    links = {name: link(getattr(world, name)) for name in CALLS}
    wire = wire_bytes(c, replicas, shards)
    wire["everyone"] = delivery(c.batch_size, [c.d_in or 0], shards) // everyone.size
    parts = {name: CALLS[name] * links[name][0] + wire[name] * links[name][1] for name in CALLS}
    measured = seconds_of_steps(trainer(c, world), everyone)
    if everyone.rank == 0:
        predicted = kernels + sum(parts.values())
        row = {"replicas": replicas, "shards": shards, "kernels": kernels, **parts, "predicted": predicted}
        print(json.dumps({**row, "measured": measured, "error": predicted / measured - 1}), flush=True)
    distributed.leave()


def measure(replicas: int, shards: int) -> dict[str, Any]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(replicas * shards)]
    worker = ["-m", "benchmarks.scale_model", "--worker", str(replicas), str(shards)]
    command = [sys.executable, *torchrun, *worker]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def draw(rows: list[dict[str, Any]], c: SAEConfig) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    gpus = [r["gpus"] for r in rows]
    left.loglog(gpus, [r["tokens_per_s"] for r in rows], marker="o", base=2)
    left.margins(0.15)  # room for labels
    for r in rows:
        left.annotate(
            f"{r['replicas']}x{r['shards']}",
            (r["gpus"], r["tokens_per_s"]),
            textcoords="offset points",
            xytext=(4, -12),
            fontsize=7,
        )
    left.set(xlabel="GPUs", ylabel="tokens/s", title=f"best mesh (replicas x shards), F={c.d_sae:,} D={c.d_in:,}")
    below = [0.0] * len(rows)
    for name in ("kernels", "data", "latents", "delivery"):
        heights = [r[name] for r in rows]
        right.bar([str(g) for g in gpus], heights, bottom=below, label=name)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    right.set(xlabel="GPUs", ylabel="seconds per step", title=f"a step of {c.batch_size:,} tokens")
    right.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the layouts that this machine can, too")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--d_in", type=int, default=12288)
    parser.add_argument("--d_sae", type=int, default=1 << 24)
    parser.add_argument("--batch", type=int, default=1 << 17)
    given = parser.parse_args()
    native.keep_memory()
    if given.worker:
        work(*given.worker)
        return
    old = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    measured = old.get("measured", [])
    for replicas, shards in LAYOUTS if given.measure else ():
        measured = [r for r in measured if (r["replicas"], r["shards"]) != (replicas, shards)]
        measured.append(measure(replicas, shards))
        print(measured[-1], flush=True)
    c = SAEConfig(d_in=given.d_in, d_sae=given.d_sae, k=128, batch_size=given.batch)
    cluster = Cluster()
    rows = [row for n in (2**i for i in range(11)) if (row := best_mesh(cluster, c, n)) is not None]
    job = {"cluster": cluster._asdict(), "shape": SHAPE, "d_in": c.d_in, "d_sae": c.d_sae, "batch": c.batch_size}
    RESULTS.write_text(json.dumps({"about": about() | job, "measured": measured, "predicted": rows}, indent=1) + "\n")
    for r in rows:
        print(f"{r['gpus']:5} GPUs  {r['replicas']:4} x {r['shards']:4}  {r['tokens_per_s']:12,.0f} tokens/s")
    draw(rows, c)


if __name__ == "__main__":
    main()
