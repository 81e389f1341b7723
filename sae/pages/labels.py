"""A short label for every feature without any other model: a rule over its own statistics, with measured quality.

A rule names tokens, each as such or only where something holds: after some other, in a comment, in a list, in a line
that begins with `return`. Or it is a set of values of one property of tokens: how they begin or end, the word they are
part of, where they are. One half of the sampled text decides which; precision and recall are measured on the other. A
token counts as the feature's own if the feature is active on it at all, however weakly.

Letters: S tokens of the sample, E activations, F rows (latents asked for), G values of a property, C pairs of a row and
a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sae.pages.feature_tables import POSITIONS, Events
from sae.pages.syntax import KINDS, PLACES, STATEMENTS, TOP, annotate

N_NAMED = 4  # values that a short label names
MANY = 50  # more values are a mix
LONGEST = 60  # characters of a token or word
LEAST = 2  # activations on a value, for it to be chosen
# Weight of recall over precision in the score: on other text it is recall that falls, by all that was not met before.
BETA2 = 2.0


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
    of names is put. A name is the token or thing, and where it stands: (`x`, " after ", `y`), (`x`, "", "")."""

    values: np.ndarray
    name: Callable[[int], tuple[str, str, str]]
    form: str = "{}"


def number(*columns: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """(S,) int64: each combination of values as a number from 0 on; and what each number stands for, by column."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        if column.dtype == object:  # strings, which an array of numpy's gives as much room as the longest each
            index = {value: i for i, value in enumerate(sorted(set(column)))}
            inverse = np.array([index[value] for value in column], dtype=np.int64)
        else:
            inverse = np.unique(column, return_inverse=True)[1]
        _, code = np.unique(code * (int(inverse.max(initial=0)) + 1) + inverse, return_inverse=True)
    first = np.unique(code, return_index=True)[1]
    return code, [column[first] for column in columns]


def quoted(text: str) -> str:
    """A token as a label shows it: `self`, or spelled out where that would not be seen."""
    if len(text) > LONGEST:
        text = text[: LONGEST - 3] + "..."
    plain = text.isprintable() and "`" not in text
    return f"`{text}`" if plain else f"`{ascii(text)[1:-1].replace('`', chr(92) + 'x60')}`"


# ----------------------------------------------------------------------------------------------------------------------
# properties


def properties(
    events: Events, token_str: Callable[[int], str], special_ids: Collection[int]
) -> tuple[dict[str, Property], dict[str, Property]]:
    """All that labels speak of, for the tokens of a sample: properties that stand alone, and where a token stands, each
    combined with the token."""
    ids = events.ids.astype(np.int64)
    texts = np.array([token_str(i) for i in range(int(ids.max(initial=0)) + 1)], dtype=object)
    before = _shifted(ids, events, 1)
    stripped = np.array([t.strip() for t in texts], dtype=object)
    lowered = np.array([t.lower() for t in stripped], dtype=object)
    end = np.array([t[-3:] if len(t) > 3 else "" for t in stripped], dtype=object)
    start = np.array([t[:3] if len(t) > 3 else "" for t in stripped], dtype=object)
    kind, place, statement, word, part, head = _layout(events, texts, special_ids)
    said = lambda t: quoted(str(t))
    token = lambda i: said(texts[i]) if i >= 0 else "the beginning"

    def alone(column: np.ndarray, name: Callable, form: str = "{}") -> Property:
        code, (values,) = number(column)
        return Property(code, lambda i: (name(values[i]), "", ""), form)

    def where(column: np.ndarray, form: str, name: Callable, otherwise: str = "") -> Property:
        """A token, and where it stands. `otherwise`: what is said where there is no name, which is ""."""
        code, (tokens, values) = number(ids, column)

        def named(i: int) -> tuple[str, str, str]:
            what = name(values[i])
            return (token(tokens[i]), form, what) if what else (token(tokens[i]), " ", otherwise)

        return Property(code, named)

    part_of_sequence = np.searchsorted(np.array(POSITIONS), events.position, side="right") - 1
    syntax = number(kind, place, statement)
    single = {
        "token": alone(ids, token),
        "word": alone(lowered[ids], said, "{} (any case)"),
        "end": alone(end[ids], lambda t: f"-{t}" if t else "(short ones)", "tokens ending in {}"),
        "start": alone(start[ids], lambda t: f"{t}-" if t else "(short ones)", "tokens beginning with {}"),
        "before": alone(before, token, "after {}"),
        "next": alone(_shifted(ids, events, -1), token, "before {}"),
        "whole word": alone(word, lambda w: said(w) if w else "no word", "part of {}"),
        "position": alone(part_of_sequence, lambda p: str(POSITIONS[p]), "in parts of a sequence from token {} on"),
        "line": alone(head, lambda h: said(h) if h else "(nothing yet)", "in lines that begin with {}"),
        "syntax": Property(syntax[0], _syntax_names(syntax[1])),
    }
    within = {
        "before": where(before, " after ", token),
        "two before": where(_shifted(ids, events, 2), " two after ", token),
        "line": where(head, " in lines that begin with ", lambda h: said(h) if h else "", "at the beginning of lines"),
        "kind": where(kind, " ", lambda k: _kind(KINDS[k]), "outside of code"),
        "place": where(place, " ", lambda p: PLACES[p], "outside of code"),
        "statement": where(statement, " in ", lambda s: _statement(s) if s else "", "outside of statements"),
        "part": where(part, " ", lambda p: PARTS[p]),
    }
    return single, within


PARTS = ("outside of words", "as a whole word", "beginning a word", "within a word", "ending a word")


def _kind(name: str) -> str:
    return name and f"{'in' if name in ('a comment', 'a docstring', 'a string') else 'as'} {name}"


def _statement(s: int) -> str:
    return STATEMENTS[s] if " " in STATEMENTS[s] else f"'{STATEMENTS[s]}'"


def _syntax_names(parts: Sequence[np.ndarray]) -> Callable[[int], tuple[str, str, str]]:
    """What combinations of kind, place and statement, numbered as `number` does, are called."""

    def name(i: int) -> tuple[str, str, str]:
        k, p, s = (int(x[i]) for x in parts)
        first = KINDS[k] + (f" {PLACES[p]}" if p and PLACES[p] != TOP else "") if k else "what is no code"
        inside = s and KINDS[k] not in ("", "a comment", "a docstring")
        return (first, " in ", _statement(s)) if inside else (first, "", "")

    return name


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
    kind, place, statement, part = (np.zeros(S, dtype=np.int64) for _ in range(4))
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
            head[n] = first
            first = "" if "\n" in piece else first or piece.strip()
    return [kind, place, statement, word, part, head]


# ----------------------------------------------------------------------------------------------------------------------
# rules


class Counted(NamedTuple):
    """How often each row is active on each value of a property: row, value, hits (C,), by row and value, where it is at
    all; totals (G,): tokens with each value."""

    row: np.ndarray
    value: np.ndarray
    hits: np.ndarray
    totals: np.ndarray

    @property
    def keys(self) -> np.ndarray:
        return self.row * len(self.totals) + self.value


class Rules(NamedTuple):
    """Of every row what was chosen: row (C,), family (0 for a value as such, i for one of the ith refinement), value,
    hits; score (F,)."""

    row: np.ndarray
    family: np.ndarray
    value: np.ndarray
    hits: np.ndarray
    score: np.ndarray


def count(row: np.ndarray, value: np.ndarray, totals: np.ndarray, *, least: int = 1) -> Counted:
    """row, value (E,): activations, and the value that the token of each has. Rarer pairs than `least` are left out."""
    keys, hits = np.unique(row.astype(np.int64) * len(totals) + value, return_counts=True)
    often = hits >= least
    return Counted(*np.divmod(keys[often], len(totals)), hits[often], totals)


def choose(root: Counted, finer: Sequence[tuple[Counted, np.ndarray]], n_active: np.ndarray) -> Rules:
    """For each row the rule with the best score on the text at hand.

    finer: refinements of root, with the value of root that each value of theirs lies in. Of each value of root a rule
    takes all, or some values of one refinement, or nothing. Each value taken costs one hit, as if what was seen once
    were left out, which keeps rules from learning the text by heart. Score: F-beta with that cost; n_active (F,):
    activations of each row. A value is worth taking if its hits exceed its tokens times score / (1 + BETA2): from 0 on
    the score grows until that is so of all that is taken, and then no rule has a better one (Dinkelbach's method).
    Pairs with fewer hits than LEAST are left out by who counts.
    """
    F, keys = len(n_active), root.keys
    inside = [np.searchsorted(keys, c.row * len(root.totals) + parent[c.value]) for c, parent in finer]
    parts = list(zip((root, *(c for c, _ in finer)), (np.arange(len(keys)), *inside), strict=True))
    score = np.zeros(F)
    while True:
        best, hits, named = np.zeros((3, len(keys)))  # of each value of root: what the best way to take it brings
        family = np.full(len(keys), -1)
        taken = []
        for i, (c, cell) in enumerate(parts):
            n = c.totals[c.value]
            gain = c.hits - 1 - score[c.row] / (1 + BETA2) * n
            taken.append(gain > 0)
            sums = [np.bincount(cell[gain > 0], x[gain > 0], len(keys)) for x in (gain, c.hits - 1, n)]
            better = sums[0] > best
            best[better], hits[better], named[better] = (x[better] for x in sums)
            family[better] = i
        total = [np.bincount(root.row, x, F) for x in (hits, named)]
        new = (1 + BETA2) * total[0] / np.maximum(total[1] + BETA2 * n_active, 1)
        if (new <= score * (1 + 1e-9)).all():
            break
        score = np.maximum(new, score)
    chosen = [good & (family[cell] == i) for i, (good, (_, cell)) in enumerate(zip(taken, parts, strict=True))]
    joined = lambda get: np.concatenate([get(c)[here] for (c, _), here in zip(parts, chosen, strict=True)])
    return Rules(
        joined(lambda c: c.row), np.repeat(np.arange(len(parts)), [here.sum() for here in chosen]),
        joined(lambda c: c.value), joined(lambda c: c.hits), score,
    )  # fmt: skip


def measure(rules: Rules, families: Iterable[Counted], n_active: np.ndarray) -> np.ndarray:
    """(2, F): precision and recall of rules on the text that families (root and refinements) and n_active are of."""
    F = len(n_active)
    hits, named = np.zeros(F), np.zeros(F)
    for i, c in enumerate(families):
        row, value = rules.row[rules.family == i], rules.value[rules.family == i]
        keys, wanted = c.keys, row * len(c.totals) + value
        at = np.searchsorted(keys, wanted)
        found = np.append(keys, -1)[at] == wanted
        hits += np.bincount(row, np.append(c.hits, 0)[at] * found, minlength=F)
        named += np.bincount(row, c.totals[value], minlength=F)
    return np.stack((hits / np.maximum(named, 1), hits / np.maximum(n_active, 1)))


def make_labels(
    events: Events, row_of: np.ndarray, token_str: Callable[[int], str], special_ids: Collection[int]
) -> list[Label | None]:
    """A label for each row, row_of (d_sae,) saying which row a latent has, -1 for none; None for a row that is silent
    in the half that rules are made from.

    The halves are one behind the other: were they interleaved, each would have parts of the other's documents.
    """
    on = events.keep[events.token] & (row_of[events.latent] >= 0)
    row, token = row_of[events.latent[on]].astype(np.int64), events.token[on]
    n_rows = int(row_of.max()) + 1
    half = (events.sequence > events.sequence[(len(events.sequence) - 1) // 2]).astype(np.int64)  # 1: to measure
    mine = [half[token] == h for h in (0, 1)]
    rows, tokens = ([x[here] for here in mine] for x in (row, token))
    n_active = [np.bincount(r, minlength=n_rows) for r in rows]

    def counted(property: Property, h: int) -> Counted:
        v, G = property.values, int(property.values.max(initial=0)) + 1
        totals = np.bincount(v[events.keep & (half == h)], minlength=G)
        return count(rows[h], v[tokens[h]], totals, least=1 if h else LEAST)

    single, within = properties(events, token_str, special_ids)
    best = np.zeros(n_rows)
    labels: list[Label | None] = [None] * n_rows
    for name, property in single.items():
        families = [property, *(within.values() if name == "token" else ())]
        finer = [(counted(family, 0), _parents(family.values, property.values)) for family in families[1:]]
        rules = choose(counted(property, 0), finer, n_active[0])
        precision, recall = measure(rules, (counted(family, 1) for family in families), n_active[1])
        order = np.lexsort((-rules.hits, rules.row))
        starts = np.searchsorted(rules.row[order], np.arange(n_rows + 1))
        for f in np.flatnonzero(rules.score > best):
            taken = order[starts[f] : starts[f + 1]]  # the most frequent first
            names = [families[i].name(int(v)) for i, v in zip(rules.family[taken], rules.value[taken], strict=True)]
            labels[f] = Label(*in_words(names, property.form), float(precision[f]), float(recall[f]))
        best = np.maximum(best, rules.score)
    return labels


def _parents(finer: np.ndarray, root: np.ndarray) -> np.ndarray:
    """(G,): the value of root that tokens with each value of finer have."""
    found = np.zeros(int(finer.max(initial=0)) + 1, dtype=np.int64)
    found[finer] = root
    return found


def in_words(names: Sequence[tuple[str, str, str]], form: str = "{}") -> tuple[str, str]:
    """A set of names in short, and in full."""
    named = form.format(_listed(names[:N_NAMED]))
    if len(names) > MANY:  # the first of them would sound like a meaning
        named = f"a mix of {len(names):,}, such as {named}"
    elif len(names) > N_NAMED:
        named += f" or {len(names) - N_NAMED} more"
    return named, form.format(_listed(names))


def _listed(names: Sequence[tuple[str, str, str]]) -> str:
    """`a`, `b` in a comment; `c` after `d`, `e`: what two names share is said once."""
    places: dict[tuple[str, str], list[str]] = {}
    for what, form, where in dict.fromkeys(names):
        places.setdefault((what, form), []).append(where)
    things: dict[str, list[str]] = {}
    for (what, form), wheres in places.items():
        things.setdefault(form + ", ".join(wheres), []).append(what)
    return "; ".join(", ".join(whats) + where for where, whats in things.items())


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
