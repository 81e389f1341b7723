"""Save, find and load SAEs: cfg.json and sae_weights.safetensors in a folder, a best_model.pt, or a hub id."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import files
from sae.base import SHARED
from sae.config import UserError, read_json, require
from sae.files import read_safetensors, write_json, write_safetensors
from sae.formats import nanochat, saelens
from sae.hookpoints import natural
from sae.models import SAE, create_sae

WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"


def write_shards(tensors: dict[str, Tensor], sae: SAE, path: Path) -> None:
    """One safetensors file of tensors of which every shard of an SAE has its latents' part; each writes its own.

    Nothing is sent: the processes share the folder. tensors: parameters, or (F,) of any name.
    """
    shards, own = sae.world.latents, slice(sae.own.start, sae.own.stop)
    header, places, end = {}, {}, 0
    for name, x in tensors.items():
        axis = None if name in SHARED else x.ndim - 1 if name == "W_enc" else 0
        shape = [sae.d_sae if i == axis else n for i, n in enumerate(x.shape)]
        places[name] = (end, shape, axis)
        size = math.prod(shape) * x.element_size()
        header[name] = {
            "dtype": {4: "F32", 8: "I64"}[x.element_size()],
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    tmp = path.with_name(f".{path.name}.shards.tmp")
    try:
        if shards.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tmp.open("wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                f.truncate(8 + len(text) + end)
        shards.barrier()
        for name, x in tensors.items():
            start, shape, axis = places[name]
            array = x.detach().cpu().numpy()
            file = np.memmap(tmp, array.dtype, "r+", 8 + len(text) + start, tuple(shape))
            if axis is not None:
                file[(slice(None),) * axis + (own,)] = array
            elif shards.rank == 0:
                file[:] = array
            file.flush()
        shards.barrier()
        if shards.rank == 0:
            with tmp.open("rb+") as f:
                os.fsync(f.fileno())
            tmp.replace(path)
        shards.barrier()
    except OSError as e:
        raise UserError(f"cannot write '{path}': {e.strerror}; choose another folder or free some space") from e


def save_sae(sae: SAE, folder: str | Path, **metadata: Any) -> None:
    """Write cfg.json and sae_weights.safetensors, which SAELens, SAEBench and SAEDashboard open as they are.

    A batch-top-k SAE is written as the JumpReLU SAE that it is at inference. metadata: free entries (model_name,
    hook_name, context_size, dataset_path, ...) for cfg.json's "metadata". Where several processes hold the latents, all
    of them call this.
    """
    folder = Path(folder)
    weights = sae.state_dict()
    weights = {"W_enc": sae.W_enc, **weights} if sae.config.tied else weights
    if sae.world.latents.size > 1:
        write_shards(weights, sae, folder / WEIGHTS)
    else:
        write_safetensors(weights, folder / WEIGHTS)
    if sae.world.latents.rank == 0:
        write_json(saelens.cfg_of(sae, metadata), folder / CFG)


def load_sae(path: str | Path, *, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a run's or hookpoint's folder, a weights file beside its cfg.json, or a best_model.pt; or a hub id.

    Takes raw activations. Raises UserError for a missing, damaged or foreign file, and names missing tensors.
    """
    found = find_sae(path)
    if found.suffix == ".pt":
        config, weights = nanochat.read(files.read_torch(found), found)
    else:
        config, weights = saelens.read(_read_cfg(found.parent / CFG), read_safetensors(found), found)
    sae = _filled(create_sae(config), weights, found)
    for name, x in sae.state_dict().items():  # a latent that is NaN would never be chosen, and hide
        require(not x.isnan().any(), f"'{found}': tensor {name} holds NaN; fetch the file again, or train anew")
    return sae.to(device)


def _read_cfg(path: Path) -> dict[str, Any]:
    cfg = read_json(path)
    if not isinstance(cfg, dict) or not isinstance(cfg.setdefault("metadata", {}), dict):
        raise UserError(f"'{path}' does not hold a json object with metadata; fetch or write it again")
    return cfg


def load_cfg(path: str | Path) -> dict[str, Any]:
    """The metadata that belongs to load_sae(path): what the SAE was trained on."""
    cfg = find_sae(path).parent / CFG
    return _read_cfg(cfg)["metadata"] if cfg.is_file() else {}


def load_saes(
    folder: str | Path, *, device: torch.device | str = "cpu", hook_points: list[str] | None = None
) -> dict[str, SAE]:
    """Every SAE below a folder, by hookpoint in natural order (hook_points: only these).

    Where a hookpoint has several, as after a sweep, each has the name of its folder too: `transformer.h.3/k32`.
    """
    found = sae_folders(folder)
    wanted = hook_points if hook_points is not None else list(found)
    missing = [name for name in wanted if name not in found]
    if missing or not found:
        raise UserError(f"'{folder}' holds {', '.join(found) or 'no SAE'}; wanted {', '.join(missing) or 'some'}")
    return {name: load_sae(found[name], device=device) for name in wanted}


def sae_folders(folder: str | Path) -> dict[str, Path]:
    """Where the SAEs below a folder lie, by the names load_saes gives them, in natural order."""
    folders = [weights.parent for weights in Path(folder).rglob(WEIGHTS)]
    hookpoints = [load_cfg(inner).get("hookpoint") or inner.name for inner in folders]
    found = {
        name if hookpoints.count(name) == 1 else f"{name}/{inner.name}": inner
        for name, inner in zip(hookpoints, folders, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def find_sae(path: str | Path) -> Path:
    """The weights file that a path means."""
    p = Path(path)
    if p.is_dir():
        if (p / WEIGHTS).is_file():
            return p / WEIGHTS
        inside = sorted((w.parent for w in p.rglob(WEIGHTS)), key=lambda w: natural(str(w)))
        if len(inside) == 1:
            return inside[0] / WEIGHTS
        if inside:
            raise UserError(f"'{path}' holds {len(inside)} SAEs; give one of them, such as {inside[0]}")
        raise UserError(f"'{path}' holds no {WEIGHTS}; give a run's folder, or wait for its first checkpoint")
    if p.is_file():
        return p
    if str(path).count("/") in (1, 2) and not p.parent.exists():
        return _from_hub(str(path))
    raise UserError(f"'{path}' does not exist; give a run's folder, a weights file, or a hub id")


def newest_run(root: str | Path) -> Path:
    """The folder of the SAE written last below `root`."""
    weights = list(Path(root).rglob(WEIGHTS))
    if not weights:
        raise UserError(f"there is no trained SAE in '{root}'; run sae_train first, or give --sae_path")
    return max(weights, key=lambda w: w.stat().st_mtime).parent


def _from_hub(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as e:
        raise UserError(f"'{name}' is no path here, and a hub id needs: pip install 'nanosae[hf]'") from e
    repo, _, inside = name.replace("/", "\n", 1).partition("/")
    repo = repo.replace("\n", "/")
    try:
        got = huggingface_hub.snapshot_download(repo, allow_patterns=[f"{inside}*{CFG}", f"{inside}*{WEIGHTS}"])
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"'{name}' is no path here and the hub did not give it ({type(e).__name__})") from e
    return find_sae(Path(got) / inside)


def _filled(sae: SAE, weights: dict[str, Tensor], where: Path) -> SAE:
    """Copy weights in, all of them and no others; the SAE comes back ready for use."""
    wanted = {name: tuple(p.shape) for name, p in sae.state_dict().items()}
    weights = {name: w for name, w in weights.items() if not (sae.config.tied and name == "W_enc")}
    got = {name: tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__ for name, w in weights.items()}
    for name in {*wanted, *got}:
        if wanted.get(name) != got.get(name):
            raise UserError(
                f"'{where}': tensor {name} is {got.get(name, 'missing')} and should be {wanted.get(name, 'absent')}"
            )
    with torch.no_grad():
        for name, p in sae.state_dict().items():
            p.copy_(weights[name])
    return sae.eval()
