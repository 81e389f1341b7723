"""How good an SAE is: exact sums over tokens, one division at the end, and the model's loss with the SAE spliced in.

The same Totals serve training logs and evaluation. Definitions are the field's (docstrings name the source); where
libraries differ, both numbers are given. Knows nothing of training.

Letters: N sequences, T positions, B tokens in a batch, D width, F latents, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae import hooks, log
from sae.activations import ModelSource, gather
from sae.config import PENALISED, SAEConfig, UserError, require
from sae.datasets import Dataset
from sae.distributed import ALONE, Axis, World
from sae.kernels import Codes, count, moments
from sae.language_model import LanguageModel
from sae.models import SAE, Output
from sae.tokens import TokenRows, kept_positions

DENSITY_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


class Totals:
    """Sums over tokens in float64, from which every reconstruction and sparsity metric follows.

    Adding a batch in two halves gives the same totals, so no metric depends on the batch size. `mean` (D,) is what the
    legacy per-token explained variance and nothing else is measured against. world: its processes hold the latents
    between them, n_latents in all, and `reduced` adds up what each counted on its tokens.
    """

    def __init__(
        self, d_in: int, n_latents: int, *, device: torch.device | str = "cpu", mean: Tensor | None = None,
        world: World = ALONE,
    ):  # fmt: skip
        device = torch.device(device)
        device = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        zero = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        self.mean = None if mean is None else mean.to(device, torch.float64)
        self.n = 0
        self.x, self.x2, self.e2 = zero(d_in), zero(), zero()
        self.x_hat2, self.dot = zero(), zero()
        self.cosine, self.l2_ratio, self.legacy = zero(), zero(), zero()
        self.l0, self.l0_squared = zero(), zero()
        self.latents, self.data = world.latents, world.data
        self.fired = torch.zeros(len(self.latents.range(n_latents)), dtype=torch.int64, device=device)
        self.l0_counts = torch.zeros(n_latents + 1, dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if not isinstance(v, Axis)}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            old = getattr(self, name)
            setattr(self, name, value.to(old.device) if isinstance(old, Tensor) else value)

    def reduced(self) -> Totals:
        """The sums over the tokens of all processes along `data`."""
        if self.data.size == 1:
            return self
        whole = copy.copy(self)
        whole.n = sum(self.data.objects(self.n))
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "mean":
                setattr(whole, name, self.data.sum_(value.clone()))
        return whole

    def merge(self, other: Totals) -> None:
        """Add the sums over other tokens."""
        self.n += other.n
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "mean":
                value.add_(getattr(other, name).to(value.device))

    @torch.no_grad()
    def add(self, x: Tensor, x_hat: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
        """Add a batch: x and x_hat (B, D), and the codes between them, whose `activity` it returns."""
        device = self.x.device
        l0, fired = codes.activity(len(self.fired))
        activity = (self.latents.sum_(l0), fired)
        l0 = activity[0].to(device)
        self.fired += fired.to(device)
        self.l0 += l0.sum()
        self.l0_squared += l0.double().square().sum()
        self.l0_counts += count(l0, len(self.l0_counts))
        x, x_hat = x.to(device), x_hat.to(device)
        (x2, x_hat2, dot, e2), total = moments(x, x_hat)
        lengths = (x2 * x_hat2).sqrt()
        self.n += len(x)
        self.x += total
        self.x2 += x2.sum()
        self.e2 += e2.sum()
        self.x_hat2 += x_hat2.sum()
        self.dot += dot.sum()
        self.cosine += (dot / lengths.clamp(min=1e-30)).sum()
        self.l2_ratio += (x_hat2 / x2.clamp(min=1e-30)).sqrt().sum()
        if self.mean is not None:
            self.legacy += (1 - e2 / (x.double() - self.mean).square().sum(-1).clamp(min=1e-30)).sum()
        return activity

    def metrics(self) -> dict[str, float]:
        """All metrics as plain numbers (reads the device).

        mse: squared error summed over D, mean over tokens (SAELens). fvu: error over variance, sum ||x - x_hat||^2 /
        sum ||x - mean||^2, the mean being that of the same tokens; explained_variance = 1 - fvu (SAELens since its
        PR 665). explained_variance_legacy: mean over tokens of 1 - ||e||^2 / ||x - mean||^2 (SAEBench paper).
        relative_reconstruction_bias: E||x_hat||^2 / E<x, x_hat>, 1 when unbiased, below 1 when shrunk (Gated paper,
        eq. 10). l2_ratio: mean ||x_hat|| / ||x||. dead_fraction: latents that fired on none of the n_tokens.
        """
        n = max(1, self.n)
        variance = float(self.x2 - self.x.square().sum() / n)
        fvu = float(self.e2) / variance if variance > 0 else float("nan")
        l0 = float(self.l0) / n
        return {
            "n_tokens": self.n,
            "l0": l0,
            "l0_std": max(0.0, float(self.l0_squared) / n - l0**2) ** 0.5,
            "mse": float(self.e2) / n,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "explained_variance_legacy": float(self.legacy) / n if self.mean is not None else float("nan"),
            "cosine": float(self.cosine) / n,
            "l2_ratio": float(self.l2_ratio) / n,
            "relative_reconstruction_bias": float(self.x_hat2) / float(self.dot) if float(self.dot) else float("nan"),
            "dead_fraction": float(self.latents.mean((self.fired == 0).double())),
        }

    def densities(self) -> Tensor:
        """(F,) float64: the share of tokens each latent fires on."""
        return self.fired.double() / max(1, self.n)


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


@torch.no_grad()
def reconstruct(sae: SAE, x: Tensor, *, scale: float = 1.0, batch_size: int = 4096) -> Iterator[tuple[Tensor, Output]]:
    """(scale * x, forward) in batches of rows, in eval mode and leaving the mode as it was."""
    was_training = sae.training
    sae.eval()
    try:
        for rows in x.split(batch_size):
            rows = rows.to(sae.W_dec.device, sae.W_dec.dtype) * scale
            yield rows, sae(rows)
    finally:
        sae.train(was_training)


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


def divergence(new: Tensor, clean: Tensor) -> Tensor:
    """(n,): KL(clean || new) of log-probabilities (n, V). A token that clean rules out (-inf) has no share in it."""
    return torch.where(clean != -torch.inf, clean.exp() * (clean - new), 0.0).sum(-1)


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
    source = lambda: ModelSource(
        lm, TokenRows(lm, dataset, "val", ctx_len), list({reads: 0, hookpoint: 0}),
        model_batch_size=model_batch_size, skip_first=skip_first, exclude_tokens=exclude_tokens,
    )  # fmt: skip
    for name, does, wanted in ((reads, "reads", sae.d_in), (hookpoint, "predicts", sae.d_out)):
        width = source().widths[name]
        if width != wanted:
            raise UserError(f"'{name}' is {width} wide and the SAE {does} {wanted}; give the SAE's own model")
    head = gather(source(), min(mean_tokens, n_tokens), "the mean activation", world=world)[hookpoint]
    mean = world.data.mean((head.cpu() if world.data.size == 1 else head).double())
    totals = Totals(sae.d_out, sae.d_sae, device=sae.W_dec.device, mean=mean, world=world)
    losses = {name: _Loss() for name in ("clean", "sae", "zero", "mean")}
    n_counted = n_seen = turn = 0
    bar = log.progress(n_tokens, "evaluating")
    rows = TokenRows(lm, dataset, "val", ctx_len)
    was_training = sae.training
    sae.eval()
    try:
        while n_seen < n_tokens:
            ids, valid = rows.take(model_batch_size)
            if len(ids) == 0:
                break
            keep = kept_positions(lm, ids, valid, skip_first=skip_first, exclude_tokens=exclude_tokens)
            # up to the sequence in which n_tokens is reached, so that batches of any size see the same sequences
            n = int((keep.sum(1).cumsum(0) < n_tokens - n_seen).sum()) + 1
            part = (ids[:n], valid[:n], keep[:n])
            if turn % world.data.size == world.data.rank:
                n_counted += _evaluate_rows(lm, sae, hookpoint, part, mean.float().to(lm.device), totals, losses)
            bar.update(int(part[2].sum()))
            n_seen, turn = n_seen + int(part[2].sum()), turn + 1
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
    lm: LanguageModel, sae: SAE, hookpoint: str, rows: tuple[Tensor, Tensor, Tensor], mean: Tensor,
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
        k=None if sae.config.activation in PENALISED else sae.config.k, d_in=sae.d_in, d_sae=sae.d_sae,
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
