"""Is a trained SAE in order? Four checks with a verdict and advice each: final_assessment.json.

The checks and limits are those of saetrain's post-training assessment (github.com/tatsath/saetrain at 49679fa,
Train_sae_script.sh and sae_posttrain_eval.py), computed right: its figures came from an encoder without b_dec, its L0
from before TopK, its "loss recovered" from the variance. It wrote ranges for two limits (">= 60-70%", "<= 10-20%") and
passed all that met the laxer end; here what lies between the two ends is borderline, and only a pass counts.

Letters: D width, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

from sae.config import PENALISED

Verdict = Literal["pass", "borderline", "fail"]
N_PAIRS = 100
ENOUGH_FIRINGS = 100  # expected per latent; below, a latent may look dead by chance or for being rare


@dataclass(frozen=True)
class Check:
    """One figure against what is wanted of it; advice is None where there is none to give."""

    name: str
    value: float
    wanted: str
    verdict: Verdict
    advice: str | None


@dataclass(frozen=True)
class Assessment:
    """final_assessment.json: the checks, how many of them passed, and what was assessed on how many tokens."""

    checks: tuple[Check, ...]
    sae: str
    n_tokens: int

    @property
    def score(self) -> str:
        return f"{sum(check.verdict == 'pass' for check in self.checks)}/{len(self.checks)}"

    def to_dict(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"score": self.score, "checks": checks, "sae": self.sae, "n_tokens": self.n_tokens}

    def lines(self) -> list[str]:
        """What a person wants to read: a line for each check, and one of advice where it did not pass."""
        lines = [f"assessment of {self.sae or 'the SAE'}: {self.score} checks passed, on {self.n_tokens:,} tokens"]
        for check in self.checks:
            lines.append(f"  {check.verdict:10} {check.name} {check.value:.4g}, wanted {check.wanted}")
            lines += [f"             {check.advice}"] if check.advice else []
        return lines


def assess(metrics: Mapping[str, Any], similarity: float) -> Assessment:
    """The four checks.

    metrics: Report.to_dict(), or what it holds of SAEEvaluator.evaluate's, which knows no model, with `architecture`,
    `d_in`, `d_sae` and `hookpoint`. similarity: decoder_similarity of the same SAE.
    """
    checks = (_loss_recovered(metrics), _l0(metrics), _dead(metrics), _similarity(metrics, similarity))
    return Assessment(checks, metrics.get("hookpoint") or "", metrics["n_tokens"])


def _verdict(good: bool, fair: bool = False) -> Verdict:
    return "pass" if good else "borderline" if fair else "fail"  # NaN meets no limit


def _fewer_or_more(m: Mapping[str, Any], more: bool) -> str:
    """The flag that sets how many latents are active."""
    if m["architecture"] in PENALISED:
        return (
            "raise --target_l0 (or lower --l1_coefficient)" if more else "lower --target_l0 (or raise --l1_coefficient)"
        )
    return "raise --k" if more else "lower --k"


def _loss_recovered(m: Mapping[str, Any]) -> Check:
    """Share of the loss that ablating x to zero costs and the SAE keeps, in percent (Report.ce_score_zero).

    saetrain calls 100 * explained variance by this name; that is the fallback where there is no loss to measure.
    """
    name, score, wanted = "loss recovered (%)", m.get("ce_score_zero"), ">= 70 (borderline from 60 on)"
    if score is None:
        why = "the model has no usable next-token loss" if m.get("model") else "no model was run"
        name, score = "explained variance (%)", m["explained_variance"]
        wanted += f", in place of loss recovered, which is not measurable: {why}"
    value = float("nan") if score is None else 100 * score
    verdict = _verdict(value >= 70, value >= 60)
    more = f"{_fewer_or_more(m, more=True)}, --max_tokens or --expansion_factor: too much is lost in reconstruction"
    advice = more if value == value else "nothing varies in these activations; choose another hookpoint"
    return Check(name, value, wanted, verdict, None if verdict == "pass" else advice)


def _l0(m: Mapping[str, Any]) -> Check:
    """Mean number of latents that are active on a token after selection (Totals.metrics), 20 to 200."""
    value = m["l0"]
    verdict = _verdict(20 <= value <= 200)
    why = "so few latents say little of a token" if value < 20 else "so many latents are hard to read"
    advice = f"{_fewer_or_more(m, more=value < 20)}: {why}"
    return Check("L0", value, "20 to 200", verdict, None if verdict == "pass" else advice)


def _dead(m: Mapping[str, Any]) -> Check:
    """Latents that fired on none of the tokens, in percent (Totals.metrics).

    saetrain adds those that fired fewer than 5 times or by less than 0.1 on average; both depend on how much text was
    looked at and on the scale of the activations.
    """
    value = 100 * m["dead_fraction"]
    verdict = _verdict(value <= 10, value <= 20)
    revive = "give --resample_every 1000" if m["architecture"] in PENALISED else "raise --auxk_alpha"
    advice = f"lower --expansion_factor, {revive}, or train on more (--max_tokens)"
    firings = m["n_tokens"] * m["l0"] / m["d_sae"]
    if firings < ENOUGH_FIRINGS:
        flag = "--eval_tokens" if m.get("model") else "--val_tokens"
        advice = (
            f"raise {flag} first: by fair shares a latent fires {firings:.0f} times on so few tokens; then {advice}"
        )
    return Check("dead latents (%)", value, "<= 10 (borderline to 20)", verdict, None if verdict == "pass" else advice)


def _similarity(m: Mapping[str, Any], value: float) -> Check:
    """decoder_similarity, with what chance alone gives where that is near the limits (narrow models)."""
    chance = similarity_by_chance(m.get("d_out") or m["d_in"], m["d_sae"])
    limits = max(0.25, chance), max(0.35, chance + 0.1)  # narrow models have no room for directions less alike
    verdict = _verdict(value <= limits[0], value <= limits[1])
    # at too low an L0 latents take several features in (Chanin et al. 2025, arxiv.org/abs/2508.16560)
    advice = "lower --expansion_factor: latents share directions"
    if m["l0"] <= 200:
        advice = f"{_fewer_or_more(m, more=True)} or {advice}"
    wanted = f"<= {limits[0]:.2f} (borderline to {limits[1]:.2f})"
    if chance > 0.25:
        wanted += f", where as many random directions of this width score {chance:.2f}"
    return Check("decoder similarity", value, wanted, verdict, None if verdict == "pass" else advice)


@torch.no_grad()
def decoder_similarity(W_dec: Tensor, *, n_pairs: int = N_PAIRS, block: int = 2048) -> float:
    """Mean cosine between the decoder rows (F, D) of the n_pairs most similar pairs of latents; 0 without any pair.

    saetrain calls this feature absorption; SAEBench's absorption is another measure, made with probes. It takes the 100
    largest entries of the whole matrix, in which every pair stands twice, of a random 10,000 latents; here each of all
    pairs counts once. Works block by block: memory is O(F D + block^2).
    """
    rows = torch.nn.functional.normalize(W_dec.float(), dim=1).split(block)
    best = torch.empty(0, device=W_dec.device)
    least = -2.0
    for i, a in enumerate(rows):
        for j in range(i, len(rows)):
            cosines = a @ rows[j].T
            if i == j:
                cosines = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
            found = torch.cat((best, cosines[cosines > least]))
            best = found.topk(min(n_pairs, len(found))).values
            least = float(best[-1]) if len(best) == n_pairs else -2.0
    return float(best.mean()) if len(best) else 0.0


def similarity_by_chance(d: int, n_latents: int, *, n_pairs: int = N_PAIRS) -> float:
    """What decoder_similarity is about for random directions: cosines are near normal, with variance 1 / d."""
    share = n_pairs / max(1, n_latents * (n_latents - 1) // 2)
    if share >= 0.5:
        return 0.0
    normal = NormalDist()
    return normal.pdf(normal.inv_cdf(1 - share)) / share / d**0.5  # the mean of a normal's upper tail
