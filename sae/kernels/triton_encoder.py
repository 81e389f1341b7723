"""The encoder in Triton, for CUDA: the twins of native.cpp's encode_top_k and encode_above, called alike.

encode_top_k finds the K largest of x @ W^T + b per token without writing the (B, F) matrix. Tensor cores multiply
bfloat16s tile by tile. The error of rounding has a bound, by Cauchy-Schwarz,
|x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|, and so has the error of the order in which tensor cores add. So each
product has an upper and a lower end. Each tile writes a token's few latents with the largest upper ends to memory. The
K-th largest lower end of a token is at most its K-th largest product, so only latents whose upper end reaches it can be
among the K largest. These few are computed again in float32, and the K largest of them are kept. If even the last
latent that a tile wrote can be among the K largest, the tile may hide more, and all of its latents are computed again.

Letters: B tokens in a batch, D width, F latents, K kept latents. M candidates of a token, C of them from each tile.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from sae.kernels.triton_kernels import dot_at, dots

# Tokens, latents and dimensions in a tile of the product: two such programs fit on a multiprocessor of an H100, so that
# one multiplies while the other selects.
ROWS, TILE, DEPTH = constexpr(128), constexpr(128), constexpr(64)
LOWEST = constexpr(-(2**31))  # below the key of every number
WIDEN = constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter takes bfloat16 for whole numbers


# --------------------------------------------------------------------------------------------------
# floats as integers of the same order


@triton.jit
def _key(number):
    bits = number.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kth(keys, K):
    """(rows,): the K-th largest int32 of each row of keys, bit by bit; LOWEST where there are fewer."""
    found = tl.where(tl.sum((keys >= 0).to(tl.int32), 1) >= K, 0, LOWEST)
    for bit in range(31):
        more = found | (1 << (30 - bit))
        found = tl.where(tl.sum((keys >= more[:, None]).to(tl.int32), 1) >= K, more, found)
    return found


# --------------------------------------------------------------------------------------------------
# the encoder


@triton.jit
def _round(x, rounded, norm, error, n, D, width, STORE: constexpr, AT_ONCE: constexpr, BLOCK: constexpr):
    """Rows as bfloat16, their norms, and the norms of what rounding changed."""
    rows, d = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, BLOCK)[None, :]
    there, row = (rows < n)[:, None], rows[:, None]
    value = tl.load(x + row * D + d, mask=there & (d < D), other=0.0).to(tl.float32)
    near = value.to(tl.bfloat16)
    if STORE:
        tl.store(rounded + row * width + d, near, mask=there & (d < width))
    size = tl.maximum(tl.max(tl.abs(value), 1), 1e-30)  # squares of tiny numbers are 0, those of huge ones infinite
    value, left = value / size[:, None], (value - near.to(tl.float32)) / size[:, None]
    tl.store(norm + rows, size * tl.sqrt(tl.sum(value * value, 1)) * 1.0001, mask=rows < n)
    tl.store(error + rows, size * tl.sqrt(tl.sum(left * left, 1)) * 1.001, mask=rows < n)


@triton.jit
def _place(B, n_tiles, N: constexpr):
    """The block of N tokens and the tile of latents of a program: neighbours share what is in the cache."""
    n_blocks = tl.cdiv(B, N)
    of_group = 8 * n_tiles
    first = tl.program_id(0) // of_group * 8
    size = tl.minimum(n_blocks - first, 8)
    within = tl.program_id(0) % of_group
    return first + within % size, within // size


@triton.jit
def _uppers(x, W, bias, norm, slack, reach, rows, latents, B, F, width, ABSOLUTE: constexpr):
    """(rows, latents): the upper ends of x @ W^T + bias, or of its size. x (B, width), W (F, width): bfloat16."""
    depth, rows, latents = tl.arange(0, DEPTH), rows % B, latents % F
    left = x + rows.to(tl.int64)[:, None] * width + depth[None, :]
    right = W + latents.to(tl.int64)[None, :] * width + depth[:, None]
    product = tl.zeros((rows.shape[0], TILE), tl.float32)
    for _ in range(0, width, DEPTH):
        a, b = tl.load(left), tl.load(right)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product)
        left += DEPTH
        right += DEPTH
    far = tl.load(norm + latents)[None, :] * tl.load(reach + rows)[:, None]
    if ABSOLUTE:
        return tl.abs(product + tl.load(bias + latents)[None, :]) + (far + tl.load(slack + latents)[None, :])
    else:  # fewer numbers to hold at a time
        return product + (far + (tl.load(bias + latents) + tl.load(slack + latents))[None, :])


@triton.jit
def _candidates(x, W, bias, norm, slack, reach, keys, B, F, width, C, ABSOLUTE: constexpr):
    """keys (B, tiles, C), descending: each tile's C largest upper ends, whose low bits tell the latent."""
    n_tiles = tl.cdiv(F, TILE)
    block, tile = _place(B, n_tiles, ROWS)
    rows, lane = block * ROWS + tl.arange(0, ROWS), tl.arange(0, TILE)
    latents = tile * TILE + lane
    upper = _uppers(x, W, bias, norm, slack, reach, rows, latents, B, F, width, ABSOLUTE)
    key = (_key(upper) & -TILE) | (lane ^ (TILE - 1))[None, :]
    key = tl.where((latents < F)[None, :], key, LOWEST)
    to = keys + (rows.to(tl.int64) * n_tiles + tile) * C
    for c in range(C):
        best = tl.max(key, 1)
        tl.store(to + c, best, mask=rows < B)
        key = tl.where(key == best[:, None], LOWEST, key)


@triton.jit
def _sift(
    keys, norm, slack, reach, survivors, proofs, B, K, M, C, ROOM: constexpr, AT_ONCE: constexpr, BLOCK: constexpr
):
    """The candidates that can be among a token's K best, as survivors (B, ROOM). proofs (2, B): how many they are, -1
    where a tile may hide more of them or where they are too many; and the K-th best lower end, as a key."""
    rows, p = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE), tl.arange(0, BLOCK)[None, :]
    row = rows[:, None]
    key = tl.load(keys + row * M + p, mask=(rows < B)[:, None] & (p < M), other=LOWEST)
    there = key != LOWEST
    latent = p // C * TILE + (~key & (TILE - 1))
    far = tl.load(norm + latent, mask=there, other=0.0) * tl.load(reach + rows, mask=rows < B, other=0.0)[:, None]
    far += tl.load(slack + latent, mask=there, other=0.0)
    least = _kth(tl.where(there, _key(_number(key & -TILE) - 2 * far), LOWEST), K)
    keep = there & ((key | (TILE - 1)) >= least[:, None])
    n = tl.sum(keep.to(tl.int32), 1)
    hidden = tl.sum((keep & (p % C == C - 1)).to(tl.int32), 1)
    slot = tl.cumsum(keep.to(tl.int32), 1) - 1
    tl.store(survivors + row * ROOM + slot, latent, mask=keep & (slot < ROOM))
    tl.store(proofs + rows, tl.where((hidden == 0) & (n >= K) & (n <= ROOM), n, -1), mask=rows < B)
    tl.store(proofs + B + rows, tl.where(n >= K, least, LOWEST), mask=rows < B)  # fewer: not finite


@triton.jit
def _rank(x, W, b, keys, survivors, proofs, indices, values, B, D, F, K, M, C, ABSOLUTE: constexpr, N: constexpr):
    """The K best of a token's survivors, or of all latents that its tiles may hide, by products in float32."""
    STEP: constexpr = N if N < TILE else TILE
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    count, least = tl.load(proofs + row), tl.load(proofs + B + row)
    proven = count >= 0
    best = tl.full((N,), -(2**63), tl.int64)
    for start in range(0, tl.where(proven, count, F), STEP):
        tile = keys + row * M + C * (start // TILE)
        first = tl.load(tile, mask=count < 0, other=0) | (TILE - 1)
        last = tl.load(tile + C - 1, mask=count < 0, other=0) | (TILE - 1)
        hides = last >= least
        if proven | hides | ((first >= least) & (start // TILE * TILE == start)):
            if proven:
                there = (lane < STEP) & (start + lane < count)
                latent = tl.load(survivors + row * 2 * N + start + lane, mask=there, other=0)
            elif hides:  # without proof: all latents of a tile that may hide some, and the candidates of the others
                there = (lane < STEP) & (start + lane < F)
                latent = start + lane
            else:
                kept = tl.load(tile + lane, mask=lane < C, other=LOWEST)
                there = kept != LOWEST
                latent = start + (~kept & (TILE - 1))
            value = dots(x + row * D, W, latent, there, D, N, 4096 // N if N <= 256 else 16) + tl.load(
                b + latent, mask=there, other=0.0
            )
            # of equal ones the first latents; the last bit is a sign
            code = (0x7FFFFFFF - latent).to(tl.int64) * 2
            if ABSOLUTE:
                code += (value < 0).to(tl.int64)
            rank = _key(tl.abs(value) if ABSOLUTE else value).to(tl.int64) * (2**32) + code
            both = tl.reshape(tl.join(best, tl.where(there, rank, -(2**63))), (2 * N,))
            best = tl.max(tl.reshape(tl.sort(both, descending=True), (2, N)), 0)  # the first half
    value = _number((best >> 32).to(tl.int32))
    if ABSOLUTE:
        value = tl.where((best & 1) == 1, -value, value)
    tl.store(indices + row * K + lane, 0x7FFFFFFF - ((best & 0xFFFFFFFF) >> 1), mask=lane < K)
    tl.store(values + row * K + lane, value, mask=lane < K)


@triton.jit
def _above(x, W, bias, norm, slack, reach, places, count, B, F, width, room, N: constexpr):
    """places (room,), in no order: token * F + latent wherever the upper end exceeds 0; count is how many there are."""
    block, tile = _place(B, tl.cdiv(F, TILE), N)
    rows, latents = block * N + tl.arange(0, N), tile * TILE + tl.arange(0, TILE)
    upper = _uppers(x, W, bias, norm, slack, reach, rows, latents, B, F, width, False)
    hit = (upper > 0) & (rows < B)[:, None] & (latents < F)[None, :]
    of_row = tl.sum(hit.to(tl.int32), 1)
    begin = tl.atomic_add(count, tl.sum(of_row).to(tl.int64))
    slot = begin + (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
    tl.store(places + slot, rows.to(tl.int64)[:, None] * F + latents[None, :], mask=hit & (slot < room))


class _Rounded(NamedTuple):
    data: Tensor  # (rows, width) bfloat16, width a multiple of DEPTH
    norm: Tensor  # (rows,)
    error: Tensor  # (rows,), the norm of what rounding changed


def _rounded(x: Tensor) -> _Rounded:
    n, D = x.shape
    width = triton.cdiv(D, DEPTH.value) * DEPTH.value
    store = x.dtype != torch.bfloat16 or width != D
    data = x.new_empty(n, width, dtype=torch.bfloat16) if store else x
    norm, error = x.new_empty(2, n, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    at_once = max(1, 4096 // block)
    _round[(triton.cdiv(n, at_once),)](x, data, norm, error, n, D, width, STORE=store, AT_ONCE=at_once, BLOCK=block)
    return _Rounded(data, norm, error)


class _Product(NamedTuple):
    """What the tiles of a product take. A number is at most norm * reach + slack away from what float32 gives."""

    x: Tensor  # (B, width) bfloat16
    W: Tensor  # (F, width) bfloat16
    bias: Tensor  # (F,)
    norm: Tensor  # (F,)
    slack: Tensor  # (F,)
    reach: Tensor  # (B,)


def _product(x: Tensor, W: Tensor, b: Tensor, bias: Tensor) -> _Product:
    """Of x (B, D) and W (F, D), plus bias, which is b or b less a floor."""
    tokens, latents = _rounded(x), _rounded(W)
    worst = (latents.error / latents.norm.clamp(min=1e-37)).amax()
    # each addition of tensor cores may lose 2^-23 of the largest sum on its way, and float32 itself loses some
    lost = 2.0**-20 + 1.1 * x.shape[1] * 2.0**-23
    reach = tokens.error + (tokens.norm + tokens.error) * worst + tokens.norm * lost
    slack = torch.maximum(b.abs(), bias.abs()).float() * 2.0**-21
    return _Product(tokens.data, latents.data, bias.float(), latents.norm, slack, reach)


def _operands(*tensors: Tensor) -> list[Tensor]:
    """In bfloat16 where autocast asks for it."""
    kind = tensors[0].device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return [t.to(torch.bfloat16) if cast else t for t in tensors]


def _kept_of_tile(k: int, n_tiles: int) -> int:
    """Candidates of a tile: so many that tiles hide some of the best of 1 token in 10,000, were these spread evenly."""
    mean = 1.5 * k / n_tiles  # half as many again are in doubt because of rounding
    term = left = math.exp(-mean)
    c = 0
    while n_tiles * (1 - left) > 1e-4 and c < 15:
        c += 1
        term *= mean / c
        left += term
    return c + 1


def encode_top_k(x: Tensor, W: Tensor, b: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, D), W (F, D), b (F,) -> indices (B, k), values (B, k) = (x @ W^T + b) there, and how many tokens were
    encoded again for want of proof, a scalar on the device."""
    B, F = len(x), len(W)
    indices = torch.empty(B, k, dtype=torch.int64, device=x.device)
    values = torch.empty(B, k, dtype=torch.float32, device=x.device)
    if not B:
        return indices, values.to(x.dtype), indices.new_zeros(())
    rows, latents = _operands(x, W)
    n_tiles = triton.cdiv(F, TILE.value)
    C = _kept_of_tile(k, n_tiles)
    M, N = n_tiles * C, max(16, triton.next_power_of_2(k))
    keys, survivors = (torch.empty(B, n, dtype=torch.int32, device=x.device) for n in (M, 2 * N))
    proofs = torch.empty(2, B, dtype=torch.int32, device=x.device)
    product = _product(rows, latents, b, b)
    grid, width = (triton.cdiv(B, ROWS.value) * n_tiles,), product.x.shape[1]
    _candidates[grid](*product, keys, B, F, width, C, ABSOLUTE=absolute, num_warps=4, num_stages=3)
    block = triton.next_power_of_2(M)
    at_once = max(1, 2048 // block)
    sizes = {"ROOM": 2 * N, "AT_ONCE": at_once, "BLOCK": block, "num_warps": max(4, min(16, block // 512))}
    _sift[(triton.cdiv(B, at_once),)](keys, *product[3:], survivors, proofs, B, k, M, C, **sizes)
    found = keys, survivors, proofs, indices, values
    _rank[(B,)](rows, latents, b, *found, B, x.shape[1], F, k, M, C, ABSOLUTE=absolute, N=N)
    return indices, values.to(x.dtype), (proofs[0] < 0).sum()


def encode_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, D), W (F, D), b (F,), floor (F,) -> the places where x @ W^T + b exceeds floor, token by token: latents
    (n,), values (n,), and where those of each token begin (B,)."""
    B, F = len(x), len(W)
    tokens = torch.arange(B, device=x.device)
    rows, latents = _operands(x, W)
    product = _product(rows, latents, b, (b - floor).clamp(-3e38, 3e38))  # no difference of infinities
    half, width, room = ROWS.value // 2, product.x.shape[1], 64 * B
    grid = (triton.cdiv(B, half) * triton.cdiv(F, TILE.value),)
    while True:
        places, count = tokens.new_empty(room), tokens.new_zeros(1)
        if B:
            _above[grid](*product, places, count, B, F, width, room, N=half, num_warps=8, num_stages=3)
        n = int(count)
        if n <= room:
            break
        room = n
    places = places[:n].sort().values
    at = places % F
    values = dot_at(at, torch.searchsorted(places, tokens * F), rows, latents).float() + b[at]
    over = values > floor[at]
    return at[over], values[over].to(x.dtype), torch.searchsorted(places[over], tokens * F)
