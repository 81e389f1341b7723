"""The run directory: runs are never mixed or overwritten, and what a run says of itself opens it again.

Run: python -m pytest tests/test_rundir.py
"""

import json
from dataclasses import replace

import datasets as hf
import pytest

from sae import evaluator
from sae.config import TrainConfig, UserError
from sae.data.activations import ModelSource, Stream
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.formats import store
from sae.models import create_sae
from sae.trainer import SAETrainer
from scripts import sae_collect, sae_eval, sae_train
from tests.conftest import make_text
from tests.test_trainer import HOOKS, config, trainer


def test_a_run_is_not_overwritten(tmp_path):
    first = trainer(config(), tmp_path / "run")
    first.train(verbose=False)
    with pytest.raises(UserError, match="holds a run already; give --resume, --overwrite"):
        trainer(config(), tmp_path / "run").train(verbose=False)
    trainer(config(), tmp_path).train(verbose=False)  # a folder around runs holds none itself
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run already; it has no checkpoint to resume from yet; give --overwr"):
        trainer(config(), young).train(verbose=False)
    for bystander in (tmp_path / "run" / "other" / "config.json", tmp_path / "run" / "notes.txt"):
        bystander.parent.mkdir(exist_ok=True)
        bystander.write_text("{}")
    other = trainer(config(seed=3), tmp_path / "run", overwrite=True)
    other.train(verbose=False)
    assert bystander.exists()
    assert (tmp_path / "run" / "other" / "config.json").exists()  # not ours to delete
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["seed"] == 3


def test_overwriting_takes_the_old_runs_hookpoints_away(lm, text_file, tmp_path):
    def run(names, **kwargs):
        c = TrainConfig(k=4, batch_size=64, buffer_tokens=256, max_tokens=640)
        source = ModelSource(TokenRows(lm, open_dataset(str(text_file)), "train", 32), names)
        stream = Stream(source, n_tokens=640, batch_size=64, buffer_tokens=256)
        saes = {n: create_sae(replace(c, d_in=32)) for n in names}
        SAETrainer(saes, c, stream, save_dir=tmp_path / "m", **kwargs).train(verbose=False)

    run(HOOKS)
    run(HOOKS[:1], overwrite=True)
    assert list(store.load_saes(tmp_path / "m")) == HOOKS[:1]


def test_a_run_remembers_how_its_text_was_read(lm, gpt_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {split: [make_text(150, seed=s + i) for i in range(40)] for s, split in ((0, "train_a"), (99, "test_a"))}
    both = {
        s: hf.Dataset.from_dict({"id": ["an id that is longer than the text" * 99] * 40, "b": t})
        for s, t in texts.items()
    }
    hf.DatasetDict(both).save_to_disk("saved")
    token = lm.tokenizer.encode("alpha")[0]
    read = ["--model", gpt_path, "--dataset", "saved", "--split", "train_a", "--text_column", "b", "--layer", "1"]
    read += ["--exclude_tokens", str(token), "5", "--data_preprocessing_num_proc", "2", "--ctx_len", "32"]
    small = ["--k", "4", "--batch_size", "64", "--buffer_tokens", "256", "--max_tokens", "640", "--val_tokens", "200"]
    sae_train.main([*read, *small, "--run_name", "live"])
    sae_collect.main([*read, "--max_tokens", "1000", "--output_dir", "acts"])
    sae_train.main(["--activations", "acts", *small, "--run_name", "cached"])
    with pytest.raises(UserError, match="was collected with exclude_tokens"):
        sae_train.main(["--activations", "acts", *small, "--run_name", "other", "--exclude_tokens", "7"])
    monkeypatch.setattr(evaluator, "evaluate", seen := Recorder(evaluator.evaluate))
    for run in ("live", "cached"):
        told = json.loads((tmp_path / "sae_models" / run / "cfg.json").read_text())["metadata"]
        assert sorted(told["exclude_tokens"]) == sorted([token, 5])
        assert (told["split"], told["text_column"], told["dataset_path"]) == ("train_a", "b", "saved")
        sae_eval.main(["--sae_path", f"sae_models/{run}", "--eval_tokens", "300"])
    rows = TokenRows(lm, seen.text.dataset, "val", 32)
    assert lm.tokenizer.encode_document(texts["test_a"][0])[:32] == rows.take(1)[0][0].tolist()
    assert sorted(seen.text.exclude_tokens) == sorted([token, 5])
    assert "stale" not in capsys.readouterr().err
    # another text is read in its own way
    (tmp_path / "other.txt").write_text(make_text(9000))
    sae_eval.main(["--sae_path", "sae_models/live", "--eval_tokens", "300", "--dataset", "other.txt"])
    with pytest.raises(UserError, match="cannot be excluded"):
        sae_train.main([*read, *small, "--exclude_tokens", "9999", "--run_name", "bad"])


class Recorder:
    """Calls a function and keeps what it was given."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **options):
        self.text = args[2]
        return self.function(*args, **options)
