"""What watching and steering cost per generated token:

    python -m benchmarks.bench_runtime [--tokens 60] [--models pygpt gpt2-small]

The embedded pygpt, and a model of GPT-2 small's size (random weights, built here), batch 1, greedy, with KV cache, on
the CPU. All ways write behind the same prompt, and take turns after every token, so that noise falls on all alike: a
way's ratio is the median over tokens of its time over plain's for the same token. Plain runs twice, so that the second
shows what a ratio is worth. SAEs are TopK with k = 32, random too: what a token costs does not depend on what they
know. Writes results/bench_runtime.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import about
from model import GPT, GPTConfig
from sae.config import SAEConfig
from sae.kernels import native
from sae.lm.language_model import PYGPT
from sae.models import SAE, create_sae
from sae.runtime import InterpretableModel

RESULTS = Path(__file__).resolve().parent / "results" / "bench_runtime.json"
SKIPPED = 3  # tokens: the prompt, and the first that touch their SAE


def build(name: str) -> GPT:
    if name == "pygpt":
        return GPT.from_checkpoint(PYGPT)
    return GPT(GPTConfig(block_size=256, vocab_size=50257), generator=torch.Generator().manual_seed(0)).eval()


def an_sae(width: int, expansion: int, activation: Any = "topk") -> SAE:
    sae: Any = create_sae(SAEConfig(d_in=width, expansion_factor=expansion, k=32, activation=activation))
    if activation == "batchtopk":
        sae.threshold.fill_(2.0)
    return sae


def ways(model: GPT) -> dict[str, Callable[[], AbstractContextManager]]:
    """By name, the block to generate in."""
    D, n = model.config.n_embd, model.config.n_layer
    middle = f"transformer.h.{n * 5 // 6}"
    at = lambda *args: InterpretableModel(model, {middle: an_sae(D, *args)})
    eight, wide, threshold = at(8), at(32), at(8, "batchtopk")
    layers = InterpretableModel(model, {f"transformer.h.{i}": an_sae(D, 8) for i in range(n)})
    watched = range(0, 64 * 23, 23)

    def both() -> AbstractContextManager:
        stack = ExitStack()
        stack.enter_context(eight.track())
        stack.enter_context(eight.steer("1:+2", "2:=3", "3:*0", "4:+1"))
        return stack

    return {
        "plain": nullcontext,
        "plain again": nullcontext,
        "all latents, expansion 8": eight.track,
        "all latents, expansion 32": wide.track,
        f"all latents of all {n} layers, expansion 8": layers.track,
        "64 watched latents (topk)": lambda: eight.track(latents=watched),
        "64 watched latents (batchtopk)": lambda: threshold.track(latents=watched),
        "4 features steered: add": lambda: eight.steer("1:+2", "2:+3", "3:-1", "4:+1"),
        "4 features steered: add, set, scale (topk)": lambda: eight.steer("1:+2", "2:=3", "3:*0", "4:+1"),
        "4 features steered: add, set, scale (batchtopk)": lambda: threshold.steer("1:+2", "2:=3", "3:*0", "4:+1"),
        "tracked (expansion 8) and steered": both,
    }


def measure(name: str, n_tokens: int) -> list[dict[str, Any]]:
    """A row for every way."""
    model = build(name)
    ids = torch.randint(0, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))
    blocks = ways(model)
    texts = {way: model.generate(ids, n_tokens + SKIPPED, temperature=0) for way in blocks}
    times: dict[str, list[float]] = {way: [] for way in blocks}
    for _ in range(n_tokens + SKIPPED):
        for way, block in blocks.items():
            with block():
                start = time.perf_counter()
                next(texts[way])
                times[way].append(time.perf_counter() - start)
    rows = []
    for way, mine in times.items():
        ratios = [a / b for a, b in zip(mine[SKIPPED:], times["plain"][SKIPPED:], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        ms = 1e3 * statistics.median(mine[SKIPPED:])
        rows.append({"model": name, "way": way, "ms": ms, "ratio": ratio, "low": low, "high": high})
        print(f"{name:11} {way:50} {ms:8.3f} ms  x {ratio:.3f}  (quartiles {low:.3f} to {high:.3f})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60, help="generated in each way")
    parser.add_argument("--models", nargs="+", default=["pygpt", "gpt2-small"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native.keep_memory()
    rows = [row for name in args.models for row in measure(name, args.tokens)]
    how = {"kernels": native.status(), "tokens": args.tokens}
    RESULTS.write_text(json.dumps({"about": about() | how, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
