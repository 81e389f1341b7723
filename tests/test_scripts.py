"""The commands as a person types them: they run, and meet bad input with one sentence, exit code 2 and no debris.

Run: python -m pytest tests/test_scripts.py
"""

import json
import os
import pickle
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch

from sae import files
from sae.config import ChatConfig, EvalConfig, HookType
from sae.formats import store
from sae.lm import language_model
from sae.models import KINDS
from sae.rundir import open_sae
from scripts import sae_collect, sae_eval, sae_train, sae_upload, sae_viz
from scripts.chat import open_conversation
from tests.conftest import ROOT, SMALL, Evil, call

SCRIPTS = {
    "sae_train": sae_train,
    "sae_eval": sae_eval,
    "sae_viz": sae_viz,
    "sae_upload": sae_upload,
    "sae_collect": sae_collect,
}


def test_train_eval_viz_as_they_stand(here, base, capsys):
    assert call(sae_train, "--layer", 1, *base, *SMALL) == 0
    run = here / "sae_models" / "layer_1"
    assert {p.name for p in run.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "cfg.json",
        "sae_weights.safetensors",
        "best_model.pt",
        "checkpoint_step10.pt",
    }
    settings = json.loads((run / "config.json").read_text())
    assert settings["config"]["k"] == 4
    assert settings["resolved"]["d_sae"] == [256]
    assert settings["git_commit"] is None or len(settings["git_commit"]) == 40
    # from here on no flag is needed: the newest run, its model, its text
    assert call(sae_eval, "--eval_tokens", 300) == 0
    out = capsys.readouterr().out
    report = json.loads((run / "eval.json").read_text())
    assert report["n_tokens"] >= 300
    assert report["hookpoint"] == "transformer.h.1"
    assert f"explained variance {report['explained_variance']:.4f}" in out
    assert {p.name for p in (run / "plots").iterdir()} >= {"density.png", "l0.png", "training.png"}
    assert call(sae_viz, "--eval_tokens", 300, "--top_k", 3) == 0
    assert (run / "features" / "index.html").is_file()
    # the run's own config.json starts the same run again
    again = ["--config", run / "config.json", "--run_name", "again"]
    assert call(sae_train, *again) == 0
    a, b = (files.read_safetensors(p / store.WEIGHTS) for p in (run, here / "sae_models" / "again"))
    assert all(torch.equal(a[n], b[n]) for n in a)


HOOKPOINTS = {  # hook type: the module of layer 1 it names
    "resid_post": "transformer.h.1",
    "resid_pre": "transformer.h.1@in",
    "resid_mid": "transformer.h.1.ln_2@in",
    "attn": "transformer.h.1.attn",
    "mlp": "transformer.h.1.mlp",
    "mlp_post_act": "transformer.h.1.mlp.c_proj@in",
}


@pytest.mark.parametrize(("i", "activation"), list(enumerate(sorted(KINDS))))
def test_every_kind_and_hook_type_trains(here, base, i, activation):
    """All kinds and all hook types: kind i at hook type i, and the types begin again after the last."""
    hook_type = get_args(HookType)[i % len(HOOKPOINTS)]
    often = ["--log_every", 1, "--eval_every", 5, "--max_tokens", 1920]
    flags = ["--layer", 1, "--hook_type", hook_type, "--activation", activation, *base, *SMALL, *often]
    assert call(sae_train, *flags) == 0
    run = here / "sae_models" / ("layer_1" if hook_type == "resid_post" else f"layer_1_{hook_type}")
    settings = json.loads((run / "config.json").read_text())["config"]
    assert (settings["activation"], settings["hook_type"]) == (activation, hook_type)
    sae = store.load_sae(run)
    assert type(sae) is KINDS[activation] and not sae.training
    x = torch.randn(50, sae.d_in, generator=torch.Generator().manual_seed(0))
    assert 0 < float((sae.encode(x) != 0).float().mean()) < 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [r["fvu"] for r in lines if "fvu" in r]
    assert len(losses) == 30 and sum(losses[-5:]) < sum(losses[:5])
    assert call(sae_eval, "--eval_tokens", 200, "--sae_path", run) == 0
    report = json.loads((run / "eval.json").read_text())
    assert (report["architecture"], report["hookpoint"]) == (activation, HOOKPOINTS[hook_type])


def test_several_hookpoints_in_one_run(here, base):
    assert call(sae_train, "--hookpoints", "transformer.h.*.mlp", *base, *SMALL, "--run_name", "mlps") == 0
    assert len(store.load_saes(here / "sae_models" / "mlps")) == 3
    assert call(sae_train, "--layers", 0, 2, *base, *SMALL) == 0
    assert list(store.load_saes(here / "sae_models" / "layers_0_2")) == ["transformer.h.0", "transformer.h.2"]
    assert call(sae_eval, "--sae_path", "sae_models/layers_0_2/transformer.h.2", "--eval_tokens", 200) == 0


def test_collect_then_train(here, base, capsys):
    assert call(sae_collect, *base, "--layer", 1, "--max_tokens", 1500, "--output_dir", "acts") == 0
    assert call(sae_train, "--activations", "acts", *SMALL, "--run_name", "cached") == 0
    assert call(sae_eval, "--eval_tokens", 200) == 0
    assert call(sae_collect, *base, "--layer", 1, "--output_dir", "acts") == 2
    assert "exists" in capsys.readouterr().err
    assert call(sae_collect, *base, "--layer", 0, "--max_tokens", 600, "--output_dir", "acts", "--overwrite") == 0
    manifest = json.loads((here / "acts" / "manifest.json").read_text())
    old = {key: value for key, value in manifest.items() if key != "model_dtype"}  # it was float32 always
    (here / "acts" / "manifest.json").write_text(json.dumps(old))
    assert call(sae_train, "--activations", "acts", *SMALL, "--run_name", "old", "--max_tokens", 300) == 0
    (here / "acts" / "manifest.json").write_text(json.dumps({**manifest, "model_hash": "0" * 64}))
    assert call(sae_train, "--activations", "acts", *SMALL, "--run_name", "stale") == 2
    assert "stale or foreign: its model_hash" in capsys.readouterr().err
    assert not (here / "sae_models" / "stale").exists()


def test_a_model_in_half_precision_through_every_script(here, base, capsys):
    half = ["--model_dtype", "bfloat16"]
    assert call(sae_train, *base, "--layer", 1, *SMALL, *half, "--run_name", "live") == 0
    for asked, got in ((None, "bfloat16"), ("float32", "float32")):  # as in training, unless asked otherwise
        assert open_sae(EvalConfig(sae_path="sae_models/live", model_dtype=asked, device="cpu")).lm.dtype == got
        chat_config = ChatConfig(sae_path="sae_models/live", model_dtype=asked, device="cpu")
        assert open_conversation(chat_config).lm.dtype == got
    assert call(sae_eval, "--eval_tokens", 200) == 0
    assert call(sae_viz, "--eval_tokens", 200) == 0
    assert call(sae_train, *base, "--layer", 1, *SMALL, *half, "--loss_fn", "kl", "--run_name", "kl") == 0
    assert call(sae_collect, *base, "--layer", 1, "--max_tokens", 1500, "--output_dir", "acts", *half) == 0
    assert call(sae_train, "--activations", "acts", *SMALL, "--run_name", "cached") == 0
    assert open_sae(EvalConfig(sae_path="sae_models/cached", device="cpu")).lm.dtype == "bfloat16"
    manifest = json.loads((here / "acts" / "manifest.json").read_text())
    del manifest["model_dtype"]  # as of a cache from before there was a choice
    (here / "acts" / "manifest.json").write_text(json.dumps(manifest))
    assert call(sae_train, "--activations", "acts", *SMALL, "--run_name", "stale") == 2
    assert "stale or foreign: its model_hash" in capsys.readouterr().err
    assert call(sae_train, "--run_name", "live", "--resume") == 0
    assert call(sae_train, "--run_name", "live", "--resume", "--model_dtype", "float32") == 2
    assert "was trained with model_dtype=bfloat16 and float32 is asked now" in capsys.readouterr().err


def test_the_model_can_have_a_device_of_its_own(here, base, capsys, monkeypatch):
    devices, load = [], language_model.load_language_model
    monkeypatch.setattr(
        language_model, "load_language_model", lambda *a, **kw: devices.append(kw["device"]) or load(*a, **kw)
    )
    flags = [*base, "--layer", 1, *SMALL]
    assert call(sae_train, *flags, "--device", "cpu", "--model_device", "cpu:0", "--assess") == 0
    assert devices == ["cpu:0"]
    assert call(sae_train, *flags, "--model_device", "cuda:99", "--run_name", "far") == 2
    assert "device 'cuda:99' is not there" in capsys.readouterr().err
    assert call(sae_train, *flags, "--model_device", "cpu", "--loss_fn", "kl", "--run_name", "kl") == 2
    assert "trains through the model, on one device" in capsys.readouterr().err


def test_collecting_every_nth_layer(here, gpt_path, text_file):
    flags = ["--model", gpt_path, "--dataset", text_file, "--layer_stride", 2, "--max_tokens", 300, "--output_dir", "a"]
    assert call(sae_collect, *flags) == 0
    assert set(json.loads((here / "a" / "manifest.json").read_text())["hookpoints"]) == {
        "transformer.h.0",
        "transformer.h.2",
    }


def test_a_model_named_beside_activations_must_be_theirs(here, gpt_path, text_file, capsys):
    flags = ["--model", gpt_path, "--dataset", text_file, "--layer", 1, "--max_tokens", 1500]
    assert call(sae_collect, *flags, "--output_dir", "acts") == 0
    assert call(sae_train, "--activations", "acts", *SMALL, "--model", "out/ckpt.pt") == 2
    assert "'out/ckpt.pt' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("script", [sae_eval, sae_viz])
def test_where_nothing_can_be_written_nothing_is_measured(here, gpt_path, text_file, capsys, script):
    flags = ["--model", gpt_path, "--dataset", text_file, "--layer", 1]
    assert call(sae_train, *flags, *SMALL, "--run_name", "r") == 0
    (here / "file").touch()
    capsys.readouterr()
    assert call(script, "--eval_tokens", 100, "--output_dir", "file/x") == 2
    err = capsys.readouterr().err
    assert "cannot write to 'file/x'" in err
    assert "100%" not in err


def test_a_text_column_goes_through_a_cache(here, gpt_path, text_file):
    rows = [json.dumps({"body": line}) for line in text_file.read_text().splitlines()]
    (here / "t.jsonl").write_text("\n".join(rows))
    flags = ["--model", gpt_path, "--dataset", "t.jsonl", "--text_column", "body", "--layer", 1]
    assert call(sae_collect, *flags, "--max_tokens", 1500, "--output_dir", "acts") == 0
    assert call(sae_train, "--activations", "acts", *SMALL, "--run_name", "c") == 0
    assert call(sae_eval, "--eval_tokens", 100) == 0
    assert call(sae_train, "--activations", "acts", *SMALL, "--layer", 2) == 2


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        (["--skip_first"], "--skip_first True: 'acts' was collected with skip_first=False"),
        (["--ctx_len", 32], "--ctx_len 32: 'acts' was collected with ctx_len=16"),
        (["--model_dtype", "bfloat16"], "--model_dtype bfloat16: 'acts' was collected with model_dtype=float32"),
        (["--hook_type", "mlp"], "choose among them with --hookpoints"),
        (["--layer_stride", 2], "choose among them with --hookpoints"),
        (["--model_device", "cpu"], "--activations runs none but to --assess"),
    ],
)
def test_collected_activations_refuse_what_they_were_not_made_with(here, gpt_path, text_file, capsys, flag, told):
    made = ["--model", gpt_path, "--dataset", text_file, "--ctx_len", 16]
    assert call(sae_collect, *made, "--layer", 1, "--max_tokens", 1500, "--output_dir", "acts") == 0
    assert call(sae_train, "--activations", "acts", *SMALL, *flag) == 2
    assert told in capsys.readouterr().err
    assert not (here / "sae_models").exists()
    assert call(sae_train, "--activations", "acts", *SMALL, *made) == 0
    np.save("rows.npy", np.ones((900, 8), np.float32))
    assert call(sae_train, "--activations", "rows.npy", *SMALL, *flag, "--run_name", "rows") == 2


def test_resume_refuses_a_changed_text(here, gpt_path, text_file, capsys):
    (here / "t.txt").write_text(text_file.read_text())
    flags = ["--model", gpt_path, "--dataset", "t.txt", "--layer", 1, *SMALL]
    assert call(sae_train, *flags) == 0
    (here / "t.txt").write_text("other " + text_file.read_text())
    assert call(sae_train, *flags, "--resume") == 2
    assert "dataset_hash has changed since" in capsys.readouterr().err


def test_resume_and_overwrite(here, base, capsys):
    flags = ["--layer", 1, *base, *SMALL]
    assert call(sae_train, *flags) == 0
    assert call(sae_train, *flags) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert call(sae_train, *flags, "--resume", "--log_every", 7) == 0  # free: nothing learned hangs on it
    assert "there was nothing left to do; saved to" in capsys.readouterr().out
    assert call(sae_train, *flags, "--resume", "--k", 5) == 2
    assert "trained with k=4 and 5 is asked" in capsys.readouterr().err
    assert call(sae_train, *flags, "--overwrite", "--k", 5) == 0
    assert call(sae_train, *flags, "--resume", "--run_name", "other") == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err


def test_resume_needs_no_flags(here, base, capsys):
    """The run's own settings are taken over, sweeps included, and it goes on to the bit."""
    flags = [*base, *SMALL, "--activation", "gated", "--save_every", 5, "--init_seeds", 0, 1, "--no-save_best"]
    assert call(sae_train, "--layer", 1, *flags) == 0
    run = here / "sae_models" / "layer_1"
    weights = lambda: {name: sae.state_dict() for name, sae in store.load_saes(here / "sae_models").items()}
    before = weights()
    for more in ([], ["--layer", 1], ["--run_name", "layer_1"], ["--run_name", "renamed"], ["--save_every", 2]):
        if "renamed" in more:
            run = run.rename(run.with_name("renamed"))
        (run / "checkpoint_step10.pt").unlink()  # as if it had been killed on the way
        for file in run.rglob(store.WEIGHTS):
            file.unlink()
        capsys.readouterr()
        assert call(sae_train, *more, "--resume") == 0
        assert f"resuming 'sae_models/{run.name}' at step 5" in capsys.readouterr().out
        after = weights()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n][p], before[n][p]) for n in before for p in before[n]), more
    assert (run / "checkpoint_step8.pt").is_file()
    assert call(sae_train, "--resume", "--lr", 0.5) == 2
    assert "trained with learning_rate=(none given) and 0.5 is asked" in capsys.readouterr().err
    assert call(sae_train, "--resume", "--save_dir", "elsewhere") == 2
    assert "no run to resume in 'elsewhere'" in capsys.readouterr().err


def bad_model(folder, gpt_path, how):
    """A broken copy of the tiny checkpoint beside its tokenizer."""
    data = (folder.parent / "ckpt.pt") if how == "missing" else None
    path = folder / "ckpt.pt"
    (folder / "tokenizer.json").write_bytes((gpt_path.parent / "tokenizer.json").read_bytes())
    if how == "truncated":
        path.write_bytes(gpt_path.read_bytes()[:10_000])
    elif how == "hostile":
        path.write_bytes(pickle.dumps({"model": Evil(), "model_args": {}}))
    elif how == "nan":
        checkpoint = torch.load(gpt_path, weights_only=True)
        checkpoint["model"]["transformer.h.0.ln_1.weight"][:] = torch.nan
        torch.save(checkpoint, path)
    return data or path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "out/ckpt.pt"], "'out/ckpt.pt' does not exist"),
        (["--layer", "3"], "layer 3 was asked for and the model has 3; choose 0 to 2"),
        (["--hookpoints", "transformer.h.1.mlpp"], "did you mean 'transformer.h.1.mlp'"),
        (["--k", "300"], "k=300 exceeds d_sae=256"),
        (["--dataset", "nowhere.txt"], "dataset 'nowhere.txt' does not exist"),
        (["--dataset", "empty.txt"], "dataset 'empty.txt' is empty"),
        (["--dataset", "one.txt"], "gave 0 tokens"),
        (["--save_dir", "empty.txt"], "choose another --save_dir"),
        (["--run_name", ""], "names no folder inside --save_dir"),
        (["--run_name", "../x"], "names no folder inside --save_dir"),
        (["--run_name", "/x"], "names no folder inside --save_dir"),
        (["--d_sae", "64", "--expansion_factor", "4"], "both say how many latents"),
        (["--d_out", "7", "--transcode"], "--d_out 7 was given and 'transformer.h.1' is 32 wide"),
        (["--d_in", "7"], "--d_in 7 was given and 'transformer.h.1' is 32 wide"),
        (["--activations", "nowhere"], "is not a cache of activations"),
        (["--device", "cuda:7"], "try --device cpu"),
        (["--layr", "1"], "did you mean '--layer'"),
        (["--batch_size", "2000"], "holds less than two batches"),
        (["--max_tokens", "10"], "do not fill one batch"),
        (["--model", "TRUNCATED"], ""),
        (["--model", "HOSTILE"], ""),
        (["--model", "NAN"], "contain NaN or infinity"),
        (["--config", "broken.json"], "not valid json"),
    ],
    ids=lambda v: "-".join(v)[:40] if isinstance(v, list) else "",
)
def test_bad_input_is_one_sentence_and_leaves_nothing(here, base, gpt_path, capsys, flags, words):
    from pathlib import Path

    (here / "empty.txt").touch()
    (here / "one.txt").write_text("a")
    (here / "broken.json").write_text("{")
    flags = [
        str(bad_model(here, Path(gpt_path), f.lower())) if f in ("TRUNCATED", "HOSTILE", "NAN") else f for f in flags
    ]
    before = {p for p in here.rglob("*") if p.is_file()}
    layer = [] if {"--hookpoints", "--layer", "--activations"} & set(flags) else ["--layer", "1"]
    assert call(sae_train, *base, *SMALL, *layer, *flags) == 2
    err = capsys.readouterr().err
    message = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(message) == 1, err
    assert words in message[0]
    assert "Traceback" not in err
    assert {p for p in here.rglob("*") if p.is_file()} == before
    assert not (here / "ran").exists()


def test_what_several_processes_cannot_do_is_refused(here, base, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(sae_train, *base, *SMALL, "--loss_fn", "kl", "--shard_latents", 2) == 2
    assert "run it without torchrun" in capsys.readouterr().err
    assert call(sae_train, *base, *SMALL) == 2
    assert "start them with torchrun" in capsys.readouterr().err  # which also says who is who
    assert list(here.iterdir()) == []


def test_eval_and_viz_refuse_too(here, base, capsys):
    assert call(sae_eval) == 2
    assert "run sae_train first" in capsys.readouterr().err
    assert call(sae_train, "--layer", 1, *base, *SMALL) == 0
    assert call(sae_viz, "--feature", 256, "--eval_tokens", 200) == 2
    assert "256" in capsys.readouterr().err
    assert call(sae_eval, "--sae_path", "nowhere") == 2
    assert call(sae_eval, "--model", "out/ckpt.pt") == 2
    weights = here / "sae_models" / "layer_1" / store.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    assert call(sae_eval) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_and_typos_as_real_processes(name, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = lambda *flags: subprocess.run(
        [sys.executable, "-m", f"scripts.{name}", *flags], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    if name == "sae_train":  # one is enough: they share the code, and starting torch takes seconds
        typo = run("--modell", "x")
        assert (typo.returncode, typo.stdout) == (2, "")
        assert typo.stderr == "error: unknown argument '--modell'; did you mean '--model'?\n"
    helped = run("--help")
    assert helped.returncode == 0, helped.stderr
    assert "--model" in helped.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_takes_one_pass_over_the_model(here, base, capsys, monkeypatch):
    """3 layers x 2 k x 2 seeds: the model runs as often as for one SAE, and each SAE is the one trained alone."""
    from sae.lm.language_model import LanguageModel

    forwards = []
    hidden = LanguageModel.hidden
    monkeypatch.setattr(LanguageModel, "hidden", lambda *a, **k: forwards.append(1) or hidden(*a, **k))
    assert call(sae_train, "--layer", 2, *base, *SMALL[2:], "--k", 4, "--init_seeds", 1, "--shuffle_seed", 0) == 0
    n_alone = len(forwards)
    forwards.clear()
    lists = ["--layers", 0, 1, 2, "--k", 2, 4, "--init_seeds", 0, 1, "--shuffle_seed", 0]
    capsys.readouterr()
    assert call(sae_train, *base, *SMALL[2:], *lists, "--run_name", "all") == 0
    assert len(forwards) == n_alone > 0
    out = capsys.readouterr().out
    saes = store.load_saes(here / "sae_models" / "all")
    assert len(saes) == 12
    alone = store.load_sae(here / "sae_models" / "layer_2")
    same = saes["transformer.h.2/k4_seed1"]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), same.parameters(), strict=True))
    result = json.loads((here / "sae_models" / "all" / "sweep.json").read_text())
    assert len(result["saes"]) == 12
    assert [row["n_seeds"] for row in result["table"]] == [2] * 6
    row = next(r for r in result["table"] if r["name"] == "transformer.h.1/k2")
    two = [result["saes"][f"transformer.h.1/k2_seed{s}"]["explained_variance"] for s in (0, 1)]
    assert row["explained_variance"] == pytest.approx(sum(two) / 2)
    assert row["explained_variance_sd"] == pytest.approx(abs(two[0] - two[1]) / 2**0.5)
    assert f"transformer.h.1/k2  {row['explained_variance']:.4f} +- " in out
    assert (here / "sae_models" / "all" / "plots" / "pareto.png").stat().st_size > 5000
    # every one of them is an SAE like any other, and the sweep resumes
    assert call(sae_eval, "--eval_tokens", 200, "--sae_path", "sae_models/all/transformer.h.0/k2_seed1") == 0
    before = files.read_safetensors(here / "sae_models/all/transformer.h.0/k2_seed1" / store.WEIGHTS)
    assert call(sae_train, *base, *SMALL[2:], *lists, "--run_name", "all", "--resume") == 0
    after = files.read_safetensors(here / "sae_models/all/transformer.h.0/k2_seed1" / store.WEIGHTS)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_sweep_resumes_to_the_bit_in_the_middle_of_an_epoch(here, base):
    """Several hookpoints and seeds, averaged weights, a text read again from its start, resampling."""
    lists = ["--layers", 0, 1, "--init_seeds", 0, 1, "--ema", 0.9, "--save_every", 5, "--resample_every", 4]
    sizes = "--k 4 --batch_size 64 --buffer_tokens 256 --max_tokens 1280 --val_tokens 200 --dead_feature_threshold 100"
    flags = [*base, *sizes.split(), "--num_epochs", 3]
    runs = here / "elsewhere"
    for name in ("whole", "cut"):
        assert call(sae_train, *flags, *lists, "--save_dir", runs, "--run_name", name) == 0
    newest = sorted((runs / "cut").glob("checkpoint_step*.pt"), key=lambda p: int(p.stem[15:]))[-1]
    newest.unlink()
    assert call(sae_train, *flags, *lists, "--save_dir", runs, "--run_name", "cut", "--resume") == 0
    assert newest.is_file()
    assert not (here / "sae_models").exists()
    names = list(store.load_saes(runs / "whole"))
    assert len(names) == 4
    for name in names:
        a, b = (files.read_safetensors(runs / run / name / store.WEIGHTS) for run in ("whole", "cut"))
        assert all(torch.equal(a[n], b[n]) for n in a), name


@pytest.mark.parametrize("form", [[], ["--skip_connection"]])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_transcoders_through_every_script(here, base, activation, form):
    flags = ["--layer", 1, "--hook_type", "mlp", "--transcode", "--activation", activation, *form]
    assert call(sae_train, *flags, *base, *SMALL) == 0
    folder = here / "sae_models" / "layer_1_mlp"
    sae = store.load_sae(folder)
    assert sae.config.transcode
    assert ("W_skip" in dict(sae.named_parameters())) == bool(form)
    assert call(sae_eval, "--eval_tokens", 300) == 0
    report = json.loads((folder / "eval.json").read_text())
    assert report["n_tokens"] >= 300
    assert call(sae_viz, "--eval_tokens", 300, "--top_k", 2) == 0
    # the same from collected pairs
    assert call(sae_collect, *base, "--layer", 1, "--hook_type", "mlp", "--transcode", "--max_tokens", 1500) == 0
    flags = ["--activations", "activations/default", "--transcode", "--activation", activation, *form]
    assert call(sae_train, *flags, *SMALL, "--run_name", "cached") == 0
    assert call(sae_eval, "--eval_tokens", 300, "--sae_path", "sae_models/cached") == 0


def test_finetuning_and_assessment(here, base, capsys):
    assert call(sae_train, "--layer", 1, *base, *SMALL, "--assess") == 0
    first = here / "sae_models" / "layer_1"
    assert json.loads((first / "final_assessment.json").read_text())
    assert (first / "eval.json").is_file()
    flags = ["--layer", 1, *base, *SMALL[2:], "--k", 4, "--lr", 1e-9, "--finetune", first, "--run_name", "second"]
    assert call(sae_train, *flags) == 0
    a, b = (store.load_sae(f) for f in (first, here / "sae_models" / "second"))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):  # a step size of nothing keeps what was given
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert call(sae_train, *flags, "--activation", "relu", "--overwrite") == 2
    assert "set --activation topk" in capsys.readouterr().err
    assert call(sae_train, *flags, "--finetune", "nowhere", "--overwrite") == 2


def test_finetuning_refuses_weights_that_would_mean_something_else(here, base, capsys):
    start = ["--layer", 1, *base, *SMALL]
    for other, asks in (
        (["--normalize_activations", "layer_norm"], "give --normalize_activations layer_norm"),
        (["--no-normalize_decoder"], "give --no-normalize_decoder"),
    ):
        assert call(sae_train, *start, *other, "--run_name", "first", "--overwrite") == 0
        capsys.readouterr()
        second = [*start, "--finetune", "sae_models/first", "--run_name", "second", "--overwrite"]
        assert call(sae_train, *second) == 2
        assert asks in capsys.readouterr().err
        assert call(sae_train, *second, *other) == 0
    assert call(sae_train, *start, "--run_name", "first", "--overwrite") == 0
    assert call(sae_train, *second, "--normalize_activations", "layer_norm") == 2
    assert "give another --normalize_activations" in capsys.readouterr().err


def test_a_gate_is_not_left_untrained(here, base, capsys):
    flags = ["--layer", 1, *base, *SMALL, "--activation", "gated", "--loss_fn", "kl"]
    assert call(sae_train, *flags) == 2
    assert "a gate learns from reconstruction alone" in capsys.readouterr().err
    assert call(sae_train, *flags, "--fvu_coefficient", 0.1) == 0


def test_layer_stride_and_matched_lists(here, base):
    assert call(sae_train, "--layer_stride", 2, *base, *SMALL) == 0
    assert list(store.load_saes(here / "sae_models" / "layers_0_2")) == ["transformer.h.0", "transformer.h.2"]
    flags = ["--hookpoints", "transformer.h.*.mlp", "--layer_stride", 2, "--run_name", "mlps"]
    assert call(sae_train, *flags, *base, *SMALL) == 0
    assert list(store.load_saes(here / "sae_models" / "mlps")) == ["transformer.h.0.mlp", "transformer.h.2.mlp"]
