"""Capture and replace hand over the right tensor and are gone afterwards.

Run: python -m pytest tests/test_hooks.py
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from sae import hooks
from sae.config import UserError
from tests.conftest import n_hooks


class Block(nn.Module):
    """Returns a tuple, as HuggingFace blocks do."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, hidden_states):
        return hidden_states + self.mlp(hidden_states), "cache"


class Toy(nn.Module):
    def __init__(self, n=12):
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in range(n))
        self.reached = 0

    def forward(self, x, by_name=False):
        for i, block in enumerate(self.h):
            self.reached = i
            x = block(hidden_states=x)[0] if by_name else block(x)[0]
        return x


@pytest.fixture
def toy():
    return Toy()


@pytest.mark.parametrize("by_name", [False, True])
def test_capture_sees_outputs_and_inputs(toy, by_name):
    x = torch.randn(2, 3, 4)
    with hooks.capture(toy, ["h.1", "h.2@in", "h.2"]) as seen:
        toy(x, by_name)
    assert torch.equal(seen["h.1"], seen["h.2@in"])
    assert not torch.equal(seen["h.1"], seen["h.2"])
    assert not seen["h.1"].requires_grad
    assert n_hooks(toy) == 0


def test_run_stops_after_the_last_hookpoint(toy):
    x = torch.randn(2, 4)
    seen = hooks.run(toy, ["h.3", "h.1"], lambda: toy(x))
    assert set(seen) == {"h.1", "h.3"}
    assert toy.reached == 3
    assert n_hooks(toy) == 0
    with pytest.raises(UserError, match="never reached 'h.3'"):
        hooks.run(toy, ["h.3"], lambda: None)


def test_replace_and_identity(toy):
    x = torch.randn(2, 4)
    plain = toy(x)
    with hooks.replace(toy, {"h.5": lambda y: y, "h.6@in": lambda y: y}):
        assert torch.equal(toy(x), plain)
    with hooks.replace(toy, {"h.11": torch.zeros_like}):
        assert not toy(x).any()
    with hooks.replace(toy, {"h.0@in": torch.zeros_like}):
        assert torch.equal(toy(x, True), toy(torch.zeros_like(x)))
    assert torch.equal(toy(x), plain)


def test_hooks_are_gone_after_exceptions(toy):
    def explode(_):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), hooks.replace(toy, {"h.1": lambda y: y, "h.2": explode}):
        toy(torch.randn(2, 4))
    assert n_hooks(toy) == 0
    # a bad name among good ones leaves nothing behind
    with pytest.raises(UserError, match="did you mean 'h.2'"), hooks.capture(toy, ["h.1", "h.2x"]):
        pass
    assert n_hooks(toy) == 0


def test_what_is_no_tensor_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x):
            return self.part({"x": x})

    odd = Odd()
    with pytest.raises(UserError, match="handles dict"), hooks.capture(odd, ["part"]):
        odd(torch.zeros(1))
    assert n_hooks(odd) == 0


class Pair(NamedTuple):
    x: torch.Tensor
    cache: str


@pytest.mark.parametrize("kind", [tuple, list, Pair])
def test_outputs_keep_their_type(kind):
    class Part(nn.Module):
        def forward(self, x):
            return Pair(x, "cache") if kind is Pair else kind((x, "cache"))

    part = nn.Sequential(Part())
    with hooks.replace(part, {"0": torch.zeros_like}):
        out = part(torch.ones(2, 3))
    assert type(out) is kind
    assert not out[0].any()
    assert out[1] == "cache"


def test_an_input_by_name_is_the_stream_and_not_a_mask():
    class Part(nn.Module):
        def forward(self, *, mask, x):
            return x * mask[:, 0]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            return self.part(mask=torch.ones(2, 1, 1, 1), x=x)

    x = torch.randn(2, 3, 4)
    assert torch.equal(hooks.run(whole := Whole(), ["part@in"], lambda: whole(x))["part@in"], x)


def test_a_module_that_runs_several_times_is_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.part(self.part(x)))

    model, x = Shared(), torch.randn(2, 3, 4)
    hooks.check_once(model, ["last"], lambda: model(x))
    with pytest.raises(UserError, match="runs 'part' 2 times in one forward"):
        hooks.check_once(model, ["last", "part"], lambda: model(x))
    hooks.check_once(model, ["last"], lambda: model(x).no_such_thing)  # what comes behind is not asked for
    assert n_hooks(model) == 0
