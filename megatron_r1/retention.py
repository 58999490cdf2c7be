"""Which checkpoints of a run stay: the last, every Mth step, and the steps that are kept for good."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    last: int | None = None
    """Newest checkpoints that stay; None: all."""
    every: int | None = None
    """Steps whose multiples stay."""
    steps: frozenset[int] = frozenset()
    """Steps that stay: ends of phases, and what influence is to score."""

    def surplus(self, saved: list[int]) -> list[int]:
        """Steps among `saved` that may go, oldest first."""
        if self.last is None:
            return []
        older = sorted(saved)[: -self.last]
        return [s for s in older if s not in self.steps and not (self.every and s % self.every == 0)]


def evenly_spaced(start: int, end: int, count: int) -> list[int]:
    """`count` steps that divide (start, end] evenly, the last of them `end`; fewer where there are fewer.

    The checkpoints at which the paper measures influence (Eq. 4, T = 10).
    """
    return sorted({start + -(-(end - start) * k // count) for k in range(1, count + 1)})
