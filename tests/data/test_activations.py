"""The stream gives each token once, mixed, resumable to the bit, special tokens left out; a cache is right or refused.

Run: python -m pytest tests/data/test_activations.py
"""

import json
import shutil

import pytest
import torch

from sae.config import UserError
from sae.data import cache
from sae.data.activations import ModelSource, Stream, TensorSource, gather
from sae.data.cache import CacheSource, read_manifest, refuse_stale, write_cache
from sae.data.collector import ActivationCollector
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows, kept_positions
from tests.conftest import HOOK


def model_source(lm, text_file, hookpoints=(HOOK,), **kwargs):
    return ModelSource(TokenRows(lm, open_dataset(str(text_file)), "train", 32, **kwargs), list(hookpoints))


def numbered(n, d=3):
    """Rows that say which they are."""
    return {"": torch.arange(n, dtype=torch.float32)[:, None].repeat(1, d)}


def rows_of(stream):
    return [int(v) for batch in stream for v in batch[""][:, 0]]


def test_every_token_once_and_mixed():
    stream = Stream(TensorSource(numbered(1000)), n_tokens=1000, batch_size=100, buffer_tokens=400)
    got = rows_of(stream)
    assert sorted(got) == list(range(1000))
    assert got != sorted(got)


def test_an_odd_end_is_left_out_and_epochs_repeat():
    stream = Stream(TensorSource(numbered(250)), n_tokens=620, batch_size=100, buffer_tokens=200)
    got = rows_of(stream)
    assert len(got) == 600
    assert stream.n_passes == 2
    assert all(2 <= got.count(i) <= 3 for i in range(250))


def test_mixing_across_sequences(lm, text_file):
    """Neighbours in the text end up in different batches: the buffer holds many sequences."""
    source = model_source(lm, text_file)
    order = {tuple(r.tolist()): i for i, r in enumerate(gather(source, 2000, "t")[HOOK][:, :3])}
    source.rewind()
    stream = Stream(source, n_tokens=1500, batch_size=50, buffer_tokens=500)
    spreads = []
    for batch in stream:
        at = sorted(order[tuple(r.tolist())] for r in batch[HOOK][:, :3])
        spreads.append(at[-1] - at[0])
    assert min(spreads) > 200


def test_resume_is_bit_exact(lm, text_file):
    make = lambda: Stream(model_source(lm, text_file), n_tokens=3000, batch_size=64, buffer_tokens=512, seed=3)
    whole = make()
    want = [batch[HOOK].clone() for batch in whole]
    first = make()
    for _ in range(13):
        next(first)
    second = make()
    second.load_state_dict(first.state_dict(), [first.held_dict()])
    got = [batch[HOOK].clone() for batch in second]
    assert len(got) == len(want) - 13
    assert all(torch.equal(a, b) for a, b in zip(got, want[13:], strict=True))


def test_sample_draws_nothing(lm, text_file):
    make = lambda: Stream(model_source(lm, text_file), n_tokens=600, batch_size=64, buffer_tokens=256)
    a, b = make(), make()
    assert a.sample()[HOOK].shape == (256, 32)
    assert torch.equal(next(a)[HOOK], next(b)[HOOK])


def test_special_tokens_and_the_first_position_are_left_out(lm, text_file):
    rows = TokenRows(lm, open_dataset(str(text_file)), "train", 32)
    ids, valid, _ = rows.take(16)
    keep = kept_positions(lm, ids, valid)
    acts = lm.hidden(ids, valid, [HOOK])[HOOK]
    got = gather(model_source(lm, text_file), int(keep.sum()), "t")[HOOK]
    torch.testing.assert_close(got, acts[keep])
    skipped = gather(model_source(lm, text_file, skip_first=True), 16 * 31, "t")[HOOK]
    torch.testing.assert_close(skipped[:31], acts[0, 1:])


def test_several_hookpoints_share_one_forward(lm, text_file, monkeypatch):
    calls = []
    forward = lm.forward_fn
    monkeypatch.setattr(lm, "forward_fn", lambda *a: (calls.append(1), forward(*a))[1])
    names = ["transformer.h.0", HOOK, "transformer.h.1.mlp.c_proj@in"]
    source = model_source(lm, text_file, names)
    assert source.widths == {names[0]: 32, names[1]: 32, names[2]: 128}
    calls.clear()
    stream = Stream(source, n_tokens=256, batch_size=64, buffer_tokens=128)
    batches = list(stream)
    assert [batches[0][n].shape[1] for n in names] == [32, 32, 128]
    assert len(calls) == 1  # 16 sequences of 32 tokens hold all 256


def test_nan_and_empty_are_refused(lm, text_file, tmp_path):
    bad = torch.zeros(100, 3)
    bad[50, 1] = torch.inf
    with pytest.raises(UserError, match="NaN or infinity"):
        from sae.metrics import check_finite

        check_finite({"x": bad})
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="is empty"):
        next(Stream(model_source(lm, tmp_path / "empty.txt"), n_tokens=64, batch_size=8, buffer_tokens=16))
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(UserError, match="gave [01] tokens for validation"):
        gather(model_source(lm, tmp_path / "one.txt"), 10, "validation")
    with pytest.raises(UserError, match="do not fill one batch"):
        Stream(TensorSource(numbered(5)), n_tokens=5, batch_size=8, buffer_tokens=16)


# -------------------------------------------------------------------------------------- the cache


@pytest.fixture
def collected(lm, text_file, tmp_path):
    dataset = open_dataset(str(text_file))
    made_from = TokenRows(lm, dataset, "train", 32).provenance()
    names = ["transformer.h.0", HOOK]
    manifest = write_cache(tmp_path / "cache", model_source(lm, text_file, names), n_tokens=3000, shard_tokens=1100)
    return tmp_path / "cache", manifest, made_from


def test_cache_holds_what_the_model_gave(lm, text_file, collected):
    folder, manifest, _ = collected
    assert manifest["shards"] == [1100, 1100, 800]
    want = gather(model_source(lm, text_file), 3000, "t")[HOOK]
    got = gather(CacheSource(folder, hookpoints=[HOOK], val_split=0.0), 3000, "t")[HOOK]
    assert torch.equal(got, want)
    assert set(CacheSource(folder).widths) == {"transformer.h.0", HOOK}


def test_validation_is_split_off_by_sequence(collected):
    folder, _, _ = collected
    train = CacheSource(folder, val_split=0.1)
    val = train.held_out()
    assert len(train) + len(val) == 3000
    assert 0.05 < len(val) / 3000 < 0.15
    numbers = train._numbers(0, 3000)
    assert numbers[len(train) - 1] < numbers[len(train)]  # no sequence is on both sides
    assert torch.equal(numbers, numbers.sort().values)


def test_cache_streams_and_resumes(collected):
    folder, _, _ = collected
    make = lambda: Stream(CacheSource(folder), n_tokens=4000, batch_size=100, buffer_tokens=400)
    want = [b[HOOK].clone() for b in make()]
    stream = make()
    for _ in range(30):
        next(stream)
    other = make()
    other.load_state_dict(stream.state_dict(), [stream.held_dict()])
    assert torch.equal(next(other)[HOOK], want[30])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_caches(lm, text_file, tmp_path, dtype):
    want = gather(model_source(lm, text_file), 400, "t")[HOOK]
    write_cache(tmp_path / "c", model_source(lm, text_file), n_tokens=500, dtype=dtype)
    got = gather(CacheSource(tmp_path / "c", val_split=0.0), 400, "t")[HOOK]
    assert torch.equal(got, want.to(cache.DTYPES[dtype]).float())


def test_a_stale_or_foreign_cache_is_refused(lm, text_file, collected, tmp_path):
    folder, manifest, made_from = collected
    refuse_stale(manifest, made_from, folder)
    for key in ("model_hash", "tokenizer_hash", "dataset_hash", "ctx_len", "skip_first"):
        with pytest.raises(UserError, match=f"stale or foreign: its {key}"):
            refuse_stale(manifest, {**made_from, key: "other"}, folder)
    with pytest.raises(UserError, match="model_dtype is float32, yours is bfloat16.*NANOCHAT_DTYPE=float32"):
        refuse_stale(manifest, {**made_from, "model_dtype": "bfloat16", "model_hash": "other"}, folder)  # which follows
    changed = tmp_path / "other.txt"
    changed.write_text(text_file.read_text() + "x")
    assert open_dataset(str(changed)).fingerprint() != made_from["dataset_hash"]
    with pytest.raises(UserError, match="exists"):
        write_cache(folder, model_source(lm, text_file), n_tokens=10)
    with pytest.raises(UserError, match="collect that hookpoint first"):
        CacheSource(folder, hookpoints=["transformer.h.2"])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is not a cache"),
        (lambda f: (f / "manifest.json").write_text("{}"), "another version"),
        (lambda f: (f / "manifest.json").write_text("{"), "not valid json"),
        (lambda f: (f / "manifest.json").write_text(json.dumps({"version": cache.CACHE_VERSION})), "damaged"),
        (lambda f: (f / "00001_00.bin").unlink(), "has 0 bytes and should have 140800"),
        (lambda f: (f / "00002_seq.bin").write_bytes(b"12345"), "has 5 bytes"),
    ],
)
def test_a_torn_cache_is_refused(collected, tmp_path, break_it, words):
    folder = tmp_path / "torn"
    shutil.copytree(collected[0], folder)
    break_it(folder)
    with pytest.raises(UserError) as e:
        read_manifest(folder)
    assert words in str(e.value)


def test_nothing_is_left_of_a_cache_that_failed(lm, text_file, tmp_path, monkeypatch):
    source = model_source(lm, text_file)
    monkeypatch.setattr(source, "read_numbered", lambda: (_ for _ in ()).throw(UserError("boom")))
    with pytest.raises(UserError, match="boom"):
        write_cache(tmp_path / "c", source, n_tokens=10)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- by hand


def test_activation_collector(lm, tmp_path):
    ids = torch.randint(0, 300, (2, 10))
    names = ["blocks.0.hook_resid_post", HOOK]
    with ActivationCollector(lm.module, names, max_activations=35, save_path=tmp_path) as collector:
        lm.module(ids)
        lm.module(ids)
        assert collector.counts == dict.fromkeys(names, 35)  # 40 tokens went through, 35 are kept
    lm.module(ids)
    assert collector.get_activations(HOOK).shape == (35, 32)
    valid = torch.ones_like(ids, dtype=torch.bool)
    want = lm.hidden(ids, valid, [HOOK])[HOOK].flatten(0, 1)
    torch.testing.assert_close(collector.get_activations(HOOK)[:20], want)
    back = ActivationCollector.load_activations(tmp_path)
    assert set(back) == set(names)  # the nanochat document's names did not survive their file names
    assert torch.equal(back[HOOK], collector.get_activations()[HOOK])
    collector.clear()
    assert collector.counts[HOOK] == 0
    assert json.dumps(collector.counts)


def test_data_much_shorter_than_the_buffer_is_repeated():
    stream = Stream(TensorSource(numbered(30)), n_tokens=400, batch_size=10, buffer_tokens=200)
    got = rows_of(stream)
    assert len(got) == 400
    assert all(13 <= got.count(i) <= 14 for i in range(30))


def test_collecting_never_deletes_what_is_no_cache(lm, text_file, tmp_path):
    precious = tmp_path / "precious"
    (precious / "sub").mkdir(parents=True)
    (precious / "sub" / "thesis.tex").write_text("x")
    (tmp_path / "c.tmp").mkdir()
    for folder in (precious, precious / "sub" / "thesis.tex"):
        with pytest.raises(UserError, match="which no cache does"):
            write_cache(folder, model_source(lm, text_file), n_tokens=10, overwrite=True)
    write_cache(tmp_path / "c", model_source(lm, text_file), n_tokens=10)
    assert (precious / "sub" / "thesis.tex").read_text() == "x"
    assert (tmp_path / "c.tmp").is_dir()


def test_a_manifest_leads_nowhere_else(collected, tmp_path):
    folder = tmp_path / "evil"
    shutil.copytree(collected[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("../../escaped", "/etc/x", "a/../b", "..", ""):
        changed = {**manifest, "hookpoints": {name: manifest["hookpoints"][HOOK]}}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="damaged"):
            read_manifest(folder)
    for change in ({"n_tokens": 5}, {"hookpoints": []}, {"shards": [3000, None]}):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match="damaged"):
            read_manifest(folder)


@pytest.mark.parametrize("hookpoint", ["transformer.wpe", "transformer.wte@in"])
def test_hookpoints_without_one_vector_a_token_are_refused(lm, text_file, hookpoint):
    with pytest.raises(UserError, match="not one vector a token"):
        model_source(lm, text_file, [hookpoint])


@pytest.mark.parametrize(("uses", "batch"), [(2, 100), (3, 64), (3, 7)])
def test_each_token_is_given_as_often_as_asked(uses, batch):
    stream = Stream(TensorSource(numbered(1000)), n_tokens=1000, uses=uses, batch_size=batch, buffer_tokens=300)
    got = rows_of(stream)
    assert len(got) == 1000 * uses // batch * batch
    counts = [got.count(i) for i in range(1000)]
    assert max(counts) == uses
    assert sum(c < uses for c in counts) <= batch  # only what the last, unfilled batch would have held
    assert stream.n_passes == 0  # the source was read once
