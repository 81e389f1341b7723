"""Twelve SAEs in one pass over the model beside the same twelve one by one:  python -m benchmarks.sweep

3 layers x 2 k x 2 seeds on pygpt, as a user types it: one `sae_train --layers 4 7 10 --k 16 32 --init_seeds 0 1`, and
then twelve runs of `sae_train --layer L --k K --seed S`, each a process with its start and its tokenisation. Writes
benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import about

ROOT = Path(__file__).resolve().parent.parent
LAYERS, KS, SEEDS = ("4", "7", "10"), ("16", "32"), ("0", "1")


def seconds(*flags: str, tokens: int, save_dir: str) -> float:
    """Wall-clock seconds of one sae_train process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "scripts.sae_train", *flags, "--max_tokens", str(tokens), "--save_dir", save_dir]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    n_tokens = parser.parse_args().tokens
    with tempfile.TemporaryDirectory() as folder:
        run = lambda *flags: seconds(*flags, tokens=n_tokens, save_dir=folder)
        sweep = ["--layers", *LAYERS, "--k", *KS, "--init_seeds", *SEEDS, "--run_name", "sweep"]
        together = run(*sweep)
        trained = len(list(Path(folder, "sweep").rglob("sae_weights.safetensors")))
        alone = {}
        for layer, k, seed in itertools.product(LAYERS, KS, SEEDS):
            name = f"layer {layer}, k {k}, seed {seed}"
            alone[name] = run("--layer", layer, "--k", k, "--seed", seed, "--run_name", name.replace(", ", "_"))
            print(f"{name}: {alone[name]:.1f} s", flush=True)
    result = {
        "about": about(),
        "tokens": n_tokens,
        "saes": trained,
        "sweep_seconds": together,
        "alone_seconds": alone,
        "sum_alone_seconds": sum(alone.values()),
        "ratio": together / sum(alone.values()),
    }
    path = ROOT / "benchmarks" / "results" / "sweep.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    total = result["sum_alone_seconds"]
    print(f"{trained} SAEs: {together:.1f} s together, {total:.1f} s one by one, ratio {result['ratio']:.3f}")


if __name__ == "__main__":
    main()
