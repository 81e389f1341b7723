"""What a run takes before it is started: memory, time, bytes on the wire. From settings and shapes alone.

Letters: B tokens in a batch, D width, F latents, R replicas, S shards of latents, b = B / R tokens of a replica.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch

from sae.config import SAEConfig, TrainConfig, UserError
from sae.distributed import CAPACITY, DIGIT_BITS
from sae.files import beside, read_torch
from sae.kernels.sparse import tokens_at_once
from sae.lm.language_model import PYGPT, LanguageModel
from sae.schedules import n_latents, tokens_per_step

BIASES = {"gated": 3, "jumprelu": 2}  # vectors (F,) of a kind that have a gradient; others have one


def outline(name: str) -> LanguageModel:
    """The model `name` means without its weights, for shapes only: its module lies on the meta device.

    nanoGPT's and HuggingFace's. Raises UserError for others.
    """
    path = PYGPT / "ckpt.pt" if name == "pygpt" else Path(name) / "ckpt.pt" if Path(name).is_dir() else Path(name)
    with torch.device("meta"), redirect_stdout(sys.stderr):
        if path.is_file() and path.suffix == ".pt" and "model_args" in (found := read_torch(path, mmap=True)):
            model_py = beside("model.py")
            module = model_py.GPT(model_py.GPTConfig(**found["model_args"]))
            d_model, max_len, forward = (module.config.n_embd, module.config.block_size, lambda m, ids, _: m(ids, ids))
        elif importlib.util.find_spec("transformers") and (Path(name) / "config.json").is_file():
            import transformers

            config = transformers.AutoConfig.from_pretrained(name)
            causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ())
            module = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)
            d_model, max_len, forward = config.hidden_size, 1 << 20, lambda m, ids, _: m(ids)
        else:
            raise UserError(f"'{name}' cannot be planned without loading it; --plan reads nanoGPT's and HuggingFace's")
    return LanguageModel(module, None, forward, name, d_model, max_len)


def parameters(c: SAEConfig, shards: int = 1) -> int:
    """Numbers in the SAE that one process holds: W_enc and W_dec (tied: one of them), biases, b_dec, W_skip."""
    D, D_out, F = c.d_in or 0, c.d_out or c.d_in or 0, n_latents(c) // shards
    matrices = F * D_out + (0 if c.tied else F * D)
    return matrices + BIASES.get(c.activation, 1) * F + D_out + (D * D_out if c.skip_connection else 0)


def wire(c: SAEConfig, replicas: int = 1, shards: int = 1, *, any_dead: bool = False) -> dict[str, int]:
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
        found["data"] = 4 * (parameters(c, shards) + n_latents(c) // shards + 2)
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


# --------------------------------------------------------------------------------------------------
# memory and time


OPTIMISER_BYTES = {"adam": 8, "adam8bit": 2, "muon": 4, "signum": 4, "sgd": 4}  # per parameter


def memory(
    c: TrainConfig, saes: Sequence[SAEConfig], widths: Mapping[str, int], model_bytes: int, shape: tuple[int, int, int],
    device: str,
) -> dict[str, float]:  # fmt: skip
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
    parts = {
        "process": _own_size() if device == "cpu" else 0, "language model": model_bytes, "weights": 4 * size,
        "gradients": 4 * size, "optimiser": moments + (4 * size if c.ema else 0),
        "counts": 48 * sum(latents), "buffer": 4 * rows, "held out": 4 * c.val_tokens * own_widths // shape[1],
        "activations": max(batch, saving, starting - stepping),
    }  # fmt: skip
    return {name: float(value) for name, value in parts.items()}


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
    c: TrainConfig, saes: Sequence[SAEConfig], model_parameters: int, shape: tuple[int, int, int], flops: float
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
        "buffer": "lower --buffer_tokens", "held out": "lower --val_tokens", "language model": "give a smaller --model",
        "activations": "lower --batch_size or raise --micro_acc_steps, and lower --buffer_tokens",
    }  # fmt: skip
    largest = max((name for name in parts if name != "process"), key=lambda name: parts[name])
    ways = changes.get(
        largest, f"give --shard_latents {2 * c.shard_latents} on more processes, or lower --expansion_factor"
    )
    return f"does not fit; most goes into {largest}: {ways}"
