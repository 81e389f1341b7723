"""The sparse operations in Triton, for CUDA: the twins of native.cpp's, called alike; the encoder is triton_encoder.py.

float32 or bfloat16 in, sums in float32. sparse.py imports this file where Triton is installed and a tensor is on a
GPU, or where Triton's interpreter is wanted (TRITON_INTERPRET=1), which runs it on CPUs. Nothing here reads the
device. The tokens of a latent are summed in the order of a sort, not by atomic additions: the same bits every time.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

PIECE = constexpr(128)  # places of a latent that one program sums
PLACES = constexpr(32)  # places that a program reads at a time
FEW = constexpr(8)  # the same, where it holds a long row of each


def ops(*tensors: Tensor) -> Any:
    """This file, if it serves these tensors: float32 or bfloat16; else None."""
    return sys.modules[__name__] if all(t.dtype in (torch.float32, torch.bfloat16) for t in tensors) else None


# --------------------------------------------------------------------------------------------------
# sparse products


def _counts(indices: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """(n, B, K): all places, tokens, and the places of each token, 0 if offsets tell them."""
    return indices.numel(), *(indices.shape if offsets is None else (len(offsets), 0))


@triton.jit
def _span(token, offsets, n, B, K):
    """Where a token's places begin and end."""
    if offsets is None:
        return token * K, token * K + K
    else:
        first = tl.load(offsets + token)
        return first, tl.load(offsets + token + 1, mask=token + 1 < B, other=n)


@triton.jit
def _bag(indices, offsets, values, W, bias, out, n, B, K, D, bias_stride, WIDE: constexpr):
    token, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    first, last = _span(token, offsets, n, B, K)
    total = tl.zeros((WIDE,), tl.float32)
    if bias is not None:
        total += tl.load(bias + token * bias_stride + d, mask=d < D, other=0.0).to(tl.float32)
    for start in range(first, last, FEW):
        at = start + tl.arange(0, FEW)
        value = tl.load(values + at, mask=at < last, other=0.0).to(tl.float32)
        latent = tl.load(indices + at, mask=at < last, other=0)
        mask = (value != 0)[:, None] & (d < D)[None, :]
        rows = tl.load(W + latent[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * rows, 0)
    tl.store(out + token * D + d, total, mask=d < D)


def bag(indices: Tensor, offsets: Tensor | None, values: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """(B, D): each token's sum of values[place] * W[indices[place]] over its places, plus bias (D,) or (B, D)."""
    (n, B, K), D = _counts(indices, offsets), W.shape[1]
    out = W.new_empty(B, D)
    wide = min(512, triton.next_power_of_2(D))
    bias_stride = D if bias is not None and bias.ndim == 2 else 0
    if B:
        _bag[(B, triton.cdiv(D, wide))](indices, offsets, values, W, bias, out, n, B, K, D, bias_stride, WIDE=wide)
    return out


@triton.jit
def dots(left, right, at, there, D, N: constexpr, DEPTH: constexpr):
    """(N,): the row `left` times the rows `at` of right."""
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((N, DEPTH), tl.float32)
    for start in range(0, D, DEPTH):
        d = start + depth
        mask = there[:, None] & (d < D)[None, :]
        rows = tl.load(right + at.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += rows * tl.load(left + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def _dot_at(indices, offsets, left, right, out, n, B, K, D):
    token = tl.program_id(0).to(tl.int64)
    first, last = _span(token, offsets, n, B, K)
    for start in range(first, last, PLACES):
        at = start + tl.arange(0, PLACES)
        latent = tl.load(indices + at, mask=at < last, other=0)
        tl.store(out + at, dots(left + token * D, right, latent, at < last, D, PLACES, 128), mask=at < last)


def dot_at(indices: Tensor, offsets: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Shaped like indices: left[token] . right[indices[place]], for left (B, D) and right (F, D)."""
    out = torch.empty(indices.shape, dtype=left.dtype, device=left.device)
    if len(left):
        _dot_at[(len(left),)](indices, offsets, left, right, out, *_counts(indices, offsets), left.shape[1])
    return out


class ByLatent(NamedTuple):
    """Places in the order of their latents, and those of a latent in pieces of PIECE."""

    order: Tensor  # (n,)
    tokens: Tensor  # (n,)
    starts: Tensor  # (F + 1,), where the places of each latent begin
    ends: Tensor  # (F,), where the pieces of each latent after its first end, among all such pieces
    latents: Tensor  # (n // PIECE,), the latent of each such piece; F for no latent


def by_latent(indices: Tensor, offsets: Tensor | None, n_latents: int) -> ByLatent:
    """The places of all tokens in the order of their latents, of one latent in the order of tokens."""
    flat = indices.reshape(-1)
    latents, order = flat.to(torch.int32).sort(stable=True)
    if offsets is None:
        tokens = order // indices.shape[1]
    else:
        tokens = torch.searchsorted(offsets, order, right=True) - 1
    starts = torch.searchsorted(latents, torch.arange(n_latents + 1, dtype=torch.int32, device=flat.device))
    ends = ((starts.diff() - 1).clamp(min=0) // PIECE.value).cumsum(0)
    owners = torch.searchsorted(ends, torch.arange(len(flat) // PIECE.value, device=flat.device), right=True)
    return ByLatent(order, tokens, starts, ends, owners)


@triton.jit
def _sum_pieces(order, tokens, starts, ends, latents, values, x, out, further, F, D, WIDE: constexpr):
    """Sums the first piece of each latent into out (F, D), and each further piece into a row of `further`."""
    piece, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    is_first = piece < F
    latent = tl.where(is_first, piece, tl.load(latents + piece - F, mask=piece >= F, other=0))
    begin = tl.load(ends + latent - 1, mask=(latent > 0) & (latent < F), other=0)
    first = tl.load(starts + latent) + tl.where(is_first, 0, piece - F - begin + 1) * PIECE
    last = tl.minimum(tl.load(starts + latent + 1, mask=latent < F, other=0), first + PIECE)
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(first, last, FEW):
        at = start + tl.arange(0, FEW)
        place = tl.load(order + at, mask=at < last, other=0)
        value = tl.load(values + place, mask=at < last, other=0.0).to(tl.float32)
        token = tl.load(tokens + at, mask=at < last, other=0)
        mask = (value != 0)[:, None] & (d < D)[None, :]
        rows = tl.load(x + token[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * rows, 0)
    tl.store(out + latent * D + d, total, mask=d < tl.where(is_first, D, 0))
    tl.store(further + (piece - F) * D + d, total, mask=d < tl.where(is_first | (latent == F), 0, D))


@triton.jit
def _add_pieces(ends, out, further, D, WIDE: constexpr):
    """Adds a latent's further pieces to its first, in order."""
    latent, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    first, last = tl.load(ends + latent - 1, mask=latent > 0, other=0), tl.load(ends + latent)
    if last > first:
        total = tl.load(out + latent * D + d, mask=d < D, other=0.0)
        for piece in range(first, last):
            total += tl.load(further + piece * D + d, mask=d < D, other=0.0)
        tl.store(out + latent * D + d, total, mask=d < D)


def sum_by_latent(
    order: Tensor, tokens: Tensor, starts: Tensor, ends: Tensor, latents: Tensor, values: Tensor, x: Tensor
) -> Tensor:
    """(F, D): for each latent the sum of values[place] * x[token] over its places, as by_latent gives them."""
    F, D = len(ends), x.shape[1]
    out = x.new_empty(F, D, dtype=torch.float32)
    further = out.new_empty(len(latents), D)
    wide = min(512, triton.next_power_of_2(D))
    blocks, by = triton.cdiv(D, wide), (order, tokens, starts, ends, latents)
    _sum_pieces[(F + len(further), blocks)](*by, values, x, out, further, F, D, WIDE=wide)
    if len(further):
        _add_pieces[(F, blocks)](ends, out, further, D, WIDE=wide)
    return out.to(x.dtype)


@triton.jit
def _activity(indices, offsets, values, l0, fired, n, B, K):
    token = tl.program_id(0).to(tl.int64)
    first, last = _span(token, offsets, n, B, K)
    count = tl.zeros((PLACES,), tl.int64)
    for start in range(first, last, PLACES):
        at = start + tl.arange(0, PLACES)
        active = (at < last) & (tl.load(values + at, mask=at < last, other=0.0) != 0)
        tl.atomic_add(fired + tl.load(indices + at, mask=active, other=0), 1, mask=active)  # whole numbers: no rounding
        count += active.to(tl.int64)
    tl.store(l0 + token, tl.sum(count))


def activity(indices: Tensor, offsets: Tensor | None, values: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """How many values of each token are not 0 (B,), and how many of each latent (F,); int64."""
    n, B, K = _counts(indices, offsets)
    l0, fired = indices.new_zeros(B), indices.new_zeros(n_latents)
    if B:
        _activity[(B,)](indices, offsets, values, l0, fired, n, B, K, num_warps=1)
    return l0, fired


# --------------------------------------------------------------------------------------------------
# rows


@triton.jit
def _moments(x, y, rows, columns, B, D, ROWS: constexpr, WIDE: constexpr):
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    zero = tl.zeros((ROWS,), tl.float64)
    x2, y2, xy, e2 = zero, zero, zero, zero
    for start in range(0, D, WIDE):
        d = start + tl.arange(0, WIDE)
        at, mask = row[:, None] * D + d[None, :], (row < B)[:, None] & (d < D)[None, :]
        u = tl.load(x + at, mask=mask, other=0.0).to(tl.float64)
        v = tl.load(y + at, mask=mask, other=0.0).to(tl.float64)
        x2 += tl.sum(u * u, 1)
        y2 += tl.sum(v * v, 1)
        xy += tl.sum(u * v, 1)
        e2 += tl.sum((u - v) * (u - v), 1)
        tl.store(columns + block * D + d, tl.sum(u, 0), mask=d < D)
    tl.store(rows + row, x2, mask=row < B)
    tl.store(rows + B + row, y2, mask=row < B)
    tl.store(rows + 2 * B + row, xy, mask=row < B)
    tl.store(rows + 3 * B + row, e2, mask=row < B)


def moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Per token |x|^2, |y|^2, x.y and |x - y|^2 (4, B), and the sum of x over tokens (D,), all in float64."""
    B, D = x.shape
    blocks = triton.cdiv(B, 16)
    rows, columns = x.new_empty(4, B, dtype=torch.float64), x.new_empty(blocks, D, dtype=torch.float64)
    if B:
        _moments[(blocks,)](x, y, rows, columns, B, D, ROWS=16, WIDE=128)
    return rows, columns.sum(0)


@triton.jit
def _along(g, w):
    """(rows, 1): the coefficient of each row of g along that of w."""
    return (tl.sum(g * w, 1) / tl.maximum(tl.sum(w * w, 1), 1e-24))[:, None]


@triton.jit
def _at_random(number, random):
    """Rounds to bfloat16 stochastically, by 16 random bits: the mean is the number. Returns float32, to be stored."""
    return ((number.to(tl.int32, bitcast=True) + (random & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _step_rows(
    p, grad, m, v, scale, factors, n, D, seed, rate, per_root, beta1, beta2, eps, ROWS: constexpr, BLOCK: constexpr
):
    """In one pass: drop the gradient's part along rows, take Adam's step, scale rows to unit norm. Without factors
    rows keep their norm, and a step its whole gradient; without moments m and v there is no step."""
    rows, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    at = rows[:, None] * D + d
    mask = (d < D) & (at < n)
    w = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
    if grad is not None:
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if (m is None) or (factors is not None):
            g -= _along(g, w) * w
        if m is None:
            tl.store(grad + at, g, mask=mask)
        else:
            g *= tl.load(scale).to(tl.float32)
            first = beta1 * tl.load(m + at, mask=mask, other=0.0).to(tl.float32) + (1 - beta1) * g
            second = beta2 * tl.load(v + at, mask=mask, other=0.0).to(tl.float32) + (1 - beta2) * g * g
            w -= rate * first / (tl.sqrt(second) * per_root + eps)
            if m.dtype.element_ty == tl.bfloat16:
                random = tl.randint(seed, at.to(tl.int32)).to(tl.int32, bitcast=True)
                first, second = _at_random(first, random), _at_random(second, random >> 16)
            tl.store(m + at, first, mask=mask)
            tl.store(v + at, second, mask=mask)
    if factors is not None:
        factor = 1 / tl.maximum(tl.sqrt(tl.sum(w * w, 1)), 1e-12)
        tl.store(factors + rows, factor, mask=rows * D < n)
        w *= factor[:, None]
    if (m is not None) or (factors is not None):
        tl.store(p + at, w, mask=mask)


@triton.jit
def _squares(grad, W, out, n, D, ROWS: constexpr, BLOCK: constexpr):
    """The sum of squares of rows of grad, without their part along W's rows if W is given."""
    rows, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    at = rows[:, None] * D + d
    mask = (d < D) & (at < n)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if W is not None:
        w = tl.load(W + at, mask=mask, other=0.0).to(tl.float32)
        g -= _along(g, w) * w
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(g * g, 1)))


NO_STEP = (0, 0.0, 0.0, 0.0, 0.0, 0.0)  # seed, rate, per_root, beta1, beta2, eps


def _row_grid(n: int, D: int | None) -> tuple[int, int, dict[str, int]]:
    """For n numbers in rows of D, or in a line: the number of programs, the width, and the size of their blocks."""
    D = D or 2048
    block = triton.next_power_of_2(D)
    at_once = max(1, 2048 // block)
    return triton.cdiv(n, D * at_once), D, {"ROWS": at_once, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def squares(grad: Tensor, W: Tensor | None) -> Tensor:
    """Sum of squares of grad, a float64 scalar on the device; with W, of grad's rows (F, D) without their part along
    the rows of W."""
    n_programs, D, block = _row_grid(grad.numel(), None if W is None else grad.shape[1])
    out = torch.empty(n_programs, dtype=torch.float32, device=grad.device)
    _squares[(n_programs,)](grad, W, out, grad.numel(), D, **block)
    return out.sum(dtype=torch.float64)


def adam_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, beta1: float, beta2: float, eps: float,
    scale: Tensor | float, unit_rows: bool,
) -> None:  # fmt: skip
    """In place, Adam (Kingma & Ba 2015, algorithm 1) on four tensors of the same layout, with the gradient times scale,
    a number or a scalar on the device. step counts from 1. unit_rows: p's rows (F, D) move on the sphere: the
    gradient's part along a row is dropped first, and the row gets unit norm after. Moments in bfloat16 are rounded
    stochastically."""
    n_programs, D, block = _row_grid(p.numel(), p.shape[1] if unit_rows else None)
    rate, per_root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    factors = torch.empty(len(p), dtype=torch.float32, device=p.device) if unit_rows else None
    scale = scale if isinstance(scale, Tensor) else p.new_full((), scale)
    numbers = step, rate, per_root, beta1, beta2, eps
    _step_rows[(n_programs,)](p, grad, m, v, scale, factors, p.numel(), D, *numbers, **block)


def project_rows_(grad: Tensor, W: Tensor) -> None:
    """In place: subtract from each row of grad (F, D) its part along the same row of W (F, D)."""
    n_programs, D, block = _row_grid(W.numel(), W.shape[1])
    _step_rows[(n_programs,)](W, grad, None, None, None, None, W.numel(), D, *NO_STEP, **block)


def unit_rows_(W: Tensor) -> Tensor:
    """In place: scale each row of W (F, D) to unit norm; returns the factors (F, 1)."""
    n_programs, D, block = _row_grid(W.numel(), W.shape[1])
    factors = W.new_empty(len(W), 1)
    _step_rows[(n_programs,)](W, None, None, None, None, factors, W.numel(), D, *NO_STEP, **block)
    return factors
