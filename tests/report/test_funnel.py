"""The funnel of the probing sets: its numbers as data, its text as text, manifests of others."""

from __future__ import annotations

import html
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from megatron_r1.report import funnel, load
from megatron_r1.report.page import Report

from .conftest import SOURCES, curate
from .test_hostile import changed
from .test_plots import rows


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """No script: two seconds of bundling."""
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda vl_version: "")


def test_bars_and_table_carry_the_counts_of_every_stage(run: Path) -> None:
    curate(run)
    reading = load.read_all(run)
    panels = funnel.bars(reading)
    assert [panel.title.text for panel in panels] == list(SOURCES)
    found = [[(r["stage"], r["kept"], r["end"], r["share"]) for r in rows(panel)] for panel in panels]
    read, quality = ("read", 900, 900.0, 1.0), ("quality", 125, 125.0, pytest.approx(125 / 900, rel=1e-5))
    # A bar of no document has no length: bars begin at 0.8.
    assert found[0] == [read, quality, ("duplicates", 0, 0.8, 0.0)]
    assert found[4] == [read, quality, ("duplicates", 400, 400.0, 3.2)]
    x = panels[0].to_dict()["layer"][0]["encoding"]
    assert x["x"]["scale"]["type"] == "log" and x["x2"] == {"datum": 0.8}
    labels = [row["label"] for row in rows(panels[1])]
    assert labels == ["900", "125  at 3", "100"] and panels[1].title.subtitle == "of 60,000 documents"


def test_fallbacks_are_said_in_one_sentence(run: Path) -> None:
    curate(run)
    reading = load.read_all(run)
    assert funnel.fallbacks(reading) == (
        "Too few documents passed the threshold, so the best were taken, in "
        "torch-source (quality down to 3), sympy (quality down to 2), "
        "gcide (quality down to 1), base64 (quality down to 0)."
    )
    for of in reading.funnel.values():
        of["stages"][0]["fallback"] = False
    assert funnel.fallbacks(reading) == ""


def test_examples_are_text_on_the_page_and_short(run: Path) -> None:
    curate(run)
    reading = load.read_all(run)
    shown = funnel.examples(reading)
    # A stage without examples has no heading.
    assert [one.capability for one in shown["sympy"]] == ["quality"]
    kept, dropped = shown["sympy"][0].highest, shown["sympy"][0].lowest
    assert [one.score for one in kept] == [4.5, None, None] and dropped[0].text == "buy now"
    text = kept[0].text or ""
    assert len(text) == 300 and text.startswith("kept </pre> \ufffd of sympy!")
    page = str(Report(reading).page)
    assert html.escape("kept </pre> \ufffd of sympy") in page and "kept </pre>" not in page
    assert "Too few documents passed" in page and page.count("Examples of ") == 5
    assert "</b> 4.5</p>" in page and "+4.5" not in page
    reading.funnel.clear()
    # A figure of nothing is left out.
    assert (funnel.bars(reading), funnel.examples(reading)) == ([], {})


def _sets(run: Path, content: object) -> None:
    curate(run)
    path = run / "probes" / "manifest.json"
    path.unlink()
    if callable(content):
        content(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("content", [{"request": {}, "sources": {}}, {"funnel": {}}, lambda path: None])
def test_sets_without_a_funnel_have_no_figure_and_no_warning(
    run: Path, content: object, capfd: pytest.CaptureFixture[str]
) -> None:
    _sets(run, content)
    assert load.read_all(run).funnel == {}
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "[" * 100_000, {"funnel": {"a": {"stages": []}}}, {"funnel": [1]}, os.mkfifo, Path.mkdir,
     {"funnel": {"a": {"read": 1, "stages": [{"stage": "x", "in": 1, "kept": "many"}]}}}],
)  # fmt: skip
def test_a_manifest_of_another_form_costs_the_figure_alone_and_is_named(
    run: Path, content: str | dict[str, Any] | Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    _sets(run, content)
    reading = load.read_all(run)
    assert reading.funnel == {} and reading.run.phases
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "manifest.json" in line]
    assert (
        line.startswith("warning: ") and line.endswith("the page shows no funnel of it") and len(line) < 600
    )


def test_a_spoilt_manifest_never_stops_a_page(run: Path) -> None:
    curate(run)
    path, shown = run / "probes" / "manifest.json", 0
    content, config = path.read_bytes(), load.read_run(run).config
    reading = load.read_all(run)
    for seed in range(80):
        path.write_bytes(changed(random.Random(seed), content))
        reading.funnel.clear()
        reading.funnel.update(load._funnel(config))
        shown += bool(reading.funnel)
        assert all(panel.to_dict(validate=False) for panel in funnel.bars(reading))
        assert len(funnel.fallbacks(reading)) < 2000
        assert all(len(one.text or "") <= 300 for of in funnel.examples(reading).values() for x in of
                   for one in x.highest)  # fmt: skip
        if reading.funnel and shown == 5:
            assert "Training loss" in Report(reading).write().read_text()
    assert 8 < shown < 70


def test_a_long_funnel_is_left_out(run: Path) -> None:
    of = {
        "read": 1,
        "stages": [{"stage": "x" * 500, "in": 1, "kept": 1, "examples": {"kept": [], "dropped": []}}] * 50,
    }
    _sets(run, {"funnel": {f"{n}": of for n in range(50)}})
    assert load.read_all(run).funnel == {}
    _sets(run, {"funnel": {f"{n}": of for n in range(20)}})
    assert len(load.read_all(run).funnel) == 20
