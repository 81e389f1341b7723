"""What latents mean, for people: one pass over held-out text -> a FeatureRecord per latent -> pages and plots.

Pages are self-contained html that opens from disk; text from data is escaped, and a policy forbids scripts but ours.

Letters: N sequences, T positions, B tokens, F latents asked for, R contexts per latent, W tokens in a context's window.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import log
from sae.activations import check_finite
from sae.config import UserError, VizConfig, require
from sae.datasets import Dataset, open_dataset
from sae.evaluator import Totals
from sae.kernels import Codes
from sae.language_model import LanguageModel
from sae.models import SAE
from sae.tokens import TokenRows, kept_positions

# Eighths of an octave over 32 octaves: an activation has its bin before the largest is known, so one pass is enough.
# The first and the last bin also hold what lies beyond.
EDGES = 2.0 ** (torch.arange(-128, 129) / 8)
N_EFFECTS = 10  # promoted and suppressed tokens shown
MAX_PAGES = 1000  # unless asked for all


@dataclass(frozen=True)
class Context:
    """Tokens and a latent's activation at each. tokens[peak] is the strongest, at `position` of held-out `sequence`."""

    tokens: list[str]
    values: list[float]
    peak: int
    sequence: int
    position: int


@dataclass(frozen=True)
class FeatureRecord:
    """A latent over n_tokens tokens: how often and how strongly it fires, where, and what it does.

    density: share of tokens it is active on; mean_active: mean over those. counts[i] activations lay in
    edges[i]..edges[i+1]. promoted, suppressed: (token, effect of one unit of activation on its logit), strongest first;
    empty where there is no way to the logits. contexts: strongest first, at most one per sequence.
    """

    latent: int
    n_tokens: int
    density: float
    max_activation: float
    mean_active: float
    counts: list[int]
    edges: list[float]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    contexts: list[Context]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class FeatureTables:
    """What one pass keeps, on the CPU, of the latents asked for: the same amount however much text goes by.

    histogram (F, bins) and sums (F,); and of the R strongest contexts, at most one per sequence: peaks (F, R), places
    (F, R, 2) as sequence and position, ids (F, R, W) with -1 for no token, values (F, R, W). With R = 20 and W = 49
    that is 10 kB a latent: 16 MB for 1,536 latents, 330 MB for 32,768.
    """

    def __init__(self, sae: SAE, features: Sequence[int], *, top_k: int, context_tokens: int):
        for i in features:
            require(0 <= i < sae.d_sae, f"feature {i} was asked for; this SAE has 0 to {sae.d_sae - 1}")
        self.latents = sorted(set(features or range(sae.d_sae)))
        F, R, W = len(self.latents), top_k, 2 * context_tokens + 1
        self.row = torch.full((sae.d_sae,), -1)  # latent -> its row of the tables
        self.row[self.latents] = torch.arange(F)
        self.totals = Totals(sae.d_out, sae.d_sae, device=sae.W_dec.device)  # of all latents, over the same tokens
        self.histogram = torch.zeros(F, len(EDGES) - 1, dtype=torch.int64)
        self.sums = torch.zeros(F, dtype=torch.float64)
        self.peaks = torch.zeros(F, R)
        self.places = torch.zeros(F, R, 2, dtype=torch.int64)
        self.ids = torch.full((F, R, W), -1, dtype=torch.int32)
        self.values = torch.zeros(F, R, W)

    def add(self, ids: Tensor, valid: Tensor, keep: Tensor, codes: Codes, *, first: int) -> None:
        """Add N sequences, numbered from `first`: ids, valid and keep (N, T), and the codes of the valid tokens.

        Only kept tokens count and can be a peak; windows show what the latent does at the others too.
        """
        assert codes.indices is not None
        rows, values = self.row[codes.indices.cpu()], codes.values.cpu().float()
        active = (values > 0) & (rows >= 0)
        places = valid.flatten().nonzero()[active.nonzero()[:, 0], 0]  # n * T + t
        rows, values = rows[active], values[active]
        (F, n_bins), (N, T) = self.histogram.shape, ids.shape

        kept = keep.flatten()[places]
        f, v, p = rows[kept], values[kept], places[kept]
        bins = (torch.bucketize(v, EDGES, right=True) - 1).clamp(0, n_bins - 1)
        self.histogram += torch.bincount(f * n_bins + bins, minlength=F * n_bins).view(F, n_bins)
        self.sums.index_add_(0, f, v.double())

        # Candidates: each latent's peak in each sequence, at the first of equal tokens.
        group = f * N + p // T
        peaks = torch.zeros(F * N).scatter_reduce_(0, group, v, "amax")
        top = v == peaks[group]
        at = torch.zeros(F * N, dtype=torch.int64).scatter_reduce_(0, group[top], p[top], "amin", include_self=False)
        peaks, at = peaks.view(F, N), at.view(F, N)

        # Merge; stable, so that of equal peaks the one found earlier stays ahead. What a window holds is looked up by
        # latent and place: no (B, F) matrix is made.
        R, W = self.ids.shape[1:]
        order = torch.cat((self.peaks, peaks), 1).sort(dim=1, descending=True, stable=True).indices[:, :R]
        changed = (order >= R).any(1).nonzero()[:, 0]
        keys, by_key = (rows * (N * T) + places).sort()
        for part in changed.split(max(1, (1 << 20) // (N * W))):
            place = at[part][:, :, None]
            window = place + torch.arange(-(W // 2), W // 2 + 1)
            inside = window // T == place // T
            window = window.clamp(0, N * T - 1)
            inside &= valid.flatten()[window]
            wanted = part[:, None, None] * (N * T) + window
            found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            pick = torch.arange(len(part))[:, None], order[part]
            for table, new in (
                (self.peaks, peaks[part]),
                (self.places, torch.cat((place // T + first, place % T), 2)),
                (self.ids, torch.where(inside, ids.flatten()[window], -1).int()),
                (self.values, torch.where(keys[found] == wanted, values[by_key[found]], 0.0)),
            ):
                table[part] = torch.cat((table[part], new), 1)[pick]

    def records(self, lm: LanguageModel, sae: SAE, latents: Sequence[int]) -> Iterator[FeatureRecord]:
        """The records of these latents, made in blocks."""
        token = lru_cache(None)(lm.tokenizer.token_str)
        for block in torch.tensor(latents, dtype=torch.int64).split(256):
            effects = lm.logit_effects(sae.W_dec.detach()[block.to(sae.W_dec.device)])
            # none without a way to the logits; a padded vocabulary has logits without a token
            effects = torch.empty(len(block), 0) if effects is None else effects[:, : lm.tokenizer.vocab_size].cpu()
            order = [(sign * effects).topk(min(N_EFFECTS, effects.shape[1])).indices for sign in (1, -1)]
            tables = (self.histogram, self.sums, self.peaks, self.places, self.ids, self.values)
            rows = zip(*(x[self.row[block]].numpy() for x in tables), strict=True)
            for i, (counts, total, peaks, places, ids, values) in enumerate(rows):
                n, n_tokens, bins = int(counts.sum()), self.totals.n, np.flatnonzero(counts)
                start, stop = (int(bins[0]), int(bins[-1]) + 1) if n else (0, 0)
                promoted, suppressed = ([(token(j), float(effects[i, j])) for j in o[i].tolist()] for o in order)
                contexts = []
                for r in np.flatnonzero(peaks):
                    inside, middle = ids[r] >= 0, ids.shape[1] // 2
                    words, own = [token(j) for j in ids[r][inside].tolist()], values[r][inside].tolist()
                    contexts.append(Context(words, own, int(inside[:middle].sum()), *places[r].tolist()))
                yield FeatureRecord(
                    latent=int(block[i]), n_tokens=n_tokens, density=n / max(1, n_tokens),
                    max_activation=float(peaks[0]), mean_active=float(total) / max(1, n),
                    counts=counts[start:stop].tolist(), edges=EDGES[start : stop + 1].tolist() if n else [],
                    promoted=promoted, suppressed=suppressed, contexts=contexts,
                )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# pages

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1f24;--dim:#666d77;--line:#e3e6ea;--soft:#f4f5f7;--link:#0b57d0;
 --hot:255 150 0;--a:0}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e3e5e9;--dim:#979ea8;--line:#2c3037;--soft:#20242a;
 --link:#8ab4f8;--hot:214 104 0}}
body{margin:auto;max-width:78rem;padding:1rem;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;
 font-variant-numeric:tabular-nums}*{box-sizing:border-box}:focus-visible{outline:2px solid var(--link)}
h1{margin:.6rem 0 .2rem}h2{font-size:1rem;margin:0}a{color:var(--link)}a:not(:hover){text-decoration:none}
small,dt{font-size:.85rem;color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
ol{list-style:none;padding:0;margin:.4rem 0}nav,dl{display:flex;flex-wrap:wrap;gap:.6rem 2.2rem}
.t{font:13px/1.75 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
bdi{border-radius:2px;padding:1px 0;background:rgb(var(--hot)/calc(var(--a)*.85))}bdi.p{border-bottom:2px solid}
u{text-decoration:none;background:radial-gradient(circle,var(--dim) .7px,#0000 1px) 0 50%/1ch 1em repeat-x}
i{color:var(--dim);font-style:normal;white-space:normal}.n,.g{font-size:0}
.n:before,.g:before{font-size:13px;content:"\\21b5"}.g:before{content:"\\21e5"}
.cols{display:grid;grid-template-columns:5fr 3fr 3fr;gap:1.4rem 3rem;margin:1.4rem 0 2rem}.cols>*{min-width:0}
.cols li{display:flex;justify-content:space-between;gap:1rem}
.ctx li{display:grid;grid-template-columns:4rem 1fr;padding:.45rem 0;border-top:1px solid var(--line)}
svg{width:100%}rect{fill:rgb(var(--hot))}line{stroke:var(--line)}text{font-size:10px;fill:var(--dim)}
table{border-collapse:collapse;width:100%;table-layout:fixed}thead{position:sticky;top:0;background:var(--bg)}
tr{border-bottom:1px solid var(--line)}tbody tr:hover{background:var(--soft)}[hidden]{display:none!important}
td,th button{padding:.25rem .6rem;text-align:right;overflow:hidden}th{padding:0;width:6.5rem}th:nth-child(5){width:9rem}
th:nth-child(6){width:auto}:is(td,th):nth-child(n+5),th:nth-child(n+5) button{text-align:left}
.row,.l{white-space:pre;display:flex;align-items:baseline}.row i{white-space:nowrap}.row span{flex:3;overflow:hidden}
.row .l{flex:2;justify-content:flex-end}.l bdi{line-height:1.2}
button,input{font:inherit;color:inherit;border:0}
button{background:none;font-weight:600;width:100%;white-space:nowrap;cursor:pointer}
input{background:var(--soft);border-radius:6px;padding:.4rem .7rem;width:min(22rem,100%);margin:1rem .5rem 1rem 0}
[aria-sort=ascending] button:after{content:"\\2191"}[aria-sort=descending] button:after{content:"\\2193"}
@media(max-width:46rem){.cols,.ctx li{grid-template-columns:1fr}tr{display:grid;grid-template-columns:repeat(5,1fr)}
 th:nth-child(n){width:auto}td,th button{padding-inline:0;font-size:.8rem}:is(td,th):nth-child(6){grid-column:1/-1}}
"""
SCRIPT = """
const rows = [...document.querySelectorAll("tbody tr")], heads = [...document.querySelectorAll("th")];
const text = new Map(rows.map(row => [row, row.textContent.toLowerCase()])), box = document.querySelector("input");
heads.forEach((head, i) => head.firstChild.onclick = () => {
  const numeric = i < 4, up = head.ariaSort ? head.ariaSort === "descending" : !numeric || !i;
  heads.forEach(h => h.ariaSort = null);
  head.ariaSort = up ? "ascending" : "descending";
  const key = row => numeric ? +row.cells[i].dataset.v : row.cells[i].textContent;
  const order = (a, b) => key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0;
  rows.sort((a, b) => up ? order(a, b) : order(b, a)).forEach(row => row.parentNode.append(row));
});
(box.oninput = () => {
  rows.forEach(row => row.hidden = !text.get(row).includes(box.value.toLowerCase()));
  document.querySelector("output").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
})();
"""


def _page(title: str, body: str, script: str = "") -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline';"
        f"script-src 'sha256-{digest}'\"><title>{title}</title><style>{STYLE}</style>\n{body}\n"
        f"<script>{script}</script>\n"
    )


MARKS = {" ": "<u> </u>", "\n": '<i class="n">\n</i>', "\t": '<i class="g">\t</i>'}


@lru_cache(1 << 16)
def shown(text: str) -> str:
    """Data as html: escaped, spaces and line ends marked, and what has no glyph of its own spelled out."""
    visible = lambda c: escape(c) if c.isprintable() and c != "\ufffd" else f"<i>{ascii(c)[1:-1]}</i>"
    return "".join(MARKS.get(c) or visible(c) for c in text).replace("</u><u>", "")


def _tokens(context: Context, largest: float, part: slice = slice(None)) -> str:
    spans = []
    for i in range(len(context.tokens))[part]:
        value, mark = context.values[i], ' class="p"' if i == context.peak else ""
        if value > 0:
            mark += f' style="--a:{min(1.0, value / largest):.2f}" title="{value:.4g}"'
        spans.append(f"<bdi{mark}>{shown(context.tokens[i])}</bdi>")
    return "".join(spans)


def _facts(facts: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<div><dt>{name}<dd>{value}</div>" for name, value in facts.items()) + "</dl>\n"


def feature_page(records: Sequence[FeatureRecord], i: int, about: str) -> str:
    """The page of records[i], linked to those before and after it. about: a line on the SAE."""
    r, body = records[i], '<nav><a href="index.html">all features</a>'
    for j, rel, label in ((i - 1, "prev", "&larr; {}"), (i + 1, "next", "{} &rarr;")):
        if 0 <= j < len(records):
            n = records[j].latent
            body += f'<a rel="{rel}" href="feature_{n}.html">{label.format(n)}</a>'
    body += f"</nav><h1>Feature {r.latent}</h1><small>{escape(about)}</small>\n"
    if r.contexts:
        body += _facts({
            "density": f"{100 * r.density:.3g}% <small>{sum(r.counts):,} of {r.n_tokens:,} tokens</small>",
            "largest activation": f"{r.max_activation:.4g}", "mean when active": f"{r.mean_active:.4g}",
        })  # fmt: skip
    activations = _histogram(r) if r.contexts else f"never fired on {r.n_tokens:,} tokens"
    body += f'<div class="cols"><div><h2>Activations</h2>{activations}</div>\n'
    for title, tokens in (("Promoted tokens", r.promoted), ("Suppressed tokens", r.suppressed)):
        items = "".join(f"<li><bdi>{shown(token)}</bdi>{effect:+.3f}" for token, effect in tokens)
        body += f'<div><h2>{title}</h2><ol class="t">{items or "<li>no way to the logits"}</ol></div>\n'
    body += "</div>"
    if r.contexts:
        body += "<h2>Strongest contexts</h2><small>One per sequence. The stronger the shade, the stronger the "
        body += 'activation; point at a token for its value.</small><ol class="ctx">\n'
    for c in r.contexts:
        body += f'<li><span title="sequence {c.sequence}, position {c.position}">{c.values[c.peak]:.4g}</span>'
        body += f'<div class="t" title="not active">{_tokens(c, r.max_activation)}</div>\n'
    return _page(f"Feature {r.latent}", body)


def _histogram(r: FeatureRecord) -> str:
    """Bars of one width for bins of one ratio, so the axis is logarithmic."""
    n, highest = len(r.counts), max(r.counts)
    bars = "".join(
        f'<rect x="{400 * i / n:.1f}" y="{155 - h:.1f}" width="{360 / n:.1f}" height="{h:.1f}"><title>'
        f"{r.edges[i]:.3g} to {r.edges[i + 1]:.3g}: {count:,} tokens</title></rect>"
        for i, count in enumerate(r.counts)
        for h in [count and max(1.0, 140 * count / highest)]
    )
    labels = [(0, 11, "start", f"{highest:,} tokens"), (200, 185, "middle", "activation, log scale")]
    labels += [(400 * i // n, 170, a, f"{r.edges[i]:.3g}") for i, a in ((0, "start"), (n // 2, "middle"), (n, "end"))]
    bars += "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>' for x, y, anchor, label in labels)
    bars += '<line x2="400" y1="15" y2="15"/><line x2="400" y1="155.5" y2="155.5"/>'
    return f'<svg viewBox="0 0 400 190" role="img" aria-label="histogram">{bars}</svg>'


def index_page(records: Sequence[FeatureRecord], facts: dict[str, str]) -> str:
    """The table of these records, sorted and filtered in the browser, below facts about the run."""
    titles = ("feature", "density", "max", "mean", "promotes", "strongest context")
    heads = "".join(f'<th scope="col"><button type="button">{title}</button>' for title in titles)
    rows = ""
    for r in records:
        rows += f'<tr><td data-v="{r.latent}"><a href="feature_{r.latent}.html">{r.latent}</a>'
        rows += f'<td data-v="{r.density}">{100 * r.density:.3g}%'
        rows += "".join(f'<td data-v="{v}">{v:.4g}' for v in (r.max_activation, r.mean_active))
        rows += '<td><div class="t row">' + "".join(f"<bdi>{shown(token)}</bdi>" for token, _ in r.promoted[:1])
        rows += '</div><td><div class="t row">' + ("" if r.contexts else "<span>never fired</span>")
        for c in r.contexts[:1]:  # the peaks of all rows stand below each other
            rows += f'<span class="l">{_tokens(c, r.max_activation, slice(max(0, c.peak - 10), c.peak))}</span>'
            rows += f"<span>{_tokens(c, r.max_activation, slice(c.peak, c.peak + 12))}</span>"
        rows += "</div>\n"
    body = (
        f"<h1>Features</h1>{_facts({k: escape(v) for k, v in facts.items()})}"
        '<input type="search" placeholder="filter by text" aria-label="filter by text"><output></output>\n'
        f"<table><thead><tr>{heads}</thead><tbody>\n{rows}</tbody></table>"
    )
    return _page("Features", body, SCRIPT)


def _replace_folder(folder: Path, pages: Iterable[tuple[str, str]]) -> None:
    """Write all pages into a new folder, then let it take the old one's place: there is never half a folder."""
    foreign = [p.name for p in folder.glob("*") if not re.fullmatch(r"index\.html|feature_\d+\.html|\..*", p.name)]
    require(not foreign, f"'{folder}' is to be replaced and has {' '.join(foreign[:1])}; move it, or give --output_dir")
    new, away = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}.tmp") for end in ("new", "old"))
    try:
        new.mkdir(parents=True)
        for name, html in pages:
            (new / name).write_text(html, encoding="utf-8", errors="backslashreplace", newline="\n")
        if folder.is_dir():
            folder.rename(away)
        new.rename(folder)
    except OSError as e:
        raise UserError(f"cannot write '{folder}': {e.strerror or e}; choose another --output_dir") from e
    finally:
        if away.exists() and not folder.exists():
            away.rename(folder)
        for rest in (new, away):
            shutil.rmtree(rest, ignore_errors=True)


class FeatureVisualizer:
    """The features of an SAE as records and pages. Held-out text is read once, when something is first asked for.

    viz = FeatureVisualizer(sae, VizConfig(eval_tokens=20_000), lm=lm); viz.html(12); viz.save("features")

    Pages are made for config.feature, or for all with config.all_features, or for the first 1000 that fire.
    """

    def __init__(
        self, sae: SAE, config: VizConfig | None = None, *, lm: LanguageModel, hookpoint: str | None = None,
        dataset: Dataset | None = None, ctx_len: int = 256, skip_first: bool = False, exclude_tokens: Sequence[int] = ()
    ):  # fmt: skip
        self.sae, self.lm, self.config = sae, lm, config or VizConfig()
        self.hookpoint, self.dataset = hookpoint or sae.config.hook_point, dataset or open_dataset()
        self.ctx_len, self.skip_first, self.exclude_tokens = self.config.ctx_len or ctx_len, skip_first, exclude_tokens

    @cached_property
    @torch.no_grad()
    def tables(self) -> FeatureTables:
        """From one pass: whole sequences until config.eval_tokens counted tokens are seen or the text ends."""
        c, lm, sae, n_sequences = self.config, self.lm, self.sae, 0
        tables = FeatureTables(sae, c.feature, top_k=c.top_k, context_tokens=c.context_tokens)
        totals, text = tables.totals, TokenRows(lm, self.dataset, "val", self.ctx_len)
        bar, was_training = log.progress(c.eval_tokens, "reading"), sae.training
        sae.eval()
        while totals.n < c.eval_tokens:
            ids, valid = text.take(c.model_batch_size)
            if len(ids) == 0:
                break
            keep = kept_positions(lm, ids, valid, skip_first=self.skip_first, exclude_tokens=self.exclude_tokens)
            counts = keep.sum(1)
            n = int((totals.n + counts.cumsum(0) - counts < c.eval_tokens).sum())  # the same however it is batched
            ids, valid, keep = ids[:n], valid[:n], keep[:n]
            names = [f"{self.hookpoint}@in", self.hookpoint] if sae.config.transcode else [self.hookpoint]
            seen = lm.hidden(ids, valid, names)
            x, y = (seen[name][valid.to(lm.device)].float() for name in (names[0], names[-1]))
            codes, kept = sae.encode_sparse(x), keep[valid].to(x.device)
            check_finite({self.hookpoint: x[kept]})
            counted = Codes(codes.indices[kept], codes.values[kept])  # type: ignore[index]
            totals.add(y[kept], sae.reconstruct_from(counted, x[kept]), counted)
            tables.add(ids, valid, keep, codes, first=n_sequences)
            n_sequences += n
            bar.update(int(counts[:n].sum()))
        bar.close()
        sae.train(was_training)
        require(totals.n > 0, f"'{self.dataset.name}' gave no held-out text; give more of it, or lower --ctx_len")
        return tables

    @cached_property
    def records(self) -> list[FeatureRecord]:
        """The features that get a page, in order of their numbers."""
        tables, c = self.tables, self.config
        live = torch.tensor(tables.latents)[tables.histogram.any(1)].tolist()
        chosen = tables.latents if c.feature or c.all_features else live[:MAX_PAGES]
        return list(tables.records(self.lm, self.sae, chosen))

    def html(self, latent: int) -> str:
        """The page of a feature."""
        found = [i for i, r in enumerate(self.records) if r.latent == latent]
        require(bool(found), f"feature {latent} has no page; ask for it with --feature {latent}")
        return feature_page(self.records, found[0], self.hookpoint)

    def index(self) -> str:
        """The page that lists them."""
        m, c = self.tables.totals.metrics(), self.sae.config
        facts = {
            "model": self.lm.name, "hookpoint": self.hookpoint, "held-out text": self.dataset.name,
            "tokens": f"{m['n_tokens']:,}", "SAE": f"{c.activation}, {c.d_in} to {c.d_sae} latents",
            "active per token": f"{m['l0']:.1f}", "explained variance": f"{m['explained_variance']:.3f}",
            "never fired": f"{100 * m['dead_fraction']:.3g}%",
        }  # fmt: skip
        return index_page(self.records, facts)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.index())}" style="width:100%;height:40rem;border:0"></iframe>'

    def save(self, folder: str | Path) -> Path:
        """Write the index and the pages to a folder of their own, in place of older ones; returns index.html."""
        records = self.records
        pages = ((f"feature_{r.latent}.html", feature_page(records, i, self.hookpoint)) for i, r in enumerate(records))
        _replace_folder(Path(folder), itertools.chain([("index.html", self.index())], pages))
        return Path(folder) / "index.html"


def collect_features(
    lm: LanguageModel, sae: SAE, hookpoint: str, dataset: Dataset,
    *, n_tokens: int, ctx_len: int, skip_first: bool = False, model_batch_size: int = 16, top_k: int = 20,
    context_tokens: int = 24, features: Sequence[int] | None = None,
) -> list[FeatureRecord]:  # fmt: skip
    """The records of these latents, or of all (dead ones have no contexts), from one pass over n_tokens of text.

    Exact, and the same for any model_batch_size: the contexts are those of the top_k sequences with the strongest
    activations, each shown around its peak; of equal ones the earlier comes first.
    """
    config = VizConfig(
        eval_tokens=n_tokens, ctx_len=ctx_len, model_batch_size=model_batch_size, feature=tuple(features or ()),
        all_features=True, top_k=top_k, context_tokens=context_tokens,
    )  # fmt: skip
    return FeatureVisualizer(sae, config, lm=lm, hookpoint=hookpoint, dataset=dataset, skip_first=skip_first).records
