"""Explanations by a language model behind any OpenAI-compatible address, and scores of how good they are.

explain: the model reads a feature's strongest contexts and says in a phrase what they have in common. Two scores, as in
delphi (github.com/EleutherAI/delphi, Paulo et al. 2024, arxiv.org/abs/2410.13928), test the explanation on contexts
that it was not made from. detection: does the feature fire in this context? fuzzing: are the marked tokens ones that
the feature fires on? In half of the examples the feature is silent (in fuzzing they are marked where another example
is), so guessing scores 0.5. A journal keeps every answer, so that an interrupted run continues.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import requests

from sae import log
from sae.config import UserError
from sae.files import append_line, open_journal
from sae.pages.records import Context, FeatureRecord

N_READ = 10  # contexts that an explanation is made from
N_TESTED = 10  # true examples for each score, and as many false ones
PER_QUESTION = 5  # examples asked about at once, as delphi does
TRIES = 5
WAIT_S = 2.0  # before the second try; doubled for each further one
TIMEOUT_S = 120
CHARS_PER_TOKEN = 3.0  # for the estimate; code and marks take more tokens than prose
ANSWER_TOKENS = 120

EXPLAIN = (
    "You study one feature of a neural network that reads text. Each line below is a context in which it is active; "
    "the tokens it is active on stand between << and >>. Say what these have in common, as specifically as they allow: "
    "a kind of token, what stands before it, a topic, a place in the syntax. Answer with one line that begins with "
    "[EXPLANATION]: and has at most 20 words."
)
DETECT = (
    "A feature of a neural network is described as follows: {explanation}\nOf each numbered text below, say whether it "
    "holds this feature. Answer with a json list of {n} numbers, 1 for yes and 0 for no, and nothing else."
)
FUZZ = (
    "A feature of a neural network is described as follows: {explanation}\nIn each numbered text below some tokens "
    "stand between << and >>. Say whether all of these are ones that the feature describes. Answer with a json list of "
    "{n} numbers, 1 for yes and 0 for no, and nothing else."
)
SCORES = {"detection": DETECT, "fuzzing": FUZZ}


@dataclass(frozen=True)
class Explanation:
    """What a model said about a latent. detection, fuzzing: balanced accuracy in 0..1, None without examples."""

    latent: int
    text: str
    detection: float | None
    fuzzing: float | None
    model: str


class Endpoint:
    """A chat model behind an API base such as https://api.openai.com/v1. Its key, if needed, is NANOSAE_API_KEY or
    OPENAI_API_KEY in the environment; it is never written or shown."""

    def __init__(self, url: str, model: str):
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.session = requests.Session()
        key = os.environ.get("NANOSAE_API_KEY") or os.environ.get("OPENAI_API_KEY")
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def ask(self, system: str, user: str) -> str:
        """The answer. Waits and asks again if the server is busy or fails; UserError if it refuses."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body: Any = {"model": self.model, "temperature": 0, "max_tokens": ANSWER_TOKENS, "messages": messages}
        for attempt in range(TRIES):
            time.sleep(WAIT_S * 2 ** (attempt - 1) if attempt else 0)
            try:
                answer = self.session.post(self.url, json=body, timeout=TIMEOUT_S)
            except requests.RequestException as e:
                reason = type(e).__name__
                continue
            if answer.status_code != 429 and answer.status_code < 500:
                return self._text(answer)
            reason = f"status {answer.status_code}"
        raise UserError(f"'{self.url}' gave no answer in {TRIES} tries ({reason}); what is done is kept, run it again")

    def _text(self, answer: requests.Response) -> str:
        if answer.status_code != 200:
            raise UserError(
                f"'{self.url}' refused with status {answer.status_code}: {answer.text[:200]!r}; check --explainer_url, "
                "--explainer_model and NANOSAE_API_KEY"
            )
        try:
            return str(answer.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as e:
            raise UserError(f"'{self.url}' does not speak OpenAI's chat completions; check --explainer_url") from e


# ----------------------------------------------------------------------------------------------------------------------
# examples


def active(c: Context) -> list[int]:
    return [i for i, v in enumerate(c.values) if v > 0]


def marked(c: Context, on: Collection[int] | None = None) -> str:
    """A context as text, with the tokens at `on` (default: the active ones) between << and >>."""
    on = active(c) if on is None else on
    text = "".join(f"<<{t}>>" if i in on else t for i, t in enumerate(c.tokens))
    return text.replace(">><<", "").replace("\n", "\\n")


class Example(NamedTuple):
    """A text to judge, and whether the right answer is yes."""

    text: str
    true: bool


def examples(r: FeatureRecord, others: Sequence[FeatureRecord], kind: str) -> list[Example]:
    """Shuffled examples for a score: the record's contexts that its explanation was not made from, and as many of other
    features, far from all of its own. kind: detection, or fuzzing, in which tokens are marked."""
    rng = random.Random(f"0 {r.latent} {kind}")
    true = [c for c in r.contexts if c not in r.strongest[:N_READ]]
    true = rng.sample(true, min(N_TESTED, len(true)))
    reach = max((len(c.tokens) for c in r.contexts), default=0)
    near = lambda c: any(o.sequence == c.sequence and abs(o.position - c.position) <= reach for o in r.contexts)
    false: list[Context] = []
    for _ in range(50 * len(true)):
        other = rng.choice(others)
        c = rng.choice(other.contexts) if other.contexts and other.latent != r.latent else None
        if c is not None and c not in false and not near(c):
            false.append(c)
        if len(false) == len(true):
            break
    places = [active(c) if kind == "fuzzing" else [] for c in true]
    found = [Example(marked(c, at), True) for c, at in zip(true, places, strict=True)]
    found += [Example(marked(c, rng.choice(places) if kind == "fuzzing" else ()), False) for c in false]
    rng.shuffle(found)
    return found


def accuracy(found: Sequence[Example], answers: Sequence[int | None]) -> float | None:
    """The mean of the accuracies on true and on false examples; no answer counts as a wrong one."""
    right = [(e.true, bool(a) == e.true and a is not None) for e, a in zip(found, answers, strict=True)]
    sides = [[good for true, good in right if true == side] for side in (True, False)]
    return sum(sum(x) / len(x) for x in sides) / 2 if all(sides) else None


def read_list(text: str, n: int) -> list[int | None]:
    """The n numbers of an answer; n times None if it is no list of n zeros and ones."""
    found = re.search(r"\[([\s01,]*)\]", text)
    numbers = [v.strip() for v in found[1].split(",")] if found else []
    return [int(v) for v in numbers] if len(numbers) == n and {*numbers} <= {"0", "1"} else [None] * n


class Explainer:
    """Explains features one by one. Each explanation goes to `journal` (json lines) at once."""

    def __init__(self, endpoint: Endpoint, journal: Path):
        self.endpoint, self.journal = endpoint, Path(journal)
        said = [Explanation(**line) for line in open_journal(self.journal, lambda line: Explanation(**line))]
        self.done = {e.latent: e for e in said if e.model == endpoint.model}

    def estimate(self, records: Sequence[FeatureRecord], pool: Sequence[FeatureRecord]) -> dict[str, int]:
        """Roughly what `run` will cost: questions, and tokens read and written."""
        chars: list[int] = []

        def ask(system: str, user: str) -> str:
            chars.append(len(system) + len(user))
            return ""

        for r in self._open(records):
            self._explain(r, pool, ask)
        tokens_in, tokens_out = round(sum(chars) / CHARS_PER_TOKEN), len(chars) * ANSWER_TOKENS
        return {"questions": len(chars), "tokens_in": tokens_in, "tokens_out": tokens_out}

    def run(self, records: Sequence[FeatureRecord], pool: Sequence[FeatureRecord]) -> dict[int, Explanation]:
        """The explanation of every record that has a context; those in the journal are not asked for again.

        pool: records whose contexts are examples in which a feature is silent.
        """
        todo = self._open(records)
        with log.progress(len(todo), "explaining", unit="feature") as bar:
            for r in todo:
                self.done[r.latent] = found = self._explain(r, pool, self.endpoint.ask)
                append_line(self.journal, asdict(found))
                bar.update()
        return self.done

    def _open(self, records: Sequence[FeatureRecord]) -> list[FeatureRecord]:
        return [r for r in records if r.contexts and r.latent not in self.done]

    def _explain(self, r: FeatureRecord, pool: Sequence[FeatureRecord], ask: Callable[[str, str], str]) -> Explanation:
        lines = "\n".join(f"{i}: {marked(c)}" for i, c in enumerate(r.strongest[:N_READ], 1))
        text = " ".join(ask(EXPLAIN, lines).rsplit("[EXPLANATION]:", 1)[-1].split())[:500]
        scores = {}
        for kind, question in SCORES.items():
            found = examples(r, pool, kind)
            answers: list[int | None] = []
            for i in range(0, len(found), PER_QUESTION):
                some = found[i : i + PER_QUESTION]
                system = question.replace("{explanation}", text).replace("{n}", str(len(some)))
                answer = ask(system, "\n".join(f"{n}: {e.text}" for n, e in enumerate(some, 1)))
                answers += read_list(answer, len(some))
            scores[kind] = accuracy(found, answers)
        return Explanation(r.latent, text, **scores, model=self.endpoint.model)


def with_explanation(r: FeatureRecord, found: Explanation | None) -> FeatureRecord:
    """The record with its explanation, if there is one."""
    if found is None:
        return r
    return replace(r, explanation=found.text, explainer=found.model, detection=found.detection, fuzzing=found.fuzzing)
