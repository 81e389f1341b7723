"""Optimisers: each learns, by its published recursion; moments in half precision; averages; clipping.

Run: python -m pytest tests/test_optim.py
"""

import copy
import math

import pytest
import torch

from sae.config import SAEConfig, UserError
from sae.kernels import native
from sae.learner import Learner
from sae.models import create_sae
from sae.optim import Adam, clip_gradients_
from sae.trainer import train_sae_from_activations
from tests.test_learner import learner, rows


def test_ema_is_bias_corrected_and_saved():
    x = rows(64)
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
    _, t = train_sae_from_activations(rows(64 * 100), c, verbose=False)
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
    x = rows(64)
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


def test_weight_decay_is_decoupled():
    one = learner(weight_decay=0.1)
    assert isinstance(one.optimizer.parts[0], torch.optim.AdamW)


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
        for each in (one, two) if step >= 3 else (one,):
            each.learn({"": x}, step)
            each.update(step)
    state = two.optimizer.parts[0].state[two.sae.W_dec]
    assert [state[name].dtype for name in ("exp_avg", "exp_avg_sq")] == [torch.bfloat16] * 2
    assert torch.equal(one.sae.W_dec, two.sae.W_dec)
