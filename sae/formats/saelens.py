"""SAELens's cfg.json: the one we write beside weights, and those that SAELens wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.base import SAE
from sae.config import VERSION, SAEConfig, UserError, kind_of
from sae.hookpoints import places

# The SAELens whose layout this is; its loader takes the old flat layout for anything below 6.0.
SAELENS_VERSION = "6.54.12"
READS = {"topk": "topk", "abstopk": "abstopk", "standard": "relu", "gated": "gated", "jumprelu": "jumprelu"}


def architecture(c: SAEConfig) -> str:
    """SAELens's name for an SAE; kinds that it does not have go by our own."""
    name = kind_of(c).saved_as(c)
    if not c.transcode:
        return name
    return f"{'' if name == 'standard' else name + '_'}{'skip_' if c.skip_connection else ''}transcoder"


def cfg_of(sae: SAE, metadata: dict[str, Any]) -> dict[str, Any]:
    """The contents of cfg.json for an SAE; metadata: entries for its "metadata"."""
    c = sae.config
    if "hookpoint" in metadata:
        reads, writes = places(metadata["hookpoint"], c.transcode)
        names = {"hook_name": reads, "hook_name_out": writes} if c.transcode else {"hook_name": reads}
        metadata = {**names, **metadata}
    cfg = {
        "architecture": architecture(c),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not c.transcode,
        "normalize_activations": "layer_norm" if sae.layer_norm else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "nanosae_version": VERSION,
            **metadata,
            "nanosae": c.to_dict(),
        },
    }
    if cfg["architecture"] in ("topk", "abstopk"):
        cfg |= {"k": c.k, "rescale_acts_by_decoder_norm": False}
    return cfg | ({"d_out": sae.d_out} if c.transcode else {})


def read(cfg: dict[str, Any], weights: dict[str, Tensor], where: Path) -> tuple[SAEConfig, dict[str, Tensor]]:
    """The config and weights that a cfg.json and its weights file mean. Raises UserError for what is not read yet."""
    ours = cfg["metadata"].get("nanosae")
    if isinstance(ours, dict):
        return SAEConfig.from_dict(ours), weights
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
        raise UserError(f"'{where.parent / 'cfg.json'}' has d_in, d_sae, k = {sizes}; whole numbers were wanted")
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
    unit_rows = bool(((norms - 1).abs() < 1e-3).all())
    norm: Any = "layer_norm" if cfg.get("normalize_activations") == "layer_norm" else "unit"
    fields: dict[str, Any] = {"transcode": transcode, "skip_connection": skip, "normalize_decoder": unit_rows, **sizes}
    return SAEConfig(activation=READS[base], normalize_activations=norm, **fields), weights
