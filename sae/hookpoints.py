"""Hookpoints: names of places in a model, and where each family of models has them.

A hookpoint is a module path, meaning that module's output, or a path with `@in`, meaning its first input:
`transformer.h.10`, `transformer.h.10.mlp.c_proj@in`. The input of a block need not be the output of the one before:
nanochat scales the stream and adds the embeddings in between. Knows modules; knows nothing of SAEs but their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from sae.config import HookConfig, UserError, did_you_mean

# TransformerLens names of the places in a block, and the hook types they mean.
ALIASES = {
    "hook_resid_post": "resid_post",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_attn_out": "attn",
    "hook_attn": "attn",
    "attn": "attn",
    "hook_mlp_out": "mlp",
    "hook_mlp": "mlp",
    "mlp": "mlp",
    "mlp.hook_post": "mlp_post_act",
}


# Where each architecture family keeps the parts of a layer; the first name that exists is taken.
PARTS = {
    "attn": ("attn", "self_attn", "attention.output.dense", "attention", "self_attention"),
    "mlp": ("mlp", "output.dense", "feed_forward"),
    # GPT-2, Llama, NeoX; in BERT the stream between the halves is what the attention half returns
    "resid_mid": ("ln_2@in", "pre_feedforward_layernorm@in", "post_attention_layernorm@in", "attention"),
    # the input of the last linear map is the post-activation, whether or not the activation is a module
    "mlp_post_act": ("mlp.c_proj@in", "mlp.down_proj@in", "mlp.dense_4h_to_h@in", "mlp.fc2@in", "output.dense@in"),
}


class SAEName(NamedTuple):
    """An SAE of a run: the hookpoint that it writes to, and the label that tells it from others there (a sweep's)."""

    hookpoint: str
    label: str = ""

    @classmethod
    def parse(cls, text: str) -> SAEName:
        """`transformer.h.3/k32` -> its two parts."""
        hookpoint, _, label = text.partition("/")
        return cls(hookpoint, label)

    def __str__(self) -> str:
        return f"{self.hookpoint}/{self.label}" if self.label else self.hookpoint


def input_of(module: str) -> str:
    """The hookpoint of a module's input."""
    return f"{module}@in"


def places(hookpoint: str, transcode: bool) -> tuple[str, str]:
    """The hookpoints that an SAE at `hookpoint` reads and writes: a transcoder reads the module's input."""
    return (input_of(hookpoint) if transcode else hookpoint), hookpoint


def split(hookpoint: str) -> tuple[str, bool]:
    """(module path, whether the input is meant)."""
    path, at, side = hookpoint.partition("@")
    if at and side != "in":
        raise UserError(f"hookpoint '{hookpoint}' ends in '@{side}'; only '@in' (the module's input) is known")
    return path, bool(at)


def layer_list(model: nn.Module) -> str:
    """Path of the list of layers: the nn.ModuleList as long as the config says, else the longest one."""
    config = getattr(model, "config", None)
    wanted = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", None)
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, n in lists.items() if n == wanted] or sorted(lists, key=lists.__getitem__)[-1:]
    if not fitting:
        raise UserError("this model has no nn.ModuleList of layers; name modules with --hookpoints instead")
    return fitting[0]


def n_layers(model: nn.Module) -> int:
    """Number of layers."""
    return len(model.get_submodule(layer_list(model)))  # type: ignore[arg-type]


def at_layer(model: nn.Module, layer: int, hook_type: str = "resid_post") -> str:
    """The hookpoint of a layer. Raises UserError for a layer or a place that the model does not have."""
    n = n_layers(model)
    if not 0 <= layer < n:
        raise UserError(f"layer {layer} was asked for and the model has {n}; choose 0 to {n - 1}")
    path = f"{layer_list(model)}.{layer}"
    if hook_type == "resid_post":
        return path
    if hook_type == "resid_pre":
        return f"{path}@in"
    if hook_type not in PARTS:
        known = ("resid_post", "resid_pre", *PARTS)
        raise UserError(f"hook type '{hook_type}' is not one of {', '.join(known)}")
    parallel = getattr(getattr(model, "config", None), "use_parallel_residual", False)
    if hook_type == "resid_mid" and parallel:
        raise UserError("this model's attention and MLP read the same stream, so nothing lies between; use resid_pre")
    block = model.get_submodule(path)
    here = {name for name, _ in block.named_modules()}
    for part in PARTS[hook_type]:
        if split(part)[0] in here:
            return f"{path}.{part}"
    if hook_type == "resid_mid":  # nanochat's norms are functions
        raise UserError(
            "no module of this model reads the stream between attention and MLP; use resid_pre, attn or mlp"
        )
    raise UserError(f"layers of this model have no place known as {hook_type}; name the module with --hookpoints")


def resolve(
    model: nn.Module, *, hookpoints: Sequence[str] = (), layers: Sequence[int] = (), hook_type: str = "resid_post"
) -> list[str]:
    """Hookpoints meant by globs, TransformerLens names or layer numbers, in natural order, each once.

    With nothing given: the layer five sixths of the way up (10 of 12), where features tend to be most meaningful.
    Raises UserError for a pattern that matches nothing, with the nearest name.
    """
    if hookpoints and layers:
        raise UserError("both layers and hookpoints were given; give one of them")
    found: list[str] = []
    for pattern in hookpoints:
        found += _match(model, pattern)
    if not hookpoints:
        found = [at_layer(model, i, hook_type) for i in layers or (n_layers(model) * 5 // 6,)]
    return sorted(dict.fromkeys(found), key=natural)


def natural(name: str) -> list[Any]:
    """Sort key that puts h.2 before h.10."""
    return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", name) if s]


def _match(model: nn.Module, pattern: str) -> list[str]:
    alias = re.fullmatch(r"blocks\.(\d+)\.(.+)", pattern)
    if alias and alias[2] in ALIASES:
        return [at_layer(model, int(alias[1]), ALIASES[alias[2]])]
    path, is_input = split(pattern)
    names = [name for name, _ in model.named_modules() if name]
    # sparsify's names start below the head ("h.5.mlp"), ours at the top ("transformer.h.5.mlp")
    prefix = getattr(model, "base_model_prefix", "") or "transformer"
    for glob in (path, f"{prefix}.{path}"):
        hits = [name for name in names if fnmatchcase(name, glob)]
        if hits:
            return [name + ("@in" if is_input else "") for name in hits]
    raise UserError(f"hookpoint '{pattern}' matches no module{did_you_mean(path, names) or ''}")


def choose(c: HookConfig, model: nn.Module) -> list[str]:
    """The hookpoints that --layer, --layers, --layer_stride, --hook_type and --hookpoints mean."""
    layers = (c.layer,) if c.layer is not None else c.layers
    if c.layer_stride > 1 and not c.hookpoints:
        layers = tuple(range(0, n_layers(model), c.layer_stride))
    found = resolve(model, hookpoints=c.hookpoints, layers=layers, hook_type=c.hook_type)
    return found[:: c.layer_stride] if c.hookpoints else found
