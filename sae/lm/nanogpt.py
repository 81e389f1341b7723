"""nanoGPT checkpoints, ours or anyone's: the model.py beside sae/ builds them."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sae import files
from sae.config import UserError
from sae.lm.face import LanguageModel
from sae.lm.tokenizers import CharTokenizer, TiktokenTokenizer


def _forward(module: nn.Module, ids: Tensor, valid: Tensor) -> Tensor:
    del valid  # causal, padded on the right: padding cannot be seen
    return module(ids, ids)[0]  # nanoGPT's own model gives every position's logits only when it has targets


def _resume(module: nn.Module, hookpoint: str, x: Tensor) -> Tensor | None:
    """What follows block i depends on its output alone, so the blocks before it need not run again."""
    block = re.fullmatch(r"transformer\.h\.(\d+)", hookpoint)
    if block is None:
        return None
    parts: Any = module.transformer
    for layer in parts.h[int(block[1]) + 1 :]:
        x = layer(x)
    return module.get_submodule("lm_head")(parts.ln_f(x))


def _step(module: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    cache = module.new_cache(len(ids)) if cache is None else cache  # type: ignore[operator]
    return module(ids, cache=cache)[0], cache


def load(path: Path, name: str, device: torch.device, dataset: str | None, dtype: str) -> LanguageModel:
    checkpoint = files.read_torch(path)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(found.get(key), dict) for key in ("model", "model_args")):
        raise UserError(f"'{path}' holds {sorted(map(str, found))[:8]}, wanted nanoGPT's model and model_args")
    model_py = files.beside("model.py")
    ours = hasattr(getattr(model_py, "GPT", None), "from_checkpoint_dict")
    try:
        module = model_py.GPT.from_checkpoint_dict(found, str(path)) if ours else _foreign(model_py, found, path)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e
    config = module.config
    tokenizer = _tokenizer(path, found, dataset)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer knows {tokenizer.vocab_size} tokens and '{path}' only {config.vocab_size}; "
            "put the checkpoint's own tokenizer.json or meta.pkl beside it"
        )
    module = module.to(device, getattr(torch, dtype))
    lm = LanguageModel(module, tokenizer, _forward, name, config.n_embd, config.block_size, dtype=dtype)
    if ours:  # another forward may do more between its blocks
        lm.resume_fn, lm.step_fn = _resume, _step
    return lm


def outline(path: Path, name: str) -> LanguageModel | None:
    """The checkpoint's model without weights or tokenizer, on the meta device; None for another family's."""
    found = files.read_torch(path, mmap=True)
    if not isinstance(found, dict) or "model_args" not in found:
        return None
    model_py = files.beside("model.py")
    with torch.device("meta"), redirect_stdout(sys.stderr):
        module = model_py.GPT(model_py.GPTConfig(**found["model_args"]))
    return LanguageModel(module, None, _forward, name, module.config.n_embd, module.config.block_size)


def _foreign(model_py: ModuleType, checkpoint: dict, path: Path) -> Any:
    """The checkpoint's model, by the GPT and GPTConfig of somebody's own model.py; every weight must fit."""
    weights = {str(key).removeprefix("_orig_mod."): w for key, w in checkpoint["model"].items()}  # torch.compile's
    todo = "use the model.py that trained it"
    with (
        files.one_sentence(f"the model.py beside sae cannot build '{path}'", todo),
        torch.random.fork_rng(devices=[]),  # it draws weights
        redirect_stdout(sys.stderr),  # and tells their number
    ):
        module = model_py.GPT(model_py.GPTConfig(**checkpoint["model_args"]))
        wrong = module.load_state_dict(weights, strict=False)
    # whether attention keeps its mask as a buffer depends on the torch that trained it
    odd = [key for key in (*wrong.missing_keys, *wrong.unexpected_keys) if not key.endswith(".attn.bias")]
    if odd:
        raise UserError(f"'{path}' does not fit the model.py beside sae: it lacks or adds {', '.join(odd[:4])}; {todo}")
    return module


def _tokenizer(path: Path, checkpoint: dict, dataset: str | None) -> Any:
    """The tokenizer beside the checkpoint, in the dataset's folder, or GPT-2's."""
    config = checkpoint.get("config")
    trained_on = str(config.get("dataset", "")) if isinstance(config, dict) else ""
    folders = [path.parent, *([Path(dataset)] if dataset else [])]
    if trained_on:
        folders += [root / "data" / trained_on for root in (Path(), path.parent.parent, files.ROOT)]
    file = files.ROOT / "tokenizer.py"
    ours = files.beside("tokenizer.py") if file.is_file() and b"def load_tokenizer(" in file.read_bytes() else None
    try:
        for folder in folders:
            if ours is not None and any((folder / known).is_file() for known in ("tokenizer.json", "meta.pkl")):
                return ours.load_tokenizer(folder)
            if (folder / "meta.pkl").is_file():
                return CharTokenizer.load(folder / "meta.pkl")
        if checkpoint["model_args"].get("vocab_size") in (50257, 50304):
            return ours.BPETokenizer.gpt2() if ours is not None else TiktokenTokenizer.gpt2()
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e
    raise UserError(
        f"no tokenizer for '{path}'; put its {'tokenizer.json or ' if ours is not None else ''}meta.pkl beside it, "
        "or give the nanoGPT data folder as --dataset"
    )
