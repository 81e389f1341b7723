"""What follows from a config, by step: step size, k, sparsity, when a latent is dead.

Run: python -m pytest tests/test_schedules.py
"""

import dataclasses
import math

import pytest

from sae import schedules as sched
from sae.config import SAEConfig, UserError


def test_schedules():
    c = SAEConfig(d_in=8, learning_rate=1.0, warmup_steps=10, decay_fraction=0.5)
    lrs = [sched.lr_at(s, c, 100) for s in range(100)]
    assert 0 < lrs[0] < lrs[5] < lrs[20] == lrs[49] == 1.0
    assert lrs[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(lrs[50:], lrs[51:], strict=False))
    flat = SAEConfig(d_in=8, learning_rate=1.0, warmup_steps=0, decay_fraction=0.0)
    assert {sched.lr_at(s, flat, 100) for s in range(100)} == {1.0}
    cosine = dataclasses.replace(c, lr_schedule="cosine")
    assert sched.lr_at(75, cosine, 100) == pytest.approx(0.5)
    assert sched.lr_at(60, cosine, 100) > sched.lr_at(60, c, 100)
    assert sched.lr_at(99, dataclasses.replace(c, lr_schedule="constant"), 100) == 1.0
    assert sched.lr_at(99, dataclasses.replace(c, optimizer="signum"), 100) == 1.0
    relu = SAEConfig(activation="relu", sparsity_warmup=0.5, p_anneal=0.5)
    assert sched.sparsity_at(0, relu, 100) == pytest.approx(0.02)
    assert sched.sparsity_at(60, relu, 100) == 1.0
    assert sched.sparsity_at(0, dataclasses.replace(relu, sparsity_warmup=0.0), 100) == 1.0
    assert [sched.p_at(s, relu, 100) for s in (0, 49, 74, 99)] == [1.0, 1.0, 0.75, 0.5]
    assert sched.target_l0(relu) == 32.0
    assert sched.target_l0(SAEConfig(activation="relu", l1_coefficient=0.1)) is None
    assert sched.target_l0(SAEConfig()) is None
    falling = SAEConfig(d_in=100, k=10, k_decay_steps=10)
    assert [sched.k_at(s, falling) for s in (0, 5, 9, 10, 10**6)] == [100, 55, 19, 10, 10]
    assert sched.k_at(0, SAEConfig(d_in=100, k=10)) == 10
    every = SAEConfig(resample_every=10)
    assert [s for s in range(100) if sched.resamples_at(s, every, 100)] == [9, 19, 29, 39, 49]
    assert sched.dead_below(SAEConfig(d_sae=320, k=32, dead_percentage_threshold=0.1)) == pytest.approx(0.01)
    assert sched.dead_below(SAEConfig(dead_latent_threshold=1e-3)) == 1e-3
    assert sched.dead_below(SAEConfig()) is None
    assert sched.peak_lr(SAEConfig(d_sae=1536 * 4)) == pytest.approx(sched.peak_lr(SAEConfig(d_sae=1536)) / 2)
    assert sched.dead_after_tokens(SAEConfig(d_sae=3200, k=32)) == 1600
    assert sched.dead_after_tokens(SAEConfig(d_sae=1 << 25, k=32)) == 10_000_000
    assert sched.dead_after_tokens(SAEConfig(dead_feature_threshold=7)) == 7
    assert sched.dead_after_tokens(SAEConfig(d_sae=4096, activation="jumprelu", target_l0=2)) == 16 * 4096 // 2
    assert sched.dead_below(SAEConfig(d_sae=100, activation="relu", target_l0=2, dead_percentage_threshold=0.1)) == 2e-3
    assert sched.n_latents(SAEConfig(d_in=8, expansion_factor=4)) == 32
    with pytest.raises(UserError, match="neither"):
        sched.n_latents(SAEConfig())
    assert math.isclose(SAEConfig().auxk_alpha, 1 / 32)
    usual = SAEConfig(d_sae=1536)
    assert sched.adam_betas(usual, 976) == (0.9, 1 - 1 / 48)
    assert sched.adam_betas(usual, 10**6) == (0.9, 0.999)
    assert sched.adam_betas(dataclasses.replace(usual, learning_rate=2 * sched.usual_lr(usual)), 976) == (
        0.9,
        1 - 1 / 97,
    )
    assert sched.adam_betas(dataclasses.replace(usual, learning_rate=1e-9), 976) == sched.adam_betas(usual, 976)
