"""Pictures of a run: training curves, densities and L0, and which SAE for which L0. Figures without pyplot."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae import files
from sae.files import write_atomic
from sae.hooks import natural
from sae.metrics import Totals


def _axes(n_rows: int = 1, n_columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes, without pyplot, whose global state belongs to the caller's notebook."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 3.5 * n_columns, 1 + 2.7 * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    write_atomic(path, lambda tmp: figure.savefig(tmp, format="png", dpi=130))
    return path


def plot_training(metrics_jsonl: Path, folder: Path) -> list[Path]:
    """training.png: a run's metrics.jsonl against tokens; a colour per hookpoint, lines for training, dots for val."""
    from matplotlib import colormaps

    texts = Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()
    lines = [json.loads(text) for text in texts if text.endswith("}")]  # a killed run's last line may be torn
    batch = next((x["tokens"] / x["step"] for x in lines if "tokens" in x), 1)
    names = sorted({x.get("hookpoint", "") for x in lines}, key=natural)
    colours = dict(zip(names, colormaps["viridis"](np.linspace(0, 1, len(names) + 2)[1:-1]), strict=True))
    panels = {
        "loss": {"loss": "-", "val_total_loss": "o"}, "learning rate": {"lr": "-"},
        "explained variance": {"explained_variance": "-", "val_explained_variance": "o"},
        "active latents per token (L0)": {"l0": "-", "val_l0": "o"},
        "dead latents (share)": {"dead_fraction": "-", "val_dead_fraction": "o"},
    }  # fmt: skip
    figure, axes = _axes(2, 3)
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, (key, style) in itertools.product(names, curves.items()):
            points = [(batch * x["step"] / 1e6, x[key]) for x in lines if x.get("hookpoint", "") == name and key in x]
            label = f"{name} {'training' if style == '-' else 'held out'}"
            ax.plot(*np.array(points).reshape(-1, 2).T, style, color=colours[name], ms=4, label=label)
        ax.set(title=title, xlabel="million tokens", xlim=(0, None))
        if title != "explained variance":  # which may be below 0
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center left", frameon=False)
    return [_save(figure, folder / "training.png")]


def plot_evaluation(totals: Totals, folder: Path) -> list[Path]:
    """density.png and l0.png: how often each latent fires, and how many fire at once."""
    densities, counts, n = totals.densities().cpu().numpy(), totals.l0_counts.cpu().numpy(), max(1, totals.n)
    n_live, n_all = int((densities > 0).sum()), len(densities)
    density, (ax,) = _axes()
    ax.hist(densities[densities > 0], bins=np.geomspace(0.7 / n, 1, 40), color="#21918c", ec="w")
    ax.set_title(f"{n_live:,} of {n_all:,} latents fire on {n:,} tokens, {n_all - n_live:,} are dead")
    ax.set(xlabel="share of tokens that a latent is active on", ylabel="latents", xscale="log")
    l0, (ax,) = _axes()
    used = np.flatnonzero(counts) if counts.any() else np.zeros(1, dtype=int)
    step = (used[-1] - used[0]) // 60 + 1
    bins = np.arange(used[0], used[-1] + step + 1, step) - 0.5
    ax.hist(used, bins=bins, weights=counts[used] / n, color="#21918c", ec="w")
    ax.set_title(f"mean L0 {counts @ np.arange(len(counts)) / n:.1f}")
    ax.set(xlabel="active latents of a token (L0)", ylabel="share of tokens", xlim=(used[0] - 5, used[-1] + 5))
    return [_save(density, folder / "density.png"), _save(l0, folder / "l0.png")]


def plot_pareto(table: list[dict[str, Any]], front: list[str], path: Path) -> Path:
    """Explained variance against L0, one point (with its spread over seeds) a row, one line a hookpoint; front: names
    on the frontier."""
    figure, (axes,) = _axes(1, 1)
    figure.set_size_inches(6.4, 4.2)
    hookpoints = list(dict.fromkeys(row["name"].split("/")[0] for row in table))
    colours = {name: f"C{i % 10}" for i, name in enumerate(hookpoints)}
    for row in table:
        hookpoint = row["name"].split("/")[0]
        at, colour = (row["l0"], row["explained_variance"]), colours[hookpoint] if row["name"] in front else "0.6"
        spread = {"xerr": row["l0_sd"], "yerr": row["explained_variance_sd"]}
        axes.errorbar(*at, **spread, fmt="o", capsize=2, color=colour)
        axes.annotate(row["name"], at, xytext=(5, 4), textcoords="offset points", fontsize=7)
    for hookpoint, colour in colours.items():
        mine = [r for r in table if r["name"] in front and r["name"].split("/")[0] == hookpoint]
        best = sorted((r["l0"], r["explained_variance"]) for r in mine)
        axes.plot(*zip(*best, strict=True), color=colour, lw=1, zorder=0)
    axes.set(xlabel="active latents per token (L0)", ylabel="explained variance", title="Which SAE for which L0")
    axes.margins(x=0.2)
    return _save(figure, path)


COLUMNS = ("explained_variance", "l0", "dead_fraction")


def sweep_rows(last: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row for each combination but the seed: mean, and standard deviation (n - 1) over seeds.

    last: metrics by name, a name being `hookpoint/label` with the seed, if it was swept, as the label's `seedN`.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, metrics in last.items():
        groups.setdefault(re.sub(r"[_/]?seed\d+", "", name), []).append(metrics)
    table = []
    for name, several in groups.items():
        row: dict[str, Any] = {"name": name, "n_seeds": len(several)}
        for column in COLUMNS:
            values = [m[column] for m in several]
            row[column] = statistics.fmean(values)
            row[f"{column}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(row)
    return table


def pareto_front(table: list[dict[str, Any]]) -> list[str]:
    """Names of the rows that no other of their hookpoint beats: none with at most as many active latents explains as
    much or more."""
    best = []
    for row in table:
        same = lambda o, row=row: o["name"].split("/")[0] == row["name"].split("/")[0]
        others = (o for o in table if o is not row and same(o) and o["l0"] <= row["l0"])
        if not any(o["explained_variance"] >= row["explained_variance"] for o in others):
            best.append(row["name"])
    return best


def write_sweep(last: Mapping[str, Mapping[str, float]], folder: Path) -> list[str]:
    """Write sweep.json (all SAEs, and the table) and plots/pareto.png; returns the table as lines of text."""
    table = sweep_rows(last)
    front = pareto_front(table)
    files.write_json({"saes": {name: dict(m) for name, m in last.items()}, "table": table, "pareto": front},
                       folder / "sweep.json")  # fmt: skip
    plot_pareto(table, front, folder / "plots" / "pareto.png")
    width = max(len(row["name"]) for row in table)
    lines = [f"{'':{width}}  explained variance        L0          dead   seeds"]
    for row in table:
        spread = lambda c, f, row=row: f" +- {row[f'{c}_sd']:{f}}" if row[f"{c}_sd"] is not None else ""
        lines.append(
            f"{row['name']:{width}}  {row['explained_variance']:.4f}{spread('explained_variance', '.4f'):10}  "
            f"{row['l0']:8.2f}{spread('l0', '.2f'):8}  {100 * row['dead_fraction']:6.2f}%  {row['n_seeds']:3}"
            + ("  *" if row["name"] in front else "")
        )
    return [*lines, f"* not beaten at its L0; picture: {folder / 'plots' / 'pareto.png'}"]
