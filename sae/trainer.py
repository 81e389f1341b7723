"""SAETrainer: one loop that reads top to bottom, and the state that a checkpoint needs.

Activations come from a Stream (or a tensor), SAEs learn side by side (learner.py), results go to a run directory. Knows
nothing of language models or text.

Letters: B tokens in a batch, D width, F latents.
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae import checkpoint, files, log
from sae import config as cfg
from sae import schedules as sched
from sae.checkpoint import checkpoints
from sae.config import VERSION, SAEConfig, UserError
from sae.data.activations import ModelSource, Stream, TensorSource
from sae.distributed import ALONE, World
from sae.formats import store
from sae.hooks import Acts
from sae.kernels import sparse
from sae.learner import Learner
from sae.log import Stopwatch
from sae.metrics import check_finite
from sae.models import SAE, create_sae

CHECK_EVERY = 100  # steps between looks whether replicas are still equal


class Batches(Protocol):
    """What activations come in: activations.Stream, or end_to_end.RowStream."""

    source: Any
    batch_size: int
    n_batches: int
    n_tokens: int
    n_given: int
    n_passes: int

    @property
    def n_sample(self) -> int | None: ...
    def sample(self) -> Acts: ...
    def __next__(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def held_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], held: Sequence[dict[str, Any]]) -> None: ...


class Objective(Protocol):
    """A loss that is not a sum over SAEs (end_to_end.py): adds the gradients of a step for all learners at once."""

    def learn(self, batch: Any, learners: Mapping[str, Learner], step: int) -> None: ...
    def validate(self, learners: Mapping[str, Learner]) -> float: ...


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
        configs: Mapping[str, SAEConfig] | None = None, pretrained: bool = False, objective: Objective | None = None,
        wandb: dict[str, Any] | None = None, world: World = ALONE,
    ):  # fmt: skip
        saes: Mapping[str, SAE | None] = {"": sae} if isinstance(sae, SAE) else sae
        if isinstance(val_activations, Tensor):
            val_activations = {name.split("/")[0]: val_activations for name in saes}
        self.val = {k: v.to(device) for k, v in (val_activations or {}).items()}
        self.config, self.metadata, self.overwrite = config, metadata or {}, overwrite
        self.pretrained, self.objective, self.wandb = pretrained, objective, wandb
        self.world, self.names = world, list(saes)
        self.save_dir = Path(save_dir) if save_dir is not None else None
        self.device = torch.device(device)
        self._activations = {"": activations} if isinstance(activations, Tensor) else activations
        self.stream = self._stream(config.num_epochs)
        self.learners = {
            name: Learner(
                one, (configs or {}).get(name, config), self.stream.n_batches, self.device, name.split("/")[0]
            )
            for name, one in saes.items()
            if one is not None
        }
        for learner in self.learners.values():
            widths, one = self.stream.source.widths, learner.sae
            given = (widths[learner.reads], widths[learner.hookpoint])
            if given != (one.d_in, one.d_out):
                raise UserError(
                    f"activations are {given[0]} wide and the SAE reads {one.d_in}; set d_in={given[0]}"
                    + (f" and d_out={given[1]}" if one.config.transcode else "")
                )
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

    def _stream(self, n_epochs: int) -> Batches:
        """The stream given, or one over the tensors given."""
        acts, c = self._activations, self.config
        if not isinstance(acts, dict):
            return acts
        for x in acts.values():
            if x.ndim != 2 or len(x) == 0:
                raise UserError(f"activations have shape {tuple(x.shape)}; a matrix (tokens, width) was wanted")
        check_finite(acts)
        n = len(next(iter(acts.values())))
        size = min(sched.tokens_per_step(c), n)
        return Stream(
            TensorSource(acts, seed=shuffle_seed(c)), n_tokens=n * n_epochs, batch_size=size, buffer_tokens=2 * size,
            seed=shuffle_seed(c), device=self.device, world=self.world,
        )  # fmt: skip

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
        if self.step or not isinstance(self._activations, dict):
            raise UserError(
                f"num_epochs={n}, but this run has {self.config.num_epochs} and "
                + ("has begun; make a new trainer" if self.step else "trains on a stream, whose length is its own")
            )
        self.config = replace(self.config, num_epochs=n)
        self.stream = self._stream(n)
        for name, x in self.learners.items():
            config = replace(x.config, num_epochs=n)
            self.learners[name] = Learner(x.sae, config, self.stream.n_batches, self.device, x.hookpoint)

    def _pace(self, n_tokens: int, seconds: float) -> str:
        """How quick a run was, and how near to what it cannot do without: the forwards and the steps alone, one after
        the other on one device, side by side on two."""
        steps, forwards = self.watch.seconds(), 0.0
        source = self.stream.source
        if isinstance(source, ModelSource):
            forwards = source.watch.seconds()
        apart = isinstance(source, ModelSource) and source.lm.device != self.device
        share = (max(steps, forwards) if apart else steps + forwards) / seconds
        parts = f"forwards {forwards:.1f} s, steps" if forwards else "steps"
        rate = f"{n_tokens / seconds:,.0f} tokens/s, {share:.0%} of the bound"
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
        for name, learner in self.learners.items():
            metrics = learner.read_window()
            found[name] = {
                "lr": sched.lr_at(self.step - 1, learner.config, learner.n_steps),
                "k": sched.k_at(self.step - 1, learner.config), **metrics,
            }  # fmt: skip
        found = self._of_all(found)
        for name, metrics in found.items():
            metric_log.write({
                "step": self.step, "tokens": self.stream.n_given, **({"hookpoint": name} if name else {}),
                **metrics, "n_passes": self.stream.n_passes, "tokens_per_s": rate,
            })  # fmt: skip
            self.last[name] = {key: value for key, value in metrics.items() if key not in ("lr", "k")}
        self.train_losses.append(self.last[self.names[-1]])
        return self.train_losses[-1]

    def _of_all(self, found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Metrics of this process's SAEs -> those of all, in the order of the run's SAEs."""
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
                if learner.config.save_best:
                    self._save_best(name, learner)
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
        if self.save_dir is not None and not self.overwrite and self.world.everyone.rank == 0:
            refuse_existing(self.save_dir)
        sample, n_tokens = self.stream.sample(), self.stream.n_sample
        for learner in self.learners.values():
            learner.start_from(sample, self.pretrained, n_tokens)
        if self.save_dir is None:
            return
        settings = self.describe()
        if self.world.everyone.rank == 0:
            if self.overwrite:
                remove_run(self.save_dir)
            files.write_json(settings, self.save_dir / "config.json")
        self.world.everyone.barrier()

    def describe(self) -> dict[str, Any]:
        """config.json: settings as given, the values derived from them, and what the run ran on."""
        derived = {
            name: {
                "learning_rate": sched.peak_lr(x.config), "dead_after_tokens": x.firing.dead_after,
                "target_l0": sched.target_l0(x.config), "d_in": x.sae.d_in, "d_sae": x.sae.d_sae,
            }
            for name, x in self.learners.items()
        }  # fmt: skip
        derived = self._of_all(derived)  # type: ignore[assignment, arg-type]
        each = {key: [one[key] for one in derived.values()] for key in derived[self.names[0]]}
        return {
            "config": self.config.to_dict(),
            "resolved": {
                "n_steps": self.stream.n_batches,
                "n_tokens": self.stream.n_tokens,
                "warmup_steps": sched.warmup_steps(self.config, self.stream.n_batches),
                **each,
                "hookpoints": self.names,
            },
            "metadata": self.metadata,
            "versions": {"nanosae": VERSION, "torch": torch.__version__, "python": platform.python_version()},
            "device": str(self.device),
            "world": dict(zip(("modules", "data", "latents"), self.world.shape, strict=True)),
            "threads": torch.get_num_threads(),
            "git_commit": git_commit(),
            "argv": sys.argv,
        }

    def save(self) -> Path:
        """Write checkpoint_step{N}.pt (all that resume needs) and the SAEs; keep the newest checkpoints only."""
        assert self.save_dir is not None, "there is no save_dir"
        path = self.save_dir / f"checkpoint_step{self.step}.pt"
        state = {
            "step": self.step, "epoch": self.epoch, "config": self.config.to_dict(), "names": self.names,
            "stream": self.stream.state_dict(), "metadata": self.metadata,
        }  # fmt: skip
        first = self.world.data.rank == 0  # what replicas have alike, the first one writes
        saes = {name: learner.state_dict() for name, learner in self.learners.items()}
        own = {name: [x.sae.own.start, x.sae.own.stop] for name, x in self.learners.items()}
        part = {"saes": saes if first else {}, "own": own, "held": self.stream.held_dict()}
        for name, learner in self.learners.items() if first else ():
            hookpoint = learner.hookpoint or self.config.hook_point
            store.save_sae(learner.finished(), self.folder(name), hookpoint=hookpoint, **self.metadata)
        checkpoint.write(path, state, part, self.world.everyone)
        return path

    def _save_best(self, name: str, learner: Learner) -> None:
        if self.save_dir is None or self.world.data.rank > 0:
            return
        sae, path = learner.finished(), self.folder(name) / "best_model.pt"
        weights = {**sae.state_dict(), "feature_counts": learner.firing.feature_counts.cpu()}
        if self.world.latents.size > 1:  # put together on disk, since one process may not hold all
            file = path.with_suffix(".safetensors")
            store.write_shards(weights, sae, file)
            if self.world.latents.rank > 0:
                return
            weights = files.read_safetensors(file)
            file.unlink()
        counts = weights.pop("feature_counts")
        best = {
            "step": self.step, "epoch": self.epoch, "sae_state_dict": weights, "config": sae.config.to_dict(),
            "feature_counts": counts, "best_val_loss": learner.best_val_loss,
        }  # fmt: skip
        files.write_torch(best, path)

    def load_checkpoint(self, path: str | Path | None = None) -> None:
        """Go on from a checkpoint, by default the newest whole one of save_dir, to the bit.

        Raises UserError if there is none, if it is damaged, or if it belongs to other settings.
        """
        if path is None:
            path, state, parts = checkpoint.newest_whole(self.save_dir)
        else:
            state, parts = checkpoint.read(path)
        _refuse_other_settings(state["config"], self.config.to_dict(), path)
        then, now = (m.get("provenance") or {} for m in (state.get("metadata", {}), self.metadata))
        for key in then.keys() & now.keys():
            if then[key] != now[key]:
                raise UserError(f"'{path}' was trained on other data: {key} has changed since; start a new run")
        if set(state["names"]) != set(self.names):
            raise UserError(f"'{path}' holds {', '.join(state['names'])}; this run trains {', '.join(self.names)}")
        for name, learner in self.learners.items():
            learner.load_state_dict(copy.deepcopy(checkpoint.joined(parts, name, learner.sae.own)))
        self.stream.load_state_dict(state["stream"], [part["held"] for part in parts])
        self.step = state["step"]
        steps = self.world.everyone.objects(self.step)
        if len(set(steps)) > 1:
            raise UserError(
                f"the processes found checkpoints of steps {steps}; give them the same folder, then --resume"
            )


RUN_FILES = (
    "config.json", "metrics.jsonl", "checkpoint_step*.pt", "best_model.pt", "eval.json", "final_assessment.json",
    "wandb_run_id", store.CFG, store.WEIGHTS,
)  # fmt: skip
# What may differ between the two halves of a resumed run.
FREE_SETTINGS = {
    "resume", "overwrite", "device", "model_device", "save_dir", "run_name", "save_every", "log_every", "log_to_wandb",
    "wandb_project", "assess", "distribute_modules", "shard_latents", "plan",
}  # fmt: skip


def refuse_existing(save_dir: Path) -> None:
    """Raise UserError if the folder holds a run."""
    if (save_dir / "config.json").exists() or checkpoints(save_dir) or (save_dir / store.CFG).exists():
        saved = checkpoints(save_dir) or any(save_dir.rglob(store.CFG))  # of several SAEs, each in its folder
        then = "give --resume, --overwrite" if saved else "it has no checkpoint to resume from yet; give --overwrite"
        raise UserError(
            f"'{save_dir}' holds a run already; {then} or another --run_name (from Python: overwrite=True or another "
            "save_dir)"
        )


def remove_run(save_dir: Path) -> None:
    """Delete a run's own files from its folder and its hookpoints' folders, and nothing else there."""
    names: list[str] = []
    if (save_dir / "config.json").is_file():
        settings = cfg.read_json(save_dir / "config.json")
        resolved = settings.get("resolved", {}) if isinstance(settings, dict) else {}
        names = [n for n in resolved.get("hookpoints", []) if isinstance(n, str)] if isinstance(resolved, dict) else []
    inside = [save_dir / str(name) for name in names if name and not name.startswith("/") and ".." not in name]
    for folder in (save_dir, *inside):
        for old in [p for pattern in RUN_FILES for p in folder.glob(pattern)]:
            old.unlink(missing_ok=True)
        for made in ("features", "plots"):
            shutil.rmtree(folder / made, ignore_errors=True)


def _refuse_other_settings(then: dict[str, Any], now: dict[str, Any], path: str | Path) -> None:
    for name in sorted(now.keys() - FREE_SETTINGS):
        before, asked = then.get(name), json.loads(json.dumps(now[name]))
        before = list(before) if isinstance(before, tuple) else before
        if before != asked:
            before = "(none given)" if before is None else before
            raise UserError(
                f"'{path}' was trained with {name}={before} and {asked} is asked now; use the same settings, or "
                "train on from its weights: --finetune"
            )


def shuffle_seed(c: SAEConfig) -> int:
    """Seed of shuffling: one for all SAEs of a run."""
    return c.shuffle_seed if c.shuffle_seed is not None else c.seed


def git_commit() -> str | None:
    """The commit this code is at, or None outside a checkout."""
    try:
        got = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return got.stdout.strip() or None


def train_sae_from_activations(
    activations: Tensor, config: SAEConfig, val_split: float | None = None, device: str | torch.device = "cpu",
    save_dir: str | Path | None = None, verbose: bool = True, *, targets: Tensor | None = None, overwrite: bool = False,
) -> tuple[SAE, SAETrainer]:  # fmt: skip
    """Train an SAE on activations (tokens, D) and return it, for raw activations, with its trainer.

    val_split: the last part of the rows, held out (default config.val_split); it is taken whole, since neighbouring
    tokens of a text are too alike to validate on. targets (tokens, D_out): what a transcoder predicts.
    """
    if activations.ndim != 2 or len(activations) < 2:
        raise UserError(f"activations have shape {tuple(activations.shape)}; a matrix (tokens, width) was wanted")
    if config.transcode != (targets is not None):
        raise UserError("transcode and targets go together: a transcoder predicts targets (tokens, D_out)")
    if targets is not None and (targets.ndim != 2 or len(targets) != len(activations)):
        raise UserError(f"targets have shape {tuple(targets.shape)}; ({len(activations)}, D_out) was wanted")
    acts = {"": activations} if targets is None else {"@in": activations, "": targets}
    config = replace(config, d_in=config.d_in or activations.shape[1], d_out=config.d_out or acts[""].shape[1])
    share = config.val_split if val_split is None else val_split
    n_val = int(len(activations) * share)
    cut = len(activations) - n_val
    held_out = {name: x[cut:] for name, x in acts.items()} if n_val > 1 else None
    trainer = SAETrainer(
        create_sae(config), config, {name: x[:cut] for name, x in acts.items()}, held_out, device, save_dir,
        overwrite=overwrite,
    )  # fmt: skip
    trainer.train(verbose=verbose)
    return trainer.sae, trainer
