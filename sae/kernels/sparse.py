"""Sparse encode and decode of selected latents (selection.py), forward and backward: tensors in, tensors out.

Each operation has a plain twin (`*_reference`) that defines it in dense autograd; tests compare the two.
Only the K kept latents of a token take part in the backward pass: no (B, F) gradient and no (B*K, D) tensor is made.
On CPUs, float32 goes through native.cpp where it can be compiled (native.py); on CUDA, float32 and bfloat16 go
through triton_kernels.py and triton_encoder.py where Triton is installed.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from sae.kernels import native

Pair = tuple[Tensor, Tensor]
interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels then run on CPUs too, slowly


def compiled(*tensors: Tensor) -> Any:
    """The compiled operations if they can take these tensors: Triton's on CUDA, C++ on CPUs; else None."""
    if tensors[0].device.type != "cuda" and not interpreted:
        return native.ops(*tensors)
    return _triton().ops(*tensors) if native.enabled and _triton() else None


def encoder(x: Tensor, *tensors: Tensor) -> Any:
    """The compiled encoder if it can take these tensors, and if there are enough tokens in x to pay for rounding all
    latents; else None. On CPUs it needs AVX2 or better."""
    ops = compiled(x, *tensors) if len(x) >= 32 else None
    if ops is not None and ops is _triton():
        from sae.kernels import triton_encoder

        return triton_encoder
    return ops if hasattr(ops, "encode_top_k") else None


@functools.cache
def _triton() -> Any:
    try:
        from sae.kernels import triton_kernels
    except ImportError:  # not all builds of torch come with it
        return None
    return triton_kernels


@contextlib.contextmanager
def using(kernels: str) -> Iterator[None]:
    """Within the block, "plain" turns off compiled kernels in all of this process, since autograd has threads of its
    own; "auto" changes nothing."""
    before = native.enabled
    native.enabled = before and kernels == "auto"
    try:
        yield
    finally:
        native.enabled = before


def status(device: torch.device) -> str:
    """The kernels that run on this device, in words."""
    if device.type != "cuda" and not interpreted:
        return native.status() if device.type == "cpu" else "plain torch"
    if not native.enabled:
        return "plain torch, as asked"
    if _triton() is None:
        return "plain torch, several times slower than Triton's, which are missing: pip install triton"
    return f"Triton {_triton().triton.__version__}"


class Codes(NamedTuple):
    """Latent activations, sparse where `indices` is given.

    indices (B, K) int64 and values (B, K): latent `indices[b, j]` of token b has activation `values[b, j]`; a value of
    0 means "not active" and its index is meaningless. With offsets (B,), the number of latents differs by token:
    indices and values are flat (n,), and token b's begin at offsets[b]. With indices None, values is the dense (B, F).
    """

    indices: Tensor | None
    values: Tensor
    offsets: Tensor | None = None

    def dense(self, n_latents: int) -> Tensor:
        """(B, F)."""
        if self.indices is None:
            return self.values
        if self.offsets is None:
            zeros = self.values.new_zeros(len(self.values), n_latents)
            return zeros.scatter_add(1, self.indices, self.values)
        zeros = self.values.new_zeros(len(self.offsets), n_latents)
        return zeros.index_put((rows_of(self.indices, self.offsets), self.indices), self.values, accumulate=True)

    def activity(self, n_latents: int) -> Pair:
        """How many latents are active on each token (B,), and on how many tokens each latent is active (F,); int64."""
        if self.indices is not None and (ops := compiled(self.values)):
            return ops.activity(self.indices.contiguous(), self.offsets, self.values.contiguous(), n_latents)
        active = self.values != 0
        if self.indices is None:
            return active.sum(-1), active.sum(0)
        starts = self.offsets
        l0 = active.sum(-1) if starts is None else count(rows_of(self.indices, starts), len(starts), active)
        return l0, count(self.indices, n_latents, active)

    def each(self, of_latents: Tensor) -> Tensor:
        """The number of each value's latent, from numbers (F,); for dense values these broadcast."""
        return of_latents if self.indices is None else of_latents[self.indices]

    def times(self, W: Tensor, bias: Tensor) -> Tensor:
        """(B, D): the values times the rows of W (F, D), plus bias (D,) or (B, D)."""
        if self.indices is None:
            return self.values @ W + bias
        return decode(self.indices, self.values, W, self.offsets, bias=bias)

    def at(self, latents: Tensor, n_latents: int) -> Tensor:
        """(B, W): the activations of these latents (W,)."""
        if self.indices is None:
            return self.values[:, latents]
        if self.offsets is not None:
            return self.dense(n_latents)[:, latents]
        places = torch.arange(len(latents), device=latents.device)
        column = latents.new_full((n_latents,), len(latents)).scatter(0, latents, places)
        found = self.values.new_zeros(len(self.values), len(latents) + 1)
        return found.scatter_add_(1, column[self.indices], self.values)[:, :-1]

    def strongest(self, k: int) -> Codes:
        """The same codes with at most the k largest in size of each token, in no particular order: (B, k or fewer).
        Does not read the device."""
        if self.offsets is None and self.indices is not None and self.values.shape[1] <= k:
            return self
        if self.offsets is None or self.indices is None:
            best = self.values.abs().topk(min(k, self.values.shape[1]), dim=1, sorted=False).indices
            return Codes(best if self.indices is None else self.indices.gather(1, best), self.values.gather(1, best))
        if len(self.offsets) == 1:  # a chat's newest token: all codes are of this one
            one = Codes(self.indices[None], self.values[None]).strongest(k)
            assert one.indices is not None
            missing = (0, k - one.values.shape[1])
            return Codes(F.pad(one.indices, missing), F.pad(one.values, missing))
        rows = rows_of(self.indices, self.offsets)
        order = self.values.abs().argsort(descending=True)
        order = order[rows[order].argsort(stable=True)]  # token by token, strongest first
        rank = torch.arange(len(order), device=order.device) - self.offsets[rows[order]]
        place = (rows[order], rank.clamp(max=k))  # the last column takes the rest, and is dropped
        put = lambda x: x.new_zeros(len(self.offsets), k + 1).index_put(place, x[order])[:, :k]
        return Codes(put(self.indices), put(self.values))

    def sparse(self, n_latents: int = 0) -> Codes:
        """The same codes as (B, K), with K the most that any token has. Reads the device unless they are (B, K)
        already."""
        if self.indices is not None and self.offsets is None:
            return self
        dense = self.dense(n_latents)
        width = max(1, int((dense != 0).sum(-1).max())) if len(dense) else 1
        indices = dense.abs().topk(width, dim=-1).indices
        return Codes(indices, dense.gather(1, indices))


def rows_of(indices: Tensor, offsets: Tensor) -> Tensor:
    """(n,) int64: the token of each flat place."""
    return torch.searchsorted(offsets, torch.arange(len(indices), device=offsets.device), right=True) - 1


def count(indices: Tensor, n: int, weights: Tensor | None = None) -> Tensor:
    """(n,) int64: how often each of 0..n-1 occurs in indices. Unlike bincount it does not read the device."""
    flat = indices.reshape(-1)
    ones = torch.ones_like(flat) if weights is None else weights.reshape(-1).to(torch.int64)
    return torch.zeros(n, dtype=torch.int64, device=flat.device).index_add_(0, flat, ones)


def tokens_at_once(n_latents: int, device: str) -> int:
    """Tokens whose pre-activations are computed at a time: on CPUs as many as caches hold, but enough for a fast
    product."""
    return max(256, (2**21 if device == "cpu" else 2**25) // n_latents)


_sorted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # both gradients of a step take the same order


def _by_latent(indices: Tensor, offsets: Tensor | None, n_latents: int, ops: Any) -> tuple[Any, ...]:
    """The places in the order of their latents, as ops or plain torch take them; kept until indices change."""
    state = (indices._version, n_latents, ops, None if offsets is None else (id(offsets), offsets._version))
    known = _sorted.get(indices)
    if known is None or known[0] != state:
        sort = ops.by_latent if ops else _by_latent_plain
        _sorted[indices] = known = state, sort(indices.contiguous(), offsets, n_latents), offsets  # kept for its id
    return known[1]


def _by_latent_plain(indices: Tensor, offsets: Tensor | None, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    short = torch.int16 if n_latents <= 1 << 15 else torch.int32  # sorted by the byte
    order = torch.argsort(indices.reshape(-1).to(short), stable=True)
    tokens = order // indices.shape[1] if offsets is None else rows_of(indices, offsets)[order]
    counts = count(indices, n_latents)
    return order, tokens, counts.cumsum(0) - counts


def _sum_by_latent(indices: Tensor, offsets: Tensor | None, values: Tensor, x: Tensor, n_latents: int) -> Tensor:
    """(F, D): for each latent the sum of values[place] * x[token] over the places whose index is that latent.

    Sorted by latent, the places are an embedding bag whose bags are latents: the sum is deterministic, and the
    (places, D) products are never stored.
    """
    ops = compiled(x, values)
    by = _by_latent(indices, offsets, n_latents, ops)
    if ops:
        return ops.sum_by_latent(*by, values.contiguous(), x.contiguous())
    order, tokens, starts = by
    return F.embedding_bag(tokens, x, starts, mode="sum", per_sample_weights=values.reshape(-1)[order].to(x.dtype))


def _sum_values(indices: Tensor, offsets: Tensor | None, values: Tensor, n_tokens: int, n_latents: int) -> Tensor:
    """(F,): the sum of each latent's values; on a GPU in the sorted order, since the order of atomic additions is not
    fixed."""
    if values.device.type != "cpu" or interpreted:
        return _sum_by_latent(indices, offsets, values, values.new_ones(n_tokens, 1), n_latents)[:, 0]
    return values.new_zeros(n_latents).index_add_(0, indices.reshape(-1), values.reshape(-1))


def _dot_at(indices: Tensor, offsets: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Shaped like indices: left[token] . right[indices[place]], for left (B, D) and right (F, D). (places, D) is never
    stored."""
    if ops := compiled(left, right):
        return ops.dot_at(indices.contiguous(), offsets, left.contiguous(), right.contiguous())
    flat = indices.reshape(-1).contiguous()
    if offsets is None:
        starts = torch.arange(0, len(flat), indices.shape[1], device=flat.device)
        tokens = torch.arange(len(left), device=flat.device).repeat_interleave(indices.shape[1])
    else:
        starts, tokens = offsets, rows_of(indices, offsets)
    if left.device.type in ("cpu", "cuda"):
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return dots(left.contiguous(), right.contiguous(), flat, starts, tokens, 0).view(indices.shape)
    blocks = zip(tokens.split(4096), flat.split(4096), strict=True)
    return torch.cat([(left[t] * right[i]).sum(-1) for t, i in blocks]).view(indices.shape)


def _bag(indices: Tensor, offsets: Tensor | None, values: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, D): each token's sum of values[place] * rows[indices[place]] over its places, plus bias (D,) or (B, D)."""
    if ops := compiled(values, rows):
        bias = None if bias is None else bias.contiguous()
        return ops.bag(indices.contiguous(), offsets, values.contiguous(), rows.contiguous(), bias)
    weights = values.to(rows.dtype).contiguous()
    bags = F.embedding_bag(indices.contiguous(), rows, offsets, mode="sum", per_sample_weights=weights)
    return bags if bias is None else bags + bias


def _bag_backward(indices: Tensor, offsets: Tensor | None, values: Tensor, grad: Tensor, rows: Tensor) -> Pair:
    """The gradients of a bag's values and rows (F, D), from grad (B, D)."""
    ops = compiled(values, rows, grad)
    if hasattr(ops, "bag_backward"):
        by = _by_latent(indices, offsets, len(rows), ops)
        return ops.bag_backward(*by, values.contiguous(), grad, rows.contiguous())
    dots = _dot_at(indices, offsets, grad, rows).to(values.dtype)
    return dots, _sum_by_latent(indices, offsets, values, grad, len(rows))


def _combine(weights: Tensor, rows: Tensor) -> Tensor:
    """(D,): the sum of rows (F, D) weighted by (F,); in parts, to use several cores."""
    if native.ops(weights, rows) is None:
        return weights @ rows
    places = torch.arange(len(weights))
    return _bag(places, places[::64].contiguous(), weights, rows).sum(0)


class _Gather(torch.autograd.Function):
    """Pre-activations at selected latents, with a backward that touches those latents only."""

    @staticmethod
    def forward(ctx, x, centre, W_enc, b_enc, values, indices, offsets):
        del centre, b_enc  # x and values include them already; they are arguments so that they get gradients
        ctx.save_for_backward(x, W_enc, indices, offsets)
        return values.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W_enc, indices, offsets = ctx.saved_tensors
        n_latents = W_enc.shape[1]
        grad = grad.contiguous()
        grad_x = grad_centre = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _bag(indices, offsets, grad, W_enc.t().contiguous())
        if ctx.needs_input_grad[2]:
            grad_W = _sum_by_latent(indices, offsets, grad, x, n_latents).t()
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            grad_b = _sum_values(indices, offsets, grad, len(x), n_latents)
        if ctx.needs_input_grad[1] and grad_b is not None:
            grad_centre = -_combine(grad_b, W_enc.t())  # of the tokens' sum: cheaper than the sum of their gradients
        return grad_x, grad_centre, grad_W, grad_b, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, values, W_dec, offsets, bias):
        ctx.save_for_backward(indices, values, W_dec, offsets)
        ctx.bias = None if bias is None else bias.shape
        return _bag(indices, offsets, values, W_dec, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        indices, values, W_dec, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = grad_W = grad_bias = None
        if all(ctx.needs_input_grad[1:3]):
            grad_values, grad_W = _bag_backward(indices, offsets, values, grad, W_dec)
        elif ctx.needs_input_grad[1]:
            grad_values = _dot_at(indices, offsets, grad, W_dec).to(values.dtype)
        elif ctx.needs_input_grad[2]:
            grad_W = _sum_by_latent(indices, offsets, values, grad, len(W_dec))
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum_to_size(ctx.bias)
        return None, grad_values, grad_W, None, grad_bias


def gather_pre(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None = None,
    *, centre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pre-activations of selected latents, differentiable in x, centre, W_enc and b_enc.

    x (B, D), W_enc (D, F), b_enc (F,); values: x @ W_enc + b_enc at indices (B, K), or (n,) with offsets (B,), as
    selection.py found them, without a graph. centre (D,): was subtracted from x without a graph. Returns the values.
    All pre-activations of selected latents (main code, AuxK, multi-TopK) come from here, so all train the encoder.
    """
    if not torch.is_grad_enabled():
        return values.to(x.dtype)
    return _Gather.apply(x, centre, W_enc, b_enc, values, indices, offsets)


def gather_pre_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None = None,
    *, centre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Twin of gather_pre: the dense product, then a gather; values are ignored."""
    del values
    return at((x if centre is None else x + centre.detach() - centre) @ W_enc + b_enc, indices, offsets)


def at(pre: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Shaped like indices: pre (B, F) at these latents."""
    return pre.gather(1, indices) if offsets is None else pre[rows_of(indices, offsets), indices]


def decode(
    indices: Tensor, values: Tensor, W_dec: Tensor, offsets: Tensor | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """(B, D): the weighted sum of the kept latents' decoder rows, plus bias (D,), or (B, D) with one for each token.

    indices, values (B, K), or (n,) and offsets (B,).
    """
    return _Decode.apply(indices, values, W_dec, offsets, bias)


def decode_reference(
    indices: Tensor, values: Tensor, W_dec: Tensor, offsets: Tensor | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """Twin of decode: a dense (B, F) code times W_dec."""
    return Codes(indices, values, offsets).dense(len(W_dec)) @ W_dec + (0 if bias is None else bias)


def moments(x: Tensor, y: Tensor) -> Pair:
    """Sums in float64: per token |x|^2, |y|^2, x.y and |x - y|^2 as (4, B), and x over tokens (D,). x, y (B, D)."""
    if ops := compiled(x, y):
        return ops.moments(x.contiguous(), y.contiguous())
    n = tokens_at_once(8 * x.shape[1], x.device.type)  # in float64, all of them would be twice as large
    rows, total = [], x.new_zeros(x.shape[1], dtype=torch.float64)
    for a, b in zip(x.split(n), y.split(n), strict=True):
        x2, y2, e2 = (torch.linalg.vector_norm(v, dim=-1, dtype=torch.float64).square() for v in (a, b, a - b))
        rows.append(torch.stack([x2, y2, (x2 + y2 - e2) / 2, e2]))
        total += a.sum(0, dtype=torch.float64)
    return torch.cat(rows, 1), total


def moments_reference(x: Tensor, y: Tensor) -> Pair:
    """Twin of moments."""
    x, y = x.double(), y.double()
    rows = torch.stack([x.square().sum(-1), y.square().sum(-1), (x * y).sum(-1), (x - y).square().sum(-1)])
    return rows, x.sum(0)


def variance(x: Tensor) -> Tensor:
    """Scalar: mean over the tokens of x (B, D) of |x - their mean|^2."""
    if ops := compiled(x):
        rows, total = ops.moments(x.contiguous(), x.contiguous())
        return ((rows[0].sum() - total.square().sum() / len(x)) / len(x)).clamp(min=0).to(x.dtype)
    return (x - x.mean(0)).square().sum(-1).mean()


class _SquareNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=-1).square()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * (2 * grad)[:, None]


def square_norms(x: Tensor) -> Tensor:
    """(B,): |x|^2 per token of x (B, D); forward and backward take one pass each."""
    return _SquareNorms.apply(x)


def project_rows_(grad: Tensor, W: Tensor) -> None:
    """In place: subtract from each row of grad (F, D) its part along the same row of W (F, D)."""
    if grad.is_contiguous() and W.is_contiguous() and (ops := compiled(grad, W)):
        ops.project_rows_(grad, W)
    else:
        along = (grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True).clamp(min=1e-24)
        grad.addcmul_(along, W, value=-1)


def unit_rows_(W: Tensor) -> Tensor:
    """In place: scale each row of W (F, D) to unit norm; returns the factors (F, 1)."""
    if W.is_contiguous() and (ops := compiled(W)):
        return ops.unit_rows_(W)
    factors = 1 / W.norm(dim=1, keepdim=True).clamp(min=1e-12)
    W.mul_(factors)
    return factors
