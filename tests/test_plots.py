"""Plots are pictures.

Run: python -m pytest tests/test_plots.py
"""

import json

import torch
from matplotlib.image import imread

from sae.kernels.sparse import Codes
from sae.metrics import Totals
from sae.plots import plot_evaluation, plot_training


def test_plots_are_pictures(tmp_path):
    lines = []
    for step in range(10, 101, 10):
        for name in ("transformer.h.2", "transformer.h.10"):
            lines.append(
                {"step": step, "tokens": step * 64, "hookpoint": name, "loss": 1 / step, "l0": 8.0, "lr": 1e-3}
            )
            lines[-1] |= {"explained_variance": 1 - 3 / step, "dead_fraction": 0.1}
    lines.append({"step": 100, "hookpoint": "transformer.h.2", "val_total_loss": 0.1, "val_explained_variance": 0.9})
    torn = "\n".join(map(json.dumps, lines)) + '\n{"step": 110, "tok'
    (tmp_path / "metrics.jsonl").write_text(torn)
    (tmp_path / "empty.jsonl").write_text("")
    totals = Totals(4, 2000)
    x = torch.randn(50, 4)
    totals.add(x, x, Codes(torch.randint(0, 900, (50, 400)), torch.rand(50, 400).round()))
    fixed = Totals(4, 20)
    fixed.add(x, x, Codes(torch.arange(3).expand(50, 3), torch.ones(50, 3)))
    paths = plot_training(tmp_path / "metrics.jsonl", tmp_path / "a") + plot_evaluation(totals, tmp_path / "a")
    assert [p.name for p in paths] == ["training.png", "density.png", "l0.png"]
    paths += plot_training(tmp_path / "empty.jsonl", tmp_path / "b") + plot_evaluation(fixed, tmp_path / "b")
    paths += plot_evaluation(Totals(4, 20), tmp_path / "c")
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        picture = imread(path)
        assert picture.shape[0] > 300
        assert picture.std() > 0.02
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["density.png", "l0.png", "training.png"]
