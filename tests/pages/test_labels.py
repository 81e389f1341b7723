"""Labels find planted rules, say in words what they are, and measure them on text that the rule was not made from.

Run: python -m pytest tests/pages/test_labels.py
"""

import itertools
import tracemalloc

import numpy as np
import pytest

from sae.pages.feature_tables import SampledText
from sae.pages.labels import (
    BETA2,
    LEAST,
    Label,
    best_rules,
    count_pairs,
    distribution,
    in_words,
    make_labels,
    precision_recall,
    properties,
    quoted,
)

WORDS = ["alpha", " beta", " walking", " talking", "self", "(", ")", "\n    ", "return", " x", "<|bos|>"]
BOS = len(WORDS) - 1


def text(n=80, T=64, seed=0):
    ids = np.random.default_rng(seed).integers(0, BOS, (n, T))
    ids[:, 0] = BOS
    return ids


def sampled(ids, fires):
    """fires (n, T, F) bool: where each latent is active."""
    n, T = ids.shape
    token, latent = np.nonzero(fires.reshape(n * T, -1))
    return SampledText(
        ids=ids.flatten().astype(np.int32),
        sequence=np.repeat(np.arange(n), T),
        position=np.tile(np.arange(T), n),
        keep=(ids != BOS).flatten(),
        latent=latent.astype(np.int32),
        value=np.ones(len(token), np.float32),
        token=token,
    )


def label(fires_of):
    ids = text()
    fires = fires_of(ids)[:, :, None] & (ids != BOS)[:, :, None]
    (found,) = make_labels(sampled(ids, fires), np.zeros(1, dtype=np.int64), WORDS.__getitem__, {BOS})
    return found


def before(ids, i):
    return np.concatenate((np.zeros((len(ids), 1), bool), ids[:, :-1] == i), 1)


@pytest.mark.parametrize(
    ("fires", "says"),
    [
        (lambda ids: np.isin(ids, (0, 5)), {"`alpha`", "`(`"}),
        (lambda ids: np.isin(ids, (2, 3)), {"tokens ending in -ing"}),
        (lambda ids: before(ids, 4), {"after `self`"}),
        (lambda ids: (ids == 9) & before(ids, 8), {"` x` after `return`"}),
        (lambda ids: (ids == 0) | (ids == 9) & before(ids, 8), {"`alpha`", "` x` after `return`"}),
        (lambda ids: np.arange(64)[None] + 0 * ids >= 32, {"from token 32 on"}),
        (lambda ids: np.concatenate((ids[:, 1:] == 6, np.zeros((len(ids), 1), bool)), 1), {"before `)`"}),
    ],
)
def test_planted_rules_are_found(fires, says):
    found = label(fires)
    assert found.precision == found.recall == 1
    assert all(part in found.short for part in says), found.short


def test_noise_gets_a_label_that_says_it_is_weak():
    rng = np.random.default_rng(1)
    found = label(lambda ids: rng.random(ids.shape) < 0.05)
    assert found is None or min(found.precision, found.recall) < 0.3


def test_quality_is_that_of_the_other_half():
    """A latent that changes what it does between the halves: perfect where the rule is made, useless where measured."""
    ids = text()
    half = (np.arange(len(ids)) >= 40)[:, None]
    fires = np.where(half == 0, ids == 0, ids == 1)[:, :, None]
    (found,) = make_labels(sampled(ids, fires), np.zeros(1, dtype=np.int64), WORDS.__getitem__, {BOS})
    assert found == Label("`alpha`", "`alpha`", 0.0, 0.0)
    assert "0 of 1" in distribution([found])[0]


def test_a_long_word_costs_its_length_once_and_is_cut_in_words():
    words = ["a" * 2000, *WORDS[1:]]
    ids = text(8)
    ids[:, 1:] = 0  # every sequence is a word of 126,000 characters
    sample = sampled(ids, (ids != BOS)[:, :, None])
    tracemalloc.start()
    (found,) = make_labels(sample, np.zeros(1, dtype=np.int64), words.__getitem__, {BOS})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # a word for every token would take 60e6
    assert found.precision == found.recall == 1 and found.short == f"`{'a' * 57}...`"


def test_rows_are_those_asked_for_and_silent_ones_have_none():
    ids = text()
    fires = np.stack([ids == 0, ids == 1, np.zeros_like(ids, bool)], -1)
    row_of = np.array([-1, 1, 0])
    silent, found = make_labels(sampled(ids, fires), row_of, WORDS.__getitem__, {BOS})
    assert silent is None
    assert found.short == "` beta`"


def test_rules_and_their_quality_against_brute_force():
    """Of all rules that take each value whole, or some of its four finer values, or not at all, the best is found."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        G, F, n = 3, 2, 80
        fine = rng.integers(0, 4 * G, n)
        fires = rng.random((n, F)) < rng.random((4 * G, F))[fine] ** 2
        token, row = np.nonzero(fires)
        n_active = fires.sum(0)
        both = [(row, v[token], np.bincount(v, minlength=m)) for v, m in ((fine // 4, G), (fine, 4 * G))]
        often = [count_pairs(*x, least=LEAST) for x in both]
        rules = best_rules(often[0], [(often[1], np.arange(4 * G) // 4)], n_active)
        precision, recall = precision_recall(rules, [count_pairs(*x) for x in both], n_active)
        for f in range(F):
            mine = rules.row == f
            named = np.isin(fine // 4, rules.value[mine & (rules.family == 0)])
            named |= np.isin(fine, rules.value[mine & (rules.family == 1)])
            assert precision[f] == pytest.approx((named & fires[:, f]).sum() / max(1, named.sum()))
            assert recall[f] == pytest.approx((named & fires[:, f]).sum() / max(1, n_active[f]))
            ways = []  # of each value: the hits and tokens that each way of taking it brings
            for g in range(G):
                finest = [[fine == 4 * g + i for i in range(4) if some >> i & 1] for some in range(16)]
                masks = [*finest, [fine // 4 == g]]
                hits = [[(m & fires[:, f]).sum() for m in way] for way in masks]
                ways.append(
                    [
                        (sum(h) - len(h), sum(m.sum() for m in way))
                        for way, h in zip(masks, hits, strict=True)
                        if all(x >= LEAST for x in h)
                    ]
                )
            best = max(
                (1 + BETA2) * sum(h for h, _ in rule) / (sum(n for _, n in rule) + BETA2 * n_active[f])
                for rule in itertools.product(*ways)
            )
            assert rules.score[f] == pytest.approx(best)


def test_syntax_and_words_of_a_text():
    pieces = ["def", " run", "ning", "(", "self", ")", ":", "\n    ", "return", " self", ".", "x", "\n"]
    ids = np.tile(np.arange(len(pieces)), (4, 1))
    e = sampled(ids, np.zeros((*ids.shape, 1), bool))
    e = e._replace(keep=np.ones_like(e.keep))
    single, within = properties(e, pieces.__getitem__, ())
    found = {**{f"token {key}": p for key, p in within.items()}, **single}
    says = lambda key, i: "".join(found[key].name(int(found[key].values[i])))
    assert says("syntax", 2) == "a function's name in its def in 'def'"
    assert says("syntax", 4) == "a parameter in a parameter list in 'def'"
    assert says("syntax", 11) == "an attribute in 'return'"
    assert says("whole word", 1) == says("whole word", 2) == "`running`"
    assert says("token part", 2) == "`ning` ending a word"
    assert says("line", 9) == "`return`"
    assert says("next", 10) == "`x`"
    assert says("token before", 0) == "`def` after the beginning"
    assert says("token two before", 3) == "`(` two after ` run`"
    assert says("token line", 9) == "` self` in lines that begin with `return`"
    assert says("token kind", 8) == "`return` as a keyword"
    assert says("token place", 4) == "`self` in a parameter list"
    assert says("token statement", 4) == "`self` in 'def'"


def test_what_names_share_is_said_once():
    names = [
        ("`a`", "", ""),
        ("`c`", " after ", "`x`"),
        ("`b`", "", ""),
        ("`c`", " after ", "`y`"),
        ("`d`", " ", "in a list"),
    ]
    assert in_words(names) == ("`a`, `b`; `c` after `x`, `y` or 1 more", "`a`, `b`; `c` after `x`, `y`; `d` in a list")
    assert in_words(names[:2], "<{}>")[0] == "<`a`; `c` after `x`>"
    many = [(f"`{i}`", "", "") for i in range(1200)]
    assert in_words(many)[0] == "a mix of 1,200, such as `0`, `1`, `2`, `3`"
    assert in_words(many[:50])[0] == "`0`, `1`, `2`, `3` or 46 more"


def test_tokens_in_labels_are_spelled_so_that_they_show():
    assert quoted(" a") == "` a`"
    assert quoted("\n\t") == "`\\n\\t`"
    assert quoted("`") == "`\\x60`"
    assert quoted("\u202e") == "`\\u202e`"
