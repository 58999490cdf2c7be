"""What choosing the data cost beside training on it: the table of the paper's appendix D.3, for this run."""

from __future__ import annotations

from megatron_r1.report import words
from megatron_r1.report.load import Reading
from megatron_r1.report.summary import StageCost, stage_costs
from megatron_r1.report.table import Cell, Table

_PAPER = {
    "representative and probing sets": 200.0,
    "influence scores and mixture": 5_100.0 + 1_100.0,
    "leave-one-out and control runs": 50.0 * 8,
    "training": 28_000.0 + 10_000.0 + 600.0,
}
"""Appendix D.3, GPU hours of the 950M model."""


def overhead(reading: Reading) -> Table | None:
    """Table of device-hours; None before anything was trained and scored."""
    ours = dict.fromkeys(_PAPER, 0.0)
    for cost in stage_costs(reading):
        if (row := _row_of(cost)) is not None:
            ours[row] += cost.device_hours
    if not ours["training"] or not ours["influence scores and mixture"]:
        return None
    rows = [(name, words.hours(ours[name]), f"{_PAPER[name]:,.0f} h") for name in _PAPER]
    shares = [words.percent(100 * _share(hours)) for hours in (ours, _PAPER)]
    rows.append(("choosing, of the whole", shares[0], shares[1]))
    head = ["choosing data, device-hours", "this run", "the paper, 950M"]
    return Table(head, [[Cell(said) for said in row] for row in rows])


def _row_of(cost: StageCost) -> str | None:
    first = cost.label.split()[0]
    if cost.kind == "train control":
        return "leave-one-out and control runs"
    if cost.kind == "influence" or first in ("influence", "mix", "query"):
        return "influence scores and mixture"
    if cost.kind == "train":
        return "training"
    return "representative and probing sets" if cost.label.startswith("set probes aside") else None


def _share(hours: dict[str, float]) -> float:
    return 1 - hours["training"] / sum(hours.values())
