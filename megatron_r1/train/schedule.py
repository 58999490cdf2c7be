"""The phases of a recipe: their steps, learning rates, epochs, checkpoints that stay, and later edits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.checkpoint.files import Retention, evenly_spaced
from megatron_r1.config import Config, PhaseConfig
from megatron_r1.data.blend import BlendPlan
from megatron_r1.system.errors import brief, hidden


@dataclass(frozen=True)
class PhaseSpan:
    """Steps [start, end) of a phase."""

    name: str
    start: int
    end: int
    config: PhaseConfig
    share: dict[str, float] = field(default_factory=dict)
    """Source -> share of the phase's sequences."""

    @property
    def steps(self) -> int:
        return self.end - self.start

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to the peak, then decay towards `min_lr_ratio` of it at the phase's end.

        A function of the step alone, so that resuming needs no scheduler state.
        """
        phase, step, steps = self.config, step - self.start, self.steps
        peak, low = phase.learning_rate, phase.learning_rate * phase.min_lr_ratio
        if step < phase.warmup_steps:
            return peak * (step + 1) / phase.warmup_steps
        if phase.decay == "constant":
            return peak
        first = steps - phase.wsd_steps(steps) if phase.decay == "wsd" else phase.warmup_steps
        done = max(0.0, (step - first) / max(1, steps - first))
        share = 0.5 * (1 + math.cos(math.pi * done)) if phase.decay == "cosine" else 1 - done
        return low + (peak - low) * share


def phase_spans(config: Config) -> list[PhaseSpan]:
    """The phases in training order, back to back."""
    spans, start = [], 0
    for name, phase in config.phases.items():
        end, weights = start + config.phase_steps(name), config.phase_weights(name)
        total = sum(weights.values())
        share = {source: weight / total for source, weight in weights.items()}
        spans.append(PhaseSpan(name, start, end, phase, share))
        start = end
    return spans


def epochs_by_phase(
    config: Config, plan: BlendPlan
) -> Iterator[tuple[PhaseSpan, dict[str, float], dict[str, float]]]:
    """Each phase, with the passes over each source within it and from the first step to its end."""
    before = plan.epochs(0)
    for span in phase_spans(config):
        after = plan.epochs(span.end * config.train.global_batch)
        yield span, {name: after[name] - before[name] for name in after}, after
        before = after


def retention(config: Config) -> Retention:
    """Checkpoints that are never deleted. Its `steps` are saved besides the regular ones: ends of phases,
    evenly spaced ones, and those that influence is to score."""
    steps = set(config.influence.steps if config.influence else ())
    for span in phase_spans(config):
        steps |= {span.end, *evenly_spaced(span.start, span.end, config.train.keep_spaced)}
    return Retention(config.train.keep_last, config.train.keep_every, frozenset(steps))


def late_edits(before: dict[str, Any], config: Config, step: int) -> list[str]:
    """Changes to a run that stands at `step`, a line each, against an earlier configuration.

    `before`: the YAML tree of `RUN/config.yaml`. Counted are the sections that hold for all phases, and the
    phases that have begun. Steps that were trained stay as they are.
    """
    spans = phase_spans(config)
    edited = []
    for section in ("optimizer", "data", "train", "health") if step else ():
        now = dataclasses.asdict(getattr(config, section))
        # The data plan checks what is drawn from. Where a run begins is over.
        now = {
            k: v for k, v in now.items() if k not in ("sources", "run", "init_from", "init_weights", "expect")
        }
        edited.append((section, "the run", spans[-1].end, before.get(section), now))
    for span in spans:
        if step > span.start:
            phases = before.get("phases")
            old = phases.get(span.name) if isinstance(phases, dict) else None
            now = dataclasses.asdict(span.config)
            edited.append((f"phases.{span.name}", "the phase", span.end, old, now))
    out = []
    for path, subject, end, old, now in edited:
        # A section that was damaged since tells of no edit.
        old, now = hidden(old) if isinstance(old, dict) else {}, hidden(now)
        changed = [k for k, v in now.items() if k in old and old[k] != v]
        changes = [f"{k} {brief(str(old[k]))} -> {brief(str(now[k]))}" for k in changed]
        if changes:
            over = "is over, so this has no effect"
            effect = over if step >= end else f"takes this from step {step + 1} on"
            out.append(f"{path}: {', '.join(changes)}; {subject} {effect}")
    return out
