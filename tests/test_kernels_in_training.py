"""SAEs, optimisers and packed encoders compute the same with the C++ kernels as with plain torch.

(tests/kernels/ tests that room alone; tests/test_reach.py runs it without the rest of sae.)

Run: python -m pytest tests/test_kernels_in_training.py
"""

import json
from pathlib import Path

import pytest
import torch

from sae import hooks
from sae.config import SAEConfig
from sae.kernels import native, selection, sparse
from sae.learner import Learner
from sae.lm.language_model import load_language_model
from sae.models import create_sae
from sae.optim import Adam, Optimizer
from tests.kernels.test_native import assert_best, encoder, needs_compiler, randn

__all__ = ["encoder"]  # a fixture


@needs_compiler
def test_a_packed_encoder_serves_only_the_weights_it_was_made_of():
    sae = create_sae(SAEConfig(d_in=16, d_sae=64, k=4)).eval().pack_()
    few = randn(3, 16)
    sae.encode(few)
    with torch.no_grad():
        sae.W_enc.neg_()
        sae.W_dec.neg_()
    plain = create_sae(SAEConfig(d_in=16, d_sae=64, k=4)).eval()
    plain.load_state_dict(sae.state_dict())
    assert torch.equal(sae.encode(few), plain.encode(few))
    assert sae.pack_().packed.serves(few, sae.W_enc, sae.b_enc)
    torch.testing.assert_close(sae.encode(few), plain.encode(few))
    assert sae.train().packed is None
    other = create_sae(SAEConfig(d_in=16, d_sae=64, k=4), generator=torch.Generator().manual_seed(1)).eval()
    sae.eval().pack_().load_state_dict(other.state_dict(), assign=True)
    assert not sae.packed.serves(few, sae.W_enc, sae.b_enc)
    sae.pack_().encoder.data = plain.encoder.detach().clone()
    assert not sae.packed.serves(few, sae.W_enc, sae.b_enc)
    with torch.inference_mode():
        fresh = create_sae(SAEConfig(d_in=16, d_sae=64, k=4)).eval()
        assert fresh.pack_().packed is None


@pytest.mark.parametrize("enabled", [True, False])
def test_adam_takes_torchs_steps_and_keeps_its_state(enabled, monkeypatch):
    monkeypatch.setattr(native, "enabled", enabled)
    monkeypatch.setattr("sae.kernels.adam.AT_ONCE", 100)  # several blocks

    def run(kind, how):
        params = [randn(30, 40).requires_grad_(), randn(7).requires_grad_()]
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]
        optimizer = kind(groups, lr=0.01, betas=(0.9, 0.98), **how)
        for i in range(5):
            params[0].grad = randn(40, 30, seed=i).t() if i % 2 else randn(30, 40, seed=i)  # fused takes one only
            params[1].grad = randn(7, seed=i) * 10.0 ** (-i)
            optimizer.step()
        return params, optimizer.state_dict()

    (params, state), (want, theirs) = run(Adam, {"fused": True}), run(torch.optim.Adam, {"foreach": False})
    for p, q in zip(params, want, strict=True):
        assert p.stride() == q.stride()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["state"], theirs["state"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("activation", ["topk", "abstopk"])
def test_gradients_equal_float64_autograd_of_the_plain_formula(activation, enabled, monkeypatch):
    monkeypatch.setattr(native, "enabled", enabled)
    c = SAEConfig(d_in=127, d_sae=1001, k=7, activation=activation)
    x = randn(33, 127) + 3
    sae = create_sae(c)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0) + 0.1), sae.b_enc.copy_(randn(1001) / 10)
    out = sae(x)
    sae.loss(x, out, variance=2.0).total.backward()
    p = {name: v.detach().double().requires_grad_() for name, v in sae.named_parameters()}
    pre = (x.double() - p["b_dec"]) @ p["encoder"].t() + p["b_enc"]
    values, indices = (pre.abs() if sae.signed else pre).topk(7)
    kept = pre.gather(1, indices) if sae.signed else values.relu()
    x_hat = torch.zeros_like(pre).scatter(1, indices, kept) @ p["W_dec"] + p["b_dec"]
    ((x.double() - x_hat).square().sum(-1).mean() / 2).backward()
    for name, v in sae.named_parameters():
        error = (v.grad.double() - p[name].grad).norm() / p[name].grad.norm()
        assert error < 1e-5, (name, error)


PENALISED = [
    {"activation": "relu"},
    {"activation": "relu", "l1_weighting": "plain"},
    {"activation": "gated"},
    {"activation": "jumprelu"},
    {"activation": "jumprelu", "jumprelu_penalty": "tanh"},
    {"activation": "jumprelu", "jumprelu_penalty": "quadratic"},
]


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("kind", PENALISED, ids=lambda kind: "-".join(kind.values()))
def test_penalised_kinds_learn_alike_from_few_places_and_from_all(kind, transcode, monkeypatch, encoder):
    c = SAEConfig(
        d_in=40, d_out=40, d_sae=600, k=8, bandwidth=0.5, transcode=transcode, normalize_decoder=False, **kind
    )
    sae = create_sae(c)
    x, y = randn(70, 40), randn(70, 40, seed=1)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.add_(0.1 * randn(*p.shape))
            if name in ("b_enc", "b_gate"):
                p.sub_(2.5)
            if name == "threshold":
                p.add_(0.3).clamp_(min=0)

    def run(way):
        monkeypatch.setattr(native, "enabled", way == "native")
        if way == "dense":
            monkeypatch.setattr(selection, "choose_above_if_few", lambda *_, **__: None)
        sae.zero_grad()
        out = sae(x)
        losses = sae.loss(x, out, y=y if transcode else None, variance=3.0, sparsity=0.1, p=0.9)
        losses.total.backward()
        return out, losses.total.detach(), {name: p.grad.clone() for name, p in sae.named_parameters()}

    fast, plain, (dense, want, of) = run("native"), run("plain"), run("dense")
    assert dense.codes.indices is None
    for few, loss, grads in (fast, plain):
        assert few.codes.indices is not None
        torch.testing.assert_close(few.codes.dense(600), dense.codes.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, of[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_dense_activations_are_left_dense():
    sae = create_sae(SAEConfig(d_in=16, d_sae=128, activation="relu", k=4))
    assert sae(randn(50, 16)).codes.indices is None  # half of the latents are active


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    "how", [{}, {"tied": True}, {"normalize_decoder": False}, {"clip_norm": None}, {"transcode": True}]
)
def test_an_update_in_one_pass_is_its_parts_one_by_one(how, enabled, monkeypatch):
    """Projection, clipping, Adam and unit rows, fused, against the plain functions of each and torch's Adam."""
    monkeypatch.setattr("sae.kernels.adam.AT_ONCE", 500)  # several blocks

    def run(enabled, at_once=True):
        monkeypatch.setattr(native, "enabled", enabled)
        if not at_once:
            monkeypatch.setattr(Adam, "is_ours", lambda _: False)
        c = SAEConfig(d_in=24, d_sae=96, k=4, **{"clip_norm": 0.05, **how})
        sae = create_sae(c, generator=torch.Generator().manual_seed(0))
        optimizer = Optimizer(sae, c, 100, torch.device("cpu"))
        norms = []
        for i in range(4):
            for name, p in sae.named_parameters():
                p.grad = randn(*p.shape, seed=i + len(name)).contiguous() * 10.0**-i
            norms.append(optimizer.step(0.01))
        return sae, torch.stack(norms)

    (fused, norms), (plain, want) = run(enabled), run(False, at_once=False)
    torch.testing.assert_close(norms, want)
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def activations(model: str, layer: int) -> torch.Tensor:
    """Every token of some Python files, the special ones with their outlier dimensions included: (n, D)."""
    lm = load_language_model(model, device="cpu")
    text = "\n".join(Path(json.__path__[0], name).read_text() for name in ("decoder.py", "encoder.py"))
    ids = torch.tensor(lm.tokenizer.encode_document(text)[: 128 * 16]).view(16, 128)
    hookpoint = hooks.at_layer(lm.module, layer)
    with torch.no_grad():
        return lm.hidden(ids, torch.ones_like(ids, dtype=torch.bool), [hookpoint])[hookpoint].flatten(0, 1)


@pytest.mark.parametrize(("model", "layer", "k"), [("pygpt", 10, 32), ("minilm", 3, 32), ("minilm", 5, 8)])
def test_the_selection_is_the_best_on_real_activations(model, layer, k, minilm_path):
    x = activations(minilm_path if model == "minilm" else model, layer)
    c = SAEConfig(d_in=x.shape[1], expansion_factor=8, k=k, batch_size=512)
    learner = Learner(create_sae(c), c, 20, torch.device("cpu"))
    learner.start_from({"": x})
    for step in range(4):
        learner.learn({"": x[512 * step :][:512]}, step)
        learner.update(step)
    sae = learner.sae
    inner, W, b = x * learner.scale - sae.b_dec.detach(), sae.W_enc.detach(), sae.b_enc.detach()
    assert_best(inner, W, b, k, *selection.choose_top_k(inner, W, b, k))
    if ops := sparse.encoder(inner, W, b):  # proven by the 16-bit bound at the first attempt, for most
        assert ops.encode_top_k(inner, W.t().contiguous(), b, k, False)[2] < len(x) / 2
