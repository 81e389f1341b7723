"""From token rows to a shuffled, resumable stream of (B, D) activation batches per hookpoint.

token rows -> language model -> source (rows in reading order) -> Stream (mixing buffer -> batches). Three sources
feed the one Stream: a live model, a cache on disk (cache.py), a tensor. Knows nothing of SAEs.

Letters: N sequences, T positions, B tokens in a batch, D width, M tokens in the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sae import hooks, log
from sae.config import UserError
from sae.formats import read_safetensors, write_safetensors
from sae.language_model import LanguageModel
from sae.stopwatch import Stopwatch
from sae.tokens import HOLD_OUT, PIECE_CHARS, TokenRows, kept_positions

Acts = dict[str, Tensor]  # hookpoint -> (tokens, D)

# --------------------------------------------------------------------------------------------------
# sources: activations in reading order


class Source(Protocol):
    """Activations in reading order, from any place on."""

    widths: dict[str, int]

    def read(self, n: int) -> Acts:
        """Some of the next rows, about n; an empty dict at the end of a pass."""
        ...

    def rewind(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ModelSource:
    """Activations of a live language model; the forward stops after the last hookpoint."""

    def __init__(
        self, lm: LanguageModel, rows: TokenRows, hookpoints: Sequence[str],
        *, model_batch_size: int = 16, skip_first: bool = False, exclude_tokens: Sequence[int] = (),
    ):  # fmt: skip
        self.lm, self.rows, self.hookpoints = lm, rows, list(hookpoints)
        self.model_batch_size = model_batch_size
        self.skip_first, self.exclude_tokens = skip_first, tuple(exclude_tokens)
        self.widths = lm.widths(self.hookpoints)
        self.watch = Stopwatch(lm.device)  # of the forwards

    def kept(self, ids: Tensor, valid: Tensor) -> Tensor:
        """(N, T) bool: the positions that train and count."""
        return kept_positions(self.lm, ids, valid, skip_first=self.skip_first, exclude_tokens=self.exclude_tokens)

    def read(self, n: int) -> Acts:
        del n  # one forward's worth; the buffer keeps what it has no room for
        return self.read_numbered()[0]

    def read_numbered(self) -> tuple[Acts, Tensor]:
        """The same rows, and for each the number of its sequence since the start of the pass (int64)."""
        while True:
            ids, valid = self.rows.take(self.model_batch_size)
            if len(ids) == 0:
                return {}, torch.empty(0, dtype=torch.int64)
            keep = self.kept(ids, valid)
            if not keep.any():
                continue
            at = keep.flatten().nonzero()[:, 0]  # found on the CPU: masks on a GPU make it wait
            with self.watch:
                hidden = self.lm.hidden(ids, valid, self.hookpoints)
            acts = {name: x.flatten(0, 1)[at.to(x.device)].float() for name, x in hidden.items()}
            first = self.rows.n_rows - len(ids)
            return acts, (torch.arange(len(ids)) + first)[:, None].expand_as(keep)[keep]

    def rewind(self) -> None:
        self.rows.rewind()

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


class TensorSource:
    """Activations in memory (or a memory map), in a new random order every pass."""

    def __init__(self, acts: Acts, *, seed: int = 0):
        self.acts, self.seed, self.n_passes = acts, seed, 0
        self.widths = {name: x.shape[1] for name, x in acts.items()}
        self.n = len(next(iter(acts.values())))
        self.start = 0
        self._shuffle()

    def _shuffle(self) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.n_passes)
        self.order = torch.randperm(self.n, generator=generator)

    def read(self, n: int) -> Acts:
        rows = self.order[self.start : self.start + n]
        self.start += len(rows)
        return {name: x[rows].float() for name, x in self.acts.items()} if len(rows) else {}

    def rewind(self) -> None:
        self.start, self.n_passes = 0, self.n_passes + 1
        self._shuffle()

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "n_passes": self.n_passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.n_passes = state["start"], state["n_passes"]
        self._shuffle()


def check_finite(acts: Acts) -> None:
    """Raise UserError if an activation is NaN or infinite."""
    for name, x in acts.items():
        if not torch.isfinite(x).all():
            raise UserError(
                f"the activations of '{name}' contain NaN or infinity; check the model's weights, or use float32"
            )


def gather(source: Source, n: int, what: str) -> Acts:
    """The first n rows of a source, in memory; fewer where it holds fewer. Raises UserError for none, or for NaN."""
    blocks: dict[str, list[Tensor]] = {name: [] for name in source.widths}
    have = 0
    with log.progress(n, what) as bar:
        while have < n and (acts := source.read(n - have)):
            for name, x in acts.items():
                blocks[name].append(x[: n - have])
            have += len(next(iter(acts.values())))
            bar.update(min(have, n) - bar.n)
    if have < 2:
        raise UserError(
            f"the data gave {have} tokens for {what}; give a longer text (without a validation split of its own, "
            f"every {HOLD_OUT}th piece of {PIECE_CHARS} characters is held out)"
        )
    acts = {name: torch.cat(xs) for name, xs in blocks.items()}
    check_finite(acts)
    return acts


# --------------------------------------------------------------------------------------------------
# the stream


class Stream:
    """Batches of B mixed activations per hookpoint: {hookpoint: (B, D)}, n_batches of them.

    n_tokens are drawn from the source, and each is given `uses` times: a model is slow and an SAE is quick, so one
    forward can serve several steps. They wait in a buffer of M tokens that is given out in random order and filled up
    when half of it is due, so that a batch mixes tokens from many sequences. A source that ends is read again;
    `n_passes` counts. `state_dict` holds all that the next batch depends on, the buffer included, so a resumed stream
    goes on to the bit.
    """

    def __init__(
        self, source: Source, *, n_tokens: int, batch_size: int, buffer_tokens: int, uses: int = 1, seed: int = 0,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.source, self.batch_size, self.uses = source, batch_size, uses
        self.n_batches = n_tokens * uses // batch_size
        if self.n_batches < 1:
            raise UserError(f"{n_tokens} tokens do not fill one batch of {batch_size}; lower --batch_size")
        self.n_tokens = -(-self.n_batches * batch_size // uses)
        size = min(max(2, buffer_tokens // batch_size) * batch_size, self.n_tokens)
        self.buffer = {name: torch.empty(size, d, device=device) for name, d in source.widths.items()}
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.arange(0)  # slots in the order they are given out, each as often as it is still due
        self.cursor = 0
        self.n_drawn = 0
        self.n_given = 0
        self.n_passes = 0
        self.spill: Acts = {}

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Acts:
        if self.n_given == self.n_batches * self.batch_size:
            raise StopIteration
        self._fill()
        slots = self.order[self.cursor : self.cursor + self.batch_size]
        self.cursor += self.batch_size
        self.n_given += self.batch_size
        return {name: x[slots.to(x.device)] for name, x in self.buffer.items()}

    def sample(self) -> Acts:
        """The full buffer, without drawing from it: a fair look at the data before training."""
        self._fill()
        return {name: x[: min(self.size, self.n_drawn)] for name, x in self.buffer.items()}

    def _fill(self) -> None:
        """Once half of what the buffer has to give is given: fill the slots that are done, and mix."""
        due = self.order[self.cursor :]
        if self.n_drawn == self.n_tokens or (len(due) > self.size * self.uses // 2 and self.n_drawn > 0):
            return
        occupied = torch.zeros(self.size, dtype=torch.bool)
        occupied[due] = True
        slots = (~occupied).nonzero()[:, 0][: self.n_tokens - self.n_drawn]
        done = 0
        while done < len(slots):
            acts = self.spill or self._read(len(slots) - done)
            n = min(len(slots) - done, len(next(iter(acts.values()))))
            for name, x in acts.items():
                buffer = self.buffer[name]
                buffer[slots[done : done + n].to(buffer.device)] = x[:n].to(buffer.device)
            rest = {name: x[n:] for name, x in acts.items()}
            self.spill = rest if len(next(iter(rest.values()))) else {}
            done += n
        self.n_drawn += len(slots)
        order = torch.cat((slots.repeat(self.uses), due))
        self.order = order[torch.randperm(len(order), generator=self.generator)]
        self.cursor = 0

    def _read(self, n: int) -> Acts:
        acts = self.source.read(n)
        if not acts:
            self.source.rewind()
            self.n_passes += 1
            acts = self.source.read(n)
            if not acts:
                raise UserError("the dataset is empty, or too short for one sequence; give a longer text")
        return acts

    def state_dict(self) -> dict[str, Any]:
        return {
            "source": self.source.state_dict(), "buffer": {k: v.clone() for k, v in self.buffer.items()},
            "order": self.order, "cursor": self.cursor,
            "n_drawn": self.n_drawn, "n_given": self.n_given, "n_passes": self.n_passes,
            "spill": {k: v.clone() for k, v in self.spill.items()}, "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        for name, x in state["buffer"].items():
            self.buffer[name].copy_(x)
        self.order, self.cursor = state["order"], state["cursor"]
        self.n_drawn, self.n_given, self.n_passes = state["n_drawn"], state["n_given"], state["n_passes"]
        self.spill = state["spill"]
        self.generator.set_state(state["generator"])


# --------------------------------------------------------------------------------------------------
# by hand, on any module


class ActivationCollector:
    """Keep what hookpoints hold while you run a model yourself:

        with ActivationCollector(model, ["transformer.h.3", "blocks.5.hook_mlp_out"]) as collector:
            model(tokens)
        x = collector.get_activations("transformer.h.3")      # (tokens, D) float32 on the CPU

    max_activations: rows kept per hookpoint; later ones are not stored. save_path: a folder written on leaving.
    """

    def __init__(
        self, model: nn.Module, hook_points: Sequence[str], *, max_activations: int = 10_000_000,
        device: str | torch.device = "cpu", save_path: str | Path | None = None,
    ):  # fmt: skip
        self.model, self.max_activations, self.device = model, max_activations, device
        self.save_path = Path(save_path) if save_path is not None else None
        self.hookpoints: dict[str, str] = {}
        for given in hook_points:
            found = hooks.resolve(model, hookpoints=[given])
            self.hookpoints |= {given: found[0]} if len(found) == 1 else {name: name for name in found}
        self.clear()

    def clear(self) -> None:
        """Forget what was collected."""
        self._blocks: dict[str, list[Tensor]] = {given: [] for given in self.hookpoints}
        self.counts = dict.fromkeys(self.hookpoints, 0)

    def __enter__(self) -> ActivationCollector:
        def keeper(given: str) -> Callable[[Tensor], None]:
            def keep(x: Tensor) -> None:
                rows = x.detach().flatten(0, -2)[: self.max_activations - self.counts[given]]
                if len(rows):
                    self._blocks[given].append(rows.to(self.device, torch.float32, copy=True))
                    self.counts[given] += len(rows)

            return keep

        self._context = hooks.hooked(self.model, {path: keeper(given) for given, path in self.hookpoints.items()})
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
