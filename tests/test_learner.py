"""One SAE's training step: parts equal the whole, every kind learns, scales, the L0 controller.

Run: python -m pytest tests/test_learner.py
"""

import pytest
import torch

from sae.config import SAEConfig, UserError
from sae.learner import Learner
from sae.models import KINDS, create_sae
from sae.trainer import SAETrainer, train_sae_from_activations
from tests.conftest import ALL, planted

CPU = torch.device("cpu")


def learner(n_steps=50, **fields):
    c = SAEConfig(**{"d_in": 16, "d_sae": 48, "k": 4, "batch_size": 64, **fields})
    return Learner(create_sae(c), c, n_steps, CPU)


def rows(n=256, seed=0):
    return planted(n, 16, 32, 3, seed=seed)[0]


def grads(one):
    return {n: p.grad.clone() for n, p in one.sae.named_parameters()}


@pytest.mark.parametrize(("parts", "k"), [(4, 8), (16, 32)])
def test_a_batch_in_parts_keeps_all_it_should_in_bfloat16(parts, k):
    for seed in range(12):
        how = {"activation": "batchtopk", "dtype": "bfloat16", "micro_acc_steps": parts, "seed": seed}
        c = SAEConfig(d_in=96, d_sae=512, k=k, **how)
        learner = Learner(create_sae(c), c, 100, torch.device("cpu"))
        x = {"": torch.randn(256, 96, generator=torch.Generator().manual_seed(seed))}
        learner.start_from(x)
        learner.learn(x, 0)
        assert k <= float(learner.counts.l0) < k + 0.1  # more, where several are equal at the cut


@pytest.mark.parametrize(
    "parts", [{"grad_acc_steps": 4}, {"micro_acc_steps": 4}, {"grad_acc_steps": 2, "micro_acc_steps": 2}]
)
@pytest.mark.parametrize("activation", ALL)
def test_accumulated_gradients_are_the_whole_batchs(activation, parts):
    """The same to 1e-6, AuxK included, after steps that gave it something to do."""
    x = rows(64 * 4)
    runs = []
    for fields in ({}, parts):
        one = learner(activation=activation, jumprelu_penalty="quadratic", dead_feature_threshold=1, **fields)
        one.start_from({"": x})
        with torch.no_grad():
            for name, p in one.sae.named_parameters():
                if name in ("b_enc", "b_gate"):
                    p[:16] = -100.0  # dead
        one.learn({"": x}, 0)
        one.update(0)
        one.firing.list_()
        with torch.no_grad():
            for name, p in one.sae.named_parameters():
                if name in ("b_enc", "b_gate"):
                    p[:16] = 0.0
        one.learn({"": x}, 1)
        runs.append((grads(one), one))
    a, b = runs
    if KINDS[activation].uses_auxk:
        assert a[1].firing.n_dead > 0 and float(a[1].window.sums["aux"]) > 0
    for name, g in a[0].items():
        scale = max(1e-3, float(g.abs().max()))
        assert float((g - b[0][name]).abs().max()) <= 1e-6 * max(1.0, scale) + 2e-6 * scale, name
    assert torch.equal(a[1].firing.tokens_since_fired, b[1].firing.tokens_since_fired)
    torch.testing.assert_close(a[1].window.sums["loss"], b[1].window.sums["loss"])


# Bounds on FVU below: the worst of three seeds of data and weights as measured, plus 20% of it.


@pytest.mark.parametrize("how", ["unit", "none", "expected_norm", "layer_norm"])
def test_a_finished_sae_takes_raw_activations(how):
    x = 30 * rows(2000) + 50
    c = SAEConfig(d_in=16, d_sae=64, k=8, batch_size=400, normalize_activations=how, num_epochs=12, learning_rate=3e-3)
    sae, t = train_sae_from_activations(x, c, verbose=False)
    inner = next(iter(t.learners.values()))
    z, _ = inner.normalise(x, x)
    if how == "unit":
        assert float((z - z.mean(0)).square().mean()) == pytest.approx(1, rel=0.05)
    if how == "expected_norm":
        assert float(z.norm(dim=1).mean()) == pytest.approx(4, rel=0.05)
    if how == "layer_norm":
        assert float(z.std(1).mean()) == pytest.approx(1, rel=1e-3)
    assert sae.layer_norm == (how == "layer_norm")
    x_hat = sae(x).x_hat.detach()
    fvu = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu < (0.156 if how == "layer_norm" else 0.175)


def test_a_transcoder_predicts_raw_targets():
    x = rows(4000)
    y = 7 * (x.relu() @ torch.randn(16, 9, generator=torch.Generator().manual_seed(0))) + 3
    for fields, bound in (({}, 0.226), ({"skip_connection": True}, 0.162)):
        c = SAEConfig(d_sae=96, k=8, transcode=True, batch_size=100, num_epochs=4, learning_rate=3e-3, **fields)
        sae, t = train_sae_from_activations(x, c, targets=y, verbose=False)
        fvu = float((y - sae(x).x_hat.detach()).square().sum() / (y - y.mean(0)).square().sum())
        assert fvu < bound
        assert t.val_losses[-1]["fvu"] == pytest.approx(fvu, abs=0.04)
    with pytest.raises(UserError, match="go together"):
        train_sae_from_activations(x, SAEConfig(transcode=True), verbose=False)


@pytest.mark.parametrize("activation", ["relu", "gated", "jumprelu"])
def test_target_l0_is_reached(activation):
    x, _ = planted(30_000, 16, 32, 3)
    c = SAEConfig(
        d_in=16,
        d_sae=64,
        activation=activation,
        target_l0=6,
        batch_size=128,
        num_epochs=3,
        learning_rate=2e-3,
        eval_every=10_000,
    )
    _, t = train_sae_from_activations(x, c, verbose=False)
    assert t.val_losses[-1]["l0"] == pytest.approx(6, rel=0.05)


@pytest.mark.parametrize("activation", ["relu", "gated", "jumprelu"])
def test_the_best_model_is_not_the_one_of_the_smallest_penalty(activation):
    one = learner(activation=activation)
    one.start_from({"": rows()})
    before = one.validate({"": rows(seed=1)})["total_loss"]
    one.log_weight = one.log_weight + 1.0  # as the controller of L0 moves it
    assert one.validate({"": rows(seed=1)})["total_loss"] == before


def test_learning_does_not_depend_on_when_the_log_is_written():
    weights = []
    for every in (1, 10_000):
        one, x = learner(dead_feature_threshold=100), rows()
        one.start_from({"": x})
        with torch.no_grad():
            one.sae.b_enc[:10] = -100.0
        for step in range(30):
            one.learn({"": x}, step)
            one.update(step)
            if (step + 1) % every == 0:
                one.read_window()
        assert one.firing.n_dead >= 10
        weights.append(one.sae.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_k_decay_ends_at_the_saved_k():
    c = SAEConfig(d_in=16, d_sae=48, k=4, batch_size=64, k_decay_steps=10, eval_every=10_000)
    _, t = train_sae_from_activations(rows(64 * 30), c, verbose=False)
    assert t.sae.config.k == 4
    one = t.learners[""]
    assert int(one.sae(rows(10)).codes.activity(one.sae.d_sae)[0].max()) <= 4
    assert one.terms(0, rows(10), [rows(10)]).k == 16
    assert one.terms(10, rows(10), [rows(10)]).k == 4


def test_finetuning_starts_where_the_other_ended():
    x = 20 * rows(64 * 40) + 5
    c = SAEConfig(d_in=16, d_sae=48, activation="jumprelu", k=4, batch_size=64)
    sae, _ = train_sae_from_activations(x, c, verbose=False)
    t = SAETrainer(sae.train(), c, x, x[:500], pretrained=True)
    one = t.learners[""]
    want = sae.scaled(1.0).eval()(x[:500]).x_hat
    one.start_from(t.stream.sample(), pretrained=True)
    torch.testing.assert_close(one.finished()(x[:500]).x_hat, want, rtol=1e-3, atol=1e-2)


LEARNS = {  # kind: bound on FVU as it comes, and tied
    "abstopk": (0.133, 0.532),
    "batchtopk": (0.109, 0.349),
    "gated": (0.16, 0.468),
    "groupmax": (0.185, 0.297),
    "jumprelu": (0.278, 0.34),
    "matryoshka": (0.189, 0.356),
    "relu": (0.251, 0.614),
    "topk": (0.098, 0.309),
}
WAYS = [(kind, {}, bound) for kind, (bound, _) in LEARNS.items()]
WAYS += [(kind, {"tied": True, "learning_rate": 2e-3}, bound) for kind, (_, bound) in LEARNS.items()]
WAYS += [("topk", {"multi_topk": True}, 0.111)]


def test_every_kind_has_a_bound():
    assert set(LEARNS) == set(ALL)


@pytest.mark.parametrize(("activation", "fields", "bound"), WAYS)
def test_every_kind_learns_also_tied_and_with_multi_topk(activation, fields, bound):
    c = SAEConfig(d_in=16, d_sae=64, activation=activation, k=4, batch_size=64, num_epochs=4, **fields)
    sae, t = train_sae_from_activations(rows(64 * 100), c, verbose=False)
    assert t.val_losses[-1]["fvu"] < bound
    assert t.val_losses[-1]["l0"] == pytest.approx(4, rel=0.2)
    if "tied" in fields:
        assert "encoder" not in dict(sae.named_parameters())
        assert torch.equal(sae.W_enc, sae.W_dec.t())
