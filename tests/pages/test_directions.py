"""Neighbours are those of the whole matrix of cosines; on the map clusters stay together and apart from others.

Run: python -m pytest tests/pages/test_directions.py
"""

import pytest
import torch

from sae.pages import directions


def clusters(n=12, size=25, d=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(n, d, generator=g)
    return (centres[:, None] + 0.3 * torch.randn(n, size, d, generator=g)).flatten(0, 1)


def test_neighbours_against_the_whole_matrix(monkeypatch):
    W = clusters()
    unit = torch.nn.functional.normalize(W, dim=1)
    cosines = (unit @ unit.t()).fill_diagonal_(-2)
    wanted = cosines.topk(8, dim=1)
    for latents in (None, torch.tensor([7, 3, 299])):
        rows = slice(None) if latents is None else latents
        found = directions.nearest(W, latents=latents)
        assert torch.equal(found[0], wanted.indices[rows])
        assert torch.allclose(found[1], wanted.values[rows], atol=1e-5)
    assert directions.nearest(torch.eye(3))[0].shape == (3, 2)
    assert directions.nearest(torch.ones(1, 4))[0].shape == (1, 0)


def test_the_map_keeps_clusters_together():
    W = clusters()
    near, _ = directions.nearest(W)
    places = directions.plane(W, near)
    assert torch.equal(places, directions.plane(W, near))
    assert places.min() >= 0
    assert places.max() <= 1
    closest = torch.cdist(places, places).fill_diagonal_(9).topk(8, largest=False).indices
    same = (closest // 25 == torch.arange(300)[:, None] // 25).float().mean()
    assert same > 0.9
    assert (places.std(0) > 0.1).all()


@pytest.mark.parametrize("W", [torch.ones(1, 4), torch.zeros(2, 4), torch.zeros(40, 4), torch.ones(40, 4)])
def test_degenerate_directions_have_a_place(W):
    places = directions.plane(W, directions.nearest(W)[0])
    assert places.shape == (len(W), 2)
    assert places.isfinite().all()
