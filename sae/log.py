"""What a person or a file is told: text, the progress bar, metrics.jsonl. The only file in sae/ that prints.

Computes nothing. On several processes only rank 0 speaks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae.config import UserError

_said: set[str] = set()


def speaks() -> bool:
    """Whether this process is the one that prints (rank 0)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line above any progress bar."""
    if speaks():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def once(text: str) -> None:
    """Say a line the first time only."""
    if text not in _said:
        _said.add(text)
        say(text)


def progress(total: int | None, what: str, *, initial: int = 0, unit: str = "tok", quiet: bool = False) -> tqdm:
    """A bar with rate and time left, redrawn rarely where no terminal watches; only on rank 0."""
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=True,
        smoothing=0.05,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        disable=quiet or not speaks(),
        dynamic_ncols=True,
    )


class MetricLog:
    """Appends one json object a line. A resumed run first drops the lines its checkpoint does not know."""

    def __init__(self, path: Path | None, *, resume_step: int | None = None):
        self.path = path if speaks() else None
        if self.path is None:
            return
        kept = []
        if resume_step is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    continue  # a line torn by a kill; its step is logged again
        self.path.write_text("".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as f:
                f.write(json.dumps(record) + "\n")


def run_script(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a script's main; bad input ends it with one sentence on stderr and exit code 2, Ctrl-C with 130."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left: not our error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
