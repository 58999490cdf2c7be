"""Learning rates at the steps where a schedule turns, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config import Config, PhaseConfig, TrainConfig
from megatron_r1.train.schedule import PhaseSpan, late_edits


def test_only_edits_of_phases_that_have_begun_are_told() -> None:
    phases = {name: PhaseConfig(steps=10, learning_rate=0.5) for name in ("one", "two", "three")}
    train = TrainConfig(run="x", global_batch=1, micro_batch=1)
    config = Config(model=None, data=None, train=train, phases=phases)  # type: ignore[arg-type]
    before = {"phases": {name: {"steps": 10, "learning_rate": 0.1} for name in phases}}
    assert late_edits(before, config, 10) == [
        "phases.one: learning_rate 0.1 -> 0.5; the phase is over, so this has no effect"
    ]
    assert late_edits(before, config, 14)[1:] == [
        "phases.two: learning_rate 0.1 -> 0.5; the phase takes this from step 15 on"
    ]
    assert late_edits({}, config, 14) == []


def rates(steps: int, **phase: Any) -> list[float]:
    span = PhaseSpan("two", 100, 100 + steps, PhaseConfig(steps=steps, learning_rate=1.0, **phase))
    return [span.learning_rate(100 + step) for step in range(steps)]


def test_warm_up_then_linear() -> None:
    assert rates(6, warmup_steps=2, min_lr_ratio=0.0) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_is_halfway_in_the_middle() -> None:
    found = rates(8, decay="cosine", min_lr_ratio=0.2)
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.6)


def test_warm_up_stable_decay() -> None:
    found = rates(10, decay="wsd", decay_steps=4, warmup_steps=2, min_lr_ratio=0.0)
    assert found == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(30, decay="wsd", min_lr_ratio=0.0)[26:] == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])


def test_constant_stays() -> None:
    assert rates(3, decay="constant") == [1.0, 1.0, 1.0]
