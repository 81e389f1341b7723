"""Checkpoints: a run resumed equals one that never stopped, to the bit; those of other settings or data are refused.

Run: python -m pytest tests/test_checkpoint.py
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sae import files
from sae.checkpoint import checkpoints
from sae.config import UserError
from sae.formats import store
from tests.conftest import ALL, ROOT
from tests.test_trainer import config, trainer, weights

RESUMED = [{"activation": kind, **more} for kind in ALL for more in ({"l1_coefficient": 0.01}, {"ema": 0.9})] + [
    {"optimizer": "muon"},
    {"optimizer": "signum", "ema": 0.9},
    {"optimizer": "sgd"},
    {"dtype": "float16"},
    {"tied": True},
    {"k_decay_steps": 18},
    {"resample_every": 4},
    {"micro_acc_steps": 2, "normalize_activations": "none"},
    {"activation": "relu", "p_anneal": 0.5},
    {"dead_feature_threshold": None, "dead_latent_threshold": 1e-2},
]


@pytest.mark.parametrize("fields", RESUMED, ids=lambda f: "-".join(map(str, f.values())))
def test_resume_is_bit_exact(fields, tmp_path):
    c = config(**fields)
    whole = trainer(c)
    whole.train(verbose=False)
    first = trainer(c, tmp_path / "run")
    first.train(verbose=False)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint_step15.pt", "checkpoint_step20.pt"]
    (tmp_path / "run" / "checkpoint_step20.pt").unlink()  # as if it had been killed before its last save
    second = trainer(c, tmp_path / "run")
    second.load_checkpoint()
    assert second.step == 15
    second.train(verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in lines if "loss" in r]
    assert steps == sorted(set(steps))  # lines after the checkpoint were dropped, then logged again


def test_sigkill_and_resume_through_the_script(gpt_path, text_file, tmp_path):
    """The real command, killed without warning, gives the weights of the run that was not."""

    def command(name, *flags):
        places = ["--model", gpt_path, "--dataset", str(text_file), "--save_dir", str(tmp_path), "--run_name", name]
        sizes = "--layer 1 --k 4 --batch_size 64 --buffer_tokens 512 --max_tokens 60000 --val_tokens 500".split()
        how = "--save_every 10 --eval_every 50".split()
        return [sys.executable, "-m", "scripts.sae_train", *places, *sizes, *how, *flags]

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), cwd=ROOT, env=env, check=True, capture_output=True)
    child = subprocess.Popen(command("killed"), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(checkpoints(tmp_path / "killed")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    child = subprocess.Popen(command("killed", "--resume"), cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    step = checkpoints(tmp_path / "killed")[-1]
    while checkpoints(tmp_path / "killed")[-1] == step and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[0]
    assert child.returncode == 130 and "goes on from its last checkpoint" in said
    subprocess.run(command("killed", "--resume"), cwd=ROOT, env=env, check=True, capture_output=True)
    a, b = (files.read_safetensors(tmp_path / name / store.WEIGHTS) for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoints_of_other_settings_and_broken_ones_are_refused(tmp_path):
    t = trainer(config(), tmp_path / "run")
    t.train(verbose=False)
    with pytest.raises(UserError, match="trained with k=4 and 5 is asked"):
        trainer(config(k=5), tmp_path / "run").load_checkpoint()
    with pytest.raises(UserError, match="no checkpoint to resume"):
        trainer(config(), tmp_path / "empty").load_checkpoint()
    newest = checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:3000])
    with pytest.raises(UserError, match="is damaged, cut short or no .pt file|refused"):
        trainer(config(), tmp_path / "run").load_checkpoint(newest)
    older = trainer(config(), tmp_path / "run")
    older.load_checkpoint()  # the newest whole one
    assert older.step == 15
    with pytest.raises(UserError, match="is no training checkpoint"):
        trainer(config()).load_checkpoint(tmp_path / "run" / "best_model.pt")
    files.write_torch({**files.read_torch(checkpoints(tmp_path / "run")[0]), "format": 1}, newest)
    with pytest.raises(UserError, match="another version"):
        trainer(config(), tmp_path / "run").load_checkpoint(newest)


def test_resume_refuses_other_data(tmp_path):
    origin = {"provenance": {"model_hash": "a", "dataset_hash": "b"}}
    trainer(config(), tmp_path / "run", metadata=origin).train(verbose=False)
    trainer(config(), tmp_path / "run", metadata=origin).load_checkpoint()
    changed = {"provenance": {"model_hash": "a", "dataset_hash": "c"}}
    with pytest.raises(UserError, match="dataset_hash has changed"):
        trainer(config(), tmp_path / "run", metadata=changed).load_checkpoint()
