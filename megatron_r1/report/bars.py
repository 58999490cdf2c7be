"""Figures of epochs per source, and of what each stage cost."""

from __future__ import annotations

import numpy as np

from megatron_r1.report import palette, summary, words
from megatron_r1.report.figure import GUTTER, WIDTH, Figure, marks
from megatron_r1.report.load import Reading
from megatron_r1.report.overhead import overhead
from megatron_r1.report.svg import Scale, line, picture, rect, text, width_of
from megatron_r1.report.table import Cell, Table


def epochs(reading: Reading) -> Figure:
    """Passes over each source at the end."""
    run, control = reading.run, reading.control
    colors = palette.source_colors(run.domains)
    passes = run.end["epochs_by_source"]
    against = control.end["epochs_by_source"] if control else {}
    most = max([*passes.values(), *against.values()])
    # A line at one epoch says nothing where all bars are a sliver beside it.
    one = most > 0.4
    left = max(width_of(s) for s in run.sources) + GUTTER
    x = Scale(0, max(most, 1.0) * 1.02 if one else most * 1.02 or 1.0, left, WIDTH - 60)
    ground = marks(0, x.high, 6)
    # One digit more than the axis needs.
    digit = 0.01 if one else ground[1][0] / 10
    parts, begin = [], 20.0 if one else 6.0
    top = begin
    for domain in palette.domain_order(run.domains):
        parts.append(text(0, top + 14, domain, "panel"))
        for source in (s for s in run.domains if run.domains[s] == domain):
            value, other = passes[source], against.get(source)
            tip = f"{source}: {value:.3f} epochs" + (f", control {other:.3f}" if other is not None else "")
            parts.append(text(left - 10, top + 14, source, "name", "end", style=f"fill:{colors[source]}"))
            parts.append(rect(x(0), top + 3, x(value) - x(0), 14, colors[source], tip))
            edge = x(value)
            if other is not None:
                parts.append(line(x(other), top + 1, x(other), top + 19, "mark"))
                # The number stands clear of a stroke just behind the bar's end.
                edge = x(other) if 0 < x(other) - edge < 36 else edge
            parts.append(text(edge + 6, top + 14, words.tick(value, digit), "tick"))
            top += 23
        top += 8
    grid = [line(x(v), begin - 2, x(v), top - 6) for v, _ in ground]
    grid += [text(x(v), top + 10, said, "tick", "middle") for v, said in ground]
    grid.append(line(x(0), begin - 2, x(0), top - 6, "axis"))
    if one:
        grid.append(line(x(1), begin - 2, x(1), top - 6, "zero"))
        grid.append(text(x(1), begin - 8, "one epoch", "muted", "middle"))
    note = "Sequences drawn from a source over the sequences that it has, all phases together."
    if control:
        note += f" Upright strokes: arm {reading.arms[1][0]}."
    body = picture(WIDTH, top + 16, [*grid, *parts], "Epochs per source")
    return Figure("epochs", "Epochs per source", _epochs_lead(passes), body, note)


def _epochs_lead(passes: dict[str, float]) -> str:
    """Which sources were read more than once."""
    again = sorted((s for s in passes if passes[s] > 1), key=lambda s: -passes[s])
    if again:
        said = words.both([f"{s} ({passes[s]:.1f} times)" for s in again])
        rest = "the rest less" if len(again) < len(passes) else "that is every source"
        lead = f"Read more than once: {said}; {rest}."
    else:
        furthest = summary.extremes(passes)[1]
        lead = (
            f"No source was read through: {furthest} came furthest, with "
            f"{words.percent(100 * passes[furthest])} of an epoch."
        )
    return lead + " Look for bars far beyond one epoch: text that is read again teaches less."


def stages(reading: Reading) -> Figure:
    """Time and tokens of every stage, from the ledgers."""
    costs = summary.stage_costs(reading)
    anchor, title = "cost", "Where the time went"
    if not costs:
        return Figure(
            anchor,
            title,
            "The ledger is empty; every stage adds a line when it finishes. Training, for instance:",
            command=summary.launch(reading.run, "train"),
        )
    total = sum(c.seconds for c in costs)
    rows = [_stage_row(c, c.seconds / total if total else 0.0) for c in costs]
    tokens, hours = sum(c.tokens for c in costs), sum(c.device_hours for c in costs)
    whole = ["total", words.duration(total), words.count(tokens), "", "", words.hours(hours), ""]
    rows.append([Cell(said) for said in whole])
    head = ["stage", "wall time", "tokens", "tokens per second", "ranks", "rank-hours", "share of the time"]
    longest = max(costs, key=lambda c: c.seconds)
    lead = (
        f"All stages took {words.duration(total)}; the longest was {longest.label} with "
        f"{words.duration(longest.seconds)}."
    )
    training, scoring = summary.seconds_of(costs, "train"), summary.seconds_of(costs, "influence")
    if training and scoring:
        lead += (
            f" Measuring influence cost {words.duration(scoring)}, "
            f"{words.percent(100 * scoring / training)} of the time that training the run took."
        )
    lead += " Look for the stage worth making faster."
    note = (
        "Wall time as the ledger has it; a stage that ran in several parts is summed over them. "
        "Rank-hours count the wall time once for each rank."
    )
    note += _held(reading)
    tables = [Table(head, rows, "numbers stages", total=True), overhead(reading)]
    return Figure(anchor, title, lead, note=note, tables=[t for t in tables if t is not None])


def _held(reading: Reading) -> str:
    """Memory and stragglers of the training steps, where they were recorded."""
    lines = reading.run.metrics
    memory = max((line.get("memory_bytes") or 0 for line in lines), default=0)
    ratios = [line["slowest_ratio"] for line in lines if line.get("slowest_ratio")]
    said = f" The first rank held at most {words.size(memory)}." if memory else ""
    if ratios and (summary.ranks(reading.run) or 1) > 1:
        said += (
            f" The slowest rank of a step took {float(np.median(ratios)):.2f} times the median rank's time."
        )
    return said


def _stage_row(cost: summary.StageCost, share: float) -> list[Cell]:
    return [
        Cell(cost.label),
        Cell(words.duration(cost.seconds)),
        Cell(words.count(cost.tokens) if cost.tokens else "–"),
        Cell(words.count(cost.rate) if cost.rate else "–"),
        Cell(str(cost.devices)),
        Cell(words.hours(cost.device_hours)),
        Cell(words.share(share), bar=share),
    ]
