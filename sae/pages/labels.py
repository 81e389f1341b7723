"""A short label for every feature, without another model: a rule over its own statistics, with measured quality.

A rule names tokens, each everywhere or only in some place: after another token, in a comment, in a list, in a line that
begins with `return`. Or it is a set of values of one property of tokens: their first or last letters, the word that
they are part of, their position. It is made from one half of the sampled text; precision and recall are measured on the
other. A feature counts as active on a token however weak the activation.

Letters: S tokens of the sample, E activations, F rows (latents asked for), G values of a property, C pairs of a row and
a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sae.pages.feature_tables import POSITIONS, SampledText
from sae.pages.syntax import KINDS, PLACES, STATEMENTS, TOP, annotate

N_NAMED = 4  # values that a short label names
MANY = 50  # a rule with more values is called a mix
LONGEST = 60  # characters of a token or word
LEAST = 2  # a rule takes no value with fewer activations
BETA2 = 2.0  # weight of recall over precision in the score, as it is recall that falls on other text
Name = tuple[str, str, str]


class Label(NamedTuple):
    """short, whole: the rule in words. precision: share of its tokens that the feature is active on; recall: share of
    the feature's active tokens that it names; both on text that it was not made from."""

    short: str
    whole: str
    precision: float
    recall: float


class Property(NamedTuple):
    """A property of which each token has one value: values (S,) int64 in 0..G-1, the name of value i, and a form for a
    set of names. A name has three parts, so that lists can share them: (`x`, " after ", `y`), or (`x`, "", "").
    """

    values: np.ndarray
    name: Callable[[int], Name]
    form: str = "{}"


def property_of(columns: Sequence[Sequence], say: Callable[..., Name], form: str = "{}") -> Property:
    """The property whose values are the combinations of some columns (S,), in order. say: the name of a combination."""
    keys = list(zip(*columns, strict=True))
    known = sorted(set(keys))
    number = {key: i for i, key in enumerate(known)}
    return Property(np.array([number[key] for key in keys]), lambda i: say(*known[i]), form)


def quoted(text: str) -> str:
    """A token in backticks, as labels show it; invisible characters are spelled out."""
    if len(text) > LONGEST:
        text = text[: LONGEST - 3] + "..."
    plain = text.isprintable() and "`" not in text
    return f"`{text}`" if plain else f"`{ascii(text)[1:-1].replace('`', chr(92) + 'x60')}`"


# ----------------------------------------------------------------------------------------------------------------------
# properties


def properties(
    sample: SampledText, token_str: Callable[[int], str], special_ids: Collection[int]
) -> tuple[dict[str, Property], dict[str, Property]]:
    """The properties that labels speak of: those that stand alone, and those that refine a token by its place."""
    ids = sample.ids.tolist()
    texts = [token_str(i) for i in range(max(ids, default=0) + 1)]
    before = _shifted(sample, 1)
    kind, place, statement, part, word, head = _layout(sample, texts, special_ids)
    token = lambda i: quoted(texts[i]) if i >= 0 else "the beginning"

    def alone(column: Sequence, say: Callable[[Any], str], form: str = "{}") -> Property:
        return property_of([column], lambda value: (say(value), "", ""), form)

    def of_token(read: Callable[[str], str], say: Callable[[str], str], form: str) -> Property:
        found = [read(t.strip()) for t in texts]
        return alone([found[i] for i in ids], say, form)

    def where(column: Sequence, link: str, say: Callable[[Any], str], otherwise: str = "") -> Property:
        """A token and its place. otherwise: said of places without a name."""
        return property_of(
            [ids, column], lambda i, x: (token(i), link, say(x)) if say(x) else (token(i), " ", otherwise)
        )

    part_of_sequence = (np.searchsorted(POSITIONS, sample.position, side="right") - 1).tolist()
    single = {
        "token": alone(ids, token),
        "word": of_token(str.lower, quoted, "{} (any case)"),
        "end": of_token(lambda t: t[-3:] * (len(t) > 3), lambda t: f"-{t}" if t else FEW, "tokens ending in {}"),
        "start": of_token(lambda t: t[:3] * (len(t) > 3), lambda t: f"{t}-" if t else FEW, "tokens beginning with {}"),
        "before": alone(before, token, "after {}"),
        "next": alone(_shifted(sample, -1), token, "before {}"),
        "whole word": alone(word, lambda w: quoted(w) if w else "no word", "part of {}"),
        "position": alone(part_of_sequence, lambda p: str(POSITIONS[p]), "in parts of a sequence from token {} on"),
        "line": alone(head, lambda h: quoted(h) if h else "(nothing yet)", "in lines that begin with {}"),
        "syntax": property_of([kind, place, statement], _role),
    }
    within = {
        "before": where(before, " after ", token),
        "two before": where(_shifted(sample, 2), " two after ", token),
        "line": where(head, " in lines that begin with ", lambda h: h and quoted(h), "at the beginning of lines"),
        "kind": where(kind, " ", lambda k: KINDS[k] and f"{'in' if k in LONG else 'as'} {KINDS[k]}", "outside of code"),
        "place": where(place, " ", PLACES.__getitem__, "outside of code"),
        "statement": where(statement, " in ", _statement, "outside of statements"),
        "part": where(part, " ", PARTS.__getitem__),
    }
    return single, within


FEW = "(short ones)"
PARTS = ("outside of words", "as a whole word", "beginning a word", "within a word", "ending a word")
LONG = [KINDS.index(name) for name in ("a comment", "a docstring", "a string")]  # kinds of several tokens


def _statement(s: int) -> str:
    return STATEMENTS[s] if not s or " " in STATEMENTS[s] else f"'{STATEMENTS[s]}'"


def _role(kind: int, place: int, statement: int) -> Name:
    """The name of a combination of roles in Python's syntax."""
    if not kind:
        return ("what is no code", "", "")
    name = KINDS[kind] + (f" {PLACES[place]}" if place and PLACES[place] != TOP else "")
    inside = statement and KINDS[kind] not in ("a comment", "a docstring")
    return (name, " in ", _statement(statement)) if inside else (name, "", "")


def _shifted(sample: SampledText, by: int) -> list[int]:
    """The token `by` places before each one (below 0: after it), -1 beyond its sequence."""
    at = np.arange(len(sample.ids)) - by
    source = at.clip(0, len(at) - 1)
    same = (at == source) & (sample.sequence[source] == sample.sequence)
    return np.where(same, sample.ids[source], -1).tolist()


def _layout(sample: SampledText, texts: Sequence[str], special_ids: Collection[int]) -> tuple[Sequence, ...]:
    """Each token's (S,) kind, place and statement in Python's syntax, its part (PARTS) of a word, that word, and the
    first token of its line, "" for that token itself."""
    S = len(sample.ids)
    codes = np.zeros((4, S), dtype=np.int64)
    word, head = [""] * S, [""] * S
    special = np.isin(sample.ids, list(special_ids))
    apart = np.diff(sample.sequence, prepend=-9) > 1
    begins = np.flatnonzero(apart | special | np.concatenate(([True], special[:-1])))
    for a, b in zip(begins, [*begins[1:], S], strict=True):  # a document, or a part of one
        if special[a]:
            continue
        pieces = [texts[i] for i in sample.ids[a:b]]
        starts = np.cumsum([0] + [len(p) for p in pieces])
        text = "".join(pieces)
        at = np.minimum([s + len(p) - len(p.lstrip()) for s, p in zip(starts, pieces, strict=False)], len(text) - 1)
        known = annotate(text)
        if known is not None:
            codes[:3, a:b] = known[:, at]
        for match in re.finditer(r"\w+", text):
            i, j = a + np.searchsorted(at, match.span())
            word[i:j] = [match.group()] * (j - i)
            if j > i:
                codes[3, i:j] = [1] if j == i + 1 else [2, *[3] * (j - i - 2), 4]
        first = ""
        for n, piece in enumerate(pieces, int(a)):
            head[n] = first
            first = "" if "\n" in piece else first or piece.strip()
    return (*codes.tolist(), word, head)


# ----------------------------------------------------------------------------------------------------------------------
# rules


class Counted(NamedTuple):
    """How often each row is active on each value of a property: row, value, hits (C,), sorted by row and value, pairs
    without a hit left out; totals (G,): tokens with each value."""

    row: np.ndarray
    value: np.ndarray
    hits: np.ndarray
    totals: np.ndarray

    @property
    def keys(self) -> np.ndarray:
        return self.row * len(self.totals) + self.value


class Rules(NamedTuple):
    """The rules of all rows: row, family (0 for a value of the root, i for one of the ith refinement), value and hits
    (C,) of each value taken; score (F,)."""

    row: np.ndarray
    family: np.ndarray
    value: np.ndarray
    hits: np.ndarray
    score: np.ndarray


def count_pairs(row: np.ndarray, value: np.ndarray, totals: np.ndarray, *, least: int = 1) -> Counted:
    """row, value (E,): of each activation its row, and its token's value. Pairs with fewer hits are left out."""
    keys, hits = np.unique(row.astype(np.int64) * len(totals) + value, return_counts=True)
    often = hits >= least
    return Counted(*np.divmod(keys[often], len(totals)), hits[often], totals)


def best_rules(root: Counted, finer: Sequence[tuple[Counted, np.ndarray]], n_active: np.ndarray) -> Rules:
    """The rule with the best score for each row.

    finer: refinements of root, with the value of root that each of their values is part of. A rule takes each value of
    root whole, or some values of one refinement of it, or not at all. n_active (F,): activations of each row. The score
    is F-beta, where each value taken costs one hit, as if what was seen once were left out: this keeps rules from
    learning the text by heart. A value is worth taking if its hits exceed its tokens times score / (1 + BETA2).
    Starting at 0, the score grows until that holds of all values taken, and then no rule is better (Dinkelbach's
    method). The caller leaves out pairs with fewer than LEAST hits.
    """
    F, keys = len(n_active), root.keys
    inside = [np.searchsorted(keys, c.row * len(root.totals) + parent[c.value]) for c, parent in finer]
    parts = list(zip((root, *(c for c, _ in finer)), (np.arange(len(keys)), *inside), strict=True))
    score = np.zeros(F)
    while True:
        best, hits, named = np.zeros((3, len(keys)))  # of the best way to take each value of root
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
    families = np.repeat(np.arange(len(parts)), [here.sum() for here in chosen])
    return Rules(joined(lambda c: c.row), families, joined(lambda c: c.value), joined(lambda c: c.hits), score)


def precision_recall(rules: Rules, families: Iterable[Counted], n_active: np.ndarray) -> np.ndarray:
    """(2, F): precision and recall of rules on the text that families (root and refinements) and n_active count."""
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
    sample: SampledText, row_of: np.ndarray, token_str: Callable[[int], str], special_ids: Collection[int]
) -> list[Label | None]:
    """A label for each row; None for a row that is silent in the half that rules are made from.

    row_of (d_sae,): the row of each latent, -1 for none. The halves follow each other: were they interleaved, each
    would have parts of the other's documents.
    """
    on = sample.keep[sample.token] & (row_of[sample.latent] >= 0)
    row, token = row_of[sample.latent[on]].astype(np.int64), sample.token[on]
    n_rows = int(row_of.max()) + 1
    half = (sample.sequence > sample.sequence[(len(sample.sequence) - 1) // 2]).astype(np.int64)  # 1: to measure
    mine = [half[token] == h for h in (0, 1)]
    rows, tokens = ([x[here] for here in mine] for x in (row, token))
    n_active = [np.bincount(r, minlength=n_rows) for r in rows]

    def counted(property: Property, h: int) -> Counted:
        v, G = property.values, int(property.values.max(initial=0)) + 1
        totals = np.bincount(v[sample.keep & (half == h)], minlength=G)
        return count_pairs(rows[h], v[tokens[h]], totals, least=1 if h else LEAST)

    single, within = properties(sample, token_str, special_ids)
    best = np.zeros(n_rows)
    labels: list[Label | None] = [None] * n_rows
    for name, property in single.items():
        families = [property, *(within.values() if name == "token" else ())]
        # the token that each value of a refinement is part of: the one where the value first occurs
        firsts = (np.unique(family.values, return_index=True)[1] for family in families[1:])
        finer = [(counted(f, 0), property.values[at]) for f, at in zip(families[1:], firsts, strict=True)]
        rules = best_rules(counted(property, 0), finer, n_active[0])
        quality = precision_recall(rules, (counted(family, 1) for family in families), n_active[1]).tolist()
        order = np.lexsort((-rules.hits, rules.row))  # the most frequent value first
        starts = np.searchsorted(rules.row[order], np.arange(n_rows + 1))
        for f in np.flatnonzero(rules.score > best):
            taken = order[starts[f] : starts[f + 1]]
            names = [families[i].name(int(v)) for i, v in zip(rules.family[taken], rules.value[taken], strict=True)]
            labels[f] = Label(*in_words(names, property.form), *(x[f] for x in quality))
        best = np.maximum(best, rules.score)
    return labels


def in_words(names: Sequence[Name], form: str = "{}") -> tuple[str, str]:
    """A set of names in short, and in full."""
    named = form.format(_listed(names[:N_NAMED]))
    if len(names) > MANY:  # the first of them would sound like a meaning
        named = f"a mix of {len(names):,}, such as {named}"
    elif len(names) > N_NAMED:
        named += f" or {len(names) - N_NAMED} more"
    return named, form.format(_listed(names))


def _listed(names: Sequence[Name]) -> str:
    """`a`, `b` in a comment; `c` after `d`, `e`: shared parts are said once."""
    places: dict[tuple[str, str], list[str]] = {}
    for what, form, where in dict.fromkeys(names):
        places.setdefault((what, form), []).append(where)
    things: dict[str, list[str]] = {}
    for (what, form), wheres in places.items():
        things.setdefault(form + ", ".join(wheres), []).append(what)
    return "; ".join(", ".join(whats) + where for where, whats in things.items())


def distribution(labels: Sequence[Label | None]) -> list[str]:
    """The quality of labels as a histogram in lines of text."""
    least = np.array([min(label.precision, label.recall) for label in labels if label is not None])
    edges = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.01)
    counts = np.histogram(least, edges)[0]
    good, of = int((least >= 0.5).sum()), len(labels)
    share = f"{good / max(1, of):.1%}"
    longest = max(1, counts.max())
    bars = ((a, min(1, b), n, "#" * round(50 * n / longest)) for a, b, n in zip(edges, edges[1:], counts, strict=False))
    return [
        f"labels: {good} of {of} live features have precision and recall >= 0.5 on held-out text ({share})",
        "the lesser of the two, and features:",
        *("  {:.1f} to {:.1f} {:6} {}".format(*bar) for bar in bars),
    ]
