"""The run directory: what its files are, and an SAE from it with the model, hookpoint and text it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae import distributed, files, hooks, log
from sae.config import ChatConfig, EvalConfig, UserError
from sae.data.datasets import Dataset, open_dataset
from sae.formats import store
from sae.lm.language_model import LanguageModel, best_device, load_language_model
from sae.models import SAE


class Opened(NamedTuple):
    """An SAE with the model, hookpoint and text it belongs to, what its cfg.json says of them, its folder, and where
    what is found about it goes."""

    lm: LanguageModel
    sae: SAE
    hookpoint: str
    dataset: Dataset
    trained_on: dict[str, Any]
    folder: Path
    out: Path


def text_of(c: EvalConfig | ChatConfig, trained_on: Mapping[str, Any]) -> str | None:
    """The text that a config names, else the one an SAE was trained on; None is the embedded one."""
    name = trained_on.get("dataset_path")
    return c.dataset if c.dataset is not None else None if name == "embedded" else name


def trained_model(
    c: EvalConfig | ChatConfig, trained_on: Mapping[str, Any], device: torch.device
) -> LanguageModel | None:
    """The model that a config names, else the one an SAE was trained on, in the dtype of then; None if neither says."""
    name = c.model or trained_on.get("model_name")
    dtype = c.model_dtype or trained_on.get("model_dtype", "float32")
    return load_language_model(name, device=device, dataset=text_of(c, trained_on), dtype=dtype) if name else None


def open_sae(c: EvalConfig, lm: LanguageModel | None = None) -> Opened:
    """The SAE a config means and what it belongs to. lm: its model, where that is loaded already."""
    path = Path(c.sae_path) if c.sae_path else store.newest_run("sae_models")
    device = best_device(distributed.local_device(c.device))
    sae = store.load_sae(c.sae_path or path, device=device)
    trained_on = store.load_cfg(c.sae_path or path)
    folder = store.find_sae(c.sae_path or path).parent
    log.say(f"SAE: {c.sae_path or folder}")
    out = Path(c.output_dir) if c.output_dir else folder
    files.check_writable(out, "--output_dir")
    hookpoint = trained_on.get("hookpoint")
    if not hookpoint:
        raise UserError(f"'{path}' does not say which hookpoint it belongs to; its cfg.json needs metadata.hookpoint")
    lm = lm or trained_model(c, trained_on, device)
    if lm is None:
        origin = trained_on.get("activations_file", "activations")
        raise UserError(
            f"'{path}' was trained on '{origin}', which names no model; give --model and --dataset, and train with "
            f"--hook_point if '{hookpoint}' is not the module in it that the activations come from"
        )
    # how its own text was read says nothing about another
    how = {k: trained_on[k] for k in ("text_column", "split", "streaming") if k in trained_on and not c.dataset}
    dataset = open_dataset(text_of(c, trained_on), **how)
    if "model_name" not in trained_on:
        hookpoint = hooks.resolve(lm.module, hookpoints=[hookpoint])[0]
    return Opened(lm, sae, hookpoint, dataset, trained_on, folder, out)
