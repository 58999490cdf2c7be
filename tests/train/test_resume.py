"""What the trainer would do with a run's past, said before any of it is done."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.data.open import open_data
from megatron_r1.data.plan_file import to_json
from megatron_r1.records import TrainState
from megatron_r1.run import ledger
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import sha256
from megatron_r1.train.loop import train
from megatron_r1.train.metrics import describe_lost, lost_steps
from megatron_r1.train.resume import first_step, record_killed_launches, record_start, standing, summary
from tests.train import small


def saved(config: Config, *steps: int) -> None:
    """Complete checkpoints of this recipe, but for the weights."""
    directory = Path(config.train.run) / "checkpoints"
    plan = to_json(open_data(config).plan, identities(config))
    for step in steps:
        checkpoint_files.begin(directory, step)
        state = TrainState(step, step * 8, step * 256)
        checkpoint_files.publish(directory, {}, state, config.model, "one", plan)
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


def recorded(config: Config, *steps: int, phase: str = "one") -> Path:
    """metrics.jsonl with lines of these steps."""
    path = RunDir(Path(config.train.run)).metrics
    path.parent.mkdir(parents=True, exist_ok=True)
    each = {"phase": phase, "seconds": 2.0}
    path.write_text("".join(json.dumps({"step": n, **each}) + "\n" for n in steps))
    return path


@pytest.mark.parametrize("steps", [[], [1], [8], [1, 2, 5, 8], [2, 3, 4, 4, 3], [*range(1, 9)], [9, 10, 0]])
def test_lost_steps_are_those_of_no_line(steps: list[int]) -> None:
    found = lost_steps(steps, 1, 8)
    missing = [step for step in range(1, 9) if step not in steps]
    assert [step for a, b in found for step in range(a, b + 1)] == missing
    assert all(b + 1 < a for (_, b), (a, _) in itertools.pairwise(found))


def test_many_places_are_told_by_their_number() -> None:
    text = describe_lost(Path("m"), [(n, n) for n in range(1, 30, 2)])
    named = "1, 3, 5, 7, 9, 11, 13, 15 and 7 more"
    assert text == f"m has lost the lines of step {named}, 15 in all"


@pytest.mark.parametrize(
    ("steps", "lost"),
    [
        ([1, 2, 4, 5, 6, 7], "step 3, 1 in all"),
        ([1, 2, 3], "step 4 to 6, 3 in all"),
        ([3, 4, 5, 6], "step 1 to 2, 2 in all"),
        (None, "step 1 to 6, 6 in all"),
        ([1, 2, 3, 4, 5, 6, 7], ""),
    ],
)
def test_lost_lines_are_told_before_and_at_a_start(
    config: Config, steps: list[int] | None, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(config, 2, 6)
    if steps is not None:
        recorded(config, *steps)
    data = open_data(config)
    checked = summary(config, data)
    record_start(config, 6, "{}")
    for text in (checked, capsys.readouterr().err):
        assert ("warning" in text) == bool(lost) and lost in text
        assert ("steps 7 to 7 were trained and are trained again" in text) == (7 in (steps or []))


def test_lines_of_no_step_are_damaged_ones(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    saved(config, 4)
    path = recorded(config, 1, 2, 4)
    again = '{"step": 4, "phase": "one", "seconds": 2.0}'
    bad = ['{"step": null}', '{"step": "3"}', "\x00\x00", "[3]", again]
    path.write_text(path.read_text() + "\n".join(bad) + "\n")
    record_start(config, 4, "{}")
    assert "step 3, 1 in all" in (text := capsys.readouterr().err) and "4 of its lines cannot be read" in text
    assert "1 lines too many" in text
    assert ledger.read(path.parent)[0]["seconds"] == 6.0


def test_a_branch_begins_behind_its_checkpoint(config: Config, tmp_path: Path) -> None:
    """Its first step comes from the configuration, else from the ledger line of its first launch."""
    saved(config, 6)
    start = f"{config.train.run}/checkpoints/step_00000006"
    branch = small.config(tmp_path, "branch", 8, f"train.init_from={start}")
    plain = small.config(tmp_path, "branch", 8)
    run = RunDir(Path(branch.train.run))
    assert (first_step(run, branch, []), first_step(run, plain, [7])) == (7, 1)
    ledger.append(run.root, "train one", inputs={"data/a": "1", start: "2"})
    assert first_step(run, plain, []) == 7
    begun = small.config(tmp_path, "branch", 8, f"train.init_weights={start}")
    assert first_step(run, begun, []) == 1


@pytest.mark.parametrize("field", ["init_from", "init_weights"])
def test_a_beginning_that_is_not_there_is_refused_before_anything_is_written(
    config: Config, tmp_path: Path, field: str
) -> None:
    saved(config, 6)
    (tmp_path / "half").mkdir()
    cases = {
        f"{tmp_path}/absent": "absent is no complete checkpoint",
        f"{tmp_path}/half": "half is no complete checkpoint .megatron_r1.json is missing.; restore or remove",
        f"{config.train.run}/checkpoints/step_0000006": "did you mean .*step_00000006",
    }
    for path, message in cases.items():
        begins = small.config(tmp_path, "new", 8, f"train.{field}={path}")
        with pytest.raises(ValueError, match=message):
            summary(begins, open_data(begins))
        with pytest.raises(ValueError, match=message):
            train(begins)
    other = f"train.{field}={config.train.run}/checkpoints/step_00000006"
    begins = small.config(tmp_path, "new", 8, other, "model.hidden_size=128")
    with pytest.raises(ValueError, match="holds another model"):
        train(begins)
    assert not (tmp_path / "new").exists()


def test_a_run_whose_only_checkpoint_lost_its_description_does_not_begin_anew(config: Config) -> None:
    saved(config, 6)
    path, lines = Path(config.train.run) / "checkpoints" / "step_00000006", recorded(config, *range(1, 7))
    (path / checkpoint_files.META).unlink()
    before = lines.read_bytes()
    for start in (lambda: summary(config, open_data(config)), lambda: train(config)):
        with pytest.raises(
            ValueError, match=f"{path} has lost its {checkpoint_files.META}.* restore the file"
        ):
            start()
    assert lines.read_bytes() == before
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        checkpoint_files.identity(path)
    # With an older one the run goes on from there, and says so.
    saved(config, 2)
    text = summary(config, open_data(config))
    assert "warning: step_00000006 cannot be read" in text and "goes on from" in text
    assert "steps 3 to 6 were trained and are trained again" in text


def test_a_copy_of_a_checkpoint_under_another_name_is_none(config: Config) -> None:
    saved(config, 2, 6)
    directory = Path(config.train.run) / "checkpoints"
    for name in ("step_00000006.bak", "step_00000006_old", "step_6", "step_x"):
        shutil.copytree(directory / "step_00000002", directory / name)
    assert checkpoint_files.saved_steps(directory) == [2, 6]
    assert checkpoint_files.damaged(directory) == []


def test_a_finished_run_that_was_killed_before_its_ledger_line_gets_it(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(config, 8)
    recorded(config, *range(1, 9))
    for _ in range(2):
        train(config)
        (line,) = ledger.read(Path(config.train.run))
    assert (line["stage"], line["tokens"], line["seconds"]) == ("train one", 8 * 256, 16.0)
    assert "finished before" in capsys.readouterr().out


def test_a_killed_launch_is_recorded_with_its_keep_masks(config: Config, tmp_path: Path) -> None:
    saved(config, 8)
    recorded(config, *range(1, 9))
    mask = tmp_path / "mask.npy"
    np.save(mask, np.ones(4, bool))
    kept = small.config(tmp_path, "run", 8, f"phases.one.keep={{a: {mask}}}")
    record_killed_launches(kept, 8)
    (line,) = ledger.read(Path(config.train.run))
    assert line["inputs"][str(mask)] == sha256(mask)


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_run_in_a_file_is_refused_before_it_begins(config: Config, tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").write_text("")
    train = dataclasses.replace(config.train, run=f"{tmp_path}/taken{below}")
    with pytest.raises(ValueError, match=rf"train\.run=.*: {tmp_path}/taken is no directory; name another"):
        standing(dataclasses.replace(config, train=train))
