"""What latents mean, for people: one pass over held-out text -> a FeatureRecord per latent -> pages, labels, plots."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from html import escape
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae import log
from sae.config import VizConfig, require
from sae.data.datasets import Dataset, open_dataset
from sae.data.tokens import TokenRows
from sae.distributed import ALONE, Axis
from sae.kernels.sparse import Codes
from sae.lm.language_model import LanguageModel
from sae.metrics import check_finite
from sae.models import SAE
from sae.pages import directions
from sae.pages.dashboard import Listing, save_pages, whole_page
from sae.pages.explainer import Explainer, Explanation, explained
from sae.pages.feature_tables import EDGES, POSITIONS, FeatureTables
from sae.pages.labels import Label, make_labels
from sae.pages.records import Context, FeatureRecord, Histogram

N_EFFECTS = 10  # promoted and suppressed tokens shown
N_SHARES = 8  # typical tokens, neighbours and the like
INTERVALS = 5  # of equal width, from 0 to the largest activation
PER_INTERVAL = 3
MAX_PAGES = 1000  # unless asked for all
Shares = list[tuple[str, float]]
COFIRING_TOKENS = 1024  # of a latent's own that are looked at for what else fires


def rounded(x: np.ndarray) -> np.ndarray:
    """float64 of five significant digits, which print short."""
    x = x.astype(np.float64)
    scale = 10.0 ** (4 - np.floor(np.log10(np.maximum(np.abs(x), 1e-30))))
    return np.round(x * scale) / scale


class RecordMaker:
    """Records out of finished tables: what is exact from the tables, what needs no exactness from their sample."""

    def __init__(
        self, tables: FeatureTables, lm: LanguageModel, sae: SAE, labels: Sequence[Label | None], *, seed: int = 0
    ):
        self.tables, self.lm, self.sae, self.labels = tables, lm, sae, labels
        self.token = lru_cache(None)(lm.tokenizer.token_str)
        self.events = events = tables.sample.events()
        self.order, self.starts = events.by_latent(sae.d_sae)
        self.first_event = np.searchsorted(events.token, np.arange(len(events.ids) + 1))
        kept = events.latent[events.keep[events.token]]
        self.rate = np.bincount(kept, minlength=sae.d_sae) / max(1, int(events.keep.sum()))
        self.seed = seed

    def records(self, latents: Sequence[int]) -> Iterator[FeatureRecord]:
        """The records of these latents, made in blocks."""
        for block in torch.tensor(latents, dtype=torch.int64).split(256):
            yield from self._block(block)

    def _block(self, block: torch.Tensor) -> Iterator[FeatureRecord]:
        t = self.tables
        effects = self.lm.logit_effects(self.sae.W_dec.detach()[block.to(self.sae.W_dec.device)])
        # none without a way to the logits; a padded vocabulary has logits without a token
        effects = torch.empty(len(block), 0) if effects is None else effects[:, : self.lm.tokenizer.vocab_size].cpu()
        tops = [(sign * effects).topk(min(N_EFFECTS, effects.shape[1])).indices.tolist() for sign in (1, -1)]
        near = [x.tolist() for x in directions.nearest(self.sae.W_dec, latents=block)]
        n_tokens = t.totals.n
        share = t.all_positions.numpy() / max(1, n_tokens)
        there = np.flatnonzero(share)
        for i, (latent, row) in enumerate(t.rows(block.tolist())):
            counts = t.histogram[row].numpy()
            n, used = int(counts.sum()), np.flatnonzero(counts)
            start, stop = (int(used[0]), int(used[-1]) + 1) if n else (0, 0)
            promoted, suppressed = ([(self.token(j), round(float(effects[i, j]), 5)) for j in top[i]] for top in tops)
            largest, label = float(t.peaks[row, 0]), self.labels[row]
            generator = np.random.default_rng((self.seed, latent))  # so that a record is the same alone or among others
            typical, first, cofiring = self._around(latent, generator)
            yield FeatureRecord(
                latent=latent, n_tokens=n_tokens, density=n / max(1, n_tokens), max_activation=largest,
                mean_active=float(t.sums[row]) / max(1, n),
                label=label.short if label else "", rule=label.whole if label else "",
                label_precision=label.precision if label else None, label_recall=label.recall if label else None,
                promoted=promoted, suppressed=suppressed, typical=typical, first=first,
                neighbours=[(j, round(c, 4)) for j, c in zip(near[0][i], near[1][i], strict=True)],
                cofiring=cofiring,
                positions=rounded(t.positions[row].numpy()[there] / max(1, n) / share[there]).tolist() if n else [],
                histogram=Histogram(EDGES[start : stop + 1].tolist() if n else [], counts[start:stop].tolist()),
                contexts=[*self._strongest(row), *self._drawn(latent, largest, generator)],
            )  # fmt: skip

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
        return mine[self.events.keep[self.events.token[mine]]]

    def _drawn(self, latent: int, largest: float, generator: np.random.Generator) -> Iterator[Context]:
        """Random contexts by interval of the activation, from the top down; none that is among the strongest."""
        e, mine, row = self.events, self._own(latent), int(self.tables.row[latent])
        interval = np.minimum((e.value[mine] / max(largest, 1e-30) * INTERVALS).astype(int), INTERVALS - 1)
        shown = set(map(tuple, self.tables.places[row][self.tables.peaks[row] > 0].tolist()))
        for i in reversed(range(INTERVALS)):
            inside = mine[interval == i]
            drawn = generator.permutation(inside)[: 4 * PER_INTERVAL]
            places = [(int(e.sequence[e.token[j]]), int(e.position[e.token[j]]), int(e.token[j])) for j in drawn]
            for sequence, position, token in [p for p in places if p[:2] not in shown][:PER_INTERVAL]:
                tokens, values, peak = self._window(latent, token)
                low, high = (float(f"{largest * x / INTERVALS:.4g}") for x in (i, i + 1))
                yield Context(tokens, values, peak, sequence, position, low, high, round(len(inside) / len(mine), 5))

    def _window(self, latent: int, token: int) -> tuple[list[str], list[float], int]:
        """Tokens and values around a sampled token, and its place in them."""
        e, half = self.events, self.tables.ids.shape[2] // 2
        a = max(0, token - min(half, int(e.position[token])))
        b = a + int(np.searchsorted(e.sequence[a : token + half + 1], e.sequence[token], side="right"))
        mine = self.order[self.starts[latent] : self.starts[latent + 1]]
        inside = mine[slice(*np.searchsorted(e.token[mine], (a, b)))]
        values = np.zeros(b - a)
        values[e.token[inside] - a] = rounded(e.value[inside])
        return [self.token(j) for j in e.ids[a:b].tolist()], values.tolist(), token - a

    def _around(
        self, latent: int, generator: np.random.Generator
    ) -> tuple[list[tuple[str, float]], list[tuple[str, float]], list[tuple[int, float]]]:
        """Typical tokens and first tokens with their shares, and what fires with it."""
        e = self.events
        at = e.token[self._own(latent)]
        if not len(at):
            return [], [], []
        begins = np.diff(at, prepend=-2) > 1
        begins |= np.diff(e.sequence[at], prepend=-1) > 0
        shares = []
        for ids in (e.ids[at], e.ids[at[begins]]):
            counts = np.bincount(ids)
            top = np.argsort(-counts, kind="stable")[: min(N_SHARES, np.count_nonzero(counts))]
            shares.append([(self.token(int(i)), round(float(counts[i]) / len(ids), 5)) for i in top])
        some = at if len(at) <= COFIRING_TOKENS else generator.choice(at, COFIRING_TOKENS, replace=False)
        lengths = self.first_event[some + 1] - self.first_event[some]
        offsets = np.repeat(self.first_event[some] - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())
        both = np.bincount(e.latent[offsets], minlength=len(self.rate)) / len(some)
        p, q = self.rate[latent], self.rate
        correlation = (both - q) * p / np.sqrt(np.maximum(p * (1 - p) * q * (1 - q), 1e-12))
        correlation[latent] = 0
        top = np.argsort(-correlation, kind="stable")[:N_SHARES]
        with_it = [(int(j), round(float(correlation[j]), 4)) for j in top if correlation[j] > 0.01]
        return shares[0], shares[1], with_it


class FeatureVisualizer:
    """The features of an SAE as records and pages. Held-out text is read once, when something is first asked for.

    viz = FeatureVisualizer(sae, VizConfig(eval_tokens=20_000), lm=lm); viz.html(12); viz.save("features")

    Pages are made for config.feature, or for all with config.all_features, or for the first 1000 that fire. The
    processes along `axis` take turns at reading, and each then has what all found.
    """

    def __init__(
        self, sae: SAE, config: VizConfig | None = None, *, lm: LanguageModel, hookpoint: str | None = None,
        dataset: Dataset | None = None, ctx_len: int = 256, skip_first: bool = False,
        exclude_tokens: Sequence[int] = (), axis: Axis = ALONE.data,
    ):  # fmt: skip
        self.axis = axis
        self.sae, self.lm, self.config = sae, lm, config or VizConfig()
        self.hookpoint, self.dataset = hookpoint or sae.config.hook_point, dataset or open_dataset()
        self.ctx_len, self.skip_first, self.exclude_tokens = self.config.ctx_len or ctx_len, skip_first, exclude_tokens
        self.explanations: dict[int, Explanation] = {}

    @cached_property
    @torch.no_grad()
    def tables(self) -> FeatureTables:
        """From one pass: whole sequences until config.eval_tokens counted tokens are seen or the text ends."""
        c = self.config
        tables = FeatureTables(self.sae, c.feature, top_k=c.top_k, context_tokens=c.context_tokens)
        text = TokenRows(
            self.lm, self.dataset, "train" if c.train_text else "val", self.ctx_len,
            skip_first=self.skip_first, exclude_tokens=self.exclude_tokens,
        )  # fmt: skip
        bar, was_training = log.progress(c.eval_tokens, "reading"), self.sae.training
        self.sae.eval()
        n_tokens = n_sequences = 0
        for turn, rows in enumerate(text.until(c.eval_tokens, c.model_batch_size)):
            if turn % self.axis.size == self.axis.rank:
                self._read(tables, *rows, first=n_sequences)
            n_tokens, n_sequences = n_tokens + int(rows.keep.sum()), n_sequences + len(rows.ids)
            bar.update(n_tokens - bar.n)
        bar.close()
        self.sae.train(was_training)
        require(n_tokens > 0, f"'{self.dataset.name}' gave no held-out text; give more of it, or lower --ctx_len")
        found = self.axis.objects(tables)
        for other in found[1:]:
            found[0].merge(other)
        found[0].finish()
        return found[0]

    def _read(self, tables: FeatureTables, ids: Tensor, valid: Tensor, keep: Tensor, *, first: int) -> None:
        """Run the model and the SAE on some sequences, and add what they show."""
        sae = self.sae
        names = [f"{self.hookpoint}@in", self.hookpoint] if sae.config.transcode else [self.hookpoint]
        seen = self.lm.hidden(ids, valid, names)
        x, y = (seen[name][valid.to(self.lm.device)].float() for name in (names[0], names[-1]))
        codes, kept = sae.encode_sparse(x), keep[valid].to(x.device)
        check_finite({self.hookpoint: x[kept]})
        counted = Codes(codes.indices[kept], codes.values[kept])  # type: ignore[index]
        tables.totals.add(y[kept], sae.reconstruct_from(counted, x[kept]), counted)
        tables.add(ids, valid, keep, codes, first=first)

    @cached_property
    def labels(self) -> list[Label | None]:
        """Of each of the tables' rows; all None where config.labels is off."""
        if not self.config.labels:
            return [None] * len(self.tables.latents)
        tokenizer = self.lm.tokenizer
        return make_labels(
            self.tables.sample.events(), self.tables.row.numpy(), tokenizer.token_str, tokenizer.special_ids
        )

    @cached_property
    def maker(self) -> RecordMaker:
        return RecordMaker(self.tables, self.lm, self.sae, self.labels)

    @cached_property
    def chosen(self) -> list[int]:
        """The features that get a page, in order."""
        c = self.config
        return self.tables.latents if c.feature or c.all_features else self.tables.live()[:MAX_PAGES]

    def each(self) -> Iterator[FeatureRecord]:
        """The record of each chosen feature, one at a time, with its explanation if `explain` gave one."""
        for record in self.maker.records(self.chosen):
            yield explained(record, self.explanations.get(record.latent))

    @cached_property
    def to_explain(self) -> tuple[list[FeatureRecord], list[FeatureRecord]]:
        """The records of the first config.explainer_limit of the chosen features that fired, and some more, whose
        contexts serve as examples in which those are silent."""
        live = set(self.tables.live())
        few = [latent for latent in self.chosen if latent in live][: self.config.explainer_limit]
        others = [latent for latent in self.tables.live() if latent not in set(few)][:100]
        return list(self.maker.records(few)), list(self.maker.records([*few, *others]))

    def explain(self, explainer: Explainer) -> dict[int, Explanation]:
        """Let a model explain some of the chosen features; their records have what it says from then on."""
        self.explanations = explainer.run(*self.to_explain)
        return self.explanations

    @cached_property
    def records(self) -> list[FeatureRecord]:
        """The records of the chosen features, all in memory."""
        return list(self.each())

    @cached_property
    def places(self) -> dict[int, tuple[float, float]]:
        """Where each latent lies on the map."""
        return dict(
            enumerate(map(tuple, directions.plane(self.sae.W_dec, directions.nearest(self.sae.W_dec)[0]).tolist()))
        )

    def listing(self) -> Listing:
        """The list of features, still empty, with the facts that stand above it."""
        m, c = self.tables.totals.metrics(), self.sae.config
        shown = {
            "model": self.lm.name, "hookpoint": self.hookpoint,
            "training text" if self.config.train_text else "held-out text": self.dataset.name,
            "tokens": f"{m['n_tokens']:,}", "SAE": f"{c.activation}, {c.d_in} to {c.d_sae} latents",
            "active per token": f"{m['l0']:.1f}", "explained variance": f"{m['explained_variance']:.3f}",
            "never fired": f"{100 * m['dead_fraction']:.3g}%",
        }  # fmt: skip
        there = (self.tables.all_positions > 0).tolist()
        starts = [p for p, some in zip(POSITIONS, there, strict=True) if some]
        name = Path(self.lm.name).name if Path(self.lm.name).is_absolute() else self.lm.name
        facts = {"shown": shown, "model": name, "hookpoint": self.hookpoint, "position_starts": starts}
        return Listing(facts, self.places)

    def html(self, latent: int) -> str:
        """The page of a feature as one html text."""
        found = [r for r in self.records if r.latent == latent]
        require(bool(found), f"feature {latent} has no page; ask for it with --feature {latent}")
        return whole_page(found, self.listing(), at=latent)

    def index(self) -> str:
        """The list of the chosen features and their pages as one html text."""
        return whole_page(self.records, self.listing())

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.index())}" style="width:100%;height:40rem;border:0"></iframe>'

    def identity(self) -> str:
        """Which SAE the pages are of: equal for equal weights at the same hookpoint."""
        digest = hashlib.sha256(self.hookpoint.encode())
        for name, w in sorted(self.sae.state_dict().items()):
            digest.update(name.encode() + w.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write the pages of the chosen features to a folder of their own; returns index.html.

        Pages of other features of the same SAE that lie there stay; all else there is replaced.
        """
        save_pages(Path(folder), self.each(), self.listing(), identity=self.identity())
        return Path(folder) / "index.html"


def collect_features(
    lm: LanguageModel, sae: SAE, hookpoint: str, dataset: Dataset,
    *, n_tokens: int, ctx_len: int, skip_first: bool = False, model_batch_size: int = 16, top_k: int = 20,
    context_tokens: int = 24, features: Sequence[int] | None = None,
) -> list[FeatureRecord]:  # fmt: skip
    """The records of these latents, or of all (dead ones have no contexts), from one pass over n_tokens of text.

    Exact, and the same for any model_batch_size: the strongest contexts are those of the top_k sequences with the
    strongest activations, each shown around its peak; of equal ones the earlier comes first.
    """
    config = VizConfig(
        eval_tokens=n_tokens, ctx_len=ctx_len, model_batch_size=model_batch_size, feature=tuple(features or ()),
        all_features=not features, top_k=top_k, context_tokens=context_tokens,
    )  # fmt: skip
    return FeatureVisualizer(sae, config, lm=lm, hookpoint=hookpoint, dataset=dataset, skip_first=skip_first).records
