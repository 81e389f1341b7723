"""Train sparse autoencoders on a language model's activations:  python -m scripts.sae_train --layer 10"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sae import cache, formats, hooks, kernels, log, native, sweep
from sae.activation_files import FileSource, is_activation_file
from sae.activations import Acts, ModelSource, Source, Stream, gather
from sae.config import REPLACED, TrainConfig, UserError, from_cli, variants
from sae.datasets import open_dataset
from sae.end_to_end import EndToEnd, RowStream, held_out
from sae.language_model import LanguageModel, best_device, load_language_model
from sae.models import SAE, create_sae
from sae.schedules import tokens_per_step
from sae.tokens import TokenRows
from sae.trainer import SAETrainer, refuse_existing, shuffle_seed
from scripts.sae_eval import assess_run


class Data(NamedTuple):
    """What a run trains on: a source, held-out activations, how many tokens how often, and where they come from."""

    source: Source
    val: Acts
    n_tokens: int
    uses: int
    metadata: dict[str, Any]
    held_out: ModelSource | None = None  # the held-out text itself, where a model is at hand


def live_data(c: TrainConfig, lm: LanguageModel, hookpoints: list[str]) -> Data:
    dataset = open_dataset(c.dataset, text_column=c.text_column, split=c.split, streaming=c.streaming)
    left_out: Any = {"skip_first": c.skip_first, "exclude_tokens": c.exclude_tokens}

    def source(split: str) -> ModelSource:
        rows = TokenRows(lm, dataset, split, c.ctx_len, n_threads=c.data_preprocessing_num_proc)
        return ModelSource(lm, rows, hookpoints, model_batch_size=c.model_batch_size, **left_out)

    val = gather(source("val"), c.val_tokens, "validation")
    origin = {
        "provenance": cache.provenance(lm, dataset, ctx_len=c.ctx_len, **left_out),
        "model_name": lm.name, "dataset_path": dataset.name, "text_column": dataset.text_column,
        "split": dataset.split, "streaming": dataset.streaming, "context_size": min(c.ctx_len, lm.max_len), **left_out,
    }  # fmt: skip
    return Data(source("train"), val, c.max_tokens, c.num_epochs, origin, source("val"))


def cached_data(c: TrainConfig) -> Data:
    """The same from collected activations, once they are shown to be what they say."""
    assert c.activations is not None
    if c.layer is not None or c.layers:
        raise UserError("--activations has its own hookpoints; choose among them with --hookpoints, not by layer")
    options: dict[str, Any] = {
        "hookpoints": [*c.hookpoints, *(f"{name}@in" for name in c.hookpoints if c.transcode)],
        "val_split": c.val_split,
        "seed": shuffle_seed(c),
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
    if c.exclude_tokens and sorted(c.exclude_tokens) != manifest["exclude_tokens"]:
        raise UserError(
            f"'{c.activations}' was collected without --exclude_tokens {c.exclude_tokens}; collect it again"
        )
    model = manifest["model"] if c.model == TrainConfig.model else c.model
    dataset = c.dataset or (None if manifest["dataset"] == "embedded" else manifest["dataset"])
    try:
        lm = load_language_model(model, device="cpu", dataset=dataset)
        opened = open_dataset(
            dataset, text_column=manifest["text_column"], split=manifest["split"], streaming=manifest["streaming"]
        )
    except UserError as e:
        log.say(f"the cache's own model and text are not here to compare with ({e})")
    else:
        left_out: Any = {key: manifest[key] for key in ("skip_first", "exclude_tokens")}
        made_from = cache.provenance(lm, opened, ctx_len=manifest["ctx_len"], **left_out)
        cache.refuse_stale(manifest, made_from, c.activations)
    return {
        "provenance": {key: manifest[key] for key in ("model_hash", "dataset_hash", "n_tokens")},
        "model_name": manifest["model"], "dataset_path": manifest["dataset"], "text_column": manifest["text_column"],
        "split": manifest["split"], "streaming": manifest["streaming"], "context_size": manifest["ctx_len"],
        "skip_first": manifest["skip_first"], "exclude_tokens": manifest["exclude_tokens"],
    }  # fmt: skip


def run_folder(c: TrainConfig, hookpoints: list[str]) -> Path:
    """sae_models/<run_name>, or layer_10, layer_10_mlp, layers_0_4_8, or the hookpoint asked for."""
    if c.run_name:
        return Path(c.save_dir) / c.run_name
    if c.hookpoints or c.activations:
        name = hookpoints[0] if len(hookpoints) == 1 else re.sub(r"[^\w.@-]", "_", (c.hookpoints or hookpoints)[0])
        return Path(c.save_dir) / name
    numbers = [re.findall(r"\d+", name)[0] for name in hookpoints]
    return Path(c.save_dir) / layers_name(numbers, c.hook_type)


def run_to_resume(flags: dict[str, Any]) -> Path | None:
    """The config.json of the run that --resume means: of --run_name, of --layer or --layers, or the newest.

    None without --resume, and where only the model could tell the run's name (--hookpoints, --activations).
    """
    if not flags.get("resume"):
        return None
    root = Path(flags.get("save_dir", TrainConfig.save_dir))
    layers = flags.get("layers") or [flags.get("layer")]
    if "run_name" in flags:
        folder = root / str(flags["run_name"])
    elif layers != [None]:
        folder = root / layers_name(layers, flags.get("hook_type", TrainConfig.hook_type))
    elif flags.keys() & {"hookpoints", "activations", "hook_type", "layer_stride"}:
        return None
    else:
        written = [p for p in root.rglob("checkpoint_step*.pt") if (p.parent / "config.json").is_file()]
        if not written:
            raise UserError(f"there is no run to resume in '{root}'; start one without --resume")
        folder = max(written, key=lambda p: p.stat().st_mtime).parent
    if not (folder / "config.json").is_file():
        return None
    flags |= {"save_dir": str(folder.parent), "run_name": folder.name}
    return folder / "config.json"


def layers_name(layers: Sequence[Any], hook_type: str) -> str:
    """layer_10, layers_0_4_8, layer_10_mlp."""
    name = ("layer_" if len(layers) == 1 else "layers_") + "_".join(map(str, layers))
    return name if hook_type == "resid_post" else f"{name}_{hook_type}"


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


def build_saes(c: TrainConfig, data: Data, hookpoints: list[str]) -> tuple[dict[str, SAE], dict[str, TrainConfig]]:
    """An SAE for every hookpoint and combination of swept settings, by name, and their settings."""
    saes, configs = {}, {}
    for hookpoint in hookpoints:
        d_out = data.source.widths[hookpoint]
        d_in = data.source.widths[f"{hookpoint}@in"] if c.transcode else d_out
        if c.d_in is not None and c.d_in != d_in:
            raise UserError(f"--d_in {c.d_in} was given and '{hookpoint}' is {d_in} wide; leave --d_in out")
        for label, one in variants(c).items():
            name = f"{hookpoint}/{label}" if label else hookpoint
            configs[name] = replace(one, d_in=d_in, d_out=d_out, hook_point=hookpoint)
            saes[name] = create_sae(configs[name])
    return saes, configs


def pretrained_saes(c: TrainConfig, saes: dict[str, SAE]) -> dict[str, SAE]:
    """The SAEs of --finetune in the place of fresh ones: one for all, or a run with one for each hookpoint."""
    assert c.finetune is not None
    found = {}
    for name, fresh in saes.items():
        inside = Path(c.finetune) / name
        sae = formats.load_sae(inside if inside.is_dir() else c.finetune)
        for what in ("activation", "d_in", "d_out", "d_sae", "transcode", "skip_connection", "tied"):
            got, wanted = getattr(sae.config, what), getattr(fresh.config, what)
            if got != wanted:
                raise UserError(
                    f"the SAE in '{c.finetune}' has {what}={got} and {wanted} is asked for; set --{what} {got}"
                )
        fresh.load_state_dict(sae.state_dict())
        found[name] = fresh
    return found


def end_to_end(c: TrainConfig, lm: LanguageModel, data: Data) -> tuple[RowStream, EndToEnd]:
    """The stream of sequences and the objective of --loss_fn ce or kl."""
    assert isinstance(data.source, ModelSource) and c.loss_fn in ("ce", "kl")
    assert data.held_out is not None
    val = held_out(data.held_out, min(c.val_tokens, 8192))
    stream = RowStream(data.source, n_tokens=data.n_tokens * data.uses, batch_size=tokens_per_step(c))
    return stream, EndToEnd(lm, c.loss_fn, val, model_batch_size=c.model_batch_size)


def choose(c: TrainConfig, lm: LanguageModel) -> list[str]:
    """The hookpoints that --layer, --layers, --layer_stride, --hook_type and --hookpoints mean."""
    layers = (c.layer,) if c.layer is not None else c.layers
    if c.layer_stride > 1 and not c.hookpoints:
        layers = tuple(range(0, lm.n_layers, c.layer_stride))
    found = hooks.resolve(lm.module, hookpoints=c.hookpoints, layers=layers, hook_type=c.hook_type)
    found = found[:: c.layer_stride] if c.hookpoints else found
    if c.transcode and any("@in" in name for name in found):
        raise UserError("a transcoder predicts a module's output from its input; name a module without '@in'")
    return found


def main(argv: list[str]) -> None:
    c = from_cli(
        TrainConfig, argv, prog="python -m scripts.sae_train", description=__doc__ or "", replaced=REPLACED,
        start_from=run_to_resume,
    )  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were started and this trains in one; run it without torchrun"
        )
    if c.log_to_wandb:
        log.wandb_module()
    device = best_device(c.device)
    lm = None
    if c.activations is not None:
        data = cached_data(c)
        hookpoints = [name for name in data.source.widths if not (c.transcode and name.endswith("@in"))]
        missing = [name for name in hookpoints if c.transcode and f"{name}@in" not in data.source.widths]
        if missing:
            raise UserError(f"'{c.activations}' holds no '{missing[0]}@in'; collect with sae_collect --transcode")
        folder = run_folder(c, hookpoints)
        check_folder(c, folder)
    else:
        lm = load_language_model(c.model, device=device, dataset=c.dataset)
        hookpoints = choose(c, lm)
        folder = run_folder(c, hookpoints)
        check_folder(c, folder)
        data = live_data(c, lm, hookpoints + [f"{name}@in" for name in hookpoints if c.transcode])

    saes, configs = build_saes(c, data, hookpoints)
    if c.finetune and not c.resume:
        saes = pretrained_saes(c, saes)
    objective: EndToEnd | None = None
    stream: Stream | RowStream
    if c.loss_fn in ("ce", "kl"):
        assert lm is not None
        stream, objective = end_to_end(c, lm, data)
    else:
        stream = Stream(
            data.source, n_tokens=data.n_tokens, uses=data.uses, batch_size=tokens_per_step(c),
            buffer_tokens=c.buffer_tokens, seed=shuffle_seed(c), device=device,
        )  # fmt: skip
    metadata = {**data.metadata, "exclude_special_tokens": True, "training_tokens": stream.n_tokens}
    wandb = {"project": c.wandb_project, "name": folder.name, "config": c.to_dict()} if c.log_to_wandb else None
    trainer = SAETrainer(
        saes, c, stream, data.val, device, folder, metadata=metadata, overwrite=c.overwrite, configs=configs,
        pretrained=c.finetune is not None, objective=objective, wandb=wandb,
    )  # fmt: skip
    if c.resume:
        trainer.load_checkpoint()
        log.say(f"resuming '{folder}' at step {trainer.step}")
    for name, sae in saes.items():
        kind = f"{sae.config.activation} {'transcoder' if c.transcode else 'SAE'}"
        log.say(f"{name}: {kind}, {sae.d_in} -> {sae.d_sae} latents")
    if device.type == "cpu" and not native.ready():
        log.say("compiling the C++ kernels, once")
    log.say(f"{stream.n_batches} steps of {stream.batch_size} tokens on {device} (kernels: {kernels.status(device)})")
    metrics = trainer.train()
    if stream.n_passes:
        log.say(f"the text was read again from its start: {stream.n_passes} more passes, in whole or in part")
    finish(trainer, metrics, folder)
    if c.assess:
        assess_run(c, {name: trainer.folder(name) for name in saes}, data.val, lm)


def finish(trainer: SAETrainer, metrics: dict[str, float], folder: Path) -> None:
    """Say how it went, and what to do next."""
    where = "held out" if trainer.val else "on the last steps"
    if len(trainer.learners) > 1 and trainer.last:
        for line in sweep.write(trainer.last, folder):
            log.say(line)
        one = trainer.folder(next(iter(trainer.learners)))
        log.say(f"(figures {where}) saved to {folder}; next: python -m scripts.sae_eval --sae_path {one}")
    else:
        score = f"explained variance {metrics['explained_variance']:.4f}, L0 {metrics['l0']:.1f}" if metrics else "done"
        log.say(f"{where}: {score}; saved to {folder}; next: python -m scripts.sae_eval --sae_path {folder}")


if __name__ == "__main__":
    log.run_script(main)
