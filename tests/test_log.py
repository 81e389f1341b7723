"""What is told, and to whom: metrics survive torn lines and reach wandb, bad input ends with 2 and one sentence.

Run: python -m pytest tests/test_log.py
"""

import json
import sys
from types import SimpleNamespace

import pytest

from sae import log
from sae.config import UserError


def test_metric_log_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = log.MetricLog(path, resume_step=2)
    metrics.write({"step": 3, "again": True})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    log.MetricLog(path)  # a new run starts an empty file
    assert path.read_text() == ""
    log.MetricLog(None).write({"step": 1})


class Wandb:
    """A stand-in for the wandb package: rows as wandb makes them of `log` calls, and how runs began and ended."""

    def __init__(self, starting_step=0):
        self.begun, self.rows, self.ended, self.starting_step = [], {}, [], starting_step

    def init(self, **settings):
        self.begun.append(settings)
        return SimpleNamespace(log=self.log, finish=self.finish, starting_step=self.starting_step)

    def log(self, values, step):
        assert step >= max(self.rows, default=0), "wandb drops what goes back in steps"
        assert not values.keys() & self.rows.setdefault(step, {}).keys(), "a value of the same step would be replaced"
        self.rows[step] |= values

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


ABOUT = {"project": "p", "name": "layer_1", "config": {"k": 4}}


def test_every_record_reaches_wandb(tmp_path, wandb, capsys):
    records = [{"step": s, "hookpoint": h, kind: 1.0} for s in (10, 20) for kind in ("l0", "val_l0") for h in "ab"]
    with log.MetricLog(tmp_path / "metrics.jsonl", resume_step=0, wandb=ABOUT) as metrics:
        for record in records:
            metrics.write(record)
    everything = {"l0/a": 1.0, "l0/b": 1.0, "val_l0/a": 1.0, "val_l0/b": 1.0}
    assert wandb.rows == {10: everything, 20: everything}
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == records
    (begun,) = wandb.begun
    assert {key: begun[key] for key in ABOUT} == ABOUT
    assert begun["resume"] == "allow"
    assert wandb.ended == [0]
    metrics.close()
    assert wandb.ended == [0]  # once
    assert "mode" not in begun  # WANDB_MODE decides
    assert capsys.readouterr().out == ""
    with log.MetricLog(None, wandb=ABOUT) as alone:  # without a run directory
        alone.write({"step": 30, "loss": 2.0})
    assert wandb.rows[30] == {"loss": 2.0}


def test_a_resumed_run_goes_on_in_wandb(tmp_path, wandb, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(KeyboardInterrupt), log.MetricLog(path, resume_step=0, wandb=ABOUT) as metrics:
        for step in (10, 20, 30):
            metrics.write({"step": step, "l0": step})
        raise KeyboardInterrupt
    assert wandb.ended == [1]
    later = Wandb(starting_step=31)  # wandb has seen 30, the checkpoint was written at 20
    monkeypatch.setitem(sys.modules, "wandb", later)
    with log.MetricLog(path, resume_step=20, wandb=ABOUT) as metrics:
        for step in (30, 40):
            metrics.write({"step": step, "l0": step})
    assert later.begun[0]["id"] == wandb.begun[0]["id"] == (tmp_path / "wandb_run_id").read_text().strip()
    assert later.rows == {40: {"l0": 40}}
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30, 40]
    log.MetricLog(path, resume_step=0, wandb=ABOUT).close()  # a new run in the same place is another one
    assert later.begun[1]["id"] != later.begun[0]["id"]
    log.MetricLog(path, wandb={**ABOUT, "id": "mine"}).close()
    assert later.begun[2]["id"] == "mine"


def test_wandb_that_is_missing_or_refuses_is_one_sentence(tmp_path, wandb, monkeypatch):
    def refuse(**_):
        raise RuntimeError("No API key configured.\nmore")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"No API key configured.*WANDB_MODE=offline"):
        log.MetricLog(tmp_path / "m.jsonl", wandb=ABOUT)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'nanosae\[wandb\]'"):
        log.MetricLog(tmp_path / "m.jsonl", wandb=ABOUT)
    assert list(tmp_path.iterdir()) == []
    log.MetricLog(tmp_path / "m.jsonl").write({"step": 1})  # who does not ask for it does not need it


def test_run_script(capsys):
    def bad(_argv):
        raise UserError("got this;\n  wanted that")

    with pytest.raises(SystemExit) as e:
        log.run_script(bad, [])
    assert e.value.code == 2
    assert capsys.readouterr().err == "error: got this; wanted that\n"

    def stopped(_argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        log.run_script(stopped, [])
    assert e.value.code == 130

    def bug(_argv):
        raise ValueError("a bug of ours keeps its traceback")

    with pytest.raises(ValueError, match="keeps its traceback"):
        log.run_script(bug, [])
    seen = []
    log.run_script(seen.append, ["--k", "3"])
    assert seen == [["--k", "3"]]


def test_only_rank_0_speaks(capsys, monkeypatch, tmp_path, wandb):
    log.once("first")
    log.once("first")
    assert capsys.readouterr().out == "first\n"
    monkeypatch.setenv("RANK", "1")
    log.say("never")
    with log.MetricLog(tmp_path / "m.jsonl", wandb=ABOUT) as metrics:
        metrics.write({"step": 1})
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
    assert (wandb.begun, wandb.ended) == ([], [])
    assert log.progress(10, "x").disable
