"""Metrics as running sums over tokens, divided once at the end: the same code serves training logs and evaluation.

Definitions are the field's (docstrings name the source). Knows no SAE, no model and no text.

Letters: B tokens in a batch, D width, F latents, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from sae.distributed import ALONE, Axis, World
from sae.flags import UserError
from sae.hooks import Acts
from sae.kernels.sparse import Codes, count, moments


class Totals:
    """Sums over tokens in float64, from which every reconstruction and sparsity metric follows.

    Adding a batch in two halves gives the same totals, so no metric depends on the batch size. `mean` (D,) is what the
    legacy per-token explained variance and nothing else is measured against. world: its processes hold the latents
    between them, n_latents in all, and `reduced` adds up what each counted on its tokens.
    """

    def __init__(
        self, d_in: int, n_latents: int, *, device: torch.device | str = "cpu", mean: Tensor | None = None,
        world: World = ALONE,
    ):  # fmt: skip
        device = torch.device(device)
        device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        zero = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        self.mean = None if mean is None else mean.to(device, torch.float64)
        self.n = 0
        self.x, self.x2, self.e2 = zero(d_in), zero(), zero()
        self.x_hat2, self.dot = zero(), zero()
        self.cosine, self.l2_ratio, self.legacy = zero(), zero(), zero()
        self.l0, self.l0_squared = zero(), zero()
        self.latents, self.data = world.latents, world.data
        self.fired = torch.zeros(len(self.latents.range(n_latents)), dtype=torch.int64, device=device)
        self.l0_counts = torch.zeros(n_latents + 1, dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if not isinstance(v, Axis)}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            old = getattr(self, name)
            setattr(self, name, value.to(old.device) if isinstance(old, Tensor) else value)

    def reduced(self) -> Totals:
        """The sums over the tokens of all processes along `data`."""
        if self.data.size == 1:
            return self
        whole = copy.copy(self)
        whole.n = sum(self.data.objects(self.n))
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "mean":
                setattr(whole, name, self.data.sum_(value.clone()))
        return whole

    def merge(self, other: Totals) -> None:
        """Add the sums over other tokens."""
        self.n += other.n
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "mean":
                value.add_(getattr(other, name).to(value.device))

    @torch.no_grad()
    def add(self, x: Tensor, x_hat: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
        """Add a batch: x and x_hat (B, D), and the codes between them, whose `activity` it returns."""
        device = self.x.device
        l0, fired = codes.activity(len(self.fired))
        activity = (self.latents.sum_(l0), fired)
        l0 = activity[0].to(device)
        self.fired += fired.to(device)
        self.l0 += l0.sum()
        self.l0_squared += l0.double().square().sum()
        self.l0_counts += count(l0, len(self.l0_counts))
        x, x_hat = x.to(device), x_hat.to(device)
        (x2, x_hat2, dot, e2), total = moments(x, x_hat)
        lengths = (x2 * x_hat2).sqrt()
        self.n += len(x)
        self.x += total
        self.x2 += x2.sum()
        self.e2 += e2.sum()
        self.x_hat2 += x_hat2.sum()
        self.dot += dot.sum()
        self.cosine += (dot / lengths.clamp(min=1e-30)).sum()
        self.l2_ratio += (x_hat2 / x2.clamp(min=1e-30)).sqrt().sum()
        if self.mean is not None:
            self.legacy += (1 - e2 / (x.double() - self.mean).square().sum(-1).clamp(min=1e-30)).sum()
        return activity

    def metrics(self) -> dict[str, float]:
        """All metrics as plain numbers (reads the device).

        mse: squared error summed over D, mean over tokens (SAELens). fvu: error over variance, sum ||x - x_hat||^2 /
        sum ||x - mean||^2, the mean being that of the same tokens; explained_variance = 1 - fvu (SAELens since its
        PR 665). explained_variance_legacy: mean over tokens of 1 - ||e||^2 / ||x - mean||^2 (SAEBench paper).
        relative_reconstruction_bias: E||x_hat||^2 / E<x, x_hat>, 1 when unbiased, below 1 when shrunk (Gated paper,
        eq. 10). l2_ratio: mean ||x_hat|| / ||x||. dead_fraction: latents that fired on none of the n_tokens.
        """
        n = max(1, self.n)
        variance = float(self.x2 - self.x.square().sum() / n)
        fvu = float(self.e2) / variance if variance > 0 else float("nan")
        l0 = float(self.l0) / n
        return {
            "n_tokens": self.n,
            "l0": l0,
            "l0_std": max(0.0, float(self.l0_squared) / n - l0**2) ** 0.5,
            "mse": float(self.e2) / n,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "explained_variance_legacy": float(self.legacy) / n if self.mean is not None else float("nan"),
            "cosine": float(self.cosine) / n,
            "l2_ratio": float(self.l2_ratio) / n,
            "relative_reconstruction_bias": float(self.x_hat2) / float(self.dot) if float(self.dot) else float("nan"),
            "dead_fraction": float(self.latents.mean((self.fired == 0).double())),
        }

    def densities(self) -> Tensor:
        """(F,) float64: the share of tokens each latent fires on."""
        return self.fired.double() / max(1, self.n)


class Window:
    """Sums over the steps between two lines of the log, kept on the device: Totals, and means over steps.

    The partial ones are sums over the tokens of this process; the others are the same in all processes.
    """

    PARTIAL = ("loss", "objective", "sparsity", "aux")
    NAMES = (*PARTIAL, "grad_norm", "penalty_weight")
    WHOLE = ("totals",)  # the parts of its state that have no axis of latents

    def __init__(self, d_out: int, n_latents: int, device: torch.device, world: World = ALONE):
        self.totals = Totals(d_out, n_latents, device=device, world=world)
        self.sums = {name: torch.zeros((), device=device) for name in self.NAMES}
        self.n_steps, self.data = 0, world.data

    def add(self, **values: Tensor) -> None:
        """Add to the sums by name."""
        for name, value in values.items():
            self.sums[name] += value

    def whole(self) -> dict[str, Tensor]:
        """The sums over the tokens of all processes."""
        partial = self.data.sum_(torch.stack([self.sums[name] for name in self.PARTIAL]))
        return self.sums | dict(zip(self.PARTIAL, partial, strict=True))

    def read(self) -> dict[str, float]:
        """Means over the steps, and the metrics that the log shows (reads the device)."""
        metrics = {name: float(value) / max(1, self.n_steps) for name, value in self.whole().items()}
        totals = self.totals.reduced().metrics()
        return metrics | {name: totals[name] for name in ("fvu", "explained_variance", "l0", "cosine", "mse")}

    def state_dict(self) -> dict[str, Any]:
        totals = self.totals.reduced().state_dict()
        fired = totals.pop("fired")
        return {"totals": totals, "fired": fired, "sums": self.whole(), "n_steps": self.n_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a window's sums; the first process has those that all had together."""
        self.n_steps = state["n_steps"]
        self.sums = {name: value.to(self.sums[name].device) for name, value in state["sums"].items()}
        if self.data.rank == 0:
            self.totals.load_state_dict({**state["totals"], "fired": state["fired"]})
        else:
            self.sums |= {name: torch.zeros_like(self.sums[name]) for name in self.PARTIAL}


def divergence(new: Tensor, clean: Tensor) -> Tensor:
    """(n,): KL(clean || new) of log-probabilities (n, V). A token that clean rules out (-inf) has no share in it."""
    return torch.where(clean != -torch.inf, clean.exp() * (clean - new), 0.0).sum(-1)


def check_finite(acts: Acts) -> None:
    """Raise UserError if an activation is NaN or infinite."""
    for name, x in acts.items():
        if not torch.isfinite(x).all():
            whose = f" of '{name}'" if name else ""
            raise UserError(
                f"the activations{whose} contain NaN or infinity; check the model's weights, or use float32"
            )
