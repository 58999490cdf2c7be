"""The mixture over time: what each step drew, in the order and the sizes of the run's own lines."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_r1 import config_io
from megatron_r1.config import PhaseConfig
from megatron_r1.report import load, mixture
from megatron_r1.report.figure import Figure

from . import conftest


def recorded(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rewrite(run: Path, phases: dict[str, list[dict[str, int]]], caps: dict[str, float] | None = None) -> None:
    """Give the run other phases and, step by step, other draws in windows of 256 tokens."""
    line, drawn, lines = recorded(run)[0], dict.fromkeys(conftest.SOURCES, 0), []
    for phase, steps in phases.items():
        begin = dict(drawn)
        for step in steps:
            drawn = {s: n + step.get(s, 0) for s, n in drawn.items()}
            here = {s: drawn[s] - begin[s] for s in conftest.SOURCES}
            lines.append(
                line
                | {
                    "step": len(lines) + 1,
                    "phase": phase,
                    "tokens": sum(drawn.values()) * 256,
                    "tokens_by_source": {s: n * 256 for s, n in drawn.items()},
                    "epochs_by_source": {s: n / 100 for s, n in drawn.items()},
                    "mix_actual": {s: n / sum(here.values()) for s, n in here.items()},
                }
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = conftest.make_config(
        run,
        {name: PhaseConfig(steps=len(steps), max_epochs=caps) for name, steps in phases.items()},
        {s: domain for s, (domain, _) in conftest.SOURCES.items()},
    )
    (run / "config.yaml").write_text(config_io.dump(config))


def bands(figure: Figure) -> dict[str, list[list[tuple[float, float]]]]:
    """Source -> the outline, in pixels, of its band in each phase."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for path in ElementTree.fromstring(figure.body).iter("path"):
        if path.get("class") == "band":
            source = path[0].text.split(",")[0]  # type: ignore[union-attr]
            numbers = [float(v) for v in re.findall(r"[\d.]+", path.get("d", ""))]
            found.setdefault(source, []).append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def height_at(outline: list[tuple[float, float]], x: float) -> float:
    ys = [y for at, y in outline if at == x]
    return max(ys) - min(ys)


def test_a_steps_draws_are_what_its_line_has_more_than_the_line_before(run: Path) -> None:
    lines = recorded(run)
    found = mixture.drawn(load.read_run(run))
    sources = list(load.read_run(run).domains)
    for number in (1, 57, 100, 130):
        more = {
            s: lines[number]["tokens_by_source"][s] - lines[number - 1]["tokens_by_source"][s]
            for s in sources
        }
        assert found[number].tolist() == pytest.approx([more[s] / sum(more.values()) for s in sources])


def test_a_run_that_forks_off_another_begins_with_what_its_phase_has_drawn(pair: Path) -> None:
    control = load.read_run(pair / "control")
    assert control.metrics[0]["step"] == 101
    first = dict(zip(control.domains, mixture.drawn(control)[0], strict=True))
    assert first == pytest.approx(control.metrics[0]["mix_actual"])


def test_bands_are_as_high_as_the_shares_and_change_where_the_phase_does(run: Path) -> None:
    half, quarter = {"sympy": 8, "gcide": 8}, {"sympy": 4, "base64": 12}
    rewrite(run, {"one": [half] * 30, "two": [quarter] * 10})
    figure = mixture.over_time(load.read_all(run))
    drawn = bands(figure)
    assert {s: len(outlines) for s, outlines in drawn.items()} == {"sympy": 2, "gcide": 1, "base64": 1}
    for source, phase, share in (
        ("sympy", 0, 0.5),
        ("gcide", 0, 0.5),
        ("sympy", 1, 0.25),
        ("base64", 0, 0.75),
    ):
        outline = drawn[source][phase]
        for x in {x for x, _ in outline}:
            assert height_at(outline, x) == pytest.approx(300 * share, abs=0.2)
    ends = [x for x, _ in drawn["sympy"][0]], [x for x, _ in drawn["sympy"][1]]
    assert max(ends[0]) == min(ends[1])
    whole = max(ends[1]) - min(ends[0])
    assert max(ends[0]) - min(ends[0]) == pytest.approx(0.75 * whole, abs=0.2)
    assert (
        "The greatest change is that of base64, from 0.0\xa0% of the tokens in phase one to 75.0\xa0% in "
        "phase two. No longer drawn in phase two: gcide." in figure.lead
    )


def test_a_source_that_came_to_its_cap_is_named_and_its_band_ends(run: Path) -> None:
    before, after = {"sympy": 8, "gcide": 8}, {"sympy": 16}
    rewrite(run, {"only": [before] * 50 + [after] * 50}, {"gcide": 4.0})
    figure = mixture.over_time(load.read_all(run))
    assert "In phase only, gcide came to the cap on epochs" in figure.lead
    (outline,) = bands(figure)["gcide"]
    xs = sorted({x for x, _ in outline})
    assert height_at(outline, xs[0]) == pytest.approx(150, abs=0.2) and height_at(outline, xs[-1]) == 0
    rewrite(run, {"only": [before] * 50}, {"gcide": 4.1})
    lead = mixture.over_time(load.read_all(run)).lead
    assert "came to the cap on" not in lead
    assert "50.0\xa0% of the tokens are sympy's, the most, and 0.0\xa0%" in lead


def test_no_stroke_lies_over_a_number(run: Path) -> None:
    lines = recorded(run)
    lines[-1]["mix_actual"] = {s: share + 0.01 for s, share in lines[-1]["mix_target"].items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawing = ElementTree.fromstring(mixture.before_and_after(load.read_all(run)).body)
    strokes = [at for at in drawing.iter("line") if at.get("class") == "mark"]
    numbers = [at for at in drawing.iter("text") if at.get("class") == "tick" and "%" in str(at.text)]
    assert len(strokes) == len(conftest.SOURCES) and len(numbers) == 2 * len(strokes)
    for stroke in strokes:
        x, top, foot = (float(stroke.get(name, 0)) for name in ("x1", "y1", "y2"))
        beside = [n for n in numbers if top + 3 < float(n.get("y", 0)) - 4 < foot]
        assert [float(n.get("x", 0)) > x for n in beside] == [True]


def test_a_long_run_of_many_sources_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"source-{i}": (("code", "math", "web")[i % 3], 5.0) for i in range(20)}
    monkeypatch.setattr("tests.report.conftest.SOURCES", many)
    conftest.make_arm(tmp_path, "second", "uniform", 0, 0.0)
    reading = load.read_all(tmp_path)
    lines = [
        reading.run.metrics[0] | {"tokens": n * 4096, "tokens_by_source": dict.fromkeys(many, n * 4096 / 20)}
        for n in range(1, 5001)
    ]
    long = dataclasses.replace(reading.run, metrics=lines)
    body = mixture.over_time(dataclasses.replace(reading, run=long)).body
    assert len(body) < 150_000 and all(f"source-{i} 5.0" in body for i in range(20))
