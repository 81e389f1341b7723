"""Every architecture: exact sparsity, right gradients everywhere, a planted dictionary.

Run: python -m pytest tests/test_models.py
"""

import math

import pytest
import torch

from sae.config import SAEConfig, UserError
from sae.kernels import selection
from sae.learner import start_from_
from sae.models import create_sae
from sae.trainer import train_sae_from_activations
from tests.conftest import ALL, planted


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
def test_every_parameter_gets_a_gradient(activation):
    sae, x = make(activation), data()
    loss(sae, x).total.backward()
    for name, p in sae.named_parameters():
        assert p.grad is not None, name  # the nanochat document's gate had none
        assert float(p.grad.abs().sum()) > 0, name


def chosen(activation, pre, k):
    """0/1 mask of the latents a kind keeps, from the definition."""
    flat = torch.zeros_like(pre)
    if activation in ("batchtopk", "matryoshka"):
        return flat.view(-1).scatter(0, pre.flatten().topk(k * len(pre)).indices, 1.0).view_as(pre)
    if activation == "groupmax":
        groups = pre.view(len(pre), k, -1)
        return (groups == groups.max(-1, keepdim=True).values).to(pre.dtype).view_as(pre)
    return flat.scatter(1, (pre.abs() if activation == "abstopk" else pre).topk(k).indices, 1.0)


def smooth_step(z, bandwidth):
    """A function with the value of the step at z and the gradient of the ramp of that width."""
    ramp = (z / bandwidth + 0.5).clamp(0, 1)
    return (z > 0).to(z.dtype) + ramp - ramp.detach()


def plain_loss(c, p, x, y, variance, sparsity):
    """The formulas of the papers, dense, on a dict of float64 parameters."""
    centred = x if c.transcode else x - p["b_dec"]
    W_enc = (p["W_dec"] if c.tied else p["encoder"]).t()
    norms = p["W_dec"].norm(dim=1)
    skip = x @ p["W_skip"].t() if c.skip_connection else 0.0
    out = lambda f: f @ p["W_dec"] + p["b_dec"] + skip
    error = lambda f: (y - out(f)).square().sum(1).mean()
    penalty, extra = torch.zeros(()), torch.zeros(())
    pre = centred @ W_enc + p.get("b_enc", p.get("b_gate"))
    root = math.sqrt(c.d_in)
    if c.activation == "relu":
        f = pre.relu()
        penalty = (f * norms / root).sum(1).mean()
    elif c.activation == "gated":
        f = (pre > 0) * (centred @ (W_enc * p["r_mag"].exp()) + p["b_mag"]).relu()
        penalty = (pre.relu() * norms / root).sum(1).mean()
        frozen = x @ p["W_skip"].detach().t() if c.skip_connection else 0.0
        extra = (y - pre.relu() @ p["W_dec"].detach() - p["b_dec"].detach() - frozen).square().sum(1).mean()
    elif c.activation == "jumprelu":
        theta = p["threshold"]
        passed = (pre > theta).to(pre.dtype)
        # value pre * H(pre - theta); gradient: H to pre, and -(theta / eps) in the window to theta
        gate = smooth_step(pre.detach() - theta, c.bandwidth)
        f = pre.relu() * passed + theta.detach() * (gate - gate.detach())
        l0 = smooth_step(pre.detach() - theta, c.bandwidth).sum(1).mean()
        penalty = {
            "step": l0,
            "tanh": torch.tanh(4 * f * norms / root).sum(1).mean(),
            "quadratic": (l0 / c.k - 1) ** 2,
        }[c.jumprelu_penalty]
    else:
        mask = chosen(c.activation, pre, c.k)
        f = pre * mask if c.activation == "abstopk" else pre.relu() * mask
        if c.multi_topk:
            extra = error(pre.relu() * chosen("topk", pre, 4 * c.k)) / 8
        if c.activation == "matryoshka":
            sizes = [round(part * c.d_sae) for part in c.matryoshka_prefixes]
            extra = sum(error(f * (torch.arange(c.d_sae) < n)) for n in sizes)
    return error(f) / variance + extra / variance + sparsity * penalty


CASES = [
    *({"activation": a} for a in ALL),
    *({"activation": a, "transcode": True, "d_out": 9} for a in ALL),
    *({"activation": a, "transcode": True, "skip_connection": True, "d_out": 9} for a in ALL),
    *({"activation": a, "tied": True} for a in ALL),
    *({"activation": "jumprelu", "jumprelu_penalty": p} for p in ("tanh", "quadratic")),
    {"activation": "topk", "multi_topk": True},
    {"activation": "relu", "l1_weighting": "decoder", "normalize_decoder": False},
]
name_of = lambda case: "-".join(str(v) if v is not True else k for k, v in case.items())


def shaken(case, seed=1):
    """An SAE whose parameters are all away from their start."""
    sae = make(**case)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.add_((0.5 if name == "threshold" else 0.05) * torch.rand(p.shape, generator=g))
            if case.get("transcode") and name == "W_dec":
                p.add_(torch.randn(p.shape, generator=g))
    return sae


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_and_gradients_equal_the_papers_formula(case):
    sae, x = shaken({**case, "bandwidth": 0.7}), data()
    y = data(d=9, seed=5) if sae.config.transcode else x
    variance = float(y.var(0).sum())
    total = sae.loss(x, sae(x), y=y, variance=variance, sparsity=0.1).total
    total.backward()
    exact = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
    want = plain_loss(sae.config, exact, x.double(), y.double(), variance, 0.1)
    want.backward()
    assert total.item() == pytest.approx(want.item(), rel=1e-5)
    for name, p in sae.named_parameters():
        scale = float(exact[name].grad.abs().max())
        error = float((p.grad.double() - exact[name].grad).abs().max())
        assert error <= 1e-5 * max(scale, 1e-3), (name, error, scale)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_permuting_latents_permutes_gradients(case):
    sae, x = shaken(case), data()
    y = data(d=9, seed=5) if sae.config.transcode else None
    other = make(**case)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(40, generator=g)
    if case["activation"] == "groupmax":  # within a group; groups are told apart by place
        order = torch.cat([8 * i + torch.randperm(8, generator=g) for i in range(5)])
    if case["activation"] == "matryoshka":  # within what lies between two prefixes
        cuts = [0, *sae.prefixes(), 40]
        order = torch.cat([a + torch.randperm(b - a, generator=g) for a, b in zip(cuts, cuts[1:], strict=False)])
    by = lambda name, t: t if name in ("b_dec", "W_skip") else t[order]
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(by(name, getattr(sae, name)))
    for one in (sae, other):
        one.loss(x, one(x), y=y, variance=7.0, sparsity=0.1).total.backward()
    torch.testing.assert_close(sae(x).x_hat, other(x).x_hat)
    torch.testing.assert_close(sae(x).codes.dense(40)[:, order], other(x).codes.dense(40))
    for name, p in other.named_parameters():
        torch.testing.assert_close(p.grad, by(name, getattr(sae, name).grad), msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_micro_batches_give_the_gradient_of_the_whole_batch(case):
    x = data()
    whole, parts = shaken(case), shaken(case)
    y = data(d=9, seed=5) if whole.config.transcode else x
    whole.loss(x, whole(x), y=y, variance=7.0, sparsity=0.1).total.backward()
    seen = parts.survey(list(x.split(16)))
    for part, target in zip(x.split(16), y.split(16), strict=True):
        out = parts(part, whole=seen)
        (parts.loss(part, out, y=target, variance=7.0, sparsity=0.1, whole=seen).total / 4).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("k", "wide"), [(2, 8), (4, 16), (30, 40)])  # 30: while k is annealed
def test_multi_topk_takes_both_reconstructions_from_one_choice(k, wide, monkeypatch):
    sae, x = make("topk", multi_topk=True), data()
    want = make("topk").codes(x, k=k)[0].dense(40), make("topk").codes(x, k=wide)[0].dense(40)
    calls, choose = [], selection.choose_top_k
    monkeypatch.setattr(selection, "choose_top_k", lambda *a, **kw: calls.append(a[3]) or choose(*a, **kw))
    out = sae(x, k=k)
    loss = sae.loss(x, out, variance=1.0)
    assert calls == [wide]
    torch.testing.assert_close(out.codes.dense(40), want[0])
    torch.testing.assert_close(out.source.dense(40), want[1])
    torch.testing.assert_close(loss.extra, (sae.decode(want[1]) - x).square().sum(1).mean() / 8)
    later = make("topk", multi_topk=True).eval()  # there one choice serves forward, which needs no other
    later_loss = later.loss(x, later(x), variance=1.0)
    trained = make("topk", multi_topk=True)
    torch.testing.assert_close(trained.loss(x, trained(x), variance=1.0).extra, later_loss.extra)


@pytest.mark.parametrize("activation", ["batchtopk", "matryoshka"])
def test_batch_topk_learns_the_threshold_that_it_uses_later(activation):
    sae, x = make(activation), data(4096)
    kept = sae(x).codes
    assert int((kept.values != 0).sum()) == 5 * 4096  # exactly k per token on average, any number for each
    assert kept.activity(sae.d_sae)[0].float().std() > 0.5
    for step, part in enumerate(x.split(256)):
        before = sae.threshold.clone()
        out = sae(part)
        assert torch.equal(before, sae.threshold)
        sae.observe_(out, step)
    assert len(set(sae.threshold.tolist())) == 1
    sae.eval()
    assert float(sae(x[:2048]).codes.activity(sae.d_sae)[0].float().mean()) == pytest.approx(5, rel=0.05)
    alone = sae(x[:1]).codes.dense(40)
    torch.testing.assert_close(alone, sae(x).codes.dense(40)[:1])  # inference does not depend on the batch


def test_abstopk_keeps_signs():
    sae, x = make("abstopk"), data()
    latents = sae.encode(x).detach()
    assert float(latents.min()) < 0 < float(latents.max())
    want = sae.pre_activations(x).abs().topk(5).indices.sort(1).values
    assert torch.equal(sae.encode_sparse(x).indices.sort(1).values, want)


def test_groupmax_takes_one_of_each_group():
    latents = make("groupmax").encode(data())
    assert int((latents.view(64, 5, 8) != 0).sum(2).max()) == 1
    with pytest.raises(UserError, match="no multiple of k"):
        make("groupmax", d_sae=41)


def test_matryoshka_prefixes_reconstruct_on_their_own():
    sae, x = make("matryoshka", matryoshka_prefixes=(0.25, 0.5)), data()
    assert sae.prefixes() == [10, 20]
    codes = sae(x).codes
    dense = codes.dense(40)
    torch.testing.assert_close(sae.partial(codes, 10), dense[:, :10] @ sae.W_dec[:10] + sae.b_dec)
    base = make("matryoshka", matryoshka_base="topk")
    assert int(base(x).codes.activity(base.d_sae)[0].max()) <= 5


def test_starting_biases():
    x = torch.cat([data(200), 1000 + torch.zeros(3, 12)])  # three outliers far away
    start = lambda **f: make("topk", **f)
    mean, median, zeros = (start(b_dec_init=how) for how in ("mean", "geometric_median", "zeros"))
    for sae in (mean, median, zeros):
        start_from_(sae, x, x)
    torch.testing.assert_close(mean.b_dec.detach(), x.mean(0))
    far = lambda sae: float((sae.b_dec.detach() - data(200).mean(0)).norm())
    assert far(median) < 0.1 * far(mean)
    assert not zeros.b_dec.any()


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "abstopk", "groupmax", "matryoshka"])
def test_the_encoder_starts_as_long_as_errs_least(activation):
    x, sae, plain = data(), make(activation), make(activation, scale_encoder=False)
    error = lambda one: float((one(x).x_hat.detach() - x).square().sum())
    for one in (sae, plain):
        start_from_(one, x, x)
        one.train()
    torch.testing.assert_close(plain.W_enc.norm(dim=0), torch.ones(40))
    lengths = sae.W_enc.detach().norm(dim=0)
    torch.testing.assert_close(lengths, lengths[:1].expand(40))
    least = error(sae)
    assert least < error(plain)
    for by in (0.9, 1.1):
        with torch.no_grad():
            sae.W_enc.mul_(by)
            assert error(sae) > least
            sae.W_enc.div_(by)
    tied = make(activation, tied=True)
    start_from_(tied, x, x)
    torch.testing.assert_close(tied.W_dec.norm(dim=1), torch.ones(40))


def test_kinds_with_a_penalty_start_as_sparse_as_asked():
    x = data(1000)
    for activation in ("relu", "gated", "jumprelu"):
        sae = make(activation)
        start_from_(sae, x, x)
        assert float(sae(x).codes.activity(sae.d_sae)[0].float().mean()) == pytest.approx(5, rel=0.01)
        dense = make(activation, l1_coefficient=0.1)
        start_from_(dense, x, x)
        assert (
            float(dense(x).codes.activity(dense.d_sae)[0].float().mean()) > 10
        )  # a weight of one's own: nothing is steered


@pytest.mark.parametrize("activation", ALL)
def test_bfloat16_autocast_is_close_and_trains_every_parameter(activation):
    sae, x = make(activation), data()
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(sae, x)
    assert result.total.item() == pytest.approx(loss(sae, x).total.item(), rel=0.05)
    result.total.backward()
    assert all(float(p.grad.abs().sum()) > 0 and p.grad.dtype == torch.float32 for p in sae.parameters())


RECOVERY = {"matryoshka": {"matryoshka_prefixes": (0.5,)}}


@pytest.mark.parametrize("activation", ALL)
def test_a_planted_dictionary_is_found(activation):
    signed = activation == "abstopk"  # what it is for: of activations of one sign it makes pairs
    x, directions = planted(40_000, 24, 48, 3, signed=signed)
    config = SAEConfig(
        **{"d_in": 24, "d_sae": 96, "activation": activation, "k": 3, "batch_size": 512, "num_epochs": 8}
        | {"learning_rate": 3e-3, "eval_every": 10_000}
        | RECOVERY.get(activation, {})
    )
    sae, _ = train_sae_from_activations(x, config, verbose=False)
    rows = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    cosines = directions @ rows.t()
    best = (cosines.abs() if signed else cosines).max(1).values.mean()
    assert float(best) >= 0.95, float(best)
    start = create_sae(sae.config).W_dec.detach()
    assert float((directions @ start.t()).max(1).values.mean()) < 0.7  # it was not there from the start
