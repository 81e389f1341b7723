"""How good an SAE is: alone (sums over tokens), in its model (the loss with the SAE spliced in), and the verdict.

The same Totals serve training logs and evaluation. Definitions are the field's (docstrings name the source); where
libraries differ, both numbers are given. Knows nothing of training.

Letters: N sequences, T positions, B tokens in a batch, D width, F latents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae import files, hooks, log, plots
from sae.base import reconstruct
from sae.config import KINDS, EvalConfig, SAEConfig, TrainConfig, require
from sae.data.activations import ModelSource, Source, gather
from sae.data.tokens import Rows, TokenRows
from sae.distributed import ALONE, Axis, World
from sae.formats import store
from sae.hookpoints import SAEName, places
from sae.hooks import Acts
from sae.lm.language_model import LanguageModel, best_device
from sae.metrics import Totals, divergence
from sae.models import SAE
from sae.rundir import Opened, open_sae

DENSITY_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
N_PAIRS = 100  # of latents, whose directions are compared
ENOUGH_FIRINGS = 100  # expected per latent; below, a latent may look dead by chance or for being rare


# --------------------------------------------------------------------------------------------------
# alone


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


# --------------------------------------------------------------------------------------------------
# in the model


class InModel:
    """An SAE at its place in a model: sums over the rows read so far.

    totals: of the SAE alone. ce, kl: over n counted positions, by what takes the activation's place there.
    """

    def __init__(self, lm: LanguageModel, sae: SAE, hookpoint: str, mean: Tensor, world: World):
        self.lm, self.sae, self.places, self.mean = lm, sae, places(hookpoint, sae.config.transcode), mean
        self.totals = Totals(sae.d_out, sae.d_sae, device=sae.W_dec.device, mean=mean, world=world)
        self.n = 0
        self.ce = dict.fromkeys(("clean", "sae", "zero", "mean"), 0.0)
        self.kl = dict.fromkeys(self.ce, 0.0)

    @torch.no_grad()
    def read(self, rows: Rows) -> None:
        """Add a batch of sequences; of a large vocabulary as many at a time as have about 128 MB of logits."""
        lm = self.lm
        vocab = lm.unembedding.shape[0] if lm.unembedding is not None else 50_000
        step = max(1, (1 << 25) // (rows.ids.shape[1] * vocab)) if lm.has_head else len(rows.ids)
        for part in zip(*(x.to(lm.device).split(step) for x in rows), strict=True):
            self._read(*part)

    def _read(self, ids: Tensor, valid: Tensor, keep: Tensor) -> None:
        lm, (reads, hookpoint) = self.lm, self.places
        clean = None
        if lm.has_head:
            with hooks.capture(lm.module, list(dict.fromkeys(self.places))) as seen:
                clean = lm.logits(ids, valid)
        else:
            seen = lm.hidden(ids, valid, list(dict.fromkeys(self.places)))
        x = seen[hookpoint]
        out = self.sae(seen[reads][keep].float())
        self.totals.add(x[keep].float(), out.x_hat, out.codes)
        if clean is None:
            return
        spliced = x.clone()
        spliced[keep] = out.x_hat.to(x.dtype)
        # nothing below the hookpoint changes, so what takes its place can be made beforehand
        stand_ins = {"sae": spliced, "zero": torch.zeros_like(x), "mean": self.mean.to(x).expand_as(x)}
        counted = keep[:, :-1] & valid[:, 1:]
        next_ids = ids[:, 1:][counted].to(clean.device)
        self.n += len(next_ids)
        log_p = clean[:, :-1][counted].float().log_softmax(-1)
        self._add("clean", clean[:, :-1][counted], log_p, next_ids)
        for name, new in stand_ins.items():
            logits = lm.logits_replacing(ids, valid, hookpoint, new)
            assert logits is not None
            self._add(name, logits[:, :-1][counted], log_p, next_ids)

    def _add(self, name: str, logits: Tensor, clean: Tensor, next_ids: Tensor) -> None:
        """logits (n, V) at the counted positions, clean (n, V) log-probabilities there, next_ids (n,)."""
        new = logits.float().log_softmax(-1)
        self.ce[name] += float(F.nll_loss(new, next_ids, reduction="none").double().sum())
        self.kl[name] += float(divergence(new, clean).double().sum())

    def losses(self, data: Axis) -> dict[str, Any]:
        """A report's ce_* and kl_*: means over the positions of all processes along `data`, None without a position."""
        n = sum(data.objects(self.n))
        ce, kl = ({k: sum(data.objects(x)) / n if n else None for k, x in sums.items()} for sums in (self.ce, self.kl))
        part = lambda of, least, most: (of[most] - of["sae"]) / (of[most] - least) if n and of[most] != least else None
        return {
            "n_ce_tokens": n,
            **{f"ce_{name}": value for name, value in ce.items()},
            "ce_score_zero": part(ce, ce["clean"], "zero"),
            "ce_score_mean": part(ce, ce["clean"], "mean"),
            **{f"kl_{name}": value for name, value in kl.items() if name != "clean"},
            "kl_score_zero": part(kl, 0.0, "zero"),
        }


def evaluate(
    sae: SAE,
    hookpoint: str,
    text: TokenRows,
    n_tokens: int,
    *,
    mean_tokens: int = 16_384,
    model_batch_size: int = 16,
    world: World = ALONE,
) -> tuple[dict[str, Any], Totals]:
    """Measure an SAE on text, alone and inside the model that the text is tokenised for: eval.json.

    Takes whole sequences from the text's start until n_tokens kept tokens are seen, or it ends. The mean for mean
    ablation and the legacy explained variance comes from the first mean_tokens of it. Replicas of a world take turns
    with the batches and get the same report.

    The report holds settings, reconstruction and sparsity (Totals.metrics), and the model's loss in nats per token.
    ce_*: next-token cross entropy of the model as it is (clean), with x replaced by the reconstruction where it was
    trained (sae), by 0 (zero) and by the mean activation (mean) at all positions. ce_score_zero = (ce_zero - ce_sae) /
    (ce_zero - ce_clean), 1 for a perfect SAE, 0 for one as bad as the ablation; ce_score_mean likewise, the stricter
    one. kl_*: KL(clean || replaced), mean per token; kl_score_zero = (kl_zero - kl_sae) / kl_zero. None for a model
    without a next-token head. (SAELens evals; mean ablation added.)
    """
    lm, data, both = text.lm, world.data, places(hookpoint, sae.config.transcode)
    source = ModelSource(text, list(dict.fromkeys(both)), model_batch_size=model_batch_size)
    for name, does, wanted in zip(both, ("reads", "predicts"), (sae.d_in, sae.d_out), strict=True):
        width = source.widths[name]
        require(width == wanted, f"'{name}' is {width} wide and the SAE {does} {wanted}; give the SAE's own model")
    text.rewind()
    head = gather(source, min(mean_tokens, n_tokens), "the mean activation", world=world)[hookpoint]
    mean = data.mean((head.cpu() if data.size == 1 else head).double())
    sums = InModel(lm, sae, hookpoint, mean, world)
    text.rewind()
    was_training = sae.training
    sae.eval()
    try:
        with log.progress(n_tokens, "evaluating") as bar:
            for turn, rows in enumerate(text.until(n_tokens, model_batch_size)):
                if turn % data.size == data.rank:
                    sums.read(rows)
                bar.update(int(rows.keep.sum()))
    finally:
        sae.train(was_training)
    totals, n_mean = sums.totals.reduced(), sum(data.objects(len(head)))
    densities = totals.densities()
    percentiles = np.percentile(densities.cpu().numpy(), DENSITY_PERCENTILES)
    about = {"hookpoint": hookpoint, "model": lm.name, "dataset": text.dataset.name}
    shape = {"k": None if sae.penalised else sae.config.k, "d_in": sae.d_in, "d_sae": sae.d_sae}
    return {
        **about,
        "architecture": sae.config.activation,
        **shape,
        **totals.metrics(),
        "density_percentiles": {f"p{p}": float(v) for p, v in zip(DENSITY_PERCENTILES, percentiles, strict=True)},
        "dense_fraction": float((densities > 0.1).double().mean()),
        "n_mean_tokens": n_mean,
        **sums.losses(data),
    }, totals


def summary(report: Mapping[str, Any]) -> list[str]:
    """The few lines of a report that a person wants to read."""
    lines = [
        "explained variance {explained_variance:.4f}   (legacy {explained_variance_legacy:.4f})   "
        "cosine {cosine:.4f}   bias {relative_reconstruction_bias:.4f}",
        "L0 {l0:.1f} +- {l0_std:.1f}   dead {dead:.2f}% of {d_sae} latents over {n_tokens:,} tokens",
        "CE (nats): clean {ce_clean:.4f}   with SAE {ce_sae:.4f}   zero {ce_zero:.4f}   mean {ce_mean:.4f}",
        "CE score {ce_score_zero:.4f} against zero, {ce_score_mean:.4f} against mean   KL {kl_score_zero:.4f}",
    ]
    if any(report[score] is None for score in ("ce_score_zero", "ce_score_mean", "kl_score_zero")):
        lines[2:] = ["the model has no next-token head, so there is no cross entropy to compare"]
    return [line.format(**report, dead=100 * report["dead_fraction"]) for line in lines]


# --------------------------------------------------------------------------------------------------
# the verdict


class Check(NamedTuple):
    """One figure against what is wanted of it; advice is None where there is none to give."""

    name: str
    value: float
    wanted: str
    verdict: Literal["pass", "borderline", "fail"]
    advice: str | None


class Assessment(NamedTuple):
    """final_assessment.json: the checks, how many of them passed, and what was assessed on how many tokens."""

    checks: tuple[Check, ...]
    sae: str
    n_tokens: int

    @property
    def score(self) -> str:
        return f"{sum(check.verdict == 'pass' for check in self.checks)}/{len(self.checks)}"

    def to_dict(self) -> dict[str, Any]:
        checks = [check._asdict() for check in self.checks]
        return {"score": self.score, "checks": checks, "sae": self.sae, "n_tokens": self.n_tokens}

    def lines(self) -> list[str]:
        """What a person wants to read: a line for each check, and one of advice where it did not pass."""
        lines = [f"assessment of {self.sae or 'the SAE'}: {self.score} checks passed, on {self.n_tokens:,} tokens"]
        for check in self.checks:
            lines.append(f"  {check.verdict:10} {check.name} {check.value:.4g}, wanted {check.wanted}")
            lines += [f"             {check.advice}"] if check.advice else []
        return lines


Limits = tuple[float, float]  # least and most; NaN meets none


def _check(name: str, value: float, good: Limits, fair: Limits, wanted: str, advice: str) -> Check:
    passes, borderline = (least <= value <= most for least, most in (good, fair))
    verdict: Any = "pass" if passes else "borderline" if borderline else "fail"
    return Check(name, value, wanted, verdict, None if passes else advice)


def assess(metrics: Mapping[str, Any], similarity: float) -> Assessment:
    """The four checks.

    metrics: a report of `evaluate`, or SAEEvaluator.evaluate's, which knows no model, with `architecture`, `d_in`,
    `d_sae` and `hookpoint`. similarity: decoder_similarity of the same SAE.

    Loss recovered: the share of the loss that zero ablation costs and the SAE keeps (ce_score_zero). saetrain means
    explained variance by this name; here that stands in only where there is no loss to measure. Dead latents: those
    that fired on no token. saetrain adds those that fired fewer than 5 times or by less than 0.1 on average; both
    depend on how much text was read and on the scale of the activations.
    """
    m, inf, l0 = metrics, float("inf"), metrics["l0"]
    penalised, has_model = KINDS[m["architecture"]].penalised, bool(m.get("model"))
    more = "raise --target_l0 (or lower --l1_coefficient)" if penalised else "raise --k"
    fewer = "lower --target_l0 (or raise --l1_coefficient)" if penalised else "lower --k"

    name, score, wanted = "loss recovered (%)", m.get("ce_score_zero"), ">= 70 (borderline from 60 on)"
    if score is None:
        why = "the model has no usable next-token loss" if has_model else "no model was run"
        name, score = "explained variance (%)", m["explained_variance"]
        wanted += f", in place of loss recovered, which is not measurable: {why}"
    kept = float("nan") if score is None else 100 * score
    lost = f"{more}, --max_tokens or --expansion_factor: too much is lost in reconstruction"
    lost = lost if kept == kept else "nothing varies in these activations; choose another hookpoint"

    few, many = f"{more}: so few latents say little of a token", f"{fewer}: so many latents are hard to read"

    revive = "give --resample_every 1000" if penalised else "raise --auxk_alpha"
    silent = f"lower --expansion_factor, {revive}, or train on more (--max_tokens)"
    firings = m["n_tokens"] * l0 / m["d_sae"]
    if firings < ENOUGH_FIRINGS:
        flag = "--eval_tokens" if has_model else "--val_tokens"
        rare = f"by fair shares a latent fires {firings:.0f} times on so few tokens"
        silent = f"raise {flag} first: {rare}; then {silent}"

    chance = similarity_by_chance(m.get("d_out") or m["d_in"], m["d_sae"])
    near, nearer = max(0.25, chance), max(0.35, chance + 0.1)  # narrow models have no room for directions less alike
    unlike = f"<= {near:.2f} (borderline to {nearer:.2f})"
    unlike += f", where as many random directions of this width score {chance:.2f}" if chance > 0.25 else ""
    # at too low an L0 latents take several features in (Chanin et al. 2025, arxiv.org/abs/2508.16560)
    shared = (f"{more} or " if l0 <= 200 else "") + "lower --expansion_factor: latents share directions"

    dead, dead_wanted = 100 * m["dead_fraction"], "<= 10 (borderline to 20)"
    checks = (
        _check(name, kept, (70, inf), (60, inf), wanted, lost),
        _check("L0", l0, (20, 200), (20, 200), "20 to 200", few if l0 < 20 else many),
        _check("dead latents (%)", dead, (-inf, 10), (-inf, 20), dead_wanted, silent),
        _check("decoder similarity", similarity, (-inf, near), (-inf, nearer), unlike, shared),
    )
    return Assessment(checks, m.get("hookpoint") or "", m["n_tokens"])


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
    """Write eval.json, final_assessment.json and the plots, and say what they show; of a world the first does."""
    reading = {**opened.reading, **({"ctx_len": c.ctx_len} if c.ctx_len else {})}
    text = TokenRows(opened.lm, opened.dataset, "val", **reading)
    sizes: dict[str, Any] = {"mean_tokens": c.mean_tokens, "model_batch_size": c.model_batch_size}
    report, totals = evaluate(opened.sae, opened.hookpoint, text, c.eval_tokens, **sizes, world=world)
    if world.everyone.rank > 0:
        return
    out, history = opened.out, opened.folder / "metrics.jsonl"
    files.write_json(report, out / "eval.json")
    pictures = plots.plot_evaluation(totals, out / "plots")
    if history.is_file():
        pictures += plots.plot_training(history, out / "plots")
    for line in summary(report):
        log.say(line)
    write_assessment(report, opened.sae, out)
    log.say(f"written to {out / 'eval.json'} and {', '.join(str(p) for p in pictures)}")


def write_assessment(metrics: Mapping[str, Any], sae: SAE, out: Path) -> None:
    """Write final_assessment.json to `out`, and say what it holds."""
    assessment = assess(metrics, decoder_similarity(sae.W_dec))
    files.write_json(assessment.to_dict(), out / "final_assessment.json")
    for line in assessment.lines():
        log.say(line)


def assess_run(
    c: TrainConfig, folders: Mapping[str, Path], held_out: Source | None, lm: LanguageModel | None, world: World
) -> None:
    """Measure every SAE of a run that has just ended: {name: folder}. lm: its model, where that is loaded.

    Where the run knows no model, having trained on a file, it uses the held-out activations.
    """
    val: Acts = {}
    for name, folder in folders.items():
        if not store.load_cfg(folder).get("activations_file"):
            device = c.model_device or c.device
            one = EvalConfig(sae_path=str(folder), device=device, model_batch_size=c.model_batch_size)
            opened = open_sae(one, lm)
            lm = opened.lm
            measure(one, opened, world)
        elif held_out is None or c.transcode:
            log.say(f"'{name}' cannot be assessed: the run held nothing out; give --val_split 0.05")
        elif world.everyone.rank == 0:
            if not val:
                held_out.rewind()
                val = gather(held_out, c.val_tokens, "the assessment")
            sae = store.load_sae(folder, device=best_device(c.device))
            settings = {"architecture": sae.config.activation, "d_in": sae.d_in, "d_sae": sae.d_sae}
            metrics = SAEEvaluator(sae).evaluate(val[SAEName.parse(name).hookpoint])
            write_assessment({**metrics, **settings, "hookpoint": name}, sae, folder)
