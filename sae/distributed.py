"""The processes of a run on a mesh of three axes, and their collective operations. The only file that calls
torch.distributed. At size 1 every operation returns its argument.

    modules   whole SAEs; a group of processes trains its own of them (--distribute_modules)
    data      replicas: each learns from its part of every batch
    latents   each holds F / n latents of an SAE and sees the same tokens (--shard_latents n)

Knows tensors; knows nothing of SAEs. Letters: R replicas, S shards of latents.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: as defaults its functions would keep it for ever
from torch import Tensor

from sae.config import UserError, require
from sae.flags import Lost

T = TypeVar("T")
TIMEOUT_S = 600  # a process that says nothing for so long is given up; one that ends is noticed at once
DIGIT_BITS = (11, 11, 10)  # how kth_largest cuts a float's 32 bits
HASH_BY = 0x9E3779B1
CAPACITY = 4  # times its fair share of the k largest latents that a shard offers at first


def _together(collective: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A collective; the failure of another process in words."""
    try:
        return collective(*args, **options)
    except RuntimeError as e:
        raise Lost(
            f"another process of this run has ended or does not answer ({str(e).splitlines()[0][:120]}); the last "
            "checkpoint is whole: start the same command again with --resume"
        ) from e


class _Sum(torch.autograd.Function):
    """The sum over an axis of what each process adds; the gradient goes to each as it is."""

    @staticmethod
    def forward(ctx, x, axis):
        del ctx
        return axis.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, grad):
        del ctx
        return grad, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.n, None


class Axis:
    """Some processes, this one among them, and what they can do together.

    ranks: their numbers among all; rank: this one's place in that list. The group is torch.distributed's own: once it
    is destroyed its threads have ended, for a thread of gloo that lets go of a tensor while Python ends aborts it.
    """

    def __init__(self, ranks: Sequence[int] = (0,), rank: int = 0, group: Any = None):
        self.ranks, self.rank, self.size = tuple(ranks), rank, len(ranks)
        self._group = weakref.ref(group) if group is not None else None

    @property
    def group(self) -> Any:
        return self._group() if self._group is not None else None

    def __deepcopy__(self, memo: Any) -> Axis:
        return self

    def range(self, n: int) -> range:
        """This process's part of n things in a row."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    # in place, no graph

    def sum_(self, x: Tensor) -> Tensor:
        """x summed over the axis, in place; x is without gaps in memory."""
        if self.size > 1:
            _together(dist.all_reduce, x, group=self.group)
        return x

    def sum_all_(self, tensors: Sequence[Tensor]) -> None:
        """Each contiguous tensor summed over the axis, in place, all under way at once."""
        if self.size == 1:
            return
        works = [_together(dist.all_reduce, x, group=self.group, async_op=True) for x in tensors]
        for work in works:
            _together(work.wait)

    def broadcast_(self, x: Tensor) -> Tensor:
        """The first process's x, everywhere."""
        if self.size > 1:
            _together(dist.broadcast, x, src=self.ranks[0], group=self.group)
        return x

    def barrier(self) -> None:
        """Wait for all."""
        self.objects(None)

    # new tensors

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process's x, with a graph: the gradient of the sum is that of each term."""
        return x if self.size == 1 else _Sum.apply(x, self)

    def share(self, x: Tensor) -> Tensor:
        """x, of whose gradient each process takes an equal part, so that the sum over the axis is whole."""
        return x if self.size == 1 else _Share.apply(x, self.size)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the first axis of all processes' x (n, ...), n being each one's own."""
        if self.size == 1:
            return x.mean(0)
        total = x.sum(0)
        packed = self.sum_(torch.cat((total.reshape(-1), x.new_full((1,), len(x)))))
        return (packed[:-1] / packed[-1]).view(total.shape)

    def gather(self, x: Tensor) -> Tensor:
        """(size, *x.shape): every process's x, of the same shape everywhere."""
        if self.size == 1:
            return x[None]
        out = x.new_empty(self.size, *x.shape)
        _together(dist.all_gather, list(out.unbind()), x.contiguous(), group=self.group)
        return out

    def exchange(self, x: Tensor, give: list[int], take: list[int]) -> Tensor:
        """give[i] numbers of x (n,) to process i, take[i] from it, in the order of the axis."""
        if self.size == 1:
            return x
        out = x.new_empty(sum(take))
        _together(dist.all_to_all_single, out, x, take, give, group=self.group)
        return out

    def kth_largest(self, values: Tensor, n: int) -> Tensor:
        """The n-th largest of all processes' values (m,) float32, m being each one's own; a scalar, exact.

        Their bits are compared digit by digit: three sums of 2048 counts, however many values there are. The least of
        all where there are fewer than n.
        """
        if self.size == 1:
            return (values if len(values) <= n else values.topk(n, sorted=False).values).min()
        bits = values.view(torch.int32).long()
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + 2**31  # in the order of the values, 0 .. 2^32 - 1
        left = self.sum_(torch.full((), len(keys), device=values.device)).clamp(max=n)
        prefix, shift = torch.zeros_like(left), 32
        for width in DIGIT_BITS:
            same = (keys >> shift) == prefix
            shift -= width
            digits = (keys >> shift) & (2**width - 1)
            counts = torch.zeros(2**width, dtype=torch.int64, device=values.device)
            counts = self.sum_(counts.index_add_(0, digits, same.long())).flip(0)
            upto = counts.cumsum(0)
            at = (upto >= left).int().argmax()  # the largest digit that still has the n-th at or above it
            left = left - (upto - counts)[at]
            prefix = (prefix << width) | (2**width - 1 - at)
        bits = prefix - 2**31
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).int().view(torch.float32)

    # matrices and vectors of which each process has every n-th row

    def in_turn(self, x: Tensor) -> Tensor:
        """All processes' x (n,), in the order of the whole."""
        if self.size == 1:
            return x
        sizes = self.objects(len(x))
        padded = torch.nn.functional.pad(x, (0, max(sizes) - len(x)))
        return self.gather(padded).t().flatten()[: sum(sizes)]

    def pick(self, x: Tensor, rows: Tensor) -> Tensor:
        """Some rows of the whole matrix, the same in all processes; x (n, D)."""
        if self.size == 1:
            return x[rows]
        here = (rows % self.size == self.rank)[:, None]
        return self.sum_(torch.where(here, x[(rows // self.size).clamp(max=len(x) - 1)], 0.0))

    # python values; these read the device

    def any(self, flag: Tensor) -> bool:
        """Whether the flag, a scalar, is up anywhere."""
        return bool(flag if self.size == 1 else self.sum_(flag.float()) > 0)

    def objects(self, x: T) -> list[T]:
        """Every process's x, a small plain value."""
        if self.size == 1:
            return [x]
        out: list[Any] = [None] * self.size
        _together(dist.all_gather_object, out, x, group=self.group)
        return out

    @torch.no_grad()
    def check_equal(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError naming the first tensor whose bits are not the same everywhere."""
        if self.size == 1 or not tensors:
            return
        all_hashes = self.gather(torch.stack([_hash(x) for x in tensors.values()]))
        odd = (all_hashes != all_hashes[0]).any(0).nonzero()
        if len(odd):
            name = list(tensors)[int(odd[0])]
            ranks = [
                r for r, h in zip(self.ranks, all_hashes[:, int(odd[0])], strict=True) if h != all_hashes[0, odd[0]]
            ]
            raise UserError(
                f"{name} is not the same on process {self.ranks[0]} and process {ranks[0]}: memory or a kernel is at "
                "fault; go on from the last checkpoint with --resume"
            )


def _hash(x: Tensor) -> Tensor:
    """An int64 scalar that depends on every bit of x and on where it stands."""
    x = x.detach().reshape(-1)
    bits = x.view(torch.int32) if x.element_size() % 4 == 0 else x.float().view(torch.int32)
    width = 1 << (len(bits).bit_length() // 2)
    whole = bits[: len(bits) // width * width].view(-1, width)
    rest = bits[whole.numel() :].long()
    sums = (whole.sum(0, dtype=torch.int64), whole.sum(1, dtype=torch.int64), rest)
    weigh = lambda s: (s * (torch.arange(len(s), device=s.device) * HASH_BY + 1)).sum()
    return weigh(torch.cat(sums))


def own_rows(n: int, d: int, own: range, generator: torch.Generator | None) -> Tensor:
    """Rows `own` of torch.randn(n, d), and the generator as after drawing all of them; no others are kept."""
    if len(own) == n:
        return torch.randn(n, d, generator=generator)
    starts = range(0, max(1, n - 1023), 1024)  # torch draws otherwise where it draws few: the last block is the longest
    kept = []
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        block = torch.randn(stop - start, d, generator=generator)
        kept.append(block[max(0, own.start - start) : max(0, own.stop - start)].clone())
    return torch.cat(kept)


def largest_of_shards(
    shards: Axis, offer: Callable[[int], tuple[Tensor, Tensor]], k: int, *, absolute: bool, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the k largest values of each token over all shards, those here: indices, values (n,), and offsets (B,).

    offer(room): (B, <= room) indices and values of the largest here. allowed: the latents here that may win. A shard
    offers CAPACITY times its fair share; where all of these win for a token it may have more, and offers k.
    """
    for room in sorted({min(k, -(-CAPACITY * k // shards.size)), k}):
        indices, values = offer(room)
        size = values.abs() if absolute else values
        if allowed is not None:
            size = size.masked_fill(~allowed[indices], -torch.inf)
        size = torch.nn.functional.pad(size, (0, room - size.shape[1]), value=-torch.inf)
        offered = shards.gather(size).transpose(0, 1)  # (B, S, room)
        best = offered.flatten(1).topk(min(k, offered[0].numel()), sorted=False).indices
        chosen = torch.zeros_like(offered, dtype=torch.bool).flatten(1).scatter_(1, best, True).view(offered.shape)
        if room == k or not bool(chosen.all(-1).any()):
            break
    here = chosen[:, shards.rank, : values.shape[1]]
    n = here.sum(1)
    return indices[here], values[here], n.cumsum(0) - n


class World:
    """This run's processes: `everyone`; the `team` that trains the same SAEs, along `data` and `latents`.

    shape: of the mesh (default: replicas). group: which of the n_groups teams this process belongs to. Without
    arguments: one process alone.
    """

    def __init__(self, everyone: Axis | None = None, shape: tuple[int, int, int] | None = None, device: Any = "cpu"):
        self.everyone, self.device = everyone or Axis(), torch.device(device)
        groups, replicas, shards = self.shape = shape or (1, self.everyone.size, 1)
        self.n_groups = groups
        self.group, inside = divmod(self.everyone.rank, replicas * shards)
        self.replica, self.shard = divmod(inside, shards)
        self.data = self.latents = self.team = Axis()
        if self.everyone.size == 1:
            return
        names = ("modules", "data", "latents")
        mesh = dist.device_mesh.init_device_mesh(self.device.type, self.shape, mesh_dim_names=names)
        self.data, self.latents = self._axis(mesh.get_group("data")), self._axis(mesh.get_group("latents"))
        if shards == 1:
            self.team = self.data
        elif replicas == 1:
            self.team = self.latents
        elif groups == 1:
            self.team = self.everyone
        else:
            teams = [[self.rank_of(g, 0, 0) + i for i in range(replicas * shards)] for g in range(groups)]
            self.team = self._axis(dist.new_subgroups_by_enumeration(teams)[0])

    def __deepcopy__(self, memo: Any) -> World:
        return self

    def _axis(self, group: Any) -> Axis:
        ranks = dist.get_process_group_ranks(group)
        return Axis(ranks, ranks.index(self.everyone.rank), group)

    def rank_of(self, group: int, replica: int, shard: int) -> int:
        """The number among all processes of a place on the mesh."""
        return (group * self.shape[1] + replica) * self.shape[2] + shard

    def place_of(self, rank: int) -> tuple[int, int]:
        """(group, replica) of a process."""
        group, inside = divmod(rank, self.shape[1] * self.shape[2])
        return group, inside // self.shape[2]

    def describe(self) -> str:
        """The mesh in words."""
        groups, replicas, shards = self.shape
        axes = f"{groups} groups of SAEs x {replicas} replicas x {shards} shards of latents"
        return f"{self.everyone.size} processes: {axes}"


ALONE = World()


def arrange(n: int, *, n_saes: int, shard_latents: int = 1, distribute_modules: bool = False) -> tuple[int, int, int]:
    """The mesh (groups, replicas, shards) of n processes; as many groups of SAEs as fit, where that is asked."""
    require(
        n % shard_latents == 0,
        f"{n} processes cannot hold shards of latents on {shard_latents} each; start a multiple of {shard_latents}, or "
        "set --shard_latents",
    )
    rest = n // shard_latents
    groups = max(g for g in range(1, min(rest, n_saes) + 1) if rest % g == 0) if distribute_modules else 1
    require(
        not distribute_modules or groups > 1 or rest == 1,
        f"{n_saes} SAEs do not go to {rest} processes or to equal groups of them; start {n_saes} or a multiple, or "
        "leave out --distribute_modules",
    )
    return groups, rest // groups, shard_latents


def balance(costs: Mapping[str, float], n_groups: int) -> dict[str, int]:
    """A group for each SAE: the dearest first, each to the group that has least to do."""
    loads = [0.0] * n_groups
    found = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        found[name] = loads.index(min(loads))
        loads[found[name]] += costs[name]
    return {name: found[name] for name in costs}


def started() -> bool:
    """Whether several processes were started together (torchrun says so)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(device: str | None) -> str | None:
    """The device for this process: the GPU of its own number on this machine, unless another was asked for."""
    if started() and device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def join(device: torch.device) -> Axis:
    """Meet the other processes that torchrun started, over NCCL between GPUs and gloo else; alone without torchrun."""
    if not started():
        return Axis()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    require(
        not missing,
        f"WORLD_SIZE is set and {', '.join(missing)} is not; for several processes start them with torchrun",
    )
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        _together(dist.init_process_group, backend, timeout=timedelta(seconds=TIMEOUT_S))
    return Axis(range(dist.get_world_size()), dist.get_rank(), dist.group.WORLD)


def leave() -> None:
    """Part from the other processes, at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()
