"""A data plan as JSON text, its fingerprint, and the differences of two plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from megatron_r1.data.blend import BlendPlan, Phase, integer_weights, listed
from megatron_r1.system.errors import rewording, shown, some
from megatron_r1.system.json_io import JsonError, mistake, parse_json

FORMAT = "megatron_r1.blend"
VERSION = 1


def to_json(plan: BlendPlan, data: Mapping[str, str] | None = None) -> str:
    """The plan as text, with masks by path and hash, and `data`: the identity of each source's dataset.

    ValueError for a mask given as an array, which must be saved first.
    """
    phases = []
    for number, phase in enumerate(plan.phases):
        for name, mask in phase.keep.items():
            if mask.path is None:
                raise ValueError(
                    f"phase {number}: the keep mask of '{name}' was given as an array; np.save it and "
                    f"give add_phase the path, so that the plan can refer to it"
                )
        keep = {name: {"path": mask.path, "sha256": mask.sha256} for name, mask in phase.keep.items()}
        given = {"start": phase.start, "weights": phase.weights, "max_epochs": phase.max_epochs}
        phases.append({**given, "keep": keep})
    text = {
        "format": FORMAT,
        **_head(plan),
        "sources": [{"name": name, "windows": windows} for name, windows in plan.sources.items()],
        "phases": phases,
        "fingerprint": fingerprint(plan),
    }
    return json.dumps(text if data is None else {**text, "data": data}, indent=1)


def from_json(text: str, samples: int | None = None) -> BlendPlan:
    """The plan of `to_json`.

    `samples`: leave out the phases that begin at this sample or later, whose masks may be gone. The text is
    then not compared with its fingerprint, which is of all phases.
    ValueError where a mask file or the text was changed since; a missing mask is FileNotFoundError.
    """
    unlike = KeyError, TypeError, AttributeError, ArithmeticError, IndexError, MemoryError
    with rewording(lambda error: _damaged(shown(error)), *unlike):
        return _from_json(_read(text), samples)


def _damaged(why: str) -> str:
    return f"the plan is damaged ({why}); restore it, or begin a new run"


def _from_json(parts: dict[str, Any], samples: int | None) -> BlendPlan:
    if parts.get("format") != FORMAT:
        raise ValueError(f"not a blend plan: format {shown(parts.get('format'))}, expected {FORMAT!r}")
    if parts.get("version") != VERSION:
        raise ValueError(f"blend plan version {shown(parts.get('version'))}; this release reads {VERSION}")
    if isinstance(parts.get("phases"), list) and len(parts["phases"]) > _MOST_PHASES:
        raise ValueError(_damaged(f"{len(parts['phases'])} phases, at most {_MOST_PHASES}"))
    if wrong := mistake(parts, _KIND):
        raise ValueError(_damaged(f"it{wrong}"))
    sources = {source["name"]: source["windows"] for source in parts["sources"]}
    paths = [mask["path"] for phase in parts["phases"] for mask in phase["keep"].values()]
    if len(sources) < len(parts["sources"]) or max(map(len, [*sources, *paths]), default=0) > _MOST_TEXT:
        raise ValueError(_damaged(f"a source twice, or a name of {_MOST_TEXT} characters"))
    plan = BlendPlan(sources, seed=parts["seed"], order=parts["order"], shuffle=parts["shuffle"])
    last = max((phase["start"] for phase in parts["phases"]), default=0) if samples is None else samples
    if plan.order == "megatron" and last * len(sources) > _MOST_STEPS:
        fault = f"to sample {last} of {len(sources)} sources in Megatron's order is too far to follow"
        bound = f"at most {_MOST_STEPS} samples x sources. The balanced order has no such bound"
        raise ValueError(f"{fault}: {bound}")
    past = [phase for phase in parts["phases"] if samples is None or phase["start"] < samples]
    for number, phase in enumerate(past):
        keep = {name: mask["path"] for name, mask in phase["keep"].items()}
        plan.add_phase(phase["start"], phase["weights"], phase["max_epochs"], keep)
        for name, mask in phase["keep"].items():
            loaded = plan.phases[-1].keep.get(name)
            if loaded is None or loaded.sha256 != mask["sha256"]:
                raise ValueError(
                    f"phase {number}: the keep mask of '{name}', {keep[name]:.200}, changed since the plan "
                    f"was written (sha256 {mask['sha256'][:12]}... expected); restore the file"
                )
    whole = len(past) == len(parts["phases"])
    if whole and parts.get("fingerprint") not in (None, fingerprint(plan)):
        way_out = 'restore it, or delete the line "fingerprint" if the edit is meant'
        raise ValueError(f"the plan's text was edited: its fingerprint does not match; {way_out}")
    return plan


_MOST_BYTES, _MOST_PHASES, _MOST_TEXT = 64 << 20, 10_000, 1024
_MOST_STEPS = 1 << 37
"""Of Megatron's order, which takes a step for each sample before: some minutes. The balanced has none."""


_KIND = {
    "seed": int,
    "order": str,
    "shuffle": bool,
    "sources": [{"name": str, "windows": int}],
    "phases": [
        {
            "start": int,
            "weights": [float],
            "max_epochs": (None, float, {str: float}),
            "keep": {str: {"path": str, "sha256": str}},
        }
    ],
}


def _read(text: str) -> dict[str, Any]:
    with rewording(lambda error: _damaged(str(error)), JsonError):
        parts = parse_json(text, "the plan", _MOST_BYTES)
    if not isinstance(parts, dict):
        raise ValueError(_damaged("no JSON mapping"))
    return parts


def datasets_of(text: str) -> dict[str, str]:
    """Source -> identity of its dataset, as `to_json` was given them. Empty for a plan without identities.

    ValueError for a damaged text.
    """
    data = _read(text).get("data", {})
    if wrong := mistake(data, {str: str}):
        raise ValueError(_damaged(f"data{wrong}"))
    return dict(data)


def fingerprint(plan: BlendPlan) -> str:
    """SHA-256 of everything that decides the order; the paths of mask files do not."""
    phases = [_identity(plan, phase) for phase in plan.phases]
    parts = {**_head(plan), "sources": list(plan.sources.items()), "phases": phases}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_extends(now: BlendPlan, before: BlendPlan, samples: int) -> None:
    """Check that the plan agrees with `before`, the one trained on, for all samples in [0, samples).

    Raises ValueError that lists the differences. The plans may differ from sample `samples` on.
    """
    old, new = _head(before), _head(now)
    changed = [f"{key} {old[key]!r} -> {new[key]!r}" for key in old if old[key] != new[key]]
    changed += _source_changes(before.sources, now.sources)
    if tuple(before.sources) == tuple(now.sources):
        changed += _phase_changes(before, now, samples)
    if changed:
        fault = f"this plan differs from the one that drew the first {samples} samples"
        way_out = f"put changes of weights, caps or masks into a new phase at sample {samples} or later"
        raise ValueError(f"{fault}: {some(changed, '; ')}. Restore it, and {way_out}")


def _head(plan: BlendPlan) -> dict[str, Any]:
    return {"version": VERSION, "seed": plan.seed, "order": plan.order, "shuffle": plan.shuffle}


def _identity(plan: BlendPlan, phase: Phase) -> dict[str, Any]:
    """The values of a phase that decide the order. 1 : 3 and 0.25 : 0.75 are the same balanced weights."""
    if plan.order == "balanced":
        whole_numbers = integer_weights(phase.weights)
        weights = (whole_numbers // np.gcd.reduce(whole_numbers)).tolist()
    else:
        weights = [float(weight).hex() for weight in phase.weights]
    return {
        "start": phase.start,
        "weights": weights,
        "max_epochs": [None if cap is None else str(cap) for cap in phase.caps],
        "keep": {name: mask.sha256 for name, mask in sorted(phase.keep.items())},
    }


def _phase_changes(before: BlendPlan, now: BlendPlan, samples: int) -> list[str]:
    """Differences of the phases that begin before sample `samples`."""
    old_phases, new_phases = ([p for p in plan.phases if p.start < samples] for plan in (before, now))
    changed: list[str] = []
    for number, (old, new) in enumerate(zip_longest(old_phases, new_phases)):
        if old is None or new is None:
            gone = f"(start {old.start}) is gone" if old else f"is new but starts at sample {new.start}"
            changed.append(f"phase {number} {gone}")
            continue
        changed += [f"phase {number} start {old.start} -> {new.start}"] if old.start != new.start else []
        was, is_ = _identity(before, old), _identity(now, new)
        shown = {"weights": (old.weights, new.weights), "max_epochs": (was["max_epochs"], is_["max_epochs"])}
        for key, pair in shown.items():
            if was[key] != is_[key]:
                rows = [f"{name} {a} -> {b}" for name, a, b in zip(now.sources, *pair, strict=True) if a != b]
                changed.append(f"phase {number} {key} {', '.join(rows[:12]) or 'in scale'}")
        if masks := [name for name in now.sources if was["keep"].get(name) != is_["keep"].get(name)]:
            changed.append(f"phase {number} keep masks of {listed(masks)}")
    return changed


def _source_changes(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    if tuple(before) == tuple(now):
        return [
            f"source '{name}' windows {before[name]} -> {now[name]} (data.seq_length, documents, or its data)"
            for name in now
            if before[name] != now[name]
        ]
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    moved = [(a, b) for a, b in zip(before, now, strict=False) if a != b]
    if gone and len(before) == len(now) and len(moved) == len(gone):
        return [f"source '{a}' renamed to '{b}'" for a, b in moved]
    changed = [f"source {listed(gone)} removed"] if gone else []
    changed += [f"source {listed(new)} added"] if new else []
    return changed or [f"sources reordered from {listed(before)} to {listed(now)}"]
