"""Figures of the embedded model:  python -m benchmarks.pygpt out/pygpt  (the folder that trained it, with data/pygpt)

Validation loss of the shipped file over the whole of val.bin, the training curve, and speed on this machine. Writes
benchmarks/results/pygpt.json.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from model import GPT

ROOT = Path(__file__).resolve().parent.parent
CKPT = ROOT / "assets" / "pygpt" / "ckpt.pt"


def speed(run, n_tokens: int, times: int = 7) -> float:
    """Median tokens per second of run()."""
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return n_tokens / statistics.median(seconds)


def corpus(split: str, data: train.Data) -> str:
    """What a split holds, in words."""
    sys.path.insert(0, str(CKPT.parent))
    from corpus import documents

    is_file = [isinstance(d, str) for d in documents(split)]
    ids = getattr(data, split)
    n_bytes = int(data.token_bytes[torch.from_numpy(ids.astype("int64"))].sum())
    return f"{sum(is_file):,} files, {len(is_file) - sum(is_file):,} dialogues, {len(ids):,} tokens, {n_bytes:,} bytes"


def sample(*flags: str) -> str:
    """What sample.py prints."""
    got = subprocess.run([sys.executable, "sample.py", *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    return got.stdout.rstrip()


@torch.no_grad()
def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/pygpt")
    settings = json.loads((out / "config.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens_per_step = settings["batch_size"] * settings["block_size"]
    points = [r for r in records if "val_loss" in r]
    every = max(1, len(points) // 12)
    curve = [
        {
            "step": r["step"],
            "tokens": r["step"] * tokens_per_step,
            **{k: r[k] for k in ("val_loss", "val_bits_per_byte")},
        }
        for i, r in enumerate(points)
        if i % every == every - 1 or r is points[-1]
    ]
    model = GPT.from_checkpoint(CKPT)
    config = train.TrainConfig(data_dir="data/pygpt", device="cpu", dtype="float32", block_size=model.config.block_size)
    place = train.Place(0, 1, torch.device("cpu"))
    data = train.open_data(config, place)
    whole = train.validate(model, data, config, place)
    ids = torch.randint(0, model.config.vocab_size, (16, 256), generator=torch.Generator().manual_seed(0))
    write = lambda: list(model.generate(ids[:1, :8], 128, generator=torch.Generator().manual_seed(0)))
    n_steps = settings["max_steps"]
    n_parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "parameters": f"{n_parameters:,}",
        "shape": f"{model.config.n_layer} blocks, width {model.config.n_embd}, {model.config.n_head} heads, "
        f"context {model.config.block_size}, vocabulary {model.config.vocab_size}",
        "file": f"{CKPT.stat().st_size:,} bytes (bf16 weights)",
        "trained on": f"{n_steps * tokens_per_step:,} tokens, {n_steps:,} steps of {tokens_per_step:,}",
        "training split": corpus("train", data),
        "validation split": corpus("val", data),
        "validation (shipped file, whole split)": f"{whole.loss:.3f} nats, {whole.bits_per_byte:.3f} bits per byte",
        "forward, 16 x 256 tokens": f"{speed(lambda: model(ids), ids.numel()):,.0f} tokens/s",
        "sampling with the cache": f"{speed(write, 128, 3):,.0f} tokens/s",
        "measured on": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.machine()}",
    }
    asked = [["--num_samples", "1"], ["--ask", "What does os.path.join do?"], ["--ask", "What does `json.dumps` do?"]]
    samples = [{"command": shlex.join(["python", "sample.py", *flags]), "text": sample(*flags)} for flags in asked]
    result = {"samples": samples, "facts": facts, "curve": curve, "validation": whole._asdict(), "settings": settings}
    (ROOT / "benchmarks" / "results" / "pygpt.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
