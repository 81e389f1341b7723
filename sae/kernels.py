"""Sparse encode and decode, forward and backward: tensors in, tensors out. Knows no module, config or device policy.

Each operation has a plain twin (`*_reference`) that defines it in dense autograd; tests hold them together.
Only the K kept latents of a token take part in the backward pass: no (B, F) gradient, no (B*K, D) tensor is made.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Codes(NamedTuple):
    """Latent activations, sparse where `indices` is given.

    indices (B, K) int64 and values (B, K): latent `indices[b, j]` of token b has activation `values[b, j]`; a value of
    0 means "not active" and its index is meaningless. With indices None, values is the dense (B, F) matrix.
    """

    indices: Tensor | None
    values: Tensor

    def dense(self, n_latents: int) -> Tensor:
        """(B, F)."""
        if self.indices is None:
            return self.values
        zeros = self.values.new_zeros(len(self.values), n_latents)
        return zeros.scatter_add(1, self.indices, self.values)

    def l0(self) -> Tensor:
        """(B,) active latents per token, counted after the selection and the ReLU."""
        return (self.values != 0).sum(-1)

    def fired(self, n_latents: int) -> Tensor:
        """(F,) int64: how many of the B tokens each latent is active on."""
        active = self.values != 0
        return active.sum(0) if self.indices is None else count(self.indices, n_latents, active)

    def sparse(self) -> Codes:
        """The same codes with indices, as wide as the busiest token (reads the device when they were dense)."""
        if self.indices is not None:
            return self
        width = max(1, int(self.l0().max()))
        values, indices = self.values.abs().topk(width, dim=-1)
        return Codes(indices, self.values.gather(1, indices))


def count(indices: Tensor, n: int, weights: Tensor | None = None) -> Tensor:
    """(n,) int64: how often each of 0..n-1 occurs in indices (unlike bincount, reads nothing back from a GPU)."""
    flat = indices.reshape(-1)
    ones = torch.ones_like(flat) if weights is None else weights.reshape(-1).to(torch.int64)
    return torch.zeros(n, dtype=torch.int64, device=flat.device).index_add_(0, flat, ones)


def top_k(pre: Tensor, k: int) -> Tensor:
    """(B, K) indices of the k largest of each row of pre (B, F), in no particular order."""
    return pre.topk(k, dim=-1, sorted=False).indices


def _sum_by_latent(indices: Tensor, values: Tensor, rows: Tensor, n_latents: int) -> Tensor:
    """(F, D): for each latent the sum of values[b, j] * rows[b] over the places (b, j) where indices is that latent.

    Sorting the places by latent turns the sum into an embedding bag whose bags are latents: deterministic, and the
    (B*K, D) products are never stored.
    """
    k = indices.shape[1]
    order = torch.argsort(indices.reshape(-1), stable=True)
    counts = count(indices, n_latents)
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(
        order // k, rows, offsets, mode="sum", per_sample_weights=values.reshape(-1)[order].to(rows.dtype)
    )


def _dot_at(indices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(B, K): left[b] . right[indices[b, j]], for left (B, D) and right (F, D), without a (B, K, D) tensor."""
    n, k = indices.shape
    offsets = torch.arange(0, n * k, k, device=indices.device)
    flat = indices.reshape(-1).contiguous()
    if left.device.type in ("cpu", "cuda"):
        bag = torch.arange(n, device=indices.device).repeat_interleave(k)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            left.contiguous(), right.contiguous(), flat, offsets, bag, 0
        ).view(n, k)
    return torch.stack([(left * right[indices[:, j]]).sum(-1) for j in range(k)], dim=1)


def _bag(indices: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """(B, D): sum over j of values[b, j] * rows[indices[b, j]]."""
    return F.embedding_bag(indices.contiguous(), rows, mode="sum", per_sample_weights=values.to(rows.dtype))


class _Gather(torch.autograd.Function):
    """Pre-activations at chosen latents, with a backward that touches those latents only."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, pre, indices):
        del b_enc  # it is in pre already; an argument so that its gradient comes back
        ctx.save_for_backward(x, W_enc, indices)
        return pre.gather(1, indices).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, W_enc, indices = ctx.saved_tensors
        n_latents = W_enc.shape[1]
        grad = grad.contiguous()
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _bag(indices, grad, W_enc.t().contiguous())
        if ctx.needs_input_grad[1]:
            grad_W = _sum_by_latent(indices, grad, x, n_latents).t()
        if ctx.needs_input_grad[2]:
            grad_b = grad.new_zeros(n_latents).index_add_(0, indices.reshape(-1), grad.reshape(-1))
        return grad_x, grad_W, grad_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, values, W_dec):
        ctx.save_for_backward(indices, values, W_dec)
        return _bag(indices, values, W_dec)

    @staticmethod
    def backward(ctx, grad):
        indices, values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = grad_W = None
        if ctx.needs_input_grad[1]:
            grad_values = _dot_at(indices, grad, W_dec).to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_W = _sum_by_latent(indices, values, grad, len(W_dec))
        return None, grad_values, grad_W


def gather_pre(x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, indices: Tensor) -> Tensor:
    """Pre-activations of the chosen latents, differentiable in x, W_enc and b_enc.

    x (B, D), W_enc (D, F), b_enc (F,), pre (B, F) = x @ W_enc + b_enc computed without a graph, indices (B, K).
    Returns (B, K). Every use of pre (main code, AuxK) comes through here, so each one trains the encoder.
    """
    return _Gather.apply(x, W_enc, b_enc, pre, indices)


def gather_pre_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, indices: Tensor) -> Tensor:
    """Twin of gather_pre: the dense product, then a gather (pre is ignored)."""
    del pre
    return (x @ W_enc + b_enc).gather(1, indices)


def decode(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """(B, D): the kept latents' decoder rows, weighted and summed. indices, values (B, K); W_dec (F, D)."""
    return _Decode.apply(indices, values, W_dec)


def decode_reference(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """Twin of decode: a dense (B, F) code times W_dec."""
    return Codes(indices, values).dense(len(W_dec)) @ W_dec
