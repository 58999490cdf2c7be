"""What the trainer would do with a run's past, said before any of it is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.data.open import open_data
from megatron_r1.data.plan_file import to_json
from megatron_r1.records import TrainState
from megatron_r1.run import ledger
from megatron_r1.train.resume import record_killed_launches, summary
from tests.train import small


def saved(config: Config, *steps: int) -> None:
    """Complete checkpoints of this recipe, but for the weights."""
    directory = Path(config.train.run) / "checkpoints"
    plan = to_json(open_data(config).plan, identities(config))
    for step in steps:
        temporary = checkpoint_files.begin(directory, step)
        state, final = TrainState(step, step * 8, step * 256), checkpoint_files.step_path(directory, step)
        checkpoint_files.publish(temporary, final, {}, state, config.model, "one", plan)
        checkpoint_files.release(directory)


def identities(config: Config) -> dict[str, str]:
    """Source -> identity of its dataset."""
    data = open_data(config)
    return {corpus.name: data.identities[str(corpus.prefix)] for corpus in data.corpora}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small.config(small.written(tmp_path), "run", 8)


def test_check_says_where_the_run_stands(config: Config) -> None:
    run, data = config.train.run, open_data(config)
    assert summary(config, data).endswith(f"\n{run}: begins with random weights, 8 steps")
    saved(config, 2, 6)
    assert summary(config, data).endswith(
        f"\n{run}: goes on from {run}/checkpoints/step_00000006, 2 steps to go"
    )
    saved(config, 8)
    assert summary(config, data).endswith(f"\n{run}: finished before, at {run}/checkpoints/step_00000008")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.global_batch=16", "keep train.global_batch=8"),
        ("data.seq_length=16", "data.seq_length"),
        ("data.seed=5", "seed 1234 -> 5"),
        ("model.ffn_hidden_size=32", "ffn_hidden_size"),
    ],
)
def test_check_refuses_what_the_trainer_does(
    config: Config, tmp_path: Path, change: str, message: str
) -> None:
    saved(config, 6)
    config = small.config(tmp_path, "run", 8, change)
    with pytest.raises(ValueError, match=message):
        summary(config, open_data(config))


def test_the_ledger_is_told_of_launches_that_were_cut_off(config: Config) -> None:
    """Killed at step 7, behind the checkpoint of step 6; the run before had told of step 2."""
    run = Path(config.train.run)
    saved(config, 2, 4, 6)
    outputs = {str(run / "checkpoints/step_00000002"): "x"}
    ledger.append(run, "train one", seconds=9.0, tokens=2 * 256, outputs=outputs)
    each = {"phase": "one", "seconds": 2.0, "saving_seconds": 0.5, "ranks": 3}
    lines = [{"step": n, **each} for n in range(1, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record_killed_launches(config, 6)
    _, line = ledger.read(run)
    assert (line["stage"], line["devices"], line["tokens"]) == ("train one", 3, 4 * 256)
    # Step 7 comes again: its time was spent all the same.
    assert line["seconds"] == 5 * 2.5
    paths = [run / f"checkpoints/step_{n:08d}" for n in (4, 6)]
    assert line["outputs"] == {str(path): checkpoint_files.identity(path) for path in paths}
    sources = config.data.sources
    assert line["inputs"] == {sources[n].prefix: identity for n, identity in identities(config).items()}


def test_a_damaged_older_checkpoint_keeps_no_run_from_going_on(config: Config) -> None:
    run = Path(config.train.run)
    saved(config, 2, 4)
    (run / "checkpoints/step_00000002" / checkpoint_files.META).write_text("{")
    (run / "metrics.jsonl").write_text('{"step": 1, "phase": "one", "seconds": 2.0}\n')
    record_killed_launches(config, 4)
    (line,) = ledger.read(run)
    assert len(line["outputs"]) == 2 and line["seconds"] == 2.0
