"""Optimisers by name behind one face: step, state, and the averaged weights where an optimiser has its own.

Letters: D width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sae.base import SAE, SHARED
from sae.config import SAEConfig, UserError, require
from sae.distributed import ALONE, Axis
from sae.kernels import sparse
from sae.kernels.adam import AdamStep, adam_, squares
from sae.schedules import adam_betas, peak_lr


class ScheduleFreeSignum(torch.optim.Optimizer):
    """Sign descent under schedule-free averaging (Defazio et al. 2024, arxiv.org/abs/2405.15682): no decay is needed.

    Parameters hold y, where gradients are taken; state holds z, which takes the steps; x = (y - (1 - m) z) / m, their
    running average, is the one to use.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            lr, m = group["lr"], group["momentum"]
            largest = group["largest_lr"] = max(lr, group.get("largest_lr", 0.0))
            group["weight_sum"] = group.get("weight_sum", 0.0) + largest**2
            share = largest**2 / group["weight_sum"] if group["weight_sum"] else 0.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone(memory_format=torch.preserve_format))
                x = torch.lerp(p, z, 1 - 1 / m)
                z.mul_(1 - lr * group["weight_decay"]).sub_(p.grad.sign(), alpha=lr)
                p.copy_(x.lerp_(z, share).lerp_(z, 1 - m))


def clip_gradients_(
    params: list[nn.Parameter], most: float, shards: Axis = ALONE.latents, shared: Sequence[nn.Parameter] = ()
) -> Tensor:
    """Scale the gradients down to a joint norm of at most `most`, in place; returns the norm there was.

    Where shards have a part of the latents each: `shared` are the parameters that all of them have.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if shards.size > 1:
        rest = torch.nn.utils.get_total_norm([p.grad for p in shared if p.grad is not None]).double().square()
        norm = (shards.sum_(norm.double().square() - rest) + rest).sqrt().to(norm.dtype)
    if norm.device.type != "cpu" or not norm <= most:  # elsewhere a look at the norm costs more than a pass over memory
        torch.nn.utils.clip_grads_with_norm_(params, most, norm)
    return norm


def grad_of(p: nn.Parameter) -> Tensor:
    """The gradient of p, contiguous as p is: a sum over processes and torch's fused Adam want it so. Zeros where there
    is none."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    elif not p.grad.is_contiguous():
        p.grad = p.grad.contiguous()
    return p.grad


class Adam(torch.optim.Adam):
    """torch's Adam, same states and same steps, in our own fused pass where that is quicker.

    moments: their dtype. In bfloat16 they are rounded up or down at random, in proportion to what is near, or small
    changes of large moments would be lost every time.
    """

    def __init__(self, params: Any, *, moments: torch.dtype = torch.float32, **options: Any):
        super().__init__(params, **options)
        self.moments = moments

    def is_ours(self) -> bool:
        """Whether `squares` and `adam_` take the step: where they are quicker than torch's, and no scaler is in it."""
        params = [p for group in self.param_groups for p in group["params"]]
        quicker = params[0].device.type == "cpu" or sparse.compiled(*params) is not None
        return quicker and getattr(self, "found_inf", None) is None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    grad_of(p)
        if self.moments is torch.float32 and (closure is not None or not self.is_ours()):
            return super().step(closure)
        return self.descend()

    @torch.no_grad()
    def descend(self, scale: Tensor | float = 1.0, unit: Tensor | None = None) -> None:
        """A step on gradients times scale; the parameter `unit` has rows of unit norm, and moves on the sphere."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    zeros = lambda p=p: torch.zeros_like(p, dtype=self.moments)
                    state |= {"step": torch.zeros(()), "exp_avg": zeros(), "exp_avg_sq": zeros()}
                state["step"] = state["step"].cpu() + 1  # torch loads it to the GPU, where reading it would wait
                beta1, beta2 = group["betas"]
                how = AdamStep(int(state["step"]), group["lr"], beta1, beta2, group["eps"])
                adam_(p, p.grad, state["exp_avg"], state["exp_avg_sq"], how, scale, p is unit)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """torch's gives every state its parameter's dtype."""
        super().load_state_dict(state)
        for one in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                one[name] = one[name].to(self.moments)


class Optimizer:
    """One or two torch optimisers over an SAE's parameters, whose step sizes move together, and the averaged weights.

    The weights in the SAE are those that gradients are taken at. Those to use differ from them under --ema (a running
    average, corrected for its start at 0) and under schedule-free optimisers (their own average).
    """

    def __init__(self, sae: SAE, c: SAEConfig, n_steps: int, device: torch.device):
        self.sae = sae
        self.shared = [p for name, p in sae.named_parameters() if name in SHARED]
        self.most = c.clip_norm if c.clip_norm is not None else math.inf
        self.parts = _made(sae, c, n_steps, device)
        self.ema, self.n_averaged = c.ema, 0
        self.average = {n: torch.zeros_like(p) for n, p in sae.named_parameters()} if c.ema else {}

    def step(self, lr: float, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """One update of the SAE at this step size, through the gradient scaler if there is one; returns the norm of
        the gradients, less what lies along decoder rows of fixed norm, before it was clipped."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
        only = self.parts[0]
        if scaler is None and isinstance(only, Adam) and only.is_ours():
            return self._fused_step(only)
        if scaler is not None:
            for part in self.parts:
                scaler.unscale_(part)
        self.sae.project_gradient_()
        norm = clip_gradients_(list(self.sae.parameters()), self.most, self.sae.world.latents, self.shared)
        for part in self.parts:
            if scaler is None:
                part.step()
            else:
                scaler.step(part)
        if scaler is not None:
            scaler.update()
        factors = self.sae.renormalize_()
        if factors is not None:
            self._rescale_rows_(self.sae.W_dec, factors)
        return norm

    def _fused_step(self, adam: Adam) -> Tensor:
        """The same in two passes over memory: one for the norm, one for all else."""
        unit = self.sae.W_dec if self.sae.unit_decoder else None
        total: Tensor | float = 0.0
        rest: Tensor | float = 0.0
        for p in self.sae.parameters():
            if p.grad is not None:
                square = squares(grad_of(p), unit if p is unit else None)
                total += square
                rest += square if any(p is one for one in self.shared) else 0.0
        shards = self.sae.world.latents
        if shards.size > 1:
            device = self.sae.W_dec.device
            total = shards.sum_(torch.as_tensor(total - rest, dtype=torch.float64, device=device).clone()) + rest
        norm = torch.as_tensor(total, dtype=torch.float64).sqrt()
        adam.descend((self.most / (norm + 1e-6)).clamp(max=1.0), unit)
        return norm.float()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """parts: for each optimiser its state by parameter name, and its settings."""
        known = {id(p): name for name, p in self.sae.named_parameters()}
        parts = []
        for part in self.parts:
            names = [known[id(p)] for group in part.param_groups for p in group["params"]]
            state = part.state_dict()
            parts.append({"state": {names[i]: s for i, s in state["state"].items()}, "groups": state["param_groups"]})
        return {"parts": parts, "average": self.average, "n_averaged": self.n_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        known = {id(p): name for name, p in self.sae.named_parameters()}
        for part, saved in zip(self.parts, state["parts"], strict=True):
            names = [known[id(p)] for group in part.param_groups for p in group["params"]]
            numbered = {names.index(name): s for name, s in saved["state"].items()}
            part.load_state_dict({"state": numbered, "param_groups": saved["groups"]})
        for name, average in self.average.items():
            average.copy_(state["average"][name])
        self.n_averaged = state["n_averaged"]

    @torch.no_grad()
    def renew_(self, name: str, p: nn.Parameter, rows: Tensor) -> None:
        """Forget what was learned of some rows of a parameter, which have just got new values."""
        for state in (part.state[p] for part in self.parts if p in part.state):
            for key, moment in state.items():
                if isinstance(moment, Tensor) and moment.shape == p.shape:
                    moment[rows] = p[rows] if key == "z" else 0.0
        if self.average:
            self.average[name][rows] = p[rows] * self._seen

    @property
    def _seen(self) -> float:
        """The share of the running average that is not its start at 0."""
        return 1 - (self.ema or 0.0) ** self.n_averaged

    @torch.no_grad()
    def average_(self) -> None:
        """Add the weights of a finished step to the running average."""
        for name, p in self.sae.named_parameters() if self.average else ():
            self.average[name].lerp_(self._scheduled(p), 1 - (self.ema or 0.0))
        self.n_averaged += 1

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor] | None:
        """The weights to use, by name; None where they are the SAE's own."""
        if self.average and self.n_averaged:
            return {name: value / self._seen for name, value in self.average.items()}
        if not any("z" in state for part in self.parts for state in part.state.values()):
            return None
        return {name: self._scheduled(p) for name, p in self.sae.named_parameters()}

    @torch.no_grad()
    def _rescale_rows_(self, p: Tensor, factors: Tensor) -> None:
        """Follow a change of p's rows by factors (F, 1), so that schedule-free's average is of unit rows too."""
        for part in self.parts:
            if "z" in part.state.get(p, {}):
                part.state[p]["z"].mul_(factors)

    def _scheduled(self, p: Tensor) -> Tensor:
        """Parameter p as schedule-free's running average x has it, else p itself."""
        for part in self.parts:
            z = part.state.get(p, {}).get("z")
            if z is not None:
                return torch.lerp(p.detach(), z, 1 - 1 / part.param_groups[0]["momentum"])
        return p.detach()


def _made(sae: SAE, c: SAEConfig, n_steps: int, device: torch.device) -> list[Any]:
    """The torch optimisers that --optimizer names."""
    params, lr, decay = list(sae.parameters()), peak_lr(c), c.weight_decay
    if c.optimizer == "signum":
        return [ScheduleFreeSignum(params, lr=lr, weight_decay=decay)]
    if c.optimizer == "sgd":
        return [torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=decay)]
    if c.optimizer == "adam8bit":
        require(device.type == "cuda", f"--optimizer adam8bit runs on CUDA and this is {device}; give --optimizer adam")
        return [bitsandbytes_adam()(params, lr=lr, betas=adam_betas(c, n_steps), weight_decay=decay)]
    matrices: list[Any] = []
    if c.optimizer == "muon":
        newer = f"--optimizer muon needs torch 2.9 and this is {torch.__version__}; give --optimizer adam"
        require(hasattr(torch.optim, "Muon"), newer)
        # updates of the size that Adam's have, so that one step size serves both (Moonlight, arxiv.org/abs/2502.16982)
        how: dict[str, Any] = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        matrices = [torch.optim.Muon([p for p in params if p.ndim == 2], lr=lr, weight_decay=decay, **how)]
        params = [p for p in params if p.ndim != 2]
    fused = device.type in ("cpu", "cuda")  # one pass over memory, where torch has it
    settings: dict[str, Any] = {"lr": lr, "betas": adam_betas(c, n_steps), "fused": fused}
    if decay:
        return [*matrices, torch.optim.AdamW(params, weight_decay=decay, **settings)]
    return [*matrices, Adam(params, moments=getattr(torch, c.optimizer_dtype), **settings)]


def bitsandbytes_adam() -> Any:
    try:
        import bitsandbytes
    except ImportError as e:
        raise UserError("--optimizer adam8bit needs bitsandbytes; run: pip install 'nanosae[optim]'") from e
    return bitsandbytes.optim.AdamW8bit
