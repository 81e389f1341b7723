"""Splicing an SAE into the model measures what it says; each check's verdict and advice on constructed figures.

Run: python -m pytest tests/test_evaluator.py
"""

import dataclasses
import json
import math
import re

import pytest
import torch
from torch.nn import functional as F

from sae import rundir
from sae.config import EvalConfig, SAEConfig, TrainConfig, UserError
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows, kept_positions
from sae.evaluator import Assessment, SAEEvaluator, assess, decoder_similarity, evaluate, similarity_by_chance, summary
from sae.kernels.sparse import Codes
from sae.metrics import divergence
from sae.models import SAE, Output, create_sae
from scripts import sae_collect, sae_eval, sae_train
from tests.conftest import HOOK, SMALL, call


def data(n=500, d=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g) * torch.linspace(0.5, 3, d) + 2


def test_a_transcoder_is_not_measured_against_its_input():
    with pytest.raises(UserError, match="is a transcoder"):
        SAEEvaluator(create_sae(SAEConfig(d_in=8, d_sae=24, k=3, transcode=True))).evaluate(data())


def test_evaluating_changes_nothing():
    sae = create_sae(SAEConfig(d_in=8, d_sae=24, k=3)).train()
    before = {n: p.clone() for n, p in sae.state_dict().items()}
    SAEEvaluator(sae).evaluate(data())
    assert sae.training
    assert all(torch.equal(p, before[n]) for n, p in sae.state_dict().items())


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
    options = {"n_tokens": 400, "mean_tokens": 200} | kwargs
    return evaluate(sae, HOOK, TokenRows(lm, open_dataset(str(text_file)), "val", 32), **options)[0]


def test_a_perfect_sae_scores_one(lm, text_file):
    r = run(lm, Exact(SAEConfig(d_in=32, k=4)), text_file)
    assert r["ce_sae"] == r["ce_clean"]
    assert r["kl_sae"] == 0  # a KL, not a cross entropy
    assert r["ce_score_zero"] == r["ce_score_mean"] == r["kl_score_zero"] == 1
    assert r["explained_variance"] == 1
    assert (r["dead_fraction"], r["l0"]) == (1, 0)


def test_losses_equal_a_plain_computation(lm, text_file):
    """Clean, zero and mean ablation written out by hand on the same rows."""
    r = run(lm, Zero(SAEConfig(d_in=32, k=4)), text_file, n_tokens=300)
    dataset = open_dataset(str(text_file))
    ids, valid, _ = TokenRows(lm, dataset, "val", 32).take(10)
    assert int(kept_positions(lm, ids, valid).sum()) == r["n_tokens"]  # whole sequences, until 300 are seen
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
    assert r["n_ce_tokens"] == int(counted.sum())
    assert r["ce_clean"] == pytest.approx(loss(ce(x)), rel=1e-5)
    assert r["ce_zero"] == pytest.approx(loss(ce(torch.zeros_like(x))), rel=1e-5)
    assert r["ce_mean"] == pytest.approx(loss(ce(mean.expand_as(x))), rel=1e-5)
    spliced = torch.where(keep[..., None], 0.0, x)
    assert r["ce_sae"] == pytest.approx(loss(ce(spliced)), rel=1e-5)
    clean, zero = (ce(v)[:, :-1][counted].log_softmax(-1) for v in (x, torch.zeros_like(x)))
    assert r["kl_zero"] == pytest.approx((clean.exp() * (clean - zero)).sum(-1).mean().item(), rel=1e-4)


def test_report_does_not_depend_on_the_batch(lm, text_file):
    sae = create_sae(SAEConfig(d_in=32, d_sae=64, k=4))
    reports = [run(lm, sae, text_file, model_batch_size=b, n_tokens=777) for b in (3, 16)]
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
    assert set(wanted.split()) <= r.keys()
    assert all(r[name] is not None for name in wanted.split())
    assert "CE score" in "\n".join(summary(r))


def test_encoders_have_no_cross_entropy(minilm_path, text_file):
    from sae.lm.language_model import load_language_model

    lm = load_language_model(minilm_path, device="cpu")
    sae = create_sae(SAEConfig(d_in=384, d_sae=64, k=4))
    r, _ = evaluate(sae, "encoder.layer.3", TokenRows(lm, open_dataset(str(text_file)), "val", 16), 60)
    assert r["ce_clean"] is None
    assert r["n_tokens"] >= 60
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


GOOD = {
    "hookpoint": "h.3",
    "model": "gpt",
    "architecture": "topk",
    "n_tokens": 1_000_000,
    "d_in": 768,
    "d_sae": 4096,
    "l0": 32.0,
    "ce_score_zero": 0.95,
    "explained_variance": 0.8,
    "dead_fraction": 0.01,
}
CHECKS = ["loss recovered (%)", "L0", "dead latents (%)", "decoder similarity"]


def check(at, similarity=0.2, **changes):
    """One of the four checks, of good figures with some changed."""
    return assess({**GOOD, **changes}, similarity).checks[at]


def test_a_good_sae_passes_everything_without_advice():
    a = assess(GOOD, 0.2)
    assert [c.name for c in a.checks] == CHECKS
    assert {c.verdict for c in a.checks} == {"pass"}
    assert [c.advice for c in a.checks] == [None] * 4
    assert a.to_dict().keys() == {"score", "checks", "sae", "n_tokens"}
    assert a.to_dict()["checks"][1] == {
        "name": "L0",
        "value": 32.0,
        "wanted": "20 to 200",
        "verdict": "pass",
        "advice": None,
    }
    assert (a.score, a.sae, a.n_tokens) == ("4/4", "h.3", 1_000_000)
    assert len(a.lines()) == 5


@pytest.mark.parametrize(
    ("score", "verdict"),
    [(1.0, "pass"), (0.7, "pass"), (0.69, "borderline"), (0.6, "borderline"), (0.59, "fail"), (-0.3, "fail")],
)
def test_loss_recovered(score, verdict):
    got = check(0, ce_score_zero=score)
    assert (got.verdict, got.value) == (verdict, pytest.approx(100 * score))
    assert (got.advice is None) == (verdict == "pass")
    assert got.advice is None or got.advice.startswith("raise --k, --max_tokens or --expansion_factor")
    assert "wanted" not in got.wanted


@pytest.mark.parametrize(("ev", "verdict"), [(0.75, "pass"), (0.65, "borderline"), (0.2, "fail")])
def test_without_a_head_explained_variance_takes_the_place_and_it_is_said(ev, verdict):
    for model, why in (("bert", "the model has no usable next-token loss"), (None, "no model was run")):
        got = check(0, ce_score_zero=None, explained_variance=ev, model=model)
        assert (got.name, got.value, got.verdict) == ("explained variance (%)", pytest.approx(100 * ev), verdict)
        assert f"loss recovered, which is not measurable: {why}" in got.wanted


def test_nothing_to_explain_is_a_fail():
    for nothing in (math.nan, None):
        got = check(0, ce_score_zero=None, explained_variance=nothing)
        assert got.verdict == "fail"
        assert "choose another hookpoint" in got.advice


@pytest.mark.parametrize(
    ("l0", "verdict", "advice"),
    [(19.9, "fail", "raise --k"), (20.0, "pass", None), (200.0, "pass", None), (200.5, "fail", "lower --k")],
)
def test_l0(l0, verdict, advice):
    got = check(1, l0=l0)
    assert got.verdict == verdict
    assert (got.advice or "").startswith(advice or "") and (got.advice is None) == (advice is None)


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_kinds_with_a_penalty_are_steered_by_other_flags(architecture):
    assert check(1, l0=3, architecture=architecture).advice.startswith("raise --target_l0 (or lower --l1_coefficient)")
    assert check(1, l0=999, architecture=architecture).advice.startswith(
        "lower --target_l0 (or raise --l1_coefficient)"
    )
    assert "--k" not in check(0, ce_score_zero=0.1, architecture=architecture).advice
    assert "--resample_every" in check(2, dead_fraction=0.5, architecture=architecture).advice


@pytest.mark.parametrize(
    ("dead", "verdict"), [(0.1, "pass"), (0.11, "borderline"), (0.2, "borderline"), (0.21, "fail")]
)
def test_dead_latents(dead, verdict):
    got = check(2, dead_fraction=dead)
    assert (got.verdict, got.value) == (verdict, pytest.approx(100 * dead))
    assert verdict == "pass" or got.advice.startswith("lower --expansion_factor, raise --auxk_alpha")


def test_latents_that_seem_dead_on_little_text():
    few = check(2, dead_fraction=0.5, n_tokens=1000)
    assert few.advice.startswith("raise --eval_tokens first: by fair shares a latent fires 8 times")
    assert "--val_tokens" in check(2, dead_fraction=0.5, n_tokens=1000, model=None).advice


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.25, "pass"), (0.26, "borderline"), (0.35, "borderline"), (0.36, "fail")]
)
def test_similarity_verdicts(value, verdict):
    got = check(3, similarity=value)
    assert got.verdict == verdict
    assert verdict == "pass" or got.advice == "raise --k or lower --expansion_factor: latents share directions"
    assert "--k" not in (check(3, similarity=value, l0=999).advice or "")  # no advice against that of the L0 check
    narrow = [check(3, similarity=x, d_in=64) for x in (value, 0.6, 0.67)]
    assert [one.verdict for one in narrow] == ["pass", "borderline", "fail"]
    assert narrow[0].wanted.endswith("where as many random directions of this width score 0.56")


def test_borderline_does_not_count_in_the_score():
    a = assess({**GOOD, "ce_score_zero": 0.65, "dead_fraction": 0.15}, 0.4)
    assert a.score == "1/4"
    assert len(a.lines()) == 1 + 4 + 3  # the advice of all that did not pass
    assert "borderline loss recovered (%) 65, wanted >= 70" in "\n".join(a.lines())


def test_advice_names_flags_that_exist():
    bad = [
        {"l0": l0, "architecture": kind, "model": model, "ce_score_zero": s, "dead_fraction": 0.9, "n_tokens": n}
        for l0 in (1, 999)
        for kind in ("topk", "relu")
        for model in ("x", None)
        for s in (0.1, None)
        for n in (10, 10**9)
    ]
    known = {f.name for c in (TrainConfig, EvalConfig) for f in dataclasses.fields(c)}
    said = {
        flag for b in bad for c in assess({**GOOD, **b}, 0.9).checks for flag in re.findall(r"--(\w+)", c.advice or "")
    }
    assert said <= known
    assert {"k", "target_l0", "l1_coefficient", "expansion_factor", "eval_tokens", "val_tokens"} <= said


def brute_force(W, n_pairs=100):
    W = W / W.norm(dim=1, keepdim=True)
    pairs = [float(W[i] @ W[j]) for i in range(len(W)) for j in range(i + 1, len(W))]
    top = sorted(pairs, reverse=True)[:n_pairs]
    return sum(top) / len(top)


@pytest.mark.parametrize("F", [2, 5, 15, 60, 130])
@pytest.mark.parametrize("block", [1, 7, 32, 2048])
def test_similarity_equals_brute_force_however_it_is_cut(F, block):
    W = torch.randn(F, 6, generator=torch.Generator().manual_seed(F)) * torch.rand(F, 1)
    assert decoder_similarity(W, block=block) == pytest.approx(brute_force(W), abs=1e-6)


def test_similarity_with_many_blocks_and_at_the_edges():
    W = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    W[4999] = 3 * W[0]  # the closest pair lies in the first and the last block
    unit = W / W.norm(dim=1, keepdim=True)
    want = (unit @ unit.T).triu(1).flatten().topk(100).values.mean()
    assert decoder_similarity(W) == pytest.approx(float(want), abs=1e-6)
    assert decoder_similarity(W, n_pairs=1, block=999) == pytest.approx(1, abs=1e-6)
    assert decoder_similarity(torch.randn(1, 4)) == 0
    assert decoder_similarity(torch.zeros(3, 4)) == 0  # dead rows are like nothing
    assert decoder_similarity(torch.tensor([[1.0, 0], [-1, 0]])) == -1  # opposite is not alike


@pytest.mark.parametrize(("d", "F"), [(64, 300), (192, 1536), (768, 3000)])
def test_similarity_of_random_directions_is_foreseen(d, F):
    W = torch.randn(F, d, generator=torch.Generator().manual_seed(2))
    assert similarity_by_chance(d, F) == pytest.approx(decoder_similarity(W), rel=0.05)
    assert similarity_by_chance(d, 5) == similarity_by_chance(d, 1) == 0


def test_pairs_are_counted_once():
    """The 100 largest entries of the whole matrix are only 50 pairs: 60 close ones look closer than 100 pairs are."""
    g = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(120, 64, generator=g), dim=1)
    W = torch.cat((W, W[:60]))  # 60 pairs of cosine 1, the others near 0.4 at most
    cosines = (W @ W.T).fill_diagonal_(0)
    saetrains = float(cosines.flatten().topk(100).values.mean())
    assert saetrains == pytest.approx(1, abs=1e-5)
    assert decoder_similarity(W) == pytest.approx(float(cosines.triu(1).flatten().topk(100).values.mean()), abs=1e-5)
    assert decoder_similarity(W) < 0.85


def test_l0_is_counted_after_topk_and_around_b_dec():
    sae = create_sae(SAEConfig(d_in=16, d_sae=256, k=24))
    x = torch.randn(300, 16) + 5
    with torch.no_grad():
        sae.b_dec.fill_(5)
        before_topk = float((sae.pre_activations(x) > 0).sum(1).float().mean())
    metrics = {**SAEEvaluator(sae).evaluate(x), "architecture": "topk", "d_in": 16, "d_sae": 256}
    got = assess(metrics, 0.0).checks[1]
    assert before_topk > 100
    assert (got.value, got.verdict) == (24, "pass")


def test_variance_is_not_called_loss():
    got = assess({**GOOD, "ce_score_zero": 0.3, "explained_variance": 0.97}, 0.1).checks[0]
    assert (got.value, got.verdict) == (30, "fail")


def test_sae_eval_writes_and_says_it(here, gpt_path, text_file, capsys):
    assert call(sae_train, "--model", gpt_path, "--dataset", text_file, "--layer", 1, *SMALL) == 0
    assert not (here / "sae_models" / "layer_1" / "final_assessment.json").exists()
    assert call(sae_eval, "--eval_tokens", 300, "--output_dir", "out") == 0
    report = json.loads((here / "out" / "eval.json").read_text())
    got = json.loads((here / "out" / "final_assessment.json").read_text())
    assert got["sae"] == "transformer.h.1"
    assert got["n_tokens"] == report["n_tokens"]
    values = {c["name"]: c["value"] for c in got["checks"]}
    assert values["loss recovered (%)"] == pytest.approx(100 * report["ce_score_zero"])
    assert values["L0"] == report["l0"] <= 4
    assert values["dead latents (%)"] == pytest.approx(100 * report["dead_fraction"])
    said = capsys.readouterr().out
    assert f"{got['score']} checks passed" in said
    for c in got["checks"]:
        assert c["verdict"] == "pass" or c["advice"] in said


def test_assess_at_the_end_of_a_run_of_several(here, gpt_path, text_file, monkeypatch):
    loads = []
    load = rundir.load_language_model
    monkeypatch.setattr(rundir, "load_language_model", lambda *a, **k: (loads.append(1), load(*a, **k))[1])
    (here / "short.txt").write_text(text_file.read_text()[:40_000])
    base = ["--model", gpt_path, "--dataset", "short.txt", "--ctx_len", 32]
    assert call(sae_train, *base, "--layers", 0, 2, *SMALL, "--assess") == 0
    for name in ("transformer.h.0", "transformer.h.2"):
        folder = here / "sae_models" / "layers_0_2" / name
        assert json.loads((folder / "final_assessment.json").read_text())["sae"] == name
        assert (folder / "eval.json").is_file()
    assert not loads  # the model that was trained on is used again
    assert call(sae_collect, *base, "--layers", 0, 2, "--max_tokens", 1500, "--output_dir", "acts") == 0
    assert call(sae_train, "--activations", "acts", *SMALL, "--run_name", "cached", "--assess") == 0
    assert len(list((here / "sae_models" / "cached").rglob("final_assessment.json"))) == 2
    assert len(loads) == 1


def test_assess_of_a_run_on_a_file_uses_what_was_held_out(here, capsys):
    torch.save({"a": torch.randn(2000, 16), "b": torch.randn(2000, 24)}, "acts.pt")
    assert call(sae_train, "--activations", "acts.pt", *SMALL, "--run_name", "r", "--assess") == 0
    for name in ("a", "b"):
        got = json.loads((here / "sae_models" / "r" / name / "final_assessment.json").read_text())
        assert (got["sae"], got["n_tokens"]) == (name, 100)
        assert got["checks"][0]["name"] == "explained variance (%)"
        assert "no model was run" in got["checks"][0]["wanted"]
    assert call(sae_train, "--activations", "acts.pt:a", *SMALL, "--val_split", 0, "--assess") == 0
    assert "cannot be assessed: the run held nothing out" in capsys.readouterr().out


def test_an_assessment_without_a_name():
    assert Assessment((), "", 5).lines() == ["assessment of the SAE: 0/0 checks passed, on 5 tokens"]
