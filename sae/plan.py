"""Estimates of what a run will need, before it starts: its SAEs, their place on several processes, memory and time.

From settings and shapes alone. Letters: B tokens in a batch, D width, F latents.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from sae import distributed
from sae.config import SAEConfig, TrainConfig, UserError, kind_of, variants
from sae.data.training import collected_source, trained_at, with_inputs
from sae.hookpoints import SAEName, choose, places
from sae.kernels.sparse import tokens_at_once
from sae.lm.language_model import best_device, outline
from sae.models import KINDS
from sae.schedules import n_latents, tokens_per_step

Mesh = tuple[int, int, int]  # groups of SAEs, replicas, shards of latents
OPTIMISER_BYTES = {"adam": 8, "adam8bit": 2, "muon": 4, "signum": 4, "sgd": 4}  # per parameter

# --------------------------------------------------------------------------------------------------
# which SAEs, and where


class Layout(NamedTuple):
    """The mesh of processes, the group of them that trains each SAE, and the hookpoints that each group needs."""

    shape: Mesh
    owner: dict[str, int]
    wanted: list[list[str]]

    def lines(self) -> list[str]:
        """The SAEs of each group, where there are several."""
        named = [", ".join(name for name, group in self.owner.items() if group == g) for g in range(self.shape[0])]
        return [f"  group {group}: {names}" for group, names in enumerate(named) if len(named) > 1]


def settings_of_saes(c: TrainConfig, widths: Mapping[str, int], hookpoints: Sequence[str]) -> dict[str, TrainConfig]:
    """A config for every hookpoint and combination of swept settings, by name."""
    configs = {}
    for hookpoint in hookpoints:
        d_in, d_out = (widths[place] for place in places(hookpoint, c.transcode))
        for flag, given, width in (("d_in", c.d_in, d_in), ("d_out", c.d_out, d_out)):
            if given not in (None, width):
                raise UserError(f"--{flag} {given} was given and '{hookpoint}' is {width} wide; leave --{flag} out")
        for label, one in variants(c).items():
            name = str(SAEName(hookpoint, label))
            configs[name] = replace(one, d_in=d_in, d_out=d_out, hook_point=hookpoint)
    return configs


def lay_out(c: TrainConfig, configs: Mapping[str, SAEConfig], n_processes: int) -> Layout:
    """The SAEs shared out by what a step of each costs."""
    apart, n = c.distribute_modules, len(configs)
    shape = distributed.arrange(n_processes, n_saes=n, shard_latents=c.shard_latents, distribute_modules=apart)
    costs = {name: float(n_latents(one) * (one.d_in or 0)) for name, one in configs.items()}
    owner = distributed.balance(costs, shape[0])
    wanted: list[list[str]] = [[] for _ in range(shape[0])]
    for name, group in owner.items():
        wanted[group] += places(SAEName.parse(name).hookpoint, c.transcode)
    return Layout(shape, owner, wanted)


def check_processes(c: TrainConfig) -> None:
    """Raise UserError for what the number of processes does not allow."""
    several, in_parts = distributed.started(), c.shard_latents > 1 or c.distribute_modules
    if several and c.loss_fn in ("ce", "kl") and (in_parts or kind_of(c).needs_batch(c)):
        alone = [name for name, kind in KINDS.items() if not kind.needs_batch(c)]
        raise UserError(
            f"--loss_fn {c.loss_fn} trains through the model: several processes can be replicas and no more, with "
            f"latents chosen token by token ({', '.join(alone)}); leave out "
            "--shard_latents, --distribute_modules and other kinds, or run it without torchrun"
        )
    if in_parts and not several:
        layout = f"--shard_latents {c.shard_latents}" if c.shard_latents > 1 else "--distribute_modules"
        raise UserError(f"{layout} is for several processes; start them with torchrun")


# --------------------------------------------------------------------------------------------------
# what that takes


def lines(c: TrainConfig) -> list[str]:
    """What the run would take on as many processes as were started."""
    n, device = int(os.environ.get("WORLD_SIZE", "1")), best_device(distributed.local_device(c.device))
    model_numbers = model_bytes = 0
    if c.activations is not None:
        source = collected_source(c)
        widths, hookpoints = source.widths, trained_at(c, source)
    else:
        lm = outline(c.model)
        hookpoints = choose(c, lm.module)
        widths = lm.widths(with_inputs(hookpoints, c.transcode))
        model_numbers = sum(p.numel() for p in lm.module.parameters())
        blocks = 16 * c.model_batch_size * min(c.ctx_len, lm.max_len) * lm.d_model  # what they hold in a forward
        model_bytes = (4 if c.model_dtype == "float32" else 2) * (model_numbers + blocks)
    configs = settings_of_saes(c, widths, hookpoints)
    shape, owner, _ = lay_out(c, configs, n)
    groups = [[one for name, one in configs.items() if owner[name] == group] for group in range(shape[0])]
    each = [memory(c, saes, widths, model_bytes, shape, device.type) for saes in groups]
    parts = max(each, key=lambda parts: sum(parts.values()))
    room = machine_memory(device) / (n if device.type == "cpu" else 1)
    rate = tokens_per_second(c, list(configs.values()), model_numbers, shape, flops_here(device))
    total, peak = sum(map(parameters, configs.values())), sum(parts.values())
    cache = 4 * c.max_tokens * sum(widths.values())
    mib = lambda name, size: f"  {name:16} {size / 2**20:10,.0f} MiB"
    return [
        f"{len(configs)} SAEs, {total:,} parameters; {n} processes: modules x data x latents = {shape}",
        *(mib(name, size) for name, size in parts.items()),
        f"{mib('peak per process', peak)} of {room / 2**20:,.0f}: {advice(c, parts, room)}",
        f"about {rate:,.0f} tokens/s, {c.max_tokens * c.num_epochs / rate:,.0f} s by arithmetic alone",
        f"a cache of the activations: {cache / 2**30:,.2f} GiB as float32",
    ]


def parameters(c: SAEConfig, shards: int = 1) -> int:
    """Numbers in the SAE that one process holds: W_enc and W_dec (tied: one of them), biases, b_dec, W_skip."""
    D, D_out, F = c.d_in or 0, c.d_out or c.d_in or 0, n_latents(c) // shards
    matrices = F * D_out + (0 if c.tied else F * D)
    return matrices + kind_of(c).n_biases * F + D_out + (D * D_out if c.skip_connection else 0)


def memory(
    c: TrainConfig, saes: Sequence[SAEConfig], widths: Mapping[str, int], model_bytes: int, shape: Mesh, device: str
) -> dict[str, float]:
    """Bytes of one process at its peak, by part: of one that trains `saes` on activations of these widths.

    On CPUs the process itself is among them, at what it takes before anything is loaded.
    """
    n_processes = shape[0] * shape[1] * shape[2]
    b, n_slots = tokens_per_step(c) // shape[1], min(c.buffer_tokens, c.max_tokens * c.num_epochs)
    numbers = [parameters(one, shape[2]) for one in saes]
    size = sum(numbers)
    learnt = {one.hook_point: (one.d_out or 0) + (one.d_in or 0) * one.transcode for one in saes}
    own_widths = sum(learnt.values())
    rows = max(n_slots // n_processes, 1) * sum(widths.values())
    latents = [n_latents(one) // shape[2] for one in saes]
    product = max((min(b, tokens_at_once(F, device)) if device == "cpu" else b) * F for F in latents)
    wide = max((one.d_in or 0) + (one.d_out or 0) for one in saes)
    sample = n_slots // shape[1]
    # the largest of three: looking at a first sample in float64, a step, a checkpoint with copies for raw activations
    starting = 4 * sample * own_widths + 4 * sample * wide + 24 * sample * wide // 2
    moments = OPTIMISER_BYTES[c.optimizer] * (1 if c.optimizer_dtype == "float32" else 0.5) * size
    stepping = 4 * size + moments
    batch = 4 * product + 16 * b * wide + 8 * b * own_widths
    saving = 8 * max(numbers) + 4 * rows
    parts: dict[str, float] = {"process": _own_size() if device == "cpu" else 0, "language model": model_bytes}
    parts |= {"weights": 4 * size, "gradients": 4 * size}
    parts |= {"optimiser": moments + (4 * size if c.ema else 0), "counts": 48 * sum(latents), "buffer": 4 * rows}
    parts |= {"held out": 4 * c.val_tokens * own_widths // shape[1]}
    return {**parts, "activations": max(batch, saving, starting - stepping)}


def _own_size() -> int:
    """Bytes that this process takes now."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 300 << 20)


def machine_memory(device: torch.device) -> float:
    """Bytes of memory that a process may use here."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def flops_here(device: torch.device) -> float:
    """Floating point operations per second of a matrix product, measured in a moment."""
    x = torch.randn(1024, 1024, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        (x @ x).sum().item()
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def tokens_per_second(
    c: TrainConfig, saes: Sequence[SAEConfig], model_parameters: int, shape: Mesh, flops: float
) -> float:
    """Of all processes, by arithmetic: a forward of the model, and 1.5 encoder products per SAE and use of a token."""
    n_processes = shape[0] * shape[1] * shape[2]
    forward = 2.0 * model_parameters / n_processes
    step = sum(3.0 * (one.d_in or 0) * n_latents(one) for one in saes) / n_processes
    return flops / (forward / c.num_epochs + step)


def advice(c: TrainConfig, parts: Mapping[str, float], room: float) -> str:
    """What to change when it does not fit."""
    if sum(parts.values()) <= room:
        return "fits"
    changes = {
        "buffer": "lower --buffer_tokens",
        "held out": "lower --val_tokens",
        "language model": "give a smaller --model",
        "activations": "lower --batch_size or raise --micro_acc_steps, and lower --buffer_tokens",
    }
    largest = max((name for name in parts if name != "process"), key=lambda name: parts[name])
    ways = changes.get(
        largest, f"give --shard_latents {2 * c.shard_latents} on more processes, or lower --expansion_factor"
    )
    return f"does not fit; most goes into {largest}: {ways}"
