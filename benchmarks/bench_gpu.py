"""A training step on a CUDA GPU beside its peers', its floor, and each kernel's time:

    pip install triton       (and a venv PEERS with: pip install torch triton sae-lens eai-sparsify)
    python -m benchmarks.bench_gpu --peers_python PEERS/bin/python [--shapes GPT2 8B] [--rounds 3]

Contenders take turns, each in a process of its own on batches that lie on the GPU; a contender's time is that from one
batch to the next over all but the first steps, the GPU waited for at both ends. bfloat16 products and float32 weights
everywhere. The floor is the larger of operations / rate of the GPU's own matrix product and bytes / rate of its own
copies, both measured here: the encoder's product and 6 products of the K kept latents; and weights, moments (read and
written, float32) and batch. A peer that its environment does not have is left out and said to be. Writes
benchmarks/results/bench_gpu.json. On a machine without a GPU it says so and ends.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bench_gpu.json"
SHAPES = {
    "GPT2": {"B": 8192, "D": 768, "F": 24576, "K": 32, "steps": 60},
    "8B": {"B": 8192, "D": 4096, "F": 131072, "K": 64, "steps": 20},
}
SKIPPED = 10  # steps of a process that compile and warm up
SEQUENCE = 256
LIBRARIES = {"nanosae": "sae", "nanosae plain": "sae", "sparsify": "sparsify", "sae-lens": "sae_lens"}

# --------------------------------------------------------------------------------------------------
# in a process of its own: one contender


class Batches:
    """Random batches on the GPU, over and over; notes the times when step SKIPPED and the last one begin."""

    def __init__(self, job: dict[str, Any]):
        g = torch.Generator("cuda").manual_seed(0)
        self.x = torch.randn(4, job["B"], job["D"], generator=g, device="cuda")
        self.n, self.i = job["steps"], 0
        self.times: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.n):
            yield self.next()

    def next(self) -> Tensor:
        if self.i in (SKIPPED, self.n - 1):
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())
        if self.i == SKIPPED:
            torch.cuda.reset_peak_memory_stats()
        self.i += 1
        return self.x[self.i % len(self.x)]

    def seconds(self) -> float:
        begin, end = self.times
        return (end - begin) / (self.n - 1 - SKIPPED)


def nanosae(batches: Batches, job: dict[str, Any]) -> dict[str, Any]:
    from sae.config import SAEConfig
    from sae.kernels import native, sparse
    from sae.learner import Learner
    from sae.models import create_sae

    native.enabled = job["contender"] == "nanosae"
    device = torch.device("cuda")
    c = SAEConfig(d_in=job["D"], d_sae=job["F"], k=job["K"], batch_size=job["B"], dtype="bfloat16")
    learner = Learner(create_sae(c), c, 1000, device)
    learner.start_from({"": batches.x[0]})
    for step, batch in enumerate(batches):
        learner.learn({"": batch}, step)
        learner.update(step)
    return {"kernels": sparse.status(device)}


def sae_lens(batches: Batches, job: dict[str, Any]) -> dict[str, Any]:
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae_config = TopKTrainingSAEConfig(d_in=job["D"], d_sae=job["F"], k=job["K"], device="cuda")
    config: Any = LanguageModelSAERunnerConfig(
        sae=sae_config,
        device="cuda",
        checkpoint_path=None,
        output_path=None,
        verbose=False,
        autocast=True,
        training_tokens=job["B"] * (job["steps"] - 1),
        train_batch_size_tokens=job["B"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config.to_sae_trainer_config(), TopKTrainingSAE(sae_config), iter(batches)).fit()
    return {}


def sparsify(batches: Batches, job: dict[str, Any]) -> dict[str, Any]:
    """Its Trainer with its Triton decoder, on a stand-in model whose one layer hands out the batches."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Identity()
            self.base_model, self.device = self, torch.device("cuda")
            self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device="cuda")}

        def forward(self, input_ids: Tensor) -> Tensor:
            if len(input_ids) == 1:  # it asks for the width
                return self.rows(batches.x[0, :1].unsqueeze(0))
            return self.rows(batches.next().view(-1, SEQUENCE, job["D"]))

    sequences = [{"input_ids": torch.zeros(SEQUENCE, dtype=torch.int64)}] * (job["steps"] * job["B"] // SEQUENCE)
    with tempfile.TemporaryDirectory() as tmp:
        config = TrainConfig(
            SparseCoderConfig(num_latents=job["F"], k=job["K"]),
            hookpoints=["rows"],
            log_to_wandb=False,
            save_dir=tmp,
            save_every=10**9,
            batch_size=job["B"] // SEQUENCE,
            optimizer="adam",
        )
        trainer: Any = Trainer(config, sequences, Rows())
        trainer.fit()
    return {}


RUNNERS: dict[str, Callable[[Batches, dict[str, Any]], dict[str, Any]]] = {
    "nanosae": nanosae,
    "nanosae plain": nanosae,
    "sparsify": sparsify,
    "sae-lens": sae_lens,
}


def run_job(job: dict[str, Any]) -> None:
    batches = Batches(job)
    told = RUNNERS[job["contender"]](batches, job)
    peak = torch.cuda.max_memory_allocated() / 2**20
    print("\n" + json.dumps({"step_ms": 1e3 * batches.seconds(), "peak_mib": peak, **told}))


# --------------------------------------------------------------------------------------------------
# the machine, and the pieces


def milliseconds(f: Callable[[], object], rounds: int = 20) -> float:
    """Of f on the GPU, the median; by events, with the caches as a step leaves them: swept in between."""
    sweep = torch.empty(2**26, device="cuda")
    times = []
    for i in range(rounds + 3):
        sweep.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        f()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def rates() -> dict[str, float]:
    """What the GPU does: bfloat16 operations and copied bytes in a second (a byte read and written counts twice)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**28, device="cuda")
    y = torch.empty_like(x)
    return {
        "flops": 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3,
        "bytes": 2 * 4 * 2**28 / milliseconds(lambda: y.copy_(x)) * 1e3,
    }


def floor_ms(shape: dict[str, int], rate: dict[str, float]) -> float:
    B, D, F, K = (shape[name] for name in "BDFK")
    operations = 2 * B * D * F + 6 * 2 * B * K * D
    n_bytes = 2 * F * D * 24 + 4 * B * D  # two matrices and their moments, read and written
    return 1e3 * max(operations / rate["flops"], n_bytes / rate["bytes"])


def pieces(shape: dict[str, int]) -> dict[str, float]:
    """Each kernel alone, in ms, on what a step would give it; and the share of tokens that took a second look."""
    from sae.kernels import triton_encoder, triton_kernels

    B, D, F, K = (shape[name] for name in "BDFK")
    g = torch.Generator("cuda").manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=g, device="cuda")
    x, W, b = randn(B, D), nn.functional.normalize(randn(F, D), dim=1), torch.zeros(F, device="cuda")
    x16, W16 = x.bfloat16(), W.bfloat16()
    indices, values, again = triton_encoder.encode_top_k(x16, W16, b, K, False)
    m, v, scale = torch.zeros_like(W), torch.zeros_like(W), torch.ones((), device="cuda")
    values, by = values.float(), triton_kernels.by_latent(indices, None, F)
    grad = triton_kernels.sum_by_latent(*by, values, x)
    measured: dict[str, Callable[[], object]] = {
        "product alone": lambda: x16 @ W16.t(),
        "encode_top_k, bfloat16": lambda: triton_encoder.encode_top_k(x16, W16, b, K, False),
        "encode_top_k, float32": lambda: triton_encoder.encode_top_k(x, W, b, K, False),
        "cast of x and W": lambda: (x.bfloat16(), W.bfloat16()),
        "bag": lambda: triton_kernels.bag(indices, None, values, W, None),
        "dot_at": lambda: triton_kernels.dot_at(indices, None, x, W),
        "by_latent": lambda: triton_kernels.by_latent(indices, None, F),
        "sum_by_latent": lambda: triton_kernels.sum_by_latent(*by, values, x),
        "squares": lambda: triton_kernels.squares(grad, W),
        "adam_, unit rows": lambda: triton_kernels.adam_(W, grad, m, v, 1, 0.0, 0.9, 0.999, 1e-8, scale, True),
        "adam_": lambda: triton_kernels.adam_(W, grad, m, v, 1, 0.0, 0.9, 0.999, 1e-8, scale, False),
        "activity": lambda: triton_kernels.activity(indices, None, values, F),
        "moments": lambda: triton_kernels.moments(x, x),
    }
    return {name: milliseconds(f) for name, f in measured.items()} | {"second looks": float(again) / B}


# --------------------------------------------------------------------------------------------------
# all of it


def run(contender: str, shape: dict[str, int], peers_python: str) -> dict[str, Any] | None:
    """One contender in a process of its own; None if its environment does not have it."""
    ours = LIBRARIES[contender] == "sae"
    python, env = sys.executable if ours else peers_python, {**os.environ, "PYTHONPATH": str(ROOT) if ours else ""}
    if subprocess.run([python, "-c", f"import {LIBRARIES[contender]}"], env=env, capture_output=True).returncode:
        return None
    job = json.dumps({"contender": contender, **shape})
    done = subprocess.run([python, __file__, "--job", job], env=env, capture_output=True, text=True)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return {"step_ms": None, "peak_mib": None, "failed": "out of memory"}
        sys.exit(f"{contender} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers_python", default=sys.executable)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu needs a CUDA GPU and this machine has none; run benchmarks.bench_step for CPUs")
    if given.job:
        run_job(json.loads(given.job))
    else:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Every shape, every contender, every piece."""
    from benchmarks.machine import about

    rate = rates()
    how = {
        **about(),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "rounds": given.rounds,
        **rate,
    }
    result: dict[str, Any] = {"about": how, "rows": [], "pieces": {}}
    for name in given.shapes:
        shape, floor = SHAPES[name], floor_ms(SHAPES[name], rate)
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(given.rounds):
            for contender in given.only:
                done = run(contender, shape, given.peers_python)
                if done is None:
                    print(f"{contender} is not installed in {given.peers_python}: left out", flush=True)
                else:
                    runs.setdefault(contender, []).append(done)
        for contender, several in runs.items():
            times = [r["step_ms"] for r in several if r["step_ms"] is not None]
            row = {**several[0], "shape": name, **shape, "contender": contender, "floor_ms": floor}
            row["step_ms"] = statistics.median(times) if times else None
            result["rows"].append(row)
            said = row.get("failed")
            if times:
                share = floor / row["step_ms"]
                said = f"{row['step_ms']:9.2f} ms, {share:.0%} of the floor's rate, {row['peak_mib']:.0f} MiB"
            print(f"{name:5} {contender:14} {said}", flush=True)
        result["pieces"][name] = pieces(shape)
        for piece, value in result["pieces"][name].items():
            print(f"      {piece:30} {value:9.4f}", flush=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
