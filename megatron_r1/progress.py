"""A progress bar with ETA on a terminal, a line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


def say(line: str) -> None:
    """What a person should see beside the results."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Counts towards `total`. Only one rank should show it: pass `show=False` on the others."""

    def __init__(self, name: str, total: int, unit: str, start: int = 0, show: bool = True):
        self.name, self.total, self.unit, self.done = name, total, unit, start
        self.show = show
        self._first, self._began, self._last = start, time.monotonic(), time.monotonic()
        self._bar = (
            tqdm(total=total, initial=start, desc=name, unit=f" {unit}", dynamic_ncols=True, leave=True)
            if show and sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self.show:
            now = time.monotonic()
            if now - self._last >= _EVERY or self.done == self.total:
                self._last = now
                print(
                    f"{self.name}: {self.line()}{' | ' + note if note else ''}", file=sys.stderr, flush=True
                )

    def line(self) -> str:
        """`120/200 steps, 1.9 steps/s, 42 s left`."""
        rate = (self.done - self._first) / max(1e-9, time.monotonic() - self._began)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = "done" if self.done >= self.total else f"{_duration(left)} left"
        return f"{self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {eta}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
