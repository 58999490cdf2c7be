"""Ranks that end at any moment: what is complete stays whole, and the run comes to the same end."""

from __future__ import annotations

import os
import random
import signal
import threading
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config, DataConfig, PhaseConfig, SourceConfig, TrainConfig
from megatron_r1.run import ledger
from megatron_r1.train.loop import train
from megatron_r1.train.metrics import read
from tests import launch
from tests.distributed import on_ranks, start_ranks
from tests.influence import tiny

STEPS = 10
RANKS = 2


def run_of(config: Config, directory: Path, **train_values: Any) -> Config:
    return replace(config, train=replace(config.train, run=str(directory), **train_values))


def tensors(config: Config) -> dict[str, torch.Tensor]:
    return launch.tensors(Path(config.train.run) / f"checkpoints/step_{STEPS:08d}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, torch.Tensor]]:
    """A run without interruption that saves every step and keeps two, and its end."""
    root = tmp_path_factory.mktemp("kills")
    launch.write_corpus(root / "a", 40, seed=0)
    config = Config(
        model=tiny.MODEL,
        data=DataConfig(sources={"a": SourceConfig(f"{root}/a")}, seq_length=32),
        train=TrainConfig(
            f"{root}/run", global_batch=4, micro_batch=2, precision="fp32", checkpoint_every=1, keep_last=2
        ),
        phases={"one": PhaseConfig(steps=STEPS, learning_rate=1e-2)},
    )
    on_ranks(RANKS, train, config)
    return config, tensors(config)


def steps(config: Config) -> list[int]:
    return checkpoint_files.saved_steps(Path(config.train.run) / "checkpoints")


def kill_and_go_on(number: int, whole: tuple[Config, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    config, end = run_of(whole[0], tmp_path / "run"), whole[1]
    directory, chance = Path(config.train.run) / "checkpoints", random.Random(number)
    first = chance.randrange(STEPS - 3)
    ranks, _ = start_ranks(RANKS, tmp_path, train, config)
    # A save of this step, complete or not; the first one comes after most of the start.
    launch.wait_for(lambda: first == 0 or any(directory.glob(f"*step_{first:08d}*")), f"step {first}")
    ended = connection.wait([rank.sentinel for rank in ranks], chance.uniform(0, 0.1 if first else 1.0))
    assert not ended, "the kill came too late"
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    for ref in checkpoint_files.complete_checkpoints(directory) if directory.exists() else []:
        files = checkpoint_files.read_meta(ref.path)["files"]
        assert checkpoint_files.corruptions(ref.path, files) == []
    on_ranks(RANKS, train, config)
    resumed = tensors(config)
    assert resumed.keys() == end.keys() and len(end) > 10
    assert [name for name in end if not torch.equal(resumed[name], end[name])] == []
    assert steps(config) == [STEPS - 1, STEPS]
    assert [line["step"] for line in read(tmp_path / "run/metrics.jsonl")] == [*range(1, STEPS + 1)]
    # The next launch records the killed one.
    lines = ledger.read(tmp_path / "run")
    assert sum(line["tokens"] for line in lines) == STEPS * config.tokens_per_step()
    recorded = {path for line in lines for path in line["outputs"]}
    assert {str(directory / f"step_{step:08d}") for step in steps(config)} <= recorded


@pytest.mark.parametrize("number", range(4))
def test_killed_at_any_moment_it_comes_to_the_same_end(number: int, whole: Any, tmp_path: Path) -> None:
    kill_and_go_on(number, whole, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(4, 34))
def test_killed_at_many_moments(number: int, whole: Any, tmp_path: Path) -> None:
    kill_and_go_on(number, whole, tmp_path)


def _told_to_stop(config: Config) -> None:
    """Rank 1 alone gets SIGTERM, once a checkpoint is there."""

    def ask() -> None:
        launch.wait_for(lambda: len(steps(config)) > 0, "a checkpoint")
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=ask).start()
    train(config)


def test_one_rank_told_to_stop_stops_all_with_a_checkpoint(whole: Any, tmp_path: Path) -> None:
    config = run_of(whole[0], tmp_path / "run", checkpoint_every=3)
    many = replace(config, phases={"one": PhaseConfig(steps=10_000, learning_rate=1e-2)})
    on_ranks(RANKS, _told_to_stop, many)
    done = [line["step"] for line in read(tmp_path / "run/metrics.jsonl")]
    assert 3 <= done[-1] < 10_000 and steps(config)[-1] == done[-1]
