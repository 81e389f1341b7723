"""Configs are frozen and validated, and take every flag of the documents that this grew from.

Run: python -m pytest tests/test_config.py
"""

import dataclasses
import json
import re

import pytest

from sae.config import REPLACED, SAEConfig, TrainConfig, UserError, from_cli, variants


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
