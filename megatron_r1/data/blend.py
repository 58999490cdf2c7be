"""The data plan: global sample i -> (source, epoch, window), computed on demand and never stored.

`megatron_r1._csrc` computes the order (csrc/plan.hpp). This file holds names, checks and epochs.
`plan_file.py` writes a plan and compares two.
The number of consumed samples is a run's whole data position. Every data-parallel size, micro-batch and
restart therefore sees the same global order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_r1._csrc import Plan as NativePlan
from megatron_r1.data.keep import KeptWindows, Mask, load_mask
from megatron_r1.system.errors import closest, rewording, shown, some

Order = Literal["balanced", "megatron"]
Number = int | float
NEVER = 2**64 - 1
MAX_SAMPLE = 2**62


class Epochs(NamedTuple):
    """A source's epochs from `first_draw` on, under one keep mask."""

    first_draw: int
    """Draws of the source, over the whole plan, before `first_epoch` begins."""
    first_epoch: int
    windows: int
    """Draws of one epoch: the windows kept."""
    used: Fraction
    """Epochs drawn before `first_draw`. An epoch that a change of mask closed counts by the part drawn."""


@dataclass(frozen=True)
class Phase:
    """One call of `add_phase`: its arguments, and values derived from them."""

    start: int
    weights: tuple[Number, ...]
    max_epochs: Number | dict[str, Number] | None
    caps: tuple[Fraction | None, ...] = field(repr=False)
    """`max_epochs` of each source, in order."""
    keep: dict[str, KeptWindows]
    unseen: dict[str, int]
    """Windows of the epoch in progress that a change of mask at `start` left undrawn, by source."""
    epochs: tuple[Epochs, ...] = field(repr=False)


class BlendPlan:
    """The global order of windows, at random access, from sources and phases of weights.

    `sources`: {name: windows of one epoch}, in order. `order="balanced"` holds every source within
    `deviation_bound()` samples of its share, in integer arithmetic; `order="megatron"` is the order of
    megatron-core's `build_blending_indices`, bit for bit, restarted at each phase. With `shuffle` each
    epoch of a source is its own permutation, keyed by the seed, the source's name and the epoch, so that
    leaving a source out of a plan does not reorder the others; without, windows come in stored order.

    Every source keeps its own cursor across phases: no window is repeated or skipped within an epoch.
    """

    def __init__(
        self, sources: Mapping[str, int], seed: int = 1234, order: Order = "balanced", shuffle: bool = True
    ) -> None:
        if not sources:
            raise ValueError("a plan needs at least one source: {name: windows}")
        if order not in ("balanced", "megatron"):
            raise ValueError(f'order={shown(order)} is unknown; use "balanced" or "megatron"')
        self.sources = {name: _whole_windows(name, windows) for name, windows in sources.items()}
        self.seed = int(seed)
        self.order: Order = order
        self.shuffle = bool(shuffle)
        self.phases: tuple[Phase, ...] = ()
        self._index = {name: k for k, name in enumerate(self.sources)}
        keys = np.array([_key(self.seed, name) for name in self.sources], dtype=np.uint64)
        self._native = NativePlan(order == "megatron", self.shuffle, keys)

    # -- building

    def add_phase(
        self,
        start_sample: int,
        weights: Mapping[str, Number] | Sequence[Number] | np.ndarray,
        max_epochs: Number | Mapping[str, Number] | None = None,
        keep: Mapping[str, Mask] | None = None,
    ) -> None:
        """Draw with these weights from `start_sample` on. Phases are appended, the first one at sample 0.

        A phase stands alone: caps and masks of the phase before do not carry over.
        `weights`: {name: weight} over all sources, or a sequence in source order; 0 leaves a source out
        (in Megatron's order too, which never sees such a source). Only their proportions matter, except
        in Megatron's order, where they are the doubles given. `max_epochs`: at most so many epochs of a
        source, counted over the whole plan; at the exact sample where a source reaches it, the others
        take up its weight in proportion. `keep`: windows that may be drawn, all where a source is not
        named. Where a source's mask changes, its epoch closes and the next draw opens a new one; see
        `Phase.unseen`.
        """
        start = self._check_start(start_sample)
        given = self._by_source(weights)
        caps = self._caps(max_epochs)
        masks = self._masks(keep or {})
        with rewording(lambda error: f"a phase cannot start at sample {start}: {error}", IndexError):
            drawn = self._native.counts(start).tolist()
        epochs, unseen = self._epochs_from(drawn, masks)
        limit = [_limit(cap, at) for cap, at in zip(caps, epochs, strict=True)]
        for name, weight, at in zip(self.sources, given, epochs, strict=True):
            if weight and not at.windows:
                why = "its keep mask keeps no window" if name in masks else "it has no window"
                raise ValueError(f"source '{name}' has weight {weight} but {why}; give it weight 0")
        if not any(weight and n < most for weight, n, most in zip(given, drawn, limit, strict=True)):
            capped = f"every source with weight has already reached max_epochs={max_epochs}; raise it"
            raise ValueError(f"the phase at sample {start} draws nothing: {capped}")
        # The native plan takes whole numbers for the balanced order and doubles for Megatron's.
        unused = np.zeros(len(given))
        balanced = self.order == "balanced"
        self._native.add_phase(
            start,
            integer_weights(given) if balanced else unused.astype(np.uint64),
            unused if balanced else np.array(given, dtype=np.float64),
            np.array([at.windows for at in epochs], dtype=np.uint64),
            np.array(limit, dtype=np.uint64),
            np.array([at.first_draw for at in epochs], dtype=np.uint64),
            np.array([at.first_epoch for at in epochs], dtype=np.uint64),
            [masks[name].bitmap if name in masks else None for name in self.sources],
        )
        self.phases += (Phase(start, given, _plain(max_epochs), caps, masks, unseen, epochs),)

    def _check_start(self, start: int) -> int:
        if start != int(start) or not 0 <= start < MAX_SAMPLE:
            raise ValueError(f"start_sample={start} must be a whole number in [0, 2^62)")
        if not self.phases and start != 0:
            raise ValueError(f"the first phase must start at sample 0, got {start}")
        if self.phases and start <= self.phases[-1].start:
            last = f"the last one starts at sample {self.phases[-1].start}, so the next must start later"
            raise ValueError(f"phases are append-only: {last}, got {start}")
        return int(start)

    def _by_source(self, weights: Mapping[str, Number] | Sequence[Number] | np.ndarray) -> tuple[Number, ...]:
        if isinstance(weights, Mapping):
            self._check_names("weights", weights)
            if missing := [name for name in self.sources if name not in weights]:
                fault = f"weights lack the sources {listed(missing)} and have {listed(weights)}"
                raise ValueError(f"{fault}; name every source and give weight 0 to leave one out")
            weights = [weights[name] for name in self.sources]
        if len(weights) != len(self.sources):
            sources = f"{len(self.sources)} sources {listed(self.sources)}"
            raise ValueError(f"{len(weights)} weights for the {sources}")
        given = tuple(map(_number, weights))
        for name, weight in zip(self.sources, given, strict=True):
            if not 0 <= weight < math.inf:
                raise ValueError(f"weight of '{name}' is {weight}; use a finite number, 0 or more")
        if not any(given):
            raise ValueError("all weights are 0; give at least one source a weight")
        return given

    def _check_names(self, argument: str, names: Iterable[str]) -> None:
        if unknown := [name for name in names if name not in self.sources]:
            matches = [(name, match) for name in unknown[:3] for match in closest(str(name), self.sources)]
            near = "".join(f"; {shown(name)} is near '{match}'" for name, match in matches)
            fault = f"{argument} name {listed(unknown)}, but the sources are {listed(self.sources)}"
            raise ValueError(f"{fault}{near}")

    def _caps(self, max_epochs: Number | Mapping[str, Number] | None) -> tuple[Fraction | None, ...]:
        if not isinstance(max_epochs, Mapping):
            max_epochs = dict.fromkeys(self.sources, math.inf if max_epochs is None else max_epochs)
        self._check_names("max_epochs", max_epochs)
        for name, cap in max_epochs.items():
            if not cap > 0:
                way_out = "use a number above 0 (or give it weight 0)"
                raise ValueError(f"max_epochs of '{name}' is {cap}; {way_out}")
        caps = [max_epochs.get(name, math.inf) for name in self.sources]
        # As the decimal that was written: 0.3 epochs of 10 windows are 3, though the double is below 0.3.
        return tuple(None if cap == math.inf else Fraction(str(cap)) for cap in caps)

    def _masks(self, keep: Mapping[str, Mask]) -> dict[str, KeptWindows]:
        self._check_names("keep", keep)
        masks = {name: load_mask(name, self.sources[name], mask) for name, mask in keep.items()}
        # A mask that keeps everything is no mask: it must not close an epoch.
        whole = {n for n, m in masks.items() if m.stretch_N2 is None and m.bitmap.kept == self.sources[n]}
        return {name: mask for name, mask in masks.items() if name not in whole}

    def _epochs_from(
        self, drawn: list[int], masks: dict[str, KeptWindows]
    ) -> tuple[tuple[Epochs, ...], dict[str, int]]:
        """Each source's epochs under these masks, and the `unseen` of a phase that brings them."""
        past: Mapping[str, KeptWindows] = self.phases[-1].keep if self.phases else {}
        whole_sources = (Epochs(0, 0, windows, Fraction(0)) for windows in self.sources.values())
        epochs, unseen = list(self.phases[-1].epochs if self.phases else whole_sources), {}
        for name in sorted(past.keys() | masks.keys()):
            before, now = past.get(name), masks.get(name)
            if before and now and before.sha256 == now.sha256:
                continue
            k = self._index[name]
            old = epochs[k]
            whole, part = divmod(drawn[k] - old.first_draw, old.windows) if old.windows else (0, 0)
            if part:
                unseen[name] = old.windows - part
            epochs[k] = Epochs(
                drawn[k],
                old.first_epoch + whole + bool(part),
                now.bitmap.kept if now else self.sources[name],
                old.used + whole + (Fraction(part, old.windows) if part else 0),
            )
        return tuple(epochs), unseen

    # -- asking

    def locate(self, i: int) -> tuple[int, int, int]:
        """(source index, epoch, window) of global sample i. IndexError past the end of a capped plan."""
        return self._native.locate(i)

    def locate_range(self, lo: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples [lo, lo + n): source_N int32, epoch_N int32, window_N int64."""
        return self._native.locate_range(lo, n)

    def locate_many(self, i_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples i_N (integers, any order): source_N int32, epoch_N int32, window_N int64."""
        i_N = np.asarray(i_N)
        if i_N.size and i_N.dtype.kind not in "iu":
            raise ValueError(f"sample numbers must be integers, got {i_N.dtype}")
        return self._native.locate_many(i_N)

    def count(self, name: str, i: int) -> int:
        """Draws of the source among samples [0, i)."""
        self._check_names("the question", [name])
        return int(self._native.count(self._index[name], i))

    def position(self, name: str, j: int) -> int:
        """The global sample that is the source's j-th draw, from 0. IndexError if there is none."""
        if j < 0:
            raise IndexError(f"draws count from 0, got {j}")
        self._check_names("the question", [name])
        at = int(self._native.position(self._index[name], j))
        if at < 0:
            why = "before it, its weight is 0 or max_epochs reached"
            raise IndexError(f"the plan never makes draw {j} of '{name}': {why}")
        return at

    def epochs(self, i: int) -> dict[str, float]:
        """Epochs of each source among samples [0, i)."""
        drawn = self._native.counts(i).tolist()
        if not self.phases:
            return dict.fromkeys(self.sources, 0.0)
        phase = next(p for p in reversed(self.phases) if p.start <= i)
        return {
            name: float(at.used) + ((n - at.first_draw) / at.windows if at.windows else 0.0)
            for name, n, at in zip(self.sources, drawn, phase.epochs, strict=True)
        }

    def deviation_bound(self) -> float:
        """Samples by which `count` may differ from the exact share, at any sample up to 2^40.

        The exact share is the sum over phases of weight / sum of weights, times the phase's samples;
        redistribution by caps is excluded. Infinite in Megatron's order where weights do not sum to 1,
        because its shares then drift away from the weights.
        """
        if self.order == "balanced":
            return float(max(self._native.bounds(), default=0.0))
        return sum(_greedy_bound([w for w in phase.weights if w]) for phase in self.phases)

    def state_bytes(self) -> int:
        """Memory that the order takes, keep masks not counted."""
        return int(self._native.bytes)


def listed(names: Iterable[Any]) -> str:
    """Names in quotes, the first dozen of them."""
    return some([shown(str(name)) for name in names])


def _whole_windows(name: str, windows: int) -> int:
    if not name or not isinstance(name, str):
        raise ValueError(f"a source's name must be a non-empty string, got {name!r}")
    if windows != int(windows) or not 0 <= windows < MAX_SAMPLE:
        raise ValueError(f"source '{name}' has {windows} windows; use a whole number, 0 or more")
    return int(windows)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def integer_weights(weights: Sequence[Number]) -> np.ndarray:
    """uint64 [sources] in exactly the weights' proportions, wherever their sum then fits 63 bits.

    Where it does not (a ratio beyond 2^10 between doubles of full precision), they are rounded to
    multiples of 2^-62 of the sum, and at least to one: a share is then off by less than one sample in
    4e18 per source.
    """
    ratios = [weight.as_integer_ratio() for weight in weights]
    scale = max(denominator for _, denominator in ratios)  # Powers of two: the largest is common to all.
    exact = [numerator * (scale // denominator) for numerator, denominator in ratios]
    excess = sum(exact).bit_length() - 62
    if excess > 1:
        exact = [max(1, (weight + (1 << (excess - 1))) >> excess) if weight else 0 for weight in exact]
    return np.array(exact, dtype=np.uint64)


def _plain(max_epochs: Number | Mapping[str, Number] | None) -> Number | dict[str, Number] | None:
    """As JSON can hold it: no NumPy numbers, and no cap for an infinite one."""
    if isinstance(max_epochs, Mapping):
        return {name: _number(cap) for name, cap in max_epochs.items() if cap != math.inf}
    return None if max_epochs is None or max_epochs == math.inf else _number(max_epochs)


def _number(value: Any) -> Number:
    return int(value) if isinstance(value, int | np.integer) else float(value)


def _limit(cap: Fraction | None, at: Epochs) -> int:
    """Draws of a source, over the whole plan, at which it reaches its cap."""
    if cap is None:
        return NEVER
    return min(NEVER, max(0, at.first_draw + math.floor((cap - at.used) * at.windows)))


def _greedy_bound(weights: list[Number]) -> float:
    """How far the greedy order strays from weights that sum to 1.

    A source is drawn only when its error is the largest, so at least the mean, 0: it never runs more
    than 1 - w ahead. Behind, it is the cup game: the mean of the k fullest cups stays below
    1/(k+1) + ... + 1/n - 1/n after a draw, and the next sample adds w.
    """
    if abs(math.fsum(weights) - 1) > 1e-9:
        return math.inf
    behind = math.fsum(1 / k for k in range(2, len(weights) + 1)) - 1 / len(weights) + max(weights)
    rounding = 2.0**40 * (abs(math.fsum(weights) - 1) + 2.0**-52)
    return max(1 - min(weights), behind) + rounding
