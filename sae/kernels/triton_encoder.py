"""The encoder in Triton, for CUDA: the twins of native.cpp's encode_top_k and encode_above, called alike.

encode_top_k finds the K largest of x @ W^T + b per token without writing the (B, F) matrix. A product of bfloat16s on
tensor cores comes tile by tile; what rounding can have changed has a bound, by Cauchy-Schwarz,
|x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|, and so has the order in which tensor cores add. With it each number has
an upper and a lower end. Of each tile a token's few latents of the largest upper ends go to memory. The K-th best lower
end of a token is at most its K-th best product, so only latents whose upper end reaches it can be among the K best.
These few are computed again in float32, and chosen from. Where a tile may hold more of them than it kept, which shows
in the last that it kept, all of its latents are computed again.

Letters: B tokens in a batch, D width, F latents, K kept latents. M candidates of a token, C of them from each tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.triton_kernels import dot_at, dots

# Tokens, latents and dimensions in a tile of the product: two such programs fit on a multiprocessor of an H100, so that
# one multiplies while the other selects.
ROWS, TILE, DEPTH = 128, 128, 64
LOWEST = tl.constexpr(-(2**31))  # below the key of every number


# --------------------------------------------------------------------------------------------------
# numbers as integers of the same order


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
def _round(
    x, rounded, norm, error, n, D, width, STORE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rows as bfloat16, their norms, and the norms of what rounding changed."""
    rows, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
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
def _place(B, n_tiles, ROWS: tl.constexpr):
    """The block of tokens and the tile of latents of a program: neighbours share what is in the cache."""
    n_blocks = tl.cdiv(B, ROWS)
    of_group = 8 * n_tiles
    first = tl.program_id(0) // of_group * 8
    size = tl.minimum(n_blocks - first, 8)
    within = tl.program_id(0) % of_group
    return first + within % size, within // size


@triton.jit
def _uppers(
    x, W, bias, norm, slack, reach, rows, latents, B, F, width,
    ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(ROWS, TILE): as much as x @ W^T + bias, or its size, can be. x (B, width), W (F, width): bfloat16."""
    depth, rows, latents = tl.arange(0, DEPTH), rows % B, latents % F
    left = x + rows.to(tl.int64)[:, None] * width + depth[None, :]
    right = W + latents.to(tl.int64)[None, :] * width + depth[:, None]
    product = tl.zeros((ROWS, TILE), tl.float32)
    for _ in range(0, width, DEPTH):
        a, b = tl.load(left), tl.load(right)
        if WIDEN:  # the interpreter takes bfloat16 for whole numbers
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
def _candidates(
    x, W, bias, norm, slack, reach, keys, B, F, width, C,
    ABSOLUTE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """keys (B, tiles, C), descending: of each tile the C largest upper ends, whose low bits tell the latent."""
    n_tiles = tl.cdiv(F, TILE)
    block, tile = _place(B, n_tiles, ROWS)
    rows, lane = block * ROWS + tl.arange(0, ROWS), tl.arange(0, TILE)
    latents = tile * TILE + lane
    upper = _uppers(x, W, bias, norm, slack, reach, rows, latents, B, F, width, ABSOLUTE, ROWS, TILE, DEPTH, WIDEN)
    key = (_key(upper) & -TILE) | (TILE - 1 - lane)[None, :]
    key = tl.where((latents < F)[None, :], key, LOWEST)
    to = keys + (rows.to(tl.int64) * n_tiles + tile) * C
    for c in range(C):
        best = tl.max(key, 1)
        tl.store(to + c, best, mask=rows < B)
        key = tl.where(key == best[:, None], LOWEST, key)


@triton.jit
def _sift(
    keys, norm, slack, reach, survivors, counts, leasts, B, K, M, C,
    TILE: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The candidates of tokens that can be among their K best, as survivors (B, ROOM) and their counts; -1 where a tile
    may hide more of them, or where they are too many. least: the K-th best lower end, as a key."""
    rows, p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    row = rows[:, None]
    key = tl.load(keys + row * M + p, mask=(rows < B)[:, None] & (p < M), other=LOWEST)
    there = key != LOWEST
    latent = p // C * TILE + (TILE - 1 - (key & (TILE - 1)))
    far = tl.load(norm + latent, mask=there, other=0.0) * tl.load(reach + rows, mask=rows < B, other=0.0)[:, None]
    far += tl.load(slack + latent, mask=there, other=0.0)
    least = _kth(tl.where(there, _key(_number(key & -TILE) - 2 * far), LOWEST), K)
    keep = there & ((key | (TILE - 1)) >= least[:, None])
    n = tl.sum(keep.to(tl.int32), 1)
    hidden = tl.sum((keep & (p % C == C - 1)).to(tl.int32), 1)
    slot = tl.cumsum(keep.to(tl.int32), 1) - 1
    tl.store(survivors + row * ROOM + slot, latent, mask=keep & (slot < ROOM))
    tl.store(counts + rows, tl.where((hidden == 0) & (n >= K) & (n <= ROOM), n, -1), mask=rows < B)
    tl.store(leasts + rows, tl.where(n >= K, least, LOWEST), mask=rows < B)  # fewer: not finite


@triton.jit
def _rank(
    x, W, b, keys, survivors, counts, leasts, indices, values, D, F, K, M, C,
    ABSOLUTE: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The K best of a token's survivors, or of all latents that its tiles may hide, by products in float32."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    count, least = tl.load(counts + row), tl.load(leasts + row)
    proven = count >= 0
    best = tl.full((N,), -(2**63), tl.int64)
    for start in range(0, tl.where(proven, count, F), STEP):
        tile = keys + row * M + start // TILE * C
        first = tl.load(tile, mask=count < 0, other=0) | (TILE - 1)
        last = tl.load(tile + C - 1, mask=count < 0, other=0) | (TILE - 1)
        hides = last >= least
        if proven | hides | ((first >= least) & (start % TILE == 0)):
            if proven:
                there = (lane < STEP) & (start + lane < count)
                latent = tl.load(survivors + row * ROOM + start + lane, mask=there, other=0)
            elif hides:  # without proof: all of a tile that may hide some, what another kept
                there = (lane < STEP) & (start + lane < F)
                latent = start + lane
            else:
                kept = tl.load(tile + lane, mask=lane < C, other=LOWEST)
                there = kept != LOWEST
                latent = start + (TILE - 1 - (kept & (TILE - 1)))
            value = dots(x + row * D, W, latent, there, D, N, DEPTH) + tl.load(b + latent, mask=there, other=0.0)
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
def _above(
    x, W, bias, norm, slack, reach, places, count, B, F, width, room,
    ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """places (room,), in no order: token * F + latent wherever the upper end exceeds 0; count is how many there are."""
    block, tile = _place(B, tl.cdiv(F, TILE), ROWS)
    rows, latents = block * ROWS + tl.arange(0, ROWS), tile * TILE + tl.arange(0, TILE)
    upper = _uppers(x, W, bias, norm, slack, reach, rows, latents, B, F, width, False, ROWS, TILE, DEPTH, WIDEN)
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
    width = triton.cdiv(D, DEPTH) * DEPTH
    store = x.dtype != torch.bfloat16 or width != D
    data = x.new_empty(n, width, dtype=torch.bfloat16) if store else x
    norm, error = x.new_empty(2, n, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    at_once = max(1, 4096 // block)
    _round[(triton.cdiv(n, at_once),)](x, data, norm, error, n, D, width, STORE=store, ROWS=at_once, BLOCK=block)
    return _Rounded(data, norm, error)


def _product(x: Tensor, W: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """What the tiles of a product take: bfloat16 x and W, bias, and the bounds |w|, slack (F,) and reach (B,).

    A number is at most |w| reach + slack away from what float32 gives.
    """
    tokens, latents = _rounded(x), _rounded(W)
    worst = (latents.error / latents.norm.clamp(min=1e-37)).amax()
    # each addition of tensor cores may lose 2^-23 of the largest sum on its way, and float32 itself loses some
    lost = 2.0**-20 + 1.1 * x.shape[1] * 2.0**-23
    reach = tokens.error + (tokens.norm + tokens.error) * worst + tokens.norm * lost
    slack = torch.maximum(b.abs(), bias.abs()).float() * 2.0**-21
    return tokens.data, latents.data, bias.float(), latents.norm, slack, reach


def _operands(*tensors: Tensor) -> list[Tensor]:
    """In the type of autocast, where that is on."""
    kind = tensors[0].device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return [t.to(torch.bfloat16) if cast else t for t in tensors]


def _kept_of_tile(k: int, n_tiles: int) -> int:
    """Candidates of a tile: fewer would hide some of a token's best, were these spread by chance, in 1 of 10,000."""
    mean = 1.5 * k / n_tiles  # and half as many again that rounding leaves in doubt
    term = left = math.exp(-mean)
    c = 0
    while n_tiles * (1 - left) > 1e-4 and c < 15:
        c += 1
        term *= mean / c
        left += term
    return c + 1


def encode_top_k(x: Tensor, W: Tensor, b: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, D), W (F, D), b (F,) -> indices (B, k), values (B, k) = (x @ W^T + b) there, and how many tokens took a
    second look, a scalar on the device."""
    B, F = len(x), len(W)
    indices = torch.empty(B, k, dtype=torch.int64, device=x.device)
    values = torch.empty(B, k, dtype=torch.float32, device=x.device)
    if not B:
        return indices, values.to(x.dtype), indices.new_zeros(())
    rows, latents = _operands(x, W)
    n_tiles = triton.cdiv(F, TILE)
    C = _kept_of_tile(k, n_tiles)
    M, N = n_tiles * C, max(16, triton.next_power_of_2(k))
    keys, survivors = (torch.empty(B, n, dtype=torch.int32, device=x.device) for n in (M, 2 * N))
    counts, leasts = torch.empty(2, B, dtype=torch.int32, device=x.device)
    product = _product(rows, latents, b, b)
    norm, slack, reach = product[3:]
    _candidates[(triton.cdiv(B, ROWS) * n_tiles,)](
        *product, keys, B, F, product[0].shape[1], C,
        ABSOLUTE=absolute, ROWS=ROWS, TILE=TILE, DEPTH=DEPTH, WIDEN=not x.is_cuda, num_warps=4, num_stages=3,
    )  # fmt: skip
    block = triton.next_power_of_2(M)
    at_once = max(1, 2048 // block)
    _sift[(triton.cdiv(B, at_once),)](
        keys, norm, slack, reach, survivors, counts, leasts, B, k, M, C,
        TILE=TILE, ROOM=2 * N, ROWS=at_once, BLOCK=block, num_warps=max(4, min(16, block // 512)),
    )  # fmt: skip
    _rank[(B,)](
        rows, latents, b, keys, survivors, counts, leasts, indices, values, x.shape[1], F, k, M, C,
        ABSOLUTE=absolute, TILE=TILE, ROOM=2 * N, N=N, STEP=min(N, TILE), DEPTH=max(16, 4096 // N),
    )  # fmt: skip
    return indices, values.to(x.dtype), (counts < 0).sum()


def encode_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, D), W (F, D), b (F,), floor (F,) -> the places where x @ W^T + b exceeds floor, token by token: latents
    (n,), values (n,), and where each token's begin (B,)."""
    B, F = len(x), len(W)
    tokens = torch.arange(B, device=x.device)
    rows, latents = _operands(x, W)
    product = _product(rows, latents, b, (b - floor).clamp(-3e38, 3e38))  # no difference of infinities
    grid, room = (triton.cdiv(B, ROWS // 2) * triton.cdiv(F, TILE),), 64 * B
    while True:
        places, count = tokens.new_empty(room), tokens.new_zeros(1)
        if B:
            _above[grid](
                *product, places, count, B, F, product[0].shape[1], room,
                ROWS=ROWS // 2, TILE=TILE, DEPTH=DEPTH, WIDEN=not x.is_cuda, num_warps=8, num_stages=3,
            )  # fmt: skip
        n = int(count)
        if n <= room:
            break
        room = n
    places = places[:n].sort().values
    at = places % F
    values = dot_at(at, torch.searchsorted(places, tokens * F), rows, latents).float() + b[at]
    over = values > floor[at]
    return at[over], values[over].to(x.dtype), torch.searchsorted(places[over], tokens * F)
