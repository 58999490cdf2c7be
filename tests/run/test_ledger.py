"""A ledger tells what each stage read, made and cost; hashes lead from a run to the stages it stands on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_r1.run import ledger


def test_a_line_says_what_the_stage_read_made_and_cost(tmp_path: Path) -> None:
    ledger.append(tmp_path, "train a", devices=168, tokens=5, seconds=7200.0, inputs={"x": "1"})
    (line,) = ledger.read(tmp_path)
    assert (line["stage"], line["tokens"], line["inputs"], line["outputs"]) == ("train a", 5, {"x": "1"}, {})
    assert line["device_hours"] == 2 * 168


def test_lineage_follows_hashes_through_the_ledgers_beside_the_inputs(tmp_path: Path) -> None:
    text, tokens, run = (tmp_path / name for name in ("text", "tokens", "run"))
    ledger.append(text, "gather", seconds=1.0, outputs={str(text / "a.jsonl"): "A"})
    ledger.append(tokens, "tokenize a", inputs={str(text / "a.jsonl"): "A"}, outputs={"tokens/a": "a"})
    # Of another run's data, and of this run's before it was made again.
    ledger.append(tokens, "tokenize b", inputs={str(text / "b.jsonl"): "B"}, outputs={"tokens/b": "b"})
    ledger.append(tokens, "tokenize a", inputs={str(text / "a.jsonl"): "A"}, outputs={"tokens/a": "old"})
    # Shards, told in the same folder as what they were merged into.
    ledger.append(tokens, "shard c", outputs={"tokens/c_shard": "half"})
    ledger.append(tokens, "merge c", inputs={str(tokens / "c_shard"): "half"}, outputs={"tokens/c": "c"})
    ledger.append(
        run,
        "train",
        inputs={str(tokens / "a"): "a", str(tokens / "c"): "c"},
        outputs={str(run / "step"): "s"},
    )
    ledger.append(run, "influence", inputs={str(tokens / "a"): "a", str(run / "step"): "s"})
    found = [line["stage"] for line in ledger.lineage(run)]
    assert sorted(found) == ["gather", "merge c", "shard c", "tokenize a"]


def test_a_line_that_was_cut_short_costs_no_other(tmp_path: Path) -> None:
    """As a full disk leaves it; what is no stage is none."""
    ledger.append(tmp_path, "one", seconds=1.0)
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('null\n{"stage": "x"}\n{"stage": "tw')
    for stage in ("three", "four"):
        ledger.append(tmp_path, stage, seconds=1.0)
    assert [line["stage"] for line in ledger.read(tmp_path)] == ["one", "three", "four"]


@pytest.mark.parametrize("told", [["a.bin"], None])
def test_lines_without_hashes_lead_nowhere(tmp_path: Path, told: object) -> None:
    line = {"stage": "train", "finished": "", "outputs": told, "seconds": 1.0}
    line |= {"devices": 1, "device_hours": 0.0, "tokens": 0}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    assert len(ledger.read(tmp_path)) == 1 and ledger.lineage(tmp_path) == []


@pytest.mark.parametrize(
    "bad",
    [{"stage": 3}, {"stage": " "}, {"seconds": "a"}, {"seconds": float("nan")}, {"tokens": None},
     {"devices": "2"}, {"devices": 2.0}, {"device_hours": -1.0}, {"finished": 3}, {"outputs": 3},
     {"outputs": "a.bin"}, {"outputs": [3]}, {"inputs": {"a": ["b"]}}, {"inputs": {"a": {}}},
     {"inputs": {"a\0b": "c"}}, {"stage": "\ud800"}, {"outputs": {"\ud800": "c"}}, {"devices": True},
     {"devices": 1 << 21}, {"tokens": 1 << 63}, {"seconds": 1e300}, {"device_hours": float("inf")}],
)  # fmt: skip
def test_a_line_of_other_types_is_no_stage(tmp_path: Path, bad: dict[str, object]) -> None:
    ledger.append(tmp_path, "train", seconds=1.0, inputs={"a" * 5000: "b"})
    (line,) = ledger.read(tmp_path)
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write(json.dumps({**line, **bad}) + "\n" + "[" * 100_000 + "1" + "]" * 100_000 + "\n")
    assert ledger.read(tmp_path) == [line] and ledger.lineage(tmp_path) == []
    assert ledger.describe_damage(tmp_path).startswith(f"{tmp_path}/ledger.jsonl: 2 of its lines cannot be")


def test_lineage_ends_whatever_the_paths_are(tmp_path: Path) -> None:
    """Links in a circle, pipes and folders in place of ledgers, ledgers in a circle, paths that are none."""
    run, beside = tmp_path / "run", tmp_path / "beside"
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe.side", "folder.side/ledger.jsonl", "null.side"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.side" / "ledger.jsonl")
    (tmp_path / "null.side" / "ledger.jsonl").symlink_to("/dev/zero")
    strange = [
        "/",
        ".",
        "..",
        "",
        "a" * 5000,
        "/".join(["a"] * 5000),
        "/dev/null/x",
        "\ud7ff",
        "x/../..",
        "\n",
    ]
    paths = [*strange, *(str(tmp_path / name) for name in ("loop", "loop/x", "pipe", "folder", "null"))]
    ledger.append(run, "train", inputs=dict.fromkeys([*paths, str(beside / "a")], "A"), outputs={"b": "B"})
    ledger.append(beside, "make a", inputs={str(run / "b"): "B"}, outputs={"a": "A"})
    (tmp_path / "again").symlink_to(beside)
    ledger.append(run, "train again", inputs={str(tmp_path / "again" / "a"): "A"}, outputs={"b": "B"})
    assert [line["stage"] for line in ledger.lineage(run)] == ["make a"]


def test_lineage_costs_as_much_as_there_is_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 5,000 stages, each of which made the next one's input: about a second, not minutes."""
    run, folder = tmp_path / "run", tmp_path / "tokens"
    ledger.append(run, "train", inputs={str(folder / "x"): "0"})
    ledger.append(folder, "0", inputs={str(folder / "x"): "1"}, outputs={"x": "0"})
    (line,), path, began = ledger.read(folder), folder / "ledger.jsonl", time.process_time()
    of = (
        {"stage": f"{n}", "inputs": {str(folder / "x"): f"{n + 1}"}, "outputs": {"x": f"{n}"}}
        for n in range(5000)
    )
    path.write_text("".join(json.dumps({**line, **one}) + "\n" for one in of))
    assert len(ledger.lineage(run)) == 5000 and time.process_time() - began < 20
    monkeypatch.setattr(ledger, "MOST_LEDGER", path.stat().st_size - 1)
    assert ledger.lineage(run) == [] and len(ledger.read(folder)) == 4999
    assert ": 1 of its lines cannot be read" in ledger.describe_damage(folder)


def test_a_line_that_never_ends_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MOST_LINE", 1000)
    path = tmp_path / "lines.jsonl"
    for end, last in (("\n", [{"b": 2}]), ("", [])):
        path.write_text('{"a": 1}\n' + "[" * 5000 + end + '{"b": 2}' + end)
        assert [*ledger.read_jsonl(path, bool)] == [{"a": 1}, None, *last]


def test_a_ledger_that_is_a_link_or_a_pipe_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "ledger.jsonl").symlink_to("victim")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "ledger.jsonl")
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(OSError, match=r"ledger\.jsonl is a (link|pipe)"):
            ledger.append(folder, "train")
    assert (tmp_path / "victim").read_text() == "mine"
