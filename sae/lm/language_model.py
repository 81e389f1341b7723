"""From a model's name to the model: pygpt, nanoGPT and nanochat checkpoints, HuggingFace folders and ids.

A family is a file beside this one, and imports what it needs only when asked for a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from sae import files
from sae.config import ModelDtype, UserError, require
from sae.lm import huggingface, nanochat, nanogpt
from sae.lm.face import LanguageModel as LanguageModel

PYGPT = files.ROOT / "assets" / "pygpt"


def best_device(name: str | None = None) -> torch.device:
    """The device asked for, else cuda where there is one, else cpu (mps only by name: it was never run there)."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device '{name}' is not there ({str(e).splitlines()[0]}); try --device cpu") from e
    return device


def load_language_model(
    name: str = "pygpt", *, device: str | torch.device | None = None, dataset: str | None = None, dtype: str = "float32"
) -> LanguageModel:
    """The model `name` means.

    pygpt; a nanoGPT ckpt.pt (or its folder); nanochat:base, nanochat:sft/d20, nanochat:rl/d20@000500, or a folder of
    nanochat's checkpoints (or one model_000500.pt); or a HuggingFace folder or id. A nanoGPT checkpoint is built by the
    model.py beside sae/, a nanochat one by the nanochat that Python finds.

    dataset: a nanoGPT data folder, where a checkpoint's character table (meta.pkl) may be. dtype: of its weights, and
    so of its products and activations (float32, bfloat16, float16; of nanochat's, float32 is what nanochat chooses).
    Raises UserError for a missing, truncated, foreign or hostile file; nothing in it is ever executed.
    """
    where, known = best_device(str(device) if device is not None else None), get_args(ModelDtype)
    require(dtype in known, f"dtype={dtype!r}; a model computes in {', '.join(known)}")
    if name.startswith("nanochat:"):
        return nanochat.load(name, None, where, dtype)
    path = PYGPT if name == "pygpt" else Path(name)
    if path.is_dir() and (path / "ckpt.pt").is_file():
        return nanogpt.load(path / "ckpt.pt", name, where, dataset, dtype)
    found = nanochat.newest_checkpoint(path)
    if found is not None:
        return nanochat.load(name, found, where, dtype)
    if path.is_file():
        return nanogpt.load(path, name, where, dataset, dtype)
    if path.suffix in (".pt", ".pth", ".bin") or (path.parent != Path() and not path.exists() and name[0] in "./~"):
        raise UserError(f"model '{name}' does not exist; give a ckpt.pt, a HuggingFace folder or id, or pygpt")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"folder '{name}' holds neither a ckpt.pt nor a HuggingFace config.json nor nanochat's model_*.pt; "
            "give another model"
        )
    return huggingface.load(name, where, dtype)


def outline(name: str) -> LanguageModel:
    """The model `name` means without its weights, for shapes only, on the meta device: nanoGPT's and HuggingFace's."""
    path = PYGPT if name == "pygpt" else Path(name)
    path = path / "ckpt.pt" if path.is_dir() else path
    found = nanogpt.outline(path, name) if path.is_file() and path.suffix == ".pt" else huggingface.outline(name)
    if found is None:
        raise UserError(f"'{name}' cannot be planned without loading it; --plan reads nanoGPT's and HuggingFace's")
    return found
