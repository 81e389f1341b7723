"""FeatureRecord, everything known about one latent, and features.jsonl, which holds one record per line.

Plain data: no tensors, no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.config import UserError, require

FEATURES = "features.jsonl"
PAIRS = ("promoted", "suppressed", "neighbours", "cofiring", "typical", "first")  # fields of (name, number)


@dataclass(frozen=True)
class Context:
    """Tokens and a latent's activation at each. The context is of tokens[peak], at `position` of held-out `sequence`.

    low, high, share: the peak was drawn at random from activations in low..high, which are that share of all the
    latent's activations; None for one of the strongest contexts.
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
    """counts[i] activations in edges[i]..edges[i + 1]; both are empty for a latent that never fired."""

    edges: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class FeatureRecord:
    """A latent over n_tokens tokens: how often and how strongly it fires, where, what it does, and what it may mean.

    density: share of tokens that it is active on; mean_active: mean activation over those. label, rule: what it seems
    to mean, in short and in full, with precision (share of the rule's tokens that it is active on) and recall (share of
    its active tokens that the rule names) on text that the rule was not made from; None without a label. explanation:
    what the model `explainer` said about it, with its scores (explainer.py). promoted, suppressed: (token, effect of
    one unit of activation on its logit), strongest first; empty if the hookpoint does not lead to the logits.
    neighbours: (latent, cosine of decoder directions). cofiring: (latent, correlation of being active). typical:
    (token, share of the latent's activations); first: the same over activations that follow a silent token. positions:
    density in each part of a sequence divided by the mean density; parts begin at POSITIONS (feature_tables.py).
    contexts: the strongest first, at most one per sequence, then random ones by interval.
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
        """The strongest contexts, without those drawn from an interval."""
        return [c for c in self.contexts if c.low is None]

    def to_dict(self) -> dict[str, Any]:
        """Plain json values. Lists are shared with the record."""
        contexts = [vars(c) for c in self.contexts]
        return {**vars(self), "histogram": vars(self.histogram), "contexts": contexts}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FeatureRecord:
        """The inverse of to_dict. Raises TypeError, ValueError, KeyError or AttributeError for anything else."""
        made: dict[str, Any] = {name: [(a, b) for a, b in value.get(name, [])] for name in PAIRS}
        made["contexts"] = [Context(**c) for c in value["contexts"]]
        return cls(**{**value, **made, "histogram": Histogram(**value["histogram"])})

    def to_line(self) -> str:
        """A line of features.jsonl, in ascii, without its newline."""
        return json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"))


def read_values(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a features.jsonl as json objects, unchecked. Raises UserError that names the first bad line."""
    try:
        with Path(path).open(encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise UserError(f"'{path}', line {number} is not json ({e}); write it anew with sae_viz") from e
                require(isinstance(value, dict), f"'{path}', line {number} is {line[:40]!r}; an object was wanted")
                yield value
    except OSError as e:
        raise UserError(f"'{path}' cannot be read ({e.strerror}); run sae_viz first, or give its features.jsonl") from e
    except UnicodeDecodeError as e:
        raise UserError(f"'{path}' is not utf-8 text ({e.reason}); write it anew with sae_viz") from e


def read_features(path: str | Path) -> Iterator[FeatureRecord]:
    """The records of a features.jsonl, one at a time. Raises UserError that names the first bad line."""
    for number, value in enumerate(read_values(path), 1):
        try:
            yield FeatureRecord.from_dict(value)
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise UserError(f"'{path}', line {number} is no feature's record ({e}); write it anew with sae_viz") from e
