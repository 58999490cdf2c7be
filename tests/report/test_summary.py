"""Numbers of a report against what is plain to see."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from megatron_r1 import config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.mixture.mixture import make_mixture
from megatron_r1.records import CAPABILITIES
from megatron_r1.report import load, summary, tables
from megatron_r1.run import ledger

from .conftest import SOURCES, TOKENS, change, make_arm, make_scores, save, scores_of


def test_columns_are_the_lines_that_can_be_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run, lambda line: line.update(loss=float("nan")) if line["step"] == 3 else None)
    path = run / "metrics.jsonl"
    path.write_text("{\n" + path.read_text() + '{"step": 176')
    found = load.read_run(run)
    assert "1 of its lines cannot be read" in capsys.readouterr().err
    assert (found.phases, found.end["step"]) == (["uniform", "influence"], 175)
    assert found.spans == [("uniform", 0.0, 100 * TOKENS), ("influence", 100 * TOKENS, 175 * TOKENS)]
    assert len(found.points("loss")[0]) == 174 and len(found.columns["rank_me"]) == 175
    assert found.points("rank_me")[1].tolist() == [12.5, 15, 17.5, 20, 22.5, 25, 27.5]
    assert found.measured("probe_nll") == list(CAPABILITIES)


def test_a_phase_names_its_objective(run: Path) -> None:
    config = run / "config.yaml"
    given = yaml.safe_load(config.read_text())
    given["phases"]["influence"]["objective"] = {"name": "kd", "teacher": "models/teacher"}
    config.write_text(yaml.safe_dump(given, sort_keys=False))
    table = [[cell.text for cell in row] for row in tables.phases(load.read_all(run)).rows]
    assert {row[0]: row[1:] for row in table}["objective"] == ["next token", "kd of models/teacher"]


def test_smoothing_does_not_mix_phases(run: Path) -> None:
    change(run, lambda line: line.update(loss=1.0 if line["step"] <= 100 else 3.0))
    found = load.read_run(run)
    at, calm = summary.calm(found, found.points("loss"))
    assert set(calm) == {1.0, 3.0} and (calm[at <= 100 * TOKENS] == 1.0).all() and at[-1] == 175 * TOKENS


def test_a_control_that_is_behind_is_compared_where_both_were_measured(pair: Path) -> None:
    path = pair / "control" / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 160]
    path.write_text("".join(kept))
    reading = load.read_all(pair)
    ends = summary.held_out(reading)
    assert ends is not None and ends[0] == 150 * TOKENS
    assert ends[1]["control"]["code"] - ends[1]["influence"]["code"] == pytest.approx(0.2 * 50 / 75)
    assert summary.fork(reading) == 100 * TOKENS


@pytest.mark.parametrize("scale", ["raw", "zscore"])
def test_scores_weigh_as_in_the_mixture(whole: Path, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (whole / "config.yaml").read_text().replace("scale: raw", f"scale: {scale}")
    (whole / "config.yaml").write_text(text)
    # The data plan needs the datasets; what the mixture makes of the scores does not.
    opened, draws = SimpleNamespace(corpora=[]), "megatron_r1.mixture.mixture._Draws"
    monkeypatch.setattr("megatron_r1.mixture.mixture.open_data", lambda config, use: opened)
    planned = SimpleNamespace(epochs=lambda sample: {})
    monkeypatch.setattr("megatron_r1.mixture.mixture.build_plan", lambda config, corpora: planned)
    monkeypatch.setattr(f"{draws}.room", lambda draws, config: np.full(len(SOURCES), np.inf))
    monkeypatch.setattr(f"{draws}.epochs", lambda draws, weights: {})
    mixture, _ = make_mixture(config_io.load([str(whole / "config.yaml")]))
    scores = scores_of(whole)
    found = {s.source: s for s in scores.sources}
    assert np.allclose([found[name].joint for name in mixture.sources], mixture.rho_G)
    assert np.allclose([found[name].mean_C for name in mixture.sources], mixture.rho_GC)
    assert np.allclose([s.joint for s in scores.sources], sorted(mixture.rho_G, reverse=True))
    assert scores.sources[-1].source == "base64" and "curvature" in scores.unit


def test_influence_takes_the_checkpoints_of_the_mixture_that_was_made(whole: Path) -> None:
    made = {"capabilities": list(CAPABILITIES), "steps": [100], "alpha": [[0.5], [0.25], [0.25]]}
    weights = dict(zip(CAPABILITIES, (0.5, 0.25, 0.25), strict=True))
    (whole / "mix.json").write_text(json.dumps(made | {"mix": {"capability_weight": weights}}))
    scores, table = scores_of(whole), make_scores()[0]
    found = next(s for s in scores.sources if s.source == table.source)
    mean_C = table.score_NCK[:, :, 2].mean(0)
    assert np.allclose(found.mean_C, mean_C, rtol=1e-5)
    assert np.isclose(found.joint, mean_C @ [0.5, 0.25, 0.25], rtol=1e-5)
    assert found.helping == (table.score_NCK[:, :, 2] @ [0.5, 0.25, 0.25] > 0).mean()


def test_agreement_by_hand(whole: Path) -> None:
    scores = scores_of(whole)
    same = [replace(t, score_NCK=t.score_NCK[:, :, [0, 0]], steps=(50, 75)) for t in scores.tables]
    assert summary.agreement(replace(scores, tables=same)) == [(50, 75, pytest.approx([1.0] * 6))]
    assert summary.spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    # Ties share their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert summary.spearman([5, 5, 9], [1, 2, 3]) == pytest.approx(np.sqrt(0.75))
    assert np.isnan(summary.spearman([1, 1, 1], [0, 1, 2]))


def test_stages_of_one_kind_are_one_row_and_one_that_ran_again_counts_twice(whole: Path) -> None:
    ledger.append(whole, "train influence", devices=2, tokens=4096, seconds=5.0)
    costs = summary.stage_costs(load.read_all(whole))
    told = {c.label: (c.kind, pytest.approx(c.seconds)) for c in costs}
    assert told == {
        "gather text": ("other", 21.0),
        "train uniform": ("train", 48.0),
        "influence (3 stages)": ("influence", 33.0),
        "mix": ("other", 1.2),
        "train influence, 2 times": ("train", 41.0),
        "train control": ("train control", 36.0),
    }
    assert summary.ranks(load.read_run(whole)) == 2


def test_overhead_of_choosing_data_stands_beside_the_papers(whole: Path) -> None:
    """(3 x 11 x 2 + 1.2 + 36 x 2) / (that + (48 + 36) x 2) device-seconds; 6,800 / 45,400 hours."""
    (table,) = tables.overhead(summary.stage_costs(load.read_all(whole)))
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows[2] == ["leave-one-out and control runs", "0.02", "400 h"]
    assert rows[-1] == ["choosing, of the whole", "45\xa0%", "15\xa0%"]


@pytest.mark.parametrize("stage", ["set probes aside", "curate probes"])
def test_probing_sets_have_a_row_among_the_costs(whole: Path, stage: str) -> None:
    ledger.append(whole, stage, devices=8, seconds=1800.0)
    (table,) = tables.overhead(summary.stage_costs(load.read_all(whole)))
    assert [cell.text for cell in table.rows[0]] == ["representative and probing sets", "4", "200 h"]


def test_checkpoints_with_what_was_measured_at_them_and_why_they_stay(whole: Path) -> None:
    save(whole, 50, 75, 100, 110, 175, size=40 << 10)
    directory = whole / "checkpoints"
    (directory / ".step_00000120.tmp").mkdir()
    (directory / "step_00000075" / checkpoint_files.META).write_text("{")
    reading = load.read_all(whole)
    saved = summary.checkpoints(reading)
    complete = [one for one in saved if one.complete]
    assert [one.path.name for one in saved if not one.complete] == [".step_00000120.tmp", "step_00000075"]
    rows = [[cell.text for cell in row] for row in tables.checkpoints(reading.run, complete).rows]
    assert [row[0] for row in rows] == ["50", "100", "110", "175"]
    assert (rows[1][1:3], rows[1][-2:]) == (["410\xa0k", "uniform"], ["scored", "end of uniform"])
    assert rows[2][3].startswith("40.") and rows[2][4] == "–"


def test_why_a_checkpoint_is_kept_is_what_retention_goes_by(run: Path) -> None:
    config = load.read_run(run).config
    train = replace(config.train, keep_last=1, keep_every=40, keep_spaced=2)
    assert config.influence is not None
    config = replace(config, train=train, influence=replace(config.influence, steps=[60]))
    why = {step: summary.pinned_as(config, step) for step in (30, 40, 50, 60, 100, 138, 175)}
    assert (why[30], why[40], why[50]) == ("", "train.keep_every", "train.keep_spaced")
    assert (why[60], why[100], why[175]) == ("influence.steps", "end of uniform", "end of influence")


def test_the_control_s_command_is_one_that_the_trainer_reads(run: Path) -> None:
    command = summary.control_command(load.read_run(run))
    config = config_io.load(command.partition("tools/train.py ")[2].split())
    assert config.train.run == str(run / "control")
    assert config.train.init_from == str(run / "checkpoints" / "step_00000100")
    assert config.phases["influence"].weights == "uniform"


def test_arms_of_the_same_phase_are_told_apart_by_their_runs(run: Path) -> None:
    make_arm(run / "control", "influence", "uniform", 100, 0.0)
    assert list(load.read_all(run).arms) == ["demo", "control"]


def test_numbers_as_they_are_written() -> None:
    counts = [tables.count(value) for value in (0, 716_800, 999_700, 3.997e12)]
    assert counts == ["0", "717\xa0k", "1\xa0M", "4\xa0T"] and tables.size(43 << 20) == "43\xa0MiB"
    times = [tables.duration(value) for value in (9.96, 59.7, 3_599.6)]
    assert times == ["10\xa0s", "1\xa0min 00\xa0s", "1\xa0h 00\xa0min"]
    assert [tables.signed(value) for value in (-0.0004, -0.0412)] == ["0.000", "−0.041"]


def lose(run: Path, *steps: int) -> None:
    """Drop the lines of these steps."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] not in steps))


@pytest.mark.parametrize(
    ("steps", "lost"),
    [
        ([7, 8, 40], [(7, 8), (40, 40)]),
        (range(171, 176), [(171, 175)]),
        (range(1, 4), [(1, 3)]),
        ([], []),
    ],
)
def test_lost_lines_are_known_and_told(
    run: Path, steps: list[int], lost: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 100, 175)
    lose(run, *steps)
    found = load.read_run(run)
    assert found.lost == lost and ("has lost the lines of step" in capsys.readouterr().err) == bool(lost)
    assert found.reach == 175 * TOKENS


def test_lines_of_the_ledger_that_cannot_be_read_are_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(run / "ledger.jsonl", "a") as file:
        file.write('{"stage": "train\n{"stage": "mi')
    load.read_run(run)
    assert "ledger.jsonl: 1 of its lines cannot be read" in capsys.readouterr().err


def test_a_run_without_lines_and_with_checkpoints_has_lost_them(run: Path) -> None:
    save(run, 100)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has lost its lines, for step 100 was saved"):
        load.read_run(run)


def test_a_control_and_a_branch_have_lost_nothing_of_before_the_fork(pair: Path) -> None:
    assert load.read_all(pair).control.lost == []  # type: ignore[union-attr]
    text = (pair / "control" / "config.yaml").read_text()
    (pair / "control" / "config.yaml").write_text(
        text.replace("init_from: null", f"init_from: {pair}/checkpoints/step_00000100")
    )
    assert load.read_run(pair / "control").lost == []


@pytest.mark.parametrize("line", ['{"step": 3, "phase": [1], "tokens": 5}', '{"step": null, "phase": "one"}'])
def test_a_line_of_other_types_is_a_damaged_one(
    run: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    assert load.read_run(run).end["step"] == 175
    assert "1 of its lines cannot be read" in capsys.readouterr().err


def test_steps_out_of_order_and_twice_are_steps_in_order_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    whole, lines = load.read_run(run), path.read_text().splitlines(keepends=True)
    wrong = lines[40].replace('"loss": ', '"loss": 1')
    path.write_text("".join([wrong, *lines[::-1], lines[3]]))
    found = load.read_run(run)
    assert found.columns["loss"].tolist() == whole.columns["loss"].tolist()
    assert (found.first, found.last, found.phases) == (whole.first, whole.last, whole.phases)
    assert "2 lines too many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "launch"),
    [(8, "--nproc-per-node 8"), (16, "--nnodes 2 --nproc-per-node 8"), (17, "--nnodes 17 --nproc-per-node 1"),
     (18, "--nnodes 3 --nproc-per-node 6"), (20, "--nnodes 4 --nproc-per-node 5")],
)  # fmt: skip
def test_a_command_starts_as_many_ranks_as_trained(run: Path, ranks: int, launch: str) -> None:
    ledger.append(run, "train influence", devices=ranks, seconds=1.0)
    assert summary.launch(load.read_run(run), "train").startswith(f"torchrun {launch} tools/train.py")


def test_a_control_of_a_run_that_began_with_weights_is_a_command_that_loads(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("init_weights: null", "init_weights: other/step_00000009"))
    words = summary.control_command(load.read_run(run)).partition("tools/train.py ")[2].split()
    train = config_io.load(words).train
    assert (train.init_from, train.init_weights) == (f"{run}/checkpoints/step_00000100", None)
