"""Configs are frozen, validated, and equal after a round trip through json and flags; a typo names its neighbour.

Run: python -m pytest tests/test_config.py
"""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae import config as cfg
from sae.config import CollectConfig, EvalConfig, SAEConfig, TrainConfig, UserError, VizConfig, from_cli

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
        assert f"--{f.name}" in text
        assert f.metadata["help"][:20] in " ".join(text.split())


@given(
    k=st.integers(1, 64), d_sae=st.integers(64, 512), lr=st.none() | st.floats(1e-6, 1.0),
    hookpoints=st.lists(st.sampled_from(["a.b", "transformer.h.*"]), max_size=2),
    skip=st.booleans(), activation=st.sampled_from(["topk", "relu", "gated"]),
)  # fmt: skip
def test_round_trip_is_exact(k, d_sae, lr, hookpoints, skip, activation):
    config = TrainConfig(
        k=k,
        d_sae=d_sae,
        learning_rate=lr,
        hookpoints=tuple(hookpoints),
        skip_first=skip,
        activation=activation,
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
        (["--k", "many"], "int was wanted"),
        (["--k", "2.5"], "int was wanted"),
        (["--activation", "topkk"], "did you mean 'topk'"),
        (["--k", "0"], "at least 1"),
        (["--d_in", "4", "--expansion_factor", "2", "--k", "9"], "k=9 exceeds d_sae=8"),
        (["--lr", "nan"], "finite"),
        (["--resume", "--overwrite"], "choose one"),
        (["--buffer_tokens", "100"], "two batches"),
        (["--ctx_len", "1"], "at least 2"),
        (["--skip_first", "maybe"], "bool was wanted"),
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
        ({"k": "8"}, "int was wanted"),
        ({"k": True}, "int was wanted"),
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
    lrs = [cfg.lr_at(s, c, 100) for s in range(100)]
    assert 0 < lrs[0] < lrs[5] < lrs[20] == lrs[49] == 1.0
    assert lrs[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(lrs[50:], lrs[51:], strict=False))
    flat = SAEConfig(d_in=8, learning_rate=1.0, warmup_steps=0, decay_fraction=0.0)
    assert {cfg.lr_at(s, flat, 100) for s in range(100)} == {1.0}
    relu = SAEConfig(activation="relu", l1_coefficient=2.0, sparsity_warmup=0.5)
    assert cfg.l1_at(0, relu, 100) == pytest.approx(0.04)
    assert cfg.l1_at(60, relu, 100) == 2.0
    assert cfg.l1_at(0, dataclasses.replace(relu, sparsity_warmup=0.0), 100) == 2.0
    assert cfg.peak_lr(SAEConfig(d_sae=1536 * 4)) == pytest.approx(cfg.peak_lr(SAEConfig(d_sae=1536)) / 2)
    assert cfg.dead_after_tokens(SAEConfig(), 10**12) == 10_000_000
    assert cfg.dead_after_tokens(SAEConfig(dead_feature_threshold=7), 10**12) == 7
    assert cfg.n_latents(SAEConfig(d_in=8, expansion_factor=4)) == 32
    with pytest.raises(UserError, match="neither"):
        cfg.n_latents(SAEConfig())
    assert math.isclose(SAEConfig().auxk_alpha, 1 / 32)


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


@pytest.mark.parametrize("fields", [{"activation": "jump"}, {"dtype": "float16"}, {"k": "4"}, {"seed": 10**15}])
def test_configs_made_in_python_are_checked_too(fields):
    with pytest.raises(UserError):
        SAEConfig(d_in=8, **fields)
