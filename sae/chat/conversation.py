"""Talk with a model and see which features were active on every token: what the terminal and the page both show.

A question holds all it depends on (messages, edits, seed, ...), so the same question gets the same answer, and several
can be answered in turn, a token of each at a time. Prints nothing.

Letters: T positions, D width, F latents, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import hooks
from sae.chat.messages import Ask, Feature, Token
from sae.config import UserError, require
from sae.lm.language_model import LanguageModel
from sae.models import SAE
from sae.runtime import InterpretableModel, Track


class Notes:
    """What a folder's features.jsonl says of an SAE's latents: labels and largest activations at hand, the rest when
    asked for.

    Without such a file nothing is known. Raises UserError for a damaged one.
    """

    def __init__(self, folder: Path, n_latents: int):
        self.folder, self.path = folder, folder / "features.jsonl"
        self._at: dict[int, int] = {}
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
        """All that the file says of a latent; {} where it says nothing."""
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

    def label(self, name: str, latent: int) -> str:
        return self.notes[name].labels.get(latent, "")

    def tokens_of(self, direction: Tensor, n: int = 8) -> tuple[list[str], list[str]]:
        """The tokens whose logits a direction (D,) raises and lowers most; none where it has no way there."""
        moved = self.lm.logit_effects(direction[None])
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
        """The prompt's tokens and then the answer's, each when its features are known: that is one forward later.

        Between tokens the model is as it was, so several streams can be read in turn. Ends at a special token, which
        is not shown, and where a stop condition holds.
        """
        ids = self.ids_of(ask)
        prompt = torch.tensor([ids], device=self.lm.device)
        watched = self.live is not None and ask.sae
        require(watched or not (ask.steer or ask.stop), "there is no SAE to steer with; give --sae_path")
        track = self.live.tracker(top_k=ask.top_features) if watched and self.live else None
        steering = self.live.steering(*ask.steer, stop=ask.stop) if watched and self.live else None
        tokens = self.lm.generate(
            prompt, ask.max_new_tokens + 1, temperature=ask.temperature, top_k=ask.top_k,
            generator=torch.Generator(self.lm.device).manual_seed(ask.seed),
        )  # fmt: skip
        newest: int | None = None
        for _ in range(ask.max_new_tokens + 1):
            with self.live.active(track, steering) if track and steering and self.live else nullcontext():
                token = next(tokens)
            if newest is None:
                yield from self._tokens(ids[-self.lm.max_len :], track, prompt=True)
            else:
                yield from self._tokens([newest], track, prompt=False)
            if steering is not None and steering.stopped is not None and bool(steering.stopped):
                return
            newest = int(token)
            if newest in self.lm.tokenizer.special_ids:
                return

    def _tokens(self, ids: Sequence[int], track: Track | None, *, prompt: bool) -> Iterator[Token]:
        """The newest tokens that were read, with the features that track holds of them."""
        features: list[list[Feature]] = [[] for _ in ids]
        for name in track.names if track is not None else ():
            assert track is not None
            indices, values = (y[0, -len(ids) :].tolist() for y in track.features(name, last=not prompt))
            several = name if len(track.names) > 1 else None
            for here, row in enumerate(zip(indices, values, strict=True)):
                active = [(i, v) for i, v in zip(*row, strict=True) if v != 0]
                features[here] += [Feature(i, v, self.label(name, i), several) for i, v in active]
        text = self.lm.tokenizer.token_str
        yield from (Token(i, text(i), found, prompt) for i, found in zip(ids, features, strict=True))

    # ----------------------------------------------------------------------------------------------
    # which features pushed towards a token

    def explain(
        self, ask: Ask, token: str | int, answer: Sequence[int] = (), *, place: int | None = None
    ) -> dict[str, Any]:
        """Direct logit attribution: what the features active at one place add to a token's logit, on the straight way
        through the final norm (its scale taken as it is) and the unembedding. Logits count from their mean over V.

        token: its id, or text, of several tokens the first. place: in the answer; else where it first has the token, or
        its beginning. effects and `rest` (all else: what later layers make of features, the error, the
        embeddings) add up to `logit`.
        """
        require(self.live is not None and ask.sae, "there is no SAE to explain with; give --sae_path")
        assert self.live is not None
        encoded = [token] if isinstance(token, int) else self.lm.tokenizer.encode(token)
        require(bool(encoded), "the token to explain is empty; write its text")
        wanted, ids = encoded[0], self.ids_of(ask)
        text, note = self.lm.tokenizer.token_str(wanted), ""
        if place is None and len(encoded) > 1:
            note = f"{token!r} is several tokens; this is about the first of them, {text!r}. "
        if place is None and wanted not in answer:
            note += f"{text!r} is not in the answer; this is about how near it was to being its first token."
        if place is None:
            place = list(answer).index(wanted) if wanted in answer else 0
        window = torch.tensor([[*ids, *answer[:place]][-self.lm.max_len :]], device=self.lm.device)
        logits, effects = self._effects(ask, window, wanted)
        logit = float(logits[wanted] - logits.mean())
        effects.sort(key=lambda e: -abs(e["effect"]))
        return {
            "token": text, "id": wanted, "position": place, "note": note.strip(), "logit": logit,
            "probability": float(logits.softmax(-1)[wanted]), "features": effects,
            "rest": logit - sum(e["effect"] for e in effects),
        }  # fmt: skip

    @torch.no_grad()
    def _effects(self, ask: Ask, window: Tensor, wanted: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """The logits (V,) of what follows, and of each feature active at the last place what it adds to one of them."""
        assert self.live is not None
        lm, live = self.lm, self.live
        norm = lm.final_norm
        places = {name: live.places(name)[1] for name in live.saes}
        with (
            live.track(top_k=1000) as seen,
            live.steer(*ask.steer),
            hooks.capture(lm.module, [*places.values(), *([f"{norm}@in"] if norm else [])]) as held,
        ):
            logits = lm.logits(window, torch.ones_like(window, dtype=torch.bool))
        assert logits is not None
        scale = lm.norm_scale(held[f"{norm}@in"][0, -1]) if norm else 1.0
        effects = []
        for name, sae in live.saes.items():
            found = seen.features(name, last=True)
            active = found.values[0, 0] != 0
            indices, values = found.indices[0, 0][active], found.values[0, 0][active]
            moved = lm.logit_effects(sae.W_dec[indices])
            if moved is None:
                raise UserError(
                    f"'{name}' is not as wide as the model's stream, so nothing leads straight to the logits"
                )
            unit = sae.unit(held[places[name]][0, -1:])
            by = values * (moved[:, wanted] - moved.mean(1)) / scale * (1.0 if unit is None else unit[0])
            several = {"hookpoint": name} if len(live.saes) > 1 else {}
            effects += [
                {"latent": i, "activation": v, "effect": e, "label": self.label(name, i), **several}
                for i, v, e in zip(indices.tolist(), values.tolist(), by.tolist(), strict=True)
            ]
        return logits[0, -1].float(), effects
