"""Figures as data: the rows that a chart carries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.report import distillation, load, plots, summary
from megatron_r1.report.page import Report

from .conftest import LENGTH, MIXED, SOURCES, TOKENS, change, make_scores, save, scores_of, write_scores


def rows(panel: Any, layer: int | None = None) -> list[dict[str, Any]]:
    """Data of a panel or a layer; the specification is checked against the schema of Vega-Lite."""
    spec = panel.to_dict()
    data = spec.get("data") if layer is None else spec["layer"][layer].get("data")
    return list((data or spec["layer"][0]["data"])["values"])


def test_every_figure_is_valid_vega_lite(whole: Path) -> None:
    save(whole, 50, 100)
    impact = {"code": {s: 0.1 * i for i, s in enumerate(SOURCES)}}
    (whole / "measured_impact.json").write_text(json.dumps(impact))
    figures = {f.anchor: f for f in Report(load.read_all(whole)).figures}
    assert list(figures) == list(plots.PAGE["figures"])
    for figure in figures.values():
        for panel in figure.panels:
            panel.to_dict()


def test_curves_carry_the_measurements_and_the_control_begins_at_the_fork(pair: Path) -> None:
    panels = plots.held_out(load.read_all(pair))
    assert [panel.title.text for panel in panels[::3]] == ["code", "code, from the fork on"]
    found = rows(panels[0])
    control = [(row["tokens"], row["value"]) for row in found if row["name"] == "control"]
    ours = {row["tokens"]: row["value"] for row in found if row["name"] == "influence"}
    assert len(ours) == 7 and [at for at, _ in control] == [step * TOKENS for step in (100, 125, 150, 175)]
    assert control[0][1] == ours[100 * TOKENS]
    assert control[-1][1] - ours[175 * TOKENS] == pytest.approx(0.2, abs=1e-5)
    assert min(row["tokens"] for row in rows(panels[3])) == 100 * TOKENS
    # The control has no count of tokens before its first step, only its phase's share so far.
    forked = load.read_run(pair / "control")
    assert forked.first["step"] == 101
    assert summary.drawn(forked)[0][3] == pytest.approx(forked.first["mix_actual"])


def test_gold_answers_have_a_panel_a_set_with_both_arms(pair: Path) -> None:
    panels = plots.gold(load.read_all(pair))
    assert [panel.title.text for panel in panels] == ["gsm8k", "mbpp"]
    lines = [json.loads(line) for line in (pair / "metrics.jsonl").read_text().splitlines()]
    measured = {line["tokens"]: line["gold_bpb"]["mbpp"] for line in lines if "gold_bpb" in line}
    found = rows(panels[1])
    ours = {row["tokens"]: row["value"] for row in found if row["name"] == "influence"}
    assert ours == pytest.approx(measured, rel=1e-5)
    assert len(measured) == 7 and {row["name"] for row in found} == {"influence", "control"}


def test_distillation_has_both_arms_and_begins_with_the_first_step_that_has_a_teacher(pair: Path) -> None:
    panels = distillation.panels(load.read_all(pair))
    assert [panel.title.text for panel in panels] == ["KL(teacher || student)", "cross-entropy", "agreement"]
    lines = [json.loads(line) for line in (pair / "metrics.jsonl").read_text().splitlines()]
    for panel, name in zip(panels, ("kl", "ce", "agreement"), strict=True):
        found = [row for row in rows(panel) if row["kind"] == "raw"]
        measured = {line["tokens"]: line["kd"][name] for line in lines if "kd" in line}
        ours = {row["tokens"]: row["value"] for row in found if row["name"] == "influence"}
        assert ours == pytest.approx(measured, rel=1e-5) and len(ours) == 75
        assert {row["tokens"] for row in found if row["name"] == "control"} == set(ours)
        x = panel.to_dict()["layer"][0]["layer"][0]["encoding"]["x"]
        assert x["scale"]["domain"][0] == min(ours) == 101 * TOKENS
    raw = [row for row in rows(panels[1]) if row["kind"] == "raw" and row["name"] == "teacher's entropy"]
    entropies = {line["tokens"]: line["kd"]["teacher_entropy"] for line in lines if "kd" in line}
    assert {row["tokens"]: row["value"] for row in raw} == pytest.approx(entropies, rel=1e-5)
    # A run without a teacher has no figure; a control alone that has one has its own.
    change(pair, lambda line: line.pop("kd", None))
    alone = distillation.panels(load.read_all(pair))
    assert {row["name"] for row in rows(alone[0])} == {"control"}
    change(pair / "control", lambda line: line.pop("kd", None))
    assert distillation.panels(load.read_all(pair)) == []


def test_skipped_steps_are_marked_and_a_loss_that_is_no_number_leaves_a_gap(run: Path) -> None:
    def edit(line: dict[str, Any]) -> None:
        if line["step"] in (40, 90):
            line.update(skipped=1, loss=float("nan"), loss_by_source=dict.fromkeys(SOURCES, float("nan")))

    change(run, edit)
    reading = load.read_all(run)
    (panel,) = plots.loss(reading)
    assert [row["step"] for row in rows(panel, -1)] == [40, 90]
    raw = [row["tokens"] / TOKENS for row in rows(panel, 0) if row["kind"] == "raw"]
    assert raw == [step for step in range(1, 176) if step not in (40, 90)]


def test_lost_steps_are_a_shaded_stretch_that_the_axis_reaches(pair: Path) -> None:
    save(pair, 175)
    lines = (pair / "metrics.jsonl").read_text().splitlines(keepends=True)
    (pair / "metrics.jsonl").write_text("".join(lines[:19] + lines[24:150]))
    reading = load.read_all(pair)
    (panel,) = plots.loss(reading)
    found = [(row["arm"], row["first"], row["last"], row["tokens"], row["end"]) for row in rows(panel, -2)]
    assert [of[1:3] for of in found] == [(20, 24), (151, 175)] and found[0][0] == "influence"
    assert [of[3:] for of in found] == [
        pytest.approx((a * TOKENS, b * TOKENS)) for a, b in ((19, 24), (150, 175))
    ]
    x = panel.to_dict()["layer"][0]["layer"][0]["encoding"]["x"]
    assert x["scale"]["domain"][1] == pytest.approx(1.01 * 175 * TOKENS)
    # Nothing is marked where nothing is lost.
    (pair / "metrics.jsonl").write_text("".join(lines))
    (whole,) = plots.loss(load.read_all(pair))
    assert len(whole.layer) == len(panel.layer) - 1


def test_sources_of_one_domain_differ_in_colour() -> None:
    shades = plots.colors({f"s{n}": "code" if n < 13 else "math" for n in range(20)})
    assert len({*shades.values()}) == 20
    for mode in (0, 1):
        assert len({plots.COLORS[shade[6:-1]][mode] for shade in shades.values()}) == 20


def test_long_curves_are_thinned_and_keep_their_extremes(run: Path) -> None:
    reading = load.read_all(run)
    steps = np.arange(1.0, 1_000_001)
    loss = 5 + np.random.default_rng(0).random(len(steps))
    loss[777_777] = 9.0
    last = {"uniform": reading.run.last["uniform"] | {"tokens": float(steps[-1] * TOKENS)}}
    columns = {"tokens": steps * TOKENS, "step": steps, "loss": loss}
    long = replace(reading.run, columns=columns, last=last)
    found = rows(plots.loss(replace(reading, run=long))[0], 0)
    assert len(found) < 500 and max(row["value"] for row in found) == 9.0
    assert {found[0]["tokens"], max(row["tokens"] for row in found)} == {TOKENS, steps[-1] * TOKENS}


def test_a_steps_draws_are_what_its_line_has_more_than_the_line_before(run: Path) -> None:
    def edit(line: dict[str, Any]) -> None:
        done = min(line["step"], 60), max(0, line["step"] - 60)
        counts = {"sympy": 8 * done[0] + 4 * done[1], "gcide": 8 * done[0], "base64": 12 * done[1]}
        line["tokens_by_source"] = dict.fromkeys(SOURCES, 0) | {s: n * LENGTH for s, n in counts.items()}
        line["phase"] = "uniform" if line["step"] <= 60 else "influence"

    change(run, edit)
    reading = load.read_all(run)
    shares = {phase: of for phase, _, _, of in summary.drawn(reading.run)}
    assert {s: v for s, v in shares["uniform"].items() if v} == {"sympy": 0.5, "gcide": 0.5}
    assert {s: v for s, v in shares["influence"].items() if v} == {"sympy": 0.25, "base64": 0.75}
    found = rows(plots.mixture_over_time(reading)[0], 0)
    assert {row["to"] for row in found if row["source"] == "gcide"} <= {n * TOKENS for n in range(61)}
    for row in found:
        assert row["high"] - row["low"] == pytest.approx(row["share"], abs=1e-5)


def test_bars_are_targets_and_strokes_what_was_drawn_instead(run: Path) -> None:
    change(run, lambda line: line["mix_actual"].update(sympy=line["mix_actual"]["sympy"] + 0.01))
    found = rows(plots.mixture(load.read_all(run))[0])
    last = {row["source"]: row for row in found if row["phase"] == "influence"}
    assert {s: row["share"] for s, row in last.items() if row["share"]} == pytest.approx(MIXED)
    assert {s for s, row in last.items() if row["drew"] is not None} == {"sympy"}
    assert last["sympy"]["edge"] == pytest.approx(0.26), "the number stands behind the stroke"


def test_sources_at_their_cap_are_named(run: Path) -> None:
    change(run, lambda line: line.update(epochs_by_source=dict.fromkeys(SOURCES, 0.1) | {"gcide": 0.5}))
    found = load.read_run(run)
    assert summary.capped(found, "influence") == ["gcide"] and summary.capped(found, "uniform") == []


def test_histograms_count_examples_and_strokes_are_the_means(whole: Path) -> None:
    scores = scores_of(whole)
    panel = plots.histograms(load.read_all(whole), scores)[0]
    for source in scores.sources:
        bars = [row for row in rows(panel, 1) if row["source"] == source.source]
        assert 0.9 < sum(row["share"] for row in bars) < 1 + 1e-5
    means = {s.source: float(s.mean_C[0]) for s in scores.sources}
    assert {row["source"]: row["low"] for row in rows(panel, 2)} == pytest.approx(means, abs=1e-5)


def test_predicted_says_the_rank_correlation_and_leaves_out_what_is_too_few(whole: Path) -> None:
    scores = scores_of(whole)
    impact = {
        "code": {s.source: 0.1 * s.mean_C[0] for s in scores.sources},
        "math": {s.source: -0.1 * s.mean_C[1] for s in scores.sources},
        "knowledge": {"sympy": 0.1},
    }
    (whole / "measured_impact.json").write_text(json.dumps(impact))
    panels = plots.predicted(load.read_all(whole), scores)
    told = [(panel.title.text, panel.title.subtitle.split()[-1]) for panel in panels]
    assert told == [("code", "1.00"), ("math", "-1.00")] and len(rows(panels[0])) == len(SOURCES)


def test_scores_of_one_example_and_of_tiny_size_are_drawn(pair: Path) -> None:
    write_scores(pair, [replace(t, score_NCK=t.score_NCK * 1e-7) for t in make_scores(examples=1)])
    heat = next(f for f in Report(load.read_all(pair)).figures if f.anchor == "heat").tables[0]
    assert "×10⁻" in heat.head[1]


def test_every_colour_stands_out_from_the_card() -> None:
    """The accessibility guidelines ask for a contrast of 3 of graphics; curves also carry names."""

    def light(color: str) -> float:
        linear = [(int(color[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
        return 0.05 + float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for name in plots.COLORS.keys() - {"page", "card", "grid", "axis"}:
        for color, card in zip(plots.COLORS[name], plots.COLORS["card"], strict=True):
            assert max(light(color) / light(card), light(card) / light(color)) >= 2.8, name


def test_a_source_has_one_colour_of_its_domain_and_a_capability_the_same_family() -> None:
    found = plots.colors({"a": "math", "b": "code", "c": "math", "d": "none", "e": "web"})
    assert list(found) == ["b", "a", "c", "d", "e"]
    hues = " ".join(color[6:-1] for color in found.values())
    assert hues == "blue-0 orange-0 orange-1 magenta-0 olive-0"
