"""Checkpoints on the page: which there are, how large, why they stay, what is not whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_r1 import config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.records import TrainState
from megatron_r1.report import checkpoints, load
from megatron_r1.report.words import SPACE

from .conftest import make_scores, write_scores


def save(run: Path, steps: list[int], size: int = 1000) -> None:
    """Complete checkpoints with one file of `size` bytes beside the description."""
    directory = run / "checkpoints"
    config = config_io.load([str(run / "config.yaml")])
    for step in steps:
        temporary = checkpoint_files.begin(directory, step)
        (temporary / "__0_0.distcp").write_bytes(bytes(size))
        facts = checkpoint_files.facts_of([temporary / "__0_0.distcp"])
        final = checkpoint_files.step_path(directory, step)
        state = TrainState(step, step * 16, step * 4096)
        checkpoint_files.publish(temporary, final, facts, state, config.model, "any", "{}")
        checkpoint_files.release(directory)


def change(run: Path, **train: int) -> Config:
    config = config_io.load([str(run / "config.yaml")])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    (run / "config.yaml").write_text(config_io.dump(config))
    return config


def rows(run: Path) -> dict[str, dict[str, str]]:
    """Step -> column -> what the table says."""
    (table,) = checkpoints.figure(load.read_all(run)).tables
    return {row[0].said: {n: c.said for n, c in zip(table.head, row, strict=True)} for row in table.rows}


def test_each_is_told_with_what_was_measured_at_it(run: Path) -> None:
    save(run, [50, 75, 100, 110, 175], size=40 << 10)
    write_scores(run, make_scores(examples=2))
    found = rows(run)
    line = next(line for line in load.read_run(run).metrics if line["step"] == 100)
    at_100 = found["100"]
    assert (at_100["tokens"], at_100["phase"]) == (f"410{SPACE}k", "uniform")
    assert at_100["held-out math"] == f"{line['probe_nll']['math']:.3f}"
    assert (at_100["influence"], at_100["kept for good"]) == ("scored", "end of uniform")
    assert found["110"]["held-out math"] == "–" and found["110"]["phase"] == "influence"
    assert [found[step]["influence"] for step in ("50", "75", "175")] == ["scored", "scored", "–"]
    files = sum(p.stat().st_size for p in (run / "checkpoints" / "step_00000110").iterdir())
    assert found["110"]["size"] == f"{files / 1024:.1f}{SPACE}KiB" and files > 40 << 10


def test_the_lead_says_where_the_newest_is_and_how_to_go_on(run: Path) -> None:
    save(run, [25, 150])
    figure = checkpoints.figure(load.read_all(run))
    newest = run / "checkpoints" / "step_00000150"
    assert figure.lead.startswith("2 complete checkpoints, ") and f"the newest is {newest}" in figure.lead
    assert "The run came 25 steps further, which would be trained again." in figure.lead
    assert figure.command == f"torchrun --nproc-per-node 2 tools/train.py {run}/config.yaml"
    save(run, [175])
    lead = checkpoints.figure(load.read_all(run)).lead
    assert "The recipe ends there" in lead and "further" not in lead


def test_what_saving_cost_is_told_where_it_was_recorded(run: Path) -> None:
    save(run, [25])
    assert "saving held" not in checkpoints.figure(load.read_all(run)).note
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["seconds"], line["saving_seconds"] = 0.9, 3.0 if line["step"] == 26 else 0.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(lines) == 175
    said = checkpoints.figure(load.read_all(run)).note
    # 3 s beside 175 steps of 0.9 s.
    assert f"saving held the first rank up for 3.0{SPACE}s in all, 1.9{SPACE}% of their time;" in said


def test_why_a_checkpoint_is_kept_is_what_retention_goes_by(run: Path) -> None:
    config = change(run, keep_last=1, keep_every=40, keep_spaced=2)
    assert config.influence is not None
    config = dataclasses.replace(config, influence=dataclasses.replace(config.influence, steps=[60]))
    why = {step: checkpoints.pinned_as(config, step) for step in (30, 40, 50, 60, 100, 138, 175)}
    assert why == {
        30: "",
        40: "train.keep_every",
        50: "train.keep_spaced",
        60: "influence.steps",
        100: "end of uniform",
        138: "train.keep_spaced",
        175: "end of influence",
    }


def test_what_is_not_complete_is_told_and_counts_as_none(run: Path) -> None:
    save(run, [25, 50, 75])
    directory = run / "checkpoints"
    (directory / ".step_00000100.tmp").mkdir()
    (directory / "step_00000075" / checkpoint_files.META).unlink()
    (directory / "step_00000050" / checkpoint_files.META).write_text("{")
    figure = checkpoints.figure(load.read_all(run))
    assert figure.lead.startswith("1 complete checkpoint, ") and "step_00000025, after" in figure.lead
    assert "Not complete: .step_00000100.tmp, being written" in figure.lead
    assert "Not complete: step_00000050 and step_00000075, whose description is missing or" in figure.lead
    assert list(rows(run)) == ["25"]


def test_many_are_a_timeline_and_a_few_rows(run: Path) -> None:
    steps = [step for step in range(3, 101) if step % 2 or step == 100] + [175]
    save(run, steps, size=1)
    figure = checkpoints.figure(load.read_all(run))
    found = list(rows(run))
    assert len(found) == 12 and {"99", "100", "175"} <= set(found)
    tips = [tip.text for tip in ElementTree.fromstring(figure.body).iter("title")]
    assert [f"step {step}, complete" for step in steps] == [tip for tip in tips if "complete" in str(tip)]
    assert [tip for tip in tips if "kept" in str(tip)] == [f"step {s}, kept for good" for s in (100, 175)]


def test_none_is_said_with_the_command_that_makes_one(run: Path) -> None:
    figure = checkpoints.figure(load.read_all(run))
    assert figure.lead.startswith(f"No complete checkpoint lies in {run}/checkpoints.")
    assert figure.command.startswith("torchrun") and not figure.tables


@pytest.mark.parametrize(
    ("ranks", "said"),
    [(2, "--nproc-per-node 2"), (24, "--nnodes 3 --nproc-per-node 8"), (8, "--nproc-per-node 8")],
)
def test_the_command_starts_as_many_ranks_as_trained(run: Path, ranks: int, said: str) -> None:
    ledger = (run / "ledger.jsonl").read_text().replace('"devices": 2', f'"devices": {ranks}')
    (run / "ledger.jsonl").write_text(ledger)
    assert f"torchrun {said} tools/train.py" in checkpoints.figure(load.read_all(run)).command
