"""Predicted against measured: the figure appears where runs without sources were measured."""

import json
from pathlib import Path

import pytest

from megatron_r1.report import load, predicted, summary


@pytest.fixture
def measured(whole: Path) -> Path:
    """Code: measured as predicted, math: the other way round, knowledge: one source only."""
    found = summary.influence(load.read_all(whole))
    impact = {
        "code": {s.source: 0.1 * s.mean_C[0] for s in found},
        "math": {s.source: -0.1 * s.mean_C[1] for s in found},
        "knowledge": {found[0].source: 0.1},
    }
    (whole / "measured_impact.json").write_text(json.dumps(impact))
    return whole


def test_rank_correlation_of_each_capability_is_said(measured: Path) -> None:
    shown = predicted.figure(load.read_all(measured))
    assert shown is not None
    assert "correlates by code 1.00 and math −1.00." in shown.lead
    assert shown.body.count("<circle") == 2 * len(summary.influence(load.read_all(measured)))


def test_nothing_measured_no_figure(whole: Path) -> None:
    assert predicted.figure(load.read_all(whole)) is None
