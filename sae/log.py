"""Output: text, the progress bar, metrics.jsonl, wandb, exit messages and codes. The only file in sae/ that prints.

Of several processes only rank 0 speaks, except for an error that another one has.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sae.files import append_line, open_journal
from sae.flags import Lost, UserError

if TYPE_CHECKING:
    import torch

PATIENCE_S = 10.0  # before a process reports an error that rank 0 should report; torchrun stops it long before that
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
    """A bar with rate and time left, on rank 0 only; redrawn rarely if stderr is no terminal."""
    every = 0.5 if sys.stderr.isatty() else 15
    how: Any = {"unit_scale": True, "smoothing": 0.05, "mininterval": every, "dynamic_ncols": True}
    return tqdm(total=total, initial=initial, desc=what, unit=unit, disable=quiet or not speaks(), **how)


def wandb_module() -> Any:
    """The wandb package. Raises UserError if it is missing: scripts call this before an hour of work."""
    try:
        return importlib.import_module("wandb")
    except ImportError as e:
        raise UserError("logging to Weights & Biases needs wandb; run: pip install 'nanosae[wandb]'") from e


class MetricLog:
    """Appends one json object a line. A resumed run first drops the lines that are newer than its checkpoint.

    wandb: arguments of wandb.init (project, name, config, ...), to send every record there too; WANDB_MODE says whether
    online, offline or not at all. The run's id is kept beside `path` as wandb_run_id, so that a resumed run continues
    the same one. Leaving the `with` (or close) ends it. Raises UserError if wandb is missing or fails.
    """

    def __init__(self, path: Path | None, *, resume_step: int | None = None, wandb: dict[str, Any] | None = None):
        self.path = path if speaks() else None
        self._run = _wandb_run(wandb, self.path, bool(resume_step)) if wandb is not None and speaks() else None
        if self.path is not None:
            open_journal(self.path, lambda line: resume_step is not None and line["step"] <= resume_step)

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            append_line(self.path, record, sync=False)  # a training step waits for no disk
        if self._run is not None:
            _wandb_log(self._run, record)

    def close(self, exit_code: int = 0) -> None:
        """End the wandb run, once; the file needs no end."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(exit_code=int(kind is not None))


def _wandb_run(settings: dict[str, Any], path: Path | None, resumed: bool) -> Any:
    """A wandb run: the one whose id is beside `path` if resumed, else a new one whose id is then written there."""
    module = wandb_module()
    file = path.with_name("wandb_run_id") if path is not None else None
    name = settings.get("id") or secrets.token_hex(4)
    if resumed and file is not None and file.is_file():
        name = file.read_text().strip()
    try:
        run = module.init(**{**settings, "id": name, "resume": "allow"})
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"wandb did not start ({reason}); run 'wandb login' or set WANDB_MODE=offline") from e
    if file is not None:
        file.write_text(name + "\n")
    return run


def _wandb_log(run: Any, record: dict[str, Any]) -> None:
    """Send a record; several SAEs share a step, so their metrics are named {metric}/{hookpoint}.

    A resumed run repeats the steps after its checkpoint; wandb has those and would warn about each.
    """
    step, hookpoint = record["step"], record.get("hookpoint")
    if step >= run.starting_step:
        place = f"/{hookpoint}" if hookpoint else ""
        run.log({f"{k}{place}": v for k, v in record.items() if k not in ("step", "hookpoint")}, step=step)


@contextlib.contextmanager
def stop_asked(*, listen: bool = True) -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C interrupts nothing; the function yielded says whether it came. The second one
    interrupts. Has no effect if listen is False, outside of the main thread, or if somebody else handles Ctrl-C.
    """
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"\nstopping after this step; once more: at once\n")  # print may be in the middle of something

    listen = listen and threading.current_thread() is threading.main_thread()
    if not listen or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_script(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a script's main; bad input ends it with one sentence on stderr and exit code 2, Ctrl-C with 130."""
    if argv is None and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # from scripts/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        rank = int(os.environ.get("RANK", "0"))
        if rank > int(isinstance(e, Lost)):  # all may have this error: rank 0 reports it, or rank 1 if rank 0 is lost
            time.sleep(PATIENCE_S)
        who = "error" if rank == 0 else f"error (process {rank})"
        print(f"{who}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if speaks():
            print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class Stopwatch:
    """Seconds that a device spends in `with` blocks, added up. Never makes the device wait: CUDA and MPS note the time
    in their own queue, and are asked for it when `seconds` is called."""

    def __init__(self, device: torch.device):
        import torch  # here, so that commands that need no torch start without it

        self.event: Any = {"cuda": torch.cuda.Event, "mps": torch.mps.event.Event}.get(device.type)
        self.total = 0.0
        self.open: list[tuple[Any, Any]] = []  # events of a device that were not read yet

    def _now(self) -> Any:
        if self.event is None:
            return time.perf_counter()
        event = self.event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self.started = self._now()

    def __exit__(self, *error: Any) -> None:
        if self.event is None:
            self.total += self._now() - self.started
            return
        self.open.append((self.started, self._now()))
        while len(self.open) > 1 and self.open[0][1].query():
            self._take()

    def _take(self) -> None:
        start, end = self.open.pop(0)
        self.total += start.elapsed_time(end) / 1e3

    def seconds(self) -> float:
        """The sum so far; waits for blocks that the device has not finished."""
        while self.open:
            self.open[0][1].synchronize()
            self._take()
        return self.total
