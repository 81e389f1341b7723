"""What all SAEs share: parameters, decoding, the loss, transcoding. Pure: forward and loss count nothing, log nothing.

The kinds (models.py) say how latents are chosen, and add terms of their own to the loss.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sae.config import PENALISED, SAEConfig, UserError, require
from sae.distributed import ALONE, Axis, World
from sae.kernels import native, selection, sparse
from sae.kernels.sparse import Codes
from sae.schedules import n_latents, target_l0

Kind = TypeVar("Kind", bound="SAE")
CAPACITY = 4  # times its fair share of the k largest latents that a shard offers at first
SHARED = ("b_dec", "W_skip")  # of an SAE's tensors, those without an axis of latents; W_enc (D, F) has it last
LN_EPS = 1e-5  # added to the standard deviation, as OpenAI and SAELens do


class Output(NamedTuple):
    """What one forward gives: the reconstruction (B, D), the codes, and what these were chosen from, where the loss
    wants it: from kinds with a penalty the pre-activations at the same places, from multi-TopK the codes of 4k."""

    x_hat: Tensor
    codes: Codes
    source: Codes | None


class Losses(NamedTuple):
    """Scalars, graph attached to `total` = reconstruction + extra + weight * sparsity + auxk_alpha * aux; error is the
    mean of ||y - x_hat||^2, and reconstruction the same over the variance."""

    total: Tensor
    error: Tensor
    reconstruction: Tensor
    extra: Tensor
    sparsity: Tensor
    aux: Tensor


class Spare(NamedTuple):
    """Copies of the weights of some latents ids (n,), leaves of the graph of AuxK, so that its gradients cost n rows
    and not F: of the encoder (n, D) with biases (n,), and of the decoder (n, D_out). asked (n,) bool: the rest
    fill up."""

    ids: Tensor
    asked: Tensor
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    n_all: int  # in all processes


class SAE(nn.Module):
    """A sparse autoencoder: x_hat = f(x) @ W_dec + b_dec, with f sparse and computed from x - b_dec.

    Parameters keep the community's names and shapes: W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,). W_enc lies
    transposed in memory, which is the layout that both the product and the sparse backward want. A transcoder
    computes f from x itself and predicts another activation, D_out wide; with a skip, plus x @ W_skip^T, W_skip
    (D_out, D). Tied: W_enc is W_dec transposed.

    Of a world's processes along `latents` each holds the latents `own` and the codes of these; its reconstructions and
    losses are of all of them. They add up gradients of b_dec; all other gradients are whole.
    """

    uses_auxk = True  # whether AuxK can revive its dead latents: their pre-activations must not all be below 0
    unit_transcoder = False  # whether transcoders are better off with decoder rows of unit norm (dev/LOG.md)
    signed = False  # whether latents are chosen by size and keep their sign

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None, world: World = ALONE):
        super().__init__()
        require(config.d_in is not None, "d_in is not known; give SAEConfig(d_in=width of the activations)")
        # only what an SAE is: a TrainConfig's model, folders and so on stay with the run
        own = {f.name: getattr(config, f.name) for f in fields(SAEConfig)}
        self.config = SAEConfig(**{**own, "d_sae": n_latents(config), "d_out": config.d_out or config.d_in})
        self.world, self.own = world, world.latents.range(self.d_sae)
        self._check_shards()
        D, F = self.d_in, len(self.own)
        # Layer norm belongs to the forward of a finished SAE; while training, the Learner normalises.
        self.layer_norm = config.normalize_activations == "layer_norm"
        self.packed: native.Packed | None = None
        rows = own_rows(self.d_sae, D, self.own, generator)
        rows.div_(rows.norm(dim=1, keepdim=True))
        # Encoder = decoder transposed at the start: the cheapest cure for dead latents (Gao et al. 2024, A.1). A
        # transcoder's decoder starts at 0, since its rows live in another space (sparsify).
        self.W_dec = nn.Parameter(torch.zeros(F, self.d_out) if config.transcode else rows)
        if not config.tied:
            self.W_enc = nn.Parameter(rows.clone().t())
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

    def __getattr__(self, name: str) -> Any:
        if name == "W_enc" and self.config.tied:  # there is no parameter of that name
            return self.W_dec.t()
        return super().__getattr__(name)

    @property
    def independent(self) -> bool:
        """Whether a finished SAE's latents are chosen one by one, each by its own pre-activation."""
        return True

    @property
    def d_in(self) -> int:
        return self.config.d_in or 0

    @property
    def d_out(self) -> int:
        return self.config.d_out or self.d_in

    @property
    def d_sae(self) -> int:
        return n_latents(self.config)

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
        return self.codes(self._normalise(flat)[0] if self.layer_norm else flat)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction of dense latents: (..., F) -> (..., D); with layer norm, of the normalised activation."""
        return latents @ self.W_dec + self.b_dec

    def decode_codes(self, codes: Codes) -> Tensor:
        """Reconstruction of codes: (B, D)."""
        return self._times(codes, self.W_dec, self.b_dec)

    def _times(self, codes: Codes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """(B, D): codes @ W_dec + b_dec, of one row or of one for each token, over the latents of all shards."""
        shards = self.world.latents
        if shards.size == 1:
            return codes.times(W_dec, b_dec)
        return shards.sum(codes.times(W_dec, W_dec.new_zeros(W_dec.shape[1]))) + shards.share(b_dec)

    def pre_activations(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, F): the linear part of the encoder, before selection."""
        return torch.addmm(self._encoder_bias(), self._centre(x), self.W_enc)

    def forward(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> Output:
        """Reconstruct x (B, D), or predict a transcoder's output from it.

        k: latents to keep instead of config.k. whole: what `survey` said of the batch that x is a part of.
        """
        x = self._flat(x)
        inner, mean, std = self._normalise(x) if self.layer_norm else (x, None, None)
        codes, source = self.codes(inner, k=k, whole=whole)
        x_hat = self._predict(inner, codes)
        return Output(x_hat if std is None or mean is None else x_hat * std + mean, codes, source)

    def unit(self, x: Tensor) -> Tensor | None:
        """(B, 1): what a unit of the decoder's output is worth at each token of x (B, D); None for 1 everywhere."""
        return self._normalise(self._flat(x))[2] if self.layer_norm else None

    def reconstruct_from(self, codes: Codes, x: Tensor) -> Tensor:
        """What forward gives for x (B, D), from its codes, without encoding it again."""
        if not self.layer_norm:
            return self._predict(x, codes)
        inner, mean, std = self._normalise(x)
        return self._predict(inner, codes) * std + mean

    # ----------------------------------------------------------------------------------------------
    # what a kind defines

    def codes(self, x: Tensor, *, k: int | None = None, whole: Tensor | None = None) -> tuple[Codes, Codes | None]:
        """Codes of x (B, D), and what they were chosen from (Output.source)."""
        raise NotImplementedError

    def penalty(self, out: Output, *, p: float = 1.0, whole: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The sparsity term before its weight, a scalar, for activations of unit variance per dimension."""
        return out.x_hat.new_zeros(())

    def extra(self, x: Tensor, y: Tensor, out: Output) -> Tensor:  # noqa: ARG002
        """Further squared error, in the units of the reconstruction's; a scalar."""
        return out.x_hat.new_zeros(())

    def survey(self, parts: list[Tensor], k: int | None = None, n_tokens: int | None = None) -> Tensor | None:  # noqa: ARG002
        """What a part of a batch must know of the whole to be treated alike; None where tokens are independent.

        parts: this process's tokens. n_tokens: of all processes (default: of parts).
        """
        return None

    def raise_threshold_(self, by: Tensor | float) -> None:
        """Make all latents harder (by > 0) or easier to activate, at once; kinds with a penalty have a way."""

    def revive_(self, dead: Tensor) -> None:
        """Make dead latents (F,) bool a little easier to activate, once per step; kinds with thresholds have a way."""

    def observe_(self, out: Output, step: int, whole: Tensor | None = None) -> None:
        """Move what follows training without a gradient, after a step."""

    # ----------------------------------------------------------------------------------------------
    # the loss, shared by all kinds

    def loss(
        self, x: Tensor, out: Output, *, variance: float | Tensor, y: Tensor | None = None, recon_weight: float = 1.0,
        sparsity: float | Tensor = 0.0, p: float = 1.0, dead: Tensor | None = None,
        residual: float | Tensor | None = None, whole: Tensor | None = None, spare: Spare | None = None,
    ) -> Losses:  # fmt: skip
        """Means over the tokens of x (B, D), so that averaging micro-batches gives the whole batch's gradient.

        y: a transcoder's target (B, D_out). variance: mean ||y - mean y||^2, which makes the reconstruction loss a
        fraction of variance unexplained and keeps one sparsity weight good at every scale; p: exponent of the L1
        penalty. dead (F,) bool switches AuxK on; spare, if given, holds those latents, and their gradients of it;
        residual: mean ||y - x_hat||^2 that AuxK is measured against (default: this batch's); whole: what `survey` said
        of the batch that x is a part of.
        """
        target = x if y is None else y
        wrong = out.x_hat - target
        error = sparse.square_norms(wrong).mean()
        reconstruction = error / variance
        extra = self.extra(x, target, out) / variance
        penalty = self.penalty(out, p=p, whole=whole)
        aux = out.x_hat.new_zeros(())
        total = recon_weight * (reconstruction + extra) + sparsity * penalty
        if dead is not None and self.uses_auxk and self.config.auxk_alpha > 0:
            aux = self.dead_loss(x, wrong.detach(), dead, residual=residual, spare=spare)
            total = total + self.config.auxk_alpha * aux
        return Losses(total, error, reconstruction, extra, penalty, aux)

    def dead_loss(
        self, x: Tensor, wrong: Tensor, dead: Tensor, *, residual: float | Tensor | None = None,
        spare: Spare | None = None,
    ) -> Tensor:  # fmt: skip
        """AuxK: let dead latents explain the residual (Gao et al. 2024, A.2, arxiv.org/abs/2406.04093).

        wrong (B, D_out): x_hat - y, held constant. dead (F,) bool: the k largest dead pre-activations of each token are
        to make up for it; b_dec is in x_hat already and is not added again. (Of D/2, as there, each learns a little of
        everything and wins nowhere: dev/LOG.md.) Returns error over residual energy, 0 when nothing is dead or nothing
        is left to explain; never NaN.
        """
        k, shards = min(self.config.k, self.d_sae), self.world.latents
        if spare is None:
            spare = self.weights_of(dead, max(1, int(dead.sum())), int(shards.sum_(dead.sum())))
        ids, asked, encoder, bias, decoder, n_all = spare
        centred = self._held_centre(x)
        some = max(1, min(k, n_all // 32))  # of few, a token takes fewer: more would learn no more (dev/LOG.md)
        indices, values, offsets = self._largest(centred, encoder.t(), bias, some, asked)
        pre = sparse.gather_pre(centred, encoder.t(), bias, values, indices, offsets)
        values = (pre if self.signed else pre.relu()) * dead[ids][indices]
        error = sparse.square_norms(self._times(Codes(indices, values, offsets), decoder, wrong)).mean()
        share = (shards.sum_(dead.sum()) / k).clamp(max=1.0)
        energy = sparse.square_norms(wrong).mean() if residual is None else torch.as_tensor(residual, device=x.device)
        return torch.where((share > 0) & (energy > 0), share * error / energy.clamp(min=1e-30), 0.0)

    def weights_of(self, latents: Tensor, n: int, n_all: int) -> Spare:
        """Those of the latents marked (F,) bool; of n, whether or not that is how many are marked. n_all: in all
        processes."""
        ids = latents.to(torch.uint8).topk(min(n, len(latents))).indices
        rows = self.W_enc.t()[ids], self._encoder_bias()[ids], self.W_dec[ids]
        return Spare(ids, latents[ids], *rows, min(n_all, self.d_sae))

    @torch.no_grad()
    def add_gradients_(self, spare: Spare) -> None:
        """Add the gradients of AuxK's copies of weights to those of the weights themselves, after all backwards."""
        W_dec, b_enc = self.W_dec.grad, self._encoder_bias().grad
        W_enc = W_dec if self.config.tied else self.W_enc.grad
        assert W_dec is not None and W_enc is not None and b_enc is not None  # the reconstruction reaches all of them
        rows_in = W_dec if self.config.tied else W_enc.t()
        for grad, rows in ((W_dec, spare.decoder), (rows_in, spare.encoder), (b_enc, spare.bias)):
            if rows.grad is not None:
                grad.index_add_(0, spare.ids, rows.grad)

    def _encoder_bias(self) -> Tensor:
        return self.b_enc

    @torch.no_grad()
    def _largest(
        self, x: Tensor, W: Tensor, b: Tensor, k: int, allowed: Tensor | None = None,
        packed: native.Packed | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Of the k largest pre-activations x @ W + b of each token, over all shards, those here: indices, values, and
        offsets where tokens have different numbers of them. allowed: which of the latents other shards' lose to.

        A shard offers CAPACITY times its fair share; where all of these were chosen for a token it may have had more to
        offer, and offers k.
        """
        shards = self.world.latents
        if shards.size == 1:
            return *selection.choose_top_k(x, W, b, min(k, len(b)), absolute=self.signed, packed=packed), None
        for room in sorted({min(k, -(-CAPACITY * k // shards.size)), k}):
            indices, values = selection.choose_top_k(x, W, b, min(room, len(b)), absolute=self.signed)
            size = values.abs() if self.signed else values
            if allowed is not None:
                size = size.masked_fill(~allowed[indices], -torch.inf)
            size = torch.nn.functional.pad(size, (0, room - size.shape[1]), value=-torch.inf)
            offered = shards.gather(size).transpose(0, 1)  # (B, S, room)
            best = offered.flatten(1).topk(min(k, offered[0].numel()), sorted=False).indices
            chosen = torch.zeros_like(offered, dtype=torch.bool).flatten(1).scatter_(1, best, True).view(offered.shape)
            if room == k or not bool(chosen.all(-1).any()):
                break
        here = chosen[:, shards.rank, : values.shape[1]]
        n = here.sum(1)
        return indices[here], values[here], n.cumsum(0) - n

    # ----------------------------------------------------------------------------------------------
    # start, unit norm, scale

    @torch.no_grad()
    def start_from_(self, x: Tensor, y: Tensor, n_tokens: int | None = None) -> None:
        """Set what is best known from data, before the first step: x (M, D) goes in, y (M, D_out) comes out.

        n_tokens: the number of rows where n processes along `data` have every n-th each.
        """
        data, team = self.world.data, self.world.team
        if self.config.b_dec_init != "zeros":
            self.b_dec.copy_(data.mean(y) if self.config.b_dec_init == "mean" else geometric_median(y, data))
        if self.config.transcode:  # latents see x around its mean, as an SAE's do
            self._shift_biases_(-data.mean(x) @ self.W_enc)
        n_rows = min(4096, len(x) if n_tokens is None else n_tokens)
        part = x[: len(range(data.rank, n_rows, data.size))]
        target = target_l0(self.config)
        if target is not None:  # begin as sparse as asked: latents that begin dense mostly die on the way down
            n = min(self.d_sae * n_rows, max(1, round(n_rows * target)))
            passing = self.pre_activations(part).flatten()
            self.raise_threshold_(team.kth_largest(passing, n).clamp(min=0))
        elif self._finds_its_length:
            self.train()
            x_hat = self(part, whole=self.survey([part], n_tokens=n_rows) if team.size > 1 else None).x_hat - self.b_dec
            sums = data.sum_(torch.stack([(x_hat * (part - self.b_dec)).sum(), x_hat.square().sum()]))
            if sums.min() > 0:
                self.W_enc.mul_(sums[0] / sums[1])

    @property
    def _finds_its_length(self) -> bool:
        c = self.config
        return c.scale_encoder and c.activation not in PENALISED and not c.tied and not c.transcode

    def part_of(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the tensors of a whole SAE those parts whose latents this process holds."""
        own = slice(self.own.start, self.own.stop)
        return {n: x if n in SHARED else x[:, own] if n == "W_enc" else x[own] for n, x in whole.items()}

    def _shift_biases_(self, by: Tensor) -> None:
        self.b_enc.add_(by)

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
    def scaled(self: Kind, scale: float, scale_out: float | None = None) -> Kind:
        """A copy for raw activations of an SAE trained on scale * x (and, a transcoder, scale_out * y): same latents
        times 1/scale, same predictions times 1/scale_out."""
        scale_out = scale if scale_out is None else scale_out
        copy = deepcopy(self)
        copy.b_dec.div_(scale_out)
        if self.config.transcode:
            copy.W_dec.mul_(scale / scale_out)
            if self.config.skip_connection:
                copy.W_skip.mul_(scale / scale_out)
        for name in self._scaled_biases():
            getattr(copy, name).div_(scale)
        return copy.train(self.training)

    @torch.no_grad()
    def part(self: Kind, latents: Tensor) -> Kind:
        """A finished SAE of these latents (W,) alone, in their order: its encode gives theirs, at their cost.

        Only of SAEs whose latents are independent.
        """
        assert self.independent, "latents that compete need all the others"
        part = type(self)(replace(self.config, d_sae=len(latents), k=1))
        whole = ("b_dec", "W_skip")
        cut = lambda name, p: p if name in whole else p[:, latents] if name == "W_enc" else p[latents]
        part.load_state_dict({name: cut(name, p) for name, p in self.state_dict().items()}, assign=True)
        part.layer_norm = self.layer_norm
        return part.eval().requires_grad_(False)

    def pack_(self: Kind) -> Kind:
        """Keep an 8-bit copy of the encoder beside it, which finds the latents of a few tokens in a quarter of the time
        and to the same result. For finished SAEs: training drops it, other weights make it useless until packed again.
        """
        self.packed = native.pack(self.W_enc)
        return self

    def train(self: Kind, mode: bool = True) -> Kind:
        self.packed = None if mode else self.packed
        return super().train(mode)

    def _scaled_biases(self) -> tuple[str, ...]:
        return ("b_enc",)

    @property
    def _centre_of_inputs(self) -> Tensor | None:
        return None if self.config.transcode else self.b_dec

    def _centre(self, x: Tensor) -> Tensor:
        return x if self.config.transcode else x - self.b_dec

    def _held_centre(self, x: Tensor) -> Tensor:
        """The same with the centre held constant: gather_pre knows its gradient."""
        return x if self.config.transcode else x - self.b_dec.detach()

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return layer_norm(x)

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise UserError(
                f"activations are {x.shape[-1]} wide and this SAE reads {self.d_in}; "
                "use the model and hookpoint it was trained on"
            )
        return x.reshape(-1, self.d_in).to(self.W_dec.dtype)

    def _predict(self, x: Tensor, codes: Codes) -> Tensor:
        x_hat = self.decode_codes(codes)
        return x_hat + x @ self.W_skip.t() if self.config.skip_connection else x_hat


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised x, mean, std + eps), each per token; the unbiased std, as OpenAI and SAELens take it."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + LN_EPS
    return (x - mean) / std, mean, std


def own_rows(n: int, d: int, own: range, generator: torch.Generator | None) -> Tensor:
    """Rows `own` of torch.randn(n, d), and the generator as after drawing all of them; no others are kept."""
    if len(own) == n:
        return torch.randn(n, d, generator=generator)
    starts = range(0, max(1, n - 1023), 1024)  # torch draws otherwise where it draws few: the last block is the longest
    kept = []
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        block = torch.randn(stop - start, d, generator=generator)
        kept.append(block[max(0, own.start - start) : max(0, own.stop - start)].clone())
    return torch.cat(kept)


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
