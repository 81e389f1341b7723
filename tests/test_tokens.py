"""Datasets become token rows: packed or wrapped, split without overlap, resumable at any row; bad data in one sentence.

Run: python -m pytest tests/test_tokens.py
"""

import json

import numpy as np
import pytest
import torch

from sae import tokens
from sae.config import UserError
from sae.language_model import load_language_model
from sae.tokens import HOLD_OUT, TokenRows, kept_positions, open_dataset
from tests.conftest import make_text


def all_rows(rows, n=7):
    out = []
    while len(batch := rows.take(n)[0]):
        out += batch.tolist()
    return out


def test_packing_loses_nothing_and_keeps_documents_apart(lm, tmp_path):
    docs = [make_text(n, seed=n) for n in (40, 3, 200)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in docs) + "\n\n")
    dataset = open_dataset(str(tmp_path / "d.jsonl"))
    rows = {split: TokenRows(lm, dataset, split, 16) for split in ("train", "val")}
    taken = {split: [r[v].tolist() for r, v in zip(*rows[split].take(10_000), strict=True)] for split in rows}
    n = len(taken["train"]) + len(taken["val"])
    assert len(taken["val"]) == n // HOLD_OUT
    # every 20th row is held out; together they are the whole text in order
    train, val = iter(taken["train"]), iter(taken["val"])
    whole = [t for i in range(n) for t in next(val if i % HOLD_OUT == HOLD_OUT - 1 else train)]
    bos = lm.tokenizer.bos_id
    assert whole == [t for d in docs for t in [bos, *lm.tokenizer.encode(d)]]
    assert whole.count(bos) == 3


def test_resume_at_any_row(lm, text_file):
    dataset = open_dataset(str(text_file))
    want = all_rows(TokenRows(lm, dataset, "train", 16))
    reader = TokenRows(lm, dataset, "train", 16)
    head = reader.take(13)[0].tolist()
    state = json.loads(json.dumps(reader.state_dict()))  # plain data
    other = TokenRows(lm, dataset, "train", 16)
    other.load_state_dict(state)
    assert head + all_rows(other) == want
    other.rewind()
    assert all_rows(other, 3) == want


def test_an_encoder_gets_wrapped_pieces(minilm_path, tmp_path):
    lm = load_language_model(minilm_path, device="cpu")
    (tmp_path / "a.txt").write_text("one two three four five six seven")
    (tmp_path / "b.txt").write_text("eight")
    ids, valid = TokenRows(lm, open_dataset(str(tmp_path)), "train", 6).take(10)
    assert ids[0, 0] == 101
    assert ids[0, 5] == 102
    assert [int(v.sum()) for v in valid] == [6, 5, 3]  # 4 + 3 words, then the other document by itself
    assert not (ids[~valid] != lm.pad_id).any()
    keep = kept_positions(lm, ids, valid)
    assert int(keep.sum()) == 8  # no [CLS], [SEP] or padding


def test_kept_positions(lm):
    bos = lm.tokenizer.bos_id
    ids = torch.tensor([[bos, 5, 6, bos, 7]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert kept_positions(lm, ids, valid).tolist() == [[False, True, True, False, False]]
    ids[0, 0] = 9
    assert kept_positions(lm, ids, valid, skip_first=True).tolist() == [[False, True, True, False, False]]


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
    first = lambda split: [next(dataset.documents(split)) for _ in range(1)][0]
    assert first("train") != first("val")
    ids, valid = TokenRows(lm, dataset, "val", 32).take(20)
    assert ids.shape == (20, 32)
    assert valid.all()


def test_long_files_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_BYTES", 100)
    text = "".join(f"line number {i}\n" for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(open_dataset(str(tmp_path / "a.txt")).documents("train"))
    assert len(pieces) > 3
    assert "".join(pieces) == text
    assert all(p.endswith("\n") for p in pieces)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.bin", b"\x00", "odd number of bytes"),
        ("x.bin", np.full(100, 9999, np.uint16).tobytes(), "holds token 9999 and the model knows 293"),
        ("x.txt", b"\xff\xfe\xfd", "is not utf-8 text"),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "x.jsonl:2 is not json"),
        ("x.jsonl", b'{"content": "a"}\n', "it has: content); choose one with --text_column"),
        ("x.jsonl", b"[1]\n", "no text field"),
    ],
)
def test_bad_data_is_one_sentence(lm, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as e:
        TokenRows(lm, open_dataset(str(tmp_path / name)), "train", 16).take(5)
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_missing_and_empty(lm, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_dataset(str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no files"):
        open_dataset(str(tmp_path))
    (tmp_path / "x.bin").touch()
    assert len(TokenRows(lm, open_dataset(str(tmp_path / "x.bin")), "train", 8).take(3)[0]) == 0


def test_a_character_the_model_does_not_know(tmp_path, gpt_path):
    import pickle
    import shutil

    shutil.copy(gpt_path, tmp_path / "ckpt.pt")
    chars = {c: i for i, c in enumerate("abc")}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "stoi": chars, "itos": dict(enumerate("abc"))}))
    lm = load_language_model(str(tmp_path / "ckpt.pt"), device="cpu")
    (tmp_path / "t.txt").write_text("abcz")
    with pytest.raises(UserError, match="'z'"):
        TokenRows(lm, open_dataset(str(tmp_path / "t.txt")), "train", 2).take(1)
