"""SIGTERM as a request to save and stop, as schedulers send it before they kill. Standard library only."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_SAME_REQUEST = 5.0
"""Seconds within which another SIGTERM is the same request: a scheduler signals every process, and so
does a launcher that got the signal itself."""


class StopRequest:
    """Notes SIGTERM while it is entered; a later one ends the process as it would have ended before."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since > _SAME_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.requested:
            self.requested, self._since = True, now
