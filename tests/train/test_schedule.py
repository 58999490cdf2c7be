"""Learning rates at the steps where a schedule turns, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config import Config, DataConfig, PhaseConfig, TrainConfig
from megatron_r1.train.schedule import PhaseSpan, late_edits


def recipe() -> Config:
    phases = {name: PhaseConfig(steps=10, learning_rate=0.5) for name in ("one", "two", "three")}
    train = TrainConfig(run="x", global_batch=1, micro_batch=1)
    model: Any = None
    return Config(model, DataConfig(seq_length=8, sources={}), train, phases)


def test_only_edits_of_phases_that_have_begun_are_told() -> None:
    config = recipe()
    before = {"phases": {name: {"steps": 10, "learning_rate": 0.1} for name in config.phases}}
    assert late_edits(before, config, 10) == [
        "phases.one: learning_rate 0.1 -> 0.5; the phase is over, so this has no effect"
    ]
    assert late_edits(before, config, 14)[1:] == [
        "phases.two: learning_rate 0.1 -> 0.5; the phase takes this from step 15 on"
    ]
    assert late_edits({}, config, 14) == []
    names = ("optimizer", "data", "train", "health", "phases")
    for damaged in ([1], "lr", 3, True):
        assert late_edits(dict.fromkeys(names, damaged), config, 14) == []
        assert late_edits({"phases": dict.fromkeys(config.phases, damaged)}, config, 14) == []


def test_edits_of_the_optimizer_and_of_what_a_step_sees_are_told_once_a_step_was_taken() -> None:
    before = {"optimizer": {"weight_decay": 0.01, "adam_eps": 1e-8}, "data": {"cross_documents": False}}
    assert late_edits(before, recipe(), 0) == []
    assert late_edits(before, recipe(), 14) == [
        "optimizer: weight_decay 0.01 -> 0.1; the run takes this from step 15 on",
        "data: cross_documents False -> True; the run takes this from step 15 on",
    ]
    assert late_edits(before, recipe(), 30)[0].endswith("the run is over, so this has no effect")


def rates(steps: int, **phase: Any) -> list[float]:
    span = PhaseSpan("two", 100, 100 + steps, PhaseConfig(steps=steps, learning_rate=1.0, **phase))
    return [span.learning_rate(100 + step) for step in range(steps)]


def test_warm_up_then_linear() -> None:
    assert rates(6, warmup_steps=2, min_lr_ratio=0.0) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_is_halfway_in_the_middle() -> None:
    taken = rates(8, decay="cosine", min_lr_ratio=0.2)
    assert taken[0] == 1.0
    assert taken[4] == pytest.approx(0.6)


def test_warm_up_stable_decay() -> None:
    taken = rates(10, decay="wsd", decay_steps=4, warmup_steps=2, min_lr_ratio=0.0)
    assert taken == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(30, decay="wsd", min_lr_ratio=0.0)[26:] == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])


def test_constant_stays() -> None:
    assert rates(3, decay="constant") == [1.0, 1.0, 1.0]
