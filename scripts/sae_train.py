"""Train sparse autoencoders on a language model's activations:  python -m scripts.sae_train --layer 10"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae import cache, hooks, log
from sae.activation_files import FileSource, is_activation_file
from sae.activations import Acts, ModelSource, Source, Stream, gather
from sae.config import TrainConfig, UserError, from_cli
from sae.language_model import LanguageModel, best_device, load_language_model
from sae.models import create_sae
from sae.tokens import TokenRows, open_dataset
from sae.trainer import SAETrainer, refuse_existing
from scripts.sae_eval import assess_run


class Data(NamedTuple):
    """What a run trains on: a source, held-out activations, how many tokens how often, and where they come from."""

    source: Source
    val: Acts
    n_tokens: int
    uses: int
    metadata: dict[str, Any]


def live_data(c: TrainConfig, lm: LanguageModel, hookpoints: list[str]) -> Data:
    dataset = open_dataset(c.dataset, text_column=c.text_column or "text")

    def source(split: str) -> ModelSource:
        rows = TokenRows(lm, dataset, split, c.ctx_len)
        return ModelSource(
            lm, rows, hookpoints, model_batch_size=c.model_batch_size, skip_first=c.skip_first
        )  # fmt: skip

    val = gather(source("val"), c.val_tokens, "validation")
    origin = {
        "provenance": cache.provenance(lm, dataset, ctx_len=c.ctx_len, skip_first=c.skip_first),
        "model_name": c.model, "dataset_path": dataset.name, "text_column": c.text_column or "text",
        "context_size": min(c.ctx_len, lm.max_len), "skip_first": c.skip_first,
    }  # fmt: skip
    return Data(source("train"), val, c.max_tokens, c.num_epochs, origin)


def cached_data(c: TrainConfig) -> Data:
    """The same from collected activations, once they are shown to be what they say."""
    assert c.activations is not None
    if c.layer is not None or c.layers:
        raise UserError("--activations has its own hookpoints; choose among them with --hookpoints, not by layer")
    options: dict[str, Any] = {
        "hookpoints": c.hookpoints, "val_split": c.val_split,
        "seed": c.seed if c.shuffle_seed is None else c.shuffle_seed,
        "block_rows": min(cache.BLOCK_ROWS, max(64, c.buffer_tokens // 16)),  # small beside what the buffer mixes
    }  # fmt: skip
    source: cache.BlockSource
    if is_activation_file(c.activations):
        source = FileSource(c.activations, hook_point=c.hook_point, **options)
        origin = {"provenance": source.provenance(), "activations_file": source.path.name}
    else:
        source = cache.CacheSource(c.activations, **options)
        origin = cache_origin(c, source.manifest)
    held_out = source.held_out()
    val = gather(held_out, c.val_tokens, "validation") if len(held_out) > 1 else {}
    if val and isinstance(source, FileSource) and source.positions == 1:
        log.say(f"the file says nothing of sequences: its last {len(held_out):,} rows are held out")
    n = len(source)
    if c.max_tokens < n:
        log.say(f"training on {c.max_tokens:,} of {n:,} collected tokens; --max_tokens takes more")
    # all of it is read anew for each epoch, in a new order; of a part, rows are used again while they are at hand
    n_tokens, uses = (n * c.num_epochs, 1) if c.max_tokens >= n else (c.max_tokens, c.num_epochs)
    return Data(source, val, n_tokens, uses, origin)


def cache_origin(c: TrainConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """Where a cache's activations come from. Raises UserError if that is here and has changed."""
    assert c.activations is not None
    model = manifest["model"] if c.model == TrainConfig.model else c.model
    dataset = c.dataset or (None if manifest["dataset"] == "embedded" else manifest["dataset"])
    try:
        lm = load_language_model(model, device="cpu", dataset=dataset)
        opened = open_dataset(dataset, text_column=manifest["text_column"])
    except UserError as e:
        log.say(f"the cache's own model and text are not here to compare with ({e})")
    else:
        made_from = cache.provenance(lm, opened, ctx_len=manifest["ctx_len"], skip_first=manifest["skip_first"])
        cache.refuse_stale(manifest, made_from, c.activations)
    return {
        "provenance": {key: manifest[key] for key in ("model_hash", "dataset_hash", "n_tokens")},
        "model_name": manifest["model"], "dataset_path": manifest["dataset"], "text_column": manifest["text_column"],
        "context_size": manifest["ctx_len"], "skip_first": manifest["skip_first"],
    }  # fmt: skip


def run_folder(c: TrainConfig, hookpoints: list[str]) -> Path:
    """sae_models/<run_name>, or layer_10, layer_10_mlp, layers_0_4_8, or the hookpoint asked for."""
    if c.run_name:
        return Path(c.save_dir) / c.run_name
    if c.hookpoints or c.activations:
        name = hookpoints[0] if len(hookpoints) == 1 else re.sub(r"[^\w.@-]", "_", (c.hookpoints or hookpoints)[0])
        return Path(c.save_dir) / name
    numbers = [re.findall(r"\d+", name)[0] for name in hookpoints]
    name = ("layer_" if len(numbers) == 1 else "layers_") + "_".join(numbers)
    return Path(c.save_dir) / (name if c.hook_type == "resid_post" else f"{name}_{c.hook_type}")


def check_folder(c: TrainConfig, folder: Path) -> None:
    """Say now, not after an hour, that results would overwrite others or cannot be written."""
    if not c.resume and not c.overwrite:
        refuse_existing(folder)
    probe = Path(c.save_dir) / f".probe.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"cannot write to '{c.save_dir}' ({e.strerror}); choose another --save_dir") from e


def main(argv: list[str]) -> None:
    c = from_cli(TrainConfig, argv, prog="python -m scripts.sae_train", description=__doc__ or "")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were started and this trains in one; run it without torchrun"
        )
    device = best_device(c.device)
    if c.activations is not None:
        data = cached_data(c)
        folder = run_folder(c, list(data.source.widths))
        check_folder(c, folder)
    else:
        lm = load_language_model(c.model, device=device, dataset=c.dataset)
        layers = (c.layer,) if c.layer is not None else c.layers
        hookpoints = hooks.resolve(lm.module, hookpoints=c.hookpoints, layers=layers, hook_type=c.hook_type)
        folder = run_folder(c, hookpoints)
        check_folder(c, folder)
        data = live_data(c, lm, hookpoints)

    saes = {}
    for name, width in data.source.widths.items():
        if c.d_in is not None and c.d_in != width:
            raise UserError(f"--d_in {c.d_in} was given and '{name}' is {width} wide; leave --d_in out")
        generator = torch.Generator().manual_seed(c.seed)
        saes[name] = create_sae(replace(c, d_in=width, hook_point=name), generator=generator)
    stream = Stream(
        data.source, n_tokens=data.n_tokens, uses=data.uses, batch_size=c.batch_size, buffer_tokens=c.buffer_tokens,
        seed=c.seed, device=device,
    )  # fmt: skip
    metadata = {**data.metadata, "exclude_special_tokens": True, "training_tokens": stream.n_tokens}
    trainer = SAETrainer(saes, c, stream, data.val, device, folder, metadata=metadata, overwrite=c.overwrite)
    if c.resume:
        trainer.load_checkpoint()
        log.say(f"resuming '{folder}' at step {trainer.step}")
    for name, sae in saes.items():
        size = f"{sae.d_in} -> {sae.d_sae} latents, {stream.n_batches} steps of {c.batch_size} tokens on {device}"
        log.say(f"{name}: {c.activation} SAE, {size}")
    metrics = trainer.train()
    if stream.n_passes:
        log.say(f"the text was read again from its start {stream.n_passes} times")
    where = "held out" if data.val else "on the last steps"
    score = f"explained variance {metrics['explained_variance']:.4f}, L0 {metrics['l0']:.1f}" if metrics else "done"
    log.say(f"{where}: {score}; saved to {folder}; next: python -m scripts.sae_eval --sae_path {folder}")
    if c.assess:
        assess_run(c, {name: trainer.folder(name) for name in saes}, data.val, getattr(data.source, "lm", None))


if __name__ == "__main__":
    log.run_script(main)
