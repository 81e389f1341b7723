"""Activations of many tokens by slot, each held by the process that read it, and the way to those that learn from it.

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
    """M slots of one activation per hookpoint. Every process knows who holds a slot, and has memory for its own only.

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
            self.place = torch.full((self.size,), -1)  # and the row it is in, where that is this one
            self.free = torch.arange(room)

    def put(self, slots: Tensor, acts: Acts, holder: int = 0) -> None:
        """Fill slots (n,) with activations that process `holder` has; on others acts is not looked at."""
        if self.n_ranks > 1:
            slots = self._make_room(slots, holder)
            if holder != self.rank:
                return
        for name, x in acts.items():
            to = self.rows[name]
            to[slots.to(to.device)] = x.to(to.device)

    def _make_room(self, slots: Tensor, holder: int) -> Tensor:
        """Forget what was in the slots; rows to put the new content in, where this process is the holder."""
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
        """What is in slots (B,): of the hookpoints that this process learns from, and of the tokens of its replica.

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
        """One all-to-all: every process gives each other what it holds of what that one learns from."""
        pieces, give, take = [], [], []
        mine = self.wanted[self.world.group]
        own = replicas == self.world.replica
        width = sum(self.widths[name] for name in mine)
        arriving = []  # where in the batch the tokens from each process stand
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
        """What this process holds: the slots (n,), and the activations in them."""
        if self.n_ranks == 1:
            return {"slots": torch.arange(self.size), "rows": {name: x.clone() for name, x in self.rows.items()}}
        slots = (self.place >= 0).nonzero()[:, 0]
        rows = self.place[slots].to(self.device)
        return {"slots": slots, "rows": {name: x[rows] for name, x in self.rows.items()}}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take over what any number of processes held: every n-th slot of it is this one's."""
        if self.n_ranks > 1:
            self._empty()
        for rank in range(self.n_ranks):
            for state in states:
                at = (state["slots"] % self.n_ranks == rank).nonzero()[:, 0]
                rows = state["rows"] if rank == self.rank else {}
                self.put(state["slots"][at], {name: x[at.to(x.device)] for name, x in rows.items()}, rank)
