"""What is known of one latent: FeatureRecord, and features.jsonl, which holds one a line for other programs.

Plain data: no tensors, no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.config import UserError, require
from sae.files import write_atomic

FEATURES = "features.jsonl"


@dataclass(frozen=True)
class Context:
    """Tokens and a latent's activation at each. tokens[peak] is the one meant, at `position` of held-out `sequence`.

    low, high, share: drawn at random where the latent's activation lies in low..high, as it does on that share of the
    tokens it is active on; None for a context that is among the strongest.
    """

    tokens: list[str]
    values: list[float]
    peak: int
    sequence: int
    position: int
    low: float | None = None
    high: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Histogram:
    """counts[i] activations lay in edges[i]..edges[i + 1]; both are empty for a latent that never fired."""

    edges: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FeatureRecord:
    """A latent over n_tokens tokens: how often and how strongly it fires, where, what it does, and what it may mean.

    density: share of tokens it is active on; mean_active: mean activation over those. label: what it seems to stand
    for, in short, and rule, in full; with precision (share of the rule's tokens that it is active on) and recall (share
    of its active tokens that the rule names) on text that the rule was not made from, None where that has none.
    explanation: what the model `explainer` said of it, and the scores of that (explainer.py). promoted, suppressed:
    (token, effect of one unit of activation on its logit), strongest first; empty where there is no way to the logits.
    neighbours: (latent, cosine of decoder directions); cofiring: (latent, correlation of being active). typical:
    (token, share of the activations that are on it); first: the same, of activations whose latent was silent on the
    token before. positions: how often it is active in each part of a sequence over how often tokens are there, for the
    parts that begin at POSITIONS (feature_tables.py). contexts: the strongest first, at most one per sequence, then
    samples by interval.
    """

    latent: int
    n_tokens: int
    density: float
    max_activation: float
    mean_active: float
    label: str = ""
    rule: str = ""
    label_precision: float | None = None
    label_recall: float | None = None
    explanation: str = ""
    explainer: str = ""
    detection: float | None = None
    fuzzing: float | None = None
    promoted: list[tuple[str, float]] = field(default_factory=list)
    suppressed: list[tuple[str, float]] = field(default_factory=list)
    neighbours: list[tuple[int, float]] = field(default_factory=list)
    cofiring: list[tuple[int, float]] = field(default_factory=list)
    typical: list[tuple[str, float]] = field(default_factory=list)
    first: list[tuple[str, float]] = field(default_factory=list)
    positions: list[float] = field(default_factory=list)
    histogram: Histogram = field(default_factory=Histogram)
    contexts: list[Context] = field(default_factory=list)

    @property
    def strongest(self) -> list[Context]:
        """The contexts that were not drawn from an interval."""
        return [c for c in self.contexts if c.low is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain json values, which share the record's lists."""
        contexts = [vars(c) for c in self.contexts]
        return {**vars(self), "histogram": vars(self.histogram), "contexts": contexts}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FeatureRecord:
        """What to_dict gave; raises UserError for missing or unknown fields."""
        pairs = ("promoted", "suppressed", "neighbours", "cofiring", "typical", "first")
        try:
            made = {
                "contexts": [Context(**c) for c in value["contexts"]], "histogram": Histogram(**value["histogram"]),
                **{name: [(a, b) for a, b in value.get(name, [])] for name in pairs},
            }  # fmt: skip
            return cls(**{**value, **made})
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise UserError(f"a line is no feature's record ({e}); write the file again with sae_viz") from e


def line_of(record: FeatureRecord) -> str:
    """A line of features.jsonl, in ascii, without its end."""
    return json.dumps(record.to_dict(), allow_nan=False, separators=(",", ":"))


def record_of(line: str) -> FeatureRecord:
    """What line_of gave; raises UserError for a line that is none."""
    try:
        return FeatureRecord.from_dict(json.loads(line))
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"'{line[:40]}...' in a {FEATURES} is no feature's record ({e}); write it anew with sae_viz"
        ) from e


def write_features(records: Iterable[FeatureRecord], path: Path) -> None:
    """A features.jsonl of these records."""

    def write(tmp: Path) -> None:
        with tmp.open("w", encoding="ascii", newline="\n") as f:
            f.writelines(line_of(record) + "\n" for record in records)

    write_atomic(path, write)


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text, one at a time."""
    try:
        with Path(path).open(encoding="utf-8") as f:
            yield from enumerate(f, 1)
    except OSError as e:
        raise UserError(f"'{path}' cannot be read ({e.strerror}); run sae_viz first, or give its features.jsonl") from e
    except UnicodeDecodeError as e:
        raise UserError(f"'{path}' is not utf-8 text ({e.reason}); write it anew with sae_viz") from e


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(latent, its line) of a features.jsonl, one at a time; a line that is no record is found when it is parsed."""
    for number, line in _lines(path):
        found = re.match(r'\{"latent": ?(\d+),', line)
        if found is None:
            raise UserError(f"'{path}', line {number} is no feature's record; write the file anew with sae_viz")
        yield int(found[1]), line.rstrip("\n")


def read_values(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a features.jsonl as json objects, whatever is in them. Raises UserError that names the line that is
    none."""
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"'{path}', line {number} is not json ({e}); write it anew with sae_viz") from e
        require(isinstance(value, dict), f"'{path}', line {number} is {line[:40]!r}; an object was wanted")
        yield value


def read_features(path: str | Path) -> Iterator[FeatureRecord]:
    """The records of a features.jsonl, one at a time. Raises UserError that names the line that is none."""
    for number, value in enumerate(read_values(path), 1):
        try:
            yield FeatureRecord.from_dict(value)
        except UserError as e:
            raise UserError(f"'{path}', line {number}: {e}") from e
