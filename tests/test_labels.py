"""Labels find planted rules, say in words what they are, and measure them on text that the rule was not made from.

Run: python -m pytest tests/test_labels.py
"""

import numpy as np
import pytest

from sae.feature_tables import Events
from sae.labels import Label, choose, distribution, make_labels, measure, properties, quoted

WORDS = ["alpha", " beta", " walking", " talking", "self", "(", ")", "\n    ", "return", " x", "<|bos|>"]
BOS = len(WORDS) - 1


def text(n_blocks=20, per_block=4, T=64, seed=0):
    rng = np.random.default_rng(seed)
    n = n_blocks * per_block
    ids = rng.integers(0, BOS, (n, T))
    ids[:, 0] = BOS
    return ids, np.repeat(np.arange(n_blocks), per_block)


def events(ids, blocks, fires):
    """fires (n, T, F) bool: where each latent is active."""
    n, T = ids.shape
    token, latent = np.nonzero(fires.reshape(n * T, -1))
    return Events(
        ids=ids.flatten().astype(np.int32), sequence=np.repeat(np.arange(n), T), position=np.tile(np.arange(T), n),
        keep=(ids != BOS).flatten(), block=np.repeat(blocks, T), latent=latent.astype(np.int32),
        value=np.ones(len(token), np.float32), token=token,
    )  # fmt: skip


def label(fires_of):
    ids, blocks = text()
    fires = fires_of(ids)[:, :, None] & (ids != BOS)[:, :, None]
    (found,) = make_labels(events(ids, blocks, fires), np.zeros(1, dtype=np.int64), WORDS.__getitem__, {BOS})
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
    ids, blocks = text()
    half = (blocks % 2)[:, None]
    fires = np.where(half == 0, ids == 0, ids == 1)[:, :, None]
    (found,) = make_labels(events(ids, blocks, fires), np.zeros(1, dtype=np.int64), WORDS.__getitem__, {BOS})
    assert found == Label("`alpha`", "`alpha`", 0.0, 0.0)
    assert "0 of 1" in distribution([found])[0]


def test_rows_are_those_asked_for_and_silent_ones_have_none():
    ids, blocks = text()
    fires = np.stack([ids == 0, ids == 1, np.zeros_like(ids, bool)], -1)
    row_of = np.array([-1, 1, 0])
    silent, found = make_labels(events(ids, blocks, fires), row_of, WORDS.__getitem__, {BOS})
    assert silent is None
    assert found.short == "` beta`"


def test_choose_and_measure_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        G, F, n = 6, 3, 60
        values = rng.integers(0, G, n)
        fires = rng.random((n, F)) < rng.random((G, F))[values]
        token, row = np.nonzero(fires)
        totals, n_active = np.bincount(values, minlength=G), fires.sum(0)
        rules = choose(row, values[token], totals, n_active)
        precision, recall = measure(rules, row, values[token], totals, n_active)
        for f in range(F):
            mine = rules.value[rules.row == f]
            named = np.isin(values, mine)
            assert precision[f] == pytest.approx((named & fires[:, f]).sum() / max(1, named.sum()))
            assert recall[f] == pytest.approx((named & fires[:, f]).sum() / max(1, n_active[f]))
            # the best of all sets that take values from the surest on
            hits = np.array([(fires[:, f] & (values == g)).sum() for g in range(G)])
            order = [g for g in np.argsort(-(hits - 1) / (totals + 0.5), kind="stable") if hits[g] >= 2]
            scores = [
                2 * (hits[order[:k]] - 1).sum() / (totals[order[:k]].sum() + n_active[f])
                for k in range(1, len(order) + 1)
            ]
            assert rules.score[f] == pytest.approx(max(scores, default=0))


def test_syntax_and_words_of_a_text():
    pieces = ["def", " run", "ning", "(", "self", ")", ":", "\n    ", "return", " self", ".", "x", "\n"]
    ids = np.tile(np.arange(len(pieces)), (4, 1))
    e = events(ids, np.arange(4), np.zeros((*ids.shape, 1), bool))
    e = e._replace(keep=np.ones_like(e.keep))
    found = properties(e, pieces.__getitem__, ())
    says = lambda key, i: "".join(found[key].name(int(found[key].values[i])))
    assert says("syntax", 2) == "a function's name in its def in 'def'"
    assert says("syntax", 4) == "a parameter in a parameter list in 'def'"
    assert says("syntax", 11) == "an attribute in 'return'"
    assert says("whole word", 1) == says("whole word", 2) == "`running`"
    assert says("token part", 2) == "`ning` ending a word"
    assert says("line", 9) == "`return`"
    assert says("next", 10) == "`x`"
    assert says("token before", 0) == "`def` after the beginning"


def test_tokens_in_labels_are_spelled_so_that_they_show():
    assert quoted(" a") == "` a`"
    assert quoted("\n\t") == "`\\n\\t`"
    assert quoted("`") == "`\\x60`"
    assert quoted("\u202e") == "`\\u202e`"
