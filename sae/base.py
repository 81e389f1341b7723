"""What all SAEs share: parameters, encoding, decoding, the loss, transcoding. Pure: nothing here counts or logs.

The kinds (models.py) say how latents are chosen, and add terms of their own to the loss.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sae.config import KINDS, SAEConfig, UserError, require
from sae.distributed import ALONE, World, largest_of_shards, own_rows
from sae.kernels import native, selection, sparse
from sae.kernels.sparse import Codes
from sae.schedules import n_latents

Self = TypeVar("Self", bound="SAE")
SHARED = ("b_dec", "W_skip")  # an SAE's tensors without an axis of latents; all others have it first
LN_EPS = 1e-5  # added to the standard deviation, as OpenAI and SAELens do


class Output(NamedTuple):
    """One forward: the reconstruction (B, D), the codes, and the codes that the loss needs beside them: the
    pre-activations at the same places (kinds with a penalty), or the codes of 4k latents (multi-TopK)."""

    x_hat: Tensor
    codes: Codes
    source: Codes | None


class Losses(NamedTuple):
    """Scalars; `total` = reconstruction + extra + weight * sparsity (+ auxk_alpha * aux) has the graph. error is the
    mean of ||y - x_hat||^2, reconstruction the same over the variance."""

    total: Tensor
    error: Tensor
    reconstruction: Tensor
    extra: Tensor
    sparsity: Tensor
    aux: Tensor


class SAE(nn.Module):
    """A sparse autoencoder: x_hat = f(x) @ W_dec + b_dec, with f sparse and computed from x - b_dec.

    Tensors have the community's names and shapes: W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,). The parameter
    behind W_enc is `encoder` (F, D), the layout that both the product and the sparse backward want; state_dict speaks
    of W_enc. A transcoder computes f from x itself and predicts another activation, D_out wide; with a skip, plus
    x @ W_skip^T, W_skip (D_out, D). Tied: W_enc is W_dec transposed.

    Each of a world's processes along `latents` holds the latents `own` and their codes; reconstructions and losses are
    of all latents. The gradients of b_dec must be summed over these processes; all other gradients are whole.

    Class attributes are the facts that settings and other files need of a kind. A subclass registers itself under the
    name that --activation takes: class TopK(SAE, kind="topk").
    """

    penalised: ClassVar[bool] = False  # sparse through a penalty; the other kinds keep k latents by selection
    flags: ClassVar[frozenset[str]] = frozenset()  # settings that do something for this kind, and not for every kind
    saelens: ClassVar[str | None] = None  # the architecture that SAELens opens it as; None: it has none
    n_biases: ClassVar[int] = 1  # vectors (F,) with a gradient
    l1_start: ClassVar[float] = 0.0  # weight of the penalty that the controller starts from
    firings_to_die: ClassVar[int] = 16  # firings that an average latent has in the time after which one is dead
    uses_auxk: ClassVar[bool] = True  # whether AuxK can revive a dead latent: its pre-activations must not all be < 0
    unit_transcoder: ClassVar[bool] = False  # whether a transcoder needs decoder rows of unit norm (dev/LOG.md)
    signed: ClassVar[bool] = False  # whether latents are chosen by size and keep their sign

    def __init_subclass__(cls, *, kind: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        if kind is not None:
            KINDS[kind] = cls

    @classmethod
    def check(cls, c: SAEConfig) -> None:
        """Raise UserError for settings that this kind cannot have, beside those that config.py knows."""

    @classmethod
    def needs_batch(cls, c: SAEConfig) -> bool:  # noqa: ARG003
        """Whether training chooses or weighs latents over the whole batch, not token by token."""
        return False

    @classmethod
    def saved_as(cls, c: SAEConfig) -> str:
        """SAELens's name of the architecture, or our own where it has none."""
        return cls.saelens or c.activation

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None, world: World = ALONE):
        super().__init__()
        require(config.d_in is not None, "d_in is not known; give SAEConfig(d_in=width of the activations)")
        # only what an SAE is: a TrainConfig's model, folders and so on stay with the run
        own = {f.name: getattr(config, f.name) for f in fields(SAEConfig)}
        D = self.d_in = config.d_in or 0
        self.d_out, self.d_sae = config.d_out or D, n_latents(config)
        self.config = SAEConfig(**{**own, "d_sae": self.d_sae, "d_out": self.d_out})
        self.world, self.own = world, world.latents.range(self.d_sae)
        self._check_shards()
        F = len(self.own)
        # Layer norm belongs to the forward of a finished SAE; while training, the Learner normalises.
        self.layer_norm = config.normalize_activations == "layer_norm"
        self.packed: native.Packed | None = None
        rows = own_rows(self.d_sae, D, self.own, generator)
        rows.div_(rows.norm(dim=1, keepdim=True))
        # Encoder = decoder transposed at the start: the cheapest cure for dead latents (Gao et al. 2024, A.1). A
        # transcoder's decoder starts at 0, since its rows live in another space (sparsify).
        self.W_dec = nn.Parameter(torch.zeros(F, self.d_out) if config.transcode else rows)
        if not config.tied:
            self.encoder = nn.Parameter(rows.clone())
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        if config.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(self.d_out, D))
        self._make_biases(F)

    def _check_shards(self) -> None:
        """Raise UserError where the latents cannot be divided as the world asks."""
        n = self.world.latents.size
        require(self.d_sae % n == 0, f"d_sae={self.d_sae} is no multiple of --shard_latents {n}; choose another")

    def _make_biases(self, F: int) -> None:
        self.b_enc = nn.Parameter(torch.zeros(F))

    @property
    def W_enc(self) -> Tensor:
        """(D, F), a view of the encoder's rows."""
        return self.encoder_rows.t()

    @property
    def encoder_rows(self) -> nn.Parameter:
        """(F, D): the parameter that holds the encoder; W_dec when tied."""
        return self.W_dec if self.config.tied else self.encoder

    @property
    def independent(self) -> bool:
        """Whether a finished SAE chooses each latent by its own pre-activation: it has thresholds."""
        return self.penalised or self.needs_batch(self.config)

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows are kept at unit norm: as asked, else of SAEs, and of transcoders that need it."""
        asked = self.config.normalize_decoder
        return asked if asked is not None else not self.config.transcode or self.unit_transcoder

    # ----------------------------------------------------------------------------------------------
    # what a user calls

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations: (..., D) -> (..., F), zero where a latent is not active."""
        return self.encode_codes(x).dense(len(self.own)).view(*x.shape[:-1], len(self.own))

    def encode_sparse(self, x: Tensor) -> Codes:
        """The same as `encode` without the zeros: (B, D) -> Codes of (B, K)."""
        return self.encode_codes(x).sparse(len(self.own))

    def encode_codes(self, x: Tensor) -> Codes:
        """The same as `encode` in whatever form the kind finds them: (..., D) -> Codes of all tokens."""
        flat = self._flat(x)
        return self.codes(layer_norm(flat)[0] if self.layer_norm else flat)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction of dense latents: (..., F) -> (..., D); with layer norm, of the normalised activation."""
        return latents @ self.W_dec + self.b_dec

    def decode_codes(self, codes: Codes) -> Tensor:
        """Reconstruction of codes: (B, D)."""
        return self.times(codes, self.W_dec, self.b_dec)

    def times(self, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """(B, D): codes @ W_dec + b_dec, of one row or of one for each token, over the latents of all shards."""
        shards = self.world.latents
        if shards.size == 1:
            return codes.times(W_dec, b_dec)
        return shards.sum(codes.times(W_dec, W_dec.new_zeros(W_dec.shape[1]))) + shards.share(b_dec)

    def pre_activations(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, F): the linear part of the encoder, before selection."""
        return torch.addmm(self.encoder_bias, self.centred(x), self.W_enc)

    def forward(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> Output:
        """Reconstruct x (B, D), or predict a transcoder's output from it.

        k: latents to keep instead of config.k. whole: the result of `survey` for the batch that x is a part of.
        """
        x = self._flat(x)
        codes, source = self.codes(layer_norm(x)[0] if self.layer_norm else x, k=k, whole=whole)
        return Output(self.reconstruct_from(codes, x), codes, source)

    def unit(self, x: Tensor) -> Tensor | None:
        """(B, 1): the size of a unit of the decoder's output at each token of x (B, D); None for 1 everywhere."""
        return layer_norm(self._flat(x))[2] if self.layer_norm else None

    def reconstruct_from(self, codes: Codes, x: Tensor) -> Tensor:
        """The output of forward for x (B, D), from its codes, without encoding it again."""
        if not self.layer_norm:
            return self.predict(x, codes)
        inner, mean, std = layer_norm(x)
        return self.predict(inner, codes) * std + mean

    # ----------------------------------------------------------------------------------------------
    # what a kind defines

    def codes(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> tuple[Codes, Codes | None]:
        """Codes of x (B, D), and Output.source."""
        raise NotImplementedError

    def penalty(self, out: Output, *, p: float = 1.0, whole: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The sparsity term before its weight, a scalar, for activations of unit variance per dimension."""
        return out.x_hat.new_zeros(())

    def extra(self, x: Tensor, y: Tensor, out: Output) -> Tensor:  # noqa: ARG002
        """Further squared error, in the units of the reconstruction's; a scalar."""
        return out.x_hat.new_zeros(())

    def survey(self, parts: list[Tensor], k: int | None = None, n_tokens: int | None = None) -> Tensor | None:  # noqa: ARG002
        """The statistic of a whole batch that makes its parts be treated alike; None where tokens are independent.

        parts: this process's tokens. n_tokens: of all processes (default: of parts).
        """
        return None

    def raise_threshold_(self, by: Tensor | float) -> None:
        """Make all latents harder (by > 0) or easier to activate, at once (kinds with a penalty)."""

    def revive_(self, dead: Tensor) -> None:
        """Make dead latents (F,) bool a little easier to activate, once per step (kinds with thresholds)."""

    def observe_(self, out: Output, step: int, whole: Tensor | None = None) -> None:
        """Move tensors that follow training without a gradient, after a step."""

    @property
    def encoder_bias(self) -> Tensor:
        """(F,): the bias of the pre-activations."""
        return self.b_enc

    scaled_biases: ClassVar[tuple[str, ...]] = ("b_enc",)  # the vectors that scale with the activations

    def shift_biases_(self, by: Tensor) -> None:
        self.b_enc.add_(by)

    # ----------------------------------------------------------------------------------------------
    # the loss, shared by all kinds

    def loss(
        self, x: Tensor, out: Output, *, variance: float | Tensor, y: Tensor | None = None,
        recon_weight: float = 1.0, sparsity: float | Tensor = 0.0, p: float = 1.0, whole: Tensor | None = None,
    ) -> Losses:  # fmt: skip
        """Means over the tokens of x (B, D), so that averaging micro-batches gives the whole batch's gradient.

        y: a transcoder's target (B, D_out). variance: mean ||y - mean y||^2, which makes the reconstruction loss a
        fraction of variance unexplained and keeps one sparsity weight good at every scale. p: exponent of the L1
        penalty. whole: as in `forward`. AuxK (dead.py) is added by the Learner.
        """
        target = x if y is None else y
        error = sparse.square_norms(out.x_hat - target).mean()
        reconstruction = error / variance
        extra = self.extra(x, target, out) / variance
        penalty = self.penalty(out, p=p, whole=whole)
        total = recon_weight * (reconstruction + extra) + sparsity * penalty
        return Losses(total, error, reconstruction, extra, penalty, out.x_hat.new_zeros(()))

    @torch.no_grad()
    def largest(
        self, x: Tensor, W: Tensor, b: Tensor, k: int, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the k largest pre-activations x @ W + b of each token, over all shards, those here: indices, values, and
        offsets where tokens have different numbers of them. allowed: the latents that may win against other shards'."""
        packed = self.packed if allowed is None else None
        offer = lambda room, packed=None: selection.choose_top_k(
            x, W, b, min(room, len(b)), absolute=self.signed, packed=packed
        )
        if self.world.latents.size == 1:
            return *offer(k, packed), None
        return largest_of_shards(self.world.latents, offer, k, absolute=self.signed, allowed=allowed)

    # ----------------------------------------------------------------------------------------------
    # unit norm, scale, parts

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, detached, by their own names: latents are the first axis, but of those in SHARED."""
        return {name: x.detach() for name, x in (*self.named_parameters(), *self.named_buffers())}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.config.tied:
            destination[f"{prefix}W_enc"] = destination.pop(f"{prefix}encoder").t()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if not self.config.tied and f"{prefix}W_enc" in state_dict:
            state_dict[f"{prefix}encoder"] = state_dict.pop(f"{prefix}W_enc").t()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def take_(self, tensors: dict[str, Tensor]) -> None:
        """Copy in the values of `tensors()` of an SAE of the same shape, or of a whole one whose part this is."""
        own = slice(self.own.start, self.own.stop)
        for name, mine in self.tensors().items():
            mine.copy_(tensors[name] if len(tensors[name]) == len(mine) else tensors[name][own])

    @torch.no_grad()
    def renormalize_(self) -> Tensor | None:
        """Set every decoder row to unit norm, in place, if the config wants it; the factors (F, 1) it took."""
        return sparse.unit_rows_(self.W_dec) if self.unit_decoder else None

    @torch.no_grad()
    def project_gradient_(self) -> None:
        """Drop the part of the decoder's gradient along each row, which renormalising would undo anyway."""
        if self.unit_decoder and self.W_dec.grad is not None:
            sparse.project_rows_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def scaled(self: Self, scale: float, scale_out: float | None = None) -> Self:
        """A copy for raw activations of an SAE trained on scale * x (and, a transcoder, scale_out * y): same latents
        times 1/scale, same predictions times 1/scale_out."""
        scale_out = scale if scale_out is None else scale_out
        copy = deepcopy(self)
        copy.b_dec.div_(scale_out)
        if self.config.transcode:
            copy.W_dec.mul_(scale / scale_out)
            if self.config.skip_connection:
                copy.W_skip.mul_(scale / scale_out)
        for name in self.scaled_biases:
            getattr(copy, name).div_(scale)
        return copy.train(self.training)

    @torch.no_grad()
    def part(self: Self, latents: Tensor) -> Self:
        """A finished SAE of these latents (W,) alone, in their order: its encode gives theirs, at their cost.

        Only of SAEs whose latents are independent.
        """
        assert self.independent, "latents that compete need all the others"
        part = type(self)(replace(self.config, d_sae=len(latents), k=1))
        part.take_({name: x if name in SHARED else x[latents] for name, x in self.tensors().items()})
        part.layer_norm = self.layer_norm
        return part.eval().requires_grad_(False)

    def pack_(self: Self) -> Self:
        """Keep an 8-bit copy of the encoder beside it, which finds the latents of a few tokens in a quarter of the time
        and to the same result. For finished SAEs: training drops it, other weights make it useless until packed again.
        """
        self.packed = native.pack(self.W_enc)
        return self

    def train(self: Self, mode: bool = True) -> Self:
        self.packed = None if mode else self.packed
        return super().train(mode)

    @property
    def centre(self) -> Tensor | None:
        """(D,): the point that x is encoded around; None for a transcoder, which encodes x itself."""
        return None if self.config.transcode else self.b_dec

    def centred(self, x: Tensor, *, held: bool = False) -> Tensor:
        """x around the centre; held: without a graph, since gather_pre knows the centre's gradient."""
        return x if self.config.transcode else x - (self.b_dec.detach() if held else self.b_dec)

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise UserError(
                f"activations are {x.shape[-1]} wide and this SAE reads {self.d_in}; "
                "use the model and hookpoint it was trained on"
            )
        return x.reshape(-1, self.d_in).to(self.W_dec.dtype)

    def predict(self, x: Tensor, codes: Codes) -> Tensor:
        """(B, D_out): the output for inputs x (B, D) with these codes."""
        x_hat = self.decode_codes(codes)
        return x_hat + x @ self.W_skip.t() if self.config.skip_connection else x_hat


@torch.no_grad()
def reconstruct(sae: SAE, x: Tensor, *, scale: float = 1.0, batch_size: int = 4096) -> Iterator[tuple[Tensor, Output]]:
    """(scale * x, forward) in batches of rows, in eval mode and leaving the mode as it was."""
    was_training = sae.training
    sae.eval()
    try:
        for rows in x.split(batch_size):
            rows = rows.to(sae.W_dec.device, sae.W_dec.dtype) * scale
            yield rows, sae(rows)
    finally:
        sae.train(was_training)


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised x, mean, std + eps), each per token; the unbiased std, as OpenAI and SAELens take it."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + LN_EPS
    return (x - mean) / std, mean, std
