"""End-to-end training: the loss is the model's own, with SAE reconstructions in place of the activations.

Token rows -> clean and spliced forwards -> cross entropy, or KL(clean || spliced) -> gradients of the SAEs. Masked
positions (special tokens, padding) keep their activations. (Braun et al. 2024, arxiv.org/abs/2405.12241.)

Letters: N sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sae import hooks
from sae.base import Losses, Output, layer_norm
from sae.config import TrainConfig, UserError, require
from sae.data.activations import ModelSource, gather
from sae.data.tokens import Rows
from sae.distributed import ALONE, World
from sae.hooks import Acts
from sae.learner import Learner, Terms
from sae.lm.language_model import LanguageModel
from sae.metrics import divergence
from sae.schedules import tokens_per_step


class RowStream:
    """Batches of whole sequences with about batch_size kept tokens each: n_batches of them, from any place on.

    Has the face of activations.Stream. A dataset that ends is read again; n_passes counts. Of several processes all get
    the same sequences.
    """

    def __init__(self, source: ModelSource, *, n_tokens: int, batch_size: int, world: World = ALONE):
        self.source, self.rows, self.world = source, source.rows, world
        self.n_sample: int | None = None  # tokens in `sample`, of all processes
        self.n_rows = max(1, round(batch_size / self.rows.ctx_len))
        self.batch_size = self.n_rows * self.rows.ctx_len
        self.n_batches = n_tokens // self.batch_size
        if self.n_batches < 1:
            raise UserError(f"{n_tokens} tokens do not fill one batch of {self.batch_size}; lower --batch_size")
        if self.n_rows < world.data.size:
            raise UserError(
                f"a batch of {self.n_rows} sequences leaves some of {world.data.size} replicas without; raise "
                "--batch_size"
            )
        self.n_tokens = self.n_batches * self.batch_size
        self.n_given = self.n_passes = 0

    def sample(self) -> Acts:
        """Activations of some of the first rows, which are not used up; of n processes each gets every n-th token."""
        place = self.rows.state_dict()
        acts = gather(self.source, 4 * self.batch_size, "the start", world=self.world)
        self.rows.load_state_dict(place)
        self.n_sample = sum(self.world.data.objects(len(next(iter(acts.values())))))
        return acts

    def __next__(self) -> Rows:
        rows = self.rows.take(self.n_rows)
        while len(rows.ids) < self.n_rows:  # a batch may span the end of the data and its beginning
            self.rows.rewind()
            self.n_passes += 1
            more = self.rows.take(self.n_rows - len(rows.ids))
            if not len(more.ids):
                raise UserError("the dataset is empty, or too short for one sequence; give a longer text")
            rows = Rows(*map(torch.cat, zip(rows, more, strict=True)))
        self.n_given += self.batch_size
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict(), "n_given": self.n_given, "n_passes": self.n_passes}

    def held_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], held: Sequence[dict[str, Any]] = ()) -> None:
        del held
        self.rows.load_state_dict(state["rows"])
        self.n_given, self.n_passes = state["n_given"], state["n_passes"]


class EndToEnd:
    """The objective `ce` or `kl`, for SAEs at one or several hookpoints of a model.

    Of several processes each has its part of a batch's sequences.
    """

    def __init__(
        self, lm: LanguageModel, kind: Literal["ce", "kl"], val: list[Rows], *, model_batch_size: int = 16,
        world: World = ALONE,
    ):  # fmt: skip
        if not lm.has_head:
            raise UserError(f"'{lm.name}' has no next-token head, so there is no {kind} to train on; use --loss_fn fvu")
        self.lm, self.kind, self.val, self.model_batch_size, self.data = lm, kind, val, model_batch_size, world.data

    def learn(self, batch: Rows, learners: Mapping[str, Learner], step: int) -> None:
        """Add the gradients of a batch of sequences, model_batch_size of them at a time.

        The loss is the mean over the batch's counted tokens, so that the parts' gradients add up to the whole's, but
        of kinds that choose over a batch (BatchTopK, Matryoshka): these keep their k per part.
        """
        n_kept, n_counted = int(batch.keep.sum()), int(_counted(batch).sum())
        terms: dict[str, Terms] = {}  # of the whole step
        own = (t[self.data.rank :: self.data.size] for t in batch)
        for part in zip(*(t.split(self.model_batch_size) for t in own), strict=True):
            rows = Rows(*part)
            share = int(rows.keep.sum()) / max(1, n_kept)
            if not share:
                continue
            sides: dict[str, tuple[Tensor, Output, Losses]] = {}

            def reconstruct(name: str, x: Tensor, y: Tensor, sides: dict = sides) -> Tensor:
                learner = learners[name]
                if name not in terms:
                    terms[name] = learner.terms(step, x, [x])
                x_hat, *sides[name] = _reconstruct(learner, x, y, terms[name])
                return x_hat

            objective = self._loss(rows, self._edits(learners, rows, reconstruct)) / max(1, n_counted)
            total = objective + sum(losses.total * share for _, _, losses in sides.values())
            total.backward()
            for name, (target, out, losses) in sides.items():
                whole = losses._replace(total=losses.total + objective.detach() / share)
                learners[name].account(target, out, whole, share, objective=objective.detach() / share)
                learners[name].pending = (out, None)
        for learner in learners.values():
            learner.counts.n_tokens = n_kept

    @torch.no_grad()
    def validate(self, learners: Mapping[str, Learner]) -> float:
        """The objective on the held-out rows, mean per token, with the SAEs as they would be saved."""
        saes = {name: learner.finished() for name, learner in learners.items()}
        total, n = 0.0, 0
        for rows in self.val[self.data.rank :: self.data.size]:
            edits = self._edits(learners, rows, lambda name, x, y: saes[name](x).x_hat)  # noqa: ARG005
            total += float(self._loss(rows, edits))
            n += int(_counted(rows).sum())
        return sum(self.data.objects(total)) / max(1, sum(self.data.objects(n)))

    def _edits(
        self, learners: Mapping[str, Learner], rows: Rows, reconstruct: Callable[[str, Tensor, Tensor], Tensor]
    ) -> dict[str, Callable[[Tensor], Tensor | None]]:
        """The edit at each hookpoint: remember a transcoder's input, put the reconstruction in place.

        reconstruct(name, x, y): for the kept positions' raw input x and target y, the raw reconstruction (n, D_out).
        """
        at = rows.keep.flatten().nonzero()[:, 0].to(self.lm.device)  # found on the CPU: masks on a GPU make it wait
        inputs: dict[str, Tensor] = {}
        edits: dict[str, Callable[[Tensor], Tensor | None]] = {}

        def put(name: str, reads: str, y: Tensor) -> Tensor:
            x = inputs.get(reads, y)
            x_hat = reconstruct(name, x.flatten(0, 1)[at].float(), y.flatten(0, 1)[at].float())
            return y.flatten(0, 1).index_copy(0, at, x_hat.to(y.dtype)).view_as(y)

        for name, learner in learners.items():
            if learner.config.transcode:
                edits[learner.reads] = partial(inputs.__setitem__, learner.reads)
            edits[learner.hookpoint] = partial(put, name, learner.reads)
        return edits

    def _loss(self, rows: Rows, edits: dict[str, Callable[[Tensor], Tensor | None]]) -> Tensor:
        """Sum over counted positions of the cross entropy, or of KL(clean || spliced), in nats."""
        lm = self.lm
        ids, valid = rows.ids.to(lm.device), rows.valid.to(lm.device)
        at = _counted(rows).flatten().nonzero()[:, 0].to(lm.device)
        pick = lambda logits: logits[:, :-1].flatten(0, 1)[at].float().log_softmax(-1)
        clean = lm.logits(ids, valid) if self.kind == "kl" else None
        with hooks.hooked(lm.module, edits):
            logits = lm.forward_fn(lm.module, ids, valid)
        assert logits is not None
        if clean is None:
            return F.nll_loss(pick(logits), ids[:, 1:].flatten()[at], reduction="sum")
        return divergence(pick(logits), pick(clean)).sum()


def _reconstruct(learner: Learner, x: Tensor, y: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Output, Losses]:
    """For raw activations (n, D): the raw reconstruction, the scaled target, the output and the SAE's own losses."""
    inner, target = learner.normalise(x, y)
    out, losses = learner.forward(inner, target.detach(), terms)
    if learner.config.normalize_activations == "layer_norm":
        _, mean, std = layer_norm(x)
        return out.x_hat * std + mean, target.detach(), out, losses
    return out.x_hat / learner.scale_out, target.detach(), out, losses


def _counted(rows: Rows) -> Tensor:
    """(N, T-1): positions whose next token is predicted and counts."""
    return rows.keep[:, :-1] & rows.valid[:, 1:]


def held_out(source: ModelSource, n_tokens: int) -> list[Rows]:
    """The next sequences of a held-out source with about n_tokens kept tokens, a forward's worth at a time."""
    found: list[Rows] = []
    n = 0
    while n < n_tokens:
        rows = source.rows.take(source.model_batch_size)
        if not len(rows.ids):
            break
        found.append(rows)
        n += int(rows.keep.sum())
    return found


def open_run(c: TrainConfig, source: Any, validation: Any, world: World) -> tuple[RowStream, EndToEnd]:
    """The stream of sequences and the objective of a run with --loss_fn ce or kl, on a live model."""
    assert isinstance(source, ModelSource) and isinstance(validation, ModelSource) and c.loss_fn in ("ce", "kl")
    gated = "gated" in c.sweep.get("activation", (c.activation,)) and c.fvu_coefficient == 0
    needs = f"a gate learns from reconstruction alone; with --loss_fn {c.loss_fn} give --fvu_coefficient 0.1"
    require(not gated, needs)
    validation.rewind()
    val = held_out(validation, min(c.val_tokens, 8192))
    n_tokens = c.max_tokens * c.num_epochs
    stream = RowStream(source, n_tokens=n_tokens, batch_size=tokens_per_step(c), world=world)
    return stream, EndToEnd(source.lm, c.loss_fn, val, model_batch_size=c.model_batch_size, world=world)
