"""Statistics of every latent from one pass over text, in memory that does not grow with the text.

FeatureTables holds what is exact: counts, sums, a histogram, positions in the sequence, and the strongest contexts.
Sample holds whole pieces of the text, chosen at random, with every activation in them, for what need not be exact.
Tables of two parts of a text merge into those of the whole.

Letters: N sequences, T positions, B tokens, K active latents of a token, F latents asked for, R contexts per latent,
W tokens in a context's window, S tokens of the sample, E activations in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.config import require
from sae.kernels.sparse import Codes
from sae.metrics import Totals
from sae.models import SAE

# Eight bins of equal width (three bits of a float) in each of 32 octaves. No bin depends on the largest activation, so
# one pass is enough. The first and the last bin also hold what is smaller and larger.
EDGES = (2.0 ** torch.arange(-16, 16)[:, None] * (1 + torch.arange(8) / 8)).flatten()
EDGES = torch.cat((EDGES, EDGES.new_tensor([2.0**16])))
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # first token of each part of a sequence
SAMPLE_TOKENS = 131_072
BLOCK = 8  # neighbouring sequences sampled together, so that documents are in one piece


def bins(values: Tensor) -> Tensor:
    """The bin of EDGES, int64, of each value (n,) float32 > 0."""
    first = (127 - 16) << 3  # the exponent's bias is 127; the three bits below it choose the eighth
    return ((values.view(torch.int32) >> 20) - first).clamp(0, len(EDGES) - 2).long()


class Candidates(NamedTuple):
    """Contexts that may be among the strongest: row, peak, sequence, position (n,), and the ids (-1 for no token) and
    the latent's values in the window around the peak (n, W)."""

    row: Tensor
    peak: Tensor
    sequence: Tensor
    position: Tensor
    ids: Tensor
    values: Tensor


class Batch(NamedTuple):
    """Some sequences, numbered from `first`: ids, valid, keep (N, T), and the codes (B, K) of the valid tokens. Tokens
    that are not kept do not count: they are shown, but are never a peak."""

    ids: Tensor
    valid: Tensor
    keep: Tensor
    codes: Codes
    first: int


class SampledText(NamedTuple):
    """The sampled text and what fires in it, in reading order: ids, position, keep, sequence (S,); of each activation
    (E,) the latent, its value, and its token (an index into the S)."""

    ids: np.ndarray
    position: np.ndarray
    keep: np.ndarray
    sequence: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    token: np.ndarray


@lru_cache(1 << 16)
def _priority(seed: int, block: int) -> int:
    return int(np.random.SeedSequence((seed, block)).generate_state(1, np.uint64)[0])


class Sample:
    """Blocks of neighbouring sequences, all equally likely to be kept; the seed alone decides which ones are."""

    def __init__(self, n_tokens: int = SAMPLE_TOKENS, *, seed: int = 0):
        self.n_tokens, self.seed = n_tokens, seed
        self.blocks: dict[int, dict[int, SampledText]] = {}  # the sequences of each block
        self.capacity = 2  # blocks; set once the length of a sequence is known

    def add(self, batch: Batch) -> None:
        """A block that is kept is whole, as its priority decides for all its sequences."""
        ids, valid, keep, codes, first = batch
        assert codes.indices is not None
        stops = valid.sum(1).cumsum(0).tolist()
        for n, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            block = (first + n) // BLOCK
            if block in self.blocks or self._makes_room(block, ids.shape[1]):
                latents, values = (x[start:stop] for x in (codes.indices, codes.values))
                inside, on = valid[n], values > 0
                text = (ids[n][inside].int(), inside.nonzero()[:, 0].int(), keep[n][inside])
                active = (latents[on].int(), values[on], on.nonzero()[:, 0].int())
                columns = (*text, torch.full((stop - start,), first + n), *active)
                self.blocks.setdefault(block, {})[first + n] = SampledText(*(x.numpy() for x in columns))

    def _makes_room(self, block: int, ctx_len: int) -> bool:
        """Whether a new block is kept. The kept one of the largest priority makes room for it."""
        self.capacity = max(2, self.n_tokens // (BLOCK * ctx_len))
        if len(self.blocks) < self.capacity:
            return True
        last = max(self.blocks, key=lambda b: _priority(self.seed, b))
        if _priority(self.seed, block) > _priority(self.seed, last):
            return False
        del self.blocks[last]
        return True

    def merge(self, other: Sample) -> None:
        """Take in the sample of another part of the same text. One pass over both would keep the same blocks."""
        self.capacity = max(self.capacity, other.capacity)
        names = sorted({*self.blocks, *other.blocks}, key=lambda b: _priority(self.seed, b))[: self.capacity]
        self.blocks = {b: {**self.blocks.get(b, {}), **other.blocks.get(b, {})} for b in names}

    def text(self) -> SampledText:
        parts = [part for b in sorted(self.blocks) for _, part in sorted(self.blocks[b].items())]
        starts = np.cumsum([0] + [len(part.ids) for part in parts])
        parts = [part._replace(token=part.token + start) for part, start in zip(parts, starts, strict=False)]
        return SampledText(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class FeatureTables:
    """Exact tables of the latents asked for, on the CPU, over all tokens that count.

    histogram (F, bins). sums (F,) of activations. positions (F, P), all_positions (P,): activations and tokens in each
    part of a sequence. The R strongest contexts, at most one per sequence and of equal ones the earlier: peaks (F, R),
    places (F, R, 2) as sequence and position, ids (F, R, W) with -1 for no token, values (F, R, W); unordered until
    `finish`. With R = 20 and W = 49 that is 10 kB a latent: 14 MB for 1,536 latents, 310 MB for 32,768.
    """

    def __init__(
        self, sae: SAE, features: Sequence[int], *, top_k: int, context_tokens: int, sample: Sample | None = None
    ):
        for i in features:
            require(0 <= i < sae.d_sae, f"feature {i} was asked for; this SAE has 0 to {sae.d_sae - 1}")
        self.latents = sorted(set(features or range(sae.d_sae)))
        F, R, W = len(self.latents), top_k, 2 * context_tokens + 1
        self.row = torch.full((sae.d_sae,), -1)  # latent -> its row of the tables
        self.row[self.latents] = torch.arange(F)
        self.totals = Totals(sae.d_out, sae.d_sae, device=sae.W_dec.device)  # of all latents, over the same tokens
        self.histogram = torch.zeros(F, len(EDGES) - 1, dtype=torch.int32)
        self.sums = torch.zeros(F, dtype=torch.float64)
        self.positions = torch.zeros(F, len(POSITIONS), dtype=torch.int32)
        self.all_positions = torch.zeros(len(POSITIONS), dtype=torch.int64)
        self.peaks = torch.zeros(F, R)
        self.places = torch.zeros(F, R, 2, dtype=torch.int32)
        self.ids = torch.full((F, R, W), -1, dtype=torch.int32)
        self.values = torch.zeros(F, R, W)
        self.least = torch.zeros(F)  # a lower bound of the weakest of the strongest contexts
        self.sample = sample or Sample()
        self._waiting: list[Candidates] = []

    def add(self, batch: Batch) -> None:
        ids, valid, keep, codes, _ = batch
        assert codes.indices is not None
        codes = Codes(codes.indices.cpu(), codes.values.cpu().float().abs())  # latents with a sign count by their size
        self.sample.add(batch._replace(codes=codes))
        rows, values = self.row[codes.indices], codes.values
        places = valid.flatten().nonzero()[:, 0]  # n * T + t
        T, K = ids.shape[1], rows.shape[1]
        counted = (values > 0) & keep.flatten()[places][:, None]
        if len(self.latents) < len(self.row):
            counted &= rows >= 0
        events = counted.flatten().nonzero()[:, 0]
        f, v = rows.flatten()[events], values.flatten()[events]
        part = torch.bucketize(torch.arange(T), torch.tensor(POSITIONS), right=True) - 1
        p = part[places[events // K] % T]
        one = torch.ones((), dtype=torch.int32).expand(len(f))
        self.histogram.view(-1).index_add_(0, f * (len(EDGES) - 1) + bins(v), one)
        self.positions.view(-1).index_add_(0, f * len(POSITIONS) + p, one)
        self.all_positions += torch.bincount(part.expand_as(keep)[keep], minlength=len(POSITIONS))
        self.sums.index_add_(0, f, v.double())
        high = (v > self.least[f]).nonzero()[:, 0]
        if len(high):
            self._consider(f[high], v[high], places[events[high] // K], batch, rows, values)

    def _consider(self, f: Tensor, v: Tensor, p: Tensor, batch: Batch, rows: Tensor, values: Tensor) -> None:
        """Let the peak of each latent in each sequence wait, with its window. f, v, p: row, value and place (n * T + t)
        of the activations that are large enough, by token; rows, values (B, K): those of all valid tokens."""
        ids, valid, _, _, first = batch
        N, T = ids.shape
        order = v.sort(descending=True, stable=True).indices  # equal ones by token
        group = (f * N + p // T)[order]
        group, again = group.sort(stable=True)
        best = order[again[torch.cat((group.new_ones(1), group.diff())) > 0]]
        f, v, p = f[best], v[best], p[best]
        half, rows = self.ids.shape[2] // 2, rows.int()
        token_at = torch.full((N * T,), -1)  # place -> index among the valid tokens
        token_at[valid.flatten()] = torch.arange(len(rows))
        reach = torch.arange(-half, half + 1)
        for c in torch.arange(len(f)).split(max(1, (1 << 21) // (len(reach) * rows.shape[1]))):
            window = p[c][:, None] + reach
            token = token_at[window.clamp(0, N * T - 1)]
            inside = (window // T == p[c][:, None] // T) & (token >= 0)
            token = token.clamp(min=0)
            found = torch.where(rows[token] == f[c].int()[:, None, None], values[token], 0.0).amax(-1)
            near = torch.where(inside, ids.flatten()[window.clamp(0, N * T - 1)], -1)
            self._waiting.append(Candidates(f[c], v[c], p[c] // T + first, p[c] % T, near, found * inside))
        if sum(len(w.row) for w in self._waiting) >= max(4096, self.peaks.numel() // 8):
            self._settle()

    def _settle(self) -> None:
        """Let the waiting contexts replace weaker ones."""
        if not self._waiting:
            return
        new = Candidates(*(torch.cat(x) for x in zip(*self._waiting, strict=True)))
        self._waiting = []
        R = self.peaks.shape[1]
        touched = new.row.unique()
        row = torch.cat((touched.repeat_interleave(R), new.row)).numpy()
        peak = torch.cat((self.peaks[touched].flatten(), new.peak)).numpy()
        sequence = torch.cat((self.places[touched, :, 0].flatten(), new.sequence.int())).numpy()
        order = np.lexsort((sequence, -peak, row))
        starts = np.flatnonzero(np.diff(row[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        stays = np.zeros(len(order), dtype=bool)
        stays[order[rank < R]] = True
        n_old = len(touched) * R
        free = torch.from_numpy(np.flatnonzero(~stays[:n_old]))  # by row; each row frees as many as it takes in
        came = torch.from_numpy(np.flatnonzero(stays[n_old:]))
        came = came[new.row[came].sort(stable=True).indices]
        slot = touched[free // R] * R + free % R
        self.peaks.view(-1)[slot] = new.peak[came]
        self.places.view(-1, 2)[slot] = torch.stack((new.sequence[came], new.position[came]), 1).int()
        self.ids.view(-1, self.ids.shape[2])[slot] = new.ids[came].int()
        self.values.view(-1, self.values.shape[2])[slot] = new.values[came]
        self.least[touched] = self.peaks[touched].amin(1)

    def merge(self, other: FeatureTables) -> None:
        """Take in the tables of another part of the text, over the same latents."""
        self._settle()
        other._settle()
        for name in ("histogram", "sums", "positions", "all_positions"):
            getattr(self, name).add_(getattr(other, name))
        f, r = (other.peaks > 0).nonzero(as_tuple=True)
        sequence, position = other.places[f, r].long().unbind(1)
        new = Candidates(f, other.peaks[f, r], sequence, position, other.ids[f, r], other.values[f, r])
        self._waiting = [new]
        self._settle()
        self.sample.merge(other.sample)
        self.totals.merge(other.totals)

    def finish(self) -> None:
        """Sort the strongest contexts; the tables can be read from now on."""
        self._settle()
        order = torch.from_numpy(np.lexsort((self.places[:, :, 0].numpy(), -self.peaks.numpy()), axis=1))
        self.peaks, self.places = self.peaks.gather(1, order), self.places[torch.arange(len(order))[:, None], order]
        for block in torch.arange(len(order)).split(1024):  # in place, as these are large
            for table in (self.ids, self.values):
                table[block] = table[block[:, None], order[block]]

    def live(self) -> list[int]:
        """The latents that fired, of those asked for."""
        return torch.tensor(self.latents)[self.histogram.any(1)].tolist()
