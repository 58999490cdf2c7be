"""Bad steps are told from good ones, and a stuck process ends with its stacks on disk."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config import HealthConfig
from megatron_r1.train.health import HUNG, StepGuard, TooManyBadStepsError, stragglers


def warmed(config: HealthConfig | None = None, steps: int = 20) -> StepGuard:
    guard = StepGuard(config or HealthConfig())
    for step in range(steps):
        assert guard.refuses(3.0 - 0.01 * step, 1.0) is None
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_at_once(value: float) -> None:
    guard = StepGuard(HealthConfig(loss_spike=0, grad_norm_spike=0))
    assert guard.refuses(value, 1.0) == f"loss is {value}"
    assert guard.refuses(3.0, value) == f"gradient norm is {value}"
    assert guard.refuses(3.0, 1.0) is None


def test_a_finite_spike_is_taken_and_told_against_the_median_of_what_was_accepted() -> None:
    guard = warmed()
    assert (guard.refuses(2.9, 19.0), guard.spike) == (None, None)
    assert guard.refuses(6.5, 21.0) is None
    assert guard.spike == "gradient norm 21 is 21 times the usual 1"
    # A skipped step tells its own reason.
    assert guard.refuses(2.9, math.inf) and guard.spike is None
    silent = warmed(HealthConfig(grad_norm_spike=0))
    assert silent.refuses(2.9, 1e9) is None and silent.spike is None


def test_a_start_is_no_spike_and_a_new_phase_is_a_start() -> None:
    guard = warmed(steps=10)
    assert guard.refuses(30.0, 500.0) is None and guard.spike is None
    guard = warmed()
    guard.forget()
    assert guard.refuses(30.0, 500.0) is None and guard.spike is None


@pytest.mark.parametrize("seed", range(20))
def test_no_run_stops_unforeseen(seed: int) -> None:
    """Losses that fall, rise and are not finite: where the guard stops a run, it said before that it may."""
    chance, foreseen, stopped = random.Random(seed), 0, 0
    guard, level = StepGuard(HealthConfig(max_skipped=chance.randint(1, 4))), 3.0
    for step in range(1, 400):
        level += chance.uniform(-0.02, 0.025)
        loss = math.nan if chance.random() < 0.05 else level + chance.gauss(0, 0.1)
        may = guard.may_stop()
        foreseen += may
        guard.refuses(loss, 1.0)
        try:
            guard.check(step)
        except TooManyBadStepsError:
            assert may
            stopped += 1
    assert stopped <= foreseen
    if guard._config.max_skipped > 1:
        assert foreseen < 399


def test_a_healthy_run_foresees_no_stop() -> None:
    guard = StepGuard(HealthConfig())
    for step in range(1, 200):
        assert not guard.may_stop()
        guard.refuses(3.0 - 0.005 * step + 0.1 * (step % 2), 1.0)
        guard.check(step)


def stops(guard: StepGuard, losses: list[float], first: int = 1) -> list[int]:
    """Steps at which the guard stops a run of these losses."""
    out = []
    for step, loss in enumerate(losses, first):
        guard.refuses(loss, 1.0)
        try:
            guard.check(step)
        except TooManyBadStepsError:
            out.append(step)
    return out


def oracle(losses: list[float], limit: float, window: int = 32) -> list[int]:
    """The rule, read off the whole list: a full window from the begin, and again after each stop."""
    out, best, since = [], math.inf, 0
    for end in range(1, len(losses) + 1):
        if end - since < window:
            continue
        median = statistics.median(losses[end - window : end])
        best = min(best, median)
        if limit and median > best + limit:
            out, since = [*out, end], end
    return out


NOISE = random.Random(3)
RISEN = [3.0 + NOISE.gauss(0, 0.1) + (0.5 if step > 60 else 0.0) for step in range(200)]


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.25, 0.6])
def test_a_run_stops_when_the_median_loss_has_risen_and_again_after_a_window(limit: float) -> None:
    found = stops(StepGuard(HealthConfig(loss_spike=limit)), RISEN)
    assert found == oracle(RISEN, limit) and bool(found) == (0 < limit < 0.5)


def test_a_spike_shorter_than_half_a_window_stops_nothing_and_a_new_phase_has_its_own_best() -> None:
    assert stops(StepGuard(HealthConfig()), [3.0] * 60 + [9.0] * 15 + [3.0] * 60) == []
    guard = StepGuard(HealthConfig())
    assert stops(guard, [3.0] * 60) == []
    guard.forget()
    assert stops(guard, [4.0] * 60) == []


def test_skipped_losses_enter_no_median() -> None:
    losses = [value for loss in RISEN[:100] for value in (loss, math.nan)]
    stopped = stops(StepGuard(HealthConfig()), losses)
    assert stopped == [2 * step - 1 for step in oracle(RISEN[:100], HealthConfig().loss_spike)]


def test_it_gives_up_after_so_many_in_a_row() -> None:
    guard = warmed(HealthConfig(max_skipped=3))
    for loss in (math.nan, math.nan, 2.9, math.nan, math.nan):
        guard.refuses(loss, 1.0)
        guard.check()
    guard.refuses(math.nan, 1.0)
    with pytest.raises(TooManyBadStepsError, match=r"3 steps in a row were skipped \(health.max_skipped=3\)"):
        guard.check()


def test_its_history_survives_a_checkpoint() -> None:
    """Cut anywhere, before or after a stop, the resumed run decides as the uninterrupted one."""
    straight, config = stops(StepGuard(HealthConfig()), RISEN), HealthConfig()
    for cut in range(0, 200, 7):
        one, two = StepGuard(config), StepGuard(config)
        found = stops(one, RISEN[:cut])
        two.load(json.loads(json.dumps(one.history())))
        assert found + stops(two, RISEN[cut:], cut + 1) == straight


def test_a_history_of_an_earlier_version_is_read() -> None:
    guard = StepGuard(HealthConfig())
    guard.load({"accepted": [[3.0, 1.0]] * 128, "skipped_in_a_row": 2})
    assert guard.skipped_in_a_row == 2 and guard.best is None
    # Its losses are the first window, so that a rise is seen at once.
    assert stops(guard, [3.0] + [9.0] * 20) == [17]


def test_the_slowest_rank_against_the_middle_one() -> None:
    assert stragglers([1.0, 1.0, 3.0, 1.2]) == (2, pytest.approx(3 / 1.1))


def test_a_stuck_process_ends_with_its_stacks_on_disk(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from megatron_r1.train.health import Watchdog\n"
        "def waits_for_ever(): time.sleep(60)\n"
        "with Watchdog(0.4, Path(sys.argv[1])) as dog:\n"
        "    for _ in range(4): time.sleep(0.2); dog.heard()\n"
        "    print('alive', flush=True)\n"
        "    waits_for_ever()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "logs" / "rank_0.log"], capture_output=True, text=True
    )
    assert ended.returncode == HUNG
    assert ended.stdout == "alive\n"
    assert "error: no step for" in ended.stderr
    assert "in waits_for_ever" in (tmp_path / "logs" / "rank_0.log").read_text()
