"""To add a kind of SAE one edits models.py and its test: a ninth kind, of which no other file knows, does all that the
eight do (tests/toy_kind.py is the whole of it).

Run: python -m pytest tests/test_ninth_kind.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from sae import files, log
from sae.config import KINDS, UserError
from sae.formats import store
from scripts import sae_eval, sae_train
from tests.conftest import ROOT

RUN = "--activation toy --layer 1 --k 4 --d_sae 96 --batch_size 64 --buffer_tokens 512 --val_tokens 400".split()


@pytest.fixture(scope="module")
def toy():
    """The module of the ninth kind, which leaves again: other tests know eight."""
    from tests import toy_kind

    KINDS["toy"] = toy_kind.Toy
    yield toy_kind
    del KINDS["toy"]


@pytest.fixture(scope="module")
def base(gpt_path, text_file):
    return [*RUN, "--model", gpt_path, "--dataset", str(text_file)]


@pytest.fixture(scope="module")
def run(toy, base, tmp_path_factory):
    """A run of 40 steps, trained by the command."""
    folder = tmp_path_factory.mktemp("toy")
    log.run_script(sae_train.main, [*base, "--max_tokens", "2560", "--save_every", "20", "--save_dir", str(folder)])
    return folder / "layer_1"


def weights(folder):
    return files.read_safetensors(folder / store.WEIGHTS)


def test_it_trains_and_is_saved(run, toy):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fvu = [line["fvu"] for line in lines if "fvu" in line]
    assert fvu[-1] < 0.8 * fvu[0]
    assert json.loads((run / "cfg.json").read_text())["architecture"] == "toy"
    sae = store.load_sae(run)
    assert isinstance(sae, toy.Toy)
    x = 100 * torch.randn(50, sae.d_in, generator=torch.Generator().manual_seed(0))
    assert sae.encode(x).detach().max().item() == toy.CAP


def test_it_is_evaluated(run):
    log.run_script(sae_eval.main, ["--sae_path", str(run), "--eval_tokens", "300"])
    report = json.loads((run / "eval.json").read_text())
    assert report["architecture"] == "toy" and report["k"] == 4 and report["l0"] <= 4
    assert report["explained_variance"] > 0.5 and report["ce_sae"] != report["ce_clean"]


def test_it_resumes_to_the_bit(run, base, tmp_path):
    flags = [*base, "--max_tokens", "2560", "--save_every", "20", "--save_dir", str(tmp_path)]
    log.run_script(sae_train.main, flags)
    (tmp_path / "layer_1" / "checkpoint_step40.pt").unlink()
    log.run_script(sae_train.main, [*flags, "--resume"])
    for name, x in weights(run).items():
        assert torch.equal(x, weights(tmp_path / "layer_1")[name]), name


def test_it_is_sharded(run, base, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    flags = [*base, "--max_tokens", "2560", "--shard_latents", "2", "--save_dir", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "-m", "tests.toy_kind", *flags], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, x in weights(run).items():
        assert (x - weights(tmp_path / "layer_1")[name]).norm() <= 1e-3 * x.norm(), name


def test_settings_of_other_kinds_are_refused(toy, base):
    with pytest.raises(UserError, match="--bandwidth is for --activation jumprelu, not toy"):
        sae_train.main([*base, "--bandwidth", "0.2", "--max_tokens", "2560"])


def test_no_other_file_knows_it():
    code = [p for p in (ROOT / "sae").rglob("*.py") if '"toy"' in p.read_text()]
    assert code == []
