"""Selection of latents: the largest pre-activations of each token or of a batch, or those above thresholds. No graph.

Every path selects what the dense product x @ W_enc + b_enc would. The compiled encoders for CPUs and CUDA bound the
product by one of low precision and prove their selection (native.cpp, triton_encoder.py); elsewhere the product is
computed, in blocks.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae.kernels import native, sparse
from sae.kernels.sparse import Pair

FEW = 64  # latents; of fewer, computing all pre-activations is quicker than bounding them


def top_k(pre: Tensor, k: int) -> Pair:
    """The k largest of each row of pre (B, F), in no order: values and indices (B, K), as torch gives them."""
    if k == 1:
        return pre.max(-1, keepdim=True)
    group = 8 if pre.shape[1] >= 128 * k else 4
    n_groups = pre.shape[1] // group
    if pre.device.type != "cpu" or pre.shape[1] % group or n_groups < 4 * k:
        return pre.topk(k, dim=-1, sorted=False)
    # the k groups with the largest maxima hold the k largest, and taking maxima is quicker than sorting
    _, best = top_k(pre.view(-1, group, n_groups).amax(1), k)
    among = (best[:, None] + torch.arange(0, pre.shape[1], n_groups)[:, None]).flatten(1)
    values, places = pre.gather(1, among).topk(k, dim=-1, sorted=False)
    return values, among.gather(1, places)


def _blocks(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Iterator[Tensor]:
    """Pre-activations (some tokens, F), in order, in blocks of about the same size."""
    parts, W = x.chunk(-(-len(x) // sparse.tokens_at_once(len(b_enc), x.device.type)) or 1), W_enc.t()
    float32_here = x.device.type == "cpu" and x.dtype == W.dtype == torch.float32
    if float32_here and W.is_contiguous() and (linear := _onednn_linear()):
        return (linear(part, W, b_enc, "none", [], "") for part in parts)
    return (torch.addmm(b_enc, part, W_enc) for part in parts)


@functools.cache
def _onednn_linear() -> Any:
    """oneDNN's product, where torch has it: MKL's, which torch prefers, takes 20% longer on AMD's processors."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def choose_top_k(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, absolute: bool = False, packed: native.Packed | None = None
) -> Pair:
    """The k largest pre-activations x @ W_enc + b_enc of each token: indices and values (B, k), in no particular order.

    x (B, D), W_enc (D, F), b_enc (F,). absolute: largest in size, with their sign. packed: W_enc in 8 bits. No graph;
    see gather_pre.
    """
    with torch.no_grad():
        if packed is not None and packed.serves(x, W_enc, b_enc):
            return native.ops().packed_top_k(x.contiguous(), W_enc.t(), b_enc, packed.rows, packed.about, k, absolute)
        if max(8 * k, FEW) <= len(b_enc) and (ops := sparse.encoder(x, W_enc, b_enc)):
            return ops.encode_top_k(x.contiguous(), W_enc.t().contiguous(), b_enc.contiguous(), k, absolute)[:2]
        found = []
        for pre in _blocks(x, W_enc, b_enc):
            values, indices = top_k(pre.abs() if absolute else pre, k)
            found.append((indices, pre.gather(1, indices) if absolute else values))
        every = [torch.cat(parts) for parts in zip(*found, strict=True)]
        return every[0], every[1]


def choose_top_k_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, absolute: bool = False) -> Pair:
    """Twin of choose_top_k: sorts all pre-activations; of equal ones, keeps the first latents."""
    pre = x @ W_enc + b_enc
    indices = (pre.abs() if absolute else pre).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return indices, pre.gather(1, indices)


def choose_group_max(x: Tensor, W_enc: Tensor, b_enc: Tensor, size: int) -> Pair:
    """The largest pre-activation of each group of `size` neighbouring latents: indices and values (B, F / size).

    x (B, D), W_enc (D, F), b_enc (F,). No graph; see gather_pre.
    """
    with torch.no_grad():
        found = [pre.view(len(pre), len(b_enc) // size, size).max(-1) for pre in _blocks(x, W_enc, b_enc)]
        values, best = (torch.cat(parts) for parts in zip(*found, strict=True))
        return best + torch.arange(0, len(b_enc), size, device=best.device), values


def choose_batch_top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n largest pre-activations of a whole batch: indices and values (n,) in the order of tokens, offsets (B,).

    x (B, D), W_enc (D, F), b_enc (F,). No graph; see gather_pre.
    """
    with torch.no_grad():
        n = min(n, len(x) * len(b_enc))
        if x.device.type != "cpu" and not sparse.encoder(x, W_enc, b_enc):  # to read how many were found would wait
            return _best_of_all(torch.addmm(b_enc, x, W_enc), n)
        few = x[:: max(1, len(x) // 64)]  # a sample, to estimate the n-th largest
        pre = torch.addmm(b_enc, few, W_enc).flatten()
        wanted = 1.2 * n * len(few) / max(1, len(x))
        while wanted < len(pre):
            least = float(pre.topk(math.ceil(wanted), sorted=False).values.min())
            indices, values, offsets = choose_above(x, W_enc, b_enc, torch.full_like(b_enc, least))
            if len(values) >= n:  # all above `least` were found, so the n largest of them are the batch's
                best = values.topk(n, sorted=False).indices.sort().values
                return indices[best], values[best], _offsets(sparse.rows_of(indices, offsets)[best], len(x))
            wanted *= 2
        return _best_of_all(torch.cat(list(_blocks(x, W_enc, b_enc))), n)


def _best_of_all(pre: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n largest of pre (B, F), as choose_batch_top_k returns them."""
    flat = pre.flatten().topk(n, sorted=False).indices.sort().values
    return flat % pre.shape[1], pre.flatten()[flat], _offsets(flat // pre.shape[1], len(pre))


def choose_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, packed: native.Packed | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations that exceed threshold (F,): indices and values (n,), offsets (B,). packed: W_enc in 8 bits.

    Reads the device. No graph; see gather_pre.
    """
    with torch.no_grad():
        if packed is not None and packed.serves(x, W_enc, b_enc):
            weights = W_enc.t(), b_enc, packed.rows, packed.about
            return native.ops().packed_above(x.contiguous(), *weights, threshold.contiguous())
        if ops := sparse.encoder(x, W_enc, b_enc, threshold):
            return ops.encode_above(x.contiguous(), W_enc.t().contiguous(), b_enc.contiguous(), threshold.contiguous())
        found, start = [], 0
        for pre in _blocks(x, W_enc, b_enc):
            rows, indices = (pre > threshold).nonzero(as_tuple=True)
            found.append((indices, pre[rows, indices], rows + start))
            start += len(pre)
        indices, values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        return indices, values, _offsets(rows, len(x))


def choose_above_if_few(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, *, packed: native.Packed | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """choose_above where it is quicker than computing all pre-activations; else None. On CPUs that is if a sample of
    tokens says that less than 10% exceed their threshold."""
    if packed is not None and packed.serves(x, W_enc, b_enc):
        return choose_above(x, W_enc, b_enc, threshold, packed=packed)
    if x.device.type != "cpu" and not sparse.encoder(x, W_enc, b_enc, threshold):
        return None
    with torch.no_grad():
        few = x[:: max(1, len(x) // 16)]
        share = (torch.addmm(b_enc, few, W_enc) > threshold).float().mean()
    return choose_above(x, W_enc, b_enc, threshold) if share < 0.1 else None


def _offsets(rows: Tensor, n: int) -> Tensor:
    return torch.searchsorted(rows, torch.arange(n, device=rows.device))
