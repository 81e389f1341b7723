"""One of four processes is killed at a random moment, again and again; each time the run ends soon and goes on:

    python -m benchmarks.fault [--kills 20]

The run is resumed from its own checkpoints on changing meshes. Writes benchmarks/results/fault.json: how long the
others took to end, and how many steps each resume began with.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import about
from sae.checkpoint import checkpoints, newest_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fault.json"
LIMIT_S = 60


def command(folder: Path, shards: int, *flags: str) -> list[str]:
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 4".split()
    places = ["--activations", str(folder / "x.npy"), "--hook_point", "h.0", "--save_dir", str(folder)]
    sizes = "--k 4 --batch_size 256 --buffer_tokens 2048 --num_epochs 400 --save_every 10 --eval_every 100000".split()
    how = ["--run_name", "run", "--shard_latents", str(shards), "--kernels", "plain"]
    return [sys.executable, *torchrun, "-m", "scripts.sae_train", *places, *sizes, *how, *flags]


def workers(torchrun: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(torchrun)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def kill_once(folder: Path, shards: int, flags: tuple[str, ...], rng: random.Random) -> dict[str, Any]:
    """Start or resume, kill a process a little after the next checkpoint, and see what comes of it."""
    before = checkpoints(folder / "run")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as f:
        run = subprocess.Popen(command(folder, shards, *flags), cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
    while checkpoints(folder / "run")[-1:] == before[-1:]:
        if run.poll() is not None:
            sys.exit(f"the run ended by itself:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.01)
    time.sleep(rng.random())
    os.kill(rng.choice(workers(run.pid)), 9)
    killed = time.perf_counter()
    code = run.wait(timeout=300)
    seconds = time.perf_counter() - killed
    _, state, _ = newest_whole(folder / "run")
    said = "another process of this run has ended" in (folder / "log").read_text()
    return {"seconds": seconds, "exit_code": code, "step": state["step"], "shards": shards, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32))
        for i in range(given.kills):
            rows.append(kill_once(folder, (1, 2, 4)[i % 3], ("--resume",) if i else (), rng))
            assert i == 0 or rows[-1]["step"] > rows[-2]["step"], "a checkpoint was lost"
            print(rows[-1], flush=True)
        steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), "a step was trained twice"
    result = {"about": about() | {"limit_s": LIMIT_S}, "longest_s": max(r["seconds"] for r in rows), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    if result["longest_s"] > LIMIT_S:
        sys.exit(f"a run took {result['longest_s']:.0f} s to end")


if __name__ == "__main__":
    main()
