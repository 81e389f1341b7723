"""Adam's step on one tensor, and the norm of a gradient: C++ or Triton, and the plain twin, block by block.

Letters: D width, F rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as fused_adam

from sae.kernels import sparse

AT_ONCE = 2**18  # numbers of a tensor in one block of plain torch, which caches hold


class AdamStep(NamedTuple):
    """The number of the step, from 1, and Adam's settings (Kingma & Ba 2015, algorithm 1)."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float


def adam_(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, how: AdamStep, scale: Tensor | float = 1.0, unit_rows: bool = False
) -> None:
    """Adam, in place, with the gradient times scale; all four tensors have one layout. m, v: float32 or bfloat16.

    unit_rows: p's rows (F, D) move on the sphere: the gradient's part along a row is dropped first, and the row gets
    unit norm after.
    """
    if ops := sparse.compiled(p, grad):
        ops.adam_(p, grad, m, v, *how, scale, unit_rows)
        return
    generator = torch.Generator(p.device).manual_seed(how.step)
    scaled = p.device.type != "cpu" or scale != 1  # elsewhere a look at the scale would wait for the device
    for w, g, first, second in _blocks(p, grad, m, v):
        if unit_rows:
            dots, per_square = _dots(g, w)
            g = torch.addcmul(g, (dots * per_square)[:, None], w, value=-1)
        if scaled:
            g = g * scale
        if m.dtype is torch.float32:
            at = torch.tensor(float(how.step - 1), device=p.device)
            settings = {**how._asdict(), "weight_decay": 0.0, "amsgrad": False, "maximize": False, "fused": True}
            del settings["step"]
            fused_adam([w], [g], [first], [second], [], [at], **settings)
        else:
            _rounded_adam_(w, g, first, second, how, generator)
        if unit_rows:
            sparse.unit_rows_(w)


def _rounded_adam_(w: Tensor, g: Tensor, m: Tensor, v: Tensor, how: AdamStep, generator: torch.Generator) -> None:
    """Adam with moments in bfloat16, rounded at random: small changes of large moments would be lost every time."""
    new_m = m.float().lerp_(g, 1 - how.beta1)
    new_v = v.float().mul_(how.beta2).addcmul_(g, g, value=1 - how.beta2)
    root = (new_v / (1 - how.beta2**how.step)).sqrt_().add_(how.eps)
    w.addcdiv_(new_m, root, value=-how.lr / (1 - how.beta1**how.step))
    for kept, new in ((m, new_m), (v, new_v)):
        random = torch.randint(0, 1 << 16, new.shape, generator=generator, device=new.device, dtype=torch.int32)
        kept.copy_((new.view(torch.int32) + random).bitwise_and_(-1 << 16).view(torch.float32))


def squares(grad: Tensor, W: Tensor | None = None) -> Tensor | float:
    """Sum of squares of grad; with rows W, of grad's rows (F, D) without their part along W's."""
    if ops := sparse.compiled(grad):
        return ops.squares(grad, W)
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for g, w in _blocks(grad, grad if W is None else W):
        of_rows = torch.linalg.vector_norm(g, dim=-1).double().square()
        if W is not None:
            dots, per_square = _dots(g, w)
            of_rows = (of_rows - (dots * dots * per_square).double()).clamp_(min=0)
        total += of_rows.sum()
    return total


def _dots(g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The product of each row of w (F, D) with the same row of g, and 1 over that with itself: (F,) both."""
    return (g * w).sum(1), 1 / torch.linalg.vector_norm(w, dim=1).square().clamp_(min=1e-24)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each of several tensors of one shape at a time."""
    rows = [t.detach() for t in tensors]
    size = max(1, AT_ONCE * len(rows[0]) // max(1, rows[0].numel())) if rows[0].ndim else 1
    yield from zip(*(t.split(size) for t in rows), strict=True)
