"""Several SAEs of one run side by side: a table, mean and spread over seeds, and the Pareto plot."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae import formats, plots

COLUMNS = ("explained_variance", "l0", "dead_fraction")


def rows(last: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
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


def pareto(table: list[dict[str, Any]]) -> list[str]:
    """Names of the rows that no other of their hookpoint beats: none with at most as many active latents explains as
    much or more."""
    best = []
    for row in table:
        same = lambda o, row=row: o["name"].split("/")[0] == row["name"].split("/")[0]
        others = (o for o in table if o is not row and same(o) and o["l0"] <= row["l0"])
        if not any(o["explained_variance"] >= row["explained_variance"] for o in others):
            best.append(row["name"])
    return best


def write(last: Mapping[str, Mapping[str, float]], folder: Path) -> list[str]:
    """Write sweep.json (all SAEs, and the table) and plots/pareto.png; returns the table as lines of text."""
    table = rows(last)
    front = pareto(table)
    formats.write_json({"saes": {name: dict(m) for name, m in last.items()}, "table": table, "pareto": front},
                       folder / "sweep.json")  # fmt: skip
    plots.plot_pareto(table, front, folder / "plots" / "pareto.png")
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
