"""A folder that a conversion writes: whole or not there, by one conversion at a time, and nobody else's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from megatron_r1.export import convert
from megatron_r1.export import weights as hf


def fill(target: Path, text: str = "x") -> None:
    with convert._appearing(target) as folder:
        (folder / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_conversion_waits_and_finds_the_target_filled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, errors = tmp_path / "hf", list[str]()

    def second() -> None:
        try:
            fill(target, "second")
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=second)
    with convert._appearing(target) as folder:
        (folder / "file").write_text("first")
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and names(folder) == [".conversion", "file"]
    thread.join(10)
    assert errors == [f"{target} exists and is not an empty folder; name another, or remove it"]
    assert (
        (target / "file").read_text() == "first" and names(tmp_path) == ["hf"] and names(target) == ["file"]
    )
    assert "another conversion writes" in capsys.readouterr().err


def test_a_second_conversion_goes_on_where_the_first_failed(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    thread = threading.Thread(target=fill, args=(target, "second"))
    with pytest.raises(ZeroDivisionError), convert._appearing(target) as folder:
        (folder / "half").write_text("first")
        thread.start()
        thread.join(0.2)
        raise ZeroDivisionError
    thread.join(10)
    assert names(tmp_path) == ["hf"] and names(target) == ["file"]


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".hf.partial"
    (left / "step_00000000").mkdir(parents=True)
    (left / ".conversion").touch()
    (tmp_path / "mine").mkdir()
    (left / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "file").touch()
    fill(tmp_path / "hf")
    assert names(tmp_path) == ["hf", "mine"] and names(tmp_path / "hf") == names(tmp_path / "mine") == [
        "file"
    ]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to one of ours", "dangling link"])
def test_what_was_not_made_by_a_conversion_is_not_touched(kind: str, tmp_path: Path) -> None:
    theirs, mine = tmp_path / ".hf.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / (".conversion" if "ours" in kind else "file")).touch()
    if kind == "folder":
        mine.rename(theirs)
    elif kind == "file":
        theirs.touch()
    else:
        theirs.symlink_to("nowhere" if "dangling" in kind else "mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"\.hf\.partial was not made by a conversion, .* move it away"):
        fill(tmp_path / "hf")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_one_line_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf, "save_file", full)
    with (
        pytest.raises(OSError, match=r"\.hf\.partial/model\.safetensors cannot be written: .*No space left"),
        convert._appearing(tmp_path / "hf") as folder,
    ):
        hf.save({"a": torch.ones(2)}, folder)
    assert names(tmp_path) == []
