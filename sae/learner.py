"""One SAE being trained: its optimiser, what it counts, and the scale its activations are brought to.

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
from sae.base import SAE, SHARED, Losses, Output, Spare, layer_norm, reconstruct
from sae.config import SAEConfig, UserError, require
from sae.hooks import Acts
from sae.kernels import sparse
from sae.metrics import Totals, check_finite
from sae.optim import Optimizer, own_layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTIAL = ("loss", "objective", "sparsity", "aux")  # sums over the tokens of this process
SUMS = (*PARTIAL, "grad_norm", "penalty_weight")
LIST_EVERY = 10  # steps between looks at which latents are dead: they read the device
# What a step does per error of log L0: to thresholds, to what they move by in every step, to the log of the weight.
STEER, STEER_DRIFT, STEER_WEIGHT = 0.2, 0.004, 0.01


class Terms(NamedTuple):
    """What a step's loss takes besides tokens: schedules' values, and statistics of the whole batch."""

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
    hookpoint names the activations in a batch; a transcoder reads `hookpoint@in` and predicts `hookpoint`.

    Several processes train one SAE (sae.world): each learns from its part of a batch, and a step's gradients and counts
    are summed once; along `data` all hold the same weights, along `latents` each its own.
    """

    def __init__(self, sae: SAE, config: SAEConfig, n_steps: int, device: torch.device, hookpoint: str = ""):
        self.sae = sae.to(device).train()
        sae.layer_norm = False
        self.config = replace(config, d_in=sae.d_in, d_sae=sae.d_sae, d_out=sae.d_out)
        self.n_steps, self.device, self.hookpoint = n_steps, device, hookpoint
        self.reads = f"{hookpoint}@in" if config.transcode else hookpoint
        self.optimizer = Optimizer(sae, self.config, n_steps, device)
        self.scaler = torch.amp.GradScaler(device.type) if config.dtype == "float16" else None
        self.scale, self.scale_out = 1.0, 1.0
        self.variance = float(sae.d_out)
        self.world = sae.world
        self._check_shards()
        F = len(sae.own)
        self.tokens_since_fired = torch.zeros(F, dtype=torch.int64, device=device)
        self.feature_counts = torch.zeros(F, dtype=torch.int64, device=device)
        self.rate = torch.full((F,), self.fresh_rate, device=device)  # running share of tokens a latent fires on
        self.residual = torch.zeros((), device=device)  # mean squared error of the step before
        start = sched.L1_START.get(config.activation, 0)
        weight = config.l1_coefficient if config.l1_coefficient is not None else start
        self.log_weight = torch.tensor(math.log(max(weight, 1e-12)), device=device)
        self.drift = torch.zeros((), device=device)  # of thresholds in a step of full size, against what learning does
        self.average = {n: torch.zeros_like(p) for n, p in sae.named_parameters()} if config.ema else {}
        self.n_updates = 0
        self.n_dead = self.n_listed = 0  # of all processes, and here, as last listed: AuxK is computed only for these
        self.listed = torch.zeros(F, dtype=torch.bool, device=device)
        self.best_val_loss = math.inf
        self.pending: tuple[Output, Tensor | None] | None = None
        self.spare: Spare | None = None  # what AuxK learns in this step
        self.counts = StepCounts(F, device)
        self.new_window()

    def _check_shards(self) -> None:
        """Raise UserError for what cannot be done to a part of the latents alone."""
        n, c = self.world.latents.size, self.config
        whole = c.optimizer in ("muon", "adam8bit")
        require(n == 1 or not whole, f"--optimizer {c.optimizer} needs whole matrices; with --shard_latents use adam")
        require(n == 1 or c.dtype != "float16", "--dtype float16 does not go with --shard_latents; use bfloat16")

    @property
    def dead_after(self) -> int:
        """Tokens without firing until a latent is dead."""
        return sched.dead_after_tokens(self.config)

    @property
    def fresh_rate(self) -> float:
        """Where the running firing rates start: without firing they fall below the least rate in its memory's time."""
        return math.e * (sched.dead_below(self.config) or 0.0)

    def is_dead(self) -> Tensor:
        """(F,) bool."""
        least = sched.dead_below(self.config)
        return self.tokens_since_fired > self.dead_after if least is None else self.rate < least

    def list_dead(self) -> None:
        """Note which latents are dead now (reads the device): those that AuxK serves until the next time."""
        self.listed = self.is_dead()
        self.n_listed = int(self.listed.sum())
        self.n_dead = sum(self.world.latents.objects(self.n_listed))

    def new_window(self) -> None:
        """Start the sums that the next line of the log averages over."""
        self.totals = Totals(self.sae.d_out, self.sae.d_sae, device=self.device, world=self.world)
        self.sums = {name: torch.zeros((), device=self.device) for name in SUMS}
        self.n_sums = 0

    # ----------------------------------------------------------------------------------------------
    # scale

    @torch.no_grad()
    def start_from(self, acts: Acts, pretrained: bool = False, n_tokens: int | None = None) -> None:
        """Before the first step: the scale, and what an SAE starts from (biases, thresholds), from a sample of data.

        pretrained: the SAE holds weights for raw activations; they are brought to this scale and kept. n_tokens: of the
        whole sample, of which n processes along `data` have every n-th token each.
        """
        x, y = acts[self.reads], acts[self.hookpoint]
        check_finite({self.reads or "the hookpoint": x, self.hookpoint or "the target": y})
        self.scale = self._scale(x)
        self.scale_out = self._scale(y) if self.config.transcode else self.scale
        if pretrained:
            self.sae.load_state_dict(self.sae.scaled(1 / self.scale, 1 / self.scale_out).state_dict())
        x, target = self.normalise(x, y)
        target = x if target is None else target
        self.variance = float(self._variance(target))
        if not pretrained:
            self.sae.start_from_(x, target, n_tokens)
        for tensor in self.sae.state_dict().values():
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

    def normalise(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw activations as they are trained on; the target is None where it is x itself."""
        if self.config.normalize_activations == "layer_norm":
            return layer_norm(x)[0], None
        return x * self.scale, y * self.scale_out if self.config.transcode else None

    # ----------------------------------------------------------------------------------------------
    # a step: learn (gradients), then update

    def learn(self, batch: Acts, step: int, n_tokens: int | None = None) -> None:
        """Add the gradients of a batch of raw activations, in as many parts as the config asks for.

        Reads nothing back from the device. The sum is the whole batch's gradient whatever the number of parts.
        n_tokens: of the whole batch, where other processes have the rest of it.
        """
        x, y = self.normalise(batch[self.reads], batch[self.hookpoint])
        n_parts = self.config.grad_acc_steps * self.config.micro_acc_steps
        xs = x.chunk(n_parts)
        ys = y.chunk(n_parts) if y is not None else (None,) * len(xs)
        n_tokens = n_tokens or len(x)
        terms = self.terms(step, x if y is None else y, list(xs), n_tokens)
        for part, target in zip(xs, ys, strict=True):
            out, losses = self.forward(part, target, terms)
            self.backward(losses.total * (len(part) / n_tokens))
            self.account(part if target is None else target, out, losses, len(part) / n_tokens)
        self.counts.n_tokens = n_tokens
        self.pending = (out, terms.whole)

    def terms(self, step: int, target: Tensor, parts: list[Tensor], n_tokens: int | None = None) -> Terms:
        """What the loss of this step's batch takes; target (B, D_out) is all of it, parts its inputs in pieces.

        n_tokens: of the whole batch, where other processes have the rest of it.
        """
        c = self.config
        k = sched.k_at(step, c)
        ramp = sched.sparsity_at(step, c, self.n_steps) if sched.target_l0(c) is None else 1.0
        sparsity = ramp * self.log_weight.exp()
        own_variance = c.loss_fn == "fvu"
        dead = self.listed & self.is_dead() if self.n_dead and self.sae.uses_auxk and c.auxk_alpha > 0 else None
        self.spare = self._copies() if dead is not None else None
        variance = self._batch_variance(target) if own_variance else torch.full((), self.variance, device=self.device)
        with self._precision():  # of the parts: rounded otherwise, what is least here may be too little there
            whole = self.sae.survey(parts, k, n_tokens) if len(parts) > 1 or self.world.team.size > 1 else None
        return Terms(
            k=k, p=sched.p_at(step, c, self.n_steps), sparsity=sparsity, variance=variance,
            dead=dead, spare=self.spare,
            residual=torch.where(self.residual > 0, self.residual, 1.0) if self.n_updates else None,
            whole=whole,
        )  # fmt: skip

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES[self.config.dtype], enabled=self.config.dtype != "float32")

    @torch.no_grad()
    def _copies(self) -> Spare:
        """Of the weights of the latents listed as dead, with gradients of their own."""
        spare = self.sae.weights_of(self.listed, max(1, self.n_listed), self.n_dead)
        for weights in (spare.encoder, spare.bias, spare.decoder):
            weights.requires_grad_()
        return spare

    def _batch_variance(self, target: Tensor) -> Tensor:
        """Of the whole batch: the mean of |y - their mean|^2."""
        if self.world.data.size == 1:
            return sparse.variance(target)
        wide = target.double()
        sums = self.world.data.sum_(torch.cat((wide.sum(0), wide.square().sum()[None], wide.new_full((1,), len(wide)))))
        return ((sums[-2] - sums[:-2].square().sum() / sums[-1]) / sums[-1]).clamp(min=0).to(target.dtype)

    def forward(self, x: Tensor, y: Tensor | None, terms: Terms) -> tuple[Output, Losses]:
        """Output and losses for (a part of) a batch of scaled activations."""
        c = self.config
        with self._precision():
            out = self.sae(x, k=terms.k, whole=terms.whole)
            losses = self.sae.loss(
                x, out, y=y, variance=terms.variance, sparsity=terms.sparsity, p=terms.p, dead=terms.dead,
                spare=terms.spare, residual=terms.residual, whole=terms.whole,
                recon_weight=1.0 if c.loss_fn in ("fvu", "mse") else c.fvu_coefficient,
            )  # fmt: skip
        return out, losses

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @torch.no_grad()
    def account(
        self, target: Tensor, out: Output, losses: Losses, share: float, objective: Tensor | None = None
    ) -> None:
        """Add (a part of) a step, `share` of its tokens, to what the log and the update take from it."""
        l0, fired = self.totals.add(target, out.x_hat, out.codes)
        self.sums["loss"] += share * losses.total
        self.sums["sparsity"] += share * losses.sparsity
        self.sums["aux"] += share * losses.aux
        if objective is not None:
            self.sums["objective"] += share * objective
        counts = self.counts
        counts.fired += fired
        counts.l0 += share * l0.float().mean()
        counts.error += share * losses.error
        counts.n_tokens += len(target)

    def update(self, step: int) -> None:
        """One optimiser step on the gradients gathered, and all else that moves once per step."""
        c, sae = self.config, self.sae
        if self.spare is not None:
            sae.add_gradients_(self.spare)
            self.spare = None
        self._reduce()
        norm = self.optimizer.step(sched.lr_at(step, c, self.n_steps), self.scaler)
        self.optimizer.zero_grad()
        if self.n_dead:
            sae.revive_(self.is_dead())
        if self.pending is not None:
            sae.observe_(self.pending[0], step, self.pending[1])
        self.pending = None
        with torch.no_grad():
            self._count_firing()
            self.residual = self.counts.error
            self.sums["grad_norm"] += torch.where(norm.isfinite(), norm, 0.0)
            self.sums["penalty_weight"] += self.log_weight.exp()
            self.n_sums += 1
            self._control(step)
            for name, p in sae.named_parameters() if self.average else ():
                self.average[name].lerp_(self.optimizer.averaged(p), 1 - (c.ema or 0.0))
        self.n_updates += 1
        if self.n_updates % LIST_EVERY == 0:
            self.list_dead()
        self.counts = StepCounts(len(self.sae.own), self.device)

    def _reduce(self) -> None:
        """Gradients and counts of all processes together: the only sums of a step that grow with the SAE."""
        if self.world.team.size == 1:
            return
        sae, counts = self.sae, self.counts
        if sae.b_dec.grad is not None:  # each has its share of the decoder's, and its own latents' of x - b_dec
            self.world.latents.sum_(sae.b_dec.grad)
        if self.world.data.size == 1:
            return
        grads = [own_layout(p) for p in sae.parameters()]
        vectors = [g for g in grads if g.ndim == 1]
        # numbers of tokens are whole up to 2^24 in float32
        small = torch.cat((*vectors, counts.fired.float(), torch.stack((counts.l0, counts.error))))
        self.world.data.sum_all_([*(g for g in grads if g.ndim == 2), small])
        *summed, fired, sums = small.split([*(len(g) for g in vectors), len(counts.fired), 2])
        for grad, total in zip(vectors, summed, strict=True):
            grad.copy_(total)
        counts.fired, (counts.l0, counts.error) = fired.round().long(), sums

    def _count_firing(self) -> None:
        n, fired = self.counts.n_tokens, self.counts.fired
        self.tokens_since_fired += n
        self.tokens_since_fired.masked_fill_(fired > 0, 0)
        self.feature_counts += fired
        least = sched.dead_below(self.config)
        if least is not None:  # remember as long as three firings at the least rate take
            self.rate.lerp_(fired / n, min(1.0, n * least / 3))

    def _control(self, step: int) -> None:
        """Keep L0 where it was asked: thresholds follow its error at once, the penalty's weight follows slowly.

        The weight alone acts through many steps of learning, and overshoots; thresholds act on the next batch. What
        they have to do again and again becomes their drift, which fades with the step size as what causes it does. The
        drift turns the weight until it is gone itself: thresholds that rise for ever fight what the SAE learns.
        """
        target = sched.target_l0(self.config)
        if target is None or self.config.jumprelu_penalty == "quadratic":
            return
        error = (self.counts.l0.clamp(min=1e-3).log() - math.log(target)).clamp(-1.0, 1.0)
        self.drift = self.drift + STEER_DRIFT * error
        share = sched.lr_at(step, self.config, self.n_steps) / sched.peak_lr(self.config)
        self.sae.raise_threshold_(STEER * error + self.drift * share)
        self.log_weight = self.log_weight + STEER_WEIGHT * error + self.drift * share

    # ----------------------------------------------------------------------------------------------
    # end-to-end training: the SAE stands in the model while it runs

    def stand_in(self, x: Tensor, y: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Output, Losses]:
        """For raw activations (n, D): the raw reconstruction, the scaled target, the output and the own losses."""
        inner, scaled = self.normalise(x, y)
        target = (inner if scaled is None else scaled).detach()
        out, losses = self.forward(inner, target, terms)
        if self.config.normalize_activations == "layer_norm":
            _, mean, std = layer_norm(x)
            return out.x_hat * std + mean, target, out, losses
        return out.x_hat / self.scale_out, target, out, losses

    # ----------------------------------------------------------------------------------------------
    # dead latents

    @torch.no_grad()
    def resample(self, acts: Acts, generator: torch.Generator) -> int:
        """Point dead latents at badly explained tokens, with fresh optimiser moments; returns how many there were.

        acts: raw activations to choose from, each with probability ~ its squared error^2 (Anthropic 2023, "Towards
        Monosemanticity", appendix). Relu and gated start at a fifth of the living encoder's size, as there; the
        other kinds would hardly choose so small a latent and take its size.
        """
        sae, c, data, shards = self.sae, self.config, self.world.data, self.world.latents
        dead = self.is_dead().nonzero()[:, 0]
        n_dead = shards.objects(len(dead))
        if not sum(n_dead) or sum(n_dead) == sae.d_sae:
            return 0
        x, y = self.normalise(acts[self.reads], acts[self.hookpoint])
        target = x if y is None else y
        whole = sae.survey([x], n_tokens=sum(data.objects(len(x)))) if self.world.team.size > 1 else None
        parts = zip(x.split(4096), target.split(4096), strict=True)
        left = torch.cat([t - sae(part, whole=whole).x_hat for part, t in parts])
        weights = data.in_turn(left.square().sum(-1).square()).cpu()
        again = sum(n_dead) > int((weights > 0).sum())
        rows = torch.multinomial(weights, sum(n_dead), replacement=again, generator=generator)
        rows = rows[sum(n_dead[: shards.rank]) :][: len(dead)].to(x.device)
        mean = data.mean(x)
        directions = data.pick(x, rows) - (mean if c.transcode else sae.b_dec)
        directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alive = ~self.is_dead()
        encoder = directions * shards.mean(sae.W_enc[:, alive].norm(dim=0)) * (1.0 if sae.uses_auxk else 0.2)
        decoder = directions
        if c.transcode:
            unit = data.pick(left, rows)
            unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-12)
            decoder = unit * shards.mean(sae.W_dec[alive].norm(dim=1))
        new = {"W_dec": decoder, "W_enc": encoder}
        for name, p in sae.named_parameters():
            if name in SHARED:
                continue
            at = (slice(None), dead) if name == "W_enc" else (dead,)
            value = new.get(name)
            if value is None:  # biases: around the mean for a transcoder; a threshold or a gain like the living ones'
                value = -(encoder @ mean) if c.transcode and name[:2] == "b_" else torch.zeros_like(p[dead])
                value = shards.mean(p[alive]).expand_as(value) if name in ("threshold", "r_mag") else value
            for moment in (p, *self.optimizer.moments(p)):
                moment[at] = 0.0
            p[at] = value.t() if name == "W_enc" else value
            if "z" in next(iter(self.optimizer.parts)).state.get(p, {}):
                next(iter(self.optimizer.parts)).state[p]["z"][at] = p[at]
            if self.average:
                self.average[name][at] = p[at] * (1 - (c.ema or 0.0) ** self.n_updates)
        self.tokens_since_fired[dead], self.rate[dead] = 0, self.fresh_rate
        return sum(n_dead)

    # ----------------------------------------------------------------------------------------------
    # what is read off now and then

    def read_window(self) -> dict[str, float]:
        """Averages over the steps since the last call (reads the device), and a new window."""
        metrics = {name: float(value) / max(1, self.n_sums) for name, value in self._sums().items()}
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                "the loss became NaN or infinite; the activations may hold NaN, or --learning_rate is too high "
                f"(it was {sched.peak_lr(self.config):g})"
            )
        n_dead = sum(self.world.latents.objects(int(self.is_dead().sum())))
        window = self.totals.reduced().metrics()
        metrics |= {name: window[name] for name in ("fvu", "explained_variance", "l0", "cosine")}
        metrics["mse"] = window["mse"] / self.scale_out**2
        metrics["dead_fraction"] = n_dead / self.sae.d_sae
        self.new_window()
        return metrics

    def _sums(self) -> dict[str, Tensor]:
        """The sums of the window, over the tokens of all processes."""
        whole = self.world.data.sum_(torch.stack([self.sums[name] for name in PARTIAL]))
        return self.sums | dict(zip(PARTIAL, whole, strict=True))

    @torch.no_grad()
    def deployable(self) -> SAE:
        """The SAE to measure and save, at the training scale: with averaged weights where there are such."""
        averaged = {n: self.optimizer.averaged(p) for n, p in self.sae.named_parameters()}
        if self.average and self.n_updates:
            correction = 1 - (self.config.ema or 0.0) ** self.n_updates
            averaged = {name: value / correction for name, value in self.average.items()}
        elif all(averaged[n].data_ptr() == p.data_ptr() for n, p in self.sae.named_parameters()):
            return self.sae
        sae = copy.deepcopy(self.sae)
        for name, p in sae.named_parameters():
            p.copy_(averaged[name])
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
        for rows, target in zip(x.split(4096), y.split(4096), strict=True):
            inner, wanted = self.normalise(rows.to(self.device), target.to(self.device))
            for _, out in reconstruct(sae, inner):
                totals.add(inner if wanted is None else wanted, out.x_hat, out.codes)
                losses = sae.loss(inner, out, y=wanted, variance=self.variance, sparsity=weight, p=p)
                loss += float(losses.total) * len(rows)
        totals = totals.reduced()
        metrics = totals.metrics()
        metrics["mse"] /= self.scale_out**2
        return {
            "total_loss": sum(self.world.data.objects(loss)) / totals.n, "mse_loss": metrics["mse"],
            **{name: metrics[name] for name in ("l0", "fvu", "explained_variance", "dead_fraction")},
        }  # fmt: skip

    def finished(self) -> SAE:
        """The SAE for raw activations."""
        sae = self.deployable().scaled(self.scale, self.scale_out).eval()
        sae.layer_norm = self.config.normalize_activations == "layer_norm"
        return sae

    STATE = (
        "tokens_since_fired", "feature_counts", "rate", "residual", "log_weight", "drift", "average", "n_updates",
        "scale", "scale_out", "variance", "listed", "n_dead", "best_val_loss", "n_sums",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All that resume needs, of the latents in this process; sums are over the tokens of all."""
        return {
            "sae_state_dict": self.sae.state_dict(), "optimizer_state_dict": self.optimizer.state_dict(),
            "optimizer_names": self.optimizer.names(self.sae),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "totals": self.totals.reduced().state_dict(), **{name: getattr(self, name) for name in self.STATE},
            "sums": self._sums(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state_dict, cut to the latents in this process (checkpoint.py)."""
        self.sae.load_state_dict(state["sae_state_dict"])
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        to = lambda v: v.to(self.device) if isinstance(v, Tensor) else v
        for name in self.STATE:
            value = state[name]
            setattr(self, name, {k: to(v) for k, v in value.items()} if isinstance(value, dict) else to(value))
        self.n_listed = int(self.listed.sum())
        self.new_window()
        self.sums, self.n_sums = {name: to(v) for name, v in state["sums"].items()}, state["n_sums"]
        if self.world.data.rank == 0:
            self.totals.load_state_dict(state["totals"])
        else:  # the first process has what all had together
            self.sums |= {name: torch.zeros_like(self.sums[name]) for name in PARTIAL}

    def check_equal(self) -> None:
        """Raise UserError if what should be the same in several processes is not."""
        named = {**self.sae.state_dict(), "tokens_since_fired": self.tokens_since_fired, "log_weight": self.log_weight}
        named |= {f"average of {name}": x for name, x in self.average.items()}
        prefix = f"{self.hookpoint}: " if self.hookpoint else ""
        self.world.data.check_equal({prefix + name: x for name, x in named.items()})
        shared = {n: x for n, x in named.items() if n in (*SHARED, "log_weight")}
        self.world.latents.check_equal({prefix + name: x for name, x in shared.items()})
