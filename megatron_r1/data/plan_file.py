"""What two data plans disagree on, in words a user can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_r1.data.blend import BlendPlan


def changes(before: BlendPlan, now: BlendPlan, samples: int) -> list[str]:
    """Each difference that makes the samples [0, samples) of two plans differ, or may; none if they agree."""
    changed = [
        f"{what} {old!r} -> {new!r}"
        for what, old, new in (
            ("seed", before.seed, now.seed),
            ("order", before.order, now.order),
            ("shuffle", before.shuffle, now.shuffle),
        )
        if old != new
    ]
    changed += _of_sources(before.sources, now.sources)
    if tuple(before.sources) == tuple(now.sources):
        changed += _of_phases(before, now, samples)
    return changed


def listed(names: Iterable[Any]) -> str:
    """Names in quotes, the first dozen of them."""
    quoted = [f"'{name}'" for name in names]
    return ", ".join(quoted[:12]) + (f" and {len(quoted) - 12} more" if len(quoted) > 12 else "")


def _of_phases(before: BlendPlan, now: BlendPlan, samples: int) -> list[str]:
    names = tuple(now.sources)
    past = [phase for phase in before.phases if phase.start < samples]
    here = [phase for phase in now.phases if phase.start < samples]
    changed: list[str] = []
    for number, (old, new) in enumerate(zip(past, here, strict=False)):
        if old.start != new.start:
            changed.append(f"phase {number} start {old.start} -> {new.start}")
        was, is_ = before.identity(old), now.identity(new)
        if was["weights"] != is_["weights"]:
            changed.append(f"phase {number} weights {_differing(names, old.weights, new.weights)}")
        if was["max_epochs"] != is_["max_epochs"]:
            caps = _differing(names, was["max_epochs"], is_["max_epochs"])
            changed.append(f"phase {number} max_epochs {caps}")
        masks = [name for name in names if was["keep"].get(name) != is_["keep"].get(name)]
        if masks:
            changed.append(f"phase {number} keep masks of {listed(masks)}")
    changed += [
        f"phase {number} (start {old.start}) is gone"
        for number, old in enumerate(past)
        if number >= len(here)
    ]
    changed += [
        f"phase {number} is new but starts at sample {new.start}"
        for number, new in enumerate(here)
        if number >= len(past)
    ]
    return changed


def _differing(names: Sequence[str], before: Sequence[Any], now: Sequence[Any]) -> str:
    rows = [f"{name} {a} -> {b}" for name, a, b in zip(names, before, now, strict=True) if a != b]
    return ", ".join(rows[:12]) or "in scale"


def _of_sources(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    if tuple(before) == tuple(now):
        return [
            f"source '{name}' windows {before[name]} -> {now[name]} (data.seq_length, documents, or its data)"
            for name in now
            if before[name] != now[name]
        ]
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    if len(before) == len(now) and gone:
        pairs = [(a, b) for a, b in zip(before, now, strict=True) if a != b]
        if len(pairs) == len(gone):
            return [f"source '{a}' renamed to '{b}'" for a, b in pairs]
    changed = [f"source {listed(gone)} removed"] if gone else []
    changed += [f"source {listed(new)} added"] if new else []
    return changed or [f"sources reordered from {listed(before)} to {listed(now)}"]
