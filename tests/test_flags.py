"""Flags and json are made of a config's fields and give it back exactly; a typo names its neighbour.

Run: python -m pytest tests/test_flags.py
"""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        if f.name == "sweep":  # filled by the flags that take several values
            continue
        assert f"--{f.name}" in text
        assert f.metadata["help"][:20] in " ".join(text.split())


@settings(deadline=None)  # a busy machine is no error
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
