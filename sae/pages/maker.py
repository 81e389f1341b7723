"""From finished tables to records. Counts and the strongest contexts are exact; all else comes from the sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.lm.language_model import LanguageModel
from sae.models import SAE
from sae.pages import directions
from sae.pages.feature_tables import EDGES, FeatureTables
from sae.pages.labels import Label
from sae.pages.records import Context, FeatureRecord, Histogram

N_EFFECTS = 10  # promoted and suppressed tokens shown
N_SHARES = 8  # typical tokens, first tokens and cofiring latents shown
INTERVALS = 5  # of equal width, from 0 to the largest activation
PER_INTERVAL = 3
COFIRING_TOKENS = 1024  # of the latent's own tokens, searched for other active latents
SEED = 0


def rounded(x: np.ndarray) -> np.ndarray:
    """float64 of five significant digits, which print short."""
    x = x.astype(np.float64)
    scale = 10.0 ** (4 - np.floor(np.log10(np.maximum(np.abs(x), 1e-30))))
    return np.round(x * scale) / scale


class RecordMaker:
    """labels: one for each row of the tables."""

    def __init__(self, tables: FeatureTables, lm: LanguageModel, sae: SAE, labels: Sequence[Label | None]):
        self.tables, self.lm, self.sae, self.labels = tables, lm, sae, labels
        self.token = lru_cache(None)(lm.tokenizer.token_str)
        self.sample = e = tables.sample.text()
        # the activations of latent i are order[starts[i] : starts[i + 1]]
        self.order = torch.from_numpy(e.latent).sort(stable=True).indices.numpy()
        self.starts = np.concatenate(([0], np.bincount(e.latent, minlength=sae.d_sae).cumsum()))
        self.first_event = np.searchsorted(e.token, np.arange(len(e.ids) + 1))
        kept = e.latent[e.keep[e.token]]
        self.rate = np.bincount(kept, minlength=sae.d_sae) / max(1, int(e.keep.sum()))

    def records(self, latents: Sequence[int]) -> Iterator[FeatureRecord]:
        """The records of these latents, one at a time."""
        for block in torch.tensor(latents, dtype=torch.int64).split(256):
            yield from self._block(block)

    def _block(self, block: Tensor) -> Iterator[FeatureRecord]:
        t = self.tables
        effects = self.lm.logit_effects(self.sae.W_dec.detach()[block.to(self.sae.W_dec.device)])
        # None if the hookpoint does not lead to the logits; a padded vocabulary has logits without a token
        effects = torch.empty(len(block), 0) if effects is None else effects[:, : self.lm.tokenizer.vocab_size].cpu()
        tops = [(sign * effects).topk(min(N_EFFECTS, effects.shape[1])).indices.tolist() for sign in (1, -1)]
        near = [x.tolist() for x in directions.nearest(self.sae.W_dec, latents=block)]
        n_tokens = t.totals.n
        share = t.all_positions.numpy() / max(1, n_tokens)
        there = np.flatnonzero(share)
        for i, (latent, row) in enumerate(zip(block.tolist(), t.row[block].tolist(), strict=True)):
            counts = t.histogram[row].numpy()
            n, used = int(counts.sum()), np.flatnonzero(counts)
            start, stop = (int(used[0]), int(used[-1]) + 1) if n else (0, 0)
            promoted, suppressed = ([(self.token(j), round(float(effects[i, j]), 5)) for j in top[i]] for top in tops)
            largest = float(t.peaks[row, 0])
            generator = np.random.default_rng((SEED, latent))  # so that a record is the same alone or among others
            around = self._around(latent, generator)
            said: tuple[str, str, float | None, float | None] = self.labels[row] or ("", "", None, None)
            yield FeatureRecord(
                *(latent, n_tokens, n / max(1, n_tokens), largest, float(t.sums[row]) / max(1, n)),
                *said,
                promoted=promoted,
                suppressed=suppressed,
                neighbours=[(j, round(c, 4)) for j, c in zip(near[0][i], near[1][i], strict=True)],
                positions=rounded(t.positions[row].numpy()[there] / max(1, n) / share[there]).tolist() if n else [],
                histogram=Histogram(EDGES[start : stop + 1].tolist() if n else [], counts[start:stop].tolist()),
                contexts=[*self._strongest(row), *self._drawn(latent, largest, generator)],
                **around,
            )

    def _strongest(self, row: int) -> Iterator[Context]:
        t = self.tables
        ids, values = t.ids[row].numpy(), rounded(t.values[row].numpy())
        middle = ids.shape[1] // 2
        for r, (sequence, position) in enumerate(t.places[row].tolist()):
            if t.peaks[row, r] > 0:
                inside = ids[r] >= 0
                tokens = [self.token(j) for j in ids[r][inside].tolist()]
                yield Context(tokens, values[r][inside].tolist(), int(inside[:middle].sum()), sequence, position)

    def _own(self, latent: int) -> np.ndarray:
        """The sampled activations of a latent, on tokens that count."""
        mine = self.order[self.starts[latent] : self.starts[latent + 1]]
        return mine[self.sample.keep[self.sample.token[mine]]]

    def _drawn(self, latent: int, largest: float, generator: np.random.Generator) -> Iterator[Context]:
        """Random contexts by interval of the activation, from the largest down, without the strongest ones."""
        e, mine, row = self.sample, self._own(latent), int(self.tables.row[latent])
        interval = np.minimum((e.value[mine] / max(largest, 1e-30) * INTERVALS).astype(int), INTERVALS - 1)
        shown = set(map(tuple, self.tables.places[row][self.tables.peaks[row] > 0].tolist()))
        for i in reversed(range(INTERVALS)):
            inside = mine[interval == i]
            tokens = e.token[generator.permutation(inside)[: 4 * PER_INTERVAL]].tolist()
            places = [(int(e.sequence[j]), int(e.position[j])) for j in tokens]
            new = [(j, place) for j, place in zip(tokens, places, strict=True) if place not in shown]
            low, high = (float(f"{largest * x / INTERVALS:.4g}") for x in (i, i + 1))
            for j, place in new[:PER_INTERVAL]:
                yield Context(*self._window(latent, j), *place, low, high, round(len(inside) / len(mine), 5))

    def _window(self, latent: int, token: int) -> tuple[list[str], list[float], int]:
        """Tokens and values around a sampled token, and its index among them."""
        e, half = self.sample, self.tables.ids.shape[2] // 2
        a = max(0, token - min(half, int(e.position[token])))
        b = a + int(np.searchsorted(e.sequence[a : token + half + 1], e.sequence[token], side="right"))
        mine = self.order[self.starts[latent] : self.starts[latent + 1]]
        inside = mine[slice(*np.searchsorted(e.token[mine], (a, b)))]
        values = np.zeros(b - a)
        values[e.token[inside] - a] = rounded(e.value[inside])
        return [self.token(j) for j in e.ids[a:b].tolist()], values.tolist(), token - a

    def _around(self, latent: int, generator: np.random.Generator) -> dict[str, Any]:
        """The record's typical tokens, first tokens, and cofiring latents."""
        e = self.sample
        at = e.token[self._own(latent)]
        if not len(at):
            return {}
        begins = (np.diff(at, prepend=-2) > 1) | (np.diff(e.sequence[at], prepend=-1) > 0)
        found: dict[str, Any] = {}
        for name, ids in (("typical", e.ids[at]), ("first", e.ids[at[begins]])):
            counts = np.bincount(ids)
            top = np.argsort(-counts, kind="stable")[: min(N_SHARES, np.count_nonzero(counts))]
            found[name] = [(self.token(int(i)), round(float(counts[i]) / len(ids), 5)) for i in top]
        some = at if len(at) <= COFIRING_TOKENS else generator.choice(at, COFIRING_TOKENS, replace=False)
        lengths = self.first_event[some + 1] - self.first_event[some]
        offsets = np.repeat(self.first_event[some] - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())
        both = np.bincount(e.latent[offsets], minlength=len(self.rate)) / len(some)
        p, q = self.rate[latent], self.rate
        correlation = (both - q) * p / np.sqrt(np.maximum(p * (1 - p) * q * (1 - q), 1e-12))
        correlation[latent] = 0
        top = np.argsort(-correlation, kind="stable")[:N_SHARES]
        return {**found, "cofiring": [(int(j), round(float(correlation[j]), 4)) for j in top if correlation[j] > 0.01]}
