"""What a run is: frozen dataclasses and their validation. Knows nothing of torch.

Every flag of every script is a field here, so there is one place to look for its default, its unit and its meaning.
Derived values are functions (schedules.py), never written back into a config.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from sae.flags import UserError as UserError
from sae.flags import build, check_types, knob, require, said
from sae.flags import did_you_mean as did_you_mean
from sae.flags import from_cli as from_cli
from sae.flags import read_json as read_json

VERSION = "0.1.0"

MODEL_ALIASES = "checkpoint model_name"
ModelDtype = Literal["float32", "bfloat16", "float16"]
# The kinds that --help names: it answers before models.py, which needs torch, is loaded.
BUILT_IN = ("topk", "batchtopk", "groupmax", "abstopk", "relu", "gated", "jumprelu", "matryoshka")
# The kinds of SAE by the name that --activation takes: classes of models.py, which register themselves. Their class
# attributes (base.py) say which settings they have; where models.py is not loaded, nothing is known of kinds.
KINDS: dict[str, Any] = {}


def kind_of(c: SAEConfig) -> Any:
    """The class of the kind that a config asks for. Raises UserError for an unknown one."""
    require_kind(c.activation)
    return KINDS[c.activation]


def require_kind(name: str) -> None:
    """Raise UserError for an unknown kind; those of models.py are known before it is loaded."""
    known = dict.fromkeys((*BUILT_IN, *KINDS))
    require(name in known, f"activation={name!r}; one of {', '.join(known)} was wanted{did_you_mean(name, known)}")


def kinds_with(flag: str) -> str:
    """The kinds that a setting does something for, in words."""
    return ", ".join(name for name, kind in KINDS.items() if flag in kind.flags)


def at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= least, f"{name}={value}; it must be at least {least}")


def _share(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 <= value <= 1, f"{name}={value}; it must lie in 0..1")


@dataclass(frozen=True)
class SAEConfig:
    """What is learned from activations, and how. Enough for train_sae_from_activations.

    The names are those of the nanochat SAE document where it has one, sparsify's otherwise; aliases are accepted too.
    """

    # what an SAE is
    d_in: int | None = knob(None, "width of the activations (default: found from the data)")
    d_sae: int | None = knob(None, "latents (default: d_in * expansion_factor)", "num_latents n_dirs", sweep=True)
    d_out: int | None = knob(None, "width of a transcoder's output (default: found from the data)")
    activation: str = knob("topk", f"how latents are made sparse: {', '.join(BUILT_IN)}", sweep=True)
    expansion_factor: int = knob(8, "latents per input dimension", sweep=True)
    k: int = knob(32, "latents kept per token (batchtopk, matryoshka: on average over a batch)", sweep=True)
    transcode: bool = knob(False, "train a transcoder: predict a module's output from its input")
    skip_connection: bool = knob(False, "add a linear map from input to output (a skip transcoder)")
    tied: bool = knob(False, "share one matrix: the encoder is the decoder transposed")
    matryoshka_prefixes: tuple[float, ...] = knob(
        (0.0625, 0.25), "parts of the latents that must reconstruct alone too"
    )
    matryoshka_base: Literal["batchtopk", "topk"] = knob("batchtopk", "how matryoshka chooses latents")
    normalize_activations: Literal["unit", "none", "expected_norm", "layer_norm"] = knob(
        "unit", "scale in training: unit variance, none, mean norm sqrt(d), layer norm; saved SAEs take raw activations"
    )
    normalize_decoder: bool | None = knob(
        None, "keep decoder rows at unit norm (default: yes; of transcoders, relu and gated)"
    )

    # what it learns from
    loss_fn: Literal["fvu", "mse", "ce", "kl"] = knob(
        "fvu", "error over the data's variance (fvu; mse as OpenAI), or the model's own loss, end to end (ce, kl)"
    )
    fvu_coefficient: float = knob(0.0, "weight of the reconstruction error beside ce or kl")
    l1_coefficient: float | None = knob(
        None, "weight of the sparsity penalty (default: found by aiming at --target_l0)", sweep=True
    )
    target_l0: float | None = knob(
        None, "active latents per token to aim the penalty's weight at (default: k, unless l1_coefficient)", sweep=True
    )
    l1_weighting: Literal["decoder", "plain"] = knob("decoder", "penalise latents times decoder norms, or latents")
    p_anneal: float | None = knob(None, "exponent that the penalty f^p falls to, from 1, over the last half")
    jumprelu_penalty: Literal["step", "tanh", "quadratic"] = knob(
        "step", "L0 through the threshold's gradient, tanh of latents, or (L0 / target - 1)^2"
    )
    bandwidth: float = knob(0.1, "width of the window in which a threshold has a gradient (jumprelu, scaled units)")
    multi_topk: bool = knob(False, "also reconstruct from 4k latents, with weight 1/8")
    k_decay_steps: int = knob(0, "steps over which k falls to --k from min(d_in, d_sae) (topk family)")
    auxk_alpha: float = knob(1 / 32, "weight of the AuxK loss, which revives dead latents", "auxk_coef", sweep=True)
    dead_feature_threshold: int | None = knob(
        None, "tokens without firing until a latent is dead (default: 16 d_sae / k, at most 10M)", "dead_toks_threshold"
    )
    dead_percentage_threshold: float | None = knob(
        None, "instead: a latent is dead if it fires at less than this share of the mean rate k / d_sae"
    )
    dead_latent_threshold: float | None = knob(
        None, "instead: a latent is dead if it fires on less than this share of tokens"
    )
    resample_every: int | None = knob(
        None, "steps between resamplings of dead latents, in the first half of the run", "resample_interval"
    )

    # how it learns
    b_dec_init: Literal["mean", "geometric_median", "zeros"] = knob("mean", "start of the decoder bias")
    scale_encoder: bool = knob(True, "scale W_enc at the start to minimise the error (kinds that keep k latents)")
    optimizer: Literal["adam", "adam8bit", "muon", "signum", "sgd"] = knob("adam", "optimiser", sweep=True)
    optimizer_dtype: Literal["float32", "bfloat16"] = knob(
        "float32", "dtype of Adam's moments; bfloat16 takes half the memory, with stochastic rounding"
    )
    learning_rate: float | None = knob(
        None, "peak step size (default: by optimiser, falls as 1/sqrt(d_sae))", "lr", sweep=True
    )
    weight_decay: float = knob(0.0, "decoupled weight decay")
    lr_schedule: Literal["linear", "cosine", "constant"] = knob("linear", "how the step size falls at the end")
    warmup_steps: int | None = knob(
        None, "steps of linear warm-up (default: 5% of the run, at most 1000)", "lr_warmup_steps"
    )
    decay_fraction: float = knob(0.4, "last part of the run, over which the step size falls to 0")
    sparsity_warmup: float = knob(0.2, "first part of the run, over which the penalty rises from 0")
    clip_norm: float | None = knob(1.0, "largest gradient norm, or none", "clip_grad")
    ema: float | None = knob(
        None, "decay per step of averaged weights, which are then evaluated and saved", "ema_multiplier"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = knob(
        "float32", "dtype of matrix products (weights stay float32; float16 uses a gradient scaler)"
    )
    kernels: Literal["auto", "plain"] = knob("auto", "the fastest kernels that run here, or plain torch")
    batch_size: int = knob(1024, "tokens per step", "bs")
    grad_acc_steps: int = knob(1, "batches of batch_size tokens that a step adds up")
    micro_acc_steps: int = knob(1, "parts that each of these batches is cut into, to save memory")
    num_epochs: int = knob(1, "times that each activation is trained on (the model computes it once)")
    seed: int = knob(0, "seed of initialisation and of shuffling", "init_seeds", sweep=True)
    shuffle_seed: int | None = knob(None, "seed of shuffling (default: the first seed)")
    val_split: float = knob(0.05, "part of collected activations held out for validation")
    eval_every: int = knob(100, "steps between validations")
    save_every: int = knob(500, "steps between checkpoints")
    save_best: bool = knob(True, "keep the best SAE by validation loss as best_model.pt")
    log_every: int = knob(10, "steps between lines of metrics.jsonl", "wandb_log_frequency")
    hook_point: str = knob("", "where the activations come from, for the record (sae_train fills it in)")

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.seed < 2**31, f"seed={self.seed}; it must lie in 0..{2**31 - 1}")
        at_least(self, 1, *"expansion_factor k batch_size num_epochs eval_every save_every log_every d_in".split())
        at_least(self, 1, *"d_out d_sae dead_feature_threshold grad_acc_steps micro_acc_steps resample_every".split())
        at_least(self, 0, *"auxk_alpha warmup_steps k_decay_steps fvu_coefficient weight_decay shuffle_seed".split())
        _share(self, "decay_fraction", "sparsity_warmup", "dead_percentage_threshold", "dead_latent_threshold")
        _share(self, "p_anneal")
        require(0 <= self.val_split < 1, f"val_split={self.val_split}; it must lie in 0..1, below 1")
        for name in ("learning_rate", "l1_coefficient", "clip_norm", "target_l0", "weight_decay", "fvu_coefficient"):
            value = getattr(self, name)
            good = value is None or (math.isfinite(value) and value >= 0)
            require(good, f"{name}={value}; it must be finite and >= 0")
        require(self.bandwidth > 0, f"bandwidth={self.bandwidth}; it must be above 0")
        require(self.ema is None or 0 < self.ema < 1, f"ema={self.ema}; it must lie between 0 and 1, such as 0.999")
        self._check_shape()
        self._check_combinations()
        require_kind(self.activation)
        if self.activation in KINDS:
            self._check_kind()

    def _check_shape(self) -> None:
        if not self.transcode:
            require(not self.skip_connection, "--skip_connection is for transcoders; give --transcode too")
            require(
                self.d_out in (None, self.d_in),
                f"d_out={self.d_out}, but an SAE gives back what it reads; leave it out, or train a --transcode",
            )

    def _check_kind(self) -> None:
        """Raise UserError for settings that this kind of SAE cannot have."""
        kind = kind_of(self)
        kind.check(self)
        if kind.penalised:
            require(
                self.target_l0 is None or self.l1_coefficient is None,
                "--target_l0 finds the penalty's weight by itself; drop --l1_coefficient",
            )
        else:
            known = self.d_sae is not None or self.d_in is not None
            n = (self.d_sae or (self.d_in or 0) * self.expansion_factor) if known else self.k
            require(self.k <= n, f"k={self.k} exceeds d_sae={n}; lower --k or raise --expansion_factor")
            require(
                self.target_l0 is None,
                f"{self.activation} keeps k latents by selection; give --k instead of --target_l0",
            )
        for flag in said(self, "multi_topk", "p_anneal"):
            require(flag in kind.flags, f"--{flag} is for --activation {kinds_with(flag)}")

    def _check_combinations(self) -> None:
        forbid = lambda bad, message: require(not bad, message)
        moments = self.optimizer == "adam" and self.weight_decay == 0 and self.dtype != "float16"
        needs = "--optimizer adam without --weight_decay or --dtype float16; drop one"
        forbid(self.optimizer_dtype != "float32" and not moments, f"--optimizer_dtype bfloat16 is for {needs}")
        apart = "--tied shares one matrix between spaces that differ; drop it or --transcode"
        forbid(self.tied and self.transcode, apart)
        free = self.normalize_decoder is False
        forbid(self.tied and free, "--tied wants unit decoder rows; drop --no-normalize_decoder")
        undone = "layer norm cannot be undone on a transcoder's output; choose another --normalize_activations"
        forbid(self.normalize_activations == "layer_norm" and self.transcode, undone)
        dead = [f"--dead_{name}_threshold" for name in ("feature", "percentage", "latent")]
        several = len(said(self, *(flag[2:] for flag in dead))) > 1
        forbid(several, f"several dead-latent thresholds were given; choose one of {', '.join(dead[:2])} and {dead[2]}")
        whole = f"--loss_fn {self.loss_fn} trains on whole sequences; it goes with neither --resample_every nor float16"
        forbid(self.loss_fn in ("ce", "kl") and (self.resample_every or self.dtype == "float16"), whole)

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


C = typing.TypeVar("C")


@dataclass(frozen=True)
class DataConfig:
    """Which model reads which text."""

    model: str = knob(
        "pygpt", "pygpt, nanoGPT's ckpt.pt, nanochat:sft/d12 or its folder, a HuggingFace folder or id", MODEL_ALIASES
    )
    dataset: str | None = knob(
        None,
        "text, jsonl, parquet or .bin file, a folder of them, nanoGPT's data folder, or a HuggingFace dataset: name, "
        "name:config, or saved to disk (default: the embedded corpus)",
        "dataset_name",
    )
    split: str = knob("train", "split of a HuggingFace dataset")
    streaming: bool = knob(False, "read a HuggingFace dataset over the network as it is needed")
    text_column: str | None = knob(None, "field that holds the text or the chat (default: found by name and content)")
    exclude_tokens: tuple[int, ...] = knob((), "token ids left out of training and metrics, beside the special ones")
    data_preprocessing_num_proc: int = knob(1, "threads that tokenise")
    ctx_len: int = knob(256, "tokens per sequence (at most the model's context)")
    model_batch_size: int = knob(16, "sequences per forward of the language model")
    model_dtype: ModelDtype = knob("float32", "what the language model computes in, and its weights are kept in")
    skip_first: bool = knob(False, "leave the first position of every sequence out of training and metrics")
    device: str | None = knob(None, "cpu, cuda, cuda:1, mps (default: the best there is)")

    def check_data(self) -> None:
        """Raise UserError for a value out of range."""
        require(self.ctx_len >= 2, f"ctx_len={self.ctx_len}; a sequence needs at least 2 tokens")
        at_least(self, 1, "model_batch_size", "data_preprocessing_num_proc")


HookType = Literal["resid_post", "resid_pre", "resid_mid", "attn", "mlp", "mlp_post_act"]


@dataclass(frozen=True)
class HookConfig:
    """Which activations: layers and a kind of place in them, or module names."""

    layer: int | None = knob(None, "one layer (default: five sixths of the way up; not with --layers)")
    layers: tuple[int, ...] = knob((), "several layers")
    layer_stride: int = knob(1, "every nth of the layers, or of the hookpoints (all layers, when none are named)")
    hook_type: HookType = knob("resid_post", "the place in each layer")
    hookpoints: tuple[str, ...] = knob(
        (), "module names or globs ('transformer.h.*.mlp'), or blocks.3.hook_mlp_out; instead of layers"
    )

    def check_hooks(self) -> None:
        """Raise UserError if the place is said twice."""
        given = [f"--{n}" for n in said(self, "layer", "layers", "hookpoints")]
        require(len(given) <= 1, f"{' and '.join(given)} were given; choose one of them")
        at_least(self, 1, "layer_stride")
        some = self.layers or self.layer is not None
        clash = "--layer_stride goes with all layers or with --hookpoints; with --layers name those you want"
        require(self.layer_stride == 1 or not some, clash)

    def check_place(self) -> None:
        """Raise UserError for a place in layers where hookpoints are named."""
        idle = self.hookpoints and said(self, "hook_type")
        require(not idle, "--hook_type goes with layers; --hookpoints name their places themselves")


@dataclass(frozen=True)
class TrainConfig(SAEConfig, DataConfig, HookConfig):
    """One training run: what is learned (SAEConfig), from which activations, and where the results go."""

    max_tokens: int = knob(
        1_000_000, "tokens to train on; shorter text is repeated, collected activations are not", "num_activations"
    )
    model_device: str | None = knob(
        None, "device of the language model, whose forwards then run beside the SAEs' steps (default: --device)"
    )
    buffer_tokens: int = knob(65_536, "tokens in the mixing buffer (half of it is fresh each time it is refilled)")
    val_tokens: int = knob(32_768, "held-out tokens kept for validation")
    activations: str | None = knob(
        None, "train on collected activations, without the model: sae_collect's folder, or .npy, .h5, .pt, .safetensors"
    )
    finetune: str | None = knob(None, "start from this SAE: a run, a weights file, or a hub id")
    distribute_modules: bool = knob(False, "give whole hookpoints to processes (with several processes)")
    shard_latents: int = knob(1, "processes that share the latents of every SAE (with several processes)")
    plan: bool = knob(False, "say what the run would take (memory, time, disk) and start nothing")
    save_dir: str = knob("sae_models", "folder of all runs", "output_dir")
    run_name: str | None = knob(None, "name of this run's folder (default: layer_10 or the hookpoint)")
    resume: bool = knob(
        False, "go on from a run's newest checkpoint, with its settings (of --run_name or --layer, else the newest run)"
    )
    overwrite: bool = knob(False, "replace an existing run")
    log_to_wandb: bool = knob(False, "log to Weights & Biases too")
    wandb_project: str = knob("nanosae", "project there")
    assess: bool = knob(False, "evaluate at the end and write final_assessment.json")
    sweep: dict = dataclasses.field(  # filled by flags that were given several values
        default_factory=dict, metadata={"help": "settings with several values, one SAE each", "alias": ()}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_data()
        self.check_hooks()
        at_least(self, 1, "max_tokens", "shard_latents")
        least = 2 * self.batch_size * self.grad_acc_steps
        few = f"buffer_tokens={self.buffer_tokens} holds less than two batches"
        require(self.buffer_tokens >= least, f"{few}; raise it to {least} or lower --batch_size")
        n, tokens = self.batch_size, self.batch_size * self.ctx_len
        counts = f"batch_size={n} counts tokens here, not sequences"
        require(n >= 16, f"{counts}; {n} sequences of {self.ctx_len} are --batch_size {tokens}")
        at_least(self, 2, "val_tokens")
        require(not (self.resume and self.overwrite), "--resume and --overwrite were both given; choose one")
        for clash, why in (
            (self.activations, "runs the model; it cannot be combined with --activations"),
            (self.model_device, "trains through the model, on one device; give --device alone"),
            (self.sweep, "trains one SAE per hookpoint; give one value to each flag"),
        ):
            require(not (self.loss_fn in ("ce", "kl") and clash), f"--loss_fn {self.loss_fn} {why}")
        known = {f.name for f in dataclasses.fields(self) if f.metadata.get("sweep")}
        for name, values in self.sweep.items():
            require(name in known, f"'{name}' cannot be swept; choose among {', '.join(sorted(known))}")
            require(len(set(values)) == len(values), f"--{name} got the same value twice: {values}")

    def check_idle(self) -> None:
        """Raise UserError for a setting that would do nothing; of a new run: those from before this was asked go on."""
        self.check_place()
        given = {*self.sweep, *said(self, *(f.name for f in dataclasses.fields(self) if f.name != "sweep"))}
        text = self.dataset or self.activations
        trained = [kind_of(one).flags for one in variants(self).values()]
        for name in sorted(given & frozenset().union(*(kind.flags for kind in KINDS.values()))):
            fits = any(name in flags for flags in trained)
            require(fits, f"--{name} is for --activation {kinds_with(name)}, not {self.activation}")
        for name, does, other in (
            ("fvu_coefficient", self.loss_fn in ("ce", "kl"), "--loss_fn ce or kl; fvu and mse are that error"),
            ("val_split", self.activations, "--activations; of text another part is held out"),
            ("wandb_project", self.log_to_wandb, "--log_to_wandb"),
            ("expansion_factor", "d_sae" not in given, "no --d_sae: both say how many latents"),
            *((name, text, "a --dataset") for name in ("text_column", "split", "streaming")),
        ):
            require(bool(does) or name not in given, f"--{name} goes with {other}")


# Names that other tools use for what goes by another name, or does not exist, here.
REPLACED = {
    "n_op_shards": "give --shard_latents", "n_replicas": "start as many processes with torchrun",
    "auxk": "AuxK takes k latents by itself", "eps": "the optimiser's epsilon is fixed",
    "hf_token": "log in with `huggingface-cli login`", "revision": "give a folder with that revision",
    "load_in_8bit": "give --model_dtype bfloat16", "max_examples": "give --max_tokens",
    "data_args": "give the configuration as --dataset name:config",
    "wandb_name": "give --run_name", "feature_absorption": "sae_eval reports decoder similarity",
    "prepare_neuronpedia": "run scripts.sae_upload on the run",
}  # fmt: skip

SHORT = {
    "k": "k", "expansion_factor": "x", "d_sae": "n", "learning_rate": "lr", "l1_coefficient": "l1", "target_l0": "l0",
    "auxk_alpha": "auxk", "seed": "seed", "activation": "", "optimizer": "",
}  # fmt: skip


def variants(c: TrainConfig) -> dict[str, TrainConfig]:
    """One config for each combination of swept values, by a name fit for a folder; {"": c} without any."""
    names = list(c.sweep)
    found = {}
    for values in itertools.product(*c.sweep.values()):
        label = "_".join(f"{SHORT[n]}{v}" for n, v in zip(names, values, strict=True))
        found[label] = dataclasses.replace(c, **dict(zip(names, values, strict=True)), sweep={})
    return found


@dataclass(frozen=True)
class TrainedConfig:
    """A trained SAE and its model, for the commands that take one."""

    sae_path: str | None = knob(
        None, "a run, a hookpoint folder or a weights file (default: the newest run in sae_models)", "sae_dir"
    )
    model: str | None = knob(None, "the language model (default: the SAE's own)", MODEL_ALIASES)
    dataset: str | None = knob(None, "the text (default: held-out text of the SAE's own)", "dataset_name")
    model_dtype: ModelDtype | None = knob(None, "dtype of the language model (default: as in training)")
    device: str | None = knob(None, "cpu, cuda, cuda:1, mps (default: the best there is)")


@dataclass(frozen=True)
class EvalConfig(TrainedConfig):
    """sae_eval: how good a trained SAE is, on held-out text."""

    eval_tokens: int = knob(
        131_072, "tokens to evaluate on (special tokens not counted)", "num_test_samples max_tokens"
    )
    mean_tokens: int = knob(16_384, "leading tokens that give the mean used by mean ablation")
    ctx_len: int | None = knob(None, "tokens per sequence (default: as in training)", "context_length")
    model_batch_size: int = knob(16, "sequences per forward of the language model")
    output_dir: str | None = knob(None, "where eval.json and plots/ go (default: beside the SAE)")

    def __post_init__(self) -> None:
        at_least(self, 2, "eval_tokens", "mean_tokens", "ctx_len")
        at_least(self, 1, "model_batch_size")


@dataclass(frozen=True)
class VizConfig(EvalConfig):
    """sae_viz: what each feature means, as pages that open in a browser."""

    eval_tokens: int = knob(131_072, "tokens to look for contexts in", "num_samples max_tokens")
    feature: tuple[int, ...] = knob((), "only these features")
    all_features: bool = knob(False, "a page for every feature (default: the first 1000 that fire)")
    top_k: int = knob(20, "contexts per feature")
    context_tokens: int = knob(24, "tokens shown on each side of the strongest one")
    train_text: bool = knob(False, "read the text for training instead of the held-out one: there is more of it")
    labels: bool = knob(True, "label each feature by a rule found on half of the text and tested on the other half")
    explainer_url: str | None = knob(
        None, "OpenAI-compatible API that explains features: http://localhost:8000/v1 (its key: NANOSAE_API_KEY)"
    )
    explainer_model: str | None = knob(None, "the model there that explains")
    explainer_limit: int = knob(100, "features it explains in one run, the first that have a page")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "top_k", "context_tokens", "explainer_limit")
        both = (self.explainer_url is None) == (self.explainer_model is None)
        require(both, "--explainer_url and --explainer_model go together; give both or neither")
        require(not (self.feature and self.all_features), "--feature and --all_features were both given; choose one")
        idle = self.explainer_url is None and said(self, "explainer_limit")
        require(not idle, "--explainer_limit goes with --explainer_url and --explainer_model")
        for i in self.feature:
            require(i >= 0, f"feature {i} was asked for; features are numbered from 0")


@dataclass(frozen=True)
class CollectConfig(DataConfig, HookConfig):
    """sae_collect: write activations to disk once, to train on many times."""

    max_tokens: int = knob(1_000_000, "tokens to collect", "num_activations")
    transcode: bool = knob(False, "collect what goes into each module too, for transcoders")
    storage_dtype: Literal["float32", "bfloat16", "float16"] = knob("float32", "dtype on disk")
    shard_tokens: int = knob(262_144, "tokens per file")
    output_dir: str = knob("activations/default", "folder to write", "save_dir")
    overwrite: bool = knob(False, "replace an existing folder")

    def __post_init__(self) -> None:
        self.check_data()
        self.check_hooks()
        at_least(self, 1, "max_tokens", "shard_tokens")
        self.check_place()


@dataclass(frozen=True)
class UploadConfig:
    """sae_upload: publish features on Neuronpedia. Without --upload everything is checked and nothing is sent."""

    sae_path: str | None = knob(None, "a run or a hookpoint folder (default: the newest run in sae_models)", "sae_dir")
    features: str | None = knob(None, "the features.jsonl (default: the one that sae_viz wrote beside the SAE)")
    dry_run: bool = knob(False, "only check, and show what would be sent; what happens without --upload, too")
    upload: bool = knob(False, "send; the key comes from NEURONPEDIA_API_KEY, or is asked for")
    export: str | None = knob(None, "folder to write Neuronpedia's bulk-import tree into")
    graph_features: str | None = knob(None, "folder to write a json per feature into, for Neuronpedia's graph page")
    model_id: str | None = knob(None, "the model's id there, a new one or an existing one (default: from its name)")
    model_layers: int | None = knob(None, "layers of a model that is new there (default: the model is loaded to see)")
    set_name: str = knob("nanosae", "the source set there; the SAE's source is then 10-nanosae")
    layer: int | None = knob(None, "the SAE's layer (default: the number in its hookpoint)")
    api_base: str = knob("https://www.neuronpedia.org/api", "the API, such as http://localhost:3000/api")
    batch_size: int = knob(128, "features per request")

    def __post_init__(self) -> None:
        require(not (self.upload and self.dry_run), "--upload and --dry_run were both given; choose one")
        require(
            not self.upload or self.model_id is not None,
            "--upload wants --model_id, the id that the model has or shall get on Neuronpedia",
        )
        require(1 <= self.batch_size <= 128, f"batch_size={self.batch_size}; Neuronpedia takes 1 to 128 at a time")
        at_least(self, 0, "layer")
        at_least(self, 1, "model_layers")


@dataclass(frozen=True)
class ChatConfig(TrainedConfig):
    """chat: talk to a model, see the features on every token, steer them."""

    sae_path: str | None = knob(
        None, "a run, all of whose SAEs take part, or a weights file (default: the newest run in sae_models)", "sae_dir"
    )
    dataset: str | None = knob(None, "folder of a nanoGPT checkpoint's meta.pkl (default: as in training)")
    no_sae: bool = knob(False, "the plain model, without SAEs")
    raw: bool = knob(False, "continue the text instead of replying (models without a chat format always do)")
    seed: int = knob(0, "seed of the answers")
    max_new_tokens: int = knob(128, "longest answer, in tokens")
    temperature: float = knob(0.8, "sampling temperature; 0: always the likeliest token")
    top_k: int | None = knob(200, "sample from the top k tokens; none = all")
    top_features: int = knob(5, "features shown beside each token")
    steer: tuple[str, ...] = knob((), "edits: 12:+8 adds, 12:=4 sets, 12:*0 scales, 12:|0 projects out, 12:<4 caps")
    stop_when: tuple[str, ...] = knob((), "conditions that end an answer: 45>3")
    prompt: str | None = knob(None, "answer this and exit, instead of a conversation")
    json: bool = knob(False, "with --prompt: print one json object, every token with its features")
    explain: str | None = knob(None, "with --prompt: which features pushed the model towards this token")
    web: bool = knob(False, "chat in the browser")
    host: str = knob("127.0.0.1", "address of --web; other addresses expose the page, without a password")
    port: int = knob(8000, "port of --web; 0: any free one")
    max_waiting: int = knob(64, "queue limit of --web; excess requests are rejected")

    def __post_init__(self) -> None:
        alone = self.prompt is not None
        require(alone or not (self.json or self.explain is not None), "--json and --explain go with --prompt; give it")
        require(self.prompt != "", "the prompt is empty; write something")
        require(self.explain != "", "the token to explain is empty; give one, such as --explain ' file'")
        require(not (self.web and alone), "--web and --prompt exclude each other; drop one")
        for name in said(self, "host", "port", "max_waiting"):
            require(self.web, f"--{name} goes with --web; give it or drop --{name}")
        at_least(self, 1, "max_new_tokens", "top_k", "top_features", "max_waiting")
        at_least(self, 0, "seed", "temperature", "port")
        require(self.port < 65536, f"port={self.port}; it must be below 65536")
        edits = self.steer or self.stop_when or self.explain is not None
        require(not (self.no_sae and edits), "the plain model has no features to steer or explain with; drop --no_sae")
