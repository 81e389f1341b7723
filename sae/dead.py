"""Dead latents: which have stopped firing, the AuxK loss that trains them, and resampling, which starts them anew.

Letters: B tokens in a batch, D width, F latents, n dead latents.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sae import schedules as sched
from sae.base import SAE, SHARED
from sae.config import SAEConfig
from sae.kernels import sparse
from sae.kernels.sparse import Codes
from sae.optim import Optimizer


class Firing:
    """How often each latent of an SAE fires, and which are dead.

    Every tensor is of the latents in this process: (F,).
    """

    def __init__(self, sae: SAE, c: SAEConfig, device: torch.device):
        self.config, self.shards, F = c, sae.world.latents, len(sae.own)
        self.tokens_since_fired = torch.zeros(F, dtype=torch.int64, device=device)
        self.feature_counts = torch.zeros(F, dtype=torch.int64, device=device)
        self.rate = torch.full((F,), self.fresh_rate, device=device)  # running share of tokens a latent fires on
        self.listed = torch.zeros(F, dtype=torch.bool, device=device)  # dead when last looked: AuxK serves only these
        self.n_listed = self.n_dead = 0  # how many of them here, and in all processes

    TENSORS = ("tokens_since_fired", "feature_counts", "rate", "listed")

    @property
    def dead_after(self) -> int:
        """Tokens without firing until a latent is dead."""
        return sched.dead_after_tokens(self.config)

    @property
    def fresh_rate(self) -> float:
        """The running rate of a new latent: without firing it falls below the least rate in its memory's time."""
        return math.e * (sched.dead_below(self.config) or 0.0)

    def is_dead(self) -> Tensor:
        """(F,) bool."""
        least = sched.dead_below(self.config)
        return self.tokens_since_fired > self.dead_after if least is None else self.rate < least

    def count_(self, fired: Tensor, n_tokens: int) -> None:
        """Add a step: how often each latent fired (F,) on n_tokens tokens."""
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired.masked_fill_(fired > 0, 0)
        self.feature_counts += fired
        least = sched.dead_below(self.config)
        if least is not None:  # the memory is as long as three firings at the least rate take
            self.rate.lerp_(fired / n_tokens, min(1.0, n_tokens * least / 3))

    def list_(self) -> None:
        """Note which latents are dead now (reads the device): those that AuxK serves until the next time."""
        self.listed = self.is_dead()
        self.n_listed = int(self.listed.sum())
        self.n_dead = sum(self.shards.objects(self.n_listed))

    def renew_(self, latents: Tensor) -> None:
        """Treat these latents as new."""
        self.tokens_since_fired[latents], self.rate[latents] = 0, self.fresh_rate

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.TENSORS}

    def load_state_dict(self, state: dict[str, Tensor], n_dead: int) -> None:
        for name in self.TENSORS:
            setattr(self, name, state[name].to(self.rate.device))
        self.n_listed, self.n_dead = int(self.listed.sum()), n_dead


# --------------------------------------------------------------------------------------------------
# AuxK


class Spare(NamedTuple):
    """Copies of the weights of some latents ids (n,), leaves of AuxK's graph, so that its gradients cost n rows and not
    F: of the encoder (n, D) with biases (n,), and of the decoder (n, D_out). asked (n,) bool: the others fill up."""

    ids: Tensor
    asked: Tensor
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    n_all: int  # in all processes


@torch.no_grad()
def copies_of(sae: SAE, latents: Tensor, n: int, n_all: int) -> Spare:
    """Copies of the weights of n latents: those marked (F,) bool first. n_all: the number marked in all processes."""
    ids = latents.to(torch.uint8).topk(min(n, len(latents))).indices
    rows = [w.detach()[ids].requires_grad_() for w in (sae.encoder_rows, sae.encoder_bias, sae.W_dec)]
    return Spare(ids, latents[ids], rows[0], rows[1], rows[2], min(n_all, sae.d_sae))


@torch.no_grad()
def add_gradients_(sae: SAE, spare: Spare) -> None:
    """Add the gradients of AuxK's copies of weights to those of the weights themselves, after all backwards."""
    for weights, rows in (
        (sae.W_dec, spare.decoder),
        (sae.encoder_rows, spare.encoder),
        (sae.encoder_bias, spare.bias),
    ):
        assert weights.grad is not None  # the reconstruction reaches all of them
        if rows.grad is not None:
            weights.grad.index_add_(0, spare.ids, rows.grad)


def auxk_loss(
    sae: SAE, x: Tensor, wrong: Tensor, dead: Tensor, spare: Spare, k: int, residual: Tensor | None = None
) -> Tensor:
    """AuxK: let dead latents explain the residual (Gao et al. 2024, A.2, arxiv.org/abs/2406.04093).

    x (B, D). wrong (B, D_out): x_hat - y, held constant. dead (F,) bool. Of each token the min(k, n / 32) largest dead
    pre-activations reconstruct the residual; b_dec is in x_hat already and is not added again. (With D/2, as there,
    each latent learns a little of everything and wins nowhere: dev/LOG.md.) residual: the mean ||y - x_hat||^2 to
    measure against (default: this batch's). Returns error over residual energy, 0 when nothing is dead or nothing is
    left to explain; never NaN. Gradients go to `spare`.
    """
    k, shards = min(k, sae.d_sae), sae.world.latents
    ids, asked, encoder, bias, decoder, n_all = spare
    centred = sae.centred(x, held=True)
    some = max(1, min(k, n_all // 32))  # with few dead latents more per token would learn no more (dev/LOG.md)
    indices, values, offsets = sae.largest(centred, encoder.t(), bias, some, asked)
    pre = sparse.gather_pre(centred, encoder.t(), bias, values, indices, offsets)
    values = (pre if sae.signed else pre.relu()) * dead[ids][indices]
    error = sparse.square_norms(sae.times(Codes(indices, values, offsets), decoder, wrong)).mean()
    share = (shards.sum_(dead.sum()) / k).clamp(max=1.0)
    energy = sparse.square_norms(wrong).mean() if residual is None else residual
    return torch.where((share > 0) & (energy > 0), share * error / energy.clamp(min=1e-30), 0.0)


# --------------------------------------------------------------------------------------------------
# resampling


@torch.no_grad()
def resample_(sae: SAE, firing: Firing, optimizer: Optimizer, x: Tensor, y: Tensor, generator: torch.Generator) -> int:
    """Point dead latents at badly explained tokens, with fresh optimiser moments; returns how many there were.

    x (M, D), y (M, D_out): inputs and targets to choose from, each with probability ~ its squared error^2 (Anthropic
    2023, "Towards Monosemanticity", appendix). Relu and gated start at a fifth of the living encoder's size, as there;
    the other kinds would hardly choose so small a latent and take its size.
    """
    data, shards, transcode = sae.world.data, sae.world.latents, sae.config.transcode
    alive = ~firing.is_dead()
    dead = (~alive).nonzero()[:, 0]
    n_dead = shards.objects(len(dead))
    if not sum(n_dead) or sum(n_dead) == sae.d_sae:
        return 0
    whole = sae.survey([x], n_tokens=sum(data.objects(len(x)))) if sae.world.team.size > 1 else None
    parts = zip(x.split(4096), y.split(4096), strict=True)
    left = torch.cat([target - sae(part, whole=whole).x_hat for part, target in parts])
    weights = data.in_turn(left.square().sum(-1).square()).cpu()
    again = sum(n_dead) > int((weights > 0).sum())
    rows = torch.multinomial(weights, sum(n_dead), replacement=again, generator=generator)
    rows = rows[sum(n_dead[: shards.rank]) :][: len(dead)].to(x.device)
    mean = data.mean(x)
    directions = _unit(data.pick(x, rows) - (mean if transcode else sae.b_dec))
    encoder = directions * shards.mean(sae.W_enc[:, alive].norm(dim=0)) * (1.0 if sae.uses_auxk else 0.2)
    decoder = directions
    if transcode:
        decoder = _unit(data.pick(left, rows)) * shards.mean(sae.W_dec[alive].norm(dim=1))
    new = {"W_dec": decoder, "encoder": encoder}
    for name, p in sae.named_parameters():
        if name in SHARED:
            continue
        value = new.get(name)
        if value is None:  # biases: around the mean for a transcoder; a threshold or a gain like the living ones'
            value = -(encoder @ mean) if transcode and name.startswith("b_") else torch.zeros_like(p[dead])
            value = shards.mean(p[alive]).expand_as(value) if name in ("threshold", "r_mag") else value
        p[dead] = value
        optimizer.renew_(name, p, dead)
    firing.renew_(dead)
    return sum(n_dead)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
