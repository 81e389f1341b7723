"""Dead latents: AuxK against the paper's formula, and which kinds it can serve.

Run: python -m pytest tests/test_dead.py
"""

import pytest
import torch

from sae.config import SAEConfig
from sae.dead import add_gradients_, auxk_loss, copies_of
from sae.learner import Learner
from sae.models import KINDS, create_sae
from tests.conftest import planted
from tests.test_models import ALL, data, make


def auxk(sae, x, wrong, dead, residual=None):
    """The loss, and the copies of weights that its gradients go to."""
    n = int(dead.sum())
    spare = copies_of(sae, dead, max(1, n), n)
    return auxk_loss(sae, x, wrong, dead, spare, sae.config.k, residual), spare


def wrong(sae, x):
    return (sae(x).x_hat - x).detach()


def test_auxk_alone_moves_the_encoder_of_dead_latents_only():
    sae, x = make("topk"), data()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 17]] = True
    value, spare = auxk(sae, x, wrong(sae, x), dead)
    value.backward()
    for weights in (sae.W_dec, sae.encoder, sae.b_enc):
        weights.grad = torch.zeros_like(weights)
    add_gradients_(sae, spare)
    for name in ("encoder", "b_enc"):  # sparsify's fused encoder sent nothing here
        moved = getattr(sae, name).grad.abs().reshape(40, -1).sum(1) > 0
        assert set(moved.nonzero().flatten().tolist()) == {3, 17}, name
    assert sae.b_dec.grad is None  # the residual is a constant, b_dec is not counted twice


@pytest.mark.parametrize(("d_sae", "chosen"), [(40, 1), (200, 3), (600, 5)])  # k of many dead latents, else one in 32
def test_auxk_equals_the_papers_formula(d_sae, chosen):
    sae, x = make("topk", d_sae=d_sae), data()
    dead = torch.rand(d_sae, generator=torch.Generator().manual_seed(2)) < 0.5
    k, got = sae.config.k, auxk(sae, x, wrong(sae, x), dead)[0]
    with torch.no_grad():
        e = x - sae(x).x_hat
        pre = sae.pre_activations(x).masked_fill(~dead, -torch.inf)
        values, indices = pre.topk(chosen)
        f = torch.zeros(64, d_sae).scatter(1, indices, values.relu())
        want = (f @ sae.W_dec - e).square().sum() / e.square().sum() * min(1, int(dead.sum()) / k)
    torch.testing.assert_close(got, want)
    across = wrong(sae, x).t().contiguous().t()  # the same, otherwise laid out
    torch.testing.assert_close(auxk(sae, x, across, dead)[0], want)
    halved = auxk(sae, x, wrong(sae, x), dead, residual=2 * e.square().sum(1).mean())[0]
    torch.testing.assert_close(halved, want / 2)


@pytest.mark.parametrize("activation", ALL)
def test_auxk_of_nothing_is_zero_and_never_nan(activation):
    sae, x = make(activation), data()
    alive = torch.zeros(40, dtype=torch.bool)
    assert auxk(sae, x, wrong(sae, x), alive)[0].item() == 0
    same = torch.ones(8, 12)
    value = auxk(sae, same, wrong(sae, same), ~alive)[0]
    assert torch.isfinite(value)
    one = alive.clone()
    one[0] = True
    value, spare = auxk(sae, x, wrong(sae, x), one)
    value.backward()
    assert all(torch.isfinite(w.grad).all() for w in (spare.encoder, spare.bias, spare.decoder))


def test_auxk_is_for_kinds_whose_dead_latents_still_rank():
    x, _ = planted(64, 16, 32, 3)
    for activation in ALL:
        sae = create_sae(SAEConfig(d_in=16, d_sae=48, k=3, activation=activation))
        one = Learner(sae, sae.config, 10, torch.device("cpu"))
        one.start_from({"": x})
        one.firing.tokens_since_fired += one.firing.dead_after + 1
        one.firing.list_()
        one.learn({"": x}, 0)
        assert (float(one.window.sums["aux"]) > 0) == KINDS[activation].uses_auxk
        assert KINDS[activation].uses_auxk == (activation not in ("relu", "gated"))


@pytest.mark.parametrize("activation", ALL)
def test_auxk_is_pure(activation):
    sae, x = make(activation), data()
    before = {n: p.clone() for n, p in sae.state_dict().items()}
    auxk(sae, x, wrong(sae, x), torch.ones(40, dtype=torch.bool))
    assert all(torch.equal(p, before[n]) for n, p in sae.state_dict().items())
