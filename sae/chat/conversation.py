"""Conversations: answers token by token, the features active on each, and why a token was likely. Prints nothing.

A question holds all that its answer depends on (messages, edits, seed, ...), so the same question gets the same answer,
and several can be answered in turn, one token of each at a time.

Letters: T positions, D width, F latents, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import hooks
from sae.chat.messages import Ask, Feature, Token
from sae.config import UserError, require
from sae.hookpoints import input_of
from sae.lm.language_model import LanguageModel
from sae.models import SAE
from sae.runtime import InterpretableModel, Track


class Notes:
    """What a folder's features.jsonl says of an SAE's latents. Labels and largest activations stay in memory, the rest
    is read when asked for. Without such a file nothing is known. Raises UserError for a damaged one.
    """

    def __init__(self, folder: Path, n_latents: int):
        self.folder, self.path = folder, folder / "features.jsonl"
        self._at: dict[int, int] = {}  # where the line of each latent begins
        self.labels: dict[int, str] = {}
        self.largest = torch.full((n_latents,), math.nan)
        if not self.path.is_file():
            return
        start = 0
        with self.path.open("rb") as f:
            for line in f:
                record = self._parse(line)
                latent = record["latent"]
                self._at[latent] = start
                start += len(line)
                if record.get("label"):
                    self.labels[latent] = str(record["label"])
                self.largest[latent] = record.get("max_activation") or math.nan

    def record(self, latent: int) -> dict[str, Any]:
        """All that the file says of a latent; {} if it says nothing."""
        if latent not in self._at:
            return {}
        with self.path.open("rb") as f:
            f.seek(self._at[latent])
            return self._parse(f.readline())

    def search(self, words: str, n: int = 20) -> list[int]:
        """Latents whose label has all these words, or that have this number."""
        wanted = words.lower().split()
        said = lambda label: re.sub(r" or \d+ more$", "", label.lower())
        found = [i for i, label in self.labels.items() if all(word in said(label) for word in wanted)]
        number = words.strip()
        by_number = [int(number)] if number.isdecimal() and len(number) < 12 else []
        return list(dict.fromkeys([i for i in by_number if i < len(self.largest)] + found))[:n]

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if 0 <= record["latent"] < len(self.largest):
                return record
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise UserError(f"'{self.path}' has a line that is no feature of this SAE; write it again with sae_viz")


class Conversation:
    """A model, its SAEs by hookpoint, and what is known of their latents."""

    def __init__(self, lm: LanguageModel, saes: Mapping[str, SAE], notes: Mapping[str, Notes]):
        self.lm, self.notes = lm, notes
        largest = {name: note.largest for name, note in notes.items() if note.largest.isfinite().any()}
        self.live = InterpretableModel(lm, saes, max_activations=largest) if saes else None

    def watched(self, purpose: str) -> InterpretableModel:
        """The model with its SAEs. Raises UserError if there are none to serve this purpose."""
        if self.live is None:
            raise UserError(f"there is no SAE to {purpose} with; give --sae_path")
        return self.live

    def feature(self, name: str, latent: int, activation: float = 0.0) -> Feature:
        """A latent of the SAE `name`, with its label; it says which SAE if there are several."""
        label = self.notes[name].labels.get(latent, "")
        return Feature(latent, activation, label, name if len(self.notes) > 1 else None)

    def tokens_of(self, name: str, latent: int, n: int = 8) -> tuple[list[str], list[str]]:
        """The tokens whose logits a latent's direction raises and lowers most; none if it does not reach the logits."""
        moved = self.lm.logit_effects(self.watched("look").saes[name].W_dec[[latent]].detach())
        if moved is None:
            return [], []
        order = moved[0, : self.lm.tokenizer.vocab_size].argsort(descending=True).tolist()
        text = self.lm.tokenizer.token_str
        return [text(i) for i in order[:n]], [text(i) for i in order[: -n - 1 : -1]]

    def ids_of(self, ask: Ask) -> list[int]:
        """The prompt's token ids: a chat as the model knows it, else plain text to go on from."""
        tokenizer = self.lm.tokenizer
        try:
            ids = None if ask.raw else tokenizer.encode_chat(ask.messages)
            if ids is None:
                text = ask.messages[-1]["content"] if ask.raw else "\n".join(m["content"] for m in ask.messages)
                ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
        except ValueError as e:  # a character that the model does not have, turns that its chats cannot have
            raise UserError(str(e)) from e
        require(bool(ids), "the prompt is empty; write something")
        return ids

    def stream(self, ask: Ask) -> Iterator[Token]:
        """The prompt's tokens and then the answer's, each when its features are known: one forward later.

        Between tokens the model is as it was, so several streams can be read in turn. Ends at a special token, which
        is not shown, and where a stop condition holds.
        """
        ids, track, steering = self.ids_of(ask), None, None
        if ask.steer or ask.stop or (ask.sae and self.live is not None):
            live = self.watched("steer")
            track, steering = live.track(top_k=ask.top_features), live.steer(*ask.steer, stop=ask.stop)
        g = torch.Generator(self.lm.device).manual_seed(ask.seed)
        options: dict[str, Any] = {"temperature": ask.temperature, "top_k": ask.top_k, "generator": g}
        prompt, n = torch.tensor([ids], device=self.lm.device), ask.max_new_tokens + 1
        tokens, read, in_prompt = self.lm.generate(prompt, n, **options), ids[-self.lm.max_len :], True
        for _ in range(n):
            with ExitStack() as blocks:
                for block in (track, steering):
                    if block is not None:
                        blocks.enter_context(block)
                newest = int(next(tokens))
            yield from self._tokens(read, track, prompt=in_prompt)
            stopped = steering is not None and steering.stopped is not None and bool(steering.stopped)
            if stopped or newest in self.lm.tokenizer.special_ids:
                return
            read, in_prompt = [newest], False

    def _tokens(self, ids: Sequence[int], track: Track | None, *, prompt: bool) -> Iterator[Token]:
        """The tokens that were read last, with the features that track holds of them."""
        features: list[list[Feature]] = [[] for _ in ids]
        for name in track.names if track is not None else ():
            assert track is not None
            indices, values = (y[0, -len(ids) :].tolist() for y in track.features(name, last=not prompt))
            for found, *row in zip(features, indices, values, strict=True):
                found += [self.feature(name, i, v) for i, v in zip(*row, strict=True) if v != 0]
        text = self.lm.tokenizer.token_str
        yield from (Token(i, text(i), found, prompt) for i, found in zip(ids, features, strict=True))

    # ----------------------------------------------------------------------------------------------
    # which features pushed towards a token

    def explain(
        self, ask: Ask, token: str | int, answer: Sequence[int] = (), *, place: int | None = None
    ) -> dict[str, Any]:
        """Direct logit attribution: what each feature active at one place adds to a token's logit on the direct path
        through the final norm (its scale taken as it is) and the unembedding. Logits count from their mean over V.

        token: its id, or text, of which the first token counts. place: in the answer; default: where the answer first
        has the token, or its beginning. The effects and `rest` add up to `logit`; `rest` is all else: what later layers
        make of features, the error, the embeddings.
        """
        require(ask.sae, "there is no SAE to explain with; give --sae_path")
        encoded = [token] if isinstance(token, int) else self.lm.tokenizer.encode(token)
        require(bool(encoded), "the token to explain is empty; write its text")
        wanted, ids = encoded[0], self.ids_of(ask)
        text, note = self.lm.tokenizer.token_str(wanted), []
        if place is None:
            if len(encoded) > 1:
                note.append(f"{token!r} is several tokens; this is about the first of them, {text!r}.")
            if wanted not in answer:
                note.append(f"{text!r} is not in the answer; this is about how near it was to being its first token.")
            place = list(answer).index(wanted) if wanted in answer else 0
        window = torch.tensor([[*ids, *answer[:place]][-self.lm.max_len :]], device=self.lm.device)
        logits, effects = self._effects(ask, window, wanted)
        logit, chance = float(logits[wanted] - logits.mean()), float(logits.softmax(-1)[wanted])
        effects.sort(key=lambda e: -abs(e["effect"]))
        rest = logit - sum(e["effect"] for e in effects)
        about = {"token": text, "id": wanted, "position": place, "note": " ".join(note)}
        return {**about, "logit": logit, "probability": chance, "features": effects, "rest": rest}

    @torch.no_grad()
    def _effects(self, ask: Ask, window: Tensor, wanted: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """The logits (V,) after the last place, and what each feature active there adds to the wanted one."""
        lm, live = self.lm, self.watched("explain")
        norm = input_of(lm.final_norm) if lm.final_norm else None
        places = {name: live.places(name)[1] for name in live.saes}
        wants = [*places.values(), *filter(None, [norm])]
        with live.track(top_k=1000) as seen, live.steer(*ask.steer), hooks.capture(lm.module, wants) as held:
            logits = lm.logits(window, torch.ones_like(window, dtype=torch.bool))
        assert logits is not None
        scale = lm.norm_scale(held[norm][0, -1]) if norm else 1.0
        effects = []
        for name, sae in live.saes.items():
            indices, values = (y[0, 0] for y in seen.features(name, last=True))
            indices, values = indices[values != 0], values[values != 0]
            moved = lm.logit_effects(sae.W_dec[indices])
            if moved is None:
                raise UserError(f"'{name}' is not as wide as the model's stream, so no direct path leads to the logits")
            unit = sae.unit(held[places[name]][0, -1:])
            by = values * (moved[:, wanted] - moved.mean(1)) / scale * (1.0 if unit is None else unit[0])
            effects += [
                {**self.feature(name, i, v).to_dict(), "effect": e}
                for i, v, e in zip(indices.tolist(), values.tolist(), by.tolist(), strict=True)
            ]
        return logits[0, -1].float(), effects
