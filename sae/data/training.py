"""What a run trains on: activations of a live model, or collected ones, and where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sae import log
from sae.config import TrainConfig, UserError
from sae.data import cache
from sae.data.activation_files import FileSource, is_activation_file
from sae.data.activations import ModelSource, Source
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.flags import said
from sae.hookpoints import input_of, split
from sae.lm.language_model import LanguageModel, load_language_model
from sae.schedules import shuffle_seed

# What decides activations, as provenance names it.
SETTINGS = "model model_dtype dataset text_column split streaming ctx_len skip_first exclude_tokens".split()
SAELENS = {"model": "model_name", "dataset": "dataset_path", "ctx_len": "context_size"}  # its names in cfg.json


class Data(NamedTuple):
    """A source and a held-out one, how many tokens to draw and how often to use each, and where they come from."""

    source: Source
    held_out: Source | None
    n_tokens: int
    uses: int
    origin: dict[str, Any]


def with_inputs(hookpoints: Iterable[str], transcode: bool) -> list[str]:
    """The hookpoints that SAEs at these read and write, outputs first."""
    hookpoints = list(hookpoints)
    if transcode and any(split(name)[1] for name in hookpoints):
        raise UserError("a transcoder predicts a module's output from its input; name a module without '@in'")
    return hookpoints + [input_of(name) for name in hookpoints if transcode]


def trained_at(c: TrainConfig, source: Source) -> list[str]:
    """The hookpoints that a run on collected activations trains at."""
    found = [name for name in source.widths if not (c.transcode and split(name)[1])]
    for name in found:
        if c.transcode and input_of(name) not in source.widths:
            lacks = input_of(name)
            raise UserError(f"'{c.activations}' holds no '{lacks}'; collect with sae_collect --transcode")
    return found


def live(c: TrainConfig, lm: LanguageModel, hookpoints: Iterable[str]) -> Data:
    """Activations of a model while it reads the text that the flags mean."""
    dataset = open_dataset(c.dataset, text_column=c.text_column, split=c.split, streaming=c.streaming)
    left_out: Any = {"skip_first": c.skip_first, "exclude_tokens": c.exclude_tokens}

    def source(split: str) -> ModelSource:
        rows = TokenRows(lm, dataset, split, c.ctx_len, **left_out, n_threads=c.data_preprocessing_num_proc)
        return ModelSource(rows, with_inputs(hookpoints, c.transcode), model_batch_size=c.model_batch_size)

    train = source("train")
    made_from = train.rows.provenance()
    origin = {"provenance": made_from, **_for_cfg(made_from)}
    return Data(train, source("val"), c.max_tokens, c.num_epochs, origin)


def _for_cfg(made_from: Mapping[str, Any]) -> dict[str, Any]:
    return {SAELENS.get(name, name): made_from[name] for name in SETTINGS}


def collected_source(c: TrainConfig) -> FileSource | cache.CacheSource:
    """The activations in the file or folder of --activations, of those that the flags name."""
    assert c.activations is not None
    options: dict[str, Any] = {"hookpoints": with_inputs(c.hookpoints, c.transcode), "val_split": c.val_split}
    options["seed"] = shuffle_seed(c)
    options["block_rows"] = min(cache.BLOCK_ROWS, max(64, c.buffer_tokens // 16))  # a small part of the buffer
    if is_activation_file(c.activations):
        return FileSource(c.activations, hook_point=c.hook_point, **options)
    return cache.CacheSource(c.activations, **options)


def collected(c: TrainConfig) -> Data:
    """The collected activations of --activations. Raises UserError if they are not what the flags say."""
    if said(c, "layer", "layers", "layer_stride", "hook_type") and not c.resume:
        raise UserError("--activations has its own hookpoints; choose among them with --hookpoints, not by layer")
    if c.model_device and not c.assess:
        raise UserError("--model_device is for a run of the model; --activations runs none but to --assess")
    source = collected_source(c)
    if isinstance(source, FileSource):
        _refuse_other(c, {}, c.ctx_len)
        origin = {"provenance": source.provenance(), "activations_file": source.path.name}
    else:
        origin = _origin(c, source.manifest)
    held_out = source.held_out() if len(source.held_out()) > 1 else None
    if held_out is not None and isinstance(source, FileSource) and source.positions == 1:
        log.say(f"the file says nothing of sequences: its last {len(held_out):,} rows are held out")
    n = len(source)
    if c.max_tokens < n:
        log.say(f"training on {c.max_tokens:,} of {n:,} collected tokens; --max_tokens takes more")
        return Data(source, held_out, c.max_tokens, c.num_epochs, origin)  # rows are used again while they are at hand
    if c.max_tokens > n * c.num_epochs:
        times = f", {c.num_epochs} times each" if c.num_epochs > 1 else ""
        log.say(f"training on all {n:,} collected tokens but those held out{times}; --num_epochs goes over them again")
    return Data(source, held_out, n * c.num_epochs, 1, origin)  # each epoch reads all rows anew, in a new order


def _refuse_other(c: TrainConfig, manifest: dict[str, Any], max_len: int) -> None:
    """Raise UserError for a setting of the model's run that the activations were not collected with.

    manifest: how they were, as far as they say. max_len: the model's context.
    """
    read_how = [name for name in SETTINGS if name not in ("model", "dataset")]
    for name in said(c, *read_how) if not c.resume else ():
        wanted = sorted(c.exclude_tokens) if name == "exclude_tokens" else getattr(c, name)
        if (min(wanted, max_len) if name == "ctx_len" else wanted) != manifest.get(name):
            was = f"was collected with {name}={manifest[name]}" if name in manifest else "says nothing of that"
            raise UserError(f"--{name} {wanted}: '{c.activations}' {was}; leave the flag out, or collect again with it")


def _origin(c: TrainConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """Where a cache's activations come from. Raises UserError if that is here and has changed."""
    assert c.activations is not None
    model = c.model if said(c, "model") else manifest["model"]
    dataset = c.dataset or (None if manifest["dataset"] == "embedded" else manifest["dataset"])
    how = {name: manifest[name] for name in ("text_column", "split", "streaming")}
    left_out = {name: manifest[name] for name in ("skip_first", "exclude_tokens")}
    try:
        lm = load_language_model(model, device="cpu", dataset=dataset, dtype=manifest["model_dtype"])
        opened = open_dataset(dataset, **how)
    except UserError as e:
        if said(c, "model", "dataset"):
            raise
        _refuse_other(c, manifest, c.ctx_len)
        log.say(f"the cache's own model and text are not here to compare with ({e})")
    else:
        _refuse_other(c, manifest, lm.max_len)
        rows = TokenRows(lm, opened, "train", manifest["ctx_len"], **left_out)
        cache.refuse_stale(manifest, rows.provenance(), c.activations)
    provenance = {key: manifest[key] for key in ("model_hash", "dataset_hash", "n_tokens")}
    return {"provenance": provenance, **_for_cfg(manifest)}
