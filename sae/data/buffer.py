"""The mixing buffer, spread over processes: a row goes to the process that trains on it.

With one process a tensor per hookpoint and nothing more. Knows nothing of sources, batches or SAEs.

Letters: B tokens asked for, D width, M slots.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sae.distributed import World
from sae.hooks import Acts

Wanted = Sequence[Collection[str]] | None


class Buffer:
    """M slots of one activation per hookpoint. Every process knows each slot's holder, and stores its own only.

    wanted: for each group of SAEs the hookpoints that it learns from (default: all of them).
    """

    def __init__(
        self, size: int, widths: Mapping[str, int], *, device: torch.device | str, world: World, wanted: Wanted = None
    ):
        self.size, self.widths, self.world, self.device = size, dict(widths), world, device
        self.wanted = [[n for n in widths if wanted is None or n in wanted[g]] for g in range(world.n_groups)]
        self.rank, self.n_ranks = world.everyone.rank, world.everyone.size
        self._empty()

    def _empty(self) -> None:
        room = -(-self.size // self.n_ranks)
        self.rows = {name: torch.empty(room, d, device=self.device) for name, d in self.widths.items()}
        if self.n_ranks > 1:
            self.holder = torch.full((self.size,), -1)  # the process that holds each slot
            self.place = torch.full((self.size,), -1)  # its row in this process's memory, or -1
            self.free = torch.arange(room)

    def put(self, slots: Tensor, acts: Acts, holder: int = 0) -> None:
        """Fill slots (n,) with activations that process `holder` has; others pass any acts."""
        if self.n_ranks > 1:
            slots = self._make_room(slots, holder)
            if holder != self.rank:
                return
        for name, x in acts.items():
            to = self.rows[name]
            to[slots.to(to.device)] = x.to(to.device)

    def _make_room(self, slots: Tensor, holder: int) -> Tensor:
        """Forget the slots' content; the rows for the new content, if this process is the holder."""
        old = self.place[slots]
        self.free = torch.cat((self.free, old[old >= 0]))
        self.holder[slots], self.place[slots] = holder, -1
        if holder != self.rank:
            return slots
        lacking = len(slots) - len(self.free)
        if lacking > 0:
            n = len(next(iter(self.rows.values())))
            more = max(lacking, n // 8)
            self.rows = {name: torch.cat((x, x.new_empty(more, x.shape[1]))) for name, x in self.rows.items()}
            self.free = torch.cat((self.free, torch.arange(n, n + more)))
        rows, self.free = self.free[: len(slots)], self.free[len(slots) :]
        self.place[slots] = rows
        return rows

    def take(self, slots: Tensor, replicas: Tensor | None = None) -> Acts:
        """The content of slots (B,): the hookpoints that this process learns from, the tokens of its replica.

        replicas (B,): the replica that gets each token; by default equal numbers, most of them where they are already.
        The tokens keep their order.
        """
        if self.n_ranks == 1:
            return {name: x[slots.to(x.device)] for name, x in self.rows.items()}
        holders = self.holder[slots]
        if replicas is None:
            order = (holders // self.world.shape[2] % self.world.shape[1]).argsort(stable=True)
            replicas = torch.empty_like(order)
            replicas[order] = torch.arange(len(slots)) * self.world.shape[1] // len(slots)
        return self._exchange(slots, holders, replicas)

    def _exchange(self, slots: Tensor, holders: Tensor, replicas: Tensor) -> Acts:
        """One all-to-all: every process sends each other the activations that that one learns from."""
        pieces, give, take = [], [], []
        mine = self.wanted[self.world.group]
        own = replicas == self.world.replica
        width = sum(self.widths[name] for name in mine)
        arriving = []  # the places in the batch of each process's tokens
        for rank in range(self.n_ranks):
            group, replica = self.world.place_of(rank)
            rows = self.place[slots[(holders == self.rank) & (replicas == replica)]]
            pieces += [self.rows[name][rows.to(self.device)].flatten() for name in self.wanted[group]]
            give.append(len(rows) * sum(self.widths[name] for name in self.wanted[group]))
            arriving.append((own & (holders == rank)).nonzero()[:, 0])
            take.append(len(arriving[-1]) * width)
        got = self.world.everyone.exchange(torch.cat(pieces), give, take)
        order = torch.cat(arriving).argsort().to(self.device)
        acts = {}
        blocks = got.split(take)
        for name in mine:
            d = self.widths[name]
            acts[name] = torch.cat([b[: len(a) * d].view(-1, d) for a, b in zip(arriving, blocks, strict=True)])[order]
            blocks = [b[len(a) * d :] for a, b in zip(arriving, blocks, strict=True)]
        return acts

    # ----------------------------------------------------------------------------------------------
    # state

    def state_dict(self) -> dict[str, Any]:
        """The slots (n,) that this process holds, and their activations."""
        if self.n_ranks == 1:
            return {"slots": torch.arange(self.size), "rows": {name: x.clone() for name, x in self.rows.items()}}
        slots = (self.place >= 0).nonzero()[:, 0]
        rows = self.place[slots].to(self.device)
        return {"slots": slots, "rows": {name: x[rows] for name, x in self.rows.items()}}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over the slots of any number of processes: every n-th of them becomes this one's."""
        if self.n_ranks > 1:
            self._empty()
        for rank in range(self.n_ranks):
            for state in states:
                at = (state["slots"] % self.n_ranks == rank).nonzero()[:, 0]
                rows = state["rows"] if rank == self.rank else {}
                self.put(state["slots"][at], {name: x[at.to(x.device)] for name, x in rows.items()}, rank)
