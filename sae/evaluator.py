"""How good an SAE is: exact sums over tokens, one division at the end, and the model's loss with the SAE spliced in.

The same Totals serve training logs and evaluation. Definitions are the field's (docstrings name the source); where
libraries differ, both numbers are given. Knows nothing of training.

Letters: N sequences, T positions, B tokens in a batch, D width, F latents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae import files, hooks, log, plots
from sae.base import reconstruct
from sae.config import KINDS, EvalConfig, SAEConfig, TrainConfig, UserError, require
from sae.data.activations import ModelSource, Source, gather
from sae.data.datasets import Dataset
from sae.data.tokens import Rows, TokenRows
from sae.distributed import ALONE, World
from sae.formats import store
from sae.hooks import Acts
from sae.lm.language_model import LanguageModel, best_device
from sae.metrics import Totals, divergence
from sae.models import SAE
from sae.rundir import Opened, open_sae

DENSITY_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Report:
    """eval.json: settings, reconstruction and sparsity (Totals.metrics), and the model's loss in nats per token.

    ce_*: next-token cross entropy of the model as it is (clean), with x replaced by the reconstruction where it was
    trained (sae), by 0 (zero) and by the mean activation (mean) at all positions. ce_score_zero = (ce_zero - ce_sae) /
    (ce_zero - ce_clean), 1 for a perfect SAE, 0 for one as bad as the ablation; ce_score_mean likewise, the stricter
    one. kl_*: KL(clean || replaced), mean per token; kl_score_zero = (kl_zero - kl_sae) / kl_zero. None for a model
    without a next-token head. (SAELens evals; mean ablation added.)
    """

    hookpoint: str
    model: str
    dataset: str
    architecture: str
    k: int | None
    d_in: int
    d_sae: int
    n_tokens: int
    l0: float
    l0_std: float
    mse: float
    fvu: float
    explained_variance: float
    explained_variance_legacy: float
    cosine: float
    l2_ratio: float
    relative_reconstruction_bias: float
    dead_fraction: float
    density_percentiles: dict[str, float]
    dense_fraction: float
    n_mean_tokens: int
    n_ce_tokens: int = 0
    ce_clean: float | None = None
    ce_sae: float | None = None
    ce_zero: float | None = None
    ce_mean: float | None = None
    ce_score_zero: float | None = None
    ce_score_mean: float | None = None
    kl_sae: float | None = None
    kl_zero: float | None = None
    kl_mean: float | None = None
    kl_score_zero: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEEvaluator:
    """Metrics of an SAE on activations in memory; for metrics on a model's text see `evaluate`."""

    def __init__(self, sae: SAE, config: SAEConfig | None = None):
        self.sae = sae
        self.config = config or sae.config

    def totals(self, activations: Tensor, *, batch_size: int = 4096) -> Totals:
        """The sums behind every metric, over activations (tokens, D). Raises UserError for a transcoder: it predicts
        other activations."""
        require(not self.sae.config.transcode, "this SAE is a transcoder, whose output is not its input; use evaluate")
        mean = activations.double().mean(0) if len(activations) else None
        totals = Totals(self.sae.d_in, self.sae.d_sae, device=self.sae.W_dec.device, mean=mean)
        for x, out in reconstruct(self.sae, activations, batch_size=batch_size):
            totals.add(x, out.x_hat, out.codes)
        return totals

    def evaluate(self, activations: Tensor, *, batch_size: int = 4096) -> dict[str, float]:
        """Totals.metrics over activations (tokens, D), the same for any batch size."""
        return self.totals(activations, batch_size=batch_size).metrics()


class _Loss:
    """Sums of cross entropy and KL over counted positions, for one way of running the model."""

    def __init__(self) -> None:
        self.ce, self.kl = 0.0, 0.0

    def add(self, logits: Tensor, clean: Tensor, next_ids: Tensor) -> None:
        """logits (n, V) at the counted positions, clean (n, V) log-probabilities there, next_ids (n,)."""
        new = logits.float().log_softmax(-1)
        self.ce += float(F.nll_loss(new, next_ids, reduction="none").double().sum())
        self.kl += float(divergence(new, clean).double().sum())


def evaluate(
    lm: LanguageModel, sae: SAE, hookpoint: str, dataset: Dataset,
    *, n_tokens: int, ctx_len: int, skip_first: bool = False, exclude_tokens: Sequence[int] = (),
    model_batch_size: int = 16, mean_tokens: int = 16_384, world: World = ALONE,
) -> tuple[Report, Totals]:  # fmt: skip
    """Measure an SAE on held-out text, alone and inside the model.

    Takes whole sequences until n_tokens kept tokens are seen, or the held-out text ends. The mean for mean ablation
    and the legacy explained variance comes from the first mean_tokens of the same text. Replicas of a world take turns
    with the batches and get the same report.
    """
    reads = f"{hookpoint}@in" if sae.config.transcode else hookpoint
    text = lambda: TokenRows(lm, dataset, "val", ctx_len, skip_first=skip_first, exclude_tokens=exclude_tokens)
    source = lambda: ModelSource(text(), list({reads: 0, hookpoint: 0}), model_batch_size=model_batch_size)
    for name, does, wanted in ((reads, "reads", sae.d_in), (hookpoint, "predicts", sae.d_out)):
        width = source().widths[name]
        if width != wanted:
            raise UserError(f"'{name}' is {width} wide and the SAE {does} {wanted}; give the SAE's own model")
    head = gather(source(), min(mean_tokens, n_tokens), "the mean activation", world=world)[hookpoint]
    mean = world.data.mean((head.cpu() if world.data.size == 1 else head).double())
    totals = Totals(sae.d_out, sae.d_sae, device=sae.W_dec.device, mean=mean, world=world)
    losses = {name: _Loss() for name in ("clean", "sae", "zero", "mean")}
    n_counted = 0
    bar = log.progress(n_tokens, "evaluating")
    was_training = sae.training
    sae.eval()
    try:
        for turn, rows in enumerate(text().until(n_tokens, model_batch_size)):
            if turn % world.data.size == world.data.rank:
                n_counted += _evaluate_rows(lm, sae, hookpoint, rows, mean.float().to(lm.device), totals, losses)
            bar.update(int(rows.keep.sum()))
    finally:
        sae.train(was_training)
        bar.close()
    totals = totals.reduced()
    for loss in losses.values():
        loss.ce, loss.kl = (sum(world.data.objects(value)) for value in (loss.ce, loss.kl))
    n_counted, n_mean = (sum(world.data.objects(n)) for n in (n_counted, len(head)))
    return _report(lm, sae, hookpoint, dataset, totals, losses, n_counted, n_mean), totals


@torch.no_grad()
def _evaluate_rows(
    lm: LanguageModel, sae: SAE, hookpoint: str, rows: Rows, mean: Tensor,
    totals: Totals, losses: dict[str, _Loss],
) -> int:  # fmt: skip
    """One batch of sequences: add to totals and losses; returns how many positions the losses counted."""
    # Logits of a large vocabulary are big: as many sequences at a time as stay near 128 MB of them.
    vocab = lm.unembedding.shape[0] if lm.unembedding is not None else 50_000
    step = max(1, (1 << 25) // (rows[0].shape[1] * vocab)) if lm.has_head else len(rows[0])
    n_counted = 0
    reads = f"{hookpoint}@in" if sae.config.transcode else hookpoint
    for part in zip(*(r.to(lm.device).split(step) for r in rows), strict=True):
        ids, valid, keep = part
        if not lm.has_head:
            seen = lm.hidden(ids, valid, list({reads: 0, hookpoint: 0}))
            out = sae(seen[reads][keep].float())
            totals.add(seen[hookpoint][keep].float(), out.x_hat, out.codes)
            continue
        with hooks.capture(lm.module, list({reads: 0, hookpoint: 0})) as seen:
            clean = lm.logits(ids, valid)
        assert clean is not None
        x = seen[hookpoint]
        out = sae(seen[reads][keep].float())
        totals.add(x[keep].float(), out.x_hat, out.codes)
        spliced = x.clone()
        spliced[keep] = out.x_hat.to(x.dtype)
        # nothing below the hookpoint changes, so what takes its place can be made beforehand
        stand_ins = {"sae": spliced, "zero": torch.zeros_like(x), "mean": mean.to(x).expand_as(x)}
        counted = keep[:, :-1] & valid[:, 1:]
        next_ids = ids[:, 1:][counted].to(clean.device)
        n_counted += len(next_ids)
        log_p = clean[:, :-1][counted].float().log_softmax(-1)
        losses["clean"].add(clean[:, :-1][counted], log_p, next_ids)
        for name, new in stand_ins.items():
            logits = lm.logits_replacing(ids, valid, hookpoint, new)
            assert logits is not None
            losses[name].add(logits[:, :-1][counted], log_p, next_ids)
    return n_counted


def _report(
    lm: LanguageModel, sae: SAE, hookpoint: str, dataset: Dataset, totals: Totals, losses: dict[str, _Loss],
    n_counted: int, n_mean_tokens: int,
) -> Report:  # fmt: skip
    densities = totals.densities()
    percentiles = np.percentile(densities.cpu().numpy(), DENSITY_PERCENTILES)
    fields: dict[str, Any] = {
        **totals.metrics(),
        "density_percentiles": {f"p{p}": float(v) for p, v in zip(DENSITY_PERCENTILES, percentiles, strict=True)},
        "dense_fraction": float((densities > 0.1).double().mean()),
    }
    if n_counted:
        ce = {name: loss.ce / n_counted for name, loss in losses.items()}
        kl = {name: loss.kl / n_counted for name, loss in losses.items()}
        ratio = lambda a, b: a / b if b else None
        fields |= {f"ce_{name}": value for name, value in ce.items()}
        fields |= {f"kl_{name}": kl[name] for name in ("sae", "zero", "mean")}
        fields |= {
            "n_ce_tokens": n_counted,
            "ce_score_zero": ratio(ce["zero"] - ce["sae"], ce["zero"] - ce["clean"]),
            "ce_score_mean": ratio(ce["mean"] - ce["sae"], ce["mean"] - ce["clean"]),
            "kl_score_zero": ratio(kl["zero"] - kl["sae"], kl["zero"]),
        }
    return Report(
        hookpoint=hookpoint, model=lm.name, dataset=dataset.name, architecture=sae.config.activation,
        k=None if sae.penalised else sae.config.k, d_in=sae.d_in, d_sae=sae.d_sae,
        n_mean_tokens=n_mean_tokens, **fields,
    )  # fmt: skip


def summary(report: Report) -> list[str]:
    """The few lines a person wants to read."""
    r = report
    lines = [
        f"explained variance {r.explained_variance:.4f}   (legacy {r.explained_variance_legacy:.4f})   "
        f"cosine {r.cosine:.4f}   bias {r.relative_reconstruction_bias:.4f}",
        f"L0 {r.l0:.1f} +- {r.l0_std:.1f}   dead {100 * r.dead_fraction:.2f}% of {r.d_sae} latents "
        f"over {r.n_tokens:,} tokens",
    ]
    scores: Sequence[float | None] = (r.ce_score_zero, r.ce_score_mean, r.kl_score_zero)
    if r.ce_clean is None or any(s is None for s in scores):
        return [*lines, "the model has no next-token head, so there is no cross entropy to compare"]
    return [
        *lines,
        f"CE (nats): clean {r.ce_clean:.4f}   with SAE {r.ce_sae:.4f}   zero {r.ce_zero:.4f}   mean {r.ce_mean:.4f}",
        f"CE score {r.ce_score_zero:.4f} against zero, {r.ce_score_mean:.4f} against mean   KL {r.kl_score_zero:.4f}",
    ]


# --------------------------------------------------------------------------------------------------
# the verdict

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
    if KINDS[m["architecture"]].penalised:
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
    revive = "give --resample_every 1000" if KINDS[m["architecture"]].penalised else "raise --auxk_alpha"
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


# --------------------------------------------------------------------------------------------------
# of a run


def measure(c: EvalConfig, opened: Opened, world: World = ALONE) -> None:
    """Write eval.json, final_assessment.json and the plots, and say what stands in them; of a world the first does."""
    lm, sae, hookpoint, dataset, trained_on, folder, out = opened
    report, totals = evaluate(
        lm, sae, hookpoint, dataset, n_tokens=c.eval_tokens, mean_tokens=c.mean_tokens,
        ctx_len=c.ctx_len or trained_on.get("context_size", 256), skip_first=trained_on.get("skip_first", False),
        exclude_tokens=trained_on.get("exclude_tokens", ()), model_batch_size=c.model_batch_size,
        world=world,
    )  # fmt: skip
    if world.everyone.rank > 0:
        return
    files.write_json(report.to_dict(), out / "eval.json")
    pictures = plots.plot_evaluation(totals, out / "plots")
    if (folder / "metrics.jsonl").is_file():
        pictures += plots.plot_training(folder / "metrics.jsonl", out / "plots")
    for line in summary(report):
        log.say(line)
    write_assessment(report.to_dict(), sae, out)
    log.say(f"written to {out / 'eval.json'} and {', '.join(str(p) for p in pictures)}")


def write_assessment(metrics: Mapping[str, Any], sae: SAE, out: Path) -> None:
    """Write final_assessment.json to `out`, and say what stands in it."""
    assessment = assess(metrics, decoder_similarity(sae.W_dec))
    files.write_json(assessment.to_dict(), out / "final_assessment.json")
    for line in assessment.lines():
        log.say(line)


def assess_run(
    c: TrainConfig, folders: Mapping[str, Path], held_out: Source | None, lm: LanguageModel | None = None,
    world: World = ALONE,
) -> None:  # fmt: skip
    """Measure every SAE of a run that has just ended: {hookpoint: folder}. lm: its model, where that is loaded.

    Where the run knows no model, having trained on a file, its held-out activations must do.
    """
    val: Acts = {}
    for hookpoint, folder in folders.items():
        if not store.load_cfg(folder).get("activations_file"):
            device = c.model_device or c.device
            one = EvalConfig(sae_path=str(folder), device=device, model_batch_size=c.model_batch_size)
            opened = open_sae(one, lm)
            lm = opened.lm
            measure(one, opened, world)
        elif held_out is not None and not c.transcode:
            if world.everyone.rank > 0:
                continue
            if not val:
                held_out.rewind()
                val = gather(held_out, c.val_tokens, "the assessment")
            sae = store.load_sae(folder, device=best_device(c.device))
            settings = {"architecture": sae.config.activation, "d_in": sae.d_in, "d_sae": sae.d_sae}
            metrics = SAEEvaluator(sae).evaluate(val[hookpoint.split("/")[0]])
            write_assessment({**metrics, **settings, "hookpoint": hookpoint}, sae, folder)
        else:
            log.say(f"'{hookpoint}' cannot be assessed: the run held nothing out; give --val_split 0.05")
