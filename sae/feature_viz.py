"""FeatureVisualizer: what latents mean, for people. One pass over held-out text makes records, labels and pages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch

from sae import log
from sae.config import VizConfig, require
from sae.data.datasets import Dataset, open_dataset
from sae.data.tokens import Rows, TokenRows
from sae.distributed import ALONE, Axis
from sae.hookpoints import places
from sae.kernels.sparse import Codes
from sae.lm.language_model import LanguageModel
from sae.metrics import check_finite
from sae.models import SAE
from sae.pages import directions
from sae.pages.dashboard import Listing, save_pages, whole_page
from sae.pages.explainer import Explainer, Explanation, with_explanation
from sae.pages.feature_tables import POSITIONS, Batch, FeatureTables
from sae.pages.labels import Label, make_labels
from sae.pages.maker import RecordMaker
from sae.pages.records import FeatureRecord

MAX_PAGES = 1000  # unless all are asked for


class FeatureVisualizer:
    """The features of an SAE as records and pages. Held-out text is read once, when it is first needed.

    viz = FeatureVisualizer(sae, VizConfig(eval_tokens=20_000), lm=lm); viz.html(12); viz.save("features")

    Pages are made for config.feature, for all with config.all_features, or for the first 1000 that fire. The processes
    along `axis` take turns at reading, and then each has the results of all.
    """

    def __init__(
        self,
        sae: SAE,
        config: VizConfig | None = None,
        *,
        lm: LanguageModel,
        hookpoint: str | None = None,
        dataset: Dataset | None = None,
        ctx_len: int = 256,
        skip_first: bool = False,
        exclude_tokens: Sequence[int] = (),
        axis: Axis = ALONE.data,
    ):
        self.sae, self.lm, self.config, self.axis = sae, lm, config or VizConfig(), axis
        self.hookpoint, self.dataset = hookpoint or sae.config.hook_point, dataset or open_dataset()
        self.ctx_len = self.config.ctx_len or ctx_len
        self.counts: dict[str, Any] = {"skip_first": skip_first, "exclude_tokens": exclude_tokens}
        self.explanations: dict[int, Explanation] = {}

    @cached_property
    @torch.no_grad()
    def tables(self) -> FeatureTables:
        """From one pass over whole sequences, until config.eval_tokens counted tokens are seen or the text ends."""
        c = self.config
        tables = FeatureTables(self.sae, c.feature, top_k=c.top_k, context_tokens=c.context_tokens)
        split, was_training = "train" if c.train_text else "val", self.sae.training
        text = TokenRows(self.lm, self.dataset, split, self.ctx_len, **self.counts)
        self.sae.eval()
        n_tokens = n_sequences = 0
        with log.progress(c.eval_tokens, "reading") as bar:
            for turn, rows in enumerate(text.until(c.eval_tokens, c.model_batch_size)):
                if turn % self.axis.size == self.axis.rank:
                    self._read(tables, rows, first=n_sequences)
                n_tokens, n_sequences = n_tokens + int(rows.keep.sum()), n_sequences + len(rows.ids)
                bar.update(n_tokens - bar.n)
        self.sae.train(was_training)
        require(n_tokens > 0, f"'{self.dataset.name}' gave no held-out text; give more of it, or lower --ctx_len")
        whole, *others = self.axis.objects(tables)
        for other in others:
            whole.merge(other)
        whole.finish()
        return whole

    def _read(self, tables: FeatureTables, rows: Rows, *, first: int) -> None:
        """Run the model and the SAE on some sequences, and add what they show."""
        sae, names = self.sae, places(self.hookpoint, self.sae.config.transcode)
        seen = self.lm.hidden(rows.ids, rows.valid, list(dict.fromkeys(names)))
        x, y = (seen[name][rows.valid.to(self.lm.device)].float() for name in names)
        codes, kept = sae.encode_sparse(x), rows.keep[rows.valid].to(x.device)
        check_finite({self.hookpoint: x[kept]})
        counted = Codes(codes.indices[kept], codes.values[kept])  # type: ignore[index]
        tables.totals.add(y[kept], sae.reconstruct_from(counted, x[kept]), counted)
        tables.add(Batch(*rows, codes, first))

    @cached_property
    def labels(self) -> list[Label | None]:
        """One for each row of the tables; all None without config.labels."""
        t, tokenizer = self.tables, self.lm.tokenizer
        if not self.config.labels:
            return [None] * len(t.latents)
        return make_labels(t.sample.text(), t.row.numpy(), tokenizer.token_str, tokenizer.special_ids)

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
            yield with_explanation(record, self.explanations.get(record.latent))

    @cached_property
    def to_explain(self) -> tuple[list[FeatureRecord], list[FeatureRecord]]:
        """The records of the first config.explainer_limit chosen features that fired, and a pool: these and 100 more,
        whose contexts are examples in which a feature is silent."""
        live = self.tables.live()
        few = sorted(set(self.chosen) & set(live))[: self.config.explainer_limit]
        others = [latent for latent in live if latent not in set(few)][:100]
        return list(self.maker.records(few)), list(self.maker.records([*few, *others]))

    def explain(self, explainer: Explainer) -> dict[int, Explanation]:
        """Let a model explain some of the chosen features; their records then have its explanations."""
        self.explanations = explainer.run(*self.to_explain)
        return self.explanations

    @cached_property
    def records(self) -> list[FeatureRecord]:
        """The records of the chosen features, all in memory."""
        return list(self.each())

    @cached_property
    def places(self) -> dict[int, tuple[float, float]]:
        """The place of each latent on the map."""
        W_dec = self.sae.W_dec
        return dict(enumerate(map(tuple, directions.plane(W_dec, directions.nearest(W_dec)[0]).tolist())))

    def listing(self) -> Listing:
        """An empty list of features, with the facts shown above it."""
        m, c = self.tables.totals.metrics(), self.sae.config
        shown = {
            "model": self.lm.name,
            "hookpoint": self.hookpoint,
            "training text" if self.config.train_text else "held-out text": self.dataset.name,
            "tokens": f"{m['n_tokens']:,}",
            "SAE": f"{c.activation}, {c.d_in} to {c.d_sae} latents",
            "active per token": f"{m['l0']:.1f}",
            "explained variance": f"{m['explained_variance']:.3f}",
            "never fired": f"{100 * m['dead_fraction']:.3g}%",
        }
        starts = [p for p, n in zip(POSITIONS, self.tables.all_positions.tolist(), strict=True) if n]
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
        """A hash of the hookpoint and the SAE's weights."""
        digest = hashlib.sha256(self.hookpoint.encode())
        for name, w in sorted(self.sae.state_dict().items()):
            digest.update(name.encode() + w.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write the pages of the chosen features to a folder of their own; returns index.html.

        Pages of other features of the same SAE stay; everything else in the folder is replaced.
        """
        save_pages(Path(folder), self.each(), self.listing(), identity=self.identity())
        return Path(folder) / "index.html"
