"""Where a step lies in the recipe's phases, and its learning rate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_r1.checkpoint.files import evenly_spaced
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
    """What was changed for a run that stands at `step`, against the tree of an earlier configuration
    (`RUN/config.yaml`): of sections that hold for all phases, and of phases that `step` lies in or behind.
    A line each; the steps behind stay as they are."""
    out, spans = [], phase_spans(config)

    def tell(what: str, who: str, end: int, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
        both = {key: old[key] for key in new if key in old} if old else {}
        changed = ", ".join(f"{key} {then} -> {new[key]}" for key, then in both.items() if then != new[key])
        if changed:
            effect = (
                "is over, so this has no effect" if step >= end else f"takes this from step {step + 1} on"
            )
            out.append(f"{what}: {changed}; {who} {effect}")

    for section in ("optimizer", "data", "train", "health") if step else ():
        now = dataclasses.asdict(getattr(config, section))
        # What is drawn from is the data plan's to judge; where a run begins is over.
        plain = {k: v for k, v in now.items() if k not in ("sources", "run", "init_from", "init_weights")}
        tell(section, "the run", spans[-1].end, before.get(section), plain)
    for span in spans:
        if step > span.start:
            old = (before.get("phases") or {}).get(span.name)
            tell(f"phases.{span.name}", "the phase", span.end, old, dataclasses.asdict(span.config))
    return out


def phase_spans(config: Config) -> list[PhaseSpan]:
    """The phases in training order, back to back."""
    spans, start = [], 0
    for name, phase in config.phases.items():
        end = start + config.phase_steps(name)
        spans.append(PhaseSpan(name, start, end, phase))
        start = end
    return spans


def retained_steps(config: Config) -> set[int]:
    """Steps that are saved, and kept, besides the regular ones: ends of phases, and what influence is to
    score."""
    kept = set(config.influence.steps if config.influence else ())
    for span in phase_spans(config):
        kept |= {span.end, *evenly_spaced(span.start, span.end, config.train.keep_spaced)}
    return kept
