"""Globs, layers and TransformerLens names mean the hookpoints that DESIGN.md says; SAEs have one name.

Run: python -m pytest tests/test_hookpoints.py
"""

import pytest
from torch import nn

from sae import hooks
from sae.config import UserError
from sae.hookpoints import SAEName, at_layer, places, resolve
from tests.test_hooks import Toy


@pytest.fixture
def toy():
    return Toy()


def test_resolution(toy, lm):
    assert resolve(toy) == ["h.10"]
    assert resolve(toy, layers=[2, 11, 2]) == ["h.2", "h.11"]
    assert resolve(toy, hookpoints=["h.*.mlp"]) == [f"h.{i}.mlp" for i in range(12)]  # natural order
    assert resolve(toy, hookpoints=["h.1?", "h.1", "h.1"]) == ["h.1", "h.10", "h.11"]  # each once
    assert resolve(toy, hookpoints=["h.3@in"]) == ["h.3@in"]
    assert resolve(toy, layers=[3], hook_type="resid_pre") == ["h.3@in"]
    gpt = lm.module
    place = lambda kind: resolve(gpt, layers=[1], hook_type=kind)[0]
    assert place("resid_post") == "transformer.h.1"
    assert place("resid_mid") == "transformer.h.1.ln_2@in"
    assert place("attn") == "transformer.h.1.attn"
    assert place("mlp") == "transformer.h.1.mlp"
    assert place("mlp_post_act") == "transformer.h.1.mlp.c_proj@in"
    assert resolve(gpt, hookpoints=["h.1.mlp"]) == ["transformer.h.1.mlp"]  # sparsify's spelling
    for alias, kind in (
        ("hook_resid_post", "resid_post"),
        ("hook_resid_pre", "resid_pre"),
        ("hook_resid_mid", "resid_mid"),
        ("hook_attn_out", "attn"),
        ("hook_mlp_out", "mlp"),
        ("mlp.hook_post", "mlp_post_act"),
    ):
        assert resolve(gpt, hookpoints=[f"blocks.1.{alias}"]) == [place(kind)]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"layers": [12]}, "layer 12 was asked for and the model has 12; choose 0 to 11"),
        ({"layers": [-1]}, "choose 0 to 11"),
        ({"layers": [0], "hook_type": "attn"}, "no place known as attn"),
        ({"layers": [0], "hook_type": "nonsense"}, "is not one of"),
        ({"hookpoints": ["h.3.mlpp"]}, "matches no module; did you mean 'h.3.mlp'"),
        ({"hookpoints": ["h.3@out"]}, "only '@in'"),
        ({"hookpoints": ["blocks.40.hook_mlp"]}, "layer 40"),
        ({"hookpoints": ["h.1"], "layers": [1]}, "give one of them"),
    ],
)
def test_bad_hookpoints_are_one_sentence(toy, kwargs, words):
    with pytest.raises(UserError) as e:
        resolve(toy, **kwargs)
    assert words in str(e.value)
    with pytest.raises(UserError, match="no nn.ModuleList"):
        resolve(nn.Linear(2, 2))


def test_names_of_saes_and_of_the_places_they_read_and_write():
    for text in ("transformer.h.3", "transformer.h.3/k32_seed1"):
        assert str(SAEName.parse(text)) == text
    assert SAEName.parse("h.3/k32") == ("h.3", "k32")
    assert places("h.3.mlp", transcode=True) == ("h.3.mlp@in", "h.3.mlp")
    assert places("h.3.mlp", transcode=False) == ("h.3.mlp", "h.3.mlp")
    assert hooks.at_layer is at_layer and hooks.resolve is resolve  # the names that hooks.py had first
