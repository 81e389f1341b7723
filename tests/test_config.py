"""Configs are frozen, validated, and equal after a round trip through json and flags; a typo names its neighbour.

Run: python -m pytest tests/test_config.py
"""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae import schedules as sched
from sae.config import (
    REPLACED,
    CollectConfig,
    EvalConfig,
    SAEConfig,
    TrainConfig,
    UserError,
    VizConfig,
    from_cli,
    variants,
)

CONFIGS = [SAEConfig, TrainConfig, EvalConfig, VizConfig, CollectConfig]


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults_round_trip_and_help(cls, capsys, tmp_path):
    config = cls()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert from_cli(cls, ["--config", str(path)]) == config == from_cli(cls, [])
    with pytest.raises(SystemExit) as e:
        from_cli(cls, ["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for f in dataclasses.fields(cls):
        if f.name == "sweep":  # filled by the flags that take several values
            continue
        assert f"--{f.name}" in text
        assert f.metadata["help"][:20] in " ".join(text.split())


@given(
    k=st.integers(1, 64),
    d_sae=st.integers(64, 512),
    lr=st.none() | st.floats(1e-6, 1.0),
    hookpoints=st.lists(st.sampled_from(["a.b", "transformer.h.*"]), max_size=2),
    skip=st.booleans(),
    activation=st.sampled_from(["topk", "relu", "gated"]),
)
def test_round_trip_is_exact(k, d_sae, lr, hookpoints, skip, activation):
    config = TrainConfig(
        k=k, d_sae=d_sae, learning_rate=lr, hookpoints=tuple(hookpoints), skip_first=skip, activation=activation
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    flags = ["--k", str(k), "--d_sae", str(d_sae), "--lr", "none" if lr is None else repr(lr)]
    flags += ["--activation", activation, "--skip_first" if skip else "--no-skip_first"]
    flags += ["--hookpoints", *hookpoints] if hookpoints else []
    assert from_cli(TrainConfig, flags) == config


def test_flags_override_the_file_and_are_validated_together(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"config": {"k": 100, "d_in": 8, "d_sae": 128}}))
    c = from_cli(SAEConfig, ["--config", str(path), "--k", "200", "--d-sae", "256"])
    assert (c.k, c.d_sae) == (200, 256)


def test_spellings():
    c = from_cli(TrainConfig, ["--max-tokens", "1e6", "--num_latents", "512", "--lr=1e-3", "--skip_first", "true"])
    assert (c.max_tokens, c.d_sae, c.learning_rate, c.skip_first) == (1_000_000, 512, 1e-3, True)
    assert from_cli(TrainConfig, ["--normalize_decoder", "false"]).normalize_decoder is False
    assert from_cli(TrainConfig, ["--layers", "0", "4", "8"]).layers == (0, 4, 8)
    assert from_cli(TrainConfig, ["--checkpoint", "out/ckpt.pt"]).model == "out/ckpt.pt"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--expansion_facto", "4"], "did you mean '--expansion_factor'"),
        (["--k", "many"], "expected an integer"),
        (["--k", "2.5"], "expected an integer"),
        (["--activation", "topkk"], "did you mean 'topk'"),
        (["--k", "0"], "at least 1"),
        (["--d_in", "4", "--expansion_factor", "2", "--k", "9"], "k=9 exceeds d_sae=8"),
        (["--lr", "nan"], "finite"),
        (["--resume", "--overwrite"], "choose one"),
        (["--buffer_tokens", "100"], "two batches"),
        (["--ctx_len", "1"], "at least 2"),
        (["--skip_first", "maybe"], "expected true or false"),
        (["--config", "/nonexistent.json"], "cannot read"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_bad_flags_are_one_sentence(flags, words):
    with pytest.raises(UserError, match=".") as e:
        from_cli(TrainConfig, flags)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_sizes": 1}, "did you mean 'batch_size'"),
        ({"k": "8"}, "expected an integer"),
        ({"k": True}, "expected an integer"),
        ({"layers": [1.5]}, "list of int"),
        ({"activation": "relo"}, "did you mean 'relu'"),
    ],
)
def test_bad_json_is_one_sentence(fields, words):
    with pytest.raises(UserError) as e:
        TrainConfig.from_dict(fields)
    assert words in str(e.value)


def test_broken_json_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("{")
    with pytest.raises(UserError, match="not valid json"):
        from_cli(SAEConfig, ["--config", str(path)])


def test_frozen_and_complete():
    c = SAEConfig(48, 192, batch_size=17, learning_rate=0.5)  # the nanochat fork lost these in its round trip
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.k = 3  # type: ignore[misc]
    assert SAEConfig.from_dict(c.to_dict()) == c
    assert c.to_dict()["batch_size"] == 17


def test_from_model():
    class Model:
        class config:
            n_embd = 24

    assert SAEConfig.from_model(Model(), 3, "mlp", k=4).d_in == 24
    with pytest.raises(UserError, match="give d_in"):
        SAEConfig.from_model(object(), 0)


def test_schedules():
    c = SAEConfig(d_in=8, learning_rate=1.0, warmup_steps=10, decay_fraction=0.5)
    lrs = [sched.lr_at(s, c, 100) for s in range(100)]
    assert 0 < lrs[0] < lrs[5] < lrs[20] == lrs[49] == 1.0
    assert lrs[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(lrs[50:], lrs[51:], strict=False))
    flat = SAEConfig(d_in=8, learning_rate=1.0, warmup_steps=0, decay_fraction=0.0)
    assert {sched.lr_at(s, flat, 100) for s in range(100)} == {1.0}
    cosine = dataclasses.replace(c, lr_schedule="cosine")
    assert sched.lr_at(75, cosine, 100) == pytest.approx(0.5)
    assert sched.lr_at(60, cosine, 100) > sched.lr_at(60, c, 100)
    assert sched.lr_at(99, dataclasses.replace(c, lr_schedule="constant"), 100) == 1.0
    assert sched.lr_at(99, dataclasses.replace(c, optimizer="signum"), 100) == 1.0
    relu = SAEConfig(activation="relu", sparsity_warmup=0.5, p_anneal=0.5)
    assert sched.sparsity_at(0, relu, 100) == pytest.approx(0.02)
    assert sched.sparsity_at(60, relu, 100) == 1.0
    assert sched.sparsity_at(0, dataclasses.replace(relu, sparsity_warmup=0.0), 100) == 1.0
    assert [sched.p_at(s, relu, 100) for s in (0, 49, 74, 99)] == [1.0, 1.0, 0.75, 0.5]
    assert sched.target_l0(relu) == 32.0
    assert sched.target_l0(SAEConfig(activation="relu", l1_coefficient=0.1)) is None
    assert sched.target_l0(SAEConfig()) is None
    falling = SAEConfig(d_in=100, k=10, k_decay_steps=10)
    assert [sched.k_at(s, falling) for s in (0, 5, 9, 10, 10**6)] == [100, 55, 19, 10, 10]
    assert sched.k_at(0, SAEConfig(d_in=100, k=10)) == 10
    every = SAEConfig(resample_every=10)
    assert [s for s in range(100) if sched.resamples_at(s, every, 100)] == [9, 19, 29, 39, 49]
    assert sched.dead_below(SAEConfig(d_sae=320, k=32, dead_percentage_threshold=0.1)) == pytest.approx(0.01)
    assert sched.dead_below(SAEConfig(dead_latent_threshold=1e-3)) == 1e-3
    assert sched.dead_below(SAEConfig()) is None
    assert sched.peak_lr(SAEConfig(d_sae=1536 * 4)) == pytest.approx(sched.peak_lr(SAEConfig(d_sae=1536)) / 2)
    assert sched.dead_after_tokens(SAEConfig(d_sae=3200, k=32)) == 1600
    assert sched.dead_after_tokens(SAEConfig(d_sae=1 << 25, k=32)) == 10_000_000
    assert sched.dead_after_tokens(SAEConfig(dead_feature_threshold=7)) == 7
    assert sched.dead_after_tokens(SAEConfig(d_sae=4096, activation="jumprelu", target_l0=2)) == 16 * 4096 // 2
    assert sched.dead_below(SAEConfig(d_sae=100, activation="relu", target_l0=2, dead_percentage_threshold=0.1)) == 2e-3
    assert sched.n_latents(SAEConfig(d_in=8, expansion_factor=4)) == 32
    with pytest.raises(UserError, match="neither"):
        sched.n_latents(SAEConfig())
    assert math.isclose(SAEConfig().auxk_alpha, 1 / 32)
    usual = SAEConfig(d_sae=1536)
    assert sched.adam_betas(usual, 976) == (0.9, 1 - 1 / 48)
    assert sched.adam_betas(usual, 10**6) == (0.9, 0.999)
    assert sched.adam_betas(dataclasses.replace(usual, learning_rate=2 * sched.usual_lr(usual)), 976) == (
        0.9,
        1 - 1 / 97,
    )
    assert sched.adam_betas(dataclasses.replace(usual, learning_rate=1e-9), 976) == sched.adam_betas(usual, 976)


def test_settings_that_do_not_go_together():
    for flags, words in (
        (["--tied", "--transcode"], "drop it or --transcode"),
        (["--skip_connection"], "give --transcode too"),
        (["--activation", "relu", "--target_l0", "40", "--l1_coefficient", "1"], "drop --l1_coefficient"),
        (["--target_l0", "40"], "give --k instead"),
        (["--multi_topk", "--activation", "relu"], "--multi_topk is for"),
        (["--p_anneal", "0.5"], "--p_anneal is for"),
        (["--dead_feature_threshold", "5", "--dead_latent_threshold", "0.1"], "choose one of"),
        (["--loss_fn", "kl", "--resample_every", "5"], "whole sequences"),
        (["--loss_fn", "ce", "--activations", "x"], "cannot be combined with --activations"),
        (["--loss_fn", "ce", "--k", "4", "8"], "one value to each flag"),
        (["--batch_size", "4", "--ctx_len", "512"], "--batch_size 2048"),
        (["--layers", "1", "2", "--layer_stride", "2"], "name those you want"),
        (["--l1_coefficient", "1"], "--l1_coefficient is for --activation relu, gated, jumprelu, not topk"),
        (["--bandwidth", "1"], "is for --activation jumprelu"),
        (["--activation", "relu", "--k_decay_steps", "9"], "is for --activation topk"),
        (["--matryoshka_prefixes", "0.5"], "is for --activation matryoshka"),
        (["--fvu_coefficient", "0.5"], "goes with --loss_fn ce or kl"),
        (["--val_split", "0.5"], "goes with --activations"),
        (["--wandb_project", "x"], "goes with --log_to_wandb"),
        (["--text_column", "x"], "goes with a --dataset"),
        (["--streaming"], "goes with a --dataset"),
        (["--hookpoints", "h.1", "--hook_type", "mlp"], "name their places themselves"),
        (["--normalize_activations", "layer_norm", "--transcode"], "cannot be undone"),
        (["--k", "4", "4"], "the same value twice"),
        (["--n_replicas", "8"], "torchrun"),
        (["--load-in-8bit"], "is not a flag here"),
        (["--matryoshka_prefixes", "2", "--activation", "matryoshka"], "parts between 0 and 1"),
        (["--ema", "1"], "such as 0.999"),
        (["--activation", "topk", "relu", "--bandwidth", "1"], "is for --activation jumprelu"),
        (["--d_sae", "512", "--expansion_factor", "8", "16"], "both say how many latents"),
        (["--activation", "groupmax", "--k_decay_steps", "9"], "is for --activation topk, batchtopk"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            from_cli(TrainConfig, flags, replaced=REPLACED).check_idle()
    for flags in (
        ["--activation", "topk", "jumprelu", "--bandwidth", "0.05"],
        ["--activation", "relu", "topk", "--l1_coefficient", "0.1"],
        ["--activations", "acts", "--val_split", "0.2", "--text_column", "t"],
        ["--expansion_factor", "4", "16"],
    ):
        from_cli(TrainConfig, flags).check_idle()


def test_lists_make_variants():
    c = from_cli(TrainConfig, ["--k", "16", "32", "--init_seeds", "0", "1", "--lr", "1e-3"])
    assert c.sweep == {"k": [16, 32], "seed": [0, 1]}
    assert (c.k, c.seed, c.learning_rate) == (16, 0, 1e-3)
    found = variants(c)
    assert list(found) == ["k16_seed0", "k16_seed1", "k32_seed0", "k32_seed1"]
    assert (found["k32_seed1"].k, found["k32_seed1"].seed, found["k32_seed1"].sweep) == (32, 1, {})
    assert list(variants(TrainConfig())) == [""]
    assert from_cli(TrainConfig, ["--init_seeds", "42"]).seed == 42
    assert TrainConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    one = variants(from_cli(TrainConfig, ["--activation", "relu", "topk", "--expansion_factor", "4", "8"]))
    assert list(one) == ["relu_x4", "relu_x8", "topk_x4", "topk_x8"]


SEEDS_FLAGS = """
    k expansion_factor num_latents grad_acc_steps micro_acc_steps ctx_len optimizer lr weight_decay
    dead_feature_threshold dead_percentage_threshold auxk_alpha save_every save_best save_dir run_name resume
    finetune log_to_wandb wandb_log_frequency shuffle_seed init_seeds data_preprocessing_num_proc loss_fn layer
    layers layer_stride hookpoints distribute_modules transcode skip_connection multi_topk k_decay_steps
    exclude_tokens max_tokens batch_size activation hook_type num_activations num_epochs learning_rate output_dir
    l1_coefficient checkpoint model_name dataset_name
""".split()


@pytest.mark.parametrize("flag", [f"--{name}" for name in SEEDS_FLAGS])
def test_every_flag_of_the_documents_this_grew_from_is_taken(flag):
    values = {
        "--layers": ["1", "2"],
        "--init_seeds": ["0", "1"],
        "--exclude_tokens": ["5"],
        "--optimizer": ["sgd"],
        "--loss_fn": ["mse"],
        "--hookpoints": ["h.*.mlp"],
        "--activation": ["groupmax"],
        "--hook_type": ["mlp"],
        "--batch_size": ["64"],
        "--dead_percentage_threshold": ["0.0005"],
        "--num_latents": ["64"],
        "--ctx_len": ["64"],
    }
    twice = "--grad_acc_steps --micro_acc_steps --data_preprocessing_num_proc --layer_stride --num_epochs".split()
    values |= {"--save_best": ["false"], **dict.fromkeys(twice, ["2"])}
    extra = {"--skip_connection": ["--transcode"], "--l1_coefficient": ["--activation", "relu"]}.get(flag, [])
    without = from_cli(TrainConfig, extra, replaced=REPLACED)
    for name in (flag, flag.replace("_", "-")):
        assert from_cli(TrainConfig, [name, *values.get(flag, ["1"]), *extra], replaced=REPLACED) != without


def test_a_place_is_said_once_and_resume_is_not_inherited(tmp_path):
    for flags in (["--layer", "1", "--layers", "2"], ["--layer", "1", "--hookpoints", "h.1"]):
        with pytest.raises(UserError, match="choose one of them"):
            from_cli(TrainConfig, flags)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": TrainConfig(overwrite=True, k=7).to_dict()}))
    assert from_cli(TrainConfig, ["--config", str(path)]) == TrainConfig(k=7)
    path.write_text('{"config": 5}')
    with pytest.raises(UserError, match="json object"):
        from_cli(TrainConfig, ["--config", str(path)])


@pytest.mark.parametrize("fields", [{"activation": "jump"}, {"dtype": "float8"}, {"k": "4"}, {"seed": 10**15}])
def test_configs_made_in_python_are_checked_too(fields):
    ((name, value),) = fields.items()
    with pytest.raises(UserError, match=f"^{name}={value!r}; "):
        SAEConfig(d_in=8, **fields)
