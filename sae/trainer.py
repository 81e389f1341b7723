"""SAETrainer: one loop that reads top to bottom, and the state that a checkpoint needs.

Activations come from a Stream (or a tensor), one SAE learns per hookpoint, results go to a run directory. Knows
nothing of language models or text.

Letters: B tokens in a batch, D width, F latents.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import config as cfg
from sae import formats, log
from sae import schedules as sched
from sae.activations import Acts, Stream, TensorSource, check_finite
from sae.config import VERSION, SAEConfig, UserError
from sae.evaluator import Totals, reconstruct
from sae.models import SAE, create_sae

KEPT_CHECKPOINTS = 2


class Learner:
    """One SAE being trained: its optimiser, its dead counts, and the scale its activations are brought to.

    Activations are multiplied by `scale` so that their variance is 1 per dimension: one step size and one sparsity
    weight then serve models whose streams differ a hundredfold. It is folded away in everything that is saved.
    """

    def __init__(self, sae: SAE, config: SAEConfig, n_steps: int, device: torch.device):
        self.sae = sae.to(device)
        self.config = config
        self.n_steps = n_steps
        # the implementation with one pass over memory, where torch has it
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=sched.peak_lr(self.config), fused=fused)
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.feature_counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.scale = 1.0
        self.n_dead = 0  # as last read by the log: AuxK is computed only where something was dead
        self.best_val_loss = math.inf
        self.new_window()

    @property
    def dead_after(self) -> int:
        """Tokens without firing until a latent is dead."""
        return sched.dead_after_tokens(self.config, self.n_steps * self.config.batch_size)

    def new_window(self) -> None:
        """Start the sums that the next line of the log averages over."""
        device = self.tokens_since_fired.device
        self.totals = Totals(self.sae.d_in, self.sae.d_sae, device=device)
        self.sums = {name: torch.zeros((), device=device) for name in ("loss", "sparsity", "aux", "grad_norm")}
        self.n_sums = 0

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Before the first step: b_dec at the mean of x (M, D), and the scale that makes its variance D."""
        check_finite({self.config.hook_point or "the hookpoint": x})
        wide = (x.cpu() if x.device.type == "mps" else x).double()  # no float64 on mps
        mean = wide.mean(0)
        variance = float((wide - mean).square().sum(-1).mean())
        if not variance > 0:
            raise UserError("the activations are all equal, so there is nothing to learn; choose another hookpoint")
        self.scale = math.sqrt(self.sae.d_in / variance)
        self.sae.b_dec.copy_(mean * self.scale)

    def step(self, x: Tensor, step: int) -> None:
        """One optimiser step on raw activations x (B, D). Reads nothing back from the device."""
        c, sae = self.config, self.sae
        x = x * self.scale
        dead = self.tokens_since_fired > self.dead_after if self.n_dead and sae.uses_auxk else None
        sparsity = (c.l1_coefficient or 0.1) * sched.sparsity_at(step, c, self.n_steps)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            out = sae(x)
            losses = sae.loss(x, out, variance=sae.d_in, sparsity=sparsity, dead=dead, n_dead=self.n_dead)
        losses.total.backward()
        sae.project_gradient_()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), c.clip_norm if c.clip_norm is not None else math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = sched.lr_at(step, c, self.n_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sae.renormalize_()

        # bookkeeping, the only state that moves outside the parameters
        with torch.no_grad():
            fired = out.codes.fired(sae.d_sae)
            self.tokens_since_fired += len(x)
            self.tokens_since_fired.masked_fill_(fired > 0, 0)
            self.feature_counts += fired
            self.totals.add(x, out.x_hat, out.codes)
            for name, value in zip(self.sums, (losses.total, losses.sparsity, losses.aux, norm), strict=True):
                self.sums[name] += value.detach()
            self.n_sums += 1

    def read_window(self) -> dict[str, float]:
        """Averages over the steps since the last call (reads the device), and a new window."""
        metrics = {name: float(value) / max(1, self.n_sums) for name, value in self.sums.items()}
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                "the loss became NaN or infinite; the activations may hold NaN, or --learning_rate is too high "
                f"(it was {sched.peak_lr(self.config):g})"
            )
        self.n_dead = int((self.tokens_since_fired > self.dead_after).sum())
        window = self.totals.metrics()
        metrics |= {name: window[name] for name in ("fvu", "explained_variance", "l0", "cosine")}
        metrics["mse"] = window["mse"] / self.scale**2
        metrics["dead_fraction"] = self.n_dead / self.sae.d_sae
        self.new_window()
        return metrics

    @torch.no_grad()
    def validate(self, x: Tensor) -> dict[str, float]:
        """Metrics on held-out raw activations x (n, D); changes nothing."""
        totals = Totals(self.sae.d_in, self.sae.d_sae, device=self.tokens_since_fired.device)
        loss = 0.0
        sparsity = (self.config.l1_coefficient or 0.1) * sched.sparsity_at(self.n_steps, self.config, self.n_steps)
        for rows, out in reconstruct(self.sae, x, scale=self.scale):
            totals.add(rows, out.x_hat, out.codes)
            loss += float(self.sae.loss(rows, out, variance=self.sae.d_in, sparsity=sparsity).total) * len(rows)
        metrics = totals.metrics()
        metrics["mse"] /= self.scale**2
        return {
            "total_loss": loss / len(x), "mse_loss": metrics["mse"], "l0": metrics["l0"],
            "fvu": metrics["fvu"], "explained_variance": metrics["explained_variance"],
            "dead_fraction": metrics["dead_fraction"],
        }  # fmt: skip

    def finished(self) -> SAE:
        """The SAE for raw activations."""
        return self.sae.scaled(self.scale)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sae_state_dict": self.sae.state_dict(), "optimizer_state_dict": self.optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired, "feature_counts": self.feature_counts,
            "scale": self.scale, "n_dead": self.n_dead, "best_val_loss": self.best_val_loss,
            "window": {"totals": self.totals.state_dict(), "sums": self.sums, "n_sums": self.n_sums},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae_state_dict"])
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.feature_counts.copy_(state["feature_counts"])
        self.scale, self.n_dead, self.best_val_loss = state["scale"], state["n_dead"], state["best_val_loss"]
        self.totals.load_state_dict(state["window"]["totals"])
        self.sums, self.n_sums = state["window"]["sums"], state["window"]["n_sums"]


class SAETrainer:
    """Trains one SAE (or one per hookpoint) on activations.

    sae: an SAE, or {hookpoint: SAE}. activations: a Stream, or a tensor (tokens, D). val_activations: (tokens, D), or
    {hookpoint: (tokens, D)}. save_dir: the run directory, or None to write nothing. metadata goes into cfg.json.
    Raises UserError for widths that do not fit, NaN activations, and a save_dir that holds a run already.
    """

    def __init__(
        self, sae: SAE | dict[str, SAE], config: SAEConfig, activations: Tensor | Stream,
        val_activations: Tensor | Acts | None = None, device: str | torch.device = "cpu",
        save_dir: str | Path | None = None, *, metadata: dict[str, Any] | None = None, overwrite: bool = False,
    ):  # fmt: skip
        saes = {"": sae} if isinstance(sae, SAE) else sae
        if isinstance(val_activations, Tensor):
            val_activations = dict.fromkeys(saes, val_activations)
        self.val = {k: v.to(device) for k, v in (val_activations or {}).items()}
        self.config, self.metadata, self.overwrite = config, metadata or {}, overwrite
        self.save_dir = Path(save_dir) if save_dir is not None else None
        self.device = torch.device(device)
        for name, one in saes.items():
            given = self._width(activations, name)
            if given != one.d_in:
                raise UserError(f"activations are {given} wide and the SAE reads {one.d_in}; set d_in={given}")
        self._activations = activations
        self.stream = activations if isinstance(activations, Stream) else self._stream(config.num_epochs)
        self.learners = {
            name: Learner(one, replace(config, d_in=one.d_in, d_sae=one.d_sae), self.stream.n_batches, self.device)
            for name, one in saes.items()
        }
        self.step = 0
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

    @staticmethod
    def _width(activations: Tensor | Stream, name: str) -> int:
        if isinstance(activations, Stream):
            return activations.source.widths[name]
        if activations.ndim != 2 or len(activations) == 0:
            raise UserError(f"activations have shape {tuple(activations.shape)}; a matrix (tokens, width) was wanted")
        return activations.shape[1]

    def _stream(self, n_epochs: int) -> Stream:
        assert isinstance(self._activations, Tensor)
        c, n = self.config, len(self._activations)
        check_finite({"activations": self._activations})
        return Stream(
            TensorSource({"": self._activations}, seed=c.seed), n_tokens=n * n_epochs, batch_size=min(c.batch_size, n),
            buffer_tokens=2 * min(c.batch_size, n), seed=c.seed, device=self.device,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------
    # the loop

    def train(self, num_epochs: int | None = None, verbose: bool = True) -> dict[str, float]:
        """Train to the end of the stream and return the last validation (or the last logged) metrics.

        num_epochs: passes over a tensor of activations, instead of the config's.
        """
        if num_epochs is not None and self.step == 0 and not isinstance(self._activations, Stream):
            self.stream = self._stream(num_epochs)
            for learner in self.learners.values():
                learner.n_steps = self.stream.n_batches
        c, n_steps = self.config, self.stream.n_batches
        if self.step == 0:
            if self.save_dir is not None and not self.overwrite:
                refuse_existing(self.save_dir)
            for name, x in self.stream.sample().items():
                self.learners[name].start_from(x)
            self._begin_run()
        metric_log = log.MetricLog(self.save_dir and self.save_dir / "metrics.jsonl", resume_step=self.step)
        total = n_steps * self.stream.batch_size
        bar = log.progress(total, "training", initial=self.stream.n_given, quiet=not verbose)
        last: dict[str, float] = {}
        clock, clock_step = time.perf_counter(), self.step

        while self.step < n_steps:
            batch = next(self.stream)
            for name, learner in self.learners.items():
                learner.step(batch[name], self.step)
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

            # ---------------------------------------------------------------- validate, save
            if self.val and (self.step % c.eval_every == 0 or done):
                last = self._validate(metric_log)
            if self.save_dir is not None and (self.step % c.save_every == 0 or done):
                self.save()
        bar.close()
        return last

    def _log(self, metric_log: log.MetricLog, rate: float) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, learner in self.learners.items():
            metrics = learner.read_window()
            record = {
                "step": self.step, "tokens": self.stream.n_given, **({"hookpoint": name} if name else {}),
                "lr": sched.lr_at(self.step - 1, learner.config, learner.n_steps),
                "l1": (learner.config.l1_coefficient or 0.1) * sched.sparsity_at(self.step - 1, learner.config, learner.n_steps),
                **metrics, "n_passes": self.stream.n_passes, "tokens_per_s": rate,
            }  # fmt: skip
            metric_log.write(record)
        self.train_losses.append(metrics)
        return metrics

    def _validate(self, metric_log: log.MetricLog) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, learner in self.learners.items():
            metrics = learner.validate(self.val[name])
            named = {"hookpoint": name} if name else {}
            metric_log.write({"step": self.step, **named, **{f"val_{k}": v for k, v in metrics.items()}})
            if metrics["total_loss"] < learner.best_val_loss:
                learner.best_val_loss = metrics["total_loss"]
                self._save_best(name, learner)
        self.val_losses.append(metrics)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Metrics of the (first) SAE on the validation activations; {} without any. Changes no state."""
        for name, learner in self.learners.items():
            if name in self.val:
                return learner.validate(self.val[name])
        return {}

    # ----------------------------------------------------------------------------------------------
    # files

    def folder(self, name: str) -> Path:
        """Where an SAE's own files go: the run directory, or a folder in it when the run has several SAEs."""
        assert self.save_dir is not None
        return self.save_dir if len(self.learners) == 1 else self.save_dir / name

    def _begin_run(self) -> None:
        """Write what this run is, in the place of an old one if that is wanted."""
        if self.save_dir is None:
            return
        if self.overwrite:
            remove_run(self.save_dir)
        formats.write_json(self.describe(), self.save_dir / "config.json")

    def describe(self) -> dict[str, Any]:
        """config.json: settings as given, the values derived from them, and what the run ran on."""
        learners = self.learners.values()
        return {
            "config": self.config.to_dict(),
            "resolved": {
                "n_steps": self.stream.n_batches,
                "n_tokens": self.stream.n_tokens,
                "learning_rate": [sched.peak_lr(x.config) for x in learners],
                "warmup_steps": sched.warmup_steps(self.config, self.stream.n_batches),
                "dead_after_tokens": [x.dead_after for x in learners],
                "l1_coefficient": (self.config.l1_coefficient or 0.1) * sched.sparsity_at(self.stream.n_batches, self.config, self.stream.n_batches),
                "d_in": [x.sae.d_in for x in learners],
                "d_sae": [x.sae.d_sae for x in learners],
                "hookpoints": list(self.learners),
            },
            "metadata": self.metadata,
            "versions": {"nanosae": VERSION, "torch": torch.__version__, "python": platform.python_version()},
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "git_commit": git_commit(),
            "argv": sys.argv,
        }

    def save(self) -> Path:
        """Write checkpoint_step{N}.pt (all that resume needs) and the SAEs; keep the newest checkpoints only."""
        assert self.save_dir is not None, "there is no save_dir"
        path = self.save_dir / f"checkpoint_step{self.step}.pt"
        state = {
            "step": self.step, "epoch": self.epoch, "config": self.config.to_dict(), "stream": self.stream.state_dict(),
            "metadata": self.metadata,
            "saes": {name: learner.state_dict() for name, learner in self.learners.items()},
        }  # fmt: skip
        for name, learner in self.learners.items():
            hookpoint = name or self.config.hook_point
            formats.save_sae(learner.finished(), self.folder(name), hookpoint=hookpoint, **self.metadata)
        formats.write_torch(state, path)
        for old in checkpoints(self.save_dir)[:-KEPT_CHECKPOINTS]:
            old.unlink(missing_ok=True)
        return path

    def _save_best(self, name: str, learner: Learner) -> None:
        if self.save_dir is None:
            return
        sae = learner.finished()
        best = {
            "step": self.step, "epoch": self.epoch, "sae_state_dict": sae.state_dict(), "config": sae.config.to_dict(),
            "feature_counts": learner.feature_counts.cpu(), "best_val_loss": learner.best_val_loss,
        }  # fmt: skip
        formats.write_torch(best, self.folder(name) / "best_model.pt")

    def load_checkpoint(self, path: str | Path | None = None) -> None:
        """Go on from a checkpoint, by default the newest whole one of save_dir, to the bit.

        Raises UserError if there is none, if it is damaged, or if it belongs to other settings.
        """
        if path is None:
            found = checkpoints(self.save_dir) if self.save_dir else []
            if not found:
                raise UserError(f"'{self.save_dir}' holds no checkpoint to resume from; start without --resume")
            path, state = _newest_whole(found)
        else:
            state = formats.read_torch(path)
        if not isinstance(state, dict) or not {"step", "saes", "stream", "config"} <= state.keys():
            raise UserError(f"'{path}' is no training checkpoint; give a checkpoint_step*.pt")
        _refuse_other_settings(state["config"], self.config.to_dict(), path)
        then, now = (m.get("provenance") or {} for m in (state.get("metadata", {}), self.metadata))
        for key in then.keys() & now.keys():
            if then[key] != now[key]:
                raise UserError(f"'{path}' was trained on other data: {key} has changed since; start a new run")
        if state["saes"].keys() != self.learners.keys():
            raise UserError(f"'{path}' holds {', '.join(state['saes'])}; this run trains {', '.join(self.learners)}")
        for name, learner in self.learners.items():
            learner.load_state_dict(copy.deepcopy(state["saes"][name]))
        self.stream.load_state_dict(state["stream"])
        self.step = state["step"]


RUN_FILES = (
    "config.json",
    "metrics.jsonl",
    "checkpoint_step*.pt",
    "best_model.pt",
    "eval.json",
    formats.CFG,
    formats.WEIGHTS,
)
# What may differ between the two halves of a resumed run.
FREE_SETTINGS = {"resume", "overwrite", "device", "save_dir", "save_every"}


def checkpoints(save_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in save_dir.glob("checkpoint_step*.pt") if p.stem[len("checkpoint_step") :].isdigit()]
    return sorted(found, key=lambda p: int(p.stem[len("checkpoint_step") :]))


def _newest_whole(found: list[Path]) -> tuple[Path, Any]:
    """The newest checkpoint that can be read, and what it holds."""
    for path in reversed(found):
        try:
            return path, formats.read_torch(path)
        except UserError as e:
            if path == found[0]:
                raise
            log.say(f"{e}; going back to the one before")
    raise AssertionError("checkpoints() gave none")


def refuse_existing(save_dir: Path) -> None:
    """Raise UserError if the folder holds a run."""
    if (save_dir / "config.json").exists() or checkpoints(save_dir) or (save_dir / formats.CFG).exists():
        raise UserError(f"'{save_dir}' holds a run already; give --resume, --overwrite or another --run_name")


def remove_run(save_dir: Path) -> None:
    """Delete a run's own files from its folder and its hookpoints' folders, and nothing else there."""
    names: list[Any] = []
    if (save_dir / "config.json").is_file():
        settings = cfg.read_json(save_dir / "config.json")
        resolved = settings.get("resolved", {}) if isinstance(settings, dict) else {}
        names = resolved.get("hookpoints", []) if isinstance(resolved, dict) else []
    inside = [save_dir / str(name) for name in names if name and "/" not in str(name) and ".." not in str(name)]
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
            raise UserError(
                f"'{path}' was trained with {name}={before} and {asked} is asked now; use the same settings"
            )


def git_commit() -> str | None:
    """The commit this code is at, or None outside a checkout."""
    try:
        got = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return got.stdout.strip() or None


def train_sae_from_activations(
    activations: Tensor, config: SAEConfig, val_split: float | None = None, device: str | torch.device = "cpu",
    save_dir: str | Path | None = None, verbose: bool = True, *, overwrite: bool = False,
) -> tuple[SAE, SAETrainer]:  # fmt: skip
    """Train an SAE on activations (tokens, D) and return it, for raw activations, with its trainer.

    val_split: the last part of the rows, held out (default config.val_split); it is taken whole, since neighbouring
    tokens of a text are too alike to validate on.
    """
    if activations.ndim != 2 or len(activations) < 2:
        raise UserError(f"activations have shape {tuple(activations.shape)}; a matrix (tokens, width) was wanted")
    config = replace(config, d_in=config.d_in or activations.shape[1])
    share = config.val_split if val_split is None else val_split
    n_val = int(len(activations) * share)
    cut = len(activations) - n_val
    trainer = SAETrainer(
        create_sae(config), config, activations[:cut], activations[cut:] if n_val > 1 else None, device, save_dir,
        overwrite=overwrite,
    )  # fmt: skip
    trainer.train(verbose=verbose)
    return trainer.sae, trainer
