"""What is told, and to whom: metrics survive torn lines, bad input ends with 2 and one sentence, rank 1 is silent.

Run: python -m pytest tests/test_log.py
"""

import json

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


def test_only_rank_0_speaks(capsys, monkeypatch, tmp_path):
    log.once("first")
    log.once("first")
    assert capsys.readouterr().out == "first\n"
    monkeypatch.setenv("RANK", "1")
    log.say("never")
    log.MetricLog(tmp_path / "m.jsonl").write({"step": 1})
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "m.jsonl").exists()
    assert log.progress(10, "x").disable
