"""The evaluator that judges the peers reads each library's files right and agrees with our own. Needs no peer.

Run: python -m pytest tests/test_benchmarks.py
"""

import json

import numpy as np
import pytest
import torch

from benchmarks import peers, peers_runner
from sae.config import SAEConfig
from sae.evaluator import SAEEvaluator
from sae.models import create_sae

D, F, K = 12, 40, 5


@pytest.fixture
def planted():
    """A TopK SAE with biases, and rows whose latents are known by it."""
    sae = create_sae(SAEConfig(d_in=D, d_sae=F, k=K))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc.add_(0.3 * torch.randn(D, F, generator=generator))
        sae.b_enc.copy_(torch.randn(F, generator=generator) - 1.5)
        sae.b_dec.copy_(torch.randn(D, generator=generator))
    return sae, torch.randn(300, D, generator=generator)


def saved_by(library, sae):
    """The tensors in which a library would hold the same SAE."""
    p = {name: getattr(sae, name).detach() for name in peers.Plain._fields}
    if library == "nanosae":
        return p
    if library == "sae-lens":  # chosen by pre * norm of the decoder row, which here is not 1
        norms = torch.linspace(0.5, 2, F)
        return {**p, "W_enc": p["W_enc"] / norms, "b_enc": p["b_enc"] / norms, "W_dec": p["W_dec"] * norms[:, None]}
    linear = {"encoder.weight": p["W_enc"].t(), "encoder.bias": p["b_enc"], "b_dec": p["b_dec"]}
    if library == "eai-sparsify":
        return {**linear, "W_dec": p["W_dec"]}
    return {**linear, "decoder.weight": p["W_dec"].t(), "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}


@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_codes_and_metrics_are_those_of_our_sae(library, planted):
    sae, x = planted
    got = peers.plain(library, saved_by(library, sae), rescale=library == "sae-lens")
    values, indices = peers.encode(got, x, K)
    codes = torch.zeros(len(x), F).scatter_(1, indices, values)
    torch.testing.assert_close(codes, sae.encode(x).detach())
    ours = SAEEvaluator(sae).evaluate(x)
    metrics = peers.evaluate(got, x, K, batch_size=7)
    assert metrics == pytest.approx({name: ours[name] for name in metrics}, rel=1e-5)
    assert metrics["l0"] < K, "some of the K largest should be negative here, or ReLU is not tested"


def test_rows_are_read_across_shards(tmp_path):
    rows = np.arange(7 * 2, dtype=np.float32).reshape(7, 2)
    for shard, part in enumerate((rows[:4], rows[4:])):
        part.tofile(tmp_path / f"{shard:05d}_00.bin")
        (np.arange(len(part)) + 10 * shard).tofile(tmp_path / f"{shard:05d}_seq.bin")
    manifest = {"dtype": "float32", "n_tokens": 7, "shards": [4, 3], "hookpoints": {"h": {"file": "00", "d_in": 2}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert (peers_runner.read(tmp_path, 2, 6) == rows[2:6]).all()
    assert peers_runner.read(tmp_path, 3, 5, numbers=True).tolist() == [[3], [10]]
    with pytest.raises(SystemExit, match="7 rows"):
        peers_runner.read(tmp_path, 0, 8)


def test_means_and_deviations_are_over_the_seeds_of_one_setting():
    def row(setting, value):
        job = {"library": "nanosae", "setting": setting}
        return {"job": job, "version": "1", "settings": {}, **dict.fromkeys(peers.METRICS, value)}

    a, b = peers.summary([row("default", 1.0), row("default", 3.0), row("matched", 5.0)])
    assert (a["setting"], a["seeds"], a["l0"]) == ("default", 2, {"mean": 2.0, "sd": pytest.approx(2**0.5)})
    assert b["l0"] == {"mean": 5.0, "sd": None}
