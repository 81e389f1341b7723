"""Every architecture: exact sparsity, right gradients everywhere, AuxK that trains the encoder, a planted dictionary.

Run: python -m pytest tests/test_models.py
"""

import math

import pytest
import torch

from sae.config import SAEConfig, UserError
from sae.models import KINDS, create_sae
from sae.trainer import train_sae_from_activations
from tests.conftest import planted

ALL = sorted(KINDS)


def make(activation, d_in=12, d_sae=40, k=5, **fields):
    return create_sae(SAEConfig(d_in=d_in, d_sae=d_sae, activation=activation, k=k, **fields))


def data(n=64, d=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) + torch.randn(d, generator=g)


def loss(sae, x, **kwargs):
    return sae.loss(x, sae(x), variance=float(x.var(0).sum()), sparsity=0.1, **kwargs)


def test_topk_keeps_at_most_k_and_nothing_negative():
    sae = make("topk", k=30)  # more than half of the latents: some of the kept are negative and must go
    latents = sae.encode(data()).detach()
    assert int((latents != 0).sum(1).max()) <= 30
    assert float(latents.min()) == 0  # the nanochat document's TopK kept negative values
    assert (latents != 0).sum(1).float().mean() < 30
    assert int((make("topk", k=3).encode(data()) != 0).sum(1).min()) == 3


def test_topk_selects_before_relu():
    x = data()
    sae = make("topk", k=4)
    want = sae.pre_activations(x).topk(4).indices.sort(1).values
    got = sae.encode_sparse(x)
    assert torch.equal(got.indices.sort(1).values, want)


@pytest.mark.parametrize("activation", ALL)
def test_encode_decode_agree_with_forward(activation):
    sae, x = make(activation), data()
    out = sae(x)
    torch.testing.assert_close(sae.decode(sae.encode(x)), out.x_hat)
    torch.testing.assert_close(sae.decode_codes(sae.encode_sparse(x)), out.x_hat)
    cube = x.view(4, 16, 12)
    torch.testing.assert_close(sae.encode(cube).view(64, -1), sae.encode(x))
    with pytest.raises(UserError, match="13 wide"):
        sae.encode(torch.zeros(2, 13))


@pytest.mark.parametrize("activation", ALL)
def test_initialisation(activation):
    sae = make(activation)
    torch.testing.assert_close(sae.W_enc.detach(), sae.W_dec.t().detach())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert sae.W_enc.shape == (12, 40)
    assert torch.equal(sae.W_dec, make(activation).W_dec)
    assert not torch.equal(sae.W_dec, make(activation, seed=1).W_dec)


@pytest.mark.parametrize("activation", ALL)
def test_every_parameter_gets_a_gradient(activation):
    sae, x = make(activation), data()
    loss(sae, x).total.backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name  # the nanochat document's gate had none
        assert float(p.grad.abs().sum()) > 0, name


def plain_loss(activation, p, x, k, variance, sparsity):
    """The formulas of the papers, dense, on a dict of float64 parameters."""
    centred = x - p["b_dec"]
    norms = p["W_dec"].norm(dim=1)
    if activation == "topk":
        pre = centred @ p["W_enc"] + p["b_enc"]
        mask = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
        f, penalty, extra = pre.relu() * mask, 0.0, 0.0
    elif activation == "relu":
        f = (centred @ p["W_enc"] + p["b_enc"]).relu()
        penalty, extra = (f * norms).sum(1).mean(), 0.0
    else:
        gate = centred @ p["W_enc"] + p["b_gate"]
        f = (gate > 0) * (centred @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]).relu()
        penalty = (gate.relu() * norms).sum(1).mean()
        extra = (x - gate.relu() @ p["W_dec"].detach() - p["b_dec"].detach()).square().sum(1).mean()
    error = (x - f @ p["W_dec"] - p["b_dec"]).square().sum(1).mean()
    return error / variance + extra / variance + sparsity * penalty / math.sqrt(variance)


@pytest.mark.parametrize("activation", ALL)
def test_loss_and_gradients_equal_the_papers_formula(activation):
    sae, x = make(activation), data()
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    variance = float(x.var(0).sum())
    total = sae.loss(x, sae(x), variance=variance, sparsity=0.1).total
    total.backward()
    exact = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
    want = plain_loss(activation, exact, x.double(), 5, variance, 0.1)
    want.backward()
    assert total.item() == pytest.approx(want.item(), rel=1e-5)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("activation", ALL)
def test_micro_batches_give_the_gradient_of_the_whole_batch(activation):
    x = data()
    whole, parts = make(activation), make(activation)
    variance = float(x.var(0).sum())
    whole.loss(x, whole(x), variance=variance, sparsity=0.1).total.backward()
    for part in x.split(16):
        (parts.loss(part, parts(part), variance=variance, sparsity=0.1).total / 4).backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ALL)
def test_permuting_latents_changes_nothing(activation):
    sae, x = make(activation), data()
    other = make(activation)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in other.named_parameters():
            source = getattr(sae, name)
            p.copy_(source if name == "b_dec" else source[:, order] if name == "W_enc" else source[order])
    torch.testing.assert_close(sae(x).x_hat, other(x).x_hat)
    torch.testing.assert_close(sae.encode(x)[:, order], other.encode(x))


def test_auxk_alone_moves_the_encoder_of_dead_latents_only():
    sae, x = make("topk"), data()
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 17]] = True
    sae.dead_loss(x, sae(x), dead).backward()
    for name in ("W_enc", "b_enc"):  # sparsify's fused encoder sent nothing here
        moved = getattr(sae, name).grad.abs().reshape(-1, 40).sum(0) > 0
        assert set(moved.nonzero().flatten().tolist()) == {3, 17}, name
    assert sae.b_dec.grad is None  # the residual is a constant, b_dec is not counted twice


def test_auxk_equals_the_papers_formula():
    sae, x = make("topk"), data()
    dead = torch.rand(40, generator=torch.Generator().manual_seed(2)) < 0.5
    got = sae.dead_loss(x, sae(x), dead)
    with torch.no_grad():
        e = x - sae(x).x_hat
        pre = sae.pre_activations(x).masked_fill(~dead, -torch.inf)
        values, indices = pre.topk(6)  # D / 2
        f = torch.zeros(64, 40).scatter(1, indices, values.relu())
        want = (f @ sae.W_dec - e).square().sum() / (e - e.mean(0)).square().sum() * min(1, int(dead.sum()) / 6)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", ALL)
def test_auxk_of_nothing_is_zero_and_never_nan(activation):
    sae, x = make(activation), data()
    alive = torch.zeros(40, dtype=torch.bool)
    assert sae.dead_loss(x, sae(x), alive).item() == 0
    same = torch.ones(8, 12)
    value = sae.dead_loss(same, sae(same), ~alive)
    assert torch.isfinite(value)
    one = alive.clone()
    one[0] = True
    value = sae.dead_loss(x, sae(x), one)
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)


def test_unit_norm_decoder_and_projected_gradient():
    sae, x = make("topk"), data()
    loss(sae, x).total.backward()
    sae.project_gradient_()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(40), atol=1e-6, rtol=0)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.renormalize_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    free = make("relu", normalize_decoder=False)
    with torch.no_grad():
        free.W_dec.mul_(3)
    free.renormalize_()
    torch.testing.assert_close(free.W_dec.norm(dim=1), torch.full((40,), 3.0))


@pytest.mark.parametrize("activation", ALL)
def test_scaled_folds_the_scale_away(activation):
    sae, x = make(activation), data()
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1)
    raw = sae.scaled(4.0)
    torch.testing.assert_close(raw(x / 4).x_hat, sae(x).x_hat / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw.encode(x / 4), sae.encode(x) / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ALL)
def test_forward_is_pure(activation):
    sae, x = make(activation), data()
    before = {n: p.clone() for n, p in sae.state_dict().items()}
    loss(sae, x, dead=torch.ones(40, dtype=torch.bool))
    assert all(torch.equal(p, before[n]) for n, p in sae.state_dict().items())
    sae.train()
    trained = sae(x).x_hat
    sae.eval()
    assert torch.equal(trained, sae(x).x_hat)


@pytest.mark.parametrize("activation", ALL)
def test_bfloat16_autocast_is_close_and_trains_every_parameter(activation):
    sae, x = make(activation), data()
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(sae, x)
    assert result.total.item() == pytest.approx(loss(sae, x).total.item(), rel=0.05)
    result.total.backward()
    assert all(float(p.grad.abs().sum()) > 0 and p.grad.dtype == torch.float32 for p in sae.parameters())


RECOVERY = {"topk": {}, "relu": {"l1_coefficient": 0.03}, "gated": {"l1_coefficient": 0.8}}


@pytest.mark.parametrize("activation", ALL)
def test_a_planted_dictionary_is_found(activation):
    x, directions = planted(40_000, 24, 48, 3)
    config = SAEConfig(
        d_in=24, d_sae=96, activation=activation, k=3, batch_size=512, num_epochs=8, learning_rate=3e-3,
        eval_every=10_000, **RECOVERY[activation],
    )  # fmt: skip
    sae, _ = train_sae_from_activations(x, config, verbose=False)
    rows = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    best = (directions @ rows.t()).max(1).values.mean()
    assert float(best) >= 0.95
