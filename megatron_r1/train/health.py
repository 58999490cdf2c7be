"""The guard that keeps bad steps out of the weights, and the watchdog that ends a stuck run."""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_r1.config import HealthConfig
from megatron_r1.system.errors import shown
from megatron_r1.system.files import make_folder, ours
from megatron_r1.system.terminal import say

_REMEMBERED = 128
_ENOUGH = 16
"""Accepted steps from which on a spike is distinguished from the beginning of training."""
_WINDOW = 32
"""Accepted steps whose median loss is compared with the best such median."""
HUNG = 75
"""Exit status of a rank that its watchdog ended: EX_TEMPFAIL, the launch may be tried again."""


class TooManyBadStepsError(ValueError):
    """Training stops: the loss has risen and stays high, or step after step was not finite."""


class UnreadableDataError(OSError):
    """Training stops on this rank because another one could not read its data."""


class StepGuard:
    """Decides which steps are skipped and when a run stops, alike on every rank.

    A step is skipped only if its loss or gradient norm is not finite. A finite spike is clipped and taken:
    weights that stay as they are would give the next step the same spike. `spike` tells of it. A run stops
    when the median loss of the last 32 accepted steps is more than `loss_spike` nats above the best such
    median of the phase, or after `max_skipped` skipped steps in a row. The history is part of the training
    state (`history`, `load`), so that a resumed run decides as the interrupted one would have.
    """

    def __init__(self, config: HealthConfig):
        self._config = config
        self._accepted: list[tuple[float, float]] = []
        self._judged = 0
        """Accepted steps since the phase began, or since the run stopped; `_WINDOW` at most."""
        self.best: tuple[float, int] | None = None
        """Lowest median loss of the phase, and the step at which it was reached. None: before the first."""
        self.skipped_in_a_row = 0
        self.spike: str | None = None
        """What is unusual about the gradient norm of the last step, if it was taken."""

    def refuses(self, loss: float, grad_norm: float) -> str | None:
        """The reason to skip this step, or None."""
        self.spike = None
        for what, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                self.skipped_in_a_row += 1
                return f"{what} is {value}"
        limit = self._config.grad_norm_spike
        if limit and len(self._accepted) >= _ENOUGH:
            usual = statistics.median(norm for _, norm in self._accepted)
            if grad_norm > limit * usual:
                times = grad_norm / usual
                self.spike = f"gradient norm {grad_norm:.4g} is {times:.3g} times the usual {usual:.4g}"
        self.skipped_in_a_row = 0
        self._accepted = [*self._accepted[1 - _REMEMBERED :], (loss, grad_norm)]
        self._judged = min(self._judged + 1, _WINDOW)
        return None

    def may_stop(self) -> bool:
        """Whether the run may have to stop after the coming step, whatever its loss is.

        If so, the step's result has to be known before another one is taken.
        """
        if self.skipped_in_a_row + 1 >= self._config.max_skipped:
            return True
        if self.best is None or not self._config.loss_spike or self._judged + 1 < _WINDOW:
            return False
        losses = [loss for loss, _ in self._accepted[1 - _WINDOW :]]
        return statistics.median([*losses, math.inf]) - self.best[0] > self._config.loss_spike

    def check(self, step: int = 0) -> None:
        """Raise TooManyBadStepsError if the run is to stop after `step`. Call this after every step.

        The next decision then needs a full count of further steps, so that the same command goes on.
        """
        reason = self._reason(step)
        if reason is not None:
            self._judged = self.skipped_in_a_row = 0
            raise TooManyBadStepsError(reason)

    def _reason(self, step: int) -> str | None:
        if self.skipped_in_a_row >= self._config.max_skipped:
            return (
                f"{self.skipped_in_a_row} steps in a row were skipped (health.max_skipped="
                f"{self._config.max_skipped}): their loss or gradient norm is not finite"
            )
        rise, limit = self.rise(step), self._config.loss_spike
        if self.best is None or not limit or rise <= limit:
            return None
        best, at = self.best
        return (
            f"the median loss of the last {_WINDOW} accepted steps, {best + rise:.4f}, is {rise:.4f} nats "
            f"above the phase's best, {best:.4f} at step {at} (health.loss_spike={limit:g})"
        )

    def rise(self, step: int) -> float:
        """Nats by which the median loss of the last accepted steps is above the phase's best, 0 at that.

        Call this once after `step`: its median becomes the best where it is.
        """
        if self._judged < _WINDOW:
            return 0.0
        median = statistics.median(loss for loss, _ in self._accepted[-_WINDOW:])
        if self.best is None or median < self.best[0]:
            self.best = median, step
        return median - self.best[0]

    def forget(self) -> None:
        """Clear the history. A new mixture or schedule has other losses."""
        self._accepted, self._judged, self.best = [], 0, None

    def history(self) -> dict[str, object]:
        """For a checkpoint; JSON keeps doubles exactly."""
        counts = {"skipped_in_a_row": self.skipped_in_a_row, "judged": self._judged}
        return {"accepted": self._accepted, **counts, "best": self.best}

    def load(self, history: dict[str, Any]) -> None:
        """Take over a history. One of an earlier version has no best median, which then begins here."""
        try:
            self._accepted = [(float(loss), float(norm)) for loss, norm in history["accepted"]]
            self.skipped_in_a_row = int(history["skipped_in_a_row"])
            self._judged = int(history.get("judged", min(len(self._accepted), _WINDOW)))
            best = history.get("best")
            self.best = best and (float(best[0]), int(best[1]))
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            what = f"the step guard's history is {shown(history)}"
            raise ValueError(f"the checkpoint is none that this program wrote: {what}") from None


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
            # Without room for the stacks the rank ends all the same.
            with suppress(OSError):
                make_folder(self._log.parent)
                with open(self._log, "a", encoding="utf-8", opener=ours) as log:
                    log.write(
                        f"{time.strftime('%Y-%m-%dT%H:%M:%S')} no step for {silent:.0f} s; all threads:\n"
                    )
                    log.flush()
                    faulthandler.dump_traceback(file=log)
            say(
                f"error: no step for {silent:.0f} s (health.hang_seconds={self._seconds:g}): a rank is lost "
                f"or stuck. Stacks of this one are in {self._log}; the same command goes on from the last "
                f"checkpoint"
            )
            os._exit(HUNG)


def stragglers(seconds_R: list[float]) -> tuple[int, float]:
    """The slowest rank and how many times the median rank's time it took."""
    slowest = max(range(len(seconds_R)), key=seconds_R.__getitem__)
    usual = statistics.median(seconds_R)
    return slowest, seconds_R[slowest] / usual if usual > 0 else 1.0
