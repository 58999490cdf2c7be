"""Bad steps are told from good ones, and a stuck process ends with its stacks on disk."""

from __future__ import annotations

import json
import math
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


def test_a_spike_is_one_against_the_median_of_what_was_accepted() -> None:
    guard = warmed()
    assert guard.refuses(2.9, 19.0) is None
    assert guard.refuses(2.9, 21.0) == "gradient norm 21 is 21 times the usual 1"
    assert guard.refuses(6.5, 1.0) is not None
    # A refused step does not become usual.
    assert guard.refuses(2.9, 21.0) is not None


def test_a_start_is_no_spike_and_a_new_phase_is_a_start() -> None:
    guard = warmed(steps=10)
    assert guard.refuses(30.0, 500.0) is None
    guard = warmed()
    guard.forget()
    assert guard.refuses(30.0, 500.0) is None


def test_it_gives_up_after_so_many_in_a_row() -> None:
    guard = warmed(HealthConfig(max_skipped=3))
    for loss in (math.nan, math.nan, 2.9, math.nan, math.nan):
        guard.refuses(loss, 1.0)
        guard.check()
    guard.refuses(math.nan, 1.0)
    with pytest.raises(TooManyBadStepsError, match=r"3 steps in a row were skipped \(health.max_skipped=3\)"):
        guard.check()


def test_its_history_survives_a_checkpoint() -> None:
    one = warmed()
    one.refuses(math.nan, 1.0)
    two = StepGuard(HealthConfig())
    two.load(json.loads(json.dumps(one.history())))
    assert two.history() == {
        "accepted": [tuple(a) for a in one.history()["accepted"]],  # type: ignore[attr-defined]
        "skipped_in_a_row": 1,
    }
    assert two.refuses(2.9, 21.0) == one.refuses(2.9, 21.0) is not None


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
