"""Where a step lies in the recipe's phases, and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1.config import Config, PhaseConfig


@dataclass(frozen=True)
class PhaseSpan:
    """Steps [start, end) of a phase."""

    name: str
    start: int
    end: int
    config: PhaseConfig

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then decay to `min_lr_ratio` of it at the phase's end.

        A function of the step alone, so that resuming needs no scheduler state.
        """
        phase, step = self.config, step - self.start
        peak, low = phase.learning_rate, phase.learning_rate * phase.min_lr_ratio
        if step < phase.warmup_steps:
            return peak * (step + 1) / phase.warmup_steps
        if phase.decay == "constant":
            return peak
        done = (step - phase.warmup_steps) / max(1, self.end - self.start - phase.warmup_steps)
        share = 1 - done if phase.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return low + (peak - low) * share


def phase_spans(config: Config) -> list[PhaseSpan]:
    """The phases in training order, back to back."""
    spans, start = [], 0
    for name, phase in config.phases.items():
        end = start + config.phase_steps(name)
        spans.append(PhaseSpan(name, start, end, phase))
        start = end
    return spans
