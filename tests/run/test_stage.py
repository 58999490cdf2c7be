"""A stage is done, goes on, or is refused with what differs; it ends with a line in a ledger."""

from __future__ import annotations

import contextlib
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.run import ledger
from megatron_r1.run.stage import (
    Standing,
    answer,
    answered,
    differences,
    finish,
    note_launch,
    read,
    record_launch,
    require_empty,
    standing,
)
from megatron_r1.system.files import sha256, write_json, write_text
from tests.launch import ROOT


@pytest.mark.parametrize(
    ("theirs", "whole", "expected"),
    [
        (None, True, Standing.NEW),
        ({"seed": 1}, True, Standing.OTHER),
        ({"seed": 2}, False, Standing.GO_ON),
        ({"seed": 2, "note": "x"}, True, Standing.DONE),
    ],
)
def test_where_a_stage_stands(theirs: dict[str, Any] | None, whole: bool, expected: Standing) -> None:
    assert standing(theirs, {"seed": 2, "note": "y"}, lambda: whole, notes={"note"}) is expected


def test_a_refusal_names_what_differs_and_the_way_out() -> None:
    theirs = {"data": {"a": "0" * 64, "b": "1"}, "seed": None}
    ours = {"data": {"a": "2" * 64}, "seed": None, "layers": [1, 2]}
    said = "x holds scores of others: data.a (00000000000000000000 there, 22222222222222222222 here), layers "
    said += "(nothing there, [1, 2] here), data.b (1 there, nothing here). Restore these, or remove x"
    with pytest.raises(ValueError, match=re.escape(said)):
        standing(theirs, ours, lambda: True, "x holds scores of others", "remove x")
    assert differences(ours, ours) == []


def test_a_manifest_answers_its_request_while_its_files_are_as_they_were(tmp_path: Path) -> None:
    manifest, file = tmp_path / "manifest.json", tmp_path / "file"
    write_text(file, "result")
    request = {"width": 3, "names": ["a"]}
    made = answer(manifest, request, [file], lines=7)
    assert answered(manifest, request) == made == json.loads(manifest.read_text())
    assert made == {"request": request, "lines": 7, "files": {"file": sha256(file)}}
    assert answered(manifest, {**request, "width": 4}) is None
    for damage in (lambda: file.write_text("other"), file.unlink, lambda: manifest.write_text('{"requ')):
        damage()
        assert answered(manifest, request) is None


@pytest.mark.parametrize("text", [None, "", "[1]", "{", "\xff"])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "record").write_text(text, encoding="latin-1")
    assert read(tmp_path / "record") is None


def test_a_record_is_read_in_bounds(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text('{"a": ' + "[" * 100_000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert [read(tmp_path / name) for name in ("deep", "pipe", "folder", "x" * 5000)] == [None] * 4


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", "a/../file", "", "a\0b"])
def test_a_manifest_that_leads_elsewhere_is_never_whole(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    write_text(tmp_path / "secret", "x")
    made = answer(folder / "manifest.json", {"width": 3}, [])
    with contextlib.suppress(OSError, ValueError):
        made["files"] = {name: sha256(folder / name)}
    write_json(folder / "manifest.json", {**made, "files": made["files"] or {name: None}})
    assert answered(folder / "manifest.json", {"width": 3}) is None


def test_a_refusal_names_few_of_many_differences() -> None:
    theirs = {f"{n}" * 1000: n for n in range(1000)}
    with pytest.raises(ValueError, match=r"and 980 more\. Restore these") as caught:
        standing(theirs, {}, lambda: True, "x", "y")
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "note",
    [{"x": 1}, {"name": "a"}, {"name": "a", "inputs": 3, "tokens": 1}, {"name": 3, "inputs": {}},
     {"name": "a", "inputs": {}, "directory": "/tmp"}, {"name": "a", "inputs": {"b": 3}},
     {"name": "a", "inputs": {}, "seconds": "1"}, {"name": "a", "inputs": {}, "seconds": 10**400},
     {"name": "a", "inputs": {}, "again": True}],
)  # fmt: skip
def test_a_damaged_note_of_a_launch_is_none(tmp_path: Path, note: dict[str, Any]) -> None:
    write_json(tmp_path / ".launch", note)
    record_launch(tmp_path / ".launch", tmp_path, {})
    assert ledger.read(tmp_path) == [] and not (tmp_path / ".launch").exists()
    note_launch(tmp_path / ".launch", name="a", inputs={"b": "c"}, tokens=1, devices=2, seconds=1.5)
    record_launch(tmp_path / ".launch", tmp_path, {"d": "e"})
    assert [line["outputs"] for line in ledger.read(tmp_path)] == [{"d": "e"}]


def test_a_result_that_was_found_adds_no_line(tmp_path: Path) -> None:
    for made in ("1", "1", "2"):
        finish(tmp_path, "tokenize", inputs={"t": "t"}, outputs={"x": made}, tokens=5)
    finish(tmp_path, "another", inputs={}, outputs={"x": "2"})
    for _ in range(2):
        finish(tmp_path, "train", inputs={}, outputs={}, devices=2, seconds=7200.0, again=True)
    lines = ledger.read(tmp_path)
    assert [(line["stage"], line["outputs"].get("x")) for line in lines] == [
        ("tokenize", "1"),
        ("tokenize", "2"),
        ("another", "2"),
        *[("train", None)] * 2,
    ]
    assert (lines[0]["inputs"], lines[0]["tokens"]) == ({"t": "t"}, 5)
    assert lines[0]["seconds"] > 0 and lines[-1]["device_hours"] == 4


def test_a_folder_to_write_is_empty_or_not_there(tmp_path: Path) -> None:
    require_empty(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    require_empty(tmp_path / "empty")
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists and is not an empty folder; name another, or remove it"):
            require_empty(target)
    with pytest.raises(ValueError, match=r"new cannot be made, because .*/file is a file"):
        require_empty(tmp_path / "file" / "some" / "new")


def test_the_stage_in_the_docstring_runs_once(tmp_path: Path) -> None:
    """`docs` of the module: what a new stage is made of."""
    import megatron_r1.run.stage as module

    lines = str(module.__doc__).splitlines()
    first = next(n for n, line in enumerate(lines) if "def fold" in line)
    body = textwrap.dedent("\n".join(lines[first : lines.index("", first)]))
    names: dict[str, Any] = {**vars(module), "textwrap": textwrap, "write_text": write_text}
    exec(body, names)
    (tmp_path / "text").write_text("some words that are longer than one line")
    for _ in range(2):
        names["fold"](tmp_path / "text", tmp_path / "out", 12)
    assert max(map(len, (tmp_path / "out/folded.txt").read_text().splitlines())) <= 12
    (line,) = ledger.read(tmp_path / "out")
    assert line["inputs"] == {str(tmp_path / "text"): sha256(tmp_path / "text")}
    assert line["outputs"] == {str(tmp_path / "out/folded.txt"): sha256(tmp_path / "out/folded.txt")}


def test_ledger_lines_are_written_here_alone() -> None:
    """Tools hand on what they are asked for; libraries say what they have read and made."""
    paths = [*(ROOT / "megatron_r1").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    writing = {str(p.relative_to(ROOT)) for p in paths if "ledger.append" in p.read_text()}
    assert writing == {"megatron_r1/run/stage.py"}
    assert [p.name for p in paths if p.parent.name == "tools" and "run import" in p.read_text()] == []
