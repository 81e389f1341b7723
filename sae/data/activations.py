"""From token rows to a shuffled, resumable stream of (B, D) activation batches per hookpoint.

token rows -> language model -> source (rows in reading order) -> Stream (mixing buffer -> batches). Three sources
feed the one Stream: a live model, a cache on disk (cache.py), a tensor. Knows nothing of SAEs.

Letters: N sequences, T positions, B tokens in a batch, D width, M tokens in the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sae import log
from sae.config import UserError
from sae.data.buffer import Buffer, Wanted
from sae.data.collector import ActivationCollector as ActivationCollector  # its old place
from sae.data.tokens import HOLD_OUT, PIECE_CHARS, Rows, TokenRows
from sae.distributed import ALONE, World
from sae.hooks import Acts as Acts
from sae.log import Stopwatch
from sae.metrics import check_finite

# --------------------------------------------------------------------------------------------------
# sources: activations in reading order


class Source(Protocol):
    """Activations in reading order, from any place on, in blocks of the source's own size."""

    widths: dict[str, int]

    def read(self) -> Acts:
        """The next block of rows; an empty dict at the end of a pass."""
        ...

    def skip(self) -> int:
        """Leave out the block that `read` would give; its number of rows."""
        ...

    def rewind(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ModelSource:
    """Activations of a live language model; the forward stops after the last hookpoint."""

    def __init__(self, rows: TokenRows, hookpoints: Sequence[str], *, model_batch_size: int = 16):
        self.lm, self.rows, self.hookpoints = rows.lm, rows, list(hookpoints)
        self.model_batch_size = model_batch_size
        self.widths = self.lm.widths(self.hookpoints)
        self.watch = Stopwatch(self.lm.device)  # of the forwards

    def read(self) -> Acts:
        return self.read_numbered()[0]

    def read_numbered(self) -> tuple[Acts, Tensor]:
        """The same rows, and for each the number of its sequence since the start of the pass (int64)."""
        ids, valid, keep = self._take()
        if len(ids) == 0:
            return {}, torch.empty(0, dtype=torch.int64)
        at = keep.flatten().nonzero()[:, 0]  # on the CPU: indexing with a GPU's mask waits for the GPU
        with self.watch:
            hidden = self.lm.hidden(ids, valid, self.hookpoints)
        acts = {name: x.flatten(0, 1)[at.to(x.device)].float() for name, x in hidden.items()}
        first = self.rows.n_rows - len(ids)
        return acts, (torch.arange(len(ids)) + first)[:, None].expand_as(keep)[keep]

    def skip(self) -> int:
        return int(self._take().keep.sum())

    def _take(self) -> Rows:
        """The next sequences with a position to keep; none at the end of a pass."""
        while True:
            rows = self.rows.take(self.model_batch_size)
            if len(rows.ids) == 0 or rows.keep.any():
                return rows

    def rewind(self) -> None:
        self.rows.rewind()

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


class TensorSource:
    """Activations in memory (or a memory map), in a new random order every pass."""

    def __init__(self, acts: Acts, *, seed: int = 0, block_rows: int = 4096):
        self.acts, self.seed, self.block_rows, self.n_passes = acts, seed, block_rows, 0
        self.widths = {name: x.shape[1] for name, x in acts.items()}
        self.n = len(next(iter(acts.values())))
        self.start = 0
        self._shuffle()

    def _shuffle(self) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.n_passes)
        self.order = torch.randperm(self.n, generator=generator)

    def read(self) -> Acts:
        first = self.start
        rows = self.order[first : first + self.skip()]
        return {name: x[rows].float() for name, x in self.acts.items()} if len(rows) else {}

    def skip(self) -> int:
        first, self.start = self.start, min(self.start + self.block_rows, self.n)
        return self.start - first

    def rewind(self) -> None:
        self.start, self.n_passes = 0, self.n_passes + 1
        self._shuffle()

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start, "n_passes": self.n_passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.n_passes = state["start"], state["n_passes"]
        self._shuffle()


class Block(NamedTuple):
    """The next rows of a source: how many (0 at the end of a pass), the process that holds them, their values there."""

    n_rows: int
    holder: int
    acts: Acts

    def split(self, n: int) -> tuple[Block, Block]:
        """The first n rows, or all if there are fewer; and the rest."""
        n = min(n, self.n_rows)
        head, rest = ({name: x[part] for name, x in self.acts.items()} for part in (slice(n), slice(n, None)))
        return Block(n, self.holder, head), Block(self.n_rows - n, self.holder, rest)


class Turns:
    """A source whose blocks the processes read by turns; each knows how long the others' are."""

    def __init__(self, source: Source, world: World = ALONE):
        self.source, self.everyone, self.turn = source, world.everyone, 0

    def read(self) -> Block:
        holder, self.turn = self.turn, (self.turn + 1) % self.everyone.size
        if holder != self.everyone.rank:
            return Block(self.source.skip(), holder, {})
        acts = self.source.read()
        return Block(len(next(iter(acts.values()))) if acts else 0, holder, acts)


def gather(source: Source, n: int, what: str, *, world: World = ALONE, wanted: Wanted = None) -> Acts:
    """The first n rows of a source, in memory; fewer where it holds fewer. Raises UserError for none, or for NaN.

    Of several processes each reads a part, and gets every n-th row of the hookpoints it wants; n is the replicas.
    """
    turns, blocks, have = Turns(source, world), [], 0
    with log.progress(n, what) as bar:
        while have < n and (block := turns.read()).n_rows:
            blocks.append(block.split(n - have)[0])
            check_finite(blocks[-1].acts)
            have += blocks[-1].n_rows
            bar.update(have - bar.n)
    if have < 2:
        raise UserError(
            f"the data gave {have} tokens for {what}; give a longer text (without a validation split of its own, "
            f"every {HOLD_OUT}th piece of {PIECE_CHARS} characters is held out)"
        )
    if world.everyone.size == 1:
        return {name: torch.cat([block.acts[name] for block in blocks]) for name in source.widths}
    buffer = Buffer(have, source.widths, device=world.device, world=world, wanted=wanted)
    slots = torch.arange(have)
    for block, some in zip(blocks, slots.split([block.n_rows for block in blocks]), strict=True):
        buffer.put(some, block.acts, block.holder)
    return buffer.take(slots, slots % world.shape[1])


# --------------------------------------------------------------------------------------------------
# the stream


@dataclass(eq=False)
class Stream:
    """Batches of B mixed activations per hookpoint: {hookpoint: (B, D)}, n_batches of them.

    n_tokens are drawn from the source, and each is given `uses` times: a model is slow and an SAE is quick, so one
    forward can serve several steps. They wait in a buffer of M tokens that is given out in random order and refilled
    when half of it has been, so that a batch mixes tokens from many sequences. A source that ends is read again;
    `n_passes` counts. `state_dict` holds all that the next batch depends on, so a resumed stream continues bit for bit.

    The batches are the same for any number of processes: they read the source by turns, and each gets its part of a
    batch.
    """

    source: Source
    _: KW_ONLY
    n_tokens: int
    batch_size: int
    buffer_tokens: int
    uses: int = 1
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE
    wanted: Wanted = None
    STATE: ClassVar = ("order", "cursor", "n_drawn", "n_given", "n_passes")  # beside its parts'

    def __post_init__(self) -> None:
        size, world = self.batch_size, self.world
        self.turns = Turns(self.source, world)
        self.n_batches = self.n_tokens * self.uses // size
        if self.n_batches < 1:
            raise UserError(f"{self.n_tokens} tokens do not fill one batch of {size}; lower --batch_size")
        if size < world.shape[1]:
            raise UserError(f"batch_size {size} is below the {world.shape[1]} replicas; raise --batch_size")
        self.n_tokens = -(-self.n_batches * size // self.uses)
        self.size = min(max(2, self.buffer_tokens // size) * size, self.n_tokens)
        self.buffer = Buffer(self.size, self.source.widths, device=self.device, world=world, wanted=self.wanted)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.order = torch.arange(0)  # the next slots to give out; one appears once per remaining use
        self.cursor = self.n_drawn = self.n_given = self.n_passes = 0
        self.spill = Block(0, 0, {})  # read and not yet in the buffer

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
        return self.buffer.take(slots)

    def sample(self) -> Acts:
        """The full buffer, not used up: a fair sample of the data before training.

        Of n replicas each gets every n-th token.
        """
        self._fill()
        slots = torch.arange(self.n_sample)
        return self.buffer.take(slots, slots % self.world.shape[1])

    @property
    def n_sample(self) -> int:
        """Tokens in `sample`, of all processes."""
        return min(self.size, self.n_drawn)

    def _fill(self) -> None:
        """When half of the buffer has been given out: refill the free slots, and shuffle."""
        due = self.order[self.cursor :]
        if self.n_drawn == self.n_tokens or (len(due) > self.size * self.uses // 2 and self.n_drawn > 0):
            return
        occupied = torch.zeros(self.size, dtype=torch.bool)
        occupied[due] = True
        slots = (~occupied).nonzero()[:, 0][: self.n_tokens - self.n_drawn]
        done = 0
        while done < len(slots):
            block, self.spill = (self.spill if self.spill.n_rows else self._read()).split(len(slots) - done)
            self.buffer.put(slots[done : done + block.n_rows], block.acts, block.holder)
            done += block.n_rows
        self.n_drawn += len(slots)
        order = torch.cat((slots.repeat(self.uses), due))
        self.order = order[torch.randperm(len(order), generator=self.generator)]
        self.cursor = 0

    def _read(self) -> Block:
        """The next block; of the next pass if this one has ended."""
        block = self.turns.read()
        if not block.n_rows:
            self.source.rewind()
            self.n_passes += 1
            block = self.turns.read()
            if not block.n_rows:
                raise UserError("the dataset is empty, or too short for one sequence; give a longer text")
        return block

    def state_dict(self) -> dict[str, Any]:
        """The part of the state that all processes share; held_dict has the rest."""
        own = {name: getattr(self, name) for name in self.STATE}
        parts = {"source": self.source.state_dict(), "generator": self.generator.get_state()}
        return {**own, **parts, "n_spill": self.spill.n_rows}

    def held_dict(self) -> dict[str, Any]:
        """The activations that this process holds."""
        return {**self.buffer.state_dict(), "spill": {k: v.clone() for k, v in self.spill.acts.items()}}

    def load_state_dict(self, state: dict[str, Any], held: Sequence[dict[str, Any]]) -> None:
        """held: the held_dict of every process of the run that wrote the checkpoint, of any number."""
        self.source.load_state_dict(state["source"])
        self.buffer.load_state_dict(held)
        for name in self.STATE:
            setattr(self, name, state[name])
        spill: Acts = next((h["spill"] for h in held if h["spill"]), {}) if self.world.everyone.rank == 0 else {}
        self.spill = Block(state["n_spill"], 0, spill)
        self.generator.set_state(state["generator"])
