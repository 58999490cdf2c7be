"""A ledger tells what each stage read, made and cost; hashes lead from a run to the stages it stands on."""

from __future__ import annotations

import json
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
     {"inputs": {"a\0b": "c"}}],
)  # fmt: skip
def test_a_line_of_other_types_is_no_stage(tmp_path: Path, bad: dict[str, object]) -> None:
    ledger.append(tmp_path, "train", seconds=1.0, inputs={"a" * 5000: "b"})
    (line,) = ledger.read(tmp_path)
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write(json.dumps({**line, **bad}) + "\n" + "[" * 100_000 + "\n")
    assert ledger.read(tmp_path) == [line] and ledger.lineage(tmp_path) == []
    assert ledger.describe_damage(tmp_path).startswith(f"{tmp_path}/ledger.jsonl: 2 of its lines cannot be")
