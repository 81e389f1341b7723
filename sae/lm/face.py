"""What the rest of the package needs of a language model: tokens in, hidden states and logits out.

Knows nothing of SAEs; the hooks place themselves on `LanguageModel.module`.

Letters: N sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sae import hooks
from sae.config import UserError, require
from sae.hookpoints import n_layers

# Where families keep the norm before the unembedding; the first that exists is taken.
FINAL_NORMS = "transformer.ln_f model.norm gpt_neox.final_layer_norm model.decoder.final_layer_norm".split()
FINAL_NORMS += ["model.final_layernorm"]


@dataclass
class LanguageModel:
    """A model, its tokenizer and what the rest of the package needs to know about them.

    module:     any nn.Module; its submodules are the hookpoints
    tokenizer:  encode, encode_document, token_str, special_ids, content_hash as in tokenizer.py
    forward_fn: (module, ids (N, T), valid (N, T) bool) -> logits (N, T, V), or None for a model without a head
    wrap:       of an encoder, the tokens around each row; None for a next-token model, whose rows are packed documents
    resume_fn:  (module, hookpoint, x (N, T, D)) -> logits from there on, or None where it cannot; a shortcut only
    step_fn:    (module, ids (N, T), cache or None) -> logits (N, T, V) and the cache with these tokens; a shortcut only
    dtype:      what it computes in
    """

    module: nn.Module
    tokenizer: Any
    forward_fn: Callable[[nn.Module, Tensor, Tensor], Tensor | None]
    name: str
    d_model: int
    max_len: int
    has_head: bool = True
    wrap: tuple[int, int] | None = None
    pad_id: int = 0
    resume_fn: Callable[[nn.Module, str, Tensor], Tensor | None] | None = None
    step_fn: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]] | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def n_layers(self) -> int:
        return n_layers(self.module)

    @torch.no_grad()
    def logits(self, ids: Tensor, valid: Tensor) -> Tensor | None:
        """(N, T, V) logits of every position, or None for a model without a head. valid bool: not padding."""
        return self.forward_fn(self.module, ids.to(self.device), valid.to(self.device))

    @torch.no_grad()
    def hidden(self, ids: Tensor, valid: Tensor, hookpoints: Sequence[str]) -> dict[str, Tensor]:
        """The activations at the hookpoints, (N, T, D) each; the forward stops after the last of them.

        An encoder's rows are often short, a piece of one document each: they run with others of about their length, and
        positions after their end are 0.
        """
        if self.wrap is None:
            return self._hidden(ids, valid, hookpoints)
        found: dict[str, Tensor] = {}
        for rows, width in _by_length(valid):
            for name, x in self._hidden(ids[rows, :width], valid[rows, :width], hookpoints).items():
                if x.shape[:2] != (len(rows), width):  # not one value per token
                    return self._hidden(ids, valid, hookpoints)
                found.setdefault(name, x.new_zeros(*ids.shape, *x.shape[2:]))[rows, :width] = x
        return found

    def _hidden(self, ids: Tensor, valid: Tensor, hookpoints: Sequence[str]) -> dict[str, Tensor]:
        ids, valid = ids.to(self.device), valid.to(self.device)
        seen = hooks.run(self.module, hookpoints, lambda: self.forward_fn(self.module, ids, valid))
        # forward_fn may have run on more positions, to the right
        return {name: x[:, : ids.shape[1]] if x.ndim == 3 else x for name, x in seen.items()}

    @torch.no_grad()
    def logits_replacing(self, ids: Tensor, valid: Tensor, hookpoint: str, x: Tensor) -> Tensor | None:
        """Logits of a forward with x (N, T, D) in place of the hookpoint's activations."""
        logits = self.resume_fn(self.module, hookpoint, x) if self.resume_fn is not None else None
        if logits is None:
            # forward_fn may run on more positions, to the right
            whole = lambda old: x if x.shape == old.shape else torch.cat((x, old[:, x.shape[1] :]), 1)
            with hooks.replace(self.module, {hookpoint: whole}):
                logits = self.logits(ids, valid)
        return logits

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int,
        *, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield what follows ids (N, T), token by token as (N, 1); temperature 0 takes the best, top_k draws from the
        best so many. A full context loses its oldest half."""
        require(self.has_head, f"'{self.name}' has no next-token head, so it writes nothing; give another model")
        window, cache, n_read = ids.to(self.device)[:, -self.max_len :], None, 0
        for _ in range(max_new_tokens):
            if window.shape[1] > self.max_len:
                window, cache, n_read = window[:, -max(1, self.max_len // 2) :], None, 0
            if self.step_fn is not None:
                logits, cache = self.step_fn(self.module, window[:, n_read:], cache)
            else:
                found = self.forward_fn(self.module, window, torch.ones_like(window, dtype=torch.bool))
                assert found is not None
                logits = found
            n_read = window.shape[1]
            last = logits[:, -1, : self.tokenizer.vocab_size].float()  # a model's vocabulary may be padded
            if top_k is not None and top_k < last.shape[1]:
                last = last.masked_fill(last < last.topk(top_k).values[:, -1:], -torch.inf)
            if temperature == 0:
                token = last.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
            yield token
            window = torch.cat((window, token), 1)

    def widths(self, hookpoints: Sequence[str]) -> dict[str, int]:
        """Width of the activations at each hookpoint, from two tiny forwards."""
        ids = torch.full((1, 2), max(0, self.pad_id), dtype=torch.int64)
        valid = torch.ones_like(ids, dtype=torch.bool)
        found = self.hidden(ids, valid, hookpoints)
        at = ids.to(self.device), valid.to(self.device)
        with torch.no_grad():
            hooks.check_once(self.module, hookpoints, lambda: self.forward_fn(self.module, *at))
        for name, x in found.items():
            if x.ndim != 3 or x.shape[:2] != ids.shape or not x.is_floating_point():
                raise UserError(
                    f"'{name}' holds {x.dtype} of shape {tuple(x.shape)}, not one vector a token; choose another"
                )
        return {name: found[name].shape[-1] for name in hookpoints}

    @cached_property
    def final_norm(self) -> str | None:
        """Path of the norm before the unembedding; None where it is no module."""
        names = dict(self.module.named_modules())
        return next((n for n in FINAL_NORMS if n in names), None)

    @property
    def _final_norm(self) -> nn.Module | None:
        return self.module.get_submodule(self.final_norm) if self.final_norm else None

    @cached_property
    def unembedding(self) -> Tensor | None:
        """(V, D): the map from the last residual stream to logits, with the final norm's gain folded in; or None."""
        head = getattr(self.module, "lm_head", None) or getattr(self.module, "embed_out", None)
        weight = getattr(head, "weight", None)
        if weight is None or weight.shape[1] != self.d_model:
            return None
        gain = getattr(self._final_norm, "weight", None)
        # nanochat pads the matrix and cuts the logits to the vocabulary
        weight = weight.detach()[: getattr(getattr(self.module, "config", None), "vocab_size", None)].float()
        if gain is None:
            return weight
        # Gemma's norms store their gain as a difference from 1
        shift = 1.0 if "Gemma" in type(self._final_norm).__name__ else 0.0
        return weight * (gain.detach().float() + shift)

    @torch.no_grad()
    def logit_effects(self, directions: Tensor) -> Tensor | None:
        """(n, V): how directions (n, D) added to the last residual stream move the logits, up to the norm's scale.

        Through the final norm's gain; a LayerNorm also removes the mean over D, an RMSNorm does not. A soft cap on
        the logits is left out: it shrinks an effect and keeps its sign.
        """
        # nanochat's final norm is a function, an RMSNorm without gain: no module is found, and neither gain nor mean is
        # applied, which is right. Its lambdas (of the stream, and of the middle layer's output that the end subtracts)
        # scale a direction on its straight way to the end and do not turn it.
        if self.unembedding is None or directions.shape[-1] != self.d_model:
            return None
        directions = directions.float()
        if self._final_norm is not None and "RMS" not in type(self._final_norm).__name__:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions @ self.unembedding.to(directions.device).t()

    def norm_scale(self, x: Tensor) -> Tensor:
        """The number () by which the final norm divides x (D,), a token's last residual stream."""
        norm = self._final_norm
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0
        centred = x.float() if "RMS" in type(norm).__name__ else x.float() - x.float().mean()
        return (centred.square().mean() + eps).sqrt()

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of all weights by name, for provenance: equal for equal models whatever the device."""
        digest = hashlib.sha256()
        for name, w in sorted(self.module.state_dict().items()):
            if w.dtype in (torch.bfloat16, torch.float16):  # nanochat keeps some so on a GPU, and not on a CPU
                w = w.float()
            digest.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
            digest.update(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _by_length(valid: Tensor) -> list[tuple[Tensor, int]]:
    """Rows (n,) of valid (N, T) whose last real position lies below the same power of two, or T; and that bound."""
    T = valid.shape[1]
    lengths = (valid * torch.arange(1, T + 1, device=valid.device)).amax(1).tolist()
    bounds = torch.tensor([min(T, 1 << max(3, (n - 1).bit_length())) for n in lengths], dtype=torch.int64)
    return [((bounds == bound).nonzero()[:, 0], bound) for bound in bounds.unique().tolist()]
