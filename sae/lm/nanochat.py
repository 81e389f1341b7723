"""nanochat models: built by nanochat's own code, which the user has put where Python finds it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.config import UserError, require


class Built(NamedTuple):
    """nanochat's GPT and tokenizer, by which name that checkpoint is found again, and the dtype it computes in."""

    module: Any
    tokenizer: Any
    name: str
    dtype: str


def newest_checkpoint(path: Path) -> Path | None:
    """The newest model_000500.pt of a folder of nanochat's checkpoints (or that file, beside its meta), else None."""
    step = lambda p: int(p.stem.removeprefix("model_"))
    files = [p for p in (path, *path.glob("model_*.pt")) if re.fullmatch(r"model_\d{6,}\.pt", p.name) and p.is_file()]
    newest = max(files, key=step, default=None)
    if newest is None:
        return None
    meta = newest.with_name(f"meta_{step(newest):06d}.json")
    if meta.is_file():
        return newest
    if newest == path:  # a nanoGPT checkpoint may have any name
        return None
    raise UserError(f"'{newest}' lies there without {meta.name}; copy both from nanochat's checkpoints")


def build(name: str, file: Path | None, device: torch.device, dtype: str) -> Built:
    """nanochat:source/tag@step from where that checkout keeps its checkpoints, or one file with its meta.

    dtype: float32 leaves it to nanochat. Raises UserError for a name, a checkout or a file that will not do, and, where
    nanochat chooses a dtype itself (COMPUTE_DTYPE), for any other.
    """
    asked = re.fullmatch(r"nanochat:(\w+)(?:/(\w[\w.-]*))?(?:@(\d+))?", name)
    if file is None and asked is None:
        raise UserError(
            f"'{name}' names no nanochat model; give nanochat:base, nanochat:sft/d20 or nanochat:rl/d20@500"
        )
    try:
        manager = importlib.import_module("nanochat.checkpoint_manager")
    except ImportError as e:
        if e.name == "nanochat":
            raise UserError(
                f"'{name}' is built by nanochat's own code; put its checkout on the path (PYTHONPATH=path/to/nanochat)"
            ) from e
        raise UserError(f"nanochat cannot be imported ({e}); run in the environment of its checkout") from e
    own = getattr(sys.modules.get("nanochat.common"), "COMPUTE_DTYPE", None)
    computes = dtype if own is None else str(own).removeprefix("torch.")
    require(
        dtype in ("float32", computes),
        f"--model_dtype {dtype}: this nanochat computes in {computes}; set NANOCHAT_DTYPE={dtype} in "
        "the environment, or give --model_dtype float32, which takes what it computes in",
    )
    try:
        if file is not None:
            step = int(file.stem.removeprefix("model_"))
            module, tokenizer, _ = manager.build_model(str(file.parent), step, device, phase="eval")
            name = str(file)  # a folder's newest checkpoint today may not be the newest tomorrow
        else:
            assert asked is not None
            source, tag, at = asked.groups()
            module, tokenizer, meta = manager.load_model(
                source, device, phase="eval", model_tag=tag, step=int(at) if at else None
            )
            if at is None and isinstance(meta.get("step"), int):
                name += f"@{meta['step']:06d}"
    except Exception as e:
        reason = (str(e).strip().splitlines() or [""])[0]
        raise UserError(
            f"nanochat cannot load '{name}' ({type(e).__name__}: {reason}); "
            "check the source, tag and step, and that the files are whole and belong to this checkout"
        ) from e
    if own is None and dtype != "float32":
        for p in module.parameters():  # and not its rotary tables, whose dtype it insists on
            p.data = p.data.to(getattr(torch, dtype))
    return Built(module, tokenizer, name, computes)
