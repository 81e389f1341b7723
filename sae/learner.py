"""One SAE being trained: the scale its activations are brought to, the gradients of a step, and the update.

Knows nothing of where activations come from, of files, or of other SAEs.

Letters: B tokens in a batch, D width, F latents.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae import schedules as sched
from sae.base import SAE, SHARED, Losses, Output, layer_norm, reconstruct
from sae.config import SAEConfig, UserError, kind_of, require
from sae.dead import Firing, Spare, add_gradients_, auxk_loss, copies_of, resample_
from sae.distributed import ALONE, Axis
from sae.hookpoints import places
from sae.hooks import Acts
from sae.kernels import sparse
from sae.metrics import Totals, Window, check_finite
from sae.optim import Optimizer, grad_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIST_EVERY = 10  # steps between looks at which latents are dead: they read the device


class Terms(NamedTuple):
    """The inputs of a step's loss besides tokens: schedules' values, and statistics of the whole batch."""

    k: int
    p: float
    sparsity: Tensor
    variance: Tensor
    dead: Tensor | None
    spare: Spare | None
    residual: Tensor | None
    whole: Tensor | None


class StepCounts:
    """Sums over the parts of one step."""

    def __init__(self, n_latents: int, device: torch.device):
        self.fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.l0 = torch.zeros((), device=device)
        self.error = torch.zeros((), device=device)
        self.n_tokens = 0


class Learner:
    """Trains one SAE, step by step.

    Activations are brought to a common scale (SAEConfig.normalize_activations): one step size and one sparsity weight
    then serve models whose streams differ a hundredfold. The scale is folded away in everything that is saved.
    hookpoint names the activations in a batch; a transcoder reads its module's input (places).

    Several processes train one SAE (sae.world): each learns from its part of a batch, and a step's gradients and counts
    are summed once; along `data` all hold the same weights, along `latents` each its own.
    """

    def __init__(self, sae: SAE, config: SAEConfig, n_steps: int, device: torch.device, hookpoint: str = ""):
        self.sae = sae.to(device).train()
        sae.layer_norm = False
        self.config = replace(config, d_in=sae.d_in, d_sae=sae.d_sae, d_out=sae.d_out)
        self.n_steps, self.device = n_steps, device
        self.reads, self.hookpoint = places(hookpoint, config.transcode)
        self.world = sae.world
        self._check_shards()
        self.optimizer = Optimizer(sae, self.config, n_steps, device)
        self.scaler = torch.amp.GradScaler(device.type) if config.dtype == "float16" else None
        self.scale, self.scale_out = 1.0, 1.0
        self.variance = float(sae.d_out)
        self.firing = Firing(sae, self.config, device)
        self.residual = torch.zeros((), device=device)  # mean squared error of the step before
        weight = config.l1_coefficient if config.l1_coefficient is not None else kind_of(config).l1_start
        self.log_weight = torch.tensor(math.log(max(weight, 1e-12)), device=device)
        self.drift = torch.zeros((), device=device)  # of thresholds, in a step of full size (schedules.steered)
        self.n_updates = 0
        self.best_val_loss = math.inf
        self.pending: tuple[Output, Tensor | None] | None = None
        self.spare: Spare | None = None  # the weights that AuxK teaches in this step
        self.counts = StepCounts(len(sae.own), device)
        self.window = self._new_window()

    def _new_window(self) -> Window:
        return Window(self.sae.d_out, self.sae.d_sae, self.device, self.world)

    def _check_shards(self) -> None:
        """Raise UserError for settings that a part of the latents alone cannot have."""
        n, c = self.world.latents.size, self.config
        whole = c.optimizer in ("muon", "adam8bit")
        require(n == 1 or not whole, f"--optimizer {c.optimizer} needs whole matrices; with --shard_latents use adam")
        require(n == 1 or c.dtype != "float16", "--dtype float16 does not go with --shard_latents; use bfloat16")

    # ----------------------------------------------------------------------------------------------
    # scale

    @torch.no_grad()
    def start_from(self, acts: Acts, pretrained: bool = False, n_tokens: int | None = None) -> None:
        """Before the first step: the scale, and an SAE's start (biases, thresholds), from a sample of data.

        pretrained: the SAE holds weights for raw activations; they are brought to this scale and kept. n_tokens: of the
        whole sample, of which n processes along `data` have every n-th token each.
        """
        x, y = acts[self.reads], acts[self.hookpoint]
        check_finite({self.reads or "the hookpoint": x, self.hookpoint or "the target": y})
        self.scale = self._scale(x)
        self.scale_out = self._scale(y) if self.config.transcode else self.scale
        if pretrained:
            self.sae.take_(self.sae.scaled(1 / self.scale, 1 / self.scale_out).tensors())
        x, target = self.normalise(x, y)
        self.variance = float(self._variance(target))
        if not pretrained:
            start_from_(self.sae, x, target, n_tokens)
        for tensor in self.sae.tensors().values():
            self.world.data.broadcast_(tensor)

    def _variance(self, x: Tensor) -> Tensor:
        """Mean of |x - mean|^2 over the tokens of all processes."""
        mean = self.world.data.mean
        return mean((x - mean(x)).square().sum(-1))

    def _scale(self, x: Tensor) -> float:
        wide = (x.cpu() if x.device.type == "mps" else x).double()  # no float64 on mps
        variance = float(self._variance(wide))
        if not variance > 0:
            raise UserError("the activations are all equal, so there is nothing to learn; choose another hookpoint")
        how = self.config.normalize_activations
        if how == "unit":
            return math.sqrt(x.shape[1] / variance)
        return math.sqrt(x.shape[1]) / float(self.world.data.mean(wide.norm(dim=1))) if how == "expected_norm" else 1.0

    def normalise(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Raw activations x and targets y as they are trained on; the target of an SAE is its input."""
        if self.config.normalize_activations == "layer_norm":
            x = layer_norm(x)[0]
            return x, x
        inner = x * self.scale
        return inner, y * self.scale_out if self.config.transcode else inner

    # ----------------------------------------------------------------------------------------------
    # a step: learn (gradients), then update

    def learn(self, batch: Acts, step: int, n_tokens: int | None = None) -> None:
        """Add the gradients of a batch of raw activations, in as many parts as the config asks for.

        Reads nothing back from the device. The sum is the whole batch's gradient whatever the number of parts.
        n_tokens: of the whole batch, where other processes have the rest of it.
        """
        x, y = self.normalise(batch[self.reads], batch[self.hookpoint])
        n_parts = self.config.grad_acc_steps * self.config.micro_acc_steps
        xs, ys = x.chunk(n_parts), y.chunk(n_parts)
        n_tokens = n_tokens or len(x)
        terms = self.terms(step, y, list(xs), n_tokens)
        for part, target in zip(xs, ys, strict=True):
            out, losses = self.forward(part, target, terms)
            self.backward(losses.total * (len(part) / n_tokens))
            self.account(target, out, losses, len(part) / n_tokens)
        self.counts.n_tokens = n_tokens
        self.pending = (out, terms.whole)

    def terms(self, step: int, target: Tensor, parts: list[Tensor], n_tokens: int | None = None) -> Terms:
        """The terms of this step's loss; target (B, D_out) is the whole batch's, parts its inputs in pieces.

        n_tokens: of the whole batch, where other processes have the rest of it.
        """
        c, firing = self.config, self.firing
        k = sched.k_at(step, c)
        ramp = sched.sparsity_at(step, c, self.n_steps) if sched.target_l0(c) is None else 1.0
        dead = firing.listed & firing.is_dead() if firing.n_dead and self.sae.uses_auxk and c.auxk_alpha > 0 else None
        self.spare = None
        if dead is not None:
            self.spare = copies_of(self.sae, firing.listed, max(1, firing.n_listed), firing.n_dead)
        fvu = c.loss_fn == "fvu"
        variance = self._batch_variance(target) if fvu else torch.full((), self.variance, device=self.device)
        with self._precision():  # of the parts: rounded otherwise, the least value here may be too small there
            whole = self.sae.survey(parts, k, n_tokens) if len(parts) > 1 or self.world.team.size > 1 else None
        p, sparsity = sched.p_at(step, c, self.n_steps), ramp * self.log_weight.exp()
        residual = torch.where(self.residual > 0, self.residual, 1.0) if self.n_updates else None
        return Terms(k, p, sparsity, variance, dead, self.spare, residual, whole)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES[self.config.dtype], enabled=self.config.dtype != "float32")

    def _batch_variance(self, target: Tensor) -> Tensor:
        """Of the whole batch: the mean of |y - their mean|^2."""
        if self.world.data.size == 1:
            return sparse.variance(target)
        wide = target.double()
        sums = self.world.data.sum_(torch.cat((wide.sum(0), wide.square().sum()[None], wide.new_full((1,), len(wide)))))
        return ((sums[-2] - sums[:-2].square().sum() / sums[-1]) / sums[-1]).clamp(min=0).to(target.dtype)

    def forward(self, x: Tensor, y: Tensor, terms: Terms) -> tuple[Output, Losses]:
        """Output and losses, AuxK's included, for (a part of) a batch of scaled activations and targets."""
        c, sae = self.config, self.sae
        weight = 1.0 if c.loss_fn in ("fvu", "mse") else c.fvu_coefficient
        scheduled: dict[str, Any] = {name: getattr(terms, name) for name in ("variance", "sparsity", "p", "whole")}
        with self._precision():
            out = sae(x, k=terms.k, whole=terms.whole)
            losses = sae.loss(x, out, y=y, recon_weight=weight, **scheduled)
            if terms.dead is not None and terms.spare is not None:
                wrong = (out.x_hat - y).detach()
                aux = auxk_loss(sae, x, wrong, terms.dead, terms.spare, terms.k, terms.residual)
                losses = losses._replace(total=losses.total + c.auxk_alpha * aux, aux=aux)
        return out, losses

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @torch.no_grad()
    def account(
        self, target: Tensor, out: Output, losses: Losses, share: float, objective: Tensor | None = None
    ) -> None:
        """Add (a part of) a step, `share` of its tokens, to the sums for the log and the update."""
        l0, fired = self.window.totals.add(target, out.x_hat, out.codes)
        self.window.add(loss=share * losses.total, sparsity=share * losses.sparsity, aux=share * losses.aux)
        if objective is not None:
            self.window.add(objective=share * objective)
        counts = self.counts
        counts.fired += fired
        counts.l0 += share * l0.float().mean()
        counts.error += share * losses.error
        counts.n_tokens += len(target)

    def update(self, step: int) -> None:
        """One optimiser step on the gradients gathered, and all else that moves once per step."""
        sae = self.sae
        if self.spare is not None:
            add_gradients_(sae, self.spare)
            self.spare = None
        self._reduce()
        norm = self.optimizer.step(sched.lr_at(step, self.config, self.n_steps), self.scaler)
        self.optimizer.zero_grad()
        if self.firing.n_dead:
            sae.revive_(self.firing.is_dead())
        if self.pending is not None:
            sae.observe_(self.pending[0], step, self.pending[1])
        self.pending = None
        with torch.no_grad():
            self.firing.count_(self.counts.fired, self.counts.n_tokens)
            self.residual = self.counts.error
            self.window.add(grad_norm=torch.where(norm.isfinite(), norm, 0.0), penalty_weight=self.log_weight.exp())
            self.window.n_steps += 1
            self._steer(step)
            self.optimizer.average_()
        self.n_updates += 1
        if self.n_updates % LIST_EVERY == 0:
            self.firing.list_()
        self.counts = StepCounts(len(sae.own), self.device)

    def _reduce(self) -> None:
        """Gradients and counts of all processes together: the only sums of a step that grow with the SAE."""
        sae, counts = self.sae, self.counts
        if sae.b_dec.grad is not None:  # each has its share of the decoder's, and its own latents' of x - b_dec
            self.world.latents.sum_(sae.b_dec.grad)
        if self.world.data.size == 1:
            return
        grads = [grad_of(p) for p in sae.parameters()]
        vectors = [g for g in grads if g.ndim == 1]
        # numbers of tokens are whole up to 2^24 in float32
        small = torch.cat((*vectors, counts.fired.float(), torch.stack((counts.l0, counts.error))))
        self.world.data.sum_all_([*(g for g in grads if g.ndim == 2), small])
        *summed, fired, sums = small.split([*(len(g) for g in vectors), len(counts.fired), 2])
        for grad, total in zip(vectors, summed, strict=True):
            grad.copy_(total)
        counts.fired, (counts.l0, counts.error) = fired.round().long(), sums

    def _steer(self, step: int) -> None:
        """Keep L0 where it was asked (schedules.steered)."""
        target = sched.target_l0(self.config)
        if target is None or self.config.jumprelu_penalty == "quadratic":
            return
        error = (self.counts.l0.clamp(min=1e-3).log() - math.log(target)).clamp(-1.0, 1.0)
        share = sched.lr_at(step, self.config, self.n_steps) / sched.peak_lr(self.config)
        rise, self.drift, self.log_weight = sched.steered(error, self.drift, self.log_weight, share)
        self.sae.raise_threshold_(rise)

    def resample(self, acts: Acts, generator: torch.Generator) -> int:
        """Start dead latents anew from raw activations (dead.resample_); returns how many there were."""
        x, y = self.normalise(acts[self.reads], acts[self.hookpoint])
        return resample_(self.sae, self.firing, self.optimizer, x, y, generator)

    # ----------------------------------------------------------------------------------------------
    # read now and then

    def read_window(self) -> dict[str, float]:
        """Averages over the steps since the last call (reads the device), and a new window."""
        metrics = self.window.read()
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                "the loss became NaN or infinite; the activations may hold NaN, or --learning_rate is too high "
                f"(it was {sched.peak_lr(self.config):g})"
            )
        n_dead = sum(self.world.latents.objects(int(self.firing.is_dead().sum())))
        metrics["mse"] /= self.scale_out**2
        metrics["dead_fraction"] = n_dead / self.sae.d_sae
        self.window = self._new_window()
        return metrics

    @torch.no_grad()
    def deployable(self) -> SAE:
        """The SAE to measure and save, at the training scale: with averaged weights where there are such."""
        weights = self.optimizer.weights()
        if weights is None:
            return self.sae
        sae = copy.deepcopy(self.sae)
        for name, p in sae.named_parameters():
            p.copy_(weights[name])
        sae.renormalize_()
        return sae

    @torch.no_grad()
    def validate(self, acts: Acts) -> dict[str, float]:
        """Metrics on held-out raw activations, of which each process has a part; changes nothing."""
        c, sae = self.config, self.deployable()
        totals = Totals(sae.d_out, sae.d_sae, device=self.device, world=self.world)
        x, y = acts[self.reads], acts[self.hookpoint]
        # a weight that is steered would say more of the step than of the SAE
        loss, weight = 0.0, float(self.log_weight.exp()) if sched.target_l0(c) is None else 0.0
        p = sched.p_at(self.n_steps, c, self.n_steps)
        for rows, targets in zip(x.split(4096), y.split(4096), strict=True):
            inner, target = self.normalise(rows.to(self.device), targets.to(self.device))
            for _, out in reconstruct(sae, inner):
                totals.add(target, out.x_hat, out.codes)
                losses = sae.loss(inner, out, y=target, variance=self.variance, sparsity=weight, p=p)
                loss += float(losses.total) * len(rows)
        totals = totals.reduced()
        metrics = totals.metrics()
        shown = {name: metrics[name] for name in ("l0", "fvu", "explained_variance", "dead_fraction")}
        total_loss = sum(self.world.data.objects(loss)) / totals.n
        return {"total_loss": total_loss, "mse_loss": metrics["mse"] / self.scale_out**2, **shown}

    def finished(self) -> SAE:
        """The SAE for raw activations."""
        sae = self.deployable().scaled(self.scale, self.scale_out).eval()
        sae.layer_norm = self.config.normalize_activations == "layer_norm"
        return sae

    # ----------------------------------------------------------------------------------------------
    # state

    SCALARS = "residual log_weight drift n_updates scale scale_out variance best_val_loss".split()

    def state_dict(self) -> dict[str, Any]:
        """All that resume needs, of the latents in this process; sums are over the tokens of all.

        Every tensor with an axis of latents has it first; SHARED names the others that have axes (checkpoint.py).
        """
        return {
            "sae": self.sae.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "firing": self.firing.state_dict(),
            "n_dead": self.firing.n_dead,
            "window": self.window.state_dict(),
            **{name: getattr(self, name) for name in self.SCALARS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict, cut to the latents in this process (checkpoint.py)."""
        self.sae.take_(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.firing.load_state_dict(state["firing"], state["n_dead"])
        for name in self.SCALARS:
            value = state[name]
            setattr(self, name, value.to(self.device) if isinstance(value, Tensor) else value)
        self.window = self._new_window()
        self.window.load_state_dict(state["window"])

    def check_equal(self) -> None:
        """Raise UserError if tensors that should be the same in several processes are not."""
        since = self.firing.tokens_since_fired
        named = {**self.sae.tensors(), "tokens_since_fired": since, "log_weight": self.log_weight}
        named |= {f"average of {name}": x for name, x in self.optimizer.average.items()}
        prefix = f"{self.hookpoint}: " if self.hookpoint else ""
        self.world.data.check_equal({prefix + name: x for name, x in named.items()})
        shared = {n: x for n, x in named.items() if n in (*SHARED, "log_weight")}
        self.world.latents.check_equal({prefix + name: x for name, x in shared.items()})


# --------------------------------------------------------------------------------------------------
# an SAE's start


@torch.no_grad()
def start_from_(sae: SAE, x: Tensor, y: Tensor, n_tokens: int | None = None) -> None:
    """Set biases and thresholds from data, before the first step: x (M, D) goes in, y (M, D_out) comes out.

    n_tokens: the number of rows where n processes along `data` have every n-th each.
    """
    c, data, team = sae.config, sae.world.data, sae.world.team
    if c.b_dec_init != "zeros":
        sae.b_dec.copy_(data.mean(y) if c.b_dec_init == "mean" else geometric_median(y, data))
    if c.transcode:  # latents see x around its mean, as an SAE's do
        sae.shift_biases_(-data.mean(x) @ sae.W_enc)
    n_rows = min(4096, len(x) if n_tokens is None else n_tokens)
    part = x[: len(range(data.rank, n_rows, data.size))]
    target = sched.target_l0(c)
    if target is not None:  # begin as sparse as asked: latents that begin dense mostly die on the way down
        n = min(sae.d_sae * n_rows, max(1, round(n_rows * target)))
        passing = sae.pre_activations(part).flatten()
        sae.raise_threshold_(team.kth_largest(passing, n).clamp(min=0))
    elif c.scale_encoder and not (sae.penalised or c.tied or c.transcode):  # the length that errs least
        sae.train()
        x_hat = sae(part, whole=sae.survey([part], n_tokens=n_rows) if team.size > 1 else None).x_hat - sae.b_dec
        sums = data.sum_(torch.stack([(x_hat * (part - sae.b_dec)).sum(), x_hat.square().sum()]))
        if sums.min() > 0:
            sae.encoder_rows.mul_(sums[0] / sums[1])


def geometric_median(x: Tensor, data: Axis = ALONE.data, *, n_steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """(D,): the point whose summed distance to the rows of x (M, D) is least (Weiszfeld's iteration)."""
    point = data.mean(x)
    for _ in range(n_steps):
        weights = 1 / (x - point).norm(dim=1).clamp(min=1e-12)
        new = data.sum_((weights[:, None] * x).sum(0)) / data.sum_(weights.sum())
        if (new - point).norm() <= tolerance * point.norm():
            return new
        point = new
    return point
