"""nanochat models: built by nanochat's own code, which the user has put where Python finds it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sae import files
from sae.config import UserError, require
from sae.lm.face import LanguageModel
from sae.lm.tokenizers import NanochatTokenizer


def newest_checkpoint(path: Path) -> Path | None:
    """The newest model_000500.pt of a folder of nanochat's checkpoints (or that file, beside its meta), else None."""
    step = lambda p: int(p.stem.removeprefix("model_"))
    found = [p for p in (path, *path.glob("model_*.pt")) if re.fullmatch(r"model_\d{6,}\.pt", p.name) and p.is_file()]
    newest = max(found, key=step, default=None)
    if newest is None:
        return None
    meta = newest.with_name(f"meta_{step(newest):06d}.json")
    if meta.is_file():
        return newest
    if newest == path:  # a nanoGPT checkpoint may have any name
        return None
    raise UserError(f"found '{newest}' but not {meta.name} beside it; copy both from nanochat's checkpoints")


def _forward(module: nn.Module, ids: Tensor, valid: Tensor) -> Tensor:
    del valid  # causal, padded on the right: padding cannot be seen
    # without a cache its forward refuses a single position
    return module(ids) if ids.shape[1] > 1 else module(F.pad(ids, (0, 1)))[:, :1]


def load(name: str, file: Path | None, device: torch.device, dtype: str) -> LanguageModel:
    """nanochat:source/tag@step from where that checkout keeps its checkpoints, or one file with its meta.

    dtype: float32 leaves it to nanochat. Raises UserError for a name, a checkout or a file that will not do, and, where
    nanochat chooses a dtype itself (COMPUTE_DTYPE), for any other.
    """
    asked = re.fullmatch(r"nanochat:(\w+)(?:/(\w[\w.-]*))?(?:@(\d+))?", name)
    if file is not None:
        # before nanochat's own loader, which under old versions of torch runs pickles
        files.read_torch(file, mmap=True)
    elif asked is None:
        raise UserError(
            f"'{name}' names no nanochat model; give nanochat:base, nanochat:sft/d20 or nanochat:rl/d20@500"
        )
    manager = _checkpoint_manager(name)
    own = getattr(sys.modules.get("nanochat.common"), "COMPUTE_DTYPE", None)
    computes = dtype if own is None else str(own).removeprefix("torch.")
    require(
        dtype in ("float32", computes),
        f"--model_dtype {dtype}: this nanochat computes in {computes}; set NANOCHAT_DTYPE={dtype} in "
        "the environment, or give --model_dtype float32, which takes what it computes in",
    )
    todo = "check the source, tag and step, and that the files are whole and belong to this checkout"
    with files.one_sentence(f"nanochat cannot load '{file or name}'", todo):
        if file is not None:
            number = int(file.stem.removeprefix("model_"))
            module, tokenizer, _ = manager.build_model(str(file.parent), number, device, phase="eval")
            name = str(file)  # a folder's newest checkpoint today may not be the newest tomorrow
        else:
            assert asked is not None
            source, tag, at = asked.groups()
            step = int(at) if at else None
            module, tokenizer, meta = manager.load_model(source, device, phase="eval", model_tag=tag, step=step)
            if at is None and isinstance(meta.get("step"), int):
                name += f"@{meta['step']:06d}"
    if own is None and dtype != "float32":
        for p in module.parameters():  # and not its rotary tables, whose dtype it insists on
            p.data = p.data.to(getattr(torch, dtype))
    # No resume_fn: between its blocks nanochat mixes the stream with the embeddings, and it subtracts the middle
    # layer's output at the end, so what follows a block depends on more than that block's output.
    config = module.config
    tokenizer = NanochatTokenizer(tokenizer)
    return LanguageModel(module, tokenizer, _forward, name, config.n_embd, config.sequence_len, dtype=computes)


def _checkpoint_manager(name: str) -> Any:
    try:
        return importlib.import_module("nanochat.checkpoint_manager")
    except ImportError as e:
        if e.name == "nanochat":
            raise UserError(
                f"'{name}' is built by nanochat's own code; put its checkout on the path (PYTHONPATH=path/to/nanochat)"
            ) from e
        raise UserError(f"nanochat cannot be imported ({e}); run in the environment of its checkout") from e
