"""Records as pages: a folder that opens from disk with a double click, without a network or a server.

index.html holds the program (dashboard.html, .css, .js), data/index.js the list of features, and data/N.js the records
of PER_CHUNK features, loaded when one is opened. These are scripts because a page opened from disk may load scripts but
read no files. All data is json in ascii and shown as text; a content policy forbids every other script.
features.jsonl has the same records for other programs.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from html import escape
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from string import Template
from typing import Any

from sae.config import UserError, read_json, require
from sae.files import lock
from sae.pages.records import FEATURES, FeatureRecord, read_features

PER_CHUNK = 32  # features a file: a third of a megabyte
N_SHOWN = (8, 10)  # tokens before the peak, and from it on, in the list
OURS = re.compile(r"index\.html|features\.jsonl|data|feature_\d+\.html|\..*")

COLUMNS = "latent label density max mean top precision recall x y before after".split()


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _inline(value: Any) -> str:
    """json that is safe inside a script element."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e")


def page(inside: str, *, title: str = "Features", files: bool = False) -> str:
    """The program with a script `inside` that starts it. files: it may load scripts from its own folder."""
    program = _asset("dashboard.js")
    digest = lambda text: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    allowed = [digest(program), digest(inside), *(["'self'", "file:"] if files else [])]
    parts = {"allowed": " ".join(allowed), "title": escape(title), "style": _asset("dashboard.css"), "program": program}
    data = '<script src="data/index.js"></script>\n' if files else ""
    return Template(_asset("dashboard.html")).substitute(parts, inside=inside, data=data)


class Listing:
    """What the list and the map show of every feature, in columns. facts: about the SAE; places: (x, y) on the map."""

    def __init__(self, facts: Mapping[str, Any], places: Mapping[int, tuple[float, float]]):
        self.facts, self.places = facts, places
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, r: FeatureRecord) -> None:
        top = r.promoted[0][0] if r.promoted else ""
        shown = (r.latent, r.label, r.density, r.max_activation, r.mean_active, top, r.label_precision, r.label_recall)
        place = (round(xy, 4) for xy in self.places.get(r.latent, (0.5, 0.5)))
        for name, value in zip(COLUMNS, (*shown, *place, *_peak(r)), strict=True):
            self.columns[name].append(float(f"{value:.4g}") if isinstance(value, float) else value)

    def to_dict(self, per_chunk: int) -> dict[str, Any]:
        return {"facts": self.facts, "per_chunk": per_chunk, "columns": self.columns}


def _peak(r: FeatureRecord) -> tuple[list[list[Any]], list[list[Any]]]:
    """[token, shade in 0..1] before the peak of the strongest context, and from it on."""
    if not r.contexts:
        return [], []
    c, (n, m) = r.contexts[0], N_SHOWN
    first = max(0, c.peak - n)
    pairs = zip(c.tokens[first : c.peak + m], c.values[first : c.peak + m], strict=True)
    shaded = [[t, round(max(0.0, v) / r.max_activation, 2)] for t, v in pairs]
    return shaded[: c.peak - first], shaded[c.peak - first :]


def whole_page(records: Sequence[FeatureRecord], listing: Listing, *, at: int | None = None) -> str:
    """One html text with these records, for a notebook. It opens at feature `at`, or at the list."""
    for record in records:
        listing.add(record)
    # a chunk larger than any SAE, so that there is only one
    data = f"index({_inline(listing.to_dict(1 << 40))});chunk(0,{_inline([r.to_dict() for r in records])})"
    return page(f"{data};start({_inline(at)})", title="Features" if at is None else f"Feature {at}")


# ----------------------------------------------------------------------------------------------------------------------
# the folder


def save_pages(folder: Path, records: Iterable[FeatureRecord], listing: Listing, *, identity: str) -> None:
    """Write the pages of these records, which come one at a time, ordered by latent.

    Pages of other features stay if the folder is of the same SAE (identity), else they go. The folder is never half
    written: a new one takes the old one's place.
    """
    foreign = [p.name for p in folder.glob("*") if not OURS.fullmatch(p.name)]
    require(not foreign, f"'{folder}' is to be replaced and has {' '.join(foreign[:1])}; move it, or give --output_dir")
    # of two records of a latent, groupby meets the new one first, as merge puts equal ones in this order
    merged = heapq.merge(records, _old_records(folder, identity), key=attrgetter("latent"))
    newest = (next(same) for _, same in groupby(merged, key=attrgetter("latent")))

    def fill(new: Path) -> None:
        data = new / "data"
        data.mkdir()
        with (new / FEATURES).open("w", encoding="ascii", newline="\n") as f:
            for n, some in groupby(newest, key=lambda r: r.latent // PER_CHUNK):
                lines = []
                for record in some:
                    listing.add(record)
                    lines.append(record.to_line())
                    f.write(lines[-1] + "\n")
                _write(data / f"{n}.js", f"chunk({n},[{','.join(lines)}])\n")
        _write(data / "index.js", f"index({json.dumps(listing.to_dict(PER_CHUNK), separators=(',', ':'))})\n")
        _write(data / "about.json", json.dumps({"identity": identity}))
        _write(new / "index.html", page("start(null)", files=True))

    _replace_folder(folder, fill)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _old_records(folder: Path, identity: str) -> Iterator[FeatureRecord]:
    """The records of the folder's features.jsonl, if it is of the same SAE."""
    about = folder / "data" / "about.json"
    if about.is_file() and (folder / FEATURES).is_file() and read_json(about).get("identity") == identity:
        yield from read_features(folder / FEATURES)


def _replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and let it take the old one's place. Remains of a killed process are cleared away."""
    new, away = (folder.with_name(f".{folder.name}.{end}.tmp") for end in ("new", "old"))
    busy = f"another process is writing '{folder}'; wait for it, or choose another --output_dir"
    try:
        new.mkdir(parents=True, exist_ok=True)
        held = lock(new, busy)
        try:
            for left in new.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            _settle(folder, away)
            fill(new)
            if folder.is_dir():
                folder.rename(away)
            new.rename(folder)
        finally:
            _settle(folder, away)
            shutil.rmtree(new, ignore_errors=True)
            os.close(held)
    except OSError as e:
        raise UserError(f"cannot write '{folder}': {e.strerror or e}; choose another --output_dir") from e


def _settle(folder: Path, away: Path) -> None:
    """Put the old folder back if no new one came, else delete it."""
    if away.exists() and not folder.exists():
        away.rename(folder)
    shutil.rmtree(away, ignore_errors=True)
