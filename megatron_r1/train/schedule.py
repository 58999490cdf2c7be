"""Where a step lies in the recipe's phases, and its learning rate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_r1.config import Config, PhaseConfig


@dataclass(frozen=True)
class PhaseSpan:
    """Steps [start, end) of a phase."""

    name: str
    start: int
    end: int
    config: PhaseConfig

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then decay towards `min_lr_ratio` of it at the phase's end.

        A function of the step alone, so that resuming needs no scheduler state.
        """
        phase, step, steps = self.config, step - self.start, self.end - self.start
        peak, low = phase.learning_rate, phase.learning_rate * phase.min_lr_ratio
        if step < phase.warmup_steps:
            return peak * (step + 1) / phase.warmup_steps
        if phase.decay == "constant":
            return peak
        first = steps - phase.wsd_steps(steps) if phase.decay == "wsd" else phase.warmup_steps
        done = max(0.0, (step - first) / max(1, steps - first))
        share = 0.5 * (1 + math.cos(math.pi * done)) if phase.decay == "cosine" else 1 - done
        return low + (peak - low) * share


def late_edits(before: dict[str, Any], config: Config, step: int) -> list[str]:
    """What was changed, in phases that `step` lies in or behind, against the tree of an earlier
    configuration (`RUN/config.yaml`); a line a phase. The steps behind stay as they are."""
    out, phases = [], before.get("phases") or {}
    for span in phase_spans(config):
        old, new = phases.get(span.name), dataclasses.asdict(span.config)
        if old is None or step <= span.start:
            continue
        changed = ", ".join(
            f"{key} {old[key]} -> {new[key]}" for key in new if old.get(key, new[key]) != new[key]
        )
        if changed:
            over = step >= span.end
            effect = "is over, so this has no effect" if over else f"takes this from step {step + 1} on"
            out.append(f"phases.{span.name}: {changed}; the phase {effect}")
    return out


def phase_spans(config: Config) -> list[PhaseSpan]:
    """The phases in training order, back to back."""
    spans, start = [], 0
    for name, phase in config.phases.items():
        end = start + config.phase_steps(name)
        spans.append(PhaseSpan(name, start, end, phase))
        start = end
    return spans
