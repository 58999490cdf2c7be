"""What is not ours in `checkpoints/` stays, is named, and stops nothing."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint import save
from megatron_r1.checkpoint.files import Retention
from megatron_r1.checkpoint.save import Saver
from megatron_r1.config import ParallelConfig
from megatron_r1.influence.plan import _available_steps
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from tests import launch
from tests.distributed import on_ranks
from tests.influence import tiny

FOREIGN = [
    *("step_5.bak", "step_00000005.bak", "step_7", "step_00000007 (copy)", "step_٠٠٠٠٠٠٠٩", "step_", "notes"),
    *("step_00000001x", ".step_mine", ".step_00000004.tmp2", ".step_4.tmp", ".step_00000004"),
]


def tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def saves(directory: Path, steps: range, **retention: Any) -> None:
    with process_groups(ParallelConfig()):
        gpt, saver = tiny.build(), Saver(directory, Retention(**retention))
        for step in steps:
            saver.save(gpt, None, TrainState(step), tiny.MODEL, "one", plan="{}")
            saver.wait()
    gone = lambda: all(path.is_symlink() for path in directory.glob(".step_*.old"))  # noqa: E731
    launch.wait_for(gone, "deletion")


def test_foreign_folders_files_and_links_stay(tmp_path: Path) -> None:
    directory, outside = tmp_path / "run" / "checkpoints", tmp_path / "outside"
    saves(directory, range(1, 2))
    for name in FOREIGN:
        shutil.copytree(directory / "step_00000001", directory / name)
    outside.mkdir()
    (outside / "precious").touch()
    (directory / ".step_00000008.old").symlink_to(outside)
    (directory / "step_00000009").symlink_to(tmp_path / "nowhere")
    (directory / "step_00000011").write_text("a file")
    names = sorted([*FOREIGN, ".step_00000008.old", "step_00000009", "step_00000011"])
    before = tree(directory) - {name for name in tree(directory) if name.startswith("step_00000001/")}
    # What a kill has left of ours goes.
    (directory / ".step_00000003.tmp").mkdir()
    (directory / ".step_00000003.tmp" / "x").touch()
    (directory / ".step_00000002.old").mkdir()
    (directory / ".room").write_bytes(b"0")
    assert checkpoint_files.foreign(directory) == names
    saves(directory, range(2, 4), last=1)
    assert checkpoint_files.saved_steps(directory) == _available_steps(tmp_path / "run") == [3]
    assert before - {"step_00000001"} <= tree(directory) and (outside / "precious").exists()
    assert not (directory / ".room").exists() and not (directory / ".step_00000003.tmp").exists()
    assert checkpoint_files.foreign(directory) == names


def test_a_link_that_has_a_checkpoints_name_is_one_and_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves(tmp_path / "c", range(1, 2))
    (tmp_path / "c" / "step_00000001").rename(tmp_path / "elsewhere")
    (tmp_path / "c" / "step_00000001").symlink_to(tmp_path / "elsewhere")
    assert checkpoint_files.saved_steps(tmp_path / "c") == [1]
    saves(tmp_path / "c", range(2, 5), last=1)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step_00000001", "step_00000004"]
    said = capsys.readouterr().err
    assert said.count("step_00000001 is a link; it stays, and no room is freed") == 1


def test_the_room_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".room").symlink_to(tmp_path / "victim")
    saves(tmp_path / "c", range(1, 2))
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_surplus_that_cannot_go_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(path: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_files, "discard", refuses)
    saves(tmp_path, range(1, 3), last=1)
    assert checkpoint_files.saved_steps(tmp_path) == [1, 2]
    assert "Permission denied: " in capsys.readouterr().err


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


MOMENTS: dict[str, tuple[Any, str]] = {
    ".metadata": (save.filesystem_async.FileSystemWriterAsync, "finish"),
    "metadata.json": (save.serialization, "save_config"),
    "publish": (checkpoint_files, "publish"),
    "a link": (checkpoint_files, "META"),
    "a file": (checkpoint_files, "META"),
}
if strategy := getattr(save.common, "TorchCommonSaveStrategy", None):  # of megatron-core 0.16
    MOMENTS["common.pt"] = strategy, "save_common"


def _failing(root: Path) -> dict[str, str]:
    """Save on both ranks, where the first one has no room at a moment; the errors."""
    errors = {}
    with process_groups(ParallelConfig(tensor=2)) as context:
        gpt = tiny.build(ParallelConfig(tensor=2))
        for moment, place in MOMENTS.items():
            saver, original = Saver(root / moment), getattr(*place)
            if context.rank == 0 and callable(original):
                setattr(*place, _full)
            try:
                saver.save(gpt, None, TrainState(3), tiny.MODEL, "one", plan="{}")
                saver.wait()
            except OSError as error:
                errors[moment] = str(error)
            setattr(*place, original)
            # Both ranks are at the same place.
            assert save.gather_objects(moment) == [moment] * 2
    return errors


def test_an_error_of_the_first_rank_is_every_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    for kind in ("a link", "a file"):
        (tmp_path / kind).mkdir()
    (tmp_path / "a link" / "step_00000003").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a file" / "step_00000003").write_text("x")
    one, other = on_ranks(2, _failing, tmp_path)
    assert one == other and one.keys() == MOMENTS.keys()
    for moment, error in one.items():
        taken = moment.startswith("a ")
        assert "step_00000003 could not be saved" in error
        assert ("is a link or a file; move it away" if taken else "No space left on device") in error
        assert [p.name for p in (tmp_path / moment).iterdir()] == (["step_00000003"] if taken else [])


def test_the_folder_of_checkpoints_is_flushed_where_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(checkpoint_files, "sync", flushed.append)
    checkpoint_files.begin(directory := tmp_path / "run" / "checkpoints", 1)
    assert flushed == [tmp_path / "run", tmp_path]
    checkpoint_files.begin(directory, 2)
    assert flushed == [tmp_path / "run", tmp_path] and tree(directory) == {".room", ".step_00000002.tmp"}
