"""A plan says what a run takes, from its settings and shapes alone.

Run: python -m pytest tests/test_plan.py
"""

import pytest

from sae import plan
from sae.config import SAEConfig, UserError
from sae.lm import language_model
from sae.models import create_sae
from scripts import sae_collect, sae_train
from tests.conftest import ALL, call


def test_a_plan_starts_nothing(here, base, capsys):
    assert call(sae_train, *base, "--layer", 1, "--plan") == 0
    said = capsys.readouterr().out
    assert "peak per process" in said
    assert "fits" in said
    assert list(here.iterdir()) == []


def test_a_plan_on_collected_pairs(here, base, capsys):
    assert call(sae_collect, *base, "--hookpoints", "transformer.h.*.mlp", "--transcode", "--max_tokens", 300) == 0
    assert call(sae_train, "--activations", "activations/default", "--transcode", "--plan") == 0
    assert "3 SAEs" in capsys.readouterr().out
    named = ["--hookpoints", "transformer.h.1.mlp"]
    assert call(sae_train, "--activations", "activations/default", "--transcode", *named, "--plan") == 0
    assert "1 SAEs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields",
    [*({"activation": kind} for kind in ALL), {"tied": True}, {"transcode": True, "d_out": 9, "skip_connection": True}],
)
def test_parameters_are_those_of_the_sae(fields):
    c = SAEConfig(**{"d_in": 12, "d_sae": 40, "k": 4, **fields})
    assert plan.parameters(c) == sum(p.numel() for p in create_sae(c).parameters())


def test_an_outline_has_the_models_shapes_and_no_weights(gpt_path, lm):
    outline = language_model.outline(gpt_path)
    shapes = {name: p.shape for name, p in outline.module.named_parameters()}
    assert shapes == {name: p.shape for name, p in lm.module.named_parameters()}
    assert all(p.device.type == "meta" for p in outline.module.parameters())
    with pytest.raises(UserError, match="cannot be planned"):
        language_model.outline("nanochat:base")
