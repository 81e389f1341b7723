"""Train sparse autoencoders on a language model's activations:  python -m scripts.sae_train --layer 10"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae import log
from sae.config import REPLACED, TrainConfig, from_cli

if TYPE_CHECKING:
    import torch

    from sae.data.training import Data
    from sae.lm.language_model import LanguageModel
    from sae.trainer import SAETrainer


def run_to_resume(flags: dict[str, Any]) -> Path | None:
    """The settings that --resume goes on with."""
    if not flags.get("resume"):
        return None
    from sae import rundir

    return rundir.run_to_resume(flags)


def main(argv: list[str]) -> None:
    about = {"prog": "python -m scripts.sae_train", "description": __doc__}
    c = from_cli(TrainConfig, argv, **about, replaced=REPLACED, start_from=run_to_resume)
    from sae import plan
    from sae.kernels import native, sparse

    c = replace(c)  # the kinds of SAE are loaded now, and check their settings
    if not c.resume:
        c.check_idle()
    if c.plan:
        for line in plan.lines(c):
            log.say(line)
        return
    plan.check_processes(c)
    if c.log_to_wandb:
        log.wandb_module()
    native.keep_memory()
    with sparse.using(c.kernels):
        train(c)


def open_data(c: TrainConfig, device: torch.device) -> tuple[LanguageModel | None, Data, list[str], Path]:
    """The model, if one is run, what to train on, at which hookpoints, and the folder for the results."""
    from sae import rundir
    from sae.data import training
    from sae.hookpoints import choose
    from sae.lm.language_model import load_language_model

    if c.activations is not None:
        data = training.collected(c)
        hookpoints = training.trained_at(c, data.source)
        return None, data, hookpoints, rundir.claim(c, hookpoints)
    lm = load_language_model(c.model, device=c.model_device or device, dataset=c.dataset, dtype=c.model_dtype)
    hookpoints = choose(c, lm.module)
    folder = rundir.claim(c, hookpoints)
    return lm, training.live(c, lm, hookpoints), hookpoints, folder


def train(c: TrainConfig) -> None:
    """Open the data, train, and say how it went."""
    from sae import distributed, end_to_end, plan, rundir
    from sae.data.activations import Stream, gather
    from sae.evaluator import assess_run
    from sae.lm.language_model import best_device
    from sae.models import create_sae
    from sae.schedules import shuffle_seed, tokens_per_step
    from sae.trainer import SAETrainer

    device = best_device(distributed.local_device(c.device))
    everyone = distributed.join(device)
    lm, data, hookpoints, folder = open_data(c, device)
    configs = plan.settings_of_saes(c, data.source.widths, hookpoints)
    layout = plan.lay_out(c, configs, everyone.size)
    world = distributed.World(everyone, layout.shape, device)
    for line in (world.describe(), *layout.lines()) if everyone.size > 1 else ():
        log.say(line)
    on_mesh: dict[str, Any] = {"world": world, "wanted": layout.wanted}
    val = gather(data.held_out, c.val_tokens, "validation", **on_mesh) if data.held_out is not None else {}
    saes = {n: create_sae(x, world=world) if layout.owner[n] == world.group else None for n, x in configs.items()}
    if c.finetune and not c.resume:
        saes = rundir.finetuned(c, saes)

    stream: Stream | end_to_end.RowStream
    objective = None
    if c.loss_fn in ("ce", "kl"):
        stream, objective = end_to_end.open_run(c, data.source, data.held_out, world)
    else:
        sizes: dict[str, Any] = {"n_tokens": data.n_tokens, "uses": data.uses, "batch_size": tokens_per_step(c)}
        sizes |= {"buffer_tokens": c.buffer_tokens, "seed": shuffle_seed(c)}
        stream = Stream(data.source, **sizes, device=device, **on_mesh)
    about = {**data.origin, "exclude_special_tokens": True, "training_tokens": stream.n_tokens}
    wandb = {"project": c.wandb_project, "name": folder.name, "config": c.to_dict()} if c.log_to_wandb else None
    options: dict[str, Any] = {"metadata": about, "wandb": wandb, "overwrite": c.overwrite, "configs": configs}
    options |= {"pretrained": c.finetune is not None, "objective": objective, "world": world}
    trainer = SAETrainer(saes, c, stream, val, device, folder, **options)
    if c.resume:
        trainer.load_checkpoint()
        log.say(f"resuming '{folder}' at step {trainer.step}")
    announce(configs, trainer)
    try:
        metrics = trainer.train()
    except KeyboardInterrupt:
        say_how_to_go_on(trainer, folder)
        raise
    finish(trainer, metrics, folder, evaluates="activations_file" not in data.origin)
    if c.assess:
        folders, world = {name: trainer.folder(name) for name in saes}, distributed.World(everyone, device=device)
        assess_run(c, folders, data.held_out, lm, world)
    distributed.leave()


def announce(configs: Mapping[str, TrainConfig], trainer: SAETrainer) -> None:
    """Say what is about to be trained."""
    from sae.kernels import native, sparse
    from sae.schedules import n_latents

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
    from sae.checkpoint import checkpoints

    there = f"with --resume '{folder}' goes on from its last checkpoint"
    left = there if checkpoints(folder) else "there is no checkpoint yet (--save_every)"
    log.say(f"after {trainer.step} of {trainer.stream.n_batches} steps; {left}")


def finish(trainer: SAETrainer, metrics: dict[str, float], folder: Path, *, evaluates: bool) -> None:
    """Say how it went, and what to do next, if sae_eval knows which model to evaluate it in."""
    from sae import plots

    n_passes = trainer.stream.n_passes
    if n_passes:
        more = "once more" if n_passes == 1 else f"{n_passes} times more"
        log.say(f"the text was read {more} from its start, the last time not always to its end")
    where = "held out" if trainer.val else "on the last steps"
    then = f"; next: python -m scripts.sae_eval --sae_path {trainer.folder(trainer.names[0])}" if evaluates else ""
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
