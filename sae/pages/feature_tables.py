"""What one pass over text keeps of every latent: the same amount however much text goes by.

FeatureTables holds what is exact: counts, sums, a histogram, places in the sequence, and the strongest contexts. Sample
holds some of the text as a whole, chosen fairly, with all that fires there; what needs no exactness is taken from it
later. Tables of two parts of a text merge into those of the whole.

Letters: N sequences, T positions, B tokens, K active latents of a token, F latents asked for, R contexts per latent,
W tokens in a context's window, S tokens of the sample, E activations in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.config import require
from sae.kernels.sparse import Codes
from sae.metrics import Totals
from sae.models import SAE

# Eighths of an octave over 32 octaves: an activation has its bin before the largest is known, so one pass is enough. Of
# equal width within their octave, as the bits of a float have them. The first and the last also hold what lies beyond.
EDGES = (2.0 ** torch.arange(-16, 16)[:, None] * (1 + torch.arange(8) / 8)).flatten()
EDGES = torch.cat((EDGES, EDGES.new_tensor([2.0**16])))
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # where parts of a sequence begin, in tokens
SAMPLE_TOKENS = 131_072
BLOCK = 8  # neighbouring sequences that are sampled together, so that there is a text to read


def bins(values: Tensor) -> Tensor:
    """The bin of EDGES that each value (n,) float32 > 0 lies in, int64."""
    first = (127 - 16) << 3  # the exponent is biased by 127; below it lie the three bits of eighths
    return ((values.view(torch.int32) >> 20) - first).clamp(0, len(EDGES) - 2).long()


class Candidates(NamedTuple):
    """Contexts that may be among the strongest: of row (n,), with this peak, sequence and position (n,), and the ids
    (-1 for no token) and the latent's values in the window around it (n, W)."""

    row: Tensor
    peak: Tensor
    sequence: Tensor
    position: Tensor
    ids: Tensor
    values: Tensor


class Events(NamedTuple):
    """The sampled text and what fires in it, in reading order: ids, sequence, position, keep, block (S,); of each
    activation (E,) the latent, its value, and the token (an index into the S) it is on."""

    ids: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    keep: np.ndarray
    block: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    token: np.ndarray

    def by_latent(self, n_latents: int) -> tuple[np.ndarray, np.ndarray]:
        """(order (E,), starts (n_latents + 1,)): the activations of latent i are order[starts[i] : starts[i + 1]]."""
        order = torch.from_numpy(self.latent).sort(stable=True).indices.numpy()
        counts = np.bincount(self.latent, minlength=n_latents)
        return order, np.concatenate(([0], counts.cumsum()))


class Sample:
    """Blocks of neighbouring sequences, each as likely as any other to be kept; which ones the seed alone decides."""

    def __init__(self, n_tokens: int = SAMPLE_TOKENS, *, seed: int = 0):
        self.n_tokens, self.seed = n_tokens, seed
        self.blocks: dict[int, list[tuple]] = {}
        self.capacity = 2  # blocks; more once it is known how long a sequence is
        self._cutoff: tuple[int, int] | None = None  # the largest priority kept, and its block, once there is no room

    def _priority(self, block: int) -> int:
        return int(np.random.SeedSequence((self.seed, block)).generate_state(1, np.uint64)[0])

    def add(self, ids: Tensor, valid: Tensor, keep: Tensor, codes: Codes, *, first: int) -> None:
        """Add N sequences: ids, valid, keep (N, T), and the codes (B, K) of the valid tokens.

        A block of which a part is kept is whole: what decides between blocks is the same for all of its parts.
        """
        assert codes.indices is not None
        indices, values, stops = codes.indices, codes.values, valid.sum(1).cumsum(0).tolist()
        for n, stop in enumerate(stops):
            block = (first + n) // BLOCK
            if block not in self.blocks and not self._makes_room(block, ids.shape[1]):
                continue
            part = slice(stops[n - 1] if n else 0, stop)
            on = values[part] > 0
            at = on.nonzero()[:, 0]
            inside = valid[n]
            what = (ids[n][inside].int(), inside.nonzero()[:, 0].int(), keep[n][inside], indices[part][on].int(),
                    values[part][on].clone(), at.int())  # fmt: skip
            self.blocks.setdefault(block, []).append((first + n, *(x.numpy() for x in what)))

    def _makes_room(self, block: int, ctx_len: int) -> bool:
        self.capacity = max(2, self.n_tokens // (BLOCK * ctx_len))
        if len(self.blocks) < self.capacity:
            self._cutoff = None
            return True
        if self._cutoff is None:
            self._cutoff = max((self._priority(b), b) for b in self.blocks)
        mine = self._priority(block)
        if mine > self._cutoff[0]:
            return False
        del self.blocks[self._cutoff[1]]
        self._cutoff = max((self._priority(b), b) for b in (*self.blocks, block))
        return True

    def merge(self, other: Sample) -> None:
        """Take in the sample of another part of the same text; of both, those are kept that one pass would keep."""
        self.capacity = max(self.capacity, other.capacity)
        both: dict[int, list[tuple]] = {b: [] for b in (*self.blocks, *other.blocks)}
        for sample in (self, other):
            for b, parts in sample.blocks.items():
                both[b] += parts
        kept = sorted(both, key=self._priority)[: self.capacity]
        self.blocks, self._cutoff = {b: sorted(both[b], key=lambda part: part[0]) for b in kept}, None

    def events(self) -> Events:
        parts = [(b, part) for b in sorted(self.blocks) for part in self.blocks[b]]
        sizes = np.array([len(part[1]) for _, part in parts], dtype=np.int64)
        starts = sizes.cumsum() - sizes
        joined = lambda i: np.concatenate([part[i] for _, part in parts])
        return Events(
            ids=joined(1), sequence=np.repeat([part[0] for _, part in parts], sizes), position=joined(2),
            keep=joined(3), block=np.repeat([b for b, _ in parts], sizes), latent=joined(4), value=joined(5),
            token=np.concatenate([part[6] + start for (_, part), start in zip(parts, starts, strict=True)]),
        )  # fmt: skip


class FeatureTables:
    """Of the latents asked for, on the CPU, over all tokens that count:

    histogram (F, bins), sums (F,) of activations, positions (F, P) and all_positions (P,), how many activations and
    tokens lie in each part of a sequence; of the R strongest contexts, at most one per sequence and of equal ones the
    earlier: peaks (F, R), places (F, R, 2) as sequence and position, ids (F, R, W) with -1 for no token, and values
    (F, R, W), in no order. With R = 20 and W = 49 that is 10 kB a latent: 14 MB for 1,536 latents, 310 MB for 32,768.
    """

    def __init__(
        self, sae: SAE, features: Sequence[int], *, top_k: int, context_tokens: int,
        sample_tokens: int = SAMPLE_TOKENS, seed: int = 0,
    ):  # fmt: skip
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
        self.least = torch.zeros(F)  # what a context must exceed to be among the strongest, as far as known
        self.sample = Sample(sample_tokens, seed=seed)
        self._waiting: list[Candidates] = []

    def add(self, ids: Tensor, valid: Tensor, keep: Tensor, codes: Codes, *, first: int) -> None:
        """Add N sequences, numbered from `first`: ids, valid and keep (N, T), and the codes of the valid tokens.

        Only kept tokens count and can be a peak; windows show what the latent does at the others too.
        """
        assert codes.indices is not None
        codes = Codes(codes.indices.cpu(), codes.values.cpu().float().abs())  # of latents with a sign, the size
        rows, values = self.row[codes.indices], codes.values
        places = valid.flatten().nonzero()[:, 0]  # n * T + t
        self.sample.add(ids, valid, keep, codes, first=first)
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
            self._consider(f[high], v[high], places[events[high] // K], ids, valid, rows, values, first)

    def _consider(
        self, f: Tensor, v: Tensor, p: Tensor, ids: Tensor, valid: Tensor, rows: Tensor, values: Tensor, first: int
    ) -> None:
        """Let each latent's peak in each sequence wait, with its window; f, v, p: activations high enough, by token."""
        N, T = ids.shape
        order = v.sort(descending=True, stable=True).indices  # of equal ones the first token
        group = (f * N + p // T)[order]
        group, again = group.sort(stable=True)
        best = order[again[torch.cat((group.new_ones(1), group.diff())) > 0]]
        f, v, p = f[best], v[best], p[best]
        half, rows = self.ids.shape[2] // 2, rows.int()
        token_at = torch.full((N * T,), -1)  # where among the valid tokens a place is
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
        """Let the waiting contexts take the places of weaker ones."""
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
        free = torch.from_numpy(np.flatnonzero(~stays[:n_old]))  # by row; as many of each as there are new ones
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
        place = other.places[f, r].long()
        self._waiting = [
            Candidates(f, other.peaks[f, r], place[:, 0], place[:, 1], other.ids[f, r], other.values[f, r])
        ]
        self._settle()
        self.sample.merge(other.sample)
        self.totals.merge(other.totals)

    def finish(self) -> None:
        """Put the strongest contexts in order; after this the tables can be read."""
        self._settle()
        order = torch.from_numpy(np.lexsort((self.places[:, :, 0].numpy(), -self.peaks.numpy()), axis=1))
        self.peaks, self.places = self.peaks.gather(1, order), self.places[torch.arange(len(order))[:, None], order]
        for block in torch.arange(len(order)).split(1024):  # in place: these are the large ones
            for table in (self.ids, self.values):
                table[block] = table[block[:, None], order[block]]

    def live(self) -> list[int]:
        """The latents that fired, of those asked for."""
        return torch.tensor(self.latents)[self.histogram.any(1)].tolist()

    def rows(self, latents: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(latent, its row)."""
        return zip(latents, self.row[list(latents)].tolist(), strict=True)
