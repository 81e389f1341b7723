"""Training on Triton's kernels, in Triton's interpreter, takes the same steps as on plain torch.

Run: python -m pytest tests/test_triton_in_training.py
"""

import pytest
import torch

from sae.config import SAEConfig
from sae.kernels import native
from sae.learner import Learner
from sae.models import create_sae
from tests.kernels.test_triton import interpreted, randn

__all__ = ["interpreted"]  # a fixture


@pytest.mark.parametrize("unit", [False, True])
def test_training_takes_the_same_steps_as_plain_torch(unit, monkeypatch, interpreted):
    """The whole of it, optimiser included, whose step is one pass with the decoder's rows on the sphere or without."""

    def run(enabled):
        monkeypatch.setattr(native, "enabled", enabled)
        c = SAEConfig(d_in=20, d_sae=160, k=4, normalize_decoder=unit, clip_norm=0.5, auxk_alpha=0.0)
        torch.manual_seed(0)
        learner = Learner(create_sae(c), c, 10, torch.device("cpu"))
        learner.start_from({"": randn(40, 20)})
        for step in range(2):
            learner.learn({"": randn(40, 20, seed=step)}, step)
            learner.update(step)
        return learner.sae.state_dict()

    fast, plain = run(True), run(False)
    for name, p in fast.items():
        torch.testing.assert_close(p, plain[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if unit:
        torch.testing.assert_close(fast["W_dec"].norm(dim=1), torch.ones(160))
