"""Metrics equal their definitions in float64, whatever the batch size.

Run: python -m pytest tests/test_metrics.py
"""

import pytest
import torch
from torch.nn import functional as F

from sae.config import SAEConfig
from sae.evaluator import SAEEvaluator
from sae.kernels.sparse import Codes
from sae.metrics import Totals
from sae.models import KINDS, create_sae
from tests.test_evaluator import data


@pytest.mark.parametrize("activation", sorted(KINDS))
def test_metrics_equal_their_definitions(activation):
    x = data()
    sae = create_sae(SAEConfig(d_in=8, d_sae=24, activation=activation, k=3)).eval()
    m = SAEEvaluator(sae).evaluate(x)
    with torch.no_grad():
        f, x_hat = sae.encode(x).double(), sae(x).x_hat.double()
    x = x.double()
    e, l0 = x - x_hat, (f != 0).sum(1).double()
    want = {
        "n_tokens": 500,
        "l0": l0.mean(),
        "l0_std": l0.std(unbiased=False),
        "mse": e.square().sum(1).mean(),
        "fvu": e.square().sum() / (x - x.mean(0)).square().sum(),
        "explained_variance": 1 - e.square().sum() / (x - x.mean(0)).square().sum(),
        "explained_variance_legacy": (1 - e.square().sum(1) / (x - x.mean(0)).square().sum(1)).mean(),
        "cosine": F.cosine_similarity(x, x_hat).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean(),
        "dead_fraction": (f == 0).all(0).double().mean(),
    }
    assert m.keys() == want.keys()
    for name, value in want.items():
        assert m[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_no_metric_depends_on_the_batch_size():
    x = data(997)
    evaluator = SAEEvaluator(create_sae(SAEConfig(d_in=8, d_sae=24, k=3)))
    whole = evaluator.evaluate(x, batch_size=10_000)
    for size in (1, 64, 333):
        found = evaluator.evaluate(x, batch_size=size)
        assert found.keys() == whole.keys() and "fvu" in found
        for name, value in found.items():
            assert value == pytest.approx(whole[name], rel=1e-6), name


def test_an_offset_does_not_flatter_explained_variance():
    """The traps of other libraries: a large mean, or a constant error, must show (facts: peers.md 4.1)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=g) + 2 * torch.randn(16, generator=g)
    codes = Codes(None, torch.ones(4000, 3))
    noisy, shifted = Totals(16, 3), Totals(16, 3)
    noisy.add(x, x + 0.45 * torch.randn(4000, 16, generator=g), codes)
    shifted.add(x, x + 0.45, codes)
    assert noisy.metrics()["explained_variance"] == pytest.approx(1 - 0.45**2, abs=0.01)
    assert shifted.metrics()["explained_variance"] == pytest.approx(1 - 0.45**2, abs=0.01)


def test_empty_and_constant_activations():
    sae = create_sae(SAEConfig(d_in=8, d_sae=24, k=3))
    assert SAEEvaluator(sae).evaluate(torch.empty(0, 8))["n_tokens"] == 0
    constant = SAEEvaluator(sae).evaluate(torch.zeros(5, 8))
    assert constant["fvu"] != constant["fvu"]  # nothing varies, so no share of it is explained
