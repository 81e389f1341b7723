"""One SAE's training step: parts equal the whole, dead latents, resampling, averages, scales, the L0 controller.

Run: python -m pytest tests/test_learner.py
"""

import copy
import math

import pytest
import torch

from sae.config import SAEConfig, UserError
from sae.dead import Spare, add_gradients_
from sae.kernels import native
from sae.learner import Learner
from sae.models import KINDS, create_sae
from sae.optim import Adam, clip_gradients_
from sae.trainer import SAETrainer, train_sae_from_activations
from tests.conftest import planted

ALL = sorted(KINDS)
CPU = torch.device("cpu")


def learner(n_steps=50, **fields):
    c = SAEConfig(**{"d_in": 16, "d_sae": 48, "k": 4, "batch_size": 64, **fields})
    return Learner(create_sae(c), c, n_steps, CPU)


def data(n=256, seed=0):
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
    x = data(64 * 4)
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
    x = 30 * data(2000) + 50
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
    x = data(4000)
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
    one.start_from({"": data()})
    before = one.validate({"": data(seed=1)})["total_loss"]
    one.log_weight = one.log_weight + 1.0  # as the controller of L0 moves it
    assert one.validate({"": data(seed=1)})["total_loss"] == before


def test_learning_does_not_depend_on_when_the_log_is_written():
    weights = []
    for every in (1, 10_000):
        one, x = learner(dead_feature_threshold=100), data()
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


def test_dead_by_tokens_by_share_and_by_rate():
    x = data(64)
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
    x = data(512)
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


def test_ema_is_bias_corrected_and_saved():
    x = data(64)
    one = learner(ema=0.9, warmup_steps=0, normalize_decoder=False)
    one.start_from({"": x})
    history = []
    for step in range(5):
        one.learn({"": x}, step)
        one.update(step)
        history.append(one.sae.W_dec.detach().clone())
    weights = torch.tensor([0.9 ** (4 - i) for i in range(5)])
    want = sum(w * h for w, h in zip(weights, history, strict=True)) / weights.sum()
    torch.testing.assert_close(one.deployable().W_dec.detach(), want)
    assert not torch.equal(one.sae.W_dec, one.deployable().W_dec)
    torch.testing.assert_close(one.finished().W_dec.detach(), want)


@pytest.mark.parametrize(("optimizer", "bound"), [("adam", 0.118), ("muon", 0.15), ("signum", 0.286), ("sgd", 0.218)])
def test_every_optimiser_learns(optimizer, bound):
    c = SAEConfig(d_in=16, d_sae=64, k=4, batch_size=64, optimizer=optimizer, num_epochs=2)
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        with pytest.raises(UserError, match="needs torch 2.9"):
            learner(optimizer="muon")
        return
    _, t = train_sae_from_activations(data(64 * 100), c, verbose=False)
    assert t.val_losses[-1]["fvu"] < bound
    sae = t.sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_signum_is_schedule_free_sign_descent():
    """Against the published recursion, in float64: z takes the steps, x averages, gradients are taken at y."""
    from sae.optim import ScheduleFreeSignum

    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 4, generator=g, dtype=torch.float64))
    optimizer = ScheduleFreeSignum([p], lr=0.1, momentum=0.9)
    z = x = p.detach().clone()
    total = 0.0
    for t in range(6):
        lr = 0.1 * min(1, (t + 1) / 3)
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        z = z - lr * p.grad.sign()
        total += lr**2
        x = (1 - lr**2 / total) * x + lr**2 / total * z
        optimizer.step()
        torch.testing.assert_close(p.detach(), 0.1 * z + 0.9 * x)
        torch.testing.assert_close(optimizer.state[p]["z"], z)


def test_adam8bit_says_what_it_needs():
    with pytest.raises(UserError, match="bitsandbytes|runs on CUDA"):
        learner(optimizer="adam8bit")


def test_float16_with_a_scaler_survives_an_overflow():
    x = data(64)
    one = learner(dtype="float16")
    one.start_from({"": x})
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = one.sae.W_dec.detach().clone()
    one.learn({"": x}, 0)
    one.sae.W_dec.grad[0, 0] = torch.inf  # an overflow: the step is skipped, the scale halved
    one.update(0)
    torch.testing.assert_close(before, one.sae.W_dec)
    assert one.scaler.get_scale() == 2.0**39
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    one.learn({"": x}, 1)
    one.update(1)
    assert not torch.equal(before, one.sae.W_dec)
    assert all(math.isfinite(v) for v in one.read_window().values())


def test_k_decay_ends_at_the_saved_k():
    c = SAEConfig(d_in=16, d_sae=48, k=4, batch_size=64, k_decay_steps=10, eval_every=10_000)
    _, t = train_sae_from_activations(data(64 * 30), c, verbose=False)
    assert t.sae.config.k == 4
    one = t.learners[""]
    assert int(one.sae(data(10)).codes.activity(one.sae.d_sae)[0].max()) <= 4
    assert one.terms(0, data(10), [data(10)]).k == 16
    assert one.terms(10, data(10), [data(10)]).k == 4


def test_finetuning_starts_where_the_other_ended():
    x = 20 * data(64 * 40) + 5
    c = SAEConfig(d_in=16, d_sae=48, activation="jumprelu", k=4, batch_size=64)
    sae, _ = train_sae_from_activations(x, c, verbose=False)
    t = SAETrainer(sae.train(), c, x, x[:500], pretrained=True)
    one = t.learners[""]
    want = sae.scaled(1.0).eval()(x[:500]).x_hat
    one.start_from(t.stream.sample(), pretrained=True)
    torch.testing.assert_close(one.finished()(x[:500]).x_hat, want, rtol=1e-3, atol=1e-2)


def test_weight_decay_is_decoupled():
    one = learner(weight_decay=0.1)
    assert isinstance(one.optimizer.parts[0], torch.optim.AdamW)


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
    sae, t = train_sae_from_activations(data(64 * 100), c, verbose=False)
    assert t.val_losses[-1]["fvu"] < bound
    assert t.val_losses[-1]["l0"] == pytest.approx(4, rel=0.2)
    if "tied" in fields:
        assert "encoder" not in dict(sae.named_parameters())
        assert torch.equal(sae.W_enc, sae.W_dec.t())


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_clipping_is_torchs(most):
    params = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5))]
    grads = [torch.full((3, 4), 2.0), torch.arange(5.0)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    twins = [torch.nn.Parameter(torch.zeros_like(p)) for p in params]
    for p, g in zip(twins, grads, strict=True):
        p.grad = g.clone()
    norm, want = clip_gradients_(params, most), torch.nn.utils.clip_grad_norm_(twins, most)
    torch.testing.assert_close(norm, want)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, twin.grad)


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


@pytest.mark.parametrize("enabled", [True, False])
def test_moments_in_bfloat16_follow_those_in_float32(enabled, monkeypatch):
    """Rounded to the nearest, the second moment would never leave where a first large gradient put it."""
    monkeypatch.setattr(native, "enabled", enabled)

    def run(moments):
        p = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = Adam([p], lr=1e-3, betas=(0.9, 0.999), moments=moments)
        for step in range(1000):
            g = torch.Generator().manual_seed(step)
            p.grad = torch.randn(64, 64, generator=g) * (10.0 if step < 10 else 0.1) + 0.05
            optimizer.step()
        assert optimizer.state[p]["exp_avg_sq"].dtype is moments
        return p.detach(), optimizer.state[p]["exp_avg_sq"].float()

    (p, v), (want, second) = run(torch.bfloat16), run(torch.float32)
    assert abs(float(v.mean() / second.mean()) - 1) < 0.02
    assert float((p - want).norm() / want.norm()) < 0.05


def test_moments_in_bfloat16_come_back_from_a_checkpoint_to_the_bit():
    c = SAEConfig(d_in=12, d_sae=48, k=4, optimizer_dtype="bfloat16")
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    one, two = (Learner(create_sae(c), c, 100, torch.device("cpu")) for _ in range(2))
    one.start_from({"": x})
    for step in range(6):
        if step == 3:
            two.load_state_dict(copy.deepcopy(one.state_dict()))
        for learner in (one, two) if step >= 3 else (one,):
            learner.learn({"": x}, step)
            learner.update(step)
    state = two.optimizer.parts[0].state[two.sae.W_dec]
    assert [state[name].dtype for name in ("exp_avg", "exp_avg_sq")] == [torch.bfloat16] * 2
    assert torch.equal(one.sae.W_dec, two.sae.W_dec)
