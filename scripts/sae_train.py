"""Train sparse autoencoders on a language model's activations:  python -m scripts.sae_train --layer 10"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sae import distributed, files, hooks, log, plan, plots
from sae.checkpoint import checkpoints, to_resume_from
from sae.config import REPLACED, TrainConfig, UserError, from_cli, require, variants
from sae.data import cache
from sae.data.activation_files import FileSource, is_activation_file
from sae.data.activations import ModelSource, Source, Stream, gather
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.distributed import World
from sae.end_to_end import EndToEnd, RowStream, held_out
from sae.evaluator import assess_run
from sae.flags import said
from sae.formats import store
from sae.kernels import native, sparse
from sae.lm.language_model import LanguageModel, best_device, load_language_model
from sae.models import SAE, create_sae
from sae.schedules import n_latents, tokens_per_step
from sae.trainer import SAETrainer, refuse_existing, shuffle_seed


class Data(NamedTuple):
    """What a run trains on: a source, a held-out one, how many tokens how often, and where they come from."""

    source: Source
    held_out: Source | None
    n_tokens: int
    uses: int
    metadata: dict[str, Any]


class Layout(NamedTuple):
    """Which of the run's SAEs, by name, each group of processes trains, and the hookpoints that takes."""

    world: World
    owner: dict[str, int]
    wanted: list[list[str]]


def live_data(c: TrainConfig, lm: LanguageModel, hookpoints: list[str]) -> Data:
    dataset = open_dataset(c.dataset, text_column=c.text_column, split=c.split, streaming=c.streaming)
    left_out: Any = {"skip_first": c.skip_first, "exclude_tokens": c.exclude_tokens}

    def source(split: str) -> ModelSource:
        rows = TokenRows(lm, dataset, split, c.ctx_len, **left_out, n_threads=c.data_preprocessing_num_proc)
        return ModelSource(rows, hookpoints, model_batch_size=c.model_batch_size)

    train = source("train")
    origin = {
        "provenance": train.rows.provenance(),
        "model_name": lm.name, "model_dtype": lm.dtype, "dataset_path": dataset.name,
        "text_column": dataset.text_column, "split": dataset.split, "streaming": dataset.streaming,
        "context_size": min(c.ctx_len, lm.max_len), **left_out,
    }  # fmt: skip
    return Data(train, source("val"), c.max_tokens, c.num_epochs, origin)


def cached_data(c: TrainConfig) -> Data:
    """The same from collected activations, once they are shown to be what they say."""
    assert c.activations is not None
    if said(c, "layer", "layers", "layer_stride", "hook_type") and not c.resume:
        raise UserError("--activations has its own hookpoints; choose among them with --hookpoints, not by layer")
    if c.model_device and not c.assess:
        raise UserError("--model_device is for a run of the model; --activations runs none but to --assess")
    options: dict[str, Any] = {
        "hookpoints": [*c.hookpoints, *(f"{name}@in" for name in c.hookpoints if c.transcode)],
        "val_split": c.val_split,
        "seed": shuffle_seed(c),
        "block_rows": min(cache.BLOCK_ROWS, max(64, c.buffer_tokens // 16)),  # small beside what the buffer mixes
    }  # fmt: skip
    source: cache.BlockSource
    if is_activation_file(c.activations):
        refuse_other(c, {}, c.ctx_len)
        source = FileSource(c.activations, hook_point=c.hook_point, **options)
        origin = {"provenance": source.provenance(), "activations_file": source.path.name}
    else:
        source = cache.CacheSource(c.activations, **options)
        origin = cache_origin(c, source.manifest)
    held_out = source.held_out() if len(source.held_out()) > 1 else None
    if held_out is not None and isinstance(source, FileSource) and source.positions == 1:
        log.say(f"the file says nothing of sequences: its last {len(held_out):,} rows are held out")
    n = len(source)
    if c.max_tokens < n:
        log.say(f"training on {c.max_tokens:,} of {n:,} collected tokens; --max_tokens takes more")
    elif c.max_tokens > n * c.num_epochs:
        times = f", {c.num_epochs} times each" if c.num_epochs > 1 else ""
        log.say(f"training on all {n:,} collected tokens but those held out{times}; --num_epochs goes over them again")
    # all of it is read anew for each epoch, in a new order; of a part, rows are used again while they are at hand
    n_tokens, uses = (n * c.num_epochs, 1) if c.max_tokens >= n else (c.max_tokens, c.num_epochs)
    return Data(source, held_out, n_tokens, uses, origin)


COLLECTED = ("ctx_len", "skip_first", "exclude_tokens", "model_dtype", "text_column", "split", "streaming")


def refuse_other(c: TrainConfig, manifest: dict[str, Any], max_len: int) -> None:
    """Raise UserError for a setting of the model's run that the activations at hand were not collected with.

    manifest: how they were, as far as they say. max_len: the model's context.
    """
    for name in said(c, *COLLECTED) if not c.resume else ():
        wanted = sorted(c.exclude_tokens) if name == "exclude_tokens" else getattr(c, name)
        if (min(wanted, max_len) if name == "ctx_len" else wanted) != manifest.get(name):
            was = f"was collected with {name}={manifest[name]}" if name in manifest else "says nothing of that"
            raise UserError(f"--{name} {wanted}: '{c.activations}' {was}; leave the flag out, or collect again with it")


def cache_origin(c: TrainConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """Where a cache's activations come from. Raises UserError if that is here and has changed."""
    assert c.activations is not None
    model = c.model if said(c, "model") else manifest["model"]
    dataset = c.dataset or (None if manifest["dataset"] == "embedded" else manifest["dataset"])
    try:
        lm = load_language_model(model, device="cpu", dataset=dataset, dtype=manifest["model_dtype"])
        opened = open_dataset(
            dataset, text_column=manifest["text_column"], split=manifest["split"], streaming=manifest["streaming"]
        )
    except UserError as e:
        if said(c, "model", "dataset"):
            raise
        refuse_other(c, manifest, c.ctx_len)
        log.say(f"the cache's own model and text are not here to compare with ({e})")
    else:
        refuse_other(c, manifest, lm.max_len)
        left_out: Any = {key: manifest[key] for key in ("skip_first", "exclude_tokens")}
        made_from = TokenRows(lm, opened, "train", manifest["ctx_len"], **left_out).provenance()
        cache.refuse_stale(manifest, made_from, c.activations)
    return {
        "provenance": {key: manifest[key] for key in ("model_hash", "dataset_hash", "n_tokens")},
        "model_name": manifest["model"], "model_dtype": manifest["model_dtype"],
        "dataset_path": manifest["dataset"], "text_column": manifest["text_column"],
        "split": manifest["split"], "streaming": manifest["streaming"], "context_size": manifest["ctx_len"],
        "skip_first": manifest["skip_first"], "exclude_tokens": manifest["exclude_tokens"],
    }  # fmt: skip


def run_folder(c: TrainConfig, hookpoints: list[str]) -> Path:
    """sae_models/<run_name>, or layer_10, layer_10_mlp, layers_0_4_8, or the hookpoint asked for."""
    if c.run_name is not None:
        inside = Path(c.run_name)
        if not inside.parts or ".." in inside.parts or inside.is_absolute():
            raise UserError(f"--run_name '{c.run_name}' names no folder inside --save_dir; give a name such as mine")
        return Path(c.save_dir) / inside
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
    for layout in ("shard_latents", "distribute_modules"):  # as many processes as there are now
        flags.setdefault(layout, getattr(TrainConfig, layout))
    return folder / "config.json"


def layers_name(layers: Sequence[Any], hook_type: str) -> str:
    """layer_10, layers_0_4_8, layer_10_mlp."""
    name = ("layer_" if len(layers) == 1 else "layers_") + "_".join(map(str, layers))
    return name if hook_type == "resid_post" else f"{name}_{hook_type}"


def check_folder(c: TrainConfig, folder: Path) -> None:
    """Say now, not after an hour, that there is nothing to go on from, or that results cannot be written."""
    if c.resume:
        to_resume_from(folder)
    elif not c.overwrite:
        refuse_existing(folder)
    files.check_writable(Path(c.save_dir), "--save_dir")


def settings_of_saes(c: TrainConfig, widths: dict[str, int], hookpoints: list[str]) -> dict[str, TrainConfig]:
    """A config for every hookpoint and combination of swept settings, by name."""
    configs = {}
    for hookpoint in hookpoints:
        d_out = widths[hookpoint]
        d_in = widths[f"{hookpoint}@in"] if c.transcode else d_out
        for flag, given, width in (("d_in", c.d_in, d_in), ("d_out", c.d_out, d_out)):
            if given not in (None, width):
                raise UserError(f"--{flag} {given} was given and '{hookpoint}' is {width} wide; leave --{flag} out")
        for label, one in variants(c).items():
            name = f"{hookpoint}/{label}" if label else hookpoint
            configs[name] = replace(one, d_in=d_in, d_out=d_out, hook_point=hookpoint)
    return configs


def lay_out(c: TrainConfig, configs: dict[str, TrainConfig], everyone: distributed.Axis, device: Any) -> Layout:
    """Processes and SAEs on the mesh; SAEs by what a step of them costs."""
    shape = distributed.arrange(
        everyone.size, n_saes=len(configs), shard_latents=c.shard_latents, distribute_modules=c.distribute_modules
    )
    world = World(everyone, shape, device)
    owner = distributed.balance({name: float(n_latents(x) * (x.d_in or 0)) for name, x in configs.items()}, shape[0])
    wanted: list[list[str]] = [[] for _ in range(shape[0])]
    for name, group in owner.items():
        hookpoint = name.split("/")[0]
        wanted[group] += [hookpoint, *([f"{hookpoint}@in"] if c.transcode else [])]
    if everyone.size > 1:
        log.say(world.describe())
        for group in range(shape[0]) if shape[0] > 1 else ():
            log.say(f"  group {group}: {', '.join(name for name in owner if owner[name] == group)}")
    return Layout(world, owner, wanted)


def pretrained_saes(c: TrainConfig, saes: dict[str, SAE | None]) -> dict[str, SAE | None]:
    """The SAEs of --finetune in the place of fresh ones: one for all, or a run with one for each hookpoint."""
    assert c.finetune is not None
    found: dict[str, SAE | None] = {}
    for name, fresh in saes.items():
        if fresh is None:
            found[name] = None
            continue
        inside = Path(c.finetune) / name
        sae = store.load_sae(inside if inside.is_dir() else c.finetune)
        for what in ("activation", "d_in", "d_out", "d_sae", "transcode", "skip_connection", "tied"):
            got, wanted = getattr(sae.config, what), getattr(fresh.config, what)
            if got != wanted:
                raise UserError(
                    f"the SAE in '{c.finetune}' has {what}={got} and {wanted} is asked for; set --{what} {got}"
                )
        _refuse_other_scale(c, sae, fresh)
        fresh.take_(sae.tensors())
        found[name] = fresh
    return found


def _refuse_other_scale(c: TrainConfig, sae: SAE, fresh: SAE) -> None:
    """Raise UserError if a pretrained SAE's weights would mean something else in a run with these settings."""
    if sae.layer_norm != fresh.layer_norm:
        flag = "--normalize_activations layer_norm" if sae.layer_norm else "another --normalize_activations"
        what = "reads activations after layer norm" if sae.layer_norm else "reads activations without layer norm"
        raise UserError(f"the SAE in '{c.finetune}' {what}; give {flag}")
    norms = sae.W_dec.detach().norm(dim=1)
    unit = norms.median() if c.transcode else 1.0  # a transcoder's unit may be that of other activations
    if fresh.unit_decoder and ((norms - unit).abs() > 1e-3 * unit).any():
        raise UserError(
            f"the SAE in '{c.finetune}' has decoder rows of norms {norms.min():.3g} to {norms.max():.3g}, which would "
            "be made 1; give --no-normalize_decoder"
        )


def end_to_end(c: TrainConfig, lm: LanguageModel, data: Data, world: World) -> tuple[RowStream, EndToEnd]:
    """The stream of sequences and the objective of --loss_fn ce or kl."""
    assert isinstance(data.source, ModelSource) and c.loss_fn in ("ce", "kl")
    assert isinstance(data.held_out, ModelSource)
    gated = "gated" in c.sweep.get("activation", (c.activation,)) and c.fvu_coefficient == 0
    require(
        not gated, f"a gate learns from reconstruction alone; with --loss_fn {c.loss_fn} give --fvu_coefficient 0.1"
    )
    data.held_out.rewind()
    val = held_out(data.held_out, min(c.val_tokens, 8192))
    stream = RowStream(data.source, n_tokens=data.n_tokens * data.uses, batch_size=tokens_per_step(c), world=world)
    return stream, EndToEnd(lm, c.loss_fn, val, model_batch_size=c.model_batch_size, world=world)


def choose(c: TrainConfig, lm: LanguageModel) -> list[str]:
    """The hookpoints that the flags mean; of a transcoder they are modules."""
    found = hooks.choose(c, lm.module)
    if c.transcode and any("@in" in name for name in found):
        raise UserError("a transcoder predicts a module's output from its input; name a module without '@in'")
    return found


def open_data(c: TrainConfig, device: Any) -> tuple[LanguageModel | None, Data, list[str], Path]:
    """The model, if one is run, what to train on, at which hookpoints, and the folder for the results."""
    if c.activations is not None:
        data = cached_data(c)
        hookpoints = [name for name in data.source.widths if not (c.transcode and name.endswith("@in"))]
        missing = [name for name in hookpoints if c.transcode and f"{name}@in" not in data.source.widths]
        if missing:
            raise UserError(f"'{c.activations}' holds no '{missing[0]}@in'; collect with sae_collect --transcode")
        check_folder(c, run_folder(c, hookpoints))
        return None, data, hookpoints, run_folder(c, hookpoints)
    lm = load_language_model(c.model, device=c.model_device or device, dataset=c.dataset, dtype=c.model_dtype)
    hookpoints = choose(c, lm)
    check_folder(c, run_folder(c, hookpoints))
    data = live_data(c, lm, hookpoints + [f"{name}@in" for name in hookpoints if c.transcode])
    return lm, data, hookpoints, run_folder(c, hookpoints)


def say_plan(c: TrainConfig) -> None:
    """What the run would take on as many processes as were started, from shapes alone."""
    n = int(os.environ.get("WORLD_SIZE", "1"))
    device = best_device(distributed.local_device(c.device))
    model_numbers = forward = 0
    wide = 4 if c.model_dtype == "float32" else 2  # bytes
    if c.activations is not None:
        held = FileSource(c.activations) if is_activation_file(c.activations) else cache.CacheSource(c.activations)
        widths = {name: d for name, d in held.widths.items() if not c.hookpoints or name in c.hookpoints}
        hookpoints = [name for name in widths if not (c.transcode and name.endswith("@in"))]
    else:
        lm = plan.outline(c.model)
        hookpoints = choose(c, lm)
        widths = lm.widths(hookpoints + [f"{name}@in" for name in hookpoints if c.transcode])
        model_numbers = sum(p.numel() for p in lm.module.parameters())
        forward = 16 * wide * c.model_batch_size * min(c.ctx_len, lm.max_len) * lm.d_model  # what its blocks hold
    configs = settings_of_saes(c, widths, hookpoints)
    shape = distributed.arrange(
        n, n_saes=len(configs), shard_latents=c.shard_latents, distribute_modules=c.distribute_modules
    )
    costs = {name: float(n_latents(one) * (one.d_in or 0)) for name, one in configs.items()}
    owner = distributed.balance(costs, shape[0])
    groups = [[one for name, one in configs.items() if owner[name] == group] for group in range(shape[0])]
    each = [plan.memory(c, saes, widths, wide * model_numbers + forward, shape, device.type) for saes in groups]
    parts = max(each, key=lambda parts: sum(parts.values()))
    room = plan.machine_memory(device) / (n if device.type == "cpu" else 1)
    rate = plan.tokens_per_second(c, list(configs.values()), model_numbers, shape, plan.flops_here(device))
    total = sum(plan.parameters(one) for one in configs.values())
    log.say(f"{len(configs)} SAEs, {total:,} parameters; {n} processes: modules x data x latents = {shape}")
    for name, size in parts.items():
        log.say(f"  {name:16} {size / 2**20:10,.0f} MiB")
    log.say(f"  {'peak per process':16} {sum(parts.values()) / 2**20:10,.0f} MiB of {room / 2**20:,.0f}: "
            f"{plan.advice(c, parts, room)}")  # fmt: skip
    log.say(f"about {rate:,.0f} tokens/s, {c.max_tokens * c.num_epochs / rate:,.0f} s by arithmetic alone")
    log.say(f"a cache of the activations: {4 * c.max_tokens * sum(widths.values()) / 2**30:,.2f} GiB as float32")


def check_processes(c: TrainConfig) -> None:
    """Raise UserError for what the number of processes does not allow."""
    if distributed.started() and c.loss_fn in ("ce", "kl"):
        by_batch = {"batchtopk": True, "matryoshka": c.matryoshka_base == "batchtopk"}
        by_batch["jumprelu"] = c.jumprelu_penalty == "quadratic"
        if c.shard_latents > 1 or c.distribute_modules or by_batch.get(c.activation):
            raise UserError(
                f"--loss_fn {c.loss_fn} trains through the model: several processes can be replicas and no more, with "
                "latents chosen token by token (topk, abstopk, groupmax, relu, gated, jumprelu); leave out "
                "--shard_latents, --distribute_modules and other kinds, or run it without torchrun"
            )
    if not distributed.started() and (c.shard_latents > 1 or c.distribute_modules):
        layout = f"--shard_latents {c.shard_latents}" if c.shard_latents > 1 else "--distribute_modules"
        raise UserError(f"{layout} is for several processes; start them with torchrun")


def main(argv: list[str]) -> None:
    c = from_cli(
        TrainConfig, argv, prog="python -m scripts.sae_train", description=__doc__, replaced=REPLACED,
        start_from=run_to_resume,
    )  # fmt: skip
    if not c.resume:
        c.check_idle()
    if c.plan:
        say_plan(c)
        return
    check_processes(c)
    if c.log_to_wandb:
        log.wandb_module()
    native.keep_memory()
    with sparse.using(c.kernels):
        train(c)


def train(c: TrainConfig) -> None:
    """Open the data, train, and say how it went."""
    device = best_device(distributed.local_device(c.device))
    everyone = distributed.join(device)
    lm, data, hookpoints, folder = open_data(c, device)
    configs = settings_of_saes(c, data.source.widths, hookpoints)
    layout = lay_out(c, configs, everyone, device)
    world, on_mesh = layout.world, {"world": layout.world, "wanted": layout.wanted}
    val = gather(data.held_out, c.val_tokens, "validation", **on_mesh) if data.held_out is not None else {}  # type: ignore[arg-type]
    saes = {n: create_sae(x, world=world) if layout.owner[n] == world.group else None for n, x in configs.items()}
    if c.finetune and not c.resume:
        saes = pretrained_saes(c, saes)
    objective: EndToEnd | None = None
    stream: Stream | RowStream
    if c.loss_fn in ("ce", "kl"):
        assert lm is not None
        stream, objective = end_to_end(c, lm, data, world)
    else:
        stream = Stream(
            data.source, n_tokens=data.n_tokens, uses=data.uses, batch_size=tokens_per_step(c),
            buffer_tokens=c.buffer_tokens, seed=shuffle_seed(c), device=device, **on_mesh,  # type: ignore[arg-type]
        )  # fmt: skip
    metadata = {**data.metadata, "exclude_special_tokens": True, "training_tokens": stream.n_tokens}
    wandb = {"project": c.wandb_project, "name": folder.name, "config": c.to_dict()} if c.log_to_wandb else None
    trainer = SAETrainer(
        saes, c, stream, val, device, folder, metadata=metadata, overwrite=c.overwrite, configs=configs,
        pretrained=c.finetune is not None, objective=objective, wandb=wandb,
        world=world,
    )  # fmt: skip
    if c.resume:
        trainer.load_checkpoint()
        log.say(f"resuming '{folder}' at step {trainer.step}")
    announce(configs, trainer)
    try:
        metrics = trainer.train()
    except KeyboardInterrupt:
        say_how_to_go_on(trainer, folder)
        raise
    if stream.n_passes:
        more = "once more" if stream.n_passes == 1 else f"{stream.n_passes} times more"
        log.say(f"the text was read {more} from its start, the last time not always to its end")
    finish(trainer, metrics, folder, evaluates="activations_file" not in data.metadata)
    if c.assess:
        assess_run(c, {name: trainer.folder(name) for name in saes}, data.held_out, lm, World(everyone, device=device))
    distributed.leave()


def announce(configs: dict[str, TrainConfig], trainer: SAETrainer) -> None:
    """Say what is about to be trained."""
    for name, one in configs.items():
        kind = f"{one.activation} {'transcoder' if one.transcode else 'SAE'}"
        log.say(f"{name}: {kind}, {one.d_in} -> {n_latents(one)} latents")
    device, stream = trainer.device, trainer.stream
    if device.type == "cpu" and not native.ready():
        log.say("compiling the C++ kernels, once")
    for name in ("warmup_steps", "k_decay_steps"):
        if (getattr(trainer.config, name) or 0) > stream.n_batches:
            given = f"--{name} {getattr(trainer.config, name)}"
            log.say(f"{given} is more than the run's {stream.n_batches} steps: the run ends before that is over")
    log.say(f"{stream.n_batches} steps of {stream.batch_size} tokens on {device} (kernels: {sparse.status(device)})")


def say_how_to_go_on(trainer: SAETrainer, folder: Path) -> None:
    """Say where a run was stopped, and what is left of it."""
    there = f"with --resume '{folder}' goes on from its last checkpoint"
    left = there if checkpoints(folder) else "there is no checkpoint yet (--save_every)"
    log.say(f"after {trainer.step} of {trainer.stream.n_batches} steps; {left}")


def finish(trainer: SAETrainer, metrics: dict[str, float], folder: Path, *, evaluates: bool = True) -> None:
    """Say how it went, and what to do next, if sae_eval knows which model to evaluate it in."""
    where = "held out" if trainer.val else "on the last steps"
    one = trainer.folder(trainer.names[0])
    then = f"; next: python -m scripts.sae_eval --sae_path {one}" if evaluates else ""
    if not metrics:
        log.say(f"there was nothing left to do; saved to {folder}")
    elif len(trainer.names) > 1 and trainer.last and log.speaks():
        for line in plots.write_sweep(trainer.last, folder):
            log.say(line)
        log.say(f"(figures {where}) saved to {folder}{then}")
    else:
        score = f"explained variance {metrics['explained_variance']:.4f}, L0 {metrics['l0']:.1f}"
        log.say(f"{where}: {score}; saved to {folder}{then}")


if __name__ == "__main__":
    log.run_script(main)
