"""Names become documents: files, folders and HuggingFace datasets, the right column; bad data in one sentence.

Run: python -m pytest tests/data/test_datasets.py
"""

import gzip
import json
import sys

import datasets as hf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae import log
from sae.config import UserError
from sae.data import datasets
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.files import beside

hf.disable_progress_bars()
CHAT = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
SHAREGPT = [{"from": "human", "value": "alpha"}, {"from": "gpt", "value": "beta"}]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(log, "_said", set())


def documents(dataset, split="train"):
    return [d.tolist() if isinstance(d, np.ndarray) else d for d in dataset.documents(split)]


def write(path, records):
    """Records to a file whose name says how."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=10)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        lines = "".join(json.dumps(r) + "\n" for r in records)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet", "d.ndjson", "d.jsonl.gz", "lines.json.gz"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name):
    texts = [f"text {i}" for i in range(50)]
    records = [{"id": i, "url": "x" * 99, "text": text} for i, text in enumerate(texts)]
    dataset = open_dataset(write(tmp_path / name, records))
    assert documents(dataset) == documents(dataset) == texts  # from the first on, every time
    assert not dataset.has_split
    chats = open_dataset(write(tmp_path / f"chats_{name}", [{"id": "a", "messages": CHAT}] * 30))
    assert documents(chats) == [CHAT] * 30
    assert len({dataset.fingerprint(), chats.fingerprint(), dataset.fingerprint()}) == 2


def test_a_json_file_of_lines_and_texts_that_are_records(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.json").write_text('["three", {"text": "four"}]')
    (tmp_path / "c.jsonl").write_text(f'"five"\n{json.dumps(CHAT)}\n')  # nanochat's chats are lines that are lists
    assert documents(open_dataset(str(tmp_path))) == ["one", "two", "three", "four", "five", CHAT]


def test_a_folder_mixes_kinds(tmp_path):
    write(tmp_path / "a.parquet", [{"content": "one"}])
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl.gz", [{"text": "two"}])
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "sub" / "c.bin")
    (tmp_path / "z.txt").write_text("three")
    (tmp_path / ".hidden").write_text("no")
    assert documents(open_dataset(str(tmp_path))) == ["one", "two", [0, 1, 2, 3, 4], "three"]


def test_parquet_is_read_in_batches_and_one_column(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(2000)]
    table = pa.table({"image": [b"x" * 100] * 2000, "n": range(2000), "text": texts})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=500)
    read, asked = pq.ParquetFile.iter_batches, []
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: (asked.append(k), read(*a, **k))[1])
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("read whole"))
    assert documents(open_dataset(str(tmp_path))) == texts
    assert [k["columns"] for k in asked] == [["text"], ["text"]]  # bytes and numbers are no candidates


def test_long_files_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "PIECE", 100)
    text = "".join(f"line number {i}\n" for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    pieces = documents(open_dataset(str(tmp_path / "a.txt")))
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(p.endswith("\n") for p in pieces)
    (tmp_path / "a.txt").write_text("x" * 1000)  # one line
    assert max(map(len, documents(open_dataset(str(tmp_path / "a.txt"))))) == 200


def test_nanogpt_folder_has_its_own_split(lm, tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(200, 250, dtype=np.uint16).tofile(tmp_path / "val.bin")
    dataset = open_dataset(str(tmp_path))
    assert dataset.has_split
    assert TokenRows(lm, dataset, "train", 10).take(100)[0].flatten().tolist() == list(range(100))
    assert TokenRows(lm, dataset, "val", 10).take(100)[0].flatten().tolist() == list(range(200, 250))
    single = open_dataset(str(tmp_path / "train.bin"))
    assert not single.has_split
    assert single.fingerprint() != dataset.fingerprint()


def test_the_embedded_corpus(lm):
    dataset = open_dataset()
    assert dataset.has_split
    assert next(dataset.documents("train")) != next(dataset.documents("val"))
    ids, valid, _ = TokenRows(lm, dataset, "val", 32).take(20)
    assert ids.shape == (20, 32)
    assert valid.all()
    assert dataset.name == "embedded"
    assert len(dataset.fingerprint()) == 64
    assert beside("assets/pygpt/corpus.py").documents is dataset.documents


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("records", "column"),
    [
        ([{"id": "a", "title": "b", "text": "c"}], "text"),
        ([{"id": "a", "content": "b"}], "content"),
        ([{"prompt": "a long question, asked at length", "messages": CHAT}], "messages"),
        ([{"system": "be kind", "conversations": SHAREGPT}], "conversations"),
        ([{"id": "abc", "abstract": "many words", "year": 1999}], "abstract"),  # unknown: the longest, not the first
        ([{"n": 5, "talk": CHAT}], "talk"),
        ([{"text": 5, "body": "x"}], "body"),  # the name says one thing, the values another
        ([{"text": None, "title": "t"}, {"text": "late", "title": "t"}], "text"),
        ([{"input_ids": [1, 2], "text": "a"}], "input_ids"),
        ([{"labels": [1, 2], "answer": "a"}], "answer"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_column_is_found_and_said_once(tmp_path, capsys, records, column, kind):
    dataset = open_dataset(write(tmp_path / f"d.{kind}", records))
    first = documents(dataset)
    assert documents(dataset) == first
    value = next(r[column] for r in records if r[column])
    assert first[0] == (CHAT if isinstance(value, list) and isinstance(value[0], dict) else value)
    said = capsys.readouterr().out
    assert said.count(f"reading column '{column}'") == 1
    assert f"(it has: {', '.join(records[0])}); --text_column chooses another" in said


def test_a_column_can_be_chosen(tmp_path, capsys):
    records = [{"text": "a", "other": "b"}] * 3
    for kind in ("jsonl", "json", "parquet"):
        name = write(tmp_path / f"d.{kind}", records)
        dataset = open_dataset(name, text_column="other")
        assert (documents(dataset), dataset.text_column) == (["b"] * 3, "other")
        with pytest.raises(UserError, match=r"no column 'txet' \(it has: text, other\); see --text_column"):
            documents(open_dataset(name, text_column="txet"))
    assert capsys.readouterr().out == ""


def test_empty_texts_and_chats_are_no_documents(tmp_path):
    values = ["", "  \n", None, "a", [], CHAT]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": v}) + "\n" for v in values))
    assert documents(open_dataset(str(tmp_path / "d.jsonl"), text_column="text")) == ["a", CHAT]


def test_chats_in_other_clothes():
    assert datasets._chat(SHAREGPT) == CHAT
    assert datasets._chat({"role": ["user", "assistant"], "content": ["alpha", "beta"]}) == CHAT  # as tables keep them
    parts = [{"type": "text", "text": "al"}, {"type": "image"}, {"type": "text", "text": "pha"}]
    assert datasets._chat([{"role": "user", "content": parts}, CHAT[1]]) == CHAT
    calls = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "x"}]
    assert datasets._chat(calls) == [{"role": "assistant", "content": ""}, {"role": "tool", "content": "x"}]
    for no_chat in ("x", [1], [["a"]], [{"a": 1}], [{"role": "user", "content": 5}], {"a": "b"}, 5):
        assert datasets._chat(no_chat) is None


def test_tokens_behind_the_attention_mask_are_none(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}] * 3
    for kind in ("jsonl", "parquet"):
        assert documents(open_dataset(write(tmp_path / f"d.{kind}", rows))) == [[5, 6, 7]] * 3
    hf.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert documents(open_dataset(str(tmp_path / "saved"))) == [[5, 6, 7]] * 3


# ------------------------------------------------------------------------------------------------ HuggingFace


def table(what, n=30):
    return hf.Dataset.from_dict({"id": list(range(n)), "text": [f"{what} {i}" for i in range(n)]})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder laid out as on the hub: two configurations, of which the first has a test split."""
    folder = tmp_path_factory.mktemp("hub") / "repo"
    folder.mkdir()
    files = {"small": ("train", "test"), "large": ("train",)}
    lines = ["---", "configs:"]
    for config, splits in files.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            table(f"{config} {split}").to_parquet(folder / f"{config}_{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {config}_{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "A dataset."]))
    return folder


@pytest.fixture
def online(hub, monkeypatch):
    """The hub knows that folder as some/repo."""
    load, names = hf.load_dataset, hf.get_dataset_config_names
    where = {"some/repo": str(hub)}
    monkeypatch.setattr(hf, "load_dataset", lambda path, *a, **k: load(where.get(path, path), *a, **k))
    monkeypatch.setattr(hf, "get_dataset_config_names", lambda path: names(where.get(path, path)))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub(online, capsys, streaming):
    dataset = open_dataset("some/repo:small", streaming=streaming)
    assert dataset.has_split
    for _ in range(2):
        assert documents(dataset) == [f"small train {i}" for i in range(30)]
        assert documents(dataset, "val") == [f"small test {i}" for i in range(30)]
    assert capsys.readouterr().out.count("reading column 'text' of 'some/repo:small'") == 1
    large = open_dataset("some/repo:large", streaming=streaming)
    assert not large.has_split
    assert documents(large)[0] == "large train 0"
    prints = [d.fingerprint() for d in (dataset, open_dataset("some/repo:small", streaming=streaming), large)]
    assert prints[0] == prints[1] != prints[2]
    assert (dataset.name, dataset.split, dataset.streaming) == ("some/repo:small", "train", streaming)


def test_the_first_configuration_is_taken_and_named(online, capsys):
    dataset = open_dataset("some/repo")
    assert dataset.name == "some/repo:small"  # what a run records finds the same again
    assert "has configurations (small, large); reading the first" in capsys.readouterr().out
    assert documents(dataset)[0] == "small train 0"


def test_splits(online):
    test = open_dataset("some/repo:small", split="test")
    assert documents(test)[0] == "small test 0"
    assert not test.has_split  # train is no validation
    part = open_dataset("some/repo:small", split="train[:10%]")
    assert documents(part) == [f"small train {i}" for i in range(3)]
    assert documents(part, "val")[0] == "small test 0"
    assert part.fingerprint() != open_dataset("some/repo:small").fingerprint()
    for options in ({"split": "trian"}, {"split": "trian", "streaming": True}):
        with pytest.raises(UserError, match=r"no split 'trian' \(it has: train, test\); choose one with --split"):
            open_dataset("some/repo:small", **options)


@pytest.mark.parametrize(
    ("have", "split", "val"),
    [
        (["train", "test", "validation"], "train", "validation"),
        (["train_sft", "test_sft", "test_gen"], "train_sft", "test_sft"),
        (["train", "dev"], "train", "dev"),
        (["validation", "test"], "validation", "test"),
        (["train", "unsupervised"], "train", None),
        (["test", "train"], "test", None),
    ],
)
def test_which_split_validates(have, split, val):
    splits = {name: table(name, 3) for name in have}
    dataset = datasets._from_splits("d", splits, None, split, False, lambda used: str(len(used)))
    assert dataset.has_split == (val is not None)
    assert documents(dataset, "val")[0] == f"{val or split} 0"


def test_saved_to_disk(lm, tmp_path):
    chats = hf.Dataset.from_dict({"id": ["a"] * 3, "messages": [CHAT] * 3})
    hf.DatasetDict({"train": table("train"), "validation": table("held", 5)}).save_to_disk(tmp_path / "two")
    chats.with_format("numpy").save_to_disk(tmp_path / "one")
    two, one = open_dataset(str(tmp_path / "two")), open_dataset(str(tmp_path / "one"))
    assert two.has_split
    assert documents(two, "val") == [f"held {i}" for i in range(5)]
    assert documents(one) == [CHAT] * 3
    assert not one.has_split
    assert two.fingerprint() == open_dataset(str(tmp_path / "two")).fingerprint() != one.fingerprint()
    # its own split is used whole: nothing of the training text is held out, and nothing held out is trained on
    read = lambda split: lm.tokenizer.decode(TokenRows(lm, two, split, 16).take(999)[0].flatten().tolist())
    assert all(f"train {i}" in read("train") for i in range(30))
    assert "held" not in read("train")
    assert "train" not in read("val")
    with pytest.raises(UserError, match="has no split 'test'"):
        open_dataset(str(tmp_path / "two"), split="test")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot read the dataset saved in .*; save it again"):
        documents(open_dataset(str(tmp_path / "one")))


def test_pictures_beside_the_text_need_no_decoder(tmp_path):
    features = hf.Features({"image": hf.Image(), "text": hf.Value("string")})
    data = hf.Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}], "text": ["a"]}, features=features)
    data.save_to_disk(tmp_path / "d")
    assert documents(open_dataset(str(tmp_path / "d"))) == ["a"]


def test_a_local_path_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "a.txt").write_text("mine")
    assert documents(open_dataset("imdb")) == ["mine"]
    (tmp_path / "texts").mkdir()
    for name, why in (("texts/mine", "no such thing in 'texts'"), ("data/shakespeare_char", "no folder 'data'")):
        with pytest.raises(UserError, match=f"'{name}' does not exist, there is {why}"):
            open_dataset(name)


def test_no_code_of_a_dataset_is_run(monkeypatch):
    asked = []
    monkeypatch.setattr(hf, "load_dataset", lambda *_, **k: (asked.append(k), {"train": table("x")})[1])
    open_dataset("some/name")
    assert asked == [{"streaming": False}]
    assert hf.config.HF_DATASETS_TRUST_REMOTE_CODE is False  # where versions before 4 look


# ------------------------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"\xff\xfe\xfd", "is not utf-8 text"),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "x.jsonl:2 is not json"),
        ("x.json", b'[{"text": "a"},', "x.json' is not json"),
        ("x.json", b'{\n"text": "a"}', "x.json:1 is not json"),
        ("x.jsonl", b'{"n": 1, "m": [1]}\n', "has no column of texts or chats alone (it has: n, m); see --text_column"),
        ("x.jsonl", b"[1]\n", "record 1 holds neither a text, a chat nor token ids"),
        ("x.jsonl", b"5\n", "record 1 holds neither"),
        (
            "x.jsonl",
            b'{"text": "a"}\n' * 25 + b'{"text": 5}\n',
            "record 26 holds neither a text, a chat nor token ids in",
        ),
        ("x.parquet", b"PAR1 no", "as parquet"),
        ("x.txt.gz", b"no gzip", "cannot read"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:20], "cannot read"),
    ],
)
def test_bad_data_is_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as e:
        documents(open_dataset(str(tmp_path / name)))
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_missing_and_empty(lm, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (str(tmp_path / "none"), "nowhere.txt", "a/b/c", "", "../x", "x" * 5000 + ".txt", "C:\\x"):
        with pytest.raises(UserError, match="does not exist; give a file, a folder, or a HuggingFace dataset"):
            open_dataset(name)
    with pytest.raises(UserError, match="holds no files"):
        open_dataset(str(tmp_path))
    (tmp_path / "x.bin").touch()
    for name in (str(tmp_path), str(tmp_path / "x.bin")):
        with pytest.raises(UserError, match="is empty; give a text that is not"):
            open_dataset(name)
    (tmp_path / "x.bin").write_bytes(b"\1\0")
    assert len(TokenRows(lm, open_dataset(str(tmp_path / "x.bin")), "train", 8).take(3)[0]) == 0
    for name in (None, str(tmp_path), str(tmp_path / "x.bin")):
        with pytest.raises(UserError, match="has no split 'test'; leave --split out"):
            open_dataset(name, split="test")
        with pytest.raises(UserError, match="has no columns to read; leave --text_column out"):
            open_dataset(name, text_column="text")
        with pytest.raises(UserError, match="lies on this machine and is read as it is needed; leave --streaming out"):
            open_dataset(name, streaming=True)
    (tmp_path / "x.jsonl").write_text('{"a": "b"}')
    assert documents(open_dataset(str(tmp_path / "x.jsonl"), text_column="a")) == ["b"]


def test_names_the_hub_does_not_know(online):
    for name in ("no/such", "nowhere", "some/repo:tiny"):
        with pytest.raises(UserError, match=f"cannot load '{name}' from the HuggingFace hub") as e:
            open_dataset(name)
        assert len(str(e.value).splitlines()) == 1
        assert "it is no file or folder here" in str(e.value)


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    table("a").save_to_disk(tmp_path / "saved")
    write(tmp_path / "d.parquet", [{"text": "a"}])
    for package in ("datasets", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("some/name", str(tmp_path / "saved"), str(tmp_path / "d.parquet")):
        with pytest.raises(UserError, match=r"pip install 'nanosae\[hf\]'"):
            documents(open_dataset(name))


def test_a_stream_that_breaks_is_one_sentence():
    def broken():
        yield {"text": "a"}
        raise ConnectionError("gone\nfor good")

    data = hf.IterableDataset.from_generator(broken)  # one that does not say what columns it has
    dataset = datasets._from_splits("d", {"train": data}, None, "train", True, str)
    reader = dataset.documents("train")
    with pytest.raises(UserError, match=r"cannot read on in 'd' \(.*\); --resume goes on from a checkpoint"):
        list(reader)
