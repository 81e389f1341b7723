"""The SAE architectures: how each chooses latents, and the terms it adds to the shared loss (base.py).

To add one: a subclass with `kind="its name"`, `codes` and, if need be, `penalty` or `extra`. Class attributes (base.py)
say which settings it has, how it is saved, and the other facts that settings and files need.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from sae.base import SAE as SAE
from sae.base import Output as Output
from sae.config import KINDS as KINDS
from sae.config import SAEConfig as SAEConfig
from sae.config import TrainConfig as TrainConfig
from sae.config import kind_of, require
from sae.distributed import ALONE, World
from sae.kernels import selection, sparse
from sae.kernels.sparse import Codes
from sae.schedules import n_latents

REVIVE = 0.02  # by which the threshold of a dead JumpReLU latent falls in a step
K_MULTI = 4  # multi-TopK: the second reconstruction keeps 4k latents (Gao et al. 2024, 5.1), with weight 1/8

# --------------------------------------------------------------------------------------------------
# kinds that select


class TopK(SAE, kind="topk"):
    """The k largest pre-activations of a token, then ReLU, so fewer than k may be active (Gao et al. 2024, 2.3)."""

    flags = frozenset({"k_decay_steps", "multi_topk"})
    saelens: ClassVar[str | None] = "topk"

    def codes(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> tuple[Codes, Codes | None]:
        x, k = self.centred(x, held=True), k or self.config.k
        if not (self.config.multi_topk and self.training):
            return self._codes(x, k, whole), None
        wide = self._wide(k)
        if self.world.latents.size > 1:  # the largest of a shard need not be those of all
            return self._codes(x, k, whole), self._codes(x, wide, whole)
        most = self._codes(x, wide, whole)
        return most.strongest(k), most.strongest(wide)

    def _wide(self, k: int) -> int:
        return min(K_MULTI * k, self.d_sae)

    def _choose(self, x: Tensor, k: int, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: ARG002
        """The latents that the centred x (B, D) keeps and their pre-activations, flat with offsets if there are any."""
        return self.largest(x, self.W_enc, self.b_enc, k)

    def _codes(self, x: Tensor, k: int, whole: Tensor | None) -> Codes:
        """Codes of the centred x (B, D), with a graph."""
        indices, values, offsets = self._choose(x, k, whole)
        pre = sparse.gather_pre(x, self.W_enc, self.b_enc, values, indices, offsets, centre=self.centre)
        return Codes(indices, pre if self.signed else pre.relu(), offsets)

    def extra(self, x: Tensor, y: Tensor, out: Output) -> Tensor:
        if not self.config.multi_topk:
            return out.x_hat.new_zeros(())
        wide = out.source if out.source is not None else self.codes(x, k=self._wide(self.config.k))[0]
        return sparse.square_norms(self.predict(x, wide) - y).mean() / 8


class BatchTopK(TopK, kind="batchtopk"):
    """The k * B largest pre-activations of a batch; a learned threshold at inference (Bussmann et al. 2024,
    arxiv.org/abs/2412.06410).

    threshold (F,): running mean of the smallest activation that was kept, the same for all latents, so that a saved
    SAE is a JumpReLU one.
    """

    flags = frozenset({"k_decay_steps"})
    saelens = "jumprelu"
    threshold: Tensor

    @classmethod
    def needs_batch(cls, c: SAEConfig) -> bool:  # noqa: ARG003
        return True

    def _make_biases(self, F: int) -> None:
        super()._make_biases(F)
        self.register_buffer("threshold", torch.zeros(F))

    def _choose(self, x: Tensor, k: int, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.training and whole is None:
            return selection.choose_batch_top_k(x, self.W_enc, self.b_enc, k * len(x))
        # a part of a batch may hold any number of those that the whole keeps, the least one included
        least = (
            self.threshold
            if whole is None
            else whole.nextafter(torch.full_like(whole, -torch.inf)).repeat(len(self.own))
        )
        return selection.choose_above(x, self.W_enc, self.b_enc, least, packed=self.packed)

    @torch.no_grad()
    def survey(self, parts: list[Tensor], k: int | None = None, n_tokens: int | None = None) -> Tensor | None:
        """The smallest activation that the whole batch keeps, found part by part.

        A process offers twice its fair share; where it left out some that may be kept, it offers all.
        """
        team = self.world.team
        n = (k or self.config.k) * (n_tokens or sum(len(x) for x in parts))
        for room in sorted({min(n, -(-2 * n // team.size)), n}):
            best = parts[0].new_empty(0)
            for x in parts:
                best = torch.cat((best, selection.choose_batch_top_k(self.centred(x), self.W_enc, self.b_enc, room)[1]))
                best = best.topk(min(room, len(best)), sorted=False).values
            least = team.kth_largest(best, n)
            if room == n or not team.any((best > least).all() & (len(best) == room)):
                break
        return least.clamp(min=0)

    @torch.no_grad()
    def observe_(self, out: Output, step: int, whole: Tensor | None = None) -> None:
        least = out.codes.values.min() if whole is None else whole
        weight = max(1 / (step + 1), 0.05)
        self.threshold.copy_(torch.where(least.isfinite(), torch.lerp(self.threshold, least, weight), self.threshold))

    scaled_biases = ("b_enc", "threshold")


class GroupMax(TopK, kind="groupmax"):
    """Latents in k groups; the largest of each group, then ReLU (sparsify)."""

    flags = frozenset()
    saelens = None

    @classmethod
    def check(cls, c: SAEConfig) -> None:
        n = n_latents(c) if c.d_sae or c.d_in else c.k
        require(n % c.k == 0, f"groupmax needs k groups of equal size; d_sae={n} is no multiple of k={c.k}")

    def _check_shards(self) -> None:
        super()._check_shards()
        n, k = self.world.latents.size, self.config.k
        require(k % n == 0, f"groupmax keeps whole groups on a process; k={k} is no multiple of --shard_latents {n}")

    def _choose(self, x: Tensor, k: int, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: ARG002
        return *selection.choose_group_max(x, self.W_enc, self.b_enc, self.d_sae // self.config.k), None


class AbsTopK(TopK, kind="abstopk"):
    """The k pre-activations of largest size, with their sign: a direction and its opposite share a latent."""

    flags = frozenset({"k_decay_steps"})
    saelens = "abstopk"
    # AuxK is a linear autoencoder of latents with a sign: it learns what all residuals share, and harms early on
    firings_to_die = 256
    signed = True


class Matryoshka(BatchTopK, kind="matryoshka"):
    """Nested dictionaries: each prefix of the latents must reconstruct alone, so that the first ones learn the
    general features (Bussmann et al. 2025, arxiv.org/abs/2503.17547). The loss is the sum over prefixes and the whole.
    """

    flags = frozenset({"k_decay_steps", "matryoshka_prefixes", "matryoshka_base"})

    @classmethod
    def check(cls, c: SAEConfig) -> None:
        good = all(0 < p < 1 for p in c.matryoshka_prefixes)
        require(good, f"matryoshka_prefixes={c.matryoshka_prefixes}; parts between 0 and 1 were wanted")

    @classmethod
    def needs_batch(cls, c: SAEConfig) -> bool:
        return c.matryoshka_base != "topk"

    @classmethod
    def saved_as(cls, c: SAEConfig) -> str:
        return "jumprelu" if cls.needs_batch(c) else "topk"

    def _choose(self, x: Tensor, k: int, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.needs_batch(self.config):
            return TopK._choose(self, x, k, whole)
        return super()._choose(x, k, whole)

    def prefixes(self) -> list[int]:
        """Numbers of latents of the partial dictionaries."""
        return sorted({max(1, round(part * self.d_sae)) for part in self.config.matryoshka_prefixes})

    def survey(self, parts: list[Tensor], k: int | None = None, n_tokens: int | None = None) -> Tensor | None:
        return None if not self.needs_batch(self.config) else super().survey(parts, k, n_tokens)

    def observe_(self, out: Output, step: int, whole: Tensor | None = None) -> None:
        if self.needs_batch(self.config):
            super().observe_(out, step, whole)

    def partial(self, codes: Codes, n: int) -> Tensor:
        """(B, D_out): what the first n latents reconstruct alone."""
        assert codes.indices is not None
        return self.decode_codes(codes._replace(values=codes.values * (codes.indices < n - self.own.start)))

    def extra(self, x: Tensor, y: Tensor, out: Output) -> Tensor:
        left = y - x @ self.W_skip.t() if self.config.skip_connection else y
        errors = [sparse.square_norms(self.partial(out.codes, n) - left).mean() for n in self.prefixes()]
        return torch.stack(errors).sum() if errors else out.x_hat.new_zeros(())


# --------------------------------------------------------------------------------------------------
# kinds with a penalty


class Penalised(SAE):
    """What these share: pre-activations are needed only from a little below a latent's threshold on."""

    penalised = True

    def _above(self, x: Tensor, bias: Tensor, floor: Tensor) -> Codes:
        """x's pre-activations, with a graph: all that exceed floor (F,) at least; all of them, dense, where most do or
        where finding them would make the device wait."""
        inner = self.centred(x, held=True)
        found = selection.choose_above_if_few(inner, self.W_enc, bias, floor, packed=self.packed)
        if found is None:
            return Codes(None, torch.addmm(bias, self.centred(x), self.W_enc))
        indices, values, offsets = found
        centre = self.centre
        pre = sparse.gather_pre(inner, self.W_enc, bias, values, indices, offsets, centre=centre)
        return Codes(indices, pre, offsets)


class ReLU(Penalised, kind="relu"):
    """ReLU latents, sparse through an L1 penalty weighted by decoder norms (Anthropic, April 2024 update), or plain.

    With p below 1 the penalty is sum f^p, closer to a count (p-annealing: Karvonen et al., arxiv.org/abs/2408.00113).
    """

    flags = frozenset({"l1_coefficient", "l1_weighting", "p_anneal"})
    saelens = "standard"
    l1_start = 0.1
    uses_auxk = False
    unit_transcoder = True

    def codes(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> tuple[Codes, Codes | None]:  # noqa: ARG002
        source = self._above(x, self.b_enc, torch.zeros_like(self.b_enc))
        return source._replace(values=source.values.relu()), source

    def penalty(self, out: Output, *, p: float = 1.0, whole: Tensor | None = None) -> Tensor:  # noqa: ARG002
        f = out.codes.values
        if self.config.l1_weighting == "decoder":
            f = f * out.codes.each(self.W_dec.norm(dim=1))
        f = f / math.sqrt(self.d_in)
        # the slope of f^p at 0 is infinite: latents below a hundredth of a typical activation keep that of f
        f = f if p == 1.0 else (f + 1e-3) ** p - 1e-3**p
        return self.world.latents.sum(f.sum() / len(out.x_hat))

    @torch.no_grad()
    def raise_threshold_(self, by: Tensor | float) -> None:
        self.b_enc.sub_(by)


class Gated(Penalised, kind="gated"):
    """A gate chooses latents, a magnitude path sizes them (Rajamanoharan et al. 2024, arxiv.org/abs/2404.16014).

    The gate is a step function without gradient; it learns through the penalty on relu(gate) and through the
    auxiliary reconstruction from relu(gate) with a frozen decoder, so both are part of the loss.
    """

    flags = frozenset({"l1_coefficient"})
    saelens = "gated"
    n_biases = 3
    l1_start = 0.15
    uses_auxk = False
    unit_transcoder = True

    def _make_biases(self, F: int) -> None:
        self.b_gate = nn.Parameter(torch.zeros(F))
        self.b_mag = nn.Parameter(torch.zeros(F))
        self.r_mag = nn.Parameter(torch.zeros(F))

    def codes(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> tuple[Codes, Codes | None]:  # noqa: ARG002
        gate = self._above(x, self.b_gate, torch.zeros_like(self.b_gate))
        projected = gate.values - gate.each(self.b_gate)
        magnitude = (projected * gate.each(self.r_mag.exp()) + gate.each(self.b_mag)).relu()
        return gate._replace(values=magnitude * (gate.values > 0)), gate

    def penalty(self, out: Output, *, p: float = 1.0, whole: Tensor | None = None) -> Tensor:  # noqa: ARG002
        assert out.source is not None
        f = out.source.values.relu() * out.source.each(self.W_dec.norm(dim=1))
        return self.world.latents.sum(f.sum() / len(out.x_hat) / math.sqrt(self.d_in))

    def extra(self, x: Tensor, y: Tensor, out: Output) -> Tensor:
        # The decoder is held fixed here, or it would be bent towards the gate's unscaled values (eq. 8).
        assert out.source is not None
        gate = out.source._replace(values=out.source.values.relu())
        x_hat = self.times(gate, self.W_dec.detach(), self.b_dec.detach())
        if self.config.skip_connection:
            x_hat = x_hat + x @ self.W_skip.detach().t()
        return sparse.square_norms(x_hat - y).mean()

    @torch.no_grad()
    def raise_threshold_(self, by: Tensor | float) -> None:
        self.b_gate.sub_(by)
        self.b_mag.sub_(by)

    @property
    def encoder_bias(self) -> Tensor:
        return self.b_gate

    def shift_biases_(self, by: Tensor) -> None:
        self.b_gate.add_(by)
        self.b_mag.add_(by)

    scaled_biases = ("b_gate", "b_mag")


class _Jump(torch.autograd.Function):
    """pre where it exceeds the threshold, else 0. The threshold's gradient is that of a step smoothed by a rectangle
    of the bandwidth (Rajamanoharan et al. 2024, arxiv.org/abs/2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold.clamp(min=0))

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2) * grad
        return grad * (pre > threshold.clamp(min=0)), -(threshold / ctx.bandwidth) * near, None


class _Step(torch.autograd.Function):
    """1 where pre exceeds the threshold, else 0, with a gradient to the threshold only (ibid., eq. 12)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2) * grad
        return None, -near / ctx.bandwidth, None


class JumpReLU(Penalised, kind="jumprelu"):
    """Latents above their own learned threshold pass unshrunk (Rajamanoharan et al. 2024, arxiv.org/abs/2407.14435).

    The threshold is a plain parameter: as a logarithm it hardly moves under Adam. Penalties: the number of active
    latents (step), tanh(4 f |W_dec|) (Anthropic, January 2025 update), or (L0 / target - 1)^2 (Gemma Scope 2).
    """

    flags = frozenset({"l1_coefficient", "jumprelu_penalty", "bandwidth"})
    saelens = "jumprelu"
    n_biases = 2
    l1_start = 0.001

    @classmethod
    def needs_batch(cls, c: SAEConfig) -> bool:
        return c.jumprelu_penalty == "quadratic"

    def _make_biases(self, F: int) -> None:
        super()._make_biases(F)
        self.threshold = nn.Parameter(torch.zeros(F))

    def codes(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> tuple[Codes, Codes | None]:  # noqa: ARG002
        source = self._above(x, self.b_enc, self.threshold.detach() - self.config.bandwidth / 2)
        threshold = source.each(self.threshold).expand_as(source.values)
        return source._replace(values=_Jump.apply(source.values, threshold, self.config.bandwidth)), source

    def penalty(self, out: Output, *, p: float = 1.0, whole: Tensor | None = None) -> Tensor:  # noqa: ARG002
        if self.config.jumprelu_penalty == "tanh":
            sizes = out.codes.values * out.codes.each(self.W_dec.norm(dim=1)) / math.sqrt(self.d_in)
            return self.world.latents.sum(torch.tanh(4 * sizes).sum() / len(out.x_hat))
        assert out.source is not None
        threshold = out.source.each(self.threshold).expand_as(out.source.values)
        l0 = _Step.apply(out.source.values, threshold, self.config.bandwidth).sum() / len(out.x_hat)
        l0 = self.world.latents.sum(l0)
        if self.config.jumprelu_penalty == "step":
            return l0
        target = self.config.target_l0 or self.config.k
        if whole is None:
            return (l0 / target - 1).square()
        # a part of a batch: the slope is the whole batch's, so that the parts' gradients add up to its own
        over = whole / target - 1
        return over.square() + 2 * over / target * (l0 - l0.detach())

    @torch.no_grad()
    def survey(self, parts: list[Tensor], k: int | None = None, n_tokens: int | None = None) -> Tensor | None:  # noqa: ARG002
        """The whole batch's L0, which the quadratic penalty depends on."""
        if self.config.jumprelu_penalty != "quadratic":
            return None
        active = torch.stack([(self.pre_activations(x) > self.threshold).sum() for x in parts]).sum()
        return self.world.team.sum_(active) / (n_tokens or sum(len(x) for x in parts))

    @torch.no_grad()
    def raise_threshold_(self, by: Tensor | float) -> None:
        self.threshold.add_(by)

    @torch.no_grad()
    def revive_(self, dead: Tensor) -> None:
        self.threshold.sub_(REVIVE * dead)  # no token near it, so no gradient would ever lower it

    @torch.no_grad()
    def observe_(self, out: Output, step: int, whole: Tensor | None = None) -> None:  # noqa: ARG002
        self.threshold.clamp_(min=0)  # below 0 it would do nothing and have no gradient

    scaled_biases = ("b_enc", "threshold")


def create_sae(config: SAEConfig, *, generator: torch.Generator | None = None, world: World = ALONE) -> SAE:
    """A fresh SAE of the kind `config.activation`, on the CPU, float32; the generator draws its decoder rows.

    world: several processes may hold its latents together; the weights are the same ones.
    """
    if generator is None:  # not the seed itself: toy data drawn from it would begin with the very directions drawn here
        generator = torch.Generator().manual_seed((config.seed + 1) * 1_000_003)
    return kind_of(config)(config, generator=generator, world=world)
