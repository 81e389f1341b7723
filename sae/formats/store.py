"""Files: save and load SAEs (safetensors + json, SAELens's own layout), checkpoints, and every write atomic.

What is read is never executed: .pt files go through weights_only, and a broken file is one sentence.
"""

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
from sae.config import VERSION, SAEConfig, UserError, read_json, require
from sae.files import read_safetensors, write_json, write_safetensors
from sae.hooks import natural
from sae.models import SAE, create_sae

WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"
# The SAELens whose layout this is; its loader takes the old flat layout for anything below 6.0.
SAELENS_VERSION = "6.54.12"
ARCHITECTURES = {
    "topk": "topk", "abstopk": "abstopk", "relu": "standard", "gated": "gated", "jumprelu": "jumprelu",
    "batchtopk": "jumprelu", "matryoshka": "jumprelu",
}  # fmt: skip
READS = {"topk": "topk", "abstopk": "abstopk", "standard": "relu", "gated": "gated", "jumprelu": "jumprelu"}

# --------------------------------------------------------------------------------------------------
# atomic writes, safe reads


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


# --------------------------------------------------------------------------------------------------
# SAEs


def architecture(c: SAEConfig) -> str:
    """SAELens's name for an SAE; kinds that it does not have go by our own."""
    kind = "topk" if c.activation == "matryoshka" and c.matryoshka_base == "topk" else c.activation
    if not c.transcode:
        return ARCHITECTURES.get(kind, kind)
    prefix = {"standard": "", "jumprelu": "jumprelu_"}.get(ARCHITECTURES.get(kind, kind), f"{kind}_")
    return f"{prefix}{'skip_' if c.skip_connection else ''}transcoder"


def save_sae(sae: SAE, folder: str | Path, **metadata: Any) -> None:
    """Write cfg.json and sae_weights.safetensors, which SAELens, SAEBench and SAEDashboard open as they are.

    A batch-top-k SAE is written as the JumpReLU SAE that it is at inference. metadata: free entries (model_name,
    hook_name, context_size, dataset_path, ...) for cfg.json's "metadata". Where several processes hold the latents, all
    of them call this.
    """
    c, folder = sae.config, Path(folder)
    if "hookpoint" in metadata:
        at = metadata["hookpoint"]
        names = {"hook_name": f"{at}@in", "hook_name_out": at} if c.transcode else {"hook_name": at}
        metadata = {**names, **metadata}
    about = {"sae_lens_version": SAELENS_VERSION, "nanosae_version": VERSION, **metadata, "nanosae": c.to_dict()}
    cfg = {
        "architecture": architecture(c), "d_in": sae.d_in, "d_sae": sae.d_sae,
        "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": not c.transcode,
        "normalize_activations": "layer_norm" if sae.layer_norm else "none", "reshape_activations": "none",
        "metadata": about,
    }  # fmt: skip
    if cfg["architecture"] in ("topk", "abstopk"):
        cfg |= {"k": c.k, "rescale_acts_by_decoder_norm": False}
    if c.transcode:
        cfg["d_out"] = sae.d_out
    weights = sae.state_dict()
    weights = {"W_enc": sae.W_enc, **weights} if c.tied else weights
    if sae.world.latents.size > 1:
        write_shards(weights, sae, folder / WEIGHTS)
    else:
        write_safetensors(weights, folder / WEIGHTS)
    if sae.world.latents.rank == 0:
        write_json(cfg, folder / CFG)


def load_sae(path: str | Path, *, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a run's or hookpoint's folder, a weights file beside its cfg.json, or a best_model.pt; or a hub id.

    Takes raw activations. Raises UserError for a missing, damaged or foreign file, and names missing tensors.
    """
    found = find_sae(path)
    if found.suffix == ".pt":
        sae = _from_nanochat(files.read_torch(found), found)
    else:
        sae = _from_saelens(_read_cfg(found.parent / CFG), read_safetensors(found), found)
    for name, weights in sae.state_dict().items():  # a latent that is NaN would never be chosen, and hide
        require(not weights.isnan().any(), f"'{found}': tensor {name} holds NaN; fetch the file again, or train anew")
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


def _load_strict(sae: SAE, weights: dict[str, Tensor], where: Path) -> SAE:
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


def _from_nanochat(checkpoint: Any, where: Path) -> SAE:
    """best_model.pt and checkpoints: {"sae_state_dict", "config", ...}."""
    if not isinstance(checkpoint, dict) or not {"sae_state_dict", "config"} <= checkpoint.keys():
        raise UserError(f"'{where}' has no sae_state_dict and config; give a best_model.pt or a run's folder")
    return _load_strict(create_sae(SAEConfig.from_dict(checkpoint["config"])), checkpoint["sae_state_dict"], where)


def _from_saelens(cfg: dict[str, Any], weights: dict[str, Tensor], where: Path) -> SAE:
    ours = cfg["metadata"].get("nanosae")
    if isinstance(ours, dict):
        return _load_strict(create_sae(SAEConfig.from_dict(ours)), weights, where)
    named = str(cfg.get("architecture"))
    transcode, skip = named.endswith("transcoder"), named.endswith("skip_transcoder")
    base = (
        (named.removesuffix("transcoder").removesuffix("skip_").removesuffix("_") or "standard") if transcode else named
    )
    if base not in READS:
        raise UserError(f"'{where}': architecture {named} is not read yet; only {', '.join(READS)} and transcoders")
    norms_read = {"normalize_activations": ("none", "layer_norm"), "reshape_activations": ("none",)}
    for key, fine in norms_read.items():
        if cfg.get(key, fine[0]) not in fine:
            raise UserError(f"'{where}': {key}={cfg[key]} is not read yet; only {' or '.join(fine)}")
    sizes = {name: cfg.get(name, 32) for name in ("d_in", "d_sae", "k")} | {"d_out": cfg.get("d_out", cfg.get("d_in"))}
    if not all(isinstance(n, int) for n in sizes.values()) or not {"d_in", "d_sae"} <= cfg.keys():
        raise UserError(f"'{where.parent / CFG}' has d_in, d_sae, k = {sizes}; whole numbers were wanted")
    biases = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(base, ("b_enc",))
    needed = {"W_enc", "W_dec", "b_dec", *biases, *(("W_skip",) if skip else ())}
    if needed - weights.keys():
        raise UserError(f"'{where}': tensor {min(needed - weights.keys())} is missing; fetch the file again")
    weights = {name: w.float() for name, w in weights.items()}
    norms = weights["W_dec"].norm(dim=1)
    if base in ("topk", "abstopk") and cfg.get("rescale_acts_by_decoder_norm"):
        # latents are chosen by pre * norm there: fold the norms in and choose by pre
        weights |= {"W_enc": weights["W_enc"] * norms, "b_enc": weights["b_enc"] * norms}
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
        norms = torch.ones(1)
    if not transcode and not cfg.get("apply_b_dec_to_input", True):
        bias = "b_gate" if base == "gated" else "b_enc"
        shift = weights["b_dec"] @ weights["W_enc"]
        weights[bias] = weights[bias] + shift
        if bias == "b_gate":
            weights["b_mag"] = weights["b_mag"] + shift * weights["r_mag"].exp()
    config = SAEConfig(
        d_in=cfg["d_in"], d_out=sizes["d_out"], d_sae=cfg["d_sae"], activation=READS[base], k=cfg.get("k", 32),
        normalize_decoder=bool(((norms - 1).abs() < 1e-3).all()), transcode=transcode, skip_connection=skip,
        normalize_activations="layer_norm" if cfg.get("normalize_activations") == "layer_norm" else "unit",
    )  # fmt: skip
    return _load_strict(create_sae(config), weights, where)
