"""Pictures of a run: training curves, densities and L0, and the SAEs of a sweep. Figures without pyplot."""

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
from sae.hookpoints import SAEName, natural
from sae.metrics import Totals


def _axes(n_rows: int = 1, n_columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes. pyplot's global state belongs to the caller's notebook."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 3.5 * n_columns, 1 + 2.7 * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    files.write_atomic(path, lambda tmp: figure.savefig(tmp, format="png", dpi=130))
    return path


def plot_training(metrics_jsonl: Path, folder: Path) -> list[Path]:
    """training.png: a run's metrics.jsonl over tokens; a colour per hookpoint, dots for held-out text."""
    from matplotlib import colormaps

    texts = Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()
    lines = [json.loads(text) for text in texts if text.endswith("}")]  # a killed run's last line may be torn
    batch = next((x["tokens"] / x["step"] for x in lines if "tokens" in x), 1)
    names = sorted({x.get("hookpoint", "") for x in lines}, key=natural)
    colours = dict(zip(names, colormaps["viridis"](np.linspace(0, 1, len(names) + 2)[1:-1]), strict=True))
    panels = {  # of each title the curves, and their styles
        "loss": {"loss": "-", "val_total_loss": "o"},
        "learning rate": {"lr": "-"},
        "explained variance": {"explained_variance": "-", "val_explained_variance": "o"},
        "active latents per token (L0)": {"l0": "-", "val_l0": "o"},
        "dead latents (share)": {"dead_fraction": "-", "val_dead_fraction": "o"},
    }
    figure, axes = _axes(2, 3)
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, (key, style) in itertools.product(names, curves.items()):
            points = [(batch * x["step"] / 1e6, x[key]) for x in lines if x.get("hookpoint", "") == name and key in x]
            label = f"{name} {'training' if style == '-' else 'held out'}"
            ax.plot(*np.array(points).reshape(-1, 2).T, style, color=colours[name], ms=4, label=label)
        ax.set(title=title, xlabel="million tokens", xlim=(0, None))
        if title != "explained variance":  # it may be negative
            ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center left", frameon=False)
    return [_save(figure, folder / "training.png")]


def plot_evaluation(totals: Totals, folder: Path) -> list[Path]:
    """density.png and l0.png: how often each latent fires, and how many fire on a token."""
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


def _hookpoint(row: Mapping[str, Any]) -> str:
    return SAEName.parse(row["name"]).hookpoint


def plot_pareto(table: list[dict[str, Any]], front: list[str], path: Path) -> Path:
    """Explained variance over L0: a point with its spread over seeds for each row, a line along the front for each
    hookpoint. front: names of the rows on it."""
    figure, (axes,) = _axes(1, 1)
    figure.set_size_inches(6.4, 4.2)
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(map(_hookpoint, table)))}
    for row in table:
        at, colour = (row["l0"], row["explained_variance"]), colours[_hookpoint(row)] if row["name"] in front else "0.6"
        spread = {"xerr": row["l0_sd"], "yerr": row["explained_variance_sd"]}
        axes.errorbar(*at, **spread, fmt="o", capsize=2, color=colour)
        axes.annotate(row["name"], at, xytext=(5, 4), textcoords="offset points", fontsize=7)
    for hookpoint, colour in colours.items():
        mine = [r for r in table if r["name"] in front and _hookpoint(r) == hookpoint]
        best = sorted((r["l0"], r["explained_variance"]) for r in mine)
        axes.plot(*zip(*best, strict=True), color=colour, lw=1, zorder=0)
    axes.set(xlabel="active latents per token (L0)", ylabel="explained variance", title="Which SAE for which L0")
    axes.margins(x=0.2)
    return _save(figure, path)


COLUMNS = ("explained_variance", "l0", "dead_fraction")


def sweep_rows(last: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row for each combination of settings but the seed: mean, and standard deviation (n - 1) over seeds.

    last: metrics by SAE name; if the seed was swept, the label has it as `seedN`.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, metrics in last.items():
        groups.setdefault(re.sub(r"[_/]?seed\d+", "", name), []).append(metrics)
    table = []
    for name, several in groups.items():
        row: dict[str, Any] = {"name": name, "n_seeds": len(several)}
        for column in COLUMNS:
            values = [m[column] for m in several]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row |= {column: statistics.fmean(values), f"{column}_sd": spread}
        table.append(row)
    return table


def pareto_front(table: list[dict[str, Any]]) -> list[str]:
    """Names of the rows without a better one: at the same hookpoint, with at most as many active latents, and at least
    as much explained."""
    others = lambda row: (
        o for o in table if o is not row and _hookpoint(o) == _hookpoint(row) and o["l0"] <= row["l0"]
    )
    best = lambda row: all(o["explained_variance"] < row["explained_variance"] for o in others(row))
    return [row["name"] for row in table if best(row)]


def write_sweep(last: Mapping[str, Mapping[str, float]], folder: Path) -> list[str]:
    """Write sweep.json (all SAEs, and the table) and plots/pareto.png. Returns the table as lines of text."""
    table = sweep_rows(last)
    front = pareto_front(table)
    found = {"saes": {name: dict(m) for name, m in last.items()}, "table": table, "pareto": front}
    files.write_json(found, folder / "sweep.json")
    plot_pareto(table, front, folder / "plots" / "pareto.png")
    width = max(len(row["name"]) for row in table)
    lines = [f"{'':{width}}  explained variance        L0          dead   seeds"]
    for row in table:
        spread = lambda c, f, row=row: f" +- {row[f'{c}_sd']:{f}}" if row[f"{c}_sd"] is not None else ""
        explained = f"{row['explained_variance']:.4f}{spread('explained_variance', '.4f'):10}"
        active = f"{row['l0']:8.2f}{spread('l0', '.2f'):8}"
        line = f"{row['name']:{width}}  {explained}  {active}  {100 * row['dead_fraction']:6.2f}%  {row['n_seeds']:3}"
        lines.append(line + ("  *" if row["name"] in front else ""))
    return [*lines, f"* not beaten at its L0; picture: {folder / 'plots' / 'pareto.png'}"]
