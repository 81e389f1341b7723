"""Metrics equal their definitions in float64, whatever the batch size; splicing measures what it says.

Run: python -m pytest tests/test_evaluator.py
"""

import pytest
import torch
from torch.nn import functional as F

from sae.config import SAEConfig, UserError
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows, kept_positions
from sae.evaluator import SAEEvaluator, evaluate, summary
from sae.kernels.sparse import Codes
from sae.metrics import Totals, divergence
from sae.models import KINDS, SAE, Output, create_sae

HOOK = "transformer.h.1"


def data(n=500, d=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g) * torch.linspace(0.5, 3, d) + 2


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


def test_a_transcoder_is_not_measured_against_its_input():
    with pytest.raises(UserError, match="is a transcoder"):
        SAEEvaluator(create_sae(SAEConfig(d_in=8, d_sae=24, k=3, transcode=True))).evaluate(data())


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


def test_evaluating_changes_nothing():
    sae = create_sae(SAEConfig(d_in=8, d_sae=24, k=3)).train()
    before = {n: p.clone() for n, p in sae.state_dict().items()}
    SAEEvaluator(sae).evaluate(data())
    assert sae.training
    assert all(torch.equal(p, before[n]) for n, p in sae.state_dict().items())


def test_empty_and_constant_activations():
    sae = create_sae(SAEConfig(d_in=8, d_sae=24, k=3))
    assert SAEEvaluator(sae).evaluate(torch.empty(0, 8))["n_tokens"] == 0
    constant = SAEEvaluator(sae).evaluate(torch.zeros(5, 8))
    assert constant["fvu"] != constant["fvu"]  # nothing varies, so no share of it is explained


class Exact(SAE):
    """Reconstructs its input to the bit."""

    def codes(self, x):
        return Codes(None, torch.zeros(len(x), self.d_sae)), x

    def forward(self, x):
        return Output(x, self.codes(x)[0], x)


class Zero(Exact):
    def forward(self, x):
        return Output(torch.zeros_like(x), self.codes(x)[0], x)


def run(lm, sae, text_file, **kwargs):
    options = {"n_tokens": 400, "ctx_len": 32, "mean_tokens": 200} | kwargs
    return evaluate(lm, sae, HOOK, open_dataset(str(text_file)), **options)[0]


def test_a_perfect_sae_scores_one(lm, text_file):
    r = run(lm, Exact(SAEConfig(d_in=32, k=4)), text_file)
    assert r.ce_sae == r.ce_clean
    assert r.kl_sae == 0  # a KL, not a cross entropy
    assert r.ce_score_zero == r.ce_score_mean == r.kl_score_zero == 1
    assert r.explained_variance == 1
    assert (r.dead_fraction, r.l0) == (1, 0)


def test_losses_equal_a_plain_computation(lm, text_file):
    """Clean, zero and mean ablation written out by hand on the same rows."""
    r = run(lm, Zero(SAEConfig(d_in=32, k=4)), text_file, n_tokens=300)
    dataset = open_dataset(str(text_file))
    ids, valid, _ = TokenRows(lm, dataset, "val", 32).take(10)
    assert int(kept_positions(lm, ids, valid).sum()) == r.n_tokens  # whole sequences, until 300 are seen
    gpt = lm.module

    def ce(x_at_hook):
        with torch.no_grad():
            x = gpt.transformer.h[2](x_at_hook)
            return gpt.lm_head(gpt.transformer.ln_f(x))

    x = lm.hidden(ids, valid, [HOOK])[HOOK]
    keep = kept_positions(lm, ids, valid)
    mean = x[keep][:200].mean(0)
    counted = keep[:, :-1] & valid[:, 1:]
    targets = ids[:, 1:][counted]
    loss = lambda logits: F.cross_entropy(logits[:, :-1][counted], targets).item()
    assert r.n_ce_tokens == int(counted.sum())
    assert r.ce_clean == pytest.approx(loss(ce(x)), rel=1e-5)
    assert r.ce_zero == pytest.approx(loss(ce(torch.zeros_like(x))), rel=1e-5)
    assert r.ce_mean == pytest.approx(loss(ce(mean.expand_as(x))), rel=1e-5)
    spliced = torch.where(keep[..., None], 0.0, x)
    assert r.ce_sae == pytest.approx(loss(ce(spliced)), rel=1e-5)
    clean, zero = (ce(v)[:, :-1][counted].log_softmax(-1) for v in (x, torch.zeros_like(x)))
    assert r.kl_zero == pytest.approx((clean.exp() * (clean - zero)).sum(-1).mean().item(), rel=1e-4)


def test_report_does_not_depend_on_the_batch(lm, text_file):
    sae = create_sae(SAEConfig(d_in=32, d_sae=64, k=4))
    reports = [run(lm, sae, text_file, model_batch_size=b, n_tokens=777).to_dict() for b in (3, 16)]
    assert reports[0]["n_tokens"] == reports[1]["n_tokens"]
    for name, value in reports[0].items():
        if isinstance(value, float):
            assert value == pytest.approx(reports[1][name], rel=1e-4, abs=1e-6), name


def test_report_keys_and_summary(lm, text_file):
    sae = create_sae(SAEConfig(d_in=32, d_sae=64, k=4)).train()
    r = run(lm, sae, text_file)
    assert sae.training
    wanted = """n_tokens l0 l0_std mse fvu explained_variance explained_variance_legacy cosine l2_ratio
        relative_reconstruction_bias dead_fraction ce_clean ce_sae ce_zero ce_mean ce_score_zero ce_score_mean kl_sae
        kl_zero kl_score_zero hookpoint model dataset architecture k d_in d_sae"""
    assert set(wanted.split()) <= r.to_dict().keys()
    assert all(r.to_dict()[name] is not None for name in wanted.split())
    assert "CE score" in "\n".join(summary(r))


def test_encoders_have_no_cross_entropy(minilm_path, text_file):
    from sae.lm.language_model import load_language_model

    lm = load_language_model(minilm_path, device="cpu")
    sae = create_sae(SAEConfig(d_in=384, d_sae=64, k=4))
    r, _ = evaluate(lm, sae, "encoder.layer.3", open_dataset(str(text_file)), n_tokens=60, ctx_len=16)
    assert r.ce_clean is None
    assert r.n_tokens >= 60
    assert "no next-token head" in "\n".join(summary(r))


def test_the_wrong_width_is_told(lm, text_file):
    with pytest.raises(UserError, match="is 32 wide and the SAE reads 8"):
        run(lm, create_sae(SAEConfig(d_in=8, k=4)), text_file)


def test_kl_of_a_masked_vocabulary_is_that_of_the_rest():
    clean, new = torch.randn(5, 12), torch.randn(5, 12)
    masked = [torch.cat((x, torch.full((5, 4), -torch.inf)), 1).log_softmax(-1) for x in (new, clean)]
    want = torch.nn.functional.kl_div(
        new.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    masked[0].requires_grad_()
    got = divergence(*masked)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert masked[0].grad.isfinite().all()
