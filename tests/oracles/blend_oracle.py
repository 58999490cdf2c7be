"""The blend's rules, too simple to be wrong: one step at a time, sets of seen windows, exact fractions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction


def megatron_order(weights: Sequence[float], samples: int) -> list[int]:
    """megatron-core's build_blending_indices: Python floats round every product and difference alone."""
    drawn = [0] * len(weights)
    order = []
    for i in range(samples):
        errors = [w * max(float(i), 1.0) - float(n) for w, n in zip(weights, drawn, strict=True)]
        best = errors.index(max(errors))
        drawn[best] += 1
        order.append(best)
    return order


def balanced_order(weights: Sequence[int], samples: int) -> list[int]:
    """A Huffman tree whose nodes pass round(i * share) of their first i items to the heavier side."""
    trees: list[tuple[int, int, object]] = [(w, k, k) for k, w in enumerate(weights) if w]
    serial = len(weights)
    while len(trees) > 1:
        trees.sort(key=lambda tree: tree[:2])
        light, heavy = trees[0], trees[1]
        total = light[0] + heavy[0]
        share = min(((heavy[0] << 64) + total // 2) // total, 2**64 - 1)
        trees = [*trees[2:], (total, serial, [0, share, heavy[2], light[2]])]
        serial += 1
    order = []
    for _ in range(samples):
        at = trees[0][2]
        while isinstance(at, list):
            i, share, left, right = at
            at[0] += 1
            passed_on = ((i + 1) * share + 2**63 >> 64) > (i * share + 2**63 >> 64)
            at = left if passed_on else right
        assert isinstance(at, int)
        order.append(at)
    return order


@dataclass
class Rules:
    """What one phase allows: weights, epochs over the whole plan, and kept windows, by source."""

    start: int
    weights: list[int]
    caps: list[Fraction | None]
    kept: list[frozenset[int]]


@dataclass
class Replay:
    """Takes the samples of a plan one by one and asserts every rule."""

    phases: list[Rules]
    samples: int = 0
    phase: int = -1
    draws: list[list[int]] = field(default_factory=list)
    """Global samples of each source's draws."""
    epoch: list[int] = field(default_factory=list)
    used: list[Fraction] = field(default_factory=list)
    seen: list[set[int]] = field(default_factory=list)
    unseen: list[dict[int, int]] = field(default_factory=list)
    """By phase: windows that its change of mask left undrawn, by source."""

    def __post_init__(self) -> None:
        sources = len(self.phases[0].weights)
        self.draws = [[] for _ in range(sources)]
        self.epoch = [0] * sources
        self.used = [Fraction(0)] * sources
        self.seen = [set() for _ in range(sources)]

    def active(self) -> list[int]:
        """Sources that the next sample may come from."""
        self._enter_phase()
        rules = self.phases[self.phase]
        return [k for k, weight in enumerate(rules.weights) if weight and self._room(k)]

    def take(self, source: int, epoch: int, window: int) -> None:
        assert source in self.active(), (self.samples, source)
        kept = self.phases[self.phase].kept[source]
        assert epoch == self.epoch[source], (self.samples, source, epoch)
        assert window in kept, (self.samples, source, window)
        assert window not in self.seen[source], (self.samples, source, window)
        self.seen[source].add(window)
        self.used[source] += Fraction(1, len(kept))
        self.draws[source].append(self.samples)
        if len(self.seen[source]) == len(kept):
            self._close(source)
        self.samples += 1

    def _room(self, source: int) -> bool:
        rules = self.phases[self.phase]
        cap = rules.caps[source]
        return cap is None or self.used[source] + Fraction(1, len(rules.kept[source])) <= cap

    def _enter_phase(self) -> None:
        following = self.phase + 1
        if following == len(self.phases) or self.phases[following].start > self.samples:
            return
        unseen = {}
        for source, kept in enumerate(self.phases[following].kept):
            if self.phase >= 0 and kept != self.phases[self.phase].kept[source] and self.seen[source]:
                unseen[source] = len(self.phases[self.phase].kept[source]) - len(self.seen[source])
                self._close(source)
        self.unseen.append(unseen)
        self.phase = following

    def _close(self, source: int) -> None:
        self.seen[source] = set()
        self.epoch[source] += 1
