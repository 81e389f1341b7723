"""What is saved comes back to the bit, in SAELens's layout; damaged SAEs are refused in one sentence.

Run: python -m pytest tests/formats/test_store.py
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import files
from sae.config import SAEConfig, UserError
from sae.formats import store
from sae.models import create_sae
from tests.conftest import ALL


def make(activation, **fields):
    sae = create_sae(SAEConfig(d_in=6, d_sae=20, activation=activation, k=4, batch_size=17, **fields))
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return sae


@pytest.mark.parametrize("activation", ALL)
def test_save_load_is_bit_equal(activation, tmp_path):
    sae = make(activation).eval()
    store.save_sae(sae, tmp_path / "run", hookpoint="transformer.h.3", model_name="pygpt")
    x = torch.randn(9, 6)
    for path in (tmp_path / "run", tmp_path / "run" / store.WEIGHTS, tmp_path):
        back = store.load_sae(path)
        assert back.config == sae.config
        assert torch.equal(back(x).x_hat, sae(x).x_hat)
    assert store.load_cfg(tmp_path / "run")["hookpoint"] == "transformer.h.3"
    assert store.load_saes(tmp_path).keys() == {"transformer.h.3"}
    assert store.newest_run(tmp_path) == tmp_path / "run"


def test_the_layout_is_saelens(tmp_path):
    store.save_sae(make("topk"), tmp_path)
    weights, cfg = load_file(tmp_path / store.WEIGHTS), json.loads((tmp_path / "cfg.json").read_text())
    assert {n: tuple(w.shape) for n, w in weights.items()} == {
        "W_enc": (6, 20),
        "b_enc": (20,),
        "W_dec": (20, 6),
        "b_dec": (6,),
    }
    assert (cfg["architecture"], cfg["k"], cfg["apply_b_dec_to_input"]) == ("topk", 4, True)
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"  # below, SAELens takes its old flat layout
    store.save_sae(make("gated"), tmp_path)
    assert set(load_file(tmp_path / store.WEIGHTS)) == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}


@pytest.mark.parametrize("architecture", ["standard", "topk", "gated"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_files_of_saelens_itself(architecture, apply_b_dec, tmp_path):
    """Its forward, written out (facts: peers.md 2.1), against ours on its file."""
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    w = {"W_enc": r(6, 20), "W_dec": r(20, 6), "b_dec": r(6)}
    w |= {"b_gate": r(20), "b_mag": r(20), "r_mag": r(20)} if architecture == "gated" else {"b_enc": r(20)}
    cfg = {"architecture": architecture, "d_in": 6, "d_sae": 20, "k": 4, "apply_b_dec_to_input": apply_b_dec}
    cfg |= {"normalize_activations": "none", "rescale_acts_by_decoder_norm": True, "metadata": {}}
    save_file(w, tmp_path / store.WEIGHTS)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    x = r(11, 6)
    inner = x - w["b_dec"] * apply_b_dec
    norms = w["W_dec"].norm(dim=1)
    if architecture == "gated":
        f = ((inner @ w["W_enc"] + w["b_gate"]) > 0) * (inner @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    elif architecture == "topk":
        pre = (inner @ w["W_enc"] + w["b_enc"]) * norms
        f = torch.zeros_like(pre).scatter(1, pre.topk(4).indices, pre.topk(4).values.relu()) / norms
    else:
        f = (inner @ w["W_enc"] + w["b_enc"]).relu()
    want = f @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(store.load_sae(tmp_path)(x).x_hat, want, rtol=1e-4, atol=1e-5)


def test_best_model_in_the_nanochat_documents_keys(tmp_path):
    sae = make("topk")
    path = tmp_path / "best_model.pt"
    files.write_torch({"sae_state_dict": sae.state_dict(), "config": sae.config.to_dict(), "step": 3}, path)
    back = store.load_sae(path)
    assert torch.equal(back.W_enc, sae.W_enc)
    assert back.config == sae.config


def corrupt(path, name, change):
    weights = load_file(path / store.WEIGHTS)
    change(weights)
    save_file(weights, path / store.WEIGHTS)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: corrupt(p, "W_dec", lambda w: w.pop("W_dec")), "tensor W_dec is missing"),
        (lambda p: corrupt(p, "W_dec", lambda w: w.update(W_dec=torch.zeros(3, 3))), "should be (20, 6)"),
        (lambda p: corrupt(p, "extra", lambda w: w.update(extra=torch.zeros(1))), "should be absent"),
        (lambda p: corrupt(p, "W_enc", lambda w: w["W_enc"][:, 3].fill_(math.nan)), "tensor W_enc holds NaN"),
        (lambda p: (p / store.WEIGHTS).write_bytes((p / store.WEIGHTS).read_bytes()[:200]), "damaged"),
        (lambda p: (p / store.WEIGHTS).write_bytes(b""), "damaged"),
        (lambda p: (p / "cfg.json").write_text("{"), "not valid json"),
        (lambda p: (p / "cfg.json").write_text("[]"), "json object"),
        (lambda p: (p / "cfg.json").unlink(), "cannot read"),
        (lambda p: (p / "cfg.json").write_text('{"architecture": "temporal"}'), "not read yet"),
        (lambda p: (p / "cfg.json").write_text('{"architecture": ["topk"]}'), "not read yet"),
        (lambda p: (p / "cfg.json").write_text('{"architecture": "topk"}'), "whole numbers were wanted"),
        (lambda p: (p / "cfg.json").write_text('{"architecture": "topk", "d_in": "6", "d_sae": 20}'), "whole numbers"),
        (lambda p: (p / "cfg.json").write_text('{"metadata": []}'), "json object with metadata"),
        (lambda p: (p / "cfg.json").write_text("[" * 100_000), "not valid json"),
        (lambda p: (p / "cfg.json").write_text('{"normalize_activations": "layer_norm"}'), "not read yet"),
        (lambda p: (p / store.WEIGHTS).unlink(), "holds no sae_weights.safetensors"),
    ],
)
def test_damaged_saes_are_one_sentence(break_it, words, tmp_path):
    store.save_sae(make("topk"), tmp_path)
    break_it(tmp_path)
    with pytest.raises(UserError) as e:
        store.load_sae(tmp_path)
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_finding_saes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="run sae_train first"):
        store.newest_run(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        store.load_sae(tmp_path / "nowhere")
    for i in (10, 2):
        store.save_sae(make("topk"), tmp_path / f"h.{i}", hookpoint=f"h.{i}")
    assert list(store.load_saes(tmp_path)) == ["h.2", "h.10"]
    assert list(store.load_saes(tmp_path, hook_points=["h.10"])) == ["h.10"]
    with pytest.raises(UserError, match="holds 2 SAEs"):
        store.load_sae(tmp_path)
    with pytest.raises(UserError, match="wanted h.3"):
        store.load_saes(tmp_path, hook_points=["h.3"])

    import huggingface_hub

    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert store.load_sae("org/repo/h.10").d_sae == 20
    assert asked[0][0] == "org/repo"

    def offline(repo, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="the hub did not give it"):
        store.load_sae("org/repo")
