"""Runs of tools/train.py: phases, resume, refusals; kills and two nodes under real torchrun."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests import launch
from tests.faults import inputs

TOOL = "tools/train.py"
FIRST = "phases.one={steps: 8, learning_rate: 0.01, decay: constant}"
SECOND = "phases.two={steps: 4, learning_rate: 0.01, weights: {a: 3, b: 1}}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate("ab"):
        launch.write_corpus(root / name, 60, seed=number)
    return root


def words(data: Path, run: Path, *more: str) -> list[str]:
    return [
        *launch.TINY_MODEL,
        f"train={{run: '{run}', global_batch: 8, micro_batch: 2, precision: fp32}}",
        "train.checkpoint_every=4",
        "train.probe_every=4",
        f"data={{seq_length: 32, sources: {{a: {{prefix: '{data}/a'}}, b: {{prefix: '{data}/b'}}}}}}",
        f"data.probes={{a: '{data}/a'}}",
        FIRST,
        *more,
    ]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: both phases in one go."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(data, run, SECOND)
    return run


def train(data: Path, run: Path, *more: str, status: int = 0) -> str:
    """Two forked ranks, which import nothing anew; what they print."""
    answer = inputs.train(Path("nowhere"), *words(data, run, *more), ranks=2)
    assert answer.status == status, answer.text
    return answer.text


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_phase_added_later_gives_the_same_run(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run)
    assert losses(run) == losses(whole)[:8]
    text = train(data, run, SECOND)
    assert f"continues from {run}/checkpoints/step_00000008" in text
    assert losses(run) == losses(whole)
    launch.assert_same_tensors(run / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.3


def test_a_finished_run_answers_and_changes_nothing(data: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    train(data, whole, SECOND)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_ranks_end_when_only_their_launcher_is_killed(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch.start(launch.command(TOOL, *words(data, run, SECOND)), tmp_path / "log")
    launch.wait_for((run / "checkpoints/step_00000004").exists, "the first checkpoint")
    # Held until they must see that it is gone: the few steps that are left take less than their next look.
    ranks = psutil.Process(process.pid).children()
    for rank in ranks:
        rank.suspend()
    process.kill()
    process.wait()
    time.sleep(0.5)
    for rank in ranks:
        rank.resume()
    assert psutil.wait_procs(ranks, timeout=20)[1] == []
    assert "ends because the command that started it is gone" in (tmp_path / "log").read_text()
    assert not (run / "checkpoints/step_00000012").exists()
    train(data, run, SECOND)
    assert losses(run) == losses(whole)
    launch.assert_same_tensors(run / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")


def test_torchrun_restarts_after_a_rank_was_killed(data: Path, whole: Path, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ("--standalone", "--max-restarts=2")
    process = launch.start(launch.command(TOOL, *words(data, run, SECOND), options=options), tmp_path / "log")
    launch.wait_for((run / "checkpoints/step_00000004").exists, "the first checkpoint")
    ranks = psutil.Process(process.pid).children()
    # torchrun itself accepts connections of all: examples/launch/one_machine.sh runs it without that.
    assert set.union(*map(launch.listeners, ranks)) == {"127.0.0.1"}
    ranks[-1].kill()
    assert process.wait(timeout=200) == 0
    assert f"continues from {run}/checkpoints/step_" in (tmp_path / "log").read_text()
    assert losses(run) == losses(whole)
    launch.assert_same_tensors(run / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")


def test_torchrun_told_to_stop_lets_the_ranks_save(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # So long that it cannot end by itself before it is stopped.
    process = launch.start(
        launch.command(TOOL, *words(data, run, SECOND, "phases.two.steps=5000")), tmp_path / "log"
    )
    launch.wait_for((run / "checkpoints/step_00000004").exists, "the first checkpoint")
    process.terminate()
    # Not 0, though every rank ends with 0: torchrun was told to stop, and says so.
    assert process.wait(timeout=60) == 1
    stopped = re.search(r"stops \(SIGTERM.* at step (\d+), .* wrote (\S+)", (tmp_path / "log").read_text())
    assert stopped and int(stopped[1]) > 4 and Path(stopped[2]).exists()
    rest = f"phases.two.steps={max(1, int(stopped[1]) - 8) + 1}"
    text = train(data, run, SECOND, rest)
    assert f"continues from {stopped[2]}" in text
    assert len(losses(run)) == 8 + max(1, int(stopped[1]) - 8) + 1


def test_a_branch_starts_from_another_runs_checkpoint(data: Path, whole: Path, tmp_path: Path) -> None:
    origin = f"train.init_from={whole}/checkpoints/step_00000008"
    run = tmp_path / "branch"
    train(data, run, SECOND, origin)
    assert losses(run) == losses(whole)[8:]


def test_an_edited_past_is_refused(data: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes(), (whole / "config.yaml").read_bytes()
    text = train(data, whole, SECOND, "phases.one.weights={a: 1, b: 5}", status=2)
    assert "error: " in text and "phase" in text
    assert ((whole / "metrics.jsonl").read_bytes(), (whole / "config.yaml").read_bytes()) == before


def test_two_nodes_train_the_same_run(data: Path, whole: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = tmp_path / "run"
    agents = [
        launch.start(
            launch.command(
                TOOL,
                *words(data, run, SECOND),
                ranks=1,
                options=(
                    "--nnodes=2",
                    f"--node-rank={node}",
                    "--master-addr=127.0.0.1",
                    f"--master-port={port}",
                ),
            ),
            tmp_path / f"log{node}",
        )
        for node in range(2)
    ]
    assert [agent.wait(timeout=200) for agent in agents] == [0, 0], (tmp_path / "log0").read_text()[-4000:]
    assert losses(run) == losses(whole)
    launch.assert_same_tensors(run / "checkpoints/step_00000012", whole / "checkpoints/step_00000012")
