"""What keeps a bad step out of the weights, and a stuck run from standing still unseen."""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import threading
import time
from pathlib import Path

from megatron_r1.config import HealthConfig
from megatron_r1.system.terminal import say

_REMEMBERED = 128
_ENOUGH = 16
"""Accepted steps before a spike can be told from a start."""
HUNG = 75
"""Exit status of a rank that its watchdog ended: EX_TEMPFAIL, the launch may be tried again."""


class TooManyBadStepsError(ValueError):
    """Training stops: step after step had to be skipped."""


class UnreadableDataError(OSError):
    """Training stops on this rank because another one could not read its data."""


class StepGuard:
    """Decides whether a step's gradient may change the weights, alike on every rank.

    A step is bad when its loss or gradient norm is not finite, or is more than `loss_spike` or
    `grad_norm_spike` times the median of the last accepted steps. Its history is part of the training
    state (`history`, `load`), so that a resumed run decides as the interrupted one would have.
    """

    def __init__(self, config: HealthConfig):
        self._config = config
        self._accepted: list[tuple[float, float]] = []
        self.skipped_in_a_row = 0

    def refuses(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must be skipped; None where it may be taken."""
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self.skipped_in_a_row = 0
            self._accepted = [*self._accepted[1 - _REMEMBERED :], (loss, grad_norm)]
        else:
            self.skipped_in_a_row += 1
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        limits = (self._config.loss_spike, self._config.grad_norm_spike)
        for number, (what, value) in enumerate((("loss", loss), ("gradient norm", grad_norm))):
            if not math.isfinite(value):
                return f"{what} is {value}"
            if limits[number] and len(self._accepted) >= _ENOUGH:
                usual = statistics.median(accepted[number] for accepted in self._accepted)
                if value > limits[number] * usual:
                    return f"{what} {value:.4g} is {value / usual:.3g} times the usual {usual:.4g}"
        return None

    def check(self) -> None:
        """Raise TooManyBadStepsError once `max_skipped` steps in a row were bad."""
        if self.skipped_in_a_row >= self._config.max_skipped:
            raise TooManyBadStepsError(
                f"{self.skipped_in_a_row} steps in a row were skipped (health.max_skipped="
                f"{self._config.max_skipped}): lower the learning rate, look at the sample ranges named "
                f"above, or raise health.loss_spike / health.grad_norm_spike if the jumps are meant"
            )

    def forget(self) -> None:
        """A new mixture or schedule has other losses: judge it by itself."""
        self._accepted = []

    def history(self) -> dict[str, object]:
        """For a checkpoint; JSON keeps doubles exactly."""
        return {"accepted": self._accepted, "skipped_in_a_row": self.skipped_in_a_row}

    def load(self, history: dict[str, object]) -> None:
        self._accepted = [(loss, norm) for loss, norm in history["accepted"]]  # type: ignore[attr-defined]
        self.skipped_in_a_row = int(history["skipped_in_a_row"])  # type: ignore[call-overload]


class Watchdog:
    """Ends the process when nothing was heard of it for `seconds`, with every thread's stack in `log`.

    A rank that waits for a lost one in a collective waits for ever, and so would the whole launch.
    """

    def __init__(self, seconds: float, log: Path):
        self._seconds, self._log = seconds, log
        self._heard = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.heard()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def heard(self, more: float = 0.0) -> None:
        """A step was completed: wait anew; `more` seconds longer for what is known to take long."""
        self._heard = time.monotonic() + more

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._heard + self._seconds - time.monotonic()) + 0.01):
            silent = time.monotonic() - self._heard
            if silent < self._seconds:
                continue
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open(self._log, "a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} no step for {silent:.0f} s; all threads:\n")
                log.flush()
                faulthandler.dump_traceback(file=log)
            say(
                f"error: no step for {silent:.0f} s (health.hang_seconds={self._seconds:g}): a rank is lost "
                f"or stuck. Stacks of this one are in {self._log}; the same command goes on from the last "
                f"checkpoint"
            )
            os._exit(HUNG)


class Stopwatch:
    """Seconds this rank was busy in a step: until its own backward passes ended, waiting left out."""

    def __init__(self) -> None:
        self._began = self._ended = time.perf_counter()

    def start(self) -> None:
        self._began = self._ended = time.perf_counter()

    def stop(self) -> None:
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._ended - self._began


def stragglers(seconds_R: list[float]) -> tuple[int, float]:
    """The slowest rank and how many times the median rank's time it took."""
    slowest = max(range(len(seconds_R)), key=seconds_R.__getitem__)
    usual = statistics.median(seconds_R)
    return slowest, seconds_R[slowest] / usual if usual > 0 else 1.0
