"""What the ranks have to tell each other at a step boundary, without anyone waiting."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """Sums of every rank's numbers, flags and microseconds, one step late.

    A step is itself a meeting of all ranks: what all said at its beginning has arrived by its end, and so
    every rank reads the same sums at the same step. The sum travels over gloo in the background, whatever
    the device. All ranks construct it together.
    """

    def __init__(self, flags: int):
        self._group = dist.new_group(backend="gloo")
        self._sums = torch.zeros(flags, dtype=torch.int64)
        self._work: Any = None

    def tell(self, *flags: int) -> None:
        """Say this rank's numbers; all ranks do, once a step, after `heard`."""
        self._sums = torch.tensor(flags, dtype=torch.int64)
        self._work = dist.all_reduce(self._sums, group=self._group, async_op=True)

    def heard(self) -> list[int]:
        """Each number's sum over the ranks when they last told it; zeros before the first time."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [int(flag) for flag in self._sums.tolist()]
