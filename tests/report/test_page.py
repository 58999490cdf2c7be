"""The report of a synthetic run: complete, self-contained, honest about what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_r1 import config_io
from megatron_r1.mixture.mixture import make_mixture
from megatron_r1.records import CAPABILITIES
from megatron_r1.report import load, overhead, page, summary
from megatron_r1.run import ledger

from .conftest import SOURCES, make_arm, make_scores, write_scores

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
LARGEST = 1_500_000


def rendered(root: Path) -> str:
    return page.render(load.read_all(root))


def words_of(html: str) -> str:
    """The page's text, without its style; parsing it as XML proves that every tag is closed."""
    tree = ElementTree.fromstring(html.removeprefix("<!DOCTYPE html>"))
    body = tree.find("body")
    assert body is not None
    return " ".join(" ".join(body.itertext()).split())


def test_page_names_every_source_and_capability_and_figure(whole: Path) -> None:
    text = words_of(rendered(whole))
    assert [name for name in (*SOURCES, *CAPABILITIES) if name not in text] == []
    for heading in (
        "Training loss",
        "Training loss per source",
        "Influence per example",
        "Influence per source and capability",
        "Mixture before and after",
        "Mixture over time",
        "Held-out loss per capability",
        "Epochs per source",
        "Checkpoints",
        "Where the time went",
    ):
        assert heading in text


def test_sentences_say_what_the_data_say(whole: Path) -> None:
    text = words_of(rendered(whole))
    assert "base64 falls from 14.3 % to 0.0 % of the sequences" in text
    assert "python-stdlib rises most, from 14.3 % to 25.0 %" in text
    assert "on average its examples raise the loss of every capability" in text
    assert "base64 harms every capability" in text
    assert "ahead on code by 0.200 and math by 0.080 and behind on knowledge by 0.040" in text
    assert "The mixture stopped drawing base64" in text
    assert "Read more than once: python-stdlib (1.8 times); the rest less" in text
    assert "Measuring influence cost 33 s, 39 % of the time that training the run took" in text


def test_nothing_comes_from_outside(whole: Path) -> None:
    html = rendered(whole)
    assert "<script" not in html and "@import" not in html and "http" not in html
    targets = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"|url\(([^)]*)\)', html)
    assert targets and all((a or b).startswith("#") for a, b in targets)
    assert len(html.encode()) < LARGEST
    links = {a[1:] for a, _ in targets if a}
    assert links <= set(re.findall(r' id="([^"]*)"', html))


def test_same_run_gives_the_same_page(whole: Path) -> None:
    assert rendered(whole) == rendered(whole)


def test_ids_are_unique(whole: Path) -> None:
    found = re.findall(r' id="([^"]*)"', rendered(whole))
    assert len(found) == len(set(found))


def test_without_scores_the_page_names_the_command(pair: Path) -> None:
    text = words_of(rendered(pair))
    assert "influence not measured yet" in text
    assert f"tools/compute_influence.py {pair}/config.yaml" in text
    assert "Influence per example" not in text


def test_without_control_the_page_names_the_command_that_the_trainer_reads(run: Path) -> None:
    text = words_of(rendered(run))
    command = re.search(r"tools/train\.py (.*?phases\.influence\.weights=uniform)", text)
    assert command
    config = config_io.load(command[1].split())
    assert config.train.run == str(run / "control")
    assert config.train.init_from == str(run / "checkpoints" / "step_00000100")
    assert config.phases["influence"].weights == "uniform"


def test_a_run_that_has_just_begun_is_reported(run: Path) -> None:
    lines = run.joinpath("metrics.jsonl").read_text().splitlines()
    run.joinpath("metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    run.joinpath("ledger.jsonl").unlink()
    text = words_of(rendered(run))
    assert "1 steps" not in text and "1 step of" in text
    assert "Only" not in text and "tools/make_mix.py" in text
    assert "the ledger is empty" in text
    assert "No held-out loss was measured yet" in text


def test_a_loss_that_is_no_number_leaves_a_gap(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[60:70]:
        line["loss"] = float("nan")
        line["loss_by_source"] = dict.fromkeys(line["loss_by_source"], float("nan"))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = rendered(run)
    assert "nan" not in " ".join(re.findall(r'(?: d| x| y| cx| cy)="([^"]*)"', html))
    words_of(html)


def test_a_run_whose_every_loss_is_no_number_is_still_reported(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["loss"] = float("nan")
        line["loss_by_source"] = dict.fromkeys(line["loss_by_source"], float("nan"))
        if "probe_nll" in line:
            line["probe_nll"] = dict.fromkeys(line["probe_nll"], float("nan"))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words_of(rendered(run))


def test_names_that_mean_something_in_markup_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {'a<b> & "c"': ("x&y", 5.0), "plain": ("code", 5.0)}
    monkeypatch.setattr("tests.report.conftest.SOURCES", odd)
    make_arm(tmp_path / "r<&>", "second", "uniform", 0, 0.0)
    text = words_of(rendered(tmp_path / "r<&>"))
    assert 'a<b> & "c"' in text and "x&y" in text and "r<&>" in text


def test_a_control_that_is_behind_is_compared_where_both_were_measured(pair: Path) -> None:
    path = pair / "control" / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 160]
    path.write_text("".join(kept))
    reading = load.read_all(pair)
    ends = summary.held_out(reading)
    assert ends is not None and ends.tokens == 150 * 16 * 256
    words_of(page.render(reading))


def test_arms_of_the_same_phase_are_told_apart_by_their_runs(run: Path) -> None:
    make_arm(run / "control", "influence", "uniform", 100, 0.0)
    assert [name for name, _ in load.read_all(run).arms] == ["demo", "control"]


@pytest.mark.parametrize("scale", ["raw", "zscore"])
def test_influence_weighs_as_the_mixture_does(
    whole: Path, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole / "config.yaml").write_text(
        (whole / "config.yaml").read_text().replace("scale: raw", f"scale: {scale}")
    )
    config = config_io.load([str(whole / "config.yaml")])
    # The data plan needs the datasets; what the mixture makes of the scores does not.
    monkeypatch.setattr(
        "megatron_r1.mixture.mixture.open_data", lambda config, use: SimpleNamespace(corpora=[])
    )
    monkeypatch.setattr(
        "megatron_r1.mixture.mixture._Draws.room", lambda draws: np.full(len(SOURCES), np.inf)
    )
    monkeypatch.setattr("megatron_r1.mixture.mixture._Draws.epochs", lambda draws, weights: {})
    mixture, _ = make_mixture(config)
    found = {s.source: s for s in summary.influence(load.read_all(whole))}
    assert np.allclose([found[name].total for name in mixture.sources], mixture.rho_G)
    assert np.allclose([found[name].mean_C for name in mixture.sources], mixture.rho_GC)
    ranked = sorted(mixture.sources, key=lambda name: -mixture.rho_G[mixture.sources.index(name)])
    assert list(found) == ranked and ranked[-1] == "base64"


def test_influence_takes_the_checkpoints_of_the_mixture_that_was_made(whole: Path) -> None:
    made = {"capabilities": list(CAPABILITIES), "steps": [100], "alpha": [[0.5], [0.25], [0.25]]}
    (whole / "mix.json").write_text(json.dumps(made))
    found = {s.source: s for s in summary.influence(load.read_all(whole))}
    table = make_scores()[0]
    mean_C = table.score_NCK[:, :, 2].mean(0)
    assert np.allclose(found[table.source].mean_C, mean_C, rtol=1e-5)
    assert np.isclose(found[table.source].total, mean_C @ [0.5, 0.25, 0.25], rtol=1e-5)


def test_scores_of_one_example_and_of_tiny_size_are_drawn(pair: Path) -> None:
    import dataclasses

    tables = make_scores(examples=1)
    write_scores(pair, [dataclasses.replace(t, score_NCK=t.score_NCK * 1e-7) for t in tables])
    assert "×10⁻" in words_of(rendered(pair))


def test_stages_of_one_kind_are_one_row_and_the_total_is_the_ledgers(whole: Path) -> None:
    costs = summary.stage_costs(load.read_all(whole))
    assert [c.label for c in costs] == [
        "gather text",
        "train uniform",
        "influence (3 stages)",
        "mix",
        "train influence",
        "train control",
    ]
    lines = ledger.read(whole) + ledger.read(whole / "control")
    assert sum(c.seconds for c in costs) == pytest.approx(sum(line["seconds"] for line in lines))
    assert summary.seconds_of(costs, "train") == pytest.approx(84.0)
    assert summary.ranks(load.read_run(whole)) == 2


def test_overhead_of_choosing_data_stands_beside_the_papers(whole: Path) -> None:
    """(3 x 11 x 2 + 1.2 + 36 x 2) / (that + (48 + 36) x 2) device-seconds; 6,800 / 45,400 hours."""
    table = overhead.overhead(load.read_all(whole))
    assert table is not None
    text = words_of(f"<html><body>{table.html()}</body></html>")
    assert "leave-one-out and control runs 0.02 400 h" in text
    assert "training 0.05 38,600 h" in text
    assert "choosing, of the whole 45 % 15 %" in text


def test_a_stage_that_ran_again_counts_twice(run: Path) -> None:
    ledger.append(run, "train influence", devices=2, tokens=4096, seconds=5.0)
    cost = next(c for c in summary.stage_costs(load.read_all(run)) if c.label.startswith("train influence"))
    assert cost.label == "train influence, 2 times" and cost.seconds == pytest.approx(41.0)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_tool_writes_the_page_and_says_where(whole: Path) -> None:
    done = call(whole)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()) == whole / "reports" / "index.html"
    assert (whole / "reports" / "index.html").read_text() == rendered(whole)


@pytest.mark.parametrize("spoil", ["nothing there", "no metrics", "no such control", "broken mix"])
def test_a_mistake_is_one_line_and_status_2(run: Path, spoil: str) -> None:
    arguments: list[object] = [run]
    if spoil == "nothing there":
        arguments = [run.parent / "absent"]
    elif spoil == "no metrics":
        (run / "metrics.jsonl").write_text("")
    elif spoil == "no such control":
        arguments += ["--control", run / "absent"]
    else:
        (run / "mix.json").write_text("{")
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (run / "reports").exists()


def test_help_has_an_example() -> None:
    assert "python tools/report.py runs/quickstart --control" in call("--help").stdout


def test_report_needs_no_torch() -> None:
    code = "import sys, megatron_r1.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
