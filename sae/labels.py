"""A short label for every feature without any other model: a rule over its own statistics, with measured quality.

A rule is a set of values of one property of tokens (what they are, how they end, what stands before them, where they
are, what they are in Python's syntax), or of two properties at once. Half of the sampled text decides which property
and which values; precision and recall are measured on the other half. A token counts as the feature's own if the
feature is active on it at all, however weakly.

Letters: S tokens of the sample, E activations, F rows (latents asked for), G values of a property, C choices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sae.feature_tables import POSITIONS, Events
from sae.syntax import KINDS, PLACES, STATEMENTS, TOP, annotate

N_NAMED = 4  # values that a short label names
LEAST = 2  # activations on a value, for it to be chosen


@dataclass(frozen=True)
class Label:
    """short and whole: the rule in words; precision: share of the tokens it names that the feature is active on;
    recall: share of the tokens that the feature is active on that it names. Both on text it was not made from."""

    short: str
    whole: str
    precision: float
    recall: float


class Property(NamedTuple):
    """A property that each token has one value of: values (S,) int64 in 0..G-1, what value i is called, and how a set
    of names is put. A name may have a second part, such as where a token stands, said once for all that share it."""

    values: np.ndarray
    name: Callable[[int], tuple[str, str]]
    form: str = "{}"


def number(*columns: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """(S,) int64: each combination of values as a number from 0 on; and what each number stands for, by column."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        _, inverse = np.unique(column, return_inverse=True)
        _, code = np.unique(code * (int(inverse.max(initial=0)) + 1) + inverse, return_inverse=True)
    first = np.unique(code, return_index=True)[1]
    return code, [column[first] for column in columns]


def quoted(text: str) -> str:
    """A token as a label shows it: `self`, or spelled out where that would not be seen."""
    plain = text.isprintable() and "`" not in text
    return f"`{text}`" if plain else f"`{ascii(text)[1:-1].replace('`', chr(92) + 'x60')}`"


# ----------------------------------------------------------------------------------------------------------------------
# properties


def properties(events: Events, token_str: Callable[[int], str], special_ids: Collection[int]) -> dict[str, Property]:
    """All that labels speak of, for the tokens of a sample."""
    ids = events.ids.astype(np.int64)
    texts = np.array([token_str(i) for i in range(int(ids.max(initial=0)) + 1)], dtype=object)
    before = _shifted(ids, events, 1)
    stripped = np.array([t.strip() for t in texts], dtype=object)
    lowered = np.array([t.lower() for t in stripped], dtype=object)
    end = np.array([t[-3:] if len(t) > 3 else "" for t in stripped], dtype=object)
    start = np.array([t[:3] if len(t) > 3 else "" for t in stripped], dtype=object)
    layout = _layout(events, texts, special_ids)
    kind, place, statement, word, part, head, column = layout
    token = lambda i: quoted(str(texts[i])) if i >= 0 else "the beginning"
    found: dict[str, Property] = {}

    def add(
        key: str, columns: Sequence[np.ndarray], first: Callable, second: Callable | None = None, form: str = "{}"
    ) -> None:
        """A property of one column; or of two, whose names have two parts."""
        code, values = number(*columns)
        more = second or (lambda *_: "")
        found[key] = Property(code, lambda i: (first(values[0][i]), more(values[-1][i])), form)

    said = lambda t: quoted(str(t))
    by_text = lambda table, i: table[np.maximum(i, 0)].astype(str)
    add("token", [ids], token)
    add("word", [by_text(lowered, ids)], said, form="{} (any case)")
    add("end", [by_text(end, ids)], lambda t: f"-{t}" if t else "(short ones)", form="tokens ending in {}")
    add("start", [by_text(start, ids)], lambda t: f"{t}-" if t else "(short ones)", form="tokens beginning with {}")
    add("before", [before], token, form="after {}")
    add("next", [_shifted(ids, events, -1)], token, form="before {}")
    add("whole word", [word], lambda w: quoted(str(w)) if w else "no word", form="within the word {}")
    part_of_sequence = np.searchsorted(np.array(POSITIONS), events.position, side="right") - 1
    add("position", [part_of_sequence], lambda p: str(POSITIONS[p]), form="in parts of a sequence from token {} on")
    add("line", [head], lambda h: quoted(str(h)) if h else "(nothing yet)", form="in lines that begin with {}")
    add("syntax", number(kind, place, statement)[:1], *_syntax_names(kind, place, statement))
    add("token before", [ids, before], token, lambda b: f" after {token(b)}")
    add(
        "word before",
        [by_text(lowered, ids), by_text(lowered, before)],
        quoted,
        lambda b: f" after {quoted(str(b))} (any case)",
    )
    add("token kind", [ids, kind], token, lambda k: f" as {KINDS[k]}" if k else " outside of code")
    add("token place", [ids, place], token, lambda p: f" {PLACES[p]}" if p else " outside of code")
    add("token statement", [ids, statement], token, lambda s: f" in {_statement(s)}" if s else " outside of statements")
    add("token part", [ids, part], token, lambda p: f" {PARTS[p]}")
    return found


PARTS = ("outside of words", "as a whole word", "beginning a word", "within a word", "ending a word")


def _statement(s: int) -> str:
    return STATEMENTS[s] if " " in STATEMENTS[s] else f"'{STATEMENTS[s]}'"


def _syntax_names(kind: np.ndarray, place: np.ndarray, statement: np.ndarray) -> tuple[Callable, Callable]:
    """The two parts of what combinations, numbered as `number` does, are called."""
    parts = number(kind, place, statement)[1]

    def first(i: int) -> str:
        k, p, _ = (int(x[i]) for x in parts)
        return KINDS[k] + (f" {PLACES[p]}" if p and PLACES[p] not in ("", TOP) else "") if k else "what is no code"

    def second(i: int) -> str:
        k, _, s = (int(x[i]) for x in parts)
        return f" in {_statement(s)}" if s and KINDS[k] not in ("", "a comment", "a docstring") else ""

    return first, second


def _shifted(x: np.ndarray, events: Events, by: int) -> np.ndarray:
    """The token `by` places before each (or, below 0, after it), -1 beyond its sequence."""
    n, out = abs(by), np.full_like(x, -1)
    same = events.sequence[n:] == events.sequence[:-n]
    if by > 0:
        out[n:][same] = x[:-n][same]
    else:
        out[:-n][same] = x[n:][same]
    return out


def _layout(events: Events, texts: np.ndarray, special_ids: Collection[int]) -> list[np.ndarray]:
    """Of each token, read as part of its document: kind, place and statement in Python's syntax, the word it is part
    of, which part (PARTS), the first token of its line, and whether that stands before it."""
    S = len(events.ids)
    kind, place, statement, part, column = (np.zeros(S, dtype=np.int64) for _ in range(5))
    word, head = (np.full(S, "", dtype=object) for _ in range(2))
    special = np.isin(events.ids, list(special_ids))
    apart = np.diff(events.sequence, prepend=-9) > 1
    begins = np.flatnonzero(apart | special | np.concatenate(([True], special[:-1])))
    for a, b in zip(begins, [*begins[1:], S], strict=True):
        if special[a]:
            continue
        pieces = [texts[i] for i in events.ids[a:b]]
        starts = np.cumsum([0] + [len(p) for p in pieces])
        text = "".join(pieces)
        at = np.minimum([s + len(p) - len(p.lstrip()) for s, p in zip(starts, pieces, strict=False)], len(text) - 1)
        known = annotate(text)
        if known is not None:
            kind[a:b], place[a:b], statement[a:b] = known[:, at]
        for match in re.finditer(r"\w+", text):
            i, j = np.searchsorted(at, match.span())
            word[a + i : a + j] = match.group()
            part[a + i : a + j] = 3
            if j > i:
                part[a + i], part[a + j - 1] = 2, 4
            if j == i + 1:
                part[a + i] = 1
        first = ""
        for n, piece in enumerate(pieces, int(a)):
            head[n], column[n] = first, first != ""
            first = "" if "\n" in piece else first or piece.strip()
    return [kind, place, statement, word.astype(str), part, head.astype(str), column]


# ----------------------------------------------------------------------------------------------------------------------
# rules


class Rules(NamedTuple):
    """Of every row, the values chosen: row, value, hits (C,), by row and, within one, the surest first; score (F,)."""

    row: np.ndarray
    value: np.ndarray
    hits: np.ndarray
    score: np.ndarray


def choose(row: np.ndarray, value: np.ndarray, totals: np.ndarray, n_active: np.ndarray) -> Rules:
    """For each row the set of values with the best score on the text at hand.

    row, value (E,): activations and the value their token has; totals (G,): tokens with each value; n_active (F,):
    activations of each row. Adding values from the surest on raises recall and lowers precision: the best point is
    found exactly. Each value costs one hit, as if what was seen once were left out, which keeps rules from learning the
    text by heart. Score: F1 with that cost.
    """
    G, F = len(totals), len(n_active)
    key, hits = np.unique(row.astype(np.int64) * G + value, return_counts=True)
    row, value = key // G, key % G
    enough = hits >= LEAST
    row, value, hits = row[enough], value[enough], hits[enough]
    sure = (hits - 1) / (totals[value] + 0.5)
    order = np.lexsort((-sure, row))
    row, value, hits = row[order], value[order], hits[order]
    starts = np.searchsorted(row, np.arange(F))
    stops = np.searchsorted(row, np.arange(F), side="right")

    def running(x: np.ndarray) -> np.ndarray:
        total = np.concatenate(([0], x.cumsum()))
        return total[1:] - total[starts[row]]

    score = 2 * running(hits - 1) / (running(totals[value]) + n_active[row])
    best, taken = np.zeros(F), np.zeros(len(row), dtype=bool)
    for f in np.flatnonzero(stops > starts):
        part = score[starts[f] : stops[f]]
        n = int(part.argmax())
        best[f] = part[n]
        taken[starts[f] : starts[f] + n + 1] = True
    return Rules(row[taken], value[taken], hits[taken], best)


def measure(rules: Rules, row: np.ndarray, value: np.ndarray, totals: np.ndarray, n_active: np.ndarray) -> np.ndarray:
    """(2, F): precision and recall of rules on the text that row, value, totals and n_active are of."""
    G, F = len(totals), len(n_active)
    found = np.sort(row.astype(np.int64) * G + value)
    chosen = rules.row.astype(np.int64) * G + rules.value
    each = np.searchsorted(found, chosen, side="right") - np.searchsorted(found, chosen)
    hits = np.bincount(rules.row, weights=each, minlength=F)
    named = np.bincount(rules.row, weights=totals[rules.value], minlength=F)
    return np.stack((hits / np.maximum(named, 1), hits / np.maximum(n_active, 1)))


def make_labels(
    events: Events, row_of: np.ndarray, token_str: Callable[[int], str], special_ids: Collection[int]
) -> list[Label | None]:
    """A label for each row, row_of (d_sae,) saying which row a latent has, -1 for none; None for a row that is silent
    in the half that rules are made from."""
    on = events.keep[events.token] & (row_of[events.latent] >= 0)
    row, token = row_of[events.latent[on]], events.token[on]
    n_rows = int(row_of.max()) + 1
    _, block = np.unique(events.block, return_inverse=True)
    half = block % 2  # of the text: 0 to make rules, 1 to measure them
    found = properties(events, token_str, special_ids)
    n_active = [np.bincount(row[half[token] == h], minlength=n_rows) for h in (0, 1)]
    best = np.zeros(n_rows)
    labels: list[Label | None] = [None] * n_rows
    for property in found.values():
        G = int(property.values.max(initial=0)) + 1
        totals = [np.bincount(property.values[events.keep & (half == h)], minlength=G) for h in (0, 1)]
        parts = [
            (row[half[token] == h], property.values[token[half[token] == h]], totals[h], n_active[h]) for h in (0, 1)
        ]
        rules = choose(*parts[0])
        precision, recall = measure(rules, *parts[1])
        starts = np.searchsorted(rules.row, np.arange(n_rows + 1))
        for f in np.flatnonzero(rules.score > best):
            mine = slice(starts[f], starts[f + 1])
            short, whole = in_words(property, rules.value[mine], rules.hits[mine])
            labels[f] = Label(short, whole, float(precision[f]), float(recall[f]))
        best = np.maximum(best, rules.score)
    return labels


def in_words(property: Property, values: np.ndarray, hits: np.ndarray) -> tuple[str, str]:
    """A set of values, the most frequent first: in short, and in full."""
    names = [property.name(int(v)) for v in values[np.argsort(-hits, kind="stable")]]
    short = property.form.format(_listed(names[:N_NAMED]))
    return short + (f" or {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""), property.form.format(
        _listed(names)
    )


def _listed(names: Sequence[tuple[str, str]]) -> str:
    """'a', 'b' in strings; 'c' in comments."""
    groups: dict[str, list[str]] = {}
    for first, second in names:
        groups.setdefault(second, []).append(first)
    return "; ".join(f"{', '.join(dict.fromkeys(firsts))}{second}" for second, firsts in groups.items())


def distribution(labels: Sequence[Label | None]) -> list[str]:
    """How good they are, in lines to read."""
    made = [label for label in labels if label is not None]
    least = np.array([min(label.precision, label.recall) for label in made])
    edges = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.01)
    counts = np.histogram(least, edges)[0]
    good = int((least >= 0.5).sum())
    lines = [f"labels: {good} of {len(labels)} live features have precision and recall >= 0.5 on held-out text "
             f"({good / max(1, len(labels)):.1%})", "the lesser of the two, and features:"]  # fmt: skip
    bars = [f"  {a:.1f} to {min(1, b):.1f} {n:6} {'#' * round(50 * n / max(1, counts.max()))}"
            for a, b, n in zip(edges, edges[1:], counts, strict=False)]  # fmt: skip
    return lines + bars
