"""How long a device is at work on a part of a program."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds that a device spends in `with` blocks, added up. Never makes the device wait: devices that work behind
    the program's back note the time themselves, and are asked when `seconds` is called."""

    def __init__(self, device: torch.device):
        self.event: Any = {"cuda": torch.cuda.Event, "mps": torch.mps.event.Event}.get(device.type)
        self.total = 0.0
        self.open: list[tuple[Any, Any]] = []  # events of a device that is not asked yet

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
        """The sum so far; waits for blocks that are not through."""
        while self.open:
            self.open[0][1].synchronize()
            self._take()
        return self.total
