"""The SAE architectures and their losses. Pure: forward and loss count nothing, log nothing, move no state.

Kinds differ in how latents are chosen (`encode`) and in one extra loss term; everything else is shared.
To add one: a subclass with `codes` and, if need be, `penalty`, and a line in KINDS.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae import kernels
from sae.config import SAEConfig, UserError, require
from sae.kernels import Codes
from sae.schedules import n_latents


class Output(NamedTuple):
    """What one forward gives: the reconstruction (B, D), the codes, and the pre-activations (B, F) behind them.

    The sparse kinds compute `pre` without a graph; whoever needs its gradient goes through kernels.gather_pre.
    """

    x_hat: Tensor
    codes: Codes
    pre: Tensor


class Losses(NamedTuple):
    """Scalars, graph attached to `total` = reconstruction + sparsity weight * sparsity + w * aux.

    aux is AuxK, weighted by auxk_alpha, for topk, and Gated's auxiliary reconstruction, with weight 1, for gated.
    """

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    aux: Tensor


class SAE(nn.Module):
    """A sparse autoencoder: x_hat = f(x) @ W_dec + b_dec, with f sparse and computed from x - b_dec.

    Parameters keep the community's names and shapes: W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,).
    W_enc lies transposed in memory, which is the layout that both the product and the sparse backward want.
    """

    uses_auxk = False  # kinds with a sparsity penalty revive latents by lowering it

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        require(config.d_in is not None, "d_in is not known; give SAEConfig(d_in=width of the activations)")
        # only what an SAE is: a TrainConfig's model, folders and so on stay with the run
        own = {f.name: getattr(config, f.name) for f in fields(SAEConfig)}
        self.config = SAEConfig(**{**own, "d_sae": n_latents(config)})
        D, F = self.d_in, self.d_sae
        rows = torch.randn(F, D, generator=generator)
        rows.div_(rows.norm(dim=1, keepdim=True))
        self.W_dec = nn.Parameter(rows)
        # Encoder = decoder transposed at the start: the cheapest cure for dead latents (Gao et al. 2024, A.1).
        self.W_enc = nn.Parameter(rows.clone().t())
        self.b_dec = nn.Parameter(torch.zeros(D))
        self._make_biases(F)

    def _make_biases(self, F: int) -> None:
        self.b_enc = nn.Parameter(torch.zeros(F))

    @property
    def d_in(self) -> int:
        return self.config.d_in or 0

    @property
    def d_sae(self) -> int:
        return n_latents(self.config)

    # ----------------------------------------------------------------------------------------------
    # what a user calls

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations: (..., D) -> (..., F), zero where a latent is not active."""
        flat = self._flat(x)
        return self.codes(flat)[0].dense(self.d_sae).view(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Tensor) -> Codes:
        """The same as `encode` without the zeros: (B, D) -> Codes of (B, K)."""
        return self.codes(self._flat(x))[0].sparse()

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction of dense latents: (..., F) -> (..., D)."""
        return latents @ self.W_dec + self.b_dec

    def decode_codes(self, codes: Codes) -> Tensor:
        """Reconstruction of codes: (B, D)."""
        return self._decode(codes) + self.b_dec

    def pre_activations(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, F): the linear part of the encoder, before selection."""
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)

    def forward(self, x: Tensor) -> Output:
        """Reconstruct x (B, D)."""
        codes, pre = self.codes(self._flat(x))
        return Output(self.decode_codes(codes), codes, pre)

    # ----------------------------------------------------------------------------------------------
    # what a kind defines

    def codes(self, x: Tensor) -> tuple[Codes, Tensor]:
        """Codes of x (B, D), and the pre-activations (B, F) they were chosen from."""
        raise NotImplementedError

    def penalty(self, out: Output) -> Tensor:
        """The kind's own loss term, before its weight; a scalar."""
        return out.x_hat.new_zeros(())

    def extra(self, x: Tensor, out: Output) -> Tensor:  # noqa: ARG002
        """A further reconstruction term, a scalar in the units of the first (Gated's auxiliary loss)."""
        return out.x_hat.new_zeros(())

    # ----------------------------------------------------------------------------------------------
    # the loss, shared by all kinds

    def loss(
        self,
        x: Tensor,
        out: Output,
        *,
        variance: float,
        sparsity: float = 0.0,
        dead: Tensor | None = None,
        n_dead: int | None = None,
    ) -> Losses:
        """Means over the tokens of x (B, D), so that averaging micro-batches gives the whole batch's gradient.

        variance: mean ||x - mean x||^2 of the data, which makes the reconstruction loss a fraction of variance
        unexplained and keeps one sparsity weight good at every scale. dead (F,) bool switches AuxK on; n_dead, if
        known, is about how many those are, and saves work where they are few.
        """
        reconstruction = (x - out.x_hat).square().sum(-1).mean() / variance
        penalty = self.penalty(out) / math.sqrt(variance)
        aux = self.extra(x, out) / variance
        total = reconstruction + aux + (sparsity * penalty if sparsity else 0.0)
        if dead is not None and self.uses_auxk and self.config.auxk_alpha > 0:
            aux = self.dead_loss(x, out, dead, n_dead=n_dead)
            total = total + self.config.auxk_alpha * aux
        return Losses(total, reconstruction, penalty, aux)

    def dead_loss(self, x: Tensor, out: Output, dead: Tensor, *, n_dead: int | None = None) -> Tensor:
        """AuxK: let dead latents explain the residual (Gao et al. 2024, A.2, arxiv.org/abs/2406.04093).

        dead (F,) bool. The D/2 largest dead pre-activations of each token rebuild e = x - x_hat, which is held
        constant; b_dec is in x_hat already and is not added again. Returns error over residual energy, 0 when
        nothing is dead or nothing is left to explain; never NaN.
        """
        half = max(1, self.d_in // 2)
        k_aux = min(half, self.d_sae, half if n_dead is None else max(1, n_dead))
        masked = out.pre.detach().masked_fill(~dead, -torch.inf)
        indices = kernels.top_k(masked, k_aux)
        alive = masked.gather(1, indices).isfinite()
        pre = kernels.gather_pre(x - self.b_dec.detach(), self.W_enc, self._encoder_bias(), out.pre, indices)
        values = pre.relu() * alive
        residual = (x - out.x_hat).detach()
        error = (kernels.decode(indices, values, self.W_dec) - residual).square().sum()
        share = (dead.sum() / half).clamp(max=1.0)
        energy = (residual - residual.mean(0)).square().sum()
        return torch.where((share > 0) & (energy > 0), share * error / energy.clamp(min=1e-30), 0.0)

    def _encoder_bias(self) -> Tensor:
        return self.b_enc

    # ----------------------------------------------------------------------------------------------
    # the decoder's unit norm

    @torch.no_grad()
    def renormalize_(self) -> None:
        """Set every decoder row to unit norm, in place (after the step, when asked for by the config)."""
        if self.config.normalize_decoder is not False:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Drop the part of the decoder's gradient along each row, which renormalising would undo anyway."""
        grad = self.W_dec.grad
        if self.config.normalize_decoder is not False and grad is not None:
            along = (grad * self.W_dec).sum(1, keepdim=True)
            along = along / self.W_dec.square().sum(1, keepdim=True).clamp(min=1e-24)
            grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def scaled(self, scale: float) -> SAE:
        """A copy for raw activations of an SAE that was trained on `scale * x`: same latents times 1/scale."""
        copy = create_sae(self.config)
        copy.load_state_dict(self.state_dict())
        for name in ("b_dec", *self._scaled_biases()):
            getattr(copy, name).div_(scale)
        return copy.to(self.W_dec.device)

    def _scaled_biases(self) -> tuple[str, ...]:
        return ("b_enc",)

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise UserError(
                f"activations are {x.shape[-1]} wide and this SAE reads {self.d_in}; "
                "use the model and hookpoint it was trained on"
            )
        return x.reshape(-1, self.d_in).to(self.W_dec.dtype)

    def _decode(self, codes: Codes) -> Tensor:
        if codes.indices is None:
            return codes.values @ self.W_dec
        return kernels.decode(codes.indices, codes.values, self.W_dec)


class TopK(SAE):
    """The k largest pre-activations of a token, then ReLU, so fewer than k may be active (Gao et al. 2024, 2.3)."""

    uses_auxk = True

    def codes(self, x: Tensor) -> tuple[Codes, Tensor]:
        centred = x - self.b_dec
        with torch.no_grad():
            pre = torch.addmm(self.b_enc, centred, self.W_enc)
            indices = kernels.top_k(pre, self.config.k)
        values = kernels.gather_pre(centred, self.W_enc, self.b_enc, pre, indices).relu()
        return Codes(indices, values), pre


class ReLU(SAE):
    """ReLU latents, sparse through an L1 penalty weighted by decoder norms (Anthropic, April 2024 update)."""

    def codes(self, x: Tensor) -> tuple[Codes, Tensor]:
        pre = self.pre_activations(x)
        return Codes(None, pre.relu()), pre

    def penalty(self, out: Output) -> Tensor:
        return (out.codes.values @ self.W_dec.norm(dim=1)).mean()


class Gated(SAE):
    """A gate chooses latents, a magnitude path sizes them (Rajamanoharan et al. 2024, arxiv.org/abs/2404.16014).

    The gate is a step function without gradient; it learns through the penalty on relu(gate) and through the
    auxiliary reconstruction from relu(gate) with a frozen decoder, so both are part of the loss.
    """

    def _make_biases(self, F: int) -> None:
        self.b_gate = nn.Parameter(torch.zeros(F))
        self.b_mag = nn.Parameter(torch.zeros(F))
        self.r_mag = nn.Parameter(torch.zeros(F))

    def pre_activations(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b_gate, x - self.b_dec, self.W_enc)

    def codes(self, x: Tensor) -> tuple[Codes, Tensor]:
        projected = (x - self.b_dec) @ self.W_enc
        gate = projected + self.b_gate
        magnitude = (projected * self.r_mag.exp() + self.b_mag).relu()
        return Codes(None, magnitude * (gate > 0)), gate

    def penalty(self, out: Output) -> Tensor:
        return (out.pre.relu() @ self.W_dec.norm(dim=1)).mean()

    def extra(self, x: Tensor, out: Output) -> Tensor:
        # The decoder is held fixed here, or it would be bent towards the gate's unscaled values (eq. 8).
        x_hat = out.pre.relu() @ self.W_dec.detach() + self.b_dec.detach()
        return (x - x_hat).square().sum(-1).mean()

    def _encoder_bias(self) -> Tensor:
        return self.b_gate

    def _scaled_biases(self) -> tuple[str, ...]:
        return ("b_gate", "b_mag")


KINDS: dict[str, type[SAE]] = {"topk": TopK, "relu": ReLU, "gated": Gated}


def create_sae(config: SAEConfig, *, generator: torch.Generator | None = None) -> SAE:
    """A fresh SAE of the kind `config.activation`, on the CPU, float32; the generator draws its decoder rows."""
    if generator is None:
        generator = torch.Generator().manual_seed(config.seed)
    return KINDS[config.activation](config, generator=generator)
