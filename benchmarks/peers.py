"""TopK by nanoSAE and by its peers on the same activations, judged by one evaluator:

    python -m scripts.sae_collect --model MINILM --layer 3 --max_tokens 1200000 --output_dir ACTS
    python -m venv PEERS     (and in it: pip install torch sae-lens eai-sparsify dictionary-learning)
    python -m benchmarks.peers --activations ACTS --peers_python PEERS/bin/python --work DIR

Same rows, same number of tokens (one pass), same k and width, same seeds; each library through its own training code
(peers_runner.py) in a process of its own, one at a time. Two settings: `default` leaves each library at its own step
size, batch, schedule and AuxK; `matched` gives it nanoSAE's wherever it has such a setting. Every trained SAE is handed
over as a file and measured here on rows of sequences that none of them saw.

A finished run is kept in DIR and not made again; --fresh makes those of this call anew, --only nanosae (or
sae-lens:matched) chooses. Once all runs are there, benchmarks/results/peers.json is written.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.machine import about
from benchmarks.peers_runner import read
from sae import schedules as sched
from sae.config import SAEConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
LIBRARIES = ("nanosae", "sae-lens", "eai-sparsify", "dictionary-learning")
SETTINGS = ("default", "matched")
TOKENS, SEEDS, K, EXPANSION = 1_000_000, 3, 32, 8
HELD_OUT_FROM = 1_050_000  # the first sequence that begins after this row is the first held-out one
METRICS = ("explained_variance", "l0", "dead_fraction", "seconds", "cpu_seconds")
# glibc gives large buffers back after each use. Trainers that make a (B, F) tensor anew at every step lose up to half
# of their time to that on a CPU; all are spared it alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"}


# --------------------------------------------------------------------------------------------------
# one evaluator


class Plain(NamedTuple):
    """A TopK SAE in one convention: codes are the K largest of (x - b_dec) W_enc + b_enc, then ReLU.

    ReLU before or after the selection is the same: what it makes 0 is 0 either way.
    """

    W_enc: Tensor  # (D, F)
    b_enc: Tensor  # (F,)
    W_dec: Tensor  # (F, D)
    b_dec: Tensor  # (D,)


def plain(library: str, tensors: dict[str, Tensor], *, rescale: bool = False) -> Plain:
    """What a library saved, in the one convention. rescale: latents were chosen by pre * norm of their decoder row."""
    if library in ("nanosae", "sae-lens"):
        sae = Plain(*(tensors[name] for name in Plain._fields))
    else:
        W_dec = tensors["W_dec"] if library == "eai-sparsify" else tensors["decoder.weight"].t()
        sae = Plain(tensors["encoder.weight"].t(), tensors["encoder.bias"], W_dec, tensors["b_dec"])
    if rescale:
        norms = sae.W_dec.norm(dim=1)
        sae = Plain(sae.W_enc * norms, sae.b_enc * norms, sae.W_dec / norms[:, None], sae.b_dec)
    return sae


def encode(sae: Plain, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Codes of x (B, D): values and indices, (B, K)."""
    values, indices = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(k, dim=1)
    return values.relu(), indices


@torch.no_grad()
def evaluate(sae: Plain, x: Tensor, k: int, *, batch_size: int = 4096) -> dict[str, float]:
    """Explained variance 1 - sum e^2 / sum (x - mean)^2, L0, and the share of latents that fired on no row of x."""
    fired = torch.zeros(len(sae.b_enc), dtype=torch.bool)
    mean = x.double().mean(0)
    error = variance = active = 0.0
    for rows in x.split(batch_size):
        values, indices = encode(sae, rows, k)
        dense = torch.zeros(len(rows), len(fired)).scatter_(1, indices, values)
        error += float((rows - dense @ sae.W_dec - sae.b_dec).double().square().sum())
        variance += float((rows - mean).square().sum())
        active += float((values > 0).sum())
        fired[indices[values > 0]] = True
    return {
        "explained_variance": 1 - error / variance,
        "l0": active / len(x),
        "dead_fraction": float((~fired).double().mean()),
    }


# --------------------------------------------------------------------------------------------------
# runs


def matched(width: int, tokens: int) -> dict[str, Any]:
    """What nanoSAE's own defaults come to in a run of so many tokens.

    But a latent is dead for the peers after a twentieth of the run, not after two steps as here: their AuxK takes D/2
    latents and is meant for few.
    """
    c = SAEConfig(d_in=width, expansion_factor=EXPANSION, k=K)
    n_steps = tokens // c.batch_size
    return {
        "lr": sched.peak_lr(c),
        "batch": c.batch_size,
        "warmup_steps": sched.warmup_steps(c, n_steps),
        "decay_steps": round(c.decay_fraction * n_steps),
        "auxk": c.auxk_alpha,
        "dead_after_tokens": tokens // 20,
    }


def jobs(args: argparse.Namespace, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """All runs, seed by seed. nanoSAE is its own match."""
    (hook,) = manifest["hookpoints"].values()
    same = matched(hook["d_in"], args.tokens)
    data = {key: manifest[key] for key in ("model_hash", "dataset_hash", "ctx_len", "n_tokens")}
    return [
        {
            "library": library,
            "setting": setting,
            "seed": seed,
            "tokens": args.tokens,
            "k": K,
            "d_sae": EXPANSION * hook["d_in"],
            "matched": same if setting == "matched" else None,
            "data": data,
        }
        for seed in range(args.seeds)
        for setting in SETTINGS
        for library in LIBRARIES
        if (library, setting) != ("nanosae", "matched")
    ]


def folder(args: argparse.Namespace, job: dict[str, Any]) -> Path:
    return Path(args.work) / f"{job['library']}_{job['setting']}_{job['tokens']}_{job['seed']}"


def finished(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a run that was made before with the same job."""
    path = folder(args, job) / "row.json"
    row = json.loads(path.read_text()) if path.is_file() else None
    return row if row and row["job"] == job else None


def run(args: argparse.Namespace, job: dict[str, Any], held_out: Tensor) -> dict[str, Any]:
    """Train in a process of its own, then measure."""
    out = folder(args, job)
    out.mkdir(parents=True, exist_ok=True)
    (out / "row.json").unlink(missing_ok=True)
    ours = job["library"] == "nanosae"
    if not (ours or args.peers_python):
        sys.exit(f"{job['library']} needs --peers_python, the Python of the environment it is installed in")
    (out / "job.json").write_text(json.dumps({**job, "activations": args.activations, "out": str(out)}))
    env = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    # peers do not see this checkout, nor nanoSAE their environment
    env["PYTHONPATH"] = str(ROOT) if ours else ""
    command = [sys.executable if ours else args.peers_python, "-u", str(ROOT / "benchmarks" / "peers_runner.py")]
    with (out / "log.txt").open("w") as log:
        got = subprocess.run([*command, str(out / "job.json")], env=env, cwd=out, stdout=log, stderr=log, check=False)
    if got.returncode:
        sys.exit(f"{out.name} failed:\n" + (out / "log.txt").read_text()[-2000:])
    made = json.loads((out / "run.json").read_text())
    rescale = made["settings"].get("rescale_acts_by_decoder_norm", False)
    sae = plain(job["library"], load_file(out / "weights.safetensors"), rescale=rescale)
    row = {"job": job, **made, **evaluate(sae, held_out, job["k"])}
    (out / "row.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, by library and setting."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["job"]["library"], row["job"]["setting"]), []).append(row)
    result = []
    for (library, setting), group in groups.items():
        line: dict[str, Any] = {"library": library, "setting": setting, "seeds": len(group)}
        line |= {"version": group[0]["version"], "settings": group[0]["settings"]}
        for name in METRICS:
            values = [row[name] for row in group]
            line[name] = {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
        result.append(line)
    return result


def say(row: dict[str, Any]) -> None:
    name = " ".join((row["job"]["library"], row["job"]["setting"], f"seed {row['job']['seed']}"))
    print(
        f"{name:36} EV {row['explained_variance']:.4f}   L0 {row['l0']:.2f}   dead {100 * row['dead_fraction']:.2f}%   "
        f"{row['seconds']:.0f} s (processor {row['cpu_seconds']:.0f} s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", required=True, help="folder written by sae_collect")
    parser.add_argument("--peers_python", help="Python of the environment that has the peers")
    parser.add_argument("--work", required=True, help="folder that keeps finished runs")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of training (a few, to try it out)")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--only", nargs="+", default=[], help="libraries, or library:setting")
    parser.add_argument("--fresh", action="store_true", help="make the chosen runs anew")
    args = parser.parse_args()
    args.work, args.activations = str(Path(args.work).resolve()), str(Path(args.activations).resolve())
    if args.tokens > HELD_OUT_FROM:
        sys.exit(f"--tokens {args.tokens} reaches into the held-out rows; give at most {HELD_OUT_FROM}")

    manifest = json.loads((Path(args.activations) / "manifest.json").read_text())
    numbers = read(Path(args.activations), HELD_OUT_FROM - 1, manifest["n_tokens"], numbers=True)[:, 0]
    first = HELD_OUT_FROM - 1 + int((numbers > numbers[0]).argmax())
    held_out = torch.from_numpy(read(Path(args.activations), first, manifest["n_tokens"]))
    torch.set_num_threads(args.threads)

    plan = jobs(args, manifest)
    for job in plan:
        chosen = not args.only or {job["library"], f"{job['library']}:{job['setting']}"} & set(args.only)
        if chosen and (args.fresh or finished(args, job) is None):
            say(run(args, job, held_out))

    rows = [row for job in plan if (row := finished(args, job))]
    print(f"\n{len(rows)} of {len(plan)} runs are there")
    for row in rows:
        say(row)
    if len(rows) == len(plan) and args.tokens == TOKENS:
        job = {
            "threads": args.threads,
            "tokens": args.tokens,
            "held_out_tokens": len(held_out),
            "hookpoint": next(iter(manifest["hookpoints"])),
            "d_in": held_out.shape[1],
            "d_sae": plan[0]["d_sae"],
            "k": K,
        }
        result = {"about": about() | job, "summary": summary(rows), "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
