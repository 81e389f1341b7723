"""Records equal a dense computation by brute force, however the text is batched; pages show hostile text as text and
work in a real browser (screenshots go to test_output/); plots are pictures.

Run: python -m pytest tests/test_feature_viz.py
"""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from playwright.sync_api import sync_playwright

from sae import formats, log
from sae.config import SAEConfig, UserError, VizConfig
from sae.datasets import open_dataset
from sae.evaluator import Totals
from sae.feature_viz import (
    EDGES,
    FeatureTables,
    FeatureVisualizer,
    collect_features,
    feature_page,
    shown,
)
from sae.kernels import Codes
from sae.models import create_sae
from sae.plots import plot_evaluation, plot_training
from sae.tokens import TokenRows, kept_positions
from scripts import sae_viz
from tests.conftest import ROOT, make_text

HOOK = "transformer.h.1"
OUTPUT = ROOT / "test_output"  # screenshots; playwright makes the folder
DEAD = (3, 40)
SMALL: dict[str, Any] = {"n_tokens": 700, "ctx_len": 32, "top_k": 4, "context_tokens": 5}
HOSTILE = [
    "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "<!--", "&lt;",
    "\u202egnp.exe", "\x00", "\ufffd", "\U0001f600", "\u0627\u0644", "\\xe2\\x80", " \n\t", "]]>", "</style>", "${1}`",
]  # fmt: skip


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Many short documents, so that special tokens stand in every context; a path."""
    path = tmp_path_factory.mktemp("documents") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": make_text(40, seed)}) + "\n" for seed in range(400)))
    return path


def some_sae(activation="topk", d_in=32):
    """96 latents, two of them dead."""
    sae = create_sae(SAEConfig(d_in=d_in, d_sae=96, activation=activation, k=5))
    with torch.no_grad():
        sae._encoder_bias()[list(DEAD)] = -1e4
    return sae


def rows_of_text(lm, sae, dataset, n_tokens, ctx_len, skip_first=False):
    """Sequence by sequence: ids (t,), which count (t,), dense activations (t, F)."""
    text, rows, n = TokenRows(lm, dataset, "val", ctx_len), [], 0
    while n < n_tokens:
        ids, valid = text.take(1)
        if len(ids) == 0:
            break
        keep = kept_positions(lm, ids, valid, skip_first=skip_first)[valid]
        with torch.no_grad():
            rows.append((ids[valid], keep, sae.encode(lm.hidden(ids, valid, [HOOK])[HOOK][valid])))
        n += int(keep.sum())
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# records


@pytest.mark.parametrize(("activation", "skip_first"), [("topk", True), ("gated", False)])
def test_records_equal_brute_force(lm, documents, activation, skip_first):
    sae, dataset = some_sae(activation), open_dataset(str(documents))
    rows = rows_of_text(lm, sae, dataset, 700, 32, skip_first)
    records = collect_features(lm, sae, HOOK, dataset, **SMALL, skip_first=skip_first, model_batch_size=7)
    n = sum(int(keep.sum()) for _, keep, _ in rows)
    assert [r.latent for r in records] == list(range(96))
    assert 700 <= n < 732
    for r in records:
        own = torch.cat([f[keep, r.latent] for _, keep, f in rows])
        on = own[own > 0].double()
        assert (r.n_tokens, sum(r.counts)) == (n, len(on))
        assert r.density == pytest.approx(len(on) / n)
        assert r.max_activation == pytest.approx(float(own.max()), rel=1e-5)
        assert r.mean_active == pytest.approx(float(on.mean()) if len(on) else 0.0, rel=1e-5)
        peaks = torch.stack([torch.where(keep, f[:, r.latent], 0).max() for _, keep, f in rows])
        strongest = peaks[peaks > 0].sort(descending=True).values[:4]
        assert [c.values[c.peak] for c in r.contexts] == pytest.approx(strongest.tolist(), rel=1e-4)
        assert len({c.sequence for c in r.contexts}) == len(r.contexts)
        for c in r.contexts:
            ids, keep, f = rows[c.sequence]
            window = slice(max(0, c.position - 5), c.position + 6)
            assert keep[c.position]
            assert float(peaks[c.sequence]) == pytest.approx(c.values[c.peak], rel=1e-4)
            assert c.tokens == [lm.tokenizer.token_str(int(t)) for t in ids[window]]
            assert c.values == pytest.approx(f[window, r.latent].tolist(), rel=1e-4, abs=1e-4)
    assert all(records[i].contexts == [] and records[i].counts == [] for i in DEAD)
    assert any(t in lm.tokenizer.specials for r in records for c in r.contexts for t in c.tokens)
    json.dumps([r.to_dict() for r in records])


def test_histogram_bins_are_where_they_say(lm, documents):
    sae, dataset = some_sae(), open_dataset(str(documents))
    rows = rows_of_text(lm, sae, dataset, 700, 32)
    for r in collect_features(lm, sae, HOOK, dataset, **SMALL)[:20]:
        own = torch.cat([f[keep, r.latent] for _, keep, f in rows]).numpy()
        if r.counts:
            assert len(r.edges) == len(r.counts) + 1
            assert r.counts[0] > 0 < r.counts[-1]
            assert r.counts == np.histogram(own[own > 0], np.array(r.edges))[0].tolist()


def test_the_same_however_it_is_batched(lm, documents):
    sae, dataset = some_sae(), open_dataset(str(documents))
    one, again, three, many = (
        collect_features(lm, sae, HOOK, dataset, **SMALL, model_batch_size=size) for size in (16, 16, 3, 64)
    )
    assert one == again
    for other in (three, many):
        for a, b in zip(one, other, strict=True):
            assert (a.n_tokens, a.density) == (b.n_tokens, b.density)
            peaks, others = ([c.values[c.peak] for c in r.contexts] for r in (a, b))
            assert peaks == pytest.approx(others, rel=1e-5)
            for i, (c, d) in enumerate(zip(a.contexts, b.contexts, strict=True)):
                # a sum's last bits depend on the batch, so a near tie may fall either way
                if all(abs(peaks[i] - p) > 1e-4 for p in peaks[:i] + peaks[i + 1 :]) and i < 3:
                    assert (c.sequence, c.position, c.tokens) == (d.sequence, d.position, d.tokens)


def test_some_features_have_the_records_they_have_among_all(lm, documents):
    sae, dataset = some_sae(), open_dataset(str(documents))
    every = collect_features(lm, sae, HOOK, dataset, **SMALL)
    some = collect_features(lm, sae, HOOK, dataset, **SMALL, features=[90, 7, 7, 3])
    assert [r.latent for r in some] == [3, 7, 90]
    for r in some:
        assert replace(r, promoted=[], suppressed=[]) == replace(every[r.latent], promoted=[], suppressed=[])
        assert [t for t, _ in r.promoted] == [t for t, _ in every[r.latent].promoted]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_merge_against_plain_python(data):
    """Small whole numbers, so that ties are everywhere; any cutting into batches; some tokens do not count."""
    n_sequences, T, F, K = (data.draw(st.integers(1, high)) for high in (7, 5, 4, 3))
    K = min(K, F)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    indices = torch.rand(n_sequences, T, F, generator=g).argsort(-1)[:, :, :K]
    values = torch.randint(0, 4, (n_sequences, T, K), generator=g).float()
    keep = torch.rand(n_sequences, T, generator=g) < 0.8
    valid = keep | (torch.rand(n_sequences, T, generator=g) < 0.7)
    ids = torch.randint(0, 9, (n_sequences, T), generator=g)
    sae = create_sae(SAEConfig(d_in=2, d_sae=F, k=K))
    tables = FeatureTables(sae, (), top_k=2, context_tokens=1)
    start = 0
    while start < n_sequences:
        part = slice(start, start + data.draw(st.integers(1, 4)))
        codes = Codes(indices[part][valid[part]], values[part][valid[part]])
        tables.add(ids[part], valid[part], keep[part], codes, first=start)
        start = part.stop
    dense = torch.zeros(n_sequences, T, F).scatter(2, indices, values)
    for f in range(F):
        peaks = []
        for i in range(n_sequences):
            own = [(-float(dense[i, t, f]), i, t) for t in range(T) if keep[i, t] and dense[i, t, f] > 0]
            peaks += sorted(own)[:1]
        for r, (peak, i, t) in enumerate(sorted(peaks)[:2]):
            assert float(tables.peaks[f, r]) == -peak
            assert tables.places[f, r].tolist() == [i, t]
            near = [(j, 0 <= j < T and bool(valid[i, j])) for j in (t - 1, t, t + 1)]
            assert tables.ids[f, r].tolist() == [int(ids[i, j]) if there else -1 for j, there in near]
            for (j, there), value in zip(near, tables.values[f, r].tolist(), strict=True):
                assert value == (float(dense[i, j, f]) if there else 0) or not there
        assert int((tables.peaks[f] > 0).sum()) == min(2, len(peaks))
        counted = dense[:, :, f][keep]
        exact = {128: int((counted == 1).sum()), 136: int((counted == 2).sum()), 140: int((counted == 3).sum())}
        assert {i: n for i, n in enumerate(tables.histogram[f].tolist()) if n} == {i: n for i, n in exact.items() if n}
        assert float(tables.sums[f]) == float(counted.sum())


def test_memory_does_not_grow_with_the_text(lm, documents):
    sizes = []
    for n_tokens in (100, 1500):
        config = VizConfig(eval_tokens=n_tokens, ctx_len=32, top_k=4, context_tokens=5)
        viz = FeatureVisualizer(some_sae(), config, lm=lm, hookpoint=HOOK, dataset=open_dataset(str(documents)))
        sizes.append({k: v.nbytes for k, v in vars(viz.tables).items() if isinstance(v, torch.Tensor)})
    assert sizes[0] == sizes[1]
    assert sum(sizes[0].values()) == 96 * (8 + 8 * (len(EDGES) - 1) + 8 + 4 * (4 + 16 + 11 * (4 + 4)))


def test_effects_are_those_of_the_unembedding(lm, documents):
    sae, dataset = some_sae(), open_dataset(str(documents))
    (record,) = collect_features(lm, sae, HOOK, dataset, **SMALL, features=[11])
    direction = sae.W_dec[11].detach()
    head = lm.module.lm_head.weight * lm.module.transformer.ln_f.weight
    effects = head @ (direction - direction.mean())
    best, worst = effects.argsort(descending=True)[:10], effects.argsort()[:10]
    assert [e for _, e in record.promoted] == pytest.approx(effects[best].tolist(), rel=1e-4)
    assert [e for _, e in record.suppressed] == pytest.approx(effects[worst].tolist(), rel=1e-4)
    assert record.promoted[0][0] == lm.tokenizer.token_str(int(best[0]))
    assert record.suppressed[0][0] == lm.tokenizer.token_str(int(worst[0]))
    # a padded vocabulary: logits without a token are never shown
    few = SimpleNamespace(**{n: getattr(lm.tokenizer, n) for n in ("token_str", "special_ids", "encode_document")})
    few.vocab_size = 5
    viz = FeatureVisualizer(
        sae, VizConfig(eval_tokens=100), lm=replace(lm, tokenizer=few), hookpoint=HOOK, dataset=dataset
    )
    assert {t for t, _ in viz.records[0].promoted} == {lm.tokenizer.token_str(i) for i in range(5)}


def test_a_hookpoint_without_a_way_to_the_logits(lm, documents):
    wide, dataset = "transformer.h.1.mlp.c_proj@in", open_dataset(str(documents))
    record = collect_features(lm, some_sae(d_in=128), wide, dataset, **SMALL)[0]
    assert record.promoted == record.suppressed == []


def test_reading_changes_nothing_and_empty_text_is_an_error(lm, documents, tmp_path):
    sae = some_sae().train()
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    collect_features(lm, sae, HOOK, open_dataset(str(documents)), **SMALL)
    assert sae.training
    assert all(torch.equal(v, before[k]) for k, v in sae.state_dict().items())
    (tmp_path / "short.txt").write_text("alpha")
    with pytest.raises(UserError, match="no held-out text"):
        collect_features(lm, sae, HOOK, open_dataset(str(tmp_path / "short.txt")), **SMALL)
    with pytest.raises(UserError, match="0 to 95"):
        collect_features(lm, sae, HOOK, open_dataset(str(documents)), **SMALL, features=[96])


# ----------------------------------------------------------------------------------------------------------------------
# pages


class Reader(HTMLParser):
    """What a browser makes of a page: how often each tag stands in it, its attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="session")
def hostile_lm(lm):
    """The model with a tokenizer whose tokens are attacks, each with a number that tells it apart."""
    tokenizer = SimpleNamespace(
        **{n: getattr(lm.tokenizer, n) for n in ("vocab_size", "special_ids", "encode_document")}
    )
    tokenizer.token_str = lambda i: HOSTILE[i % len(HOSTILE)]
    return replace(lm, tokenizer=tokenizer, name="<b>model</b>")


@pytest.fixture(scope="session")
def hostile(hostile_lm, documents):
    config = VizConfig(eval_tokens=700, ctx_len=32, top_k=4, context_tokens=5, all_features=True)
    return FeatureVisualizer(some_sae(), config, lm=hostile_lm, hookpoint=HOOK, dataset=open_dataset(str(documents)))


def test_hostile_text_is_shown_and_never_run(hostile, lm, documents):
    kind = FeatureVisualizer(hostile.sae, hostile.config, lm=lm, hookpoint=HOOK, dataset=open_dataset(str(documents)))
    for page, harmless in ((hostile.index(), kind.index()), (hostile.html(11), kind.html(11))):
        got, wanted = Reader(page), Reader(harmless)
        assert not got.tags.keys() - wanted.tags.keys() - {"i", "u"}  # marks for spaces and the like
        assert got.tags["script"] == 1
        assert not got.attributes - wanted.attributes - {"class"}
        assert "<b>model" not in page
        assert not re.search(r"[\x00\ufffd\u202e]", page)
        page.encode("utf-8")
    assert Reader(feature_page(hostile.records, 3, "<b>about</b>")).tags["b"] == 0
    text = Reader("".join(hostile.html(r.latent) for r in hostile.records)).text
    for token in HOSTILE:
        spelled = token.replace("\x00", r"\x00").replace("\ufffd", r"\ufffd").replace("\u202e", r"\u202e")
        assert spelled in text, ascii(token)


@given(st.text())
def test_shown_text_reads_as_it_is(text):
    html = shown(text)
    assert set(re.findall(r"<[^>]*>", html)) <= {"<u>", "</u>", "<i>", "</i>", '<i class="n">', '<i class="g">'}
    exact = "".join(c if (c.isprintable() or c in "\n\t") and c != "\ufffd" else ascii(c)[1:-1] for c in text)
    assert Reader(html).text == exact
    html.encode("utf-8")


def test_pages_say_what_the_records_say(hostile):
    assert f"never fired on {hostile.records[3].n_tokens:,} tokens" in hostile.html(3)
    assert 'rel="next" href="feature_12.html"' in hostile.html(11)
    assert 'rel="prev" href="feature_10.html"' in hostile.html(11)
    assert "prev" not in hostile.html(0)
    record = hostile.records[11]
    page = hostile.html(11)
    for c in record.contexts:
        assert f'title="{c.values[c.peak]:.4g}"' in page
    assert page.count("<rect") == len(record.counts)
    assert page.count("<bdi") == sum(len(c.tokens) for c in record.contexts) + 20
    assert hostile._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(UserError, match="no page"):
        hostile.html(96)


def test_a_new_folder_takes_the_old_ones_place(hostile, tmp_path, monkeypatch):
    folder = tmp_path / "features"
    assert hostile.save(folder) == folder / "index.html"
    whole = {p.name: p.read_text() for p in folder.iterdir()}
    assert whole.keys() == {"index.html", *(f"feature_{i}.html" for i in range(96))}
    (folder / "feature_777.html").write_text("an older run's")
    hostile.save(folder)
    assert {p.name: p.read_text() for p in folder.iterdir()} == whole
    # half written: the old pages stay
    monkeypatch.setattr("sae.feature_viz.feature_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hostile.save(folder)
    assert {p.name: p.read_text() for p in folder.iterdir()} == whole
    assert [p.name for p in tmp_path.iterdir()] == ["features"]
    monkeypatch.undo()
    # nor does a disk that fails at the very end take them away
    rename = Path.rename

    def fails(path, target):
        if ".new." in path.name:
            raise OSError(28, "disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(UserError, match="disk full"):
        hostile.save(folder)
    assert {p.name: p.read_text() for p in folder.iterdir()} == whole
    assert [p.name for p in tmp_path.iterdir()] == ["features"]
    monkeypatch.undo()
    # somebody else's folder is left alone
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        hostile.save(folder)
    assert (folder / "thesis.tex").exists()


# ----------------------------------------------------------------------------------------------------------------------
# the script


@pytest.fixture
def run_folder(tmp_path, gpt_path, documents):
    """What sae_train leaves behind, as far as sae_viz reads it."""
    metadata = {"model_name": gpt_path, "dataset_path": str(documents), "context_size": 32, "hookpoint": HOOK}
    formats.save_sae(some_sae(), tmp_path / "layer_1", **metadata)
    return tmp_path / "layer_1"


def call(*flags):
    log.run_script(sae_viz.main, ["--device", "cpu", "--eval_tokens", "300", *map(str, flags)])


def test_the_script_chooses_features(run_folder, tmp_path, capsys, monkeypatch):
    pages = lambda: sorted(int(p.stem[8:]) for p in (run_folder / "features").glob("feature_*.html"))
    call("--sae_path", run_folder)
    live = pages()
    assert 10 < len(live) <= 94
    assert not set(DEAD) & set(live)
    assert str(run_folder / "features" / "index.html") in capsys.readouterr().out
    assert {p.name for p in (run_folder / "plots").iterdir()} == {"density.png", "l0.png"}
    call("--sae_path", run_folder, "--all_features")
    assert pages() == list(range(96))
    call("--sae_path", run_folder, "--feature", 40, 9)
    assert pages() == [9, 40]
    assert "never fired" in (run_folder / "features" / "feature_40.html").read_text()
    monkeypatch.setattr("sae.feature_viz.MAX_PAGES", 5)
    call("--sae_path", run_folder, "--output_dir", tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere" / "features").glob("feature_*.html"))) == 5


def test_a_feature_out_of_range_exits_with_2(run_folder, capsys):
    with pytest.raises(SystemExit) as e:
        call("--sae_path", run_folder, "--feature", 12, 96)
    assert e.value.code == 2
    assert "feature 96 was asked for; this SAE has 0 to 95" in capsys.readouterr().err
    assert not (run_folder / "features").exists()


# ----------------------------------------------------------------------------------------------------------------------
# plots


def test_plots_are_pictures(tmp_path):
    lines = []
    for step in range(10, 101, 10):
        for name in ("transformer.h.2", "transformer.h.10"):
            lines.append(
                {"step": step, "tokens": step * 64, "hookpoint": name, "loss": 1 / step, "l0": 8.0, "lr": 1e-3}
            )
            lines[-1] |= {"explained_variance": 1 - 3 / step, "dead_fraction": 0.1}
    lines.append({"step": 100, "hookpoint": "transformer.h.2", "val_total_loss": 0.1, "val_explained_variance": 0.9})
    torn = "\n".join(map(json.dumps, lines)) + '\n{"step": 110, "tok'
    (tmp_path / "metrics.jsonl").write_text(torn)
    (tmp_path / "empty.jsonl").write_text("")
    totals = Totals(4, 2000)
    x = torch.randn(50, 4)
    totals.add(x, x, Codes(torch.randint(0, 900, (50, 400)), torch.rand(50, 400).round()))
    fixed = Totals(4, 20)
    fixed.add(x, x, Codes(torch.arange(3).expand(50, 3), torch.ones(50, 3)))
    paths = plot_training(tmp_path / "metrics.jsonl", tmp_path / "a") + plot_evaluation(totals, tmp_path / "a")
    assert [p.name for p in paths] == ["training.png", "density.png", "l0.png"]
    paths += plot_training(tmp_path / "empty.jsonl", tmp_path / "b") + plot_evaluation(fixed, tmp_path / "b")
    paths += plot_evaluation(Totals(4, 20), tmp_path / "c")
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        picture = imread(path)
        assert picture.shape[0] > 300
        assert picture.std() > 0.02
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["density.png", "l0.png", "training.png"]


# ----------------------------------------------------------------------------------------------------------------------
# a real browser


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=shutil.which("chromium"), args=[*flags, "--no-first-run"])
        yield chromium
        chromium.close()


def open_page(browser, scheme, width):
    """A page that remembers its errors, dialogs and requests."""
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    page.wrong, page.requests = [], []
    page.on("console", lambda m: page.wrong.append(m.text))
    page.on("pageerror", lambda e: page.wrong.append(str(e)))
    page.on("dialog", lambda d: (page.wrong.append(d.message), d.dismiss()))
    page.on("request", lambda r: page.requests.append(r.url))
    return page


def test_the_pages_in_a_browser(browser, lm, documents, tmp_path):
    config = VizConfig(eval_tokens=1500, ctx_len=32, all_features=True)
    viz = FeatureVisualizer(some_sae(), config, lm=lm, hookpoint=HOOK, dataset=open_dataset(str(documents)))
    index = viz.save(tmp_path / "features")
    page = open_page(browser, "light", 1200)
    page.goto(index.as_uri())
    column = lambda i: page.eval_on_selector_all("tbody tr", f"rows => rows.map(r => r.cells[{i}].innerText)")
    numbers = lambda i: [float(text.rstrip("%")) for text in column(i)]
    assert numbers(0) == list(range(96))
    # every column sorts, one click down and one click up for numbers
    for i, key in ((1, "density"), (2, "max_activation"), (3, "mean_active")):
        head = page.get_by_role("button", name=page.locator("th").nth(i).inner_text())
        head.click()
        assert page.locator("th").nth(i).get_attribute("aria-sort") == "descending"
        assert numbers(i) == sorted(numbers(i), reverse=True)
        values = [getattr(r, key) for r in viz.records]
        assert values[int(column(0)[0])] == max(values)
        head.focus()
        page.keyboard.press("Enter")
        assert numbers(i) == sorted(numbers(i))
    page.locator("th button").nth(4).click()
    assert page.locator("th[aria-sort]").count() == 1
    assert page.locator("th").nth(4).get_attribute("aria-sort") == "ascending"
    page.locator("th button").nth(0).click()
    assert numbers(0) == list(range(96))
    page.screenshot(path=OUTPUT / "features_index.png")
    # the filter
    page.get_by_label("filter by text").fill("NEVER fired")
    dead = [r.latent for r in viz.records if not r.contexts]
    assert page.locator("tbody tr:visible").count() == len(dead) < 96
    assert page.locator("output").inner_text() == f"{len(dead)} of 96"
    page.get_by_label("filter by text").fill("")
    assert page.locator("tbody tr:visible").count() == 96
    # a feature's page, there and on to its neighbours
    page.get_by_role("link", name="11", exact=True).click()
    assert page.url.endswith("feature_11.html")
    assert page.locator("h1").inner_text() == "Feature 11"
    strongest = viz.records[11].contexts[0]
    assert page.locator(".ctx li").count() == len(viz.records[11].contexts)
    shade = page.locator(".ctx li").first.locator("bdi.p").evaluate("e => getComputedStyle(e).backgroundColor")
    assert shade == "rgba(255, 150, 0, 0.85)"
    assert (
        page.locator(".ctx li").first.locator("bdi.p").get_attribute("title")
        == f"{strongest.values[strongest.peak]:.4g}"
    )
    page.screenshot(path=OUTPUT / "feature.png")
    page.get_by_role("link", name="12").click()
    assert page.url.endswith("feature_12.html")
    page.get_by_role("link", name="all features").click()
    assert page.url.endswith("index.html")
    assert page.wrong == []
    assert {url.rsplit("/", 1)[0] for url in page.requests} == {index.parent.as_uri()}


def test_dark_narrow_and_hostile_in_a_browser(browser, hostile, tmp_path):
    index = hostile.save(tmp_path / "features")
    page = open_page(browser, "dark", 400)
    for name in ("index", "feature_11", "feature_3"):
        page.goto(index.with_name(f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
        assert page.locator("img, b").count() == 0
        page.screenshot(path=OUTPUT / f"hostile_{name}.png")
    page.goto(index.as_uri())
    page.get_by_label("filter by text").fill("</script><script>alert(1)")
    assert page.locator("tbody tr:visible").count() > 0
    # even a script that got in would not run
    index.write_text(index.read_text().replace("<h1>", "<script>alert(2)</script><img src=x onerror=alert(3)><h1>"))
    page.goto(index.as_uri())
    page.locator("th button").nth(1).click()
    assert page.locator("th[aria-sort]").count() == 1
    assert not [text for text in page.wrong if text in ("1", "2", "3")]
