"""Decoder directions: the nearest neighbours of each, and a map of all.

Letters: F latents, D width, n neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

N_NEAR = 8
EPOCHS = 200


@torch.no_grad()
def nearest(W_dec: Tensor, n: int = N_NEAR, *, latents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The n others with the largest cosine to each of these latents (default: all): indices and cosines (F, n), on the
    CPU. Works in blocks, so that no (F, F) matrix is made."""
    unit = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    latents = torch.arange(len(unit)) if latents is None else latents
    n = min(n, len(unit) - 1)
    found = []
    for block in latents.to(unit.device).split(max(1, (1 << 25) // len(unit))):
        cosines = unit[block] @ unit.t()
        cosines.scatter_(1, block[:, None], -2.0)
        found.append(cosines.topk(n, dim=1))
    if not found:
        return torch.empty(0, n, dtype=torch.int64), torch.empty(0, n)
    return torch.cat([f.indices for f in found]).cpu(), torch.cat([f.values for f in found]).cpu()


@torch.no_grad()
def plane(W_dec: Tensor, near: Tensor, *, seed: int = 0) -> Tensor:
    """Places (F, 2) in 0..1, neighbours near each other: UMAP's forces on the graph of neighbours (McInnes et al. 2018,
    arxiv.org/abs/1802.03426, with a = b = 1), starting at the first two principal components. near (F, n)."""
    unit = torch.nn.functional.normalize(W_dec.detach().float().cpu(), dim=1)
    F, n = near.shape
    if F < 3 or n == 0:
        return torch.full((F, 2), 0.5)
    centred = unit - unit.mean(0)
    places = centred @ torch.linalg.eigh(centred.t() @ centred).eigenvectors[:, -2:]
    places *= 4 / places.std(0).clamp(min=1e-9)
    g = torch.Generator().manual_seed(seed)
    places += 1e-2 * torch.randn(F, 2, generator=g)  # separates equal rows
    a, b = torch.arange(F).repeat_interleave(n), near.flatten()
    for epoch in range(EPOCHS):
        rate = 0.3 * (1 - epoch / EPOCHS)
        step = torch.zeros_like(places)
        apart = places[a] - places[b]
        pull = -2 * apart / (1 + apart.square().sum(1, keepdim=True))
        step.index_add_(0, a, pull).index_add_(0, b, pull, alpha=-1)
        others = torch.randint(F, (F, 5), generator=g)
        apart = places[:, None] - places[others]
        square = apart.square().sum(-1, keepdim=True)
        step += (2 * apart / ((0.01 + square) * (1 + square))).sum(1).clamp(-4, 4)
        places += rate * step.clamp(-4, 4)
    # a few outliers must not shrink the rest to a dot
    low, high = places.quantile(0.005, dim=0), places.quantile(0.995, dim=0)
    return ((places - low) / (high - low).clamp(min=1e-9)).clamp(-0.03, 1.03) * 0.92 + 0.04
