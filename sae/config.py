"""What a run is: frozen dataclasses, their validation, and the command-line flags and json made from them.

Knows nothing of torch. Every flag of every script is a field here, so there is one place to look for its default,
its unit and its meaning. Derived values are functions at the end of the file, never written back into a config.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

VERSION = "0.1.0"


class UserError(ValueError):
    """Bad input, told in one sentence: what was got, what was wanted, what to do. Scripts exit with 2."""


def knob(default: Any, help: str, *, alias: tuple[str, ...] = ()) -> Any:
    """A config field: its default, one line of help (with the unit), and other names its flag goes by."""
    return dataclasses.field(default=default, metadata={"help": help, "alias": alias})


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class SAEConfig:
    """What is learned from activations, and how. Enough for train_sae_from_activations.

    The names are those of the nanochat SAE document where it has one; `--lr` and the like are accepted too.
    """

    d_in: int | None = knob(None, "width of the activations (found from the data when left out)")
    d_sae: int | None = knob(None, "number of latents (default: d_in * expansion_factor)", alias=("num_latents",))
    activation: Literal["topk", "relu", "gated"] = knob("topk", "how latents are made sparse")
    expansion_factor: int = knob(8, "latents per input dimension")
    k: int = knob(32, "latents kept per token (topk)")
    l1_coefficient: float | None = knob(None, "weight of the sparsity penalty (relu, gated; default: by kind)")
    normalize_decoder: bool = knob(True, "keep decoder rows at unit norm")
    auxk_alpha: float = knob(1 / 32, "weight of the AuxK loss that revives dead latents (topk)")
    dead_feature_threshold: int | None = knob(
        None, "tokens without firing until a latent is dead (default: 5% of the run, at most 10M)"
    )
    batch_size: int = knob(1024, "tokens per step")
    num_epochs: int = knob(1, "how often each activation is trained on (the model computes it once)")
    learning_rate: float | None = knob(
        None, "peak step size of Adam (default: by kind, falls as 1/sqrt(d_sae))", alias=("lr",)
    )
    warmup_steps: int | None = knob(
        None, "steps of linear warm-up (default: 5% of the run, at most 1000)", alias=("lr_warmup_steps",)
    )
    decay_fraction: float = knob(0.5, "last part of the run over which the step size falls linearly to 0")
    sparsity_warmup: float = knob(0.2, "first part of the run over which l1_coefficient rises from 0 (relu, gated)")
    clip_norm: float | None = knob(1.0, "largest gradient norm, or none")
    dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the matrix products (weights stay float32)")
    seed: int = knob(0, "seed of initialisation and shuffling")
    hook_point: str = knob("", "where the activations come from, for the record (filled in by sae_train)")
    val_split: float = knob(0.05, "part of collected activations held out for validation")
    eval_every: int = knob(100, "steps between validations")
    save_every: int = knob(500, "steps between checkpoints")
    log_every: int = knob(10, "steps between lines of metrics.jsonl")

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.seed < 2**31, f"seed={self.seed}; it must lie in 0..{2**31 - 1}")
        for name in (
            "expansion_factor",
            "k",
            "batch_size",
            "num_epochs",
            "eval_every",
            "save_every",
            "log_every",
        ):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value}; it must be at least 1")
        for name in ("d_in", "d_sae", "dead_feature_threshold"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value}; it must be at least 1")
        for name in ("decay_fraction", "sparsity_warmup"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value}; it must lie in 0..1")
        require(0 <= self.val_split < 1, f"val_split={self.val_split}; it must lie in 0..1, below 1")
        for name in ("learning_rate", "l1_coefficient", "clip_norm"):
            value = getattr(self, name)
            require(
                value is None or (math.isfinite(value) and value >= 0),
                f"{name}={value}; it must be finite and >= 0",
            )
        require(self.auxk_alpha >= 0, f"auxk_alpha={self.auxk_alpha}; it must be >= 0")
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"warmup_steps={self.warmup_steps}; it must be >= 0",
        )
        if self.activation == "topk" and (self.d_sae or self.d_in):
            n = n_latents(self)
            require(self.k <= n, f"k={self.k} exceeds d_sae={n}; lower --k or raise --expansion_factor")

    @classmethod
    def from_model(cls, model: Any, layer_idx: int, hook_type: str = "resid_post", **fields: Any) -> SAEConfig:
        """A config for the residual width of a model that has `config.n_embd` or `config.hidden_size`."""
        inner = getattr(model, "config", None)
        width = getattr(inner, "n_embd", None) or getattr(inner, "hidden_size", None)
        require(width is not None, "the model has no config.n_embd or config.hidden_size; give d_in yourself")
        return cls(d_in=width, hook_point=f"blocks.{layer_idx}.hook_{hook_type}", **fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as json holds them; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[C], fields: dict[str, Any]) -> C:
        """The config with these fields; an unknown name is an error that suggests the nearest one."""
        return build(cls, fields)


@dataclass(frozen=True)
class DataConfig:
    """Which model reads which text."""

    model: str = knob(
        "pygpt",
        "pygpt, a nanoGPT ckpt.pt, or a HuggingFace folder or id",
        alias=("checkpoint", "model_name"),
    )
    dataset: str | None = knob(
        None,
        "text, jsonl or .bin file, a folder of them, or a nanoGPT data folder (default: the embedded corpus)",
        alias=("dataset_name",),
    )
    text_column: str = knob("text", "field of a jsonl line that holds the text")
    ctx_len: int = knob(256, "tokens per sequence (at most the model's context)")
    model_batch_size: int = knob(16, "sequences per forward of the language model")
    skip_first: bool = knob(False, "leave the first position of every sequence out of training and metrics")
    device: str | None = knob(None, "cpu, cuda, cuda:1, mps (default: the best there is)")

    def check_data(self) -> None:
        """Raise UserError for a value out of range."""
        require(self.ctx_len >= 2, f"ctx_len={self.ctx_len}; a sequence needs at least 2 tokens")
        require(self.model_batch_size >= 1, f"model_batch_size={self.model_batch_size}; it must be at least 1")


HookType = Literal["resid_post", "resid_pre", "resid_mid", "attn", "mlp", "mlp_post_act"]


@dataclass(frozen=True)
class HookConfig:
    """Which activations: layers and a kind of place in them, or module names."""

    layer: int | None = knob(None, "one layer (default: five sixths of the way up; not with --layers)")
    layers: tuple[int, ...] = knob((), "several layers")
    hook_type: HookType = knob("resid_post", "the place in each layer")
    hookpoints: tuple[str, ...] = knob(
        (), "module names or globs ('transformer.h.*.mlp'), or blocks.3.hook_mlp_out; instead of layers"
    )

    def check_hooks(self) -> None:
        """Raise UserError if the place is said twice."""
        given = [f"--{n}" for n in ("layer", "layers", "hookpoints") if getattr(self, n) not in (None, ())]
        require(len(given) <= 1, f"{' and '.join(given)} were given; choose one of them")


@dataclass(frozen=True)
class TrainConfig(SAEConfig, DataConfig, HookConfig):
    """One training run: what is learned (SAEConfig), from which activations, and where the results go."""

    max_tokens: int = knob(
        1_000_000, "tokens to train on; data that ends sooner is repeated", alias=("num_activations",)
    )
    buffer_tokens: int = knob(65_536, "tokens in the mixing buffer (half of it is fresh each time it is refilled)")
    val_tokens: int = knob(32_768, "held-out tokens kept for validation")
    activations: str | None = knob(
        None, "train on collected activations (a folder written by sae_collect) instead of running the model"
    )
    save_dir: str = knob("sae_models", "folder of all runs", alias=("output_dir",))
    run_name: str | None = knob(None, "name of this run's folder (default: layer_10 or the hookpoint)")
    resume: bool = knob(False, "go on from the run's newest checkpoint")
    overwrite: bool = knob(False, "replace an existing run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_data()
        self.check_hooks()
        require(self.max_tokens >= 1, f"max_tokens={self.max_tokens}; it must be at least 1")
        require(
            self.buffer_tokens >= 2 * self.batch_size,
            f"buffer_tokens={self.buffer_tokens} holds less than two batches; "
            f"raise it to {2 * self.batch_size} or lower --batch_size",
        )
        require(self.val_tokens >= 2, f"val_tokens={self.val_tokens}; it must be at least 2")
        require(
            not (self.resume and self.overwrite),
            "--resume and --overwrite were both given; choose one",
        )


@dataclass(frozen=True)
class EvalConfig:
    """sae_eval: how good a trained SAE is, on held-out text."""

    sae_path: str | None = knob(
        None,
        "a run, a hookpoint folder or a weights file (default: the newest run in sae_models)",
        alias=("sae_dir",),
    )
    model: str | None = knob(
        None, "the language model (default: the one the SAE was trained on)", alias=("checkpoint",)
    )
    dataset: str | None = knob(None, "the text (default: held-out text of the SAE's own)")
    eval_tokens: int = knob(131_072, "tokens to evaluate on (special tokens not counted)", alias=("num_test_samples",))
    mean_tokens: int = knob(16_384, "leading tokens that give the mean used by mean ablation")
    ctx_len: int | None = knob(None, "tokens per sequence (default: as in training)")
    model_batch_size: int = knob(16, "sequences per forward of the language model")
    device: str | None = knob(None, "cpu, cuda, cuda:1, mps (default: the best there is)")
    output_dir: str | None = knob(None, "where eval.json and plots/ go (default: beside the SAE)")

    def __post_init__(self) -> None:
        require(self.eval_tokens >= 2, f"eval_tokens={self.eval_tokens}; it must be at least 2")
        require(self.mean_tokens >= 2, f"mean_tokens={self.mean_tokens}; it must be at least 2")
        require(self.model_batch_size >= 1, f"model_batch_size={self.model_batch_size}; it must be at least 1")
        require(self.ctx_len is None or self.ctx_len >= 2, f"ctx_len={self.ctx_len}; it must be at least 2")


@dataclass(frozen=True)
class VizConfig(EvalConfig):
    """sae_viz: what each feature means, as pages that open in a browser."""

    eval_tokens: int = knob(131_072, "tokens to look for contexts in", alias=("num_samples",))
    feature: tuple[int, ...] = knob((), "only these features")
    all_features: bool = knob(False, "a page for every feature (default: the first 1000 that fire)")
    top_k: int = knob(20, "contexts per feature")
    context_tokens: int = knob(24, "tokens shown on each side of the strongest one")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 1, f"top_k={self.top_k}; it must be at least 1")
        require(self.context_tokens >= 1, f"context_tokens={self.context_tokens}; it must be at least 1")
        for i in self.feature:
            require(i >= 0, f"feature {i} was asked for; features are numbered from 0")


@dataclass(frozen=True)
class CollectConfig(DataConfig, HookConfig):
    """sae_collect: write activations to disk once, to train on many times."""

    max_tokens: int = knob(1_000_000, "tokens to collect", alias=("num_activations",))
    storage_dtype: Literal["float32", "bfloat16", "float16"] = knob("float32", "dtype on disk")
    shard_tokens: int = knob(262_144, "tokens per file")
    output_dir: str = knob("activations/default", "folder to write", alias=("save_dir",))
    overwrite: bool = knob(False, "replace an existing folder")

    def __post_init__(self) -> None:
        self.check_data()
        self.check_hooks()
        require(self.max_tokens >= 1, f"max_tokens={self.max_tokens}; it must be at least 1")
        require(self.shard_tokens >= 1, f"shard_tokens={self.shard_tokens}; it must be at least 1")


# --------------------------------------------------------------------------------------------------
# derived values


def n_latents(c: SAEConfig) -> int:
    """F: d_sae, or d_in * expansion_factor."""
    if c.d_sae is not None:
        return c.d_sae
    require(c.d_in is not None, "neither d_sae nor d_in is known; give one of them")
    return typing.cast(int, c.d_in) * c.expansion_factor


def peak_lr(c: SAEConfig) -> float:
    """Adam's step size, ~ 1/sqrt(F) (Gao et al. 2024, arxiv.org/abs/2406.04093); 4e-3 at F = 1536 (dev/LOG.md)."""
    return c.learning_rate if c.learning_rate is not None else 4e-3 / math.sqrt(n_latents(c) / 1536)


def warmup_steps(c: SAEConfig, n_steps: int) -> int:
    """Steps of warm-up in a run of n_steps."""
    return c.warmup_steps if c.warmup_steps is not None else min(1000, n_steps // 20)


def lr_at(step: int, c: SAEConfig, n_steps: int) -> float:
    """Step size of step 0..n_steps-1: linear warm-up (never 0), flat, linear decay towards 0."""
    warm = warmup_steps(c, n_steps)
    decay = c.decay_fraction * n_steps
    factor = min(1.0, (step + 1) / (warm + 1))
    if decay > 0:
        factor = min(factor, (n_steps - step) / decay)
    return peak_lr(c) * max(0.0, factor)


# Found on pygpt layer 10 and MiniLM layer 3 for an L0 near 32 (dev/LOG.md). The penalty is counted in units of
# the activations' own spread (models.py), so that one value serves models of different scale.
L1_DEFAULT = {"topk": 0.0, "relu": 0.1, "gated": 0.3}


def l1_at(step: int, c: SAEConfig, n_steps: int) -> float:
    """Sparsity weight of a step: rises linearly over the first part of the run."""
    full = c.l1_coefficient if c.l1_coefficient is not None else L1_DEFAULT[c.activation]
    ramp = c.sparsity_warmup * n_steps
    return full * min(1.0, (step + 1) / ramp) if ramp >= 1 else full


def dead_after_tokens(c: SAEConfig, n_tokens: int) -> int:
    """Tokens without firing until a latent counts as dead in a run of n_tokens."""
    if c.dead_feature_threshold is not None:
        return c.dead_feature_threshold
    return max(1, min(10_000_000, n_tokens // 20))


# --------------------------------------------------------------------------------------------------
# json and flags

C = TypeVar("C")


def build(cls: type[C], fields: dict[str, Any]) -> C:
    """A config from a plain dict: lists become tuples, unknown names and wrong types are UserErrors."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"unknown setting '{name}'{did_you_mean(name, known)}")
        values[name] = _check(name, hints[name], value)
    return cls(**values)


def check_types(config: Any) -> None:
    """Raise UserError for a field whose value is not of its type (a config made in Python, not from flags)."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        _check(f.name, hints[f.name], getattr(config, f.name))


def read_json(path: str | Path) -> Any:
    """The content of a json file; a missing or broken one is a UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read '{path}': {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"'{path}' is not valid json ({e}); give another file or write it anew") from e


def did_you_mean(name: str, known: typing.Iterable[str], what: str = "") -> str:
    """'; did you mean ...?' or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{what}{near[0]}'?" if near else ""


def _options(hint: Any) -> tuple[list[Any], bool]:
    """The types a field takes, and whether None is one of them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        args = typing.get_args(hint)
        return [a for a in args if a is not type(None)], type(None) in args
    return [hint], False


def _check(name: str, hint: Any, value: Any) -> Any:
    """A json value as the field wants it."""
    (kind, *_), optional = _options(hint)
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, (list, tuple)) and all(isinstance(v, item) for v in value):
            return tuple(value)
        raise UserError(f"{name}={value!r}; a list of {item.__name__} was wanted")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        raise UserError(
            f"{name}={value!r}; one of {', '.join(map(str, choices))} was wanted" + did_you_mean(str(value), choices)
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{name}={value!r}; {kind.__name__} was wanted")


def _parse(kind: Any, optional: bool, text: str) -> Any:
    """A flag's text as the field wants it."""
    if optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int:
            number = float(text) if "e" in text.lower() else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            return float(text)
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' was given; {kind.__name__} was wanted") from None
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _add_flag(parser: _Parser, f: dataclasses.Field, hint: Any) -> None:
    (kind, *_), optional = _options(hint)
    names = [n for flag in (f.name, *f.metadata["alias"]) for n in dict.fromkeys((flag, flag.replace("_", "-")))]
    flags = [f"--{n}" for n in names]
    default = f.default
    shown = "none" if default is None else " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = f.metadata["help"].replace("%", "%%")
    if "default:" not in text and shown != "":
        text += f" [{shown}]"
    options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        parser.add_argument(*flags, nargs="+", type=lambda s: _parse(item, False, s), **options)
    elif kind is bool:
        to_bool = lambda s: _parse(bool, False, s)
        parser.add_argument(*flags, nargs="?", const=True, type=to_bool, metavar="true|false", **options)
        options["help"] = argparse.SUPPRESS
        parser.add_argument(*(f"--no-{n}" for n in names), action="store_const", const=False, **options)
    elif typing.get_origin(kind) is Literal:
        parser.add_argument(*flags, metavar="{" + ",".join(typing.get_args(kind)) + "}", **options)
    else:
        parser.add_argument(*flags, type=lambda s: _parse(kind, optional, s), metavar=kind.__name__, **options)


def from_cli(cls: type[C], argv: list[str], *, prog: str = "", description: str = "") -> C:
    """A config from flags. Later wins: defaults < `--config file.json` < flags; validated once, together.

    Raises UserError for an unknown flag (with the nearest one) or a bad value; `--help` prints and exits.
    """
    parser = _Parser(
        prog=prog,
        description=description or cls.__doc__,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
    )
    parser.add_argument("--config", metavar="file.json", help="settings to start from (a run's config.json)")
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_flag(parser, f, hints[f.name])
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s[2:] for a in parser._actions for s in a.option_strings if s.startswith("--")]
        name = unknown[0].split("=")[0]
        hint = did_you_mean(name.lstrip("-"), known, "--")
        raise UserError(f"unknown argument '{unknown[0]}'{hint or '; --help lists them all'}")
    fields = vars(given)
    path = fields.pop("config", None)
    start = read_json(path) if path else {}
    if isinstance(start, dict):
        start = start.get("config", start)  # a run's config.json keeps the settings under "config"
    require(isinstance(start, dict), f"'{path}' does not hold a json object of settings")
    # whether to resume or overwrite is a matter of this call, not of the run whose settings are taken over
    start = {name: value for name, value in start.items() if name not in ("resume", "overwrite")}
    return build(cls, {**start, **fields})
