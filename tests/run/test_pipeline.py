"""Stages run once, in order, again when their inputs change, and go on where they were cut off."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_r1.run.pipeline import PipelineError, Stage, run

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


def appending(name: str, path: Path, text: str, *files: Path) -> Stage:
    return Stage(name, [sys.executable, "-c", APPEND, str(path), text], [path], files=files)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    stages = [appending("one", tmp_path / "one", "1"), appending("two", tmp_path / "two", "2")]
    run(tmp_path, stages)
    run(tmp_path, stages)
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["1", "2"]


def test_a_changed_input_runs_its_stage_and_all_after_it(tmp_path: Path) -> None:
    source = tmp_path / "source.yaml"
    source.write_text("a")
    stages = [
        appending("one", tmp_path / "one", "1"),
        appending("two", tmp_path / "two", "2", source),
        appending("three", tmp_path / "three", "3"),
    ]
    run(tmp_path, stages)
    source.write_text("b")
    run(tmp_path, stages)
    assert [(tmp_path / name).read_text() for name in ("one", "two", "three")] == ["1", "22", "33"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b"])
def test_a_stage_s_stamp_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="which is no name of a file in its own folder"):
        run(tmp_path / "here", [Stage(name, [sys.executable, "-c", ""], [])])


def test_a_missing_output_runs_its_stage_again(tmp_path: Path) -> None:
    stages = [appending("one", tmp_path / "one", "1")]
    run(tmp_path, stages)
    (tmp_path / "one").unlink()
    run(tmp_path, stages)
    assert (tmp_path / "one").read_text() == "1"


def test_a_failed_stage_stops_the_pipeline_and_is_tried_again(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    needs = "import sys, pathlib; sys.exit(0 if pathlib.Path(sys.argv[1]).exists() else 3)"
    stages = [
        Stage("needs the gate", [sys.executable, "-c", needs, str(gate)], []),
        appending("after", tmp_path / "after", "x"),
    ]
    with pytest.raises(PipelineError, match="stage needs the gate ended with status 3"):
        run(tmp_path, stages)
    assert not (tmp_path / "after").exists()
    gate.touch()
    run(tmp_path, stages)
    assert (tmp_path / "after").read_text() == "x"


def test_a_stage_that_was_asked_to_stop_is_not_done(tmp_path: Path) -> None:
    stage = Stage("stops", [sys.executable, "-c", ""], [tmp_path / "checkpoint"])
    with pytest.raises(
        PipelineError, match=r"stage stops ended before its end: .*checkpoint is not there yet"
    ):
        run(tmp_path, [stage])
    (tmp_path / "checkpoint").touch()
    run(tmp_path, [stage])
