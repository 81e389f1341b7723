"""Derived settings and schedules: pure functions of a config and a step, so that resume and plots need nothing else.

Steps are optimiser steps, counted from 0. Letters: D width, F latents.
"""

from __future__ import annotations

import math
from typing import Any

from sae.config import SAEConfig, kind_of, require


def n_latents(c: SAEConfig) -> int:
    """F: d_sae, or d_in * expansion_factor."""
    if c.d_sae is not None:
        return c.d_sae
    require(c.d_in is not None, "neither d_sae nor d_in is known; give one of them")
    return (c.d_in or 0) * c.expansion_factor


def tokens_per_step(c: SAEConfig) -> int:
    """Tokens an optimiser step learns from."""
    return c.batch_size * c.grad_acc_steps


# Step sizes at F = 1536; they fall as 1/sqrt(F) (Gao et al. 2024, arxiv.org/abs/2406.04093). How found: dev/LOG.md.
PEAK_LR = {"adam": 4e-3, "adam8bit": 4e-3, "muon": 4e-3, "signum": 1e-3, "sgd": 0.05}


def usual_lr(c: SAEConfig) -> float:
    """The optimiser's step size by its rule."""
    return PEAK_LR[c.optimizer] / math.sqrt(n_latents(c) / 1536)


def peak_lr(c: SAEConfig) -> float:
    """The optimiser's step size, as given or by its rule."""
    return c.learning_rate if c.learning_rate is not None else usual_lr(c)


def adam_betas(c: SAEConfig, n_steps: int) -> tuple[float, float]:
    """Adam's memories: 10 steps, and a twentieth of the run, 1000 steps at most.

    Latents fire seldom, so that their gradients' size changes fast; the usual 1000 steps are longer than many runs. A
    step size n times the usual one wants a memory n times as long, or latents die of its noise (dev/LOG.md).
    """
    share = 0.05 * max(1.0, peak_lr(c) / usual_lr(c))
    return 0.9, 1 - 1 / min(1000, max(10, int(n_steps * share)))


def warmup_steps(c: SAEConfig, n_steps: int) -> int:
    """Steps of warm-up in a run of n_steps."""
    return c.warmup_steps if c.warmup_steps is not None else min(1000, n_steps // 20)


def lr_at(step: int, c: SAEConfig, n_steps: int) -> float:
    """Step size: linear warm-up (never 0), flat, then a linear or cosine fall over the last decay_fraction."""
    factor = min(1.0, (step + 1) / (warmup_steps(c, n_steps) + 1))
    decay = c.decay_fraction * n_steps
    if decay > 0 and c.lr_schedule != "constant" and c.optimizer != "signum":  # schedule-free averages instead
        left = min(1.0, max(0.0, (n_steps - step) / decay))
        factor = min(factor, left if c.lr_schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))
    return peak_lr(c) * factor


def k_at(step: int, c: SAEConfig) -> int:
    """Latents kept at a step: from min(D, F) to k in a straight line over k_decay_steps (sparsify falls from 10 D)."""
    if step >= c.k_decay_steps:
        return c.k
    start = max(c.k, min(c.d_in or c.k, n_latents(c)))
    k = round(start + (c.k - start) * step / c.k_decay_steps)
    return k if "k_decay_steps" in kind_of(c).flags else c.k


def target_l0(c: SAEConfig) -> float | None:
    """The L0 that the penalty's weight is steered to: as given, k where no weight is given, None where one is."""
    if not kind_of(c).penalised or c.l1_coefficient is not None:
        return None
    return c.target_l0 if c.target_l0 is not None else float(c.k)


def usual_l0(c: SAEConfig) -> float:
    """Active latents per token, as far as the settings say: what it is steered to, else k."""
    return target_l0(c) or float(c.k)


def sparsity_at(step: int, c: SAEConfig, n_steps: int) -> float:
    """Ramp of the penalty's weight, 0..1: rises linearly over the first part of the run."""
    ramp = c.sparsity_warmup * n_steps
    return min(1.0, (step + 1) / ramp) if ramp >= 1 else 1.0


# What a step does per error of log L0: to thresholds, to the drift of thresholds, to the log of the weight.
STEER, STEER_DRIFT, STEER_WEIGHT = 0.2, 0.004, 0.01


def steered(error: Any, drift: Any, log_weight: Any, share: float) -> tuple[Any, Any, Any]:
    """Keep L0 at its target: by how much thresholds rise now, their new drift, the new log of the penalty's weight.

    Scalars. error: log(L0 / target), clamped. share: the step size over its peak. Thresholds act on the next batch; the
    weight alone acts through many steps of learning, and overshoots. The drift is the error's integral, scaled by the
    step size, since learning causes it. It turns the weight until it is gone itself: thresholds that rise for ever
    fight the SAE's learning.
    """
    drift = drift + STEER_DRIFT * error
    return STEER * error + drift * share, drift, log_weight + STEER_WEIGHT * error + drift * share


def p_at(step: int, c: SAEConfig, n_steps: int) -> float:
    """Exponent of the penalty f^p: 1, then falling linearly to p_anneal over the second half (Karvonen et al. 2024)."""
    if c.p_anneal is None:
        return 1.0
    done = min(1.0, max(0.0, 2 * (step + 1) / n_steps - 1))
    return 1.0 + (c.p_anneal - 1.0) * done


def dead_after_tokens(c: SAEConfig) -> int:
    """Tokens without firing until a latent counts as dead: as given, or in which an average one fires 16 times (of
    some kinds more often). A fixed 10M tokens, as is usual, is longer than many runs; AuxK then never acts."""
    if c.dead_feature_threshold is not None:
        return c.dead_feature_threshold
    return min(10_000_000, int(kind_of(c).firings_to_die * n_latents(c) / usual_l0(c)))


def dead_below(c: SAEConfig) -> float | None:
    """Share of tokens below which a latent counts as dead, where that was asked for instead of a token count."""
    if c.dead_percentage_threshold is not None:
        return c.dead_percentage_threshold * usual_l0(c) / n_latents(c)
    return c.dead_latent_threshold


def resamples_at(step: int, c: SAEConfig, n_steps: int) -> bool:
    """Whether dead latents are resampled after this step: every resample_every steps, in the first half of the run."""
    return c.resample_every is not None and (step + 1) % c.resample_every == 0 and 2 * (step + 1) <= n_steps


def shuffle_seed(c: SAEConfig) -> int:
    """The seed of shuffling: one for all SAEs of a run."""
    return c.shuffle_seed if c.shuffle_seed is not None else c.seed
