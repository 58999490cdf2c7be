"""The guard of training steps: a spike that lasts until a step is taken, and a loss that stays high."""

from __future__ import annotations

from megatron_r1.config import HealthConfig
from megatron_r1.train.health import StepGuard, TooManyBadStepsError

# Loss and gradient norm of a real run: the tiny preset, 12 windows of 64 tokens a step, learning rate 2e-3
# after 4 steps of warm-up, default health.
BEFORE = [
    (8.343, 3.078), (8.238, 3.122), (7.982, 2.134), (7.794, 2.092), (7.644, 1.711), (7.311, 2.584),
    (7.186, 1.100), (6.888, 1.095), (6.729, 0.936), (6.887, 0.760), (6.657, 0.711), (6.429, 0.659),
    (6.447, 0.644), (6.353, 0.739), (6.563, 0.821), (6.378, 0.940),
]  # fmt: skip
# Of windows 17 to 26 while the weights stay as they are.
SPIKE = [
    (8.116, 72.389), (7.519, 45.724), (8.313, 71.441), (7.816, 71.191), (8.076, 63.322),
    (8.029, 64.786), (7.662, 69.970), (8.025, 68.569), (7.745, 50.861), (7.9, 59.63),
]  # fmt: skip
# Once one of them, clipped, has changed the weights.
AFTER = [
    (6.454, 2.809), (6.597, 2.065), (6.487, 1.211), (6.330, 0.953), (6.626, 1.099), (6.248, 1.421),
    (6.492, 1.186), (6.484, 1.038), (6.373, 1.012), (6.474, 1.374), (6.372, 1.041), (6.168, 1.481),
]  # fmt: skip


def steps_taken(guard: StepGuard, steps: int) -> int:
    """How many of a run's steps change the weights: those of the record, whose spike lasts until one does."""
    taken = 0
    for step in range(steps):
        behind = taken - len(BEFORE)
        if behind < 0:
            loss, norm = BEFORE[taken]
        elif behind == 0:
            loss, norm = SPIKE[(step - len(BEFORE)) % len(SPIKE)]
        else:
            loss, norm = AFTER[(behind - 1) % len(AFTER)]
        taken += guard.refuses(loss, norm) is None
        guard.check()
    return taken


def test_without_limits_the_record_is_a_run_of_forty_steps() -> None:
    assert steps_taken(StepGuard(HealthConfig(loss_spike=0, grad_norm_spike=0)), 40) == 40


def test_a_run_outlives_a_spike_that_only_a_step_ends() -> None:
    try:
        taken = steps_taken(StepGuard(HealthConfig()), 40)
    except TooManyBadStepsError as error:
        raise AssertionError(f"the run stops: {error}") from None
    assert taken > len(BEFORE)
