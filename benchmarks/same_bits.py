"""Two versions of this code, the same command lines: is what they train equal to the last bit?

    python -m benchmarks.same_bits --old COMMIT [--new HEAD] [--only NAME ...] [--quick] [--keep DIR]

Both are cloned (--new . takes the working tree as it is), and each runs the cases below, 60 steps on a tiny model, with
one thread unless a case says otherwise. Compared are sae_weights.safetensors and best_model.pt tensor by tensor, and
metrics.jsonl but for rates: if any of them differs in any case, the exit code is 1. Where only other files of a run
differ, or what it printed, that is said beside the case. --only takes names or patterns ('*_2x2'). With --keep, what
the old version gave lies in DIR/old and is used again, and the logs of both stay there. Resumed runs go on, in the new
version, from the old one's checkpoint of step 30, and are compared with the run that was never stopped.

All cases, of a commit, write benchmarks/results/same_bits.json.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "same_bits.json"
SLOTS = 2  # cases at once, of one process each
LIMIT_S = 300  # for a case
STEPS = 60
BASE = (
    "--model {data}/ckpt.pt --dataset {data}/corpus.txt --layer 1 --ctx_len 64 --d_sae 192 --k 6 --batch_size 256 "
    "--max_tokens 15360 --buffer_tokens 2048 --val_tokens 1024 --eval_every 20 --save_every 30 --log_every 10 "
    "--device cpu --save_dir {out} --run_name run"
)
KINDS = ("topk", "batchtopk", "groupmax", "abstopk", "relu", "gated", "jumprelu", "matryoshka")
MLP = "--hook_type mlp --transcode"


class Case(NamedTuple):
    """Command lines, one after the other: `script flags`, the flags of sae_train in the place of BASE's.

    layout: (replicas, shards). resumes: the case of the old version from whose checkpoint of step 30 it goes on.
    against: the old version's case that it has to equal, if not its own. known: may differ. torchrun: starts it.
    """

    name: str
    commands: tuple[str, ...]
    layout: tuple[int, int] = (1, 1)
    threads: int = 1
    resumes: str = ""
    against: str = ""
    known: bool = False
    torchrun: bool = False

    @property
    def processes(self) -> int:
        return self.layout[0] * self.layout[1]


# ------------------------------------------------------------------------------------- the cases

TRAINED = {  # name: flags of sae_train
    **{kind: f"--activation {kind}" for kind in KINDS},
    **{f"skip_{kind}": f"--activation {kind} {MLP} --skip_connection" for kind in KINDS},
    **{f"plain_{kind}": f"--activation {kind} --kernels plain" for kind in KINDS},
    **{f"bfloat16_{kind}": f"--activation {kind} --dtype bfloat16" for kind in KINDS},
    **{f"parts_{kind}": f"--activation {kind} --grad_acc_steps 2 --micro_acc_steps 2 --max_tokens 30720"
       for kind in KINDS},
    **{f"float16_{kind}": f"--activation {kind} --dtype float16" for kind in ("topk", "jumprelu")},
    "transcode_gated": f"--activation gated {MLP}",
    "transcode_topk_scale": f"{MLP} --normalize_activations expected_norm",
    "ce_topk": "--loss_fn ce", "kl_topk": "--loss_fn kl --fvu_coefficient 0.3",
    "ce_relu": "--loss_fn ce --activation relu", "kl_jumprelu": "--loss_fn kl --activation jumprelu",
    "kl_gated": "--loss_fn kl --activation gated --fvu_coefficient 0.1",
    "kl_batchtopk": "--loss_fn kl --activation batchtopk", "kl_skip": f"--loss_fn kl {MLP} --skip_connection",
    "kl_parts": "--loss_fn kl --grad_acc_steps 2 --micro_acc_steps 2 --max_tokens 30720",
    "mse_topk": "--loss_fn mse", "mse_relu": "--loss_fn mse --activation relu",
    "multi_topk": "--multi_topk", "tied": "--tied", "tied_jumprelu": "--tied --activation jumprelu",
    "ema_topk": "--ema 0.99", "ema_gated": "--ema 0.99 --activation gated",
    "resample_topk": "--resample_every 10 --dead_feature_threshold 300",
    "resample_gated": "--resample_every 10 --dead_feature_threshold 300 --activation gated",
    "resample_jumprelu": "--resample_every 10 --dead_feature_threshold 300 --activation jumprelu --ema 0.99",
    "resample_skip": f"--resample_every 10 --dead_feature_threshold 300 {MLP} --skip_connection",
    **{f"{name}_topk": f"--optimizer {name}" for name in ("signum", "sgd", "muon")},
    "signum_jumprelu": "--optimizer signum --activation jumprelu",
    "signum_resample": "--optimizer signum --resample_every 10 --dead_feature_threshold 300",
    "moments16": "--optimizer_dtype bfloat16", "moments16_gated": "--optimizer_dtype bfloat16 --activation gated",
    **{f"scale_{how}": f"--normalize_activations {how}" for how in ("none", "expected_norm", "layer_norm")},
    "scale_none_jumprelu": "--normalize_activations none --activation jumprelu",
    "layer_norm_gated": "--normalize_activations layer_norm --activation gated",
    **{f"b_dec_{how}": f"--b_dec_init {how}" for how in ("geometric_median", "zeros")},
    "b_dec_skip": f"--b_dec_init geometric_median {MLP} --skip_connection",
    **{f"jumprelu_{how}": f"--activation jumprelu --jumprelu_penalty {how}" for how in ("tanh", "quadratic")},
    "quadratic_parts": "--activation jumprelu --jumprelu_penalty quadratic --micro_acc_steps 2",
    "bandwidth": "--activation jumprelu --bandwidth 0.02", "p_anneal": "--activation relu --p_anneal 0.5",
    "l1_relu": "--activation relu --l1_coefficient 0.2 --l1_weighting plain",
    "l1_gated": "--activation gated --l1_coefficient 0.1 --sparsity_warmup 0.5",
    "l1_jumprelu": "--activation jumprelu --l1_coefficient 0.002",
    "target_l0": "--activation jumprelu --target_l0 12",
    "matryoshka_topk": "--activation matryoshka --matryoshka_base topk",
    "matryoshka_prefixes": "--activation matryoshka --matryoshka_prefixes 0.125 0.5 0.75",
    "skip_matryoshka_topk": f"--activation matryoshka --matryoshka_base topk {MLP} --skip_connection",
    "few_latents": "--d_sae 48 --k 20", "many_latents": "--d_sae 1024 --k 32 --activation batchtopk",
    "dead_tokens": "--dead_feature_threshold 100", "dead_percentage": "--dead_percentage_threshold 0.5",
    "dead_share": "--dead_latent_threshold 0.01 --activation batchtopk", "auxk": "--auxk_alpha 0.5 --d_sae 256 --k 2",
    "auxk_off": "--auxk_alpha 0", "auxk_abstopk": "--dead_feature_threshold 100 --activation abstopk",
    "auxk_skip": f"--dead_feature_threshold 100 {MLP} --skip_connection",
    "lr_small": "--lr 1e-5 --dead_feature_threshold 600", "lr_large": "--lr 0.3 --dead_feature_threshold 600",
    "cosine": "--lr_schedule cosine --warmup_steps 20 --decay_fraction 0.8", "constant": "--lr_schedule constant",
    "weight_decay": "--weight_decay 0.1", "weight_decay_sgd": "--weight_decay 0.1 --optimizer sgd",
    "clip_none": "--clip_norm none", "clip_small": "--clip_norm 0.01 --activation gated",
    "decoder_free": "--no-normalize_decoder", "decoder_unit": "--normalize_decoder --activation relu",
    "encoder_unscaled": "--no-scale_encoder", "epochs": "--num_epochs 2 --max_tokens 7680",
    "eval_often": "--eval_every 3 --log_every 1 --no-save_best", "seeds": "--seed 3 --shuffle_seed 5",
    "sweep": "--k 4 8 --init_seeds 0 1", "sweep_kinds": "--activation topk jumprelu gated --ema 0.99",
    "two_layers": "--layer - --layers 0 2", "hookpoints": "--layer - --hookpoints transformer.h.*.mlp",
    "text": "--skip_first --exclude_tokens 5 17 --ctx_len 33 --model_batch_size 7 --seed 1",
    "text_again": "--max_tokens 61440 --batch_size 1024 --buffer_tokens 4096",
    "model_bfloat16": "--model_dtype bfloat16",
    "assess": "--assess", "threads_topk": "", "threads_gated": "--activation gated",
    "threads_batchtopk": "--activation batchtopk --d_sae 512",
}  # fmt: skip
APART = {  # on several processes
    **{f"{kind}_{r}x{s}": (f"--activation {kind}" + (f" --shard_latents {s}" if s > 1 else ""), (r, s))
       for kind in ("topk", "batchtopk", "jumprelu", "gated") for r, s in ((2, 1), (1, 2), (2, 2))},
    **{f"{kind}_2x2": (f"--activation {kind} --shard_latents 2", (2, 2))
       for kind in ("groupmax", "abstopk", "relu", "matryoshka")},
    "skip_topk_2x2": (f"{MLP} --skip_connection --shard_latents 2", (2, 2)),
    "resample_1x2": ("--resample_every 10 --dead_feature_threshold 300 --shard_latents 2", (1, 2)),
    "kl_topk_2x1": ("--loss_fn kl", (2, 1)), "muon_2x1": ("--optimizer muon --ema 0.99", (2, 1)),
    "parts_2x2": ("--activation batchtopk --micro_acc_steps 2 --shard_latents 2", (2, 2)),
    "modules": ("--layer - --layers 0 2 --distribute_modules", (2, 1)),
}  # fmt: skip
RESUMED = (
    "topk", "jumprelu", "ema_gated", "topk_1x2", "resample_topk", "batchtopk", "matryoshka", "multi_topk", "relu",
    "signum_topk", "muon_topk", "moments16", "float16_topk", "kl_topk", "sweep_kinds", "two_layers", "finetune",
    "activations", "epochs", "skip_gated", "gated_2x2",
)  # fmt: skip
QUICK = (
    *KINDS, "skip_topk", "skip_jumprelu", "kl_topk", "ema_gated", "resample_topk", "multi_topk", "signum_jumprelu",
    "parts_batchtopk", "sweep", "jumprelu_1x2", "topk_2x2", "resume_topk", "resume_jumprelu",
)  # fmt: skip
API = (
    "import torch; from sae import SAEConfig, train_sae_from_activations as train; "
    "g = torch.Generator().manual_seed(0); x = torch.randn(4000, 32, generator=g).relu(); "
    "x = x @ torch.randn(32, 32, generator=g); "
)


def all_cases() -> list[Case]:
    threads = {name: 2 for name in TRAINED if name.startswith("threads_")}
    cases = [Case(name, (f"sae_train {flags}",), threads=threads.get(name, 1)) for name, flags in TRAINED.items()]
    for flags in ("", f" {MLP}"):
        stored = "--layer 1 --max_tokens 20000 --ctx_len 64 --device cpu --output_dir {out}/acts --shard_tokens 7000"
        collect = f"sae_collect --model {{data}}/ckpt.pt --dataset {{data}}/corpus.txt {stored}{flags}"
        train = "sae_train --activations {out}/acts --model - --dataset - --layer - --ctx_len -"
        if not flags:
            cases.append(Case("activations", (collect, train)))
            cases.append(Case("activations_again", (collect, f"{train} --num_epochs 3 --max_tokens 5120")))
        else:
            cases.append(Case("activations_skip", (collect, f"{train} --transcode --skip_connection")))
    from_file = "sae_train --activations {data}/acts.npy --model - --dataset - --layer - --ctx_len - --val_tokens 300"
    cases += [
        Case("activations_file", (from_file,)),
        Case("finetune", ("sae_train --run_name first", "sae_train --seed 1 --finetune {out}/first")),
        Case("finetune_kl", (
            "sae_train --activation gated --run_name first",
            "sae_train --activation gated --loss_fn kl --fvu_coefficient 0.3 --lr 1e-3 --finetune {out}/first",
        )),
        Case("finetune_layers", (
            "sae_train --layer - --layers 0 1 --activation jumprelu --run_name first",
            "sae_train --layer - --layers 0 1 --activation jumprelu --finetune {out}/first --target_l0 4",
        )),
        Case("overwrite", ("sae_train --activation relu", "sae_train --overwrite")),
        Case("k_decay", ("sae_train --k_decay_steps 30",), known=True),
        Case("from_python", (
            f"api {API}train(x, SAEConfig(d_sae=192, k=6, batch_size=256, num_epochs=4, activation='gated', "
            "dead_feature_threshold=600), save_dir='{out}/run')",
        )),
        Case("from_python_skip", (
            f"api {API}train(x, SAEConfig(d_sae=192, k=6, batch_size=256, num_epochs=4, transcode=True, "
            "skip_connection=True), save_dir='{out}/run', targets=x.abs()[:, :24])",
        )),
        Case("torchrun_topk", ("sae_train --shard_latents 2",), layout=(1, 2), against="topk_1x2", torchrun=True),
    ]  # fmt: skip
    cases += [Case(name, (f"sae_train {flags}",), layout=layout) for name, (flags, layout) in APART.items()]
    layouts, again = {c.name: c.layout for c in cases}, "sae_train --resume"
    for name in RESUMED:
        replicas, n = layouts[name]
        shards = f" --shard_latents {n}" if n > 1 else ""
        against = name if replicas == 1 else ""  # replicas have other tokens each after a stop, so that sums round anew
        one = Case(f"resume_{name}", (again + shards,), layout=layouts[name], resumes=name, against=against)
        cases.append(one)
    for name, layout in (("topk_2x2", (1, 1)), ("gated_1x2", (2, 1)), ("jumprelu", (1, 2))):
        shards = f" --shard_latents {layout[1]}" if layout[1] > 1 else ""
        cases.append(Case(f"resume_{name}_on_{layout[0]}x{layout[1]}", (again + shards,), layout=layout, resumes=name))
    return cases


def calls(case: Case, data: Path, out: Path) -> list[list[str]]:
    """[script, flag, value, ...] of each command."""
    found = []
    for command in case.commands:
        script, rest = command.split(" ", 1)
        if script == "api":
            found.append([script, rest.replace("{out}", str(out))])
            continue
        base = BASE if script == "sae_train" and not case.resumes else ""
        base = "--save_dir {out} --run_name run" if case.resumes else base
        flags = dict(_flags(base)) | dict(_flags(rest))
        argv = [word for name, values in flags.items() if values != ["-"] for word in (name, *values)]
        found.append([script, *(word.format(data=data, out=out) for word in argv)])
    return found


def _flags(text: str) -> Iterator[tuple[str, list[str]]]:
    for flag in re.split(r"(?:^|\s)(?=--)", text.strip()):
        name, *values = flag.split() or [""]
        if name:
            yield name, values


# ------------------------------------------------------------------------------------- one side: forks itself for cases


class Running:
    """The processes of a job."""

    def __init__(self, job: dict[str, Any], pids: list[int]):
        self.job, self.pids, self.code, self.since = job, pids, 0, time.monotonic()

    def ended(self, at_once: bool = False) -> bool:
        """Whether they all have; after LIMIT_S, or at once, they are made to."""
        late = time.monotonic() - self.since - LIMIT_S if not at_once else 11.0
        for pid in list(self.pids):
            if late > 10 or (late > 0 and not self.code):
                os.kill(pid, signal.SIGKILL if late > 10 else signal.SIGTERM)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.pids.remove(pid)
                self.code = self.code or os.waitstatus_to_exitcode(status)
        self.code = self.code or int(late > 0)
        return not self.pids


def serve(path: Path) -> None:
    """Run the jobs of a file with the code in the current folder; print `name rc seconds` for each.

    What takes long to import is imported once; every process of every case is a fork of this one, as fresh as if it had
    just been started.
    """
    sys.path[0] = str(Path.cwd())
    for name in ("torch._dynamo", "scripts.sae_train", "scripts.sae_collect"):  # torch takes the first when it is late
        module = importlib.import_module(name)
    assert Path(str(module.__file__)).is_relative_to(Path.cwd()), module.__file__
    waiting, running, parent = json.loads(path.read_text()), list[Running](), os.getppid()
    while waiting or running:
        if os.getppid() != parent:  # nobody waits for this any more
            waiting, running = [], [r for r in running if not r.ended(at_once=True)]
        if waiting and may_start(waiting[0], running):
            running.append(start(waiting.pop(0)))
            continue
        time.sleep(0.01)
        for r in [r for r in running if r.ended()]:
            running.remove(r)
            print(r.job["name"], r.code, f"{time.monotonic() - r.since:.1f}", flush=True)


def may_start(job: dict[str, Any], running: list[Running]) -> bool:
    """Whether there is room for a job, and all of the phases before is done."""
    several = job["processes"] > 1 or any(r.job["processes"] > 1 for r in running)
    room = not several and len(running) < SLOTS and all(r.job["phase"] == job["phase"] for r in running)
    return room or not running


def start(job: dict[str, Any]) -> Running:
    """Fork the processes of a job."""
    out = Path(job["out"])
    if job["resumes"]:
        halve(Path(job["resumes"]), out)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    n = 1 if job["torchrun"] else job["processes"]
    pids = []
    sys.stdout.flush()
    for rank in range(n):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            code = child(job, out, rank, port)
        except BaseException:  # noqa: BLE001 whatever it is must end here and not in the loop above
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return Running(job, pids)


def child(job: dict[str, Any], out: Path, rank: int, port: int) -> int:
    """One process of a case; its exit code."""
    for number, name in ((1, "log"), (2, "errors")):
        os.dup2(os.open(out / f"{name}{rank or ''}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job["torchrun"]:
        script, *argv = job["calls"][0]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job["processes"])]
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", f"scripts.{script}", *argv])
    import torch

    if job["threads"] > 1:
        torch.set_num_threads(job["threads"])
    if job["processes"] > 1:
        n = str(job["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=n, LOCAL_WORLD_SIZE=n)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for script, *argv in job["calls"]:
        if script == "data":
            make_data(Path(argv[0]))
        elif script == "api":
            exec(argv[0], {})
        else:
            sys.argv = [script, *argv]
            sys.modules.pop(f"scripts.{script}", None)
            try:
                runpy.run_module(f"scripts.{script}", run_name="__main__", alter_sys=True)
            except SystemExit as e:
                if e.code:
                    return int(e.code)
    return 0


def halve(old: Path, out: Path) -> None:
    """A copy of a run's folder as it was at its last checkpoint but one."""
    shutil.copytree(old, out)
    number = lambda p: int(re.findall(r"step(\d+)", p.name)[0])
    found = [p for p in out.rglob("checkpoint_step*.pt") if p.is_relative_to(out / "run")]
    last = max(map(number, found))
    for p in found:
        if number(p) == last:
            p.unlink()
    left = max(number(p) for p in found if p.exists())
    import torch

    for best in (out / "run").rglob("best_model.pt"):  # to be found again
        if torch.load(best, weights_only=True)["step"] > left:
            best.unlink()
    for weights in (out / "run").rglob("sae_weights.safetensors"):
        weights.unlink()


def make_data(folder: Path) -> None:
    """A text, a tiny GPT with its tokenizer, and activations."""
    import numpy as np
    import torch

    from model import GPT, GPTConfig, save_atomic
    from tokenizer import BPETokenizer

    rng, words, at = random.Random(0), [], 0
    names = [f"{first}{vowel}n" for first in "bdfgkl" for vowel in "aei"]
    for _ in range(12_000):  # what follows a word depends on it
        at = (at * 3 + rng.choice((1, 1, 1, 5))) % len(names)
        words.append(names[at] + rng.choice(("", "", "", ".", ",", "\n")))
    folder.mkdir(parents=True)
    (folder / "corpus.txt").write_text(" ".join(words))
    BPETokenizer.train([" ".join(words[:4000])], 320).save(folder / "tokenizer.json")
    shape = GPTConfig(block_size=64, vocab_size=320, n_layer=3, n_head=4, n_embd=32, bias=True)
    model = GPT(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():  # larger than at initialisation, so that each layer matters
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    save_atomic(model.to_checkpoint(), folder / "ckpt.pt")
    g = torch.Generator().manual_seed(1)
    mixed = torch.randn(16_384, 64, generator=g).relu() @ torch.randn(64, 32, generator=g)
    np.save(folder / "acts.npy", mixed.numpy())


# ------------------------------------------------------------------------------------- both sides


def checkout(commit: str, folder: Path) -> None:
    """The repository at a commit, or as its files are now ('.'), in a new folder."""
    git = ["git", "-C", str(ROOT)]
    if commit != ".":
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(folder)], check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", full(commit)], check=True)
        return
    listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("assets/", "tests/", "dev/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def full(commit: str) -> str:
    """Its whole name."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{commit}^{{commit}}"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def job_of(case: Case, side: Path, data: Path, old: Path) -> dict[str, Any]:
    """What `serve` takes."""
    out = side / case.name
    return {
        "name": case.name, "calls": calls(case, data, out), "out": str(out), "processes": case.processes,
        "threads": case.threads, "torchrun": case.torchrun, "resumes": str(old / case.resumes) if case.resumes else "",
        "phase": 2 if case.resumes and case.processes == 1 else int(case.processes > 1) + 2 * bool(case.resumes),
    }  # fmt: skip


def run(what: str, commit: str, jobs: list[dict[str, Any]]) -> dict[str, int]:
    """The exit code of every job, run with the code of a commit."""
    jobs = sorted(jobs, key=lambda job: job["phase"])
    codes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="same_bits_") as tmp:
        clone, listed = Path(tmp) / "clone", Path(tmp) / "jobs.json"
        checkout(commit, clone)
        listed.write_text(json.dumps(jobs))
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        env |= {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env["OMP_WAIT_POLICY"] = "passive"  # where others compute too, threads that wait actively take minutes
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(listed)]
        with subprocess.Popen(command, cwd=clone, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                name, code, seconds = line.split()
                codes[name] = int(code)
                print(f"\r{what} {len(codes)}/{len(jobs)} {name} {seconds} s".ljust(78), end="", flush=True)
    print("\r".ljust(79), end="\r")
    return {job["name"]: codes.get(job["name"], -1) for job in jobs}


def old_side(cases: list[Case], every: list[Case], commit: str, keep: Path) -> None:
    """Run in the old version what is not kept of it, for these cases and for what they go on from."""
    old, data = keep / "old", keep / "data"
    by_name = {c.name: c for c in every}
    names = [n for c in cases for n in (c.resumes, c.against or c.name) if n]
    names += [by_name[n].resumes for n in names if by_name[n].resumes]
    jobs = []
    if not (data / "ckpt.pt").is_file():
        shutil.rmtree(old, ignore_errors=True)
        made = {"name": "data", "calls": [["data", str(data)]], "out": str(keep / "made"), "processes": 1, "phase": -1}
        jobs.append({**made, "threads": 1, "torchrun": False, "resumes": ""})
    stamps = {}
    for name in dict.fromkeys(names):
        job = job_of(by_name[name], old, data, old)
        stamp = hashlib.sha256(json.dumps([commit, sys.version, version("torch"), job]).encode()).hexdigest()
        if not (old / name / "stamp").is_file() or (old / name / "stamp").read_text() != stamp:
            shutil.rmtree(old / name, ignore_errors=True)
            jobs.append(job)
            stamps[name] = stamp
    for name, code in run("old", commit, jobs).items() if jobs else ():
        if code == 0 and name in stamps:
            (old / name / "stamp").write_text(stamps[name])


# ------------------------------------------------------------------------------------- what they gave


def tensors_of(path: Path) -> dict[str, Any]:
    """Tensors and other values of a file, by name."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return dict(load_file(path))
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                note(f"{name}.{key}" if name else str(key), one)
        elif isinstance(value, list | tuple):
            for i, one in enumerate(value):
                note(f"{name}.{i}", one)
        else:
            found[name] = value

    note("", torch.load(path, weights_only=True))
    return found


def unlike_tensors(a: Path, b: Path) -> str:
    """Which tensor or value of two files differs, and by how much; '' if none."""
    import torch

    one, other = tensors_of(a), tensors_of(b)
    free = ("save_dir", "finetune", "activations", "resume")
    size = re.compile(r"parts\.\d+\.1")  # of a file, which depends on the length of a process's number
    drop = lambda names: {n for n in names if n.split(".")[-1] not in free and not size.fullmatch(n)}
    if missing := drop(one.keys()) ^ drop(other.keys()):
        return f"{min(missing)} is in one of them only"
    worst, which = -1.0, ""
    for name in drop(one.keys()):
        x, y = one[name], other[name]
        if not isinstance(x, torch.Tensor):
            if repr(x) != repr(y) and not which:
                which = f"{name}: {x!r} and {y!r}"
            continue
        if not isinstance(y, torch.Tensor) or x.dtype != y.dtype or x.shape != y.shape:
            return f"{name} is of another kind or shape"
        bits = [v.contiguous().reshape(-1).view(torch.uint8) for v in (x, y)]
        if not torch.equal(*bits):
            by = float((x.double() - y.double()).abs().nan_to_num(torch.inf).max())
            worst, which = max((worst, which), (by, f"{name} by {by:.3g}"))
    return which


def unlike_texts(a: Path, b: Path, roots: tuple[Path, Path]) -> str:
    """The first lines that differ, but for rates, places and times; '' if none."""
    lines = []
    for path in (a, b):
        text = path.read_text(errors="replace")
        for root in roots:
            text = text.replace(str(root), "OUT")
        if path.suffix == ".json":
            text = json.dumps(_without(json.loads(text)), indent=1)
        found = text.splitlines()
        if path.suffix == ".jsonl":
            found = [json.dumps({k: v for k, v in json.loads(x).items() if k != "tokens_per_s"}) for x in found]
        lines.append([x for x in found if "tokens/s" not in x and "compiling the C++" not in x])
    for x, y in zip(*lines, strict=False):
        if x != y:
            if path.suffix == ".jsonl":
                u, v = json.loads(x), json.loads(y)
                keys = [k for k in {**u, **v} if u.get(k) != v.get(k)]
                return f"step {u.get('step')}, " + ", ".join(f"{k} {u.get(k)} and {v.get(k)}" for k in keys[:2])
            return f"{x.strip()[:60]!r} and {y.strip()[:60]!r}"
    return "" if len(lines[0]) == len(lines[1]) else f"{len(lines[0])} and {len(lines[1])} lines"


def _without(value: Any) -> Any:
    """A json value but for what says where and when it was made."""
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in ("argv", "git_commit", "save_dir", "finetune")}
    return [_without(v) for v in value] if isinstance(value, list) else value


def compare(case: Case, old: Path, new: Path, code: int) -> dict[str, Any]:
    """A row: what differs between two folders of a case."""
    row: dict[str, Any] = {"case": case.name, "steps": steps_of(new), "result": "equal", "differs": "", "others": []}
    if code or not (old / "stamp").is_file():
        where = [*(["new"] if code else []), *([] if (old / "stamp").is_file() else ["old"])]
        log = (new if code else old) / "errors.txt"
        said = [x for x in log.read_text(errors="replace").splitlines() if x.strip()][-1:] if log.is_file() else []
        return row | {"result": "FAILED", "differs": f"in {' and '.join(where)}: {' '.join(said)[-200:]}"}
    names = [{str(p.relative_to(x)) for p in x.rglob("*") if p.is_file()} - {"stamp"} for x in (old, new)]
    if case.against:  # prints something else
        names = [{n for n in some if not n.endswith(".txt")} for some in names]
    worst: list[str] = []
    for name in sorted(names[0] | names[1], key=lambda n: (not n.endswith("sae_weights.safetensors"), n)):
        counts = Path(name).name in ("sae_weights.safetensors", "best_model.pt", "metrics.jsonl")
        another = case.against and Path(name).name == "config.json"
        moved = case.against and case.processes > 1 and Path(name).name.startswith("checkpoint")  # tokens held where
        if name.startswith("errors") or another or moved:
            continue
        if name not in names[0] & names[1]:
            what = f"only in {'old' if name in names[0] else 'new'}"
        elif Path(name).suffix in (".pt", ".safetensors"):
            what = unlike_tensors(old / name, new / name)
        elif Path(name).suffix in (".txt", ".json", ".jsonl"):
            what = unlike_texts(old / name, new / name, (old, new))
        else:
            what = "" if (old / name).read_bytes() == (new / name).read_bytes() else "bytes"
        if what:
            (worst if counts else row["others"]).append(f"{name}: {what}")
    weights = [n for n in names[0] & names[1] if n.endswith("sae_weights.safetensors")]
    if not weights or (worst and row["result"] == "equal"):
        row["result"], row["differs"] = "DIFFERS", "; ".join(worst[:3]) or "no weights were written"
    return row


def steps_of(folder: Path) -> int:
    """The last step in metrics.jsonl."""
    files = [p for p in folder.rglob("metrics.jsonl") if p.stat().st_size]
    return max((json.loads(p.read_text().splitlines()[-1])["step"] for p in files), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", help="the commit that is right")
    parser.add_argument("--new", default="HEAD", help="the commit to compare, or . for the files as they are")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases, by name or pattern")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} of the cases")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the old version's results, to use again")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    if not given.old:
        parser.error("--old is wanted: the commit that is right")
    every = all_cases()
    wanted = QUICK if given.quick else tuple(given.only or ("*",))
    for pattern in wanted:
        if not fnmatch.filter([c.name for c in every], pattern):
            parser.error(f"no case is called {pattern}; there are {' '.join(c.name for c in every)}")
    cases = [c for c in every if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in wanted)]
    with contextlib.ExitStack() as stack:
        keep = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same_bits_kept_")))
        keep.mkdir(parents=True, exist_ok=True)
        fcntl.flock(stack.enter_context((keep / "lock").open("w")), fcntl.LOCK_EX)  # one at a time in a folder
        failed = judge(cases, every, given, keep.resolve())
    sys.exit(int(failed))


def judge(cases: list[Case], every: list[Case], given: argparse.Namespace, keep: Path) -> bool:
    """Run, compare, print and write; whether any case differs that may not."""
    begun = time.monotonic()
    old_side(cases, every, full(given.old), keep)
    between = time.monotonic()
    shutil.rmtree(keep / "new", ignore_errors=True)
    codes = run("new", given.new, [job_of(c, keep / "new", keep / "data", keep / "old") for c in cases])
    if set(codes.values()) == {-1}:
        print("the new version does not start")
        return True
    rows, wide = [], max(len(c.name) for c in cases)
    for c in cases:
        row = compare(c, keep / "old" / (c.against or c.name), keep / "new" / c.name, codes[c.name])
        row["result"] += " (known)" if c.known and row["result"] == "DIFFERS" else ""
        rows.append(row)
        more = f"  [others: {'; '.join(row['others'][:3])}]" if row["others"] else ""
        print(f"{c.name:{wide}} {row['steps']:4}  {row['result']}  {row['differs']}{more}".rstrip(), flush=True)
    n = {what: sum(r["result"].startswith(what) for r in rows) for what in ("equal", "DIFFERS", "FAILED")}
    others, seconds = sum(bool(r["others"]) for r in rows), (between - begun, time.monotonic() - between)
    print(
        f"{len(rows)} cases: {n['equal']} equal, {n['DIFFERS']} differ, {n['FAILED']} failed; other files or texts "
        f"differ in {others}; old {seconds[0]:.0f} s, new {seconds[1]:.0f} s"
    )
    if len(cases) == len(every) and given.new != ".":
        sys.path.append(str(ROOT))
        from benchmarks.machine import about

        versions = {"old": full(given.old), "new": full(given.new), "threads": 1}
        RESULTS.write_text(json.dumps({"about": about() | versions, "rows": rows}, indent=1) + "\n")
    return any(r["result"] in ("DIFFERS", "FAILED") for r in rows)


if __name__ == "__main__":
    main()
