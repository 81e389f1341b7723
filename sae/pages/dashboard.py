"""Records as pages: a folder that opens from disk with a double click, without network or server.

index.html holds the program (dashboard.html, .css, .js); data/index.js what the list shows of every feature, and
data/N.js the records of PER_CHUNK features, loaded when one is opened: a page may load a script from its folder, where
it may not read a file. Everything from data goes in as json in ascii and is shown as text; a policy forbids scripts but
these. features.jsonl has the same records for other programs.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import heapq
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from sae.config import UserError, read_json, require
from sae.pages.records import FEATURES, FeatureRecord, line_of, read_lines, record_of

PER_CHUNK = 32  # features a file: a third of a megabyte
N_SHOWN = (8, 10)  # tokens before and from the peak on, in the list
OURS = re.compile(r"index\.html|features\.jsonl|data|feature_\d+\.html|\..*")

COLUMNS = ("latent", "label", "density", "max", "mean", "top", "precision", "recall", "x", "y", "before", "after")


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _inline(value: Any) -> str:
    """json that is safe inside of a script element."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e")


def page(inside: str, *, title: str = "Features", files: bool = False) -> str:
    """The program with a script `inside` that starts it. files: it may load scripts beside it."""
    program = _asset("dashboard.js")
    digest = lambda text: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return Template(_asset("dashboard.html")).substitute(
        allowed=" ".join([digest(program), digest(inside), *(["'self'", "file:"] if files else [])]),
        title=escape(title), style=_asset("dashboard.css"), program=program, inside=inside,
        data='<script src="data/index.js"></script>\n' if files else "",
    )  # fmt: skip


class Listing:
    """What the list and the map show of every feature, in columns."""

    def __init__(self, facts: Mapping[str, Any], places: Mapping[int, tuple[float, float]]):
        self.facts, self.places = facts, places
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, r: FeatureRecord) -> None:
        x, y = self.places.get(r.latent, (0.5, 0.5))
        before, after = _peak(r)
        row = {
            "latent": r.latent, "label": r.label, "density": r.density, "max": r.max_activation, "mean": r.mean_active,
            "top": r.promoted[0][0] if r.promoted else "", "precision": r.label_precision, "recall": r.label_recall,
            "x": round(x, 4), "y": round(y, 4), "before": before, "after": after,
        }  # fmt: skip
        for name, column in self.columns.items():
            column.append(float(f"{row[name]:.4g}") if isinstance(row[name], float) else row[name])

    def to_dict(self, per_chunk: int) -> dict[str, Any]:
        return {"facts": self.facts, "per_chunk": per_chunk, "columns": self.columns}


def _peak(r: FeatureRecord) -> tuple[list[list[Any]], list[list[Any]]]:
    """[token, shade in 0..1] shortly before the peak of the strongest context, and from it on."""
    if not r.contexts:
        return [], []
    c, (n, m) = r.contexts[0], N_SHOWN
    first = max(0, c.peak - n)
    pairs = zip(c.tokens[first : c.peak + m], c.values[first : c.peak + m], strict=True)
    shaded = [[t, round(max(0.0, v) / r.max_activation, 2)] for t, v in pairs]
    return shaded[: c.peak - first], shaded[c.peak - first :]


def whole_page(records: Sequence[FeatureRecord], listing: Listing, *, at: int | None = None) -> str:
    """One html text with all that these records need, for a notebook; opens at feature `at`, or at the list."""
    for record in records:
        listing.add(record)
    # more than any latent, so that all are in one chunk
    data = f"index({_inline(listing.to_dict(1 << 40))});chunk(0,{_inline([r.to_dict() for r in records])})"
    return page(f"{data};start({_inline(at)})", title="Features" if at is None else f"Feature {at}")


# ----------------------------------------------------------------------------------------------------------------------
# the folder


def save_pages(folder: Path, records: Iterable[FeatureRecord], listing: Listing, *, identity: str) -> None:
    """Write the pages of these records, which come in order of their latents, one at a time.

    Pages of other features that the folder has of the same SAE (identity) stay; of another SAE none do. There is never
    half a folder: a new one takes the old one's place.
    """
    foreign = [p.name for p in folder.glob("*") if not OURS.fullmatch(p.name)]
    require(not foreign, f"'{folder}' is to be replaced and has {' '.join(foreign[:1])}; move it, or give --output_dir")
    made = ((r.latent, 0, line_of(r), r) for r in records)
    kept = ((latent, 1, line, None) for latent, line in _old_lines(folder, identity))
    merged = heapq.merge(made, kept, key=lambda x: x[:2])

    def fill(new: Path) -> None:
        (new / "data").mkdir()
        chunk: list[str] = []
        last = -1
        with (new / FEATURES).open("w", encoding="ascii", newline="\n") as f:
            for latent, _, line, record in merged:
                if latent == last:  # the older of two
                    continue
                if chunk and latent // PER_CHUNK != last // PER_CHUNK:
                    _write_chunk(new, last // PER_CHUNK, chunk)
                last = latent
                f.write(line + "\n")
                chunk.append(line)
                listing.add(record or record_of(line))
        if chunk:
            _write_chunk(new, last // PER_CHUNK, chunk)
        data = json.dumps(listing.to_dict(PER_CHUNK), separators=(",", ":"))
        (new / "data" / "index.js").write_text(f"index({data})\n", encoding="ascii")
        (new / "data" / "about.json").write_text(json.dumps({"identity": identity}), encoding="ascii")
        (new / "index.html").write_text(page("start(null)", files=True), encoding="utf-8", newline="\n")

    _replace_folder(folder, fill)


def _write_chunk(folder: Path, n: int, lines: list[str]) -> None:
    (folder / "data" / f"{n}.js").write_text(f"chunk({n},[{','.join(lines)}])\n", encoding="ascii")
    lines.clear()


def _old_lines(folder: Path, identity: str) -> Iterator[tuple[int, str]]:
    """The lines of the folder's features.jsonl, if it is of the same SAE."""
    about = folder / "data" / "about.json"
    if about.is_file() and (folder / FEATURES).is_file() and read_json(about).get("identity") == identity:
        yield from read_lines(folder / FEATURES)


def _replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder, then let it take the old one's place; what a killed process left behind is cleared away."""
    new, away = (folder.with_name(f".{folder.name}.{end}.tmp") for end in ("new", "old"))
    try:
        with _alone_in(new):
            try:
                _settle(folder, away)
                fill(new)
                if folder.is_dir():
                    folder.rename(away)
                new.rename(folder)
            finally:
                _settle(folder, away)
                shutil.rmtree(new, ignore_errors=True)
    except BlockingIOError as e:
        raise UserError(f"another process is writing '{folder}'; wait for it, or choose another --output_dir") from e
    except OSError as e:
        raise UserError(f"cannot write '{folder}': {e.strerror or e}; choose another --output_dir") from e


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, and empty it; BlockingIOError if another process holds it. A process that ends lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for inside in folder.iterdir():
            shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
        yield
    finally:
        os.close(held)


def _settle(folder: Path, away: Path) -> None:
    """Put the old folder back if no new one came, else delete it."""
    if away.exists() and not folder.exists():
        away.rename(folder)
    shutil.rmtree(away, ignore_errors=True)
