"""SAETrainer: the training loop, and saving and restoring its state.

Activations come from a Stream (or a tensor), SAEs learn side by side (learner.py), results go to a run directory
(rundir.py).

Letters: B tokens in a batch, D width, F latents.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import checkpoint, log, rundir
from sae import schedules as sched
from sae.config import SAEConfig, require
from sae.data.activations import ModelSource, Stream, TensorSource
from sae.distributed import ALONE, World
from sae.end_to_end import EndToEnd, RowStream
from sae.formats import store
from sae.hookpoints import SAEName, input_of
from sae.hooks import Acts
from sae.kernels import sparse
from sae.learner import Learner
from sae.log import Stopwatch
from sae.metrics import check_finite
from sae.models import SAE, create_sae

WANTED = "a matrix (tokens, width) was wanted"
CHECK_EVERY = 100  # steps between looks whether replicas are still equal


Batches = Stream | RowStream


class SAETrainer:
    """Trains an SAE, or several side by side, on activations.

    sae: an SAE, or {name: SAE}, a name being a hookpoint, or `hookpoint/label` where one hookpoint has several.
    activations: a Stream, a tensor (tokens, D), or for a transcoder {"@in": (tokens, D), "": (tokens, D_out)}.
    val_activations: likewise, by hookpoint. save_dir: the run directory, or None to write nothing. metadata goes into
    cfg.json. configs: by name, where they differ. pretrained: the SAEs hold weights to go on from. objective: an
    end-to-end loss. world: several processes train together; of SAEs that another group of them trains, None is given,
    and the activations are each process's part. Raises UserError for widths that do not fit, NaN activations, and a
    save_dir that holds a run.
    """

    def __init__(
        self, sae: SAE | Mapping[str, SAE | None], config: SAEConfig, activations: Tensor | Acts | Batches,
        val_activations: Tensor | Acts | None = None, device: str | torch.device = "cpu",
        save_dir: str | Path | None = None, *, metadata: dict[str, Any] | None = None, overwrite: bool = False,
        configs: Mapping[str, SAEConfig] | None = None, pretrained: bool = False, objective: EndToEnd | None = None,
        wandb: dict[str, Any] | None = None, world: World = ALONE,
    ):  # fmt: skip
        saes: Mapping[str, SAE | None] = {"": sae} if isinstance(sae, SAE) else sae
        if isinstance(val_activations, Tensor):
            val_activations = {SAEName.parse(name).hookpoint: val_activations for name in saes}
        self.val = {k: v.to(device) for k, v in (val_activations or {}).items()}
        self.config, self.metadata, self.overwrite = config, metadata or {}, overwrite
        self.pretrained, self.objective, self.wandb = pretrained, objective, wandb
        self.world, self.names = world, list(saes)
        self.save_dir = Path(save_dir) if save_dir is not None else None
        self.device = torch.device(device)
        self._activations = {"": activations} if isinstance(activations, Tensor) else activations
        self._make_learners({name: one for name, one in saes.items() if one is not None}, configs or {})
        self.watch = Stopwatch(self.device)  # of the SAEs' steps
        self.step = 0
        self.last: dict[str, dict[str, float]] = {}  # the latest metrics of every SAE
        self.train_losses: list[dict[str, float]] = []
        self.val_losses: list[dict[str, float]] = []

    @property
    def sae(self) -> SAE:
        """The (first) SAE, for raw activations."""
        return next(iter(self.learners.values())).finished()

    @property
    def saes(self) -> dict[str, SAE]:
        """Every SAE by hookpoint, for raw activations."""
        return {name: learner.finished() for name, learner in self.learners.items()}

    @property
    def best_val_loss(self) -> float:
        return min(learner.best_val_loss for learner in self.learners.values())

    @property
    def epoch(self) -> int:
        """Passes over the data completed so far."""
        return self.stream.n_passes

    def _make_learners(self, saes: Mapping[str, SAE], configs: Mapping[str, SAEConfig]) -> None:
        self.stream = self._stream()
        self.learners: dict[str, Learner] = {}
        widths, n_steps = self.stream.source.widths, self.stream.n_batches
        for name, sae in saes.items():
            config, hookpoint = configs.get(name, self.config), SAEName.parse(name).hookpoint
            self.learners[name] = learner = Learner(sae, config, n_steps, self.device, hookpoint)
            d_in, d_out = widths[learner.reads], widths[learner.hookpoint]
            wanted = f"d_in={d_in} and d_out={d_out}" if sae.config.transcode else f"d_in={d_in}"
            differ = f"activations are {d_in} wide and the SAE reads {sae.d_in}; set {wanted}"
            require((d_in, d_out) == (sae.d_in, sae.d_out), differ)

    def _stream(self) -> Batches:
        """The stream given, or one over the tensors given."""
        acts, c = self._activations, self.config
        if not isinstance(acts, dict):
            return acts
        for x in acts.values():
            require(x.ndim == 2 and len(x) > 0, f"activations have shape {tuple(x.shape)}; {WANTED}")
        check_finite(acts)
        n = len(next(iter(acts.values())))
        size, seed = min(sched.tokens_per_step(c), n), sched.shuffle_seed(c)
        options: dict[str, Any] = {"batch_size": size, "seed": seed, "device": self.device, "world": self.world}
        return Stream(TensorSource(acts, seed=seed), n_tokens=n * c.num_epochs, buffer_tokens=2 * size, **options)

    # ----------------------------------------------------------------------------------------------
    # the loop

    def train(self, num_epochs: int | None = None, verbose: bool = True) -> dict[str, float]:
        """Train to the end of the stream and return the last validation (or the last logged) metrics.

        num_epochs: passes over a tensor of activations, instead of the config's, before the first step. Raises
        UserError once the run has begun, and for a stream, which has its own length.
        """
        if num_epochs is not None and num_epochs != self.config.num_epochs:
            self._set_epochs(num_epochs)
        started, given = time.perf_counter(), self.stream.n_given
        with sparse.using(self.config.kernels):
            if self.step == 0:
                self._begin_run()
            path = self.save_dir / "metrics.jsonl" if self.save_dir is not None else None
            # Ctrl-C waits for the end of a step and saves; several processes might end theirs at different steps
            stopping = log.stop_asked(listen=self.world.everyone.size == 1)
            with log.MetricLog(path, resume_step=self.step, wandb=self.wandb) as metric_log, stopping as stop:
                metrics = self._loop(metric_log, verbose, stop)
        if verbose and self.stream.n_given > given:
            log.say(self._pace(self.stream.n_given - given, time.perf_counter() - started))
        return metrics

    def _set_epochs(self, n: int) -> None:
        """As if the config had said so: the optimiser's memory and all schedules follow the length of the run."""
        why = "has begun; make a new trainer" if self.step else "trains on a stream, whose length is its own"
        may = self.step == 0 and isinstance(self._activations, dict)
        require(may, f"num_epochs={n}, but this run has {self.config.num_epochs} and {why}")
        self.config = replace(self.config, num_epochs=n)
        configs = {name: replace(x.config, num_epochs=n) for name, x in self.learners.items()}
        self._make_learners({name: x.sae for name, x in self.learners.items()}, configs)

    def _pace(self, n_tokens: int, seconds: float) -> str:
        """The speed of a run, and the share of its time that forwards and steps took: the bound on its speed.

        The model and the SAEs take turns on one device; on two they run side by side.
        """
        source, steps, forwards = self.stream.source, self.watch.seconds(), 0.0
        busy = steps
        if isinstance(source, ModelSource):
            forwards = source.watch.seconds()
            busy = steps + forwards if source.lm.device == self.device else max(steps, forwards)
        parts = f"forwards {forwards:.1f} s, steps" if forwards else "steps"
        rate = f"{n_tokens / seconds:,.0f} tokens/s, {busy / seconds:.0%} of the bound"
        return f"{rate} ({parts} {steps:.1f} s of {seconds:.1f} s)"

    def _loop(self, metric_log: log.MetricLog, verbose: bool, stop: Callable[[], bool]) -> dict[str, float]:
        c, n_steps = self.config, self.stream.n_batches
        total = n_steps * self.stream.batch_size
        bar = log.progress(total, "training", initial=self.stream.n_given, quiet=not verbose)
        last: dict[str, float] = {}
        clock, clock_step = time.perf_counter(), self.step

        while self.step < n_steps and not stop():
            batch = next(self.stream)
            with self.watch:
                self._step(batch)
            self.step += 1
            bar.update(self.stream.batch_size)

            # ---------------------------------------------------------------- once in a while: log
            done = self.step == n_steps
            if self.step % c.log_every == 0 or done:
                now = time.perf_counter()
                rate = (self.step - clock_step) * self.stream.batch_size / (now - clock)
                clock, clock_step = now, self.step
                last = self._log(metric_log, rate)
                bar.set_postfix_str(f"EV {last['explained_variance']:.3f}, L0 {last['l0']:.1f}")
            if self.step % CHECK_EVERY == 0 or done:
                for learner in self.learners.values():
                    learner.check_equal()

            # ---------------------------------------------------------------- validate, save
            if self.val and (self.step % c.eval_every == 0 or done):
                last = self._validate(metric_log)
            if self.save_dir is not None and (self.step % c.save_every == 0 or done):
                self.save()
        bar.close()
        if stop():
            if self.save_dir is not None and 0 < self.step < n_steps:
                self.save()
            raise KeyboardInterrupt
        return last

    def _step(self, batch: Any) -> None:
        """Gradients, then one optimiser step for every SAE."""
        if self.objective is not None:
            self.objective.learn(batch, self.learners, self.step)
        for learner in self.learners.values():
            if self.objective is None:
                learner.learn(batch, self.step, self.stream.batch_size)
            learner.update(self.step)
        self._resample()

    def _resample(self) -> None:
        """Once in a while, give dead latents a new start (the stream's buffer is what they choose from)."""
        for name, learner in self.learners.items():
            if sched.resamples_at(self.step, learner.config, learner.n_steps):
                generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
                n = learner.resample(self.stream.sample(), generator)
                log.say(f"{name or 'SAE'}: {n} dead latents resampled after step {self.step + 1}")

    def _log(self, metric_log: log.MetricLog, rate: float) -> dict[str, float]:
        found: dict[str, dict[str, float]] = {}
        for name, x in self.learners.items():
            set_to = {"lr": sched.lr_at(self.step - 1, x.config, x.n_steps), "k": sched.k_at(self.step - 1, x.config)}
            found[name] = {**set_to, **x.read_window()}
        for name, metrics in self._of_all(found).items():
            head = {"step": self.step, "tokens": self.stream.n_given, **({"hookpoint": name} if name else {})}
            metric_log.write({**head, **metrics, "n_passes": self.stream.n_passes, "tokens_per_s": rate})
            self.last[name] = {key: value for key, value in metrics.items() if key not in ("lr", "k")}
        self.train_losses.append(self.last[self.names[-1]])
        return self.train_losses[-1]

    def _of_all(self, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Figures of this process's SAEs -> those of all, in the order of the run's SAEs."""
        together = {name: one for theirs in self.world.everyone.objects(found) for name, one in theirs.items()}
        return {name: together[name] for name in self.names}

    def _validate(self, metric_log: log.MetricLog) -> dict[str, float]:
        found: dict[str, dict[str, float]] = {}
        objective = self.objective.validate(self.learners) if self.objective is not None else 0.0
        for name, learner in self.learners.items():
            # the first one's figures, for all to agree on what is best
            metrics = found[name] = self.world.team.objects(learner.validate(self.val))[0]
            if self.objective is not None:
                metrics["total_loss"] = objective
            if metrics["total_loss"] < learner.best_val_loss:
                learner.best_val_loss = metrics["total_loss"]
                if learner.config.save_best and self.save_dir is not None and self.world.data.rank == 0:
                    best = {"step": self.step, "epoch": self.epoch, "best_val_loss": learner.best_val_loss}
                    counts, path = learner.firing.feature_counts, self.folder(name) / "best_model.pt"
                    rundir.write_best(path, learner.finished(), counts, best)
        self.last |= self._of_all(found)
        for name, metrics in self.last.items():
            named = {"hookpoint": name} if name else {}
            metric_log.write({"step": self.step, **named, **{f"val_{k}": v for k, v in metrics.items()}})
        self.val_losses.append(self.last[self.names[-1]])
        return self.val_losses[-1]

    def evaluate(self) -> dict[str, float]:
        """Metrics of the (first) SAE on the validation activations; {} without any. Changes no state."""
        first = next(iter(self.learners.values()))
        return first.validate(self.val) if first.hookpoint in self.val else {}

    # ----------------------------------------------------------------------------------------------
    # files

    def folder(self, name: str) -> Path:
        """Where an SAE's own files go: the run directory, or a folder in it when the run has several SAEs."""
        assert self.save_dir is not None
        return self.save_dir if len(self.names) == 1 else self.save_dir / name

    def _begin_run(self) -> None:
        """Start the SAEs from data, and write what this run is, in the place of an old one if that is wanted."""
        first = self.world.everyone.rank == 0
        if self.save_dir is not None and first and not self.overwrite:
            rundir.refuse_existing(self.save_dir)
        sample, n_tokens = self.stream.sample(), self.stream.n_sample
        for learner in self.learners.values():
            learner.start_from(sample, self.pretrained, n_tokens)
        if self.save_dir is None:
            return
        settings = self.describe()
        if first:
            rundir.begin(self.save_dir, settings, self.overwrite)
        self.world.everyone.barrier()

    def describe(self) -> dict[str, Any]:
        """config.json: settings as given, the values derived from them, and what the run ran on."""
        derived = self._of_all({name: rundir.derived(x.config) for name, x in self.learners.items()})
        resolved = {
            "n_steps": self.stream.n_batches,
            "n_tokens": self.stream.n_tokens,
            "warmup_steps": sched.warmup_steps(self.config, self.stream.n_batches),
            **{key: [one[key] for one in derived.values()] for key in derived[self.names[0]]},
            "hookpoints": self.names,
        }
        run = {"config": self.config.to_dict(), "resolved": resolved, "metadata": self.metadata}
        return {**run, **rundir.surroundings(self.device, self.world)}

    def save(self) -> Path:
        """Write checkpoint_step{N}.pt (all that resume needs) and the SAEs; keep the newest checkpoints only."""
        assert self.save_dir is not None, "there is no save_dir"
        path = self.save_dir / f"checkpoint_step{self.step}.pt"
        state = {"step": self.step, "epoch": self.epoch, "config": self.config.to_dict(), "names": self.names}
        state |= {"stream": self.stream.state_dict(), "metadata": self.metadata}
        first = self.world.data.rank == 0  # what replicas have alike, the first one writes
        saes = {name: learner.state_dict() for name, learner in self.learners.items()}
        own = {name: [x.sae.own.start, x.sae.own.stop] for name, x in self.learners.items()}
        part = {"saes": saes if first else {}, "own": own, "held": self.stream.held_dict()}
        for name, learner in self.learners.items() if first else ():
            hookpoint = learner.hookpoint or self.config.hook_point
            store.save_sae(learner.finished(), self.folder(name), hookpoint=hookpoint, **self.metadata)
        checkpoint.write(path, state, part, self.world.everyone)
        return path

    def load_checkpoint(self, path: str | Path | None = None) -> None:
        """Go on from a checkpoint, by default the newest whole one of save_dir, to the bit.

        Raises UserError if there is none, if it is damaged, or if it belongs to other settings.
        """
        path, state, parts = checkpoint.newest_whole(self.save_dir) if path is None else (path, *checkpoint.read(path))
        rundir.refuse_other(path, state, self.config, self.metadata, self.names)
        for name, learner in self.learners.items():
            learner.load_state_dict(copy.deepcopy(checkpoint.joined(parts, name, learner.sae.own)))
        self.stream.load_state_dict(state["stream"], [part["held"] for part in parts])
        self.step = state["step"]
        steps = self.world.everyone.objects(self.step)
        found = f"the processes found checkpoints of steps {steps}; give them the same folder, then --resume"
        require(len(set(steps)) == 1, found)


def train_sae_from_activations(
    activations: Tensor, config: SAEConfig, val_split: float | None = None, device: str | torch.device = "cpu",
    save_dir: str | Path | None = None, verbose: bool = True, *, targets: Tensor | None = None, overwrite: bool = False,
) -> tuple[SAE, SAETrainer]:  # fmt: skip
    """Train an SAE on activations (tokens, D) and return it, for raw activations, with its trainer.

    val_split: the last part of the rows, held out (default config.val_split); it is taken whole, since neighbouring
    tokens of a text are too alike to validate on. targets (tokens, D_out): what a transcoder predicts.
    """
    shape = tuple(activations.shape)
    require(len(shape) == 2 and len(activations) > 1, f"activations have shape {shape}; {WANTED}")
    together = "transcode and targets go together: a transcoder predicts targets (tokens, D_out)"
    require(config.transcode == (targets is not None), together)
    if targets is not None:
        fits, given = targets.ndim == 2 and len(targets) == len(activations), tuple(targets.shape)
        require(fits, f"targets have shape {given}; ({len(activations)}, D_out) was wanted")
    acts = {"": activations} if targets is None else {input_of(""): activations, "": targets}
    config = replace(config, d_in=config.d_in or activations.shape[1], d_out=config.d_out or acts[""].shape[1])
    share = config.val_split if val_split is None else val_split
    n_val = int(len(activations) * share)
    cut = len(activations) - n_val
    train = {name: x[:cut] for name, x in acts.items()}
    held_out = {name: x[cut:] for name, x in acts.items()} if n_val > 1 else None
    trainer = SAETrainer(create_sae(config), config, train, held_out, device, save_dir, overwrite=overwrite)
    trainer.train(verbose=verbose)
    return trainer.sae, trainer
