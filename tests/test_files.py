"""Writes are atomic and as readable as the umask says; hostile and torn files are refused.

Run: python -m pytest tests/test_files.py
"""

import json
import os
import pickle

import pytest
import torch

from sae import files
from sae.config import SAEConfig, UserError
from sae.formats import store
from sae.models import create_sae


def test_hostile_and_torn_checkpoints(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (tmp_path / "a.pt").write_bytes(pickle.dumps({"sae_state_dict": Evil(), "config": {}}))
    torch.save({"sae_state_dict": Evil(), "config": {}}, tmp_path / "b.pt")
    torch.save({"x": torch.zeros(1000)}, tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:2000])
    (tmp_path / "d.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "e.pt")
    for name in "abcdefg":
        with pytest.raises(UserError) as e:
            store.load_sae(tmp_path / f"{name}.pt")
        assert len(str(e.value).splitlines()) == 1
    assert not marker.exists()


def test_writes_are_atomic(tmp_path):
    path = tmp_path / "x.json"
    files.write_json({"a": float("nan"), "b": [1.5]}, path)
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5]}

    def half(tmp):
        tmp.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        files.write_atomic(path, half)
    assert json.loads(path.read_text())["b"] == [1.5]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(UserError, match="cannot write"):
        files.write_json({}, path / "below" / "a" / "file.json")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="free some space"):
        files.write_torch({}, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        store.save_sae(create_sae(SAEConfig(d_in=4, d_sae=8, k=2)), tmp_path / "sae")
    finally:
        os.umask(before)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "sae").iterdir()} == {
        store.CFG: "0o640",
        store.WEIGHTS: "0o640",
    }


def test_a_journal_loses_only_what_a_kill_tore(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    assert files.open_journal(path) == []
    for n in range(3):
        files.append_line(path, {"n": n}, sync=n > 0)
    whole = path.read_text()
    path.write_text(whole + '{"n": 3}')  # json, but the newline is missing
    assert files.open_journal(path) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert path.read_text() == whole
    path.write_text("no json\n" + whole + '[]\n{"m": 1}\n')
    assert files.open_journal(path, lambda line: line["n"] < 2) == [{"n": 0}, {"n": 1}]
    assert path.read_text() == 'no json\n{"n": 0}\n{"n": 1}\n'
    with pytest.raises(UserError, match=r"is damaged \(.*\); delete it"):
        files.open_journal(path)


def test_a_lock_is_for_one(tmp_path):
    held = files.lock(tmp_path, "busy")
    with pytest.raises(UserError, match="busy"):
        files.lock(tmp_path, "busy")
    os.close(held)
    os.close(files.lock(tmp_path, "busy"))
