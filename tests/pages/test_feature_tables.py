"""Tables of a pass equal plain Python over all tokens, however the text is cut into batches and over ranks; what they
keep does not grow with the text; a sample of it is fair, whole, and the seed's alone.

Run: python -m pytest tests/pages/test_feature_tables.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.config import SAEConfig
from sae.kernels.sparse import Codes
from sae.models import create_sae
from sae.pages.feature_tables import BLOCK, EDGES, POSITIONS, SAMPLE_TOKENS, Batch, FeatureTables, Sample, bins


@given(st.floats(2.0**-20, 2.0**20, width=32))
def test_bins_are_where_the_edges_say(value):
    i = int(bins(torch.tensor([value]))[0])
    assert i == 0 or value >= EDGES[i]
    assert i == len(EDGES) - 2 or value < EDGES[i + 1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_merge_against_plain_python(data):
    """Small whole numbers, so that ties are everywhere; any cutting into batches and over ranks; some tokens do not
    count."""
    n_sequences, T, F, K = (data.draw(st.integers(1, high)) for high in (7, 5, 4, 3))
    K = min(K, F)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    indices = torch.rand(n_sequences, T, F, generator=g).argsort(-1)[:, :, :K]
    values = torch.randint(0, 4, (n_sequences, T, K), generator=g).float()
    keep = torch.rand(n_sequences, T, generator=g) < 0.8
    valid = keep | (torch.rand(n_sequences, T, generator=g) < 0.7)
    ids = torch.randint(0, 9, (n_sequences, T), generator=g)
    sae = create_sae(SAEConfig(d_in=2, d_sae=F, k=K))
    ranks = [FeatureTables(sae, (), top_k=2, context_tokens=1) for _ in range(data.draw(st.integers(1, 3)))]
    start = 0
    while start < n_sequences:
        part = slice(start, start + data.draw(st.integers(1, 4)))
        codes = Codes(indices[part][valid[part]], values[part][valid[part]])
        tables = data.draw(st.sampled_from(ranks))
        tables.add(Batch(ids[part], valid[part], keep[part], codes, start))
        if data.draw(st.booleans()):
            tables._settle()
        start = part.stop
    tables, *others = ranks
    for other in others:
        tables.merge(other)
    tables.finish()
    dense = torch.zeros(n_sequences, T, F).scatter(2, indices, values)
    for f in range(F):
        peaks = []
        for i in range(n_sequences):
            own = [(-float(dense[i, t, f]), i, t) for t in range(T) if keep[i, t] and dense[i, t, f] > 0]
            peaks += sorted(own)[:1]
        for r, (peak, i, t) in enumerate(sorted(peaks)[:2]):
            assert float(tables.peaks[f, r]) == -peak
            assert tables.places[f, r].tolist() == [i, t]
            near = [(j, 0 <= j < T and bool(valid[i, j])) for j in (t - 1, t, t + 1)]
            assert tables.ids[f, r].tolist() == [int(ids[i, j]) if there else -1 for j, there in near]
            for (j, there), value in zip(near, tables.values[f, r].tolist(), strict=True):
                assert value == (float(dense[i, j, f]) if there else 0) or not there
        assert int((tables.peaks[f] > 0).sum()) == min(2, len(peaks))
        counted = dense[:, :, f][keep]
        exact = {128: int((counted == 1).sum()), 136: int((counted == 2).sum()), 140: int((counted == 3).sum())}
        assert {i: n for i, n in enumerate(tables.histogram[f].tolist()) if n} == {i: n for i, n in exact.items() if n}
        assert float(tables.sums[f]) == float(counted.sum())
    assert int(tables.all_positions.sum()) == int(keep.sum())


def stream(n_sequences, *, T=16, F=40, K=3, seed=0):
    """Batches of sequences with random codes."""
    g = torch.Generator().manual_seed(seed)
    for first in range(0, n_sequences, 4):
        indices = torch.rand(4 * T, F, generator=g).argsort(1)[:, :K]
        values = torch.rand(4 * T, K, generator=g)
        valid = torch.ones(4, T, dtype=torch.bool)
        yield Batch(torch.randint(0, 9, (4, T), generator=g), valid, valid, Codes(indices, values), first)


def filled(n_sequences, *, skip=lambda _: False, sample_tokens=SAMPLE_TOKENS, seed=0):
    sae = create_sae(SAEConfig(d_in=4, d_sae=40, k=3))
    tables = FeatureTables(sae, (), top_k=3, context_tokens=2, sample=Sample(sample_tokens, seed=seed))
    for batch in stream(n_sequences):
        if not skip(batch.first):
            tables.add(batch)
    return tables


def test_latents_with_a_sign_count_by_their_size():
    """abstopk's latents fire both ways."""
    c = SAEConfig(d_in=4, d_sae=40, k=3)
    one, other = (FeatureTables(create_sae(c), (), top_k=3, context_tokens=2) for _ in range(2))
    for batch in stream(40):
        codes = batch.codes
        signs = torch.where(codes.indices % 2 == 0, -1.0, 1.0)
        one.add(batch)
        other.add(batch._replace(codes=Codes(codes.indices, codes.values * signs)))
    one.finish(), other.finish()
    assert int(other.histogram.sum()) == 3 * int(other.all_positions.sum())
    for name, table in vars(one).items():
        if isinstance(table, torch.Tensor):
            assert torch.equal(table, vars(other)[name]), name


def test_memory_does_not_grow_with_the_text():
    sizes = []
    for n_sequences in (400, 4000):
        tables = filled(n_sequences, sample_tokens=2048)
        waiting = sum(x.nbytes for w in tables._waiting for x in w)
        assert waiting < 4096 * 100
        tables.finish()
        sizes.append({k: v.nbytes for k, v in vars(tables).items() if isinstance(v, torch.Tensor)})
        sizes[-1]["sample"] = sum(len(text.ids) for block in tables.sample.blocks.values() for text in block.values())
    assert sizes[0] == sizes[1]
    assert sizes[0]["sample"] == 2048
    per_latent = 4 * (len(EDGES) - 1) + 8 + 4 * len(POSITIONS) + 4 + 3 * (4 + 8 + 5 * (4 + 4))
    assert sum(sizes[0].values()) == 40 * (8 + per_latent) + 8 * len(POSITIONS) + 2048


def test_positions_count_activations_by_part_of_the_sequence():
    tables = filled(40)
    tables.finish()
    # 16 tokens a sequence, three activations each: parts begin at 0, 1, 2, 4 and 8
    assert tables.all_positions.tolist() == [40, 40, 80, 160, 320] + [0] * (len(POSITIONS) - 5)
    assert tables.positions.sum(0).tolist() == [3 * n for n in tables.all_positions.tolist()]


def test_the_sample_is_whole_blocks_and_the_seeds_alone():
    one, other, again = (filled(800, sample_tokens=1280, seed=seed) for seed in (0, 1, 0))
    assert len(one.sample.blocks) == 1280 // (BLOCK * 16)
    assert one.sample.blocks.keys() == again.sample.blocks.keys() != other.sample.blocks.keys()
    e = one.sample.text()
    for block in np.unique(e.sequence // BLOCK):
        assert np.unique(e.sequence[e.sequence // BLOCK == block]).tolist() == list(
            range(BLOCK * block, BLOCK * block + BLOCK)
        )
    assert (np.diff(e.token) >= 0).all()
    assert len(e.latent) == 3 * len(e.ids)
    # what it holds is what was given
    given = {first + n: (ids[n], codes) for ids, _, _, codes, first in stream(800) for n in range(4)}
    for sequence in np.unique(e.sequence)[:5]:
        ids, codes = given[int(sequence)]
        mine = np.flatnonzero(e.sequence == sequence)
        assert e.ids[mine].tolist() == ids.tolist()
        n = int(sequence) % 4
        on = np.isin(e.token, mine)
        assert e.latent[on].tolist() == codes.indices[16 * n : 16 * n + 16].flatten().tolist()
        assert e.value[on].tolist() == codes.values[16 * n : 16 * n + 16].flatten().tolist()


def test_every_block_is_as_likely():
    chosen = np.zeros(50)
    for seed in range(200):
        sample = Sample(10 * BLOCK, seed=seed)
        order = range(50) if seed % 2 else reversed(range(50))
        for block in order:
            if sample._makes_room(block, 1):
                sample.blocks[block] = []
        chosen[list(sample.blocks)] += 1
    assert chosen.sum() == 200 * 10
    assert chosen[:10].sum() / 2000 == np.clip(chosen[:10].sum() / 2000, 0.15, 0.25)
    assert chosen[-10:].sum() / 2000 == np.clip(chosen[-10:].sum() / 2000, 0.15, 0.25)


@pytest.mark.parametrize("n_sequences", [80, 800])  # fewer blocks than the sample has room for, and more
def test_ranks_sample_what_one_process_does(n_sequences):
    whole = filled(n_sequences, sample_tokens=1280)
    # batches dealt out in turn, so that a block can lie on both
    halves = [filled(n_sequences, sample_tokens=1280, skip=lambda first, i=i: (first // 4) % 2 != i) for i in (0, 1)]
    halves[0].merge(halves[1])
    whole.finish()
    halves[0].finish()
    for name in ("histogram", "positions", "all_positions", "peaks", "places", "ids", "values"):
        assert torch.equal(getattr(whole, name), getattr(halves[0], name)), name
    for a, b in zip(whole.sample.text(), halves[0].sample.text(), strict=True):
        assert np.array_equal(a, b)
