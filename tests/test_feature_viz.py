"""Records equal a dense computation by brute force, however the text is batched; pages are made, refreshed and kept as
asked.

Run: python -m pytest tests/test_feature_viz.py
"""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sae import log
from sae.config import UserError, VizConfig
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows, kept_positions
from sae.feature_viz import FeatureVisualizer
from sae.formats import store
from sae.pages.feature_tables import POSITIONS
from sae.pages.maker import INTERVALS, PER_INTERVAL
from sae.pages.records import read_features
from scripts import sae_viz
from tests.conftest import DEAD, HOOK, ROOT, some_sae

SMALL: dict[str, Any] = {"n_tokens": 700, "ctx_len": 32, "top_k": 4, "context_tokens": 5}


def collect_features(lm, sae, hookpoint, dataset, *, n_tokens, features=(), skip_first=False, **config):
    """The records of these latents, or of all."""
    c = VizConfig(eval_tokens=n_tokens, feature=tuple(features), all_features=not features, **config)
    return FeatureVisualizer(sae, c, lm=lm, hookpoint=hookpoint, dataset=dataset, skip_first=skip_first).records


def rows_of_text(lm, sae, dataset, n_tokens, ctx_len, skip_first=False):
    """Sequence by sequence: ids (t,), which count (t,), dense activations (t, F)."""
    text, rows, n = TokenRows(lm, dataset, "val", ctx_len), [], 0
    while n < n_tokens:
        ids, valid, _ = text.take(1)
        if len(ids) == 0:
            break
        keep = kept_positions(lm, ids, valid, skip_first=skip_first)[valid]
        with torch.no_grad():
            rows.append((ids[valid], keep, sae.encode(lm.hidden(ids, valid, [HOOK])[HOOK][valid])))
        n += int(keep.sum())
    return rows


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
        assert (r.n_tokens, sum(r.histogram.counts)) == (n, len(on))
        assert r.density == pytest.approx(len(on) / n)
        assert r.max_activation == pytest.approx(float(own.max()), rel=1e-5)
        assert r.mean_active == pytest.approx(float(on.mean()) if len(on) else 0.0, rel=1e-5)
        peaks = torch.stack([torch.where(keep, f[:, r.latent], 0).max() for _, keep, f in rows])
        strongest = peaks[peaks > 0].sort(descending=True).values[:4]
        assert [c.values[c.peak] for c in r.strongest] == pytest.approx(strongest.tolist(), rel=1e-4)
        assert len({c.sequence for c in r.strongest}) == len(r.strongest)
        for c in r.strongest:
            ids, keep, f = rows[c.sequence]
            window = slice(max(0, c.position - 5), c.position + 6)
            assert keep[c.position]
            assert float(peaks[c.sequence]) == pytest.approx(c.values[c.peak], rel=1e-4)
            assert c.tokens == [lm.tokenizer.token_str(int(t)) for t in ids[window]]
            assert c.values == pytest.approx(f[window, r.latent].tolist(), rel=1e-4, abs=1e-4)
    assert all(records[i].contexts == [] and records[i].histogram.counts == [] for i in DEAD)
    assert any(t in lm.tokenizer.specials for r in records for c in r.contexts for t in c.tokens)
    json.dumps([r.to_dict() for r in records])


def test_histogram_bins_are_where_they_say(lm, documents):
    sae, dataset = some_sae(), open_dataset(str(documents))
    rows = rows_of_text(lm, sae, dataset, 700, 32)
    found = collect_features(lm, sae, HOOK, dataset, **SMALL)[:20]
    assert sum(bool(r.histogram.counts) for r in found) > 15
    for r in found:
        own = torch.cat([f[keep, r.latent] for _, keep, f in rows]).numpy()
        if r.histogram.counts:
            assert len(r.histogram.edges) == len(r.histogram.counts) + 1
            assert r.histogram.counts[0] > 0 < r.histogram.counts[-1]
            assert r.histogram.counts == np.histogram(own[own > 0], np.array(r.histogram.edges))[0].tolist()


def test_the_same_however_it_is_batched(lm, documents):
    sae, dataset = some_sae(), open_dataset(str(documents))
    one, again, three, many = (
        collect_features(lm, sae, HOOK, dataset, **SMALL, model_batch_size=size) for size in (16, 16, 3, 64)
    )
    assert one == again
    for other in (three, many):
        for a, b in zip(one, other, strict=True):
            assert (a.n_tokens, a.density) == (b.n_tokens, b.density)
            peaks, others = ([c.values[c.peak] for c in r.strongest] for r in (a, b))
            assert peaks == pytest.approx(others, rel=1e-5)
            for i, (c, d) in enumerate(zip(a.strongest, b.strongest, strict=True)):
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


@pytest.fixture(scope="module")
def dense(lm, documents):
    """The SAE, its records over a text that is sampled whole, and rows of that text as rows_of_text gives them."""
    sae, dataset = some_sae(), open_dataset(str(documents))
    return sae, collect_features(lm, sae, HOOK, dataset, **SMALL), rows_of_text(lm, sae, dataset, 700, 32)


def test_samples_by_interval(dense, lm):
    _, records, rows = dense
    seen = 0
    for r in records:
        own = torch.cat([f[keep, r.latent] for _, keep, f in rows])
        drawn = [c for c in r.contexts if c.low is not None]
        assert not {(c.sequence, c.position) for c in drawn} & {(c.sequence, c.position) for c in r.strongest}
        for c in drawn:
            ids, keep, f = rows[c.sequence]
            window = slice(max(0, c.position - 5), c.position + 6)
            value = float(f[c.position, r.latent])
            assert keep[c.position]
            assert c.low * 0.999 <= value <= c.high * 1.001
            assert c.tokens == [lm.tokenizer.token_str(int(t)) for t in ids[window]]
            assert c.values == pytest.approx(f[window, r.latent].tolist(), rel=1e-4, abs=1e-4)
            assert c.values[c.peak] == pytest.approx(value, rel=1e-4)
            n = int((own > 0).sum())
            inside = lambda slack, c=c, own=own: int(
                ((own >= c.low * (1 - slack)) & (own <= c.high * (1 + slack)) & (own > 0)).sum()
            )
            assert inside(-1e-3) - 0.1 <= c.share * n <= inside(1e-3) + 0.1  # the edges are rounded
        per = Counter(c.low for c in drawn)
        assert len(per) <= INTERVALS
        assert max(per.values(), default=0) <= PER_INTERVAL
        assert list(per) == sorted(per, reverse=True)
        seen += len(drawn)
    assert seen > 300


def test_shares_neighbours_and_positions(dense, lm):
    sae, records, rows = dense
    token = lm.tokenizer.token_str
    codes = torch.cat([f[keep] for _, keep, f in rows]) > 0
    starts = np.array(POSITIONS)
    assert sum(bool(r.histogram.counts) for r in records[:40]) > 30
    for r in records[:40]:
        if not r.histogram.counts:
            assert (r.typical, r.first, r.cofiring, r.positions) == ([], [], [], [])
            continue
        on, begins, parts, everywhere = Counter(), Counter(), Counter(), Counter()
        for ids, keep, f in rows:
            active = (f[:, r.latent] > 0) & keep
            for t in range(len(ids)):
                part = int(np.searchsorted(starts, t, side="right")) - 1
                everywhere[part] += int(keep[t])
                parts[part] += int(active[t])
                on[token(int(ids[t]))] += int(active[t])
                begins[token(int(ids[t]))] += int(active[t] and not (t and active[t - 1]))
        for shown, counts in ((r.typical, on), (r.first, begins)):
            n = sum(counts.values())
            assert [s for _, s in shown] == pytest.approx([c / n for _, c in counts.most_common(len(shown))], abs=1e-4)
            assert all(s == pytest.approx(counts[t] / n, abs=1e-4) for t, s in shown)
        n, N = sum(parts.values()), sum(everywhere.values())
        wanted = [(parts[i] / n) / (everywhere[i] / N) for i in sorted(everywhere) if everywhere[i]]
        assert r.positions == pytest.approx(wanted, rel=1e-3)
        # correlation of two indicators
        for other, value in r.cofiring:
            assert value == pytest.approx(float(np.corrcoef(codes[:, r.latent], codes[:, other])[0, 1]), abs=2e-3)
        cosines = torch.nn.functional.cosine_similarity(sae.W_dec, sae.W_dec[r.latent], dim=1)
        cosines[r.latent] = -2
        assert [i for i, _ in r.neighbours] == cosines.topk(8).indices.tolist()
        assert [c for _, c in r.neighbours] == pytest.approx(cosines.topk(8).values.tolist(), abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# pages as files


def visualizer(lm, documents, sae=None, **fields):
    config = VizConfig(**{"eval_tokens": 400, "ctx_len": 32, "top_k": 4, "context_tokens": 5, **fields})
    return FeatureVisualizer(sae or some_sae(), config, lm=lm, hookpoint=HOOK, dataset=open_dataset(str(documents)))


def latents(folder):
    return [r.latent for r in read_features(folder / "features.jsonl")]


def test_pages_are_added_and_refreshed(lm, documents, tmp_path):
    folder = tmp_path / "features"
    assert visualizer(lm, documents, all_features=True).save(folder) == folder / "index.html"
    before = {r.latent: r for r in read_features(folder / "features.jsonl")}
    assert list(before) == list(range(96))
    visualizer(lm, documents, feature=(7, 90), eval_tokens=800).save(folder)
    after = {r.latent: r for r in read_features(folder / "features.jsonl")}
    assert list(after) == list(range(96))
    assert [i for i in after if after[i].n_tokens != before[i].n_tokens] == [7, 90]
    assert all(after[i] == before[i] for i in after if i not in (7, 90))
    names = {p.name for p in (folder / "data").iterdir()}
    assert names == {"0.js", "1.js", "2.js", "index.js", "about.json"}
    chunk = json.loads((folder / "data" / "0.js").read_text().removeprefix("chunk(0,").removesuffix(")\n"))
    assert [r["latent"] for r in chunk] == list(range(32))
    assert chunk[7] == json.loads((folder / "features.jsonl").read_text().splitlines()[7])
    # of another SAE nothing stays
    other = some_sae()
    with torch.no_grad():
        other.b_dec.add_(1e-3)
    visualizer(lm, documents, other, feature=(5,)).save(folder)
    assert latents(folder) == [5]
    assert {p.name for p in (folder / "data").iterdir()} == {"0.js", "index.js", "about.json"}


def test_a_new_folder_takes_the_old_ones_place(lm, documents, tmp_path, monkeypatch):
    folder, viz = tmp_path / "features", visualizer(lm, documents, feature=(3, 7, 40))
    folder.mkdir()
    (folder / "feature_777.html").write_text("an older version's")
    read = lambda: {p.name: p.read_text() for p in folder.rglob("*") if p.is_file()}
    viz.save(folder)
    whole = read()
    assert whole.keys() == {"index.html", "features.jsonl", "0.js", "1.js", "index.js", "about.json"}
    # half written: the old pages stay
    monkeypatch.setattr("sae.pages.dashboard._write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        viz.save(folder)
    assert read() == whole
    monkeypatch.undo()
    # nor does a disk that fails at the very end take them away
    rename = type(folder).rename

    def fails(path, target):
        if ".new." in path.name:
            raise OSError(28, "disk full")
        return rename(path, target)

    monkeypatch.setattr(type(folder), "rename", fails)
    with pytest.raises(UserError, match="disk full"):
        viz.save(folder)
    assert read() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["features"]
    monkeypatch.undo()
    # somebody else's folder is left alone
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        viz.save(folder)
    assert (folder / "thesis.tex").exists()


def test_one_html_text_for_a_notebook(lm, documents):
    viz = visualizer(lm, documents, feature=(3, 7))
    assert viz.html(7).count("<script") == 2
    assert 'src="data' not in viz.html(7)
    assert viz._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(UserError, match="no page"):
        viz.html(96)


# ----------------------------------------------------------------------------------------------------------------------
# the script


@pytest.fixture
def run_folder(tmp_path, gpt_path, documents):
    """What sae_train leaves behind, as far as sae_viz reads it."""
    metadata = {"model_name": gpt_path, "dataset_path": str(documents), "context_size": 32, "hookpoint": HOOK}
    store.save_sae(some_sae(), tmp_path / "layer_1", **metadata)
    return tmp_path / "layer_1"


def call(*flags):
    log.run_script(sae_viz.main, ["--device", "cpu", "--eval_tokens", "300", *map(str, flags)])


def test_the_script_chooses_features(run_folder, tmp_path, capsys, monkeypatch):
    pages = lambda: latents(run_folder / "features")
    call("--sae_path", run_folder)
    live = pages()
    assert 10 < len(live) <= 94
    assert not set(DEAD) & set(live)
    said = capsys.readouterr().out
    assert str(run_folder / "features" / "index.html") in said
    assert "live features have precision and recall >= 0.5" in said
    assert {p.name for p in (run_folder / "plots").iterdir()} == {"density.png", "l0.png"}
    call("--sae_path", run_folder, "--all_features")
    assert pages() == list(range(96))
    call("--sae_path", run_folder, "--feature", 40, 9, "--train_text", "--eval_tokens", 600)
    assert pages() == list(range(96))  # two of them anew
    records = list(read_features(run_folder / "features" / "features.jsonl"))
    assert [r.latent for r in records if r.n_tokens >= 600] == [9, 40]
    assert records[40].contexts == []
    monkeypatch.setattr("sae.feature_viz.MAX_PAGES", 5)
    call("--sae_path", run_folder, "--output_dir", tmp_path / "elsewhere", "--no-labels")
    assert latents(tmp_path / "elsewhere" / "features") == live[:5]
    assert all(r.label == "" for r in read_features(tmp_path / "elsewhere" / "features" / "features.jsonl"))


def test_a_feature_out_of_range_exits_with_2(run_folder, capsys):
    with pytest.raises(SystemExit) as e:
        call("--sae_path", run_folder, "--feature", 12, 96)
    assert e.value.code == 2
    assert "feature 96 was asked for; this SAE has 0 to 95" in capsys.readouterr().err
    assert not (run_folder / "features").exists()


# ----------------------------------------------------------------------------------------------------------------------
# plots


def apart(record):
    """A record without what was rounded from activations, and that: where rows lie in memory decides their last bit."""
    numbers, rest = [], {"max_activation": 0, "mean_active": 0}
    for name in ("typical", "first"):
        numbers += [share for _, share in getattr(record, name)]
        rest[name] = [token for token, _ in getattr(record, name)]
    for c in record.contexts:
        numbers += [*c.values, *(() if c.low is None else (c.low, c.high))]
    rest["contexts"] = [replace(c, values=[], low=c.low is None, high=c.high is None) for c in record.contexts]
    return replace(record, **rest), numbers


def test_two_processes_find_what_one_does(run_folder, tmp_path):
    """Real processes over gloo; sums differ in their last bits only."""
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    free.close()
    flags = ["--sae_path", run_folder, "--eval_tokens", 700, "--all_features", "--model_batch_size", 3]
    command = [sys.executable, "-m", "scripts.sae_viz", *map(str, flags), "--output_dir", str(tmp_path / "two")]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in (0, 1)
    ]
    log.run_script(sae_viz.main, [*map(str, flags), "--output_dir", str(tmp_path / "one")])
    errors = [p.communicate(timeout=120)[1].decode() for p in started]
    assert [p.returncode for p in started] == [0, 0], errors
    one, two = (list(read_features(tmp_path / n / "features" / "features.jsonl")) for n in ("one", "two"))
    assert [r.latent for r in two] == list(range(96))
    for a, b in zip(one, two, strict=True):
        (rest, numbers), (same, near) = apart(a), apart(b)
        assert rest == same
        assert numbers == pytest.approx(near, abs=1.5e-5)  # rounded to five digits
        assert (a.max_activation, a.mean_active) == pytest.approx((b.max_activation, b.mean_active))
