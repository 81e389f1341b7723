"""ActivationCollector: keep activations at any hookpoint while you run a model yourself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae import hooks
from sae.files import read_safetensors, write_safetensors
from sae.hookpoints import resolve


@dataclass(eq=False)
class ActivationCollector:
    """Keep what hookpoints hold while you run a model yourself:

        with ActivationCollector(model, ["transformer.h.3", "blocks.5.hook_mlp_out"]) as collector:
            model(tokens)
        x = collector.get_activations("transformer.h.3")      # (tokens, D) float32 on the CPU

    max_activations: rows kept per hookpoint; later ones are not stored. save_path: a folder written on leaving.
    """

    model: nn.Module
    hook_points: Sequence[str]
    _: KW_ONLY
    max_activations: int = 10_000_000
    device: str | torch.device = "cpu"
    save_path: str | Path | None = None

    def __post_init__(self) -> None:
        self.hookpoints: dict[str, str] = {}
        for given in self.hook_points:
            found = resolve(self.model, hookpoints=[given])
            self.hookpoints |= {given: found[0]} if len(found) == 1 else {name: name for name in found}
        self.clear()

    def clear(self) -> None:
        """Forget what was collected."""
        self._blocks: dict[str, list[Tensor]] = {given: [] for given in self.hookpoints}

    @property
    def counts(self) -> dict[str, int]:
        """Rows collected: {hook point: tokens}."""
        return {given: sum(map(len, blocks)) for given, blocks in self._blocks.items()}

    def _keep(self, given: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)[: self.max_activations - self.counts[given]]
        if len(rows):
            self._blocks[given].append(rows.to(self.device, torch.float32, copy=True))

    def __enter__(self) -> ActivationCollector:
        keepers = {path: partial(self._keep, given) for given, path in self.hookpoints.items()}
        self._context = hooks.hooked(self.model, keepers)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        if self.save_path is not None and error[0] is None:
            self.save_activations(self.save_path)

    @property
    def activations(self) -> dict[str, Tensor]:
        """Everything collected: {hook point: (tokens, D)}."""
        return {given: torch.cat(xs) if xs else torch.empty(0) for given, xs in self._blocks.items()}

    def get_activations(self, hook_point: str | None = None) -> Any:
        """One hook point's (tokens, D), or the dict of all."""
        return self.activations if hook_point is None else self.activations[hook_point]

    def save_activations(self, folder: str | Path) -> None:
        """Write one safetensors file that keeps the hook points' names."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_safetensors(self.activations, Path(folder) / "activations.safetensors")

    @staticmethod
    def load_activations(folder: str | Path) -> dict[str, Tensor]:
        """Read what save_activations wrote."""
        return read_safetensors(Path(folder) / "activations.safetensors")
