"""Dead latents: who is dead, AuxK against the paper's formula, resampling.

Run: python -m pytest tests/test_dead.py
"""

import pytest
import torch

from sae.config import SAEConfig
from sae.dead import Spare, add_gradients_, auxk_loss, copies_of
from sae.learner import Learner
from sae.models import KINDS, create_sae
from tests.conftest import ALL, planted
from tests.test_learner import learner, rows
from tests.test_models import data, make
from tests.test_trainer import config, trainer


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


def test_dead_by_tokens_by_share_and_by_rate():
    x = rows(64)
    for fields in (
        {"dead_feature_threshold": 200},
        {"dead_latent_threshold": 1e-3},
        {"dead_percentage_threshold": 0.05},
    ):
        one = learner(n_steps=300, **fields)
        one.start_from({"": x})
        with torch.no_grad():
            one.sae.b_enc[:10] = -100.0
        for _ in range(150 if "dead_feature_threshold" not in fields else 4):
            one.learn({"": x}, 0)
            one.update(0)
            with torch.no_grad():
                one.sae.b_enc[:10] = -100.0
        assert one.firing.is_dead()[:10].all(), fields
        assert not one.firing.is_dead()[one.firing.tokens_since_fired == 0].any(), fields
    assert float(one.firing.rate[:10].max()) < 0.05 * 4 / 48


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "gated"])
def test_resampling_points_dead_latents_at_bad_tokens_and_resets_their_moments(activation):
    x = rows(512)
    one = learner(activation=activation, dead_feature_threshold=100, ema=0.9)
    one.start_from({"": x})
    bias = "b_gate" if activation == "gated" else "b_enc"
    with torch.no_grad():
        getattr(one.sae, bias)[:6] = -100.0
    for step in range(3):
        one.learn({"": x[:64]}, step)
        one.update(step)
    alive = {n: p.detach().clone() for n, p in one.sae.named_parameters()}
    dead = one.firing.is_dead().nonzero()[:, 0].tolist()
    assert set(range(6)) <= set(dead) and len(dead) < 48
    assert one.resample({"": x}, torch.Generator().manual_seed(0)) == len(dead)
    left = [i for i in range(48) if i not in dead]
    sae = one.sae
    torch.testing.assert_close(sae.W_dec[dead].norm(dim=1), torch.ones(len(dead)))
    ratio = sae.encoder[dead].norm(dim=1) / alive["encoder"][left].norm(dim=1).mean()
    torch.testing.assert_close(ratio, torch.full((len(dead),), 1.0 if KINDS[activation].uses_auxk else 0.2))
    for name, p in sae.named_parameters():
        if name in ("b_dec",):
            assert torch.equal(p, alive[name])
            continue
        assert torch.equal(p[left], alive[name][left]), name
        moments = [m for m in one.optimizer.parts[0].state[p].values() if m.shape == p.shape]
        assert len(moments) == 2
        assert all(float(m[dead].abs().max()) == 0 for m in moments), name
    assert not one.firing.is_dead()[dead].any()
    assert torch.equal(one.deployable().b_dec, one.optimizer.average["b_dec"] / (1 - 0.9**3))
    one.learn({"": x}, 3)
    fired = one.firing.tokens_since_fired[dead] == 0
    assert fired.float().mean() > 0.5  # random kaiming columns of the wrong size, as elsewhere, would not


def test_dead_jumprelu_latents_fire_again():
    """Nothing else lowers the threshold of a latent that no token comes near."""
    c = SAEConfig(d_in=16, d_sae=64, k=4, activation="jumprelu", auxk_alpha=0.0, dead_feature_threshold=64)
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    learner = Learner(create_sae(c), c, 400, torch.device("cpu"))
    learner.start_from({"": x})
    with torch.no_grad():
        learner.sae.threshold[:32] += 5.0
    out_of_reach = learner.sae(learner.normalise(x, x)[0]).codes.dense(64)[:, :32]
    assert not out_of_reach.any()
    for step in range(400):
        learner.learn({"": x[step % 4 :: 4]}, step)
        learner.update(step)
        learner.firing.list_()  # as the log does now and then
    assert learner.window.totals.fired[:32].count_nonzero() >= 30
    before = learner.sae.threshold.clone()
    learner.sae.revive_(torch.arange(64) < 10)
    assert (learner.sae.threshold < before).nonzero()[:, 0].tolist() == list(range(10))


@pytest.mark.parametrize("how", [{}, {"tied": True}, {"transcode": True}, {"activation": "batchtopk"}])
def test_auxk_through_copies_of_the_dead_gives_the_gradient_of_the_whole(how):
    c = SAEConfig(d_in=12, d_sae=48, k=4, **how)
    learner = Learner(create_sae(c), c, 100, torch.device("cpu"))
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    acts = {"": x, "@in": x.flip(1)}
    learner.start_from(acts)
    with torch.no_grad():
        learner.sae.W_dec[:] = torch.randn(48, 12, generator=torch.Generator().manual_seed(1))
    learner.firing.tokens_since_fired[:20] = learner.firing.dead_after + 1
    dead = learner.firing.is_dead()
    assert int(dead.sum()) == 20
    learner.firing.list_()

    x_in, y = learner.normalise(acts[learner.reads], acts[""])
    sae, ids = learner.sae, torch.arange(20)
    direct = Spare(ids, dead[ids], sae.encoder_rows[ids], sae.encoder_bias[ids], sae.W_dec[ids], 20)
    losses = learner.forward(x_in, y, learner.terms(0, y, [x_in])._replace(spare=direct))[1]
    assert losses.aux.detach() > 0
    losses.total.backward()
    want = {name: p.grad.clone() for name, p in learner.sae.named_parameters()}
    learner.sae.zero_grad()
    learner.learn(acts, 0)
    add_gradients_(learner.sae, learner.spare)
    for name, p in learner.sae.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6, msg=name)
    assert float(want["b_enc"][:20].abs().sum()) > 0


def test_dead_latents_are_counted_and_revived():
    c = config(dead_feature_threshold=200, log_every=1)
    t = trainer(c, n=64 * 60)
    learner = t.learners[""]
    learner.start_from(t.stream.sample())
    with torch.no_grad():
        learner.sae.b_enc[:20] = -100.0  # cannot fire
    encoder = learner.sae.W_enc[:, :20].detach().clone()
    for step in range(12):
        learner.learn(next(t.stream), step)
        learner.update(step)
        learner.firing.list_()
        if step == 2:
            assert learner.firing.n_dead == 0  # 192 tokens are not yet over the threshold
    assert learner.firing.n_dead >= 20
    assert int(learner.firing.tokens_since_fired[0]) == 12 * 64
    with torch.no_grad():
        learner.sae.b_enc[:20] = 0.0  # they may be chosen now: AuxK shapes them
    learner.learn(next(t.stream), 12)
    learner.update(12)
    assert not torch.equal(learner.sae.W_enc[:, :20], encoder)
