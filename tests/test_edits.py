"""Edits and conditions as text, and back.

Run: python -m pytest tests/test_edits.py
"""

import pytest

from sae.config import UserError
from sae.edits import Condition, Edit, parse_condition, parse_edit


def test_edits_as_text():
    for text, edit in {
        "123:+8": Edit(123, "add", 8.0),
        "123:-0.5": Edit(123, "add", -0.5),
        "45:=4": Edit(45, "set", 4.0),
        "6:*0": Edit(6, "scale", 0.0),
        "6:|0": Edit(6, "orthogonal", 0.0),
        "6:<2.5": Edit(6, "cap", 2.5),
        "6:+1.5max": Edit(6, "add", 1.5, unit="max"),
        "h.1.mlp/6:=4@generated": Edit(6, "set", 4.0, "h.1.mlp", at="generated"),
        "6:+8@prompt?h.0/7>1.5": Edit(6, "add", 8.0, at="prompt", when=Condition(7, 1.5, "h.0")),
    }.items():
        assert parse_edit(text) == edit
        assert str(edit) == text
        assert parse_edit(str(edit)) == edit
    assert parse_condition("7 > 1.5") == Condition(7, 1.5)
    for bad in (
        "",
        "7",
        "7:8",
        "x:+8",
        "7:+",
        "7:+8@never",
        "7:+8?9",
        "7:*2max",
        "-7:+8",
        "7:+1e99",
        "7:+8 9:+8",
        f"{'9' * 5000}:+8",
    ):
        part = {"7:+8@never": "never", "7:*2max": "max", "7:+1e99": "1e\\+99"}.get(bad, "LATENT:\\+8")
        with pytest.raises(UserError, match=part):
            parse_edit(bad)
    with pytest.raises(UserError, match="LATENT>THRESHOLD"):
        parse_condition("7<3")
