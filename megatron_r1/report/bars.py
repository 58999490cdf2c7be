"""Figures of shares: the mixture, epochs per source, and what each stage cost."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

from megatron_r1.report import palette, summary, words
from megatron_r1.report.figure import INK, WIDTH, Figure, phase_name, table
from megatron_r1.report.load import Reading
from megatron_r1.report.overhead import overhead
from megatron_r1.report.svg import Scale, element, line, picture, rect, text, ticks, width_of

GUTTER = 132.0
"""Left of the source names: the domains."""


def mixture(reading: Reading) -> Figure:
    """Source weights of the first and the last phase, paired bars by domain."""
    run = reading.run
    mixes = summary.mixtures(run)
    names = list(dict.fromkeys([run.phases[0], run.phases[-1]]))
    first, after = mixes[names[0]], mixes[names[-1]]
    actual = run.end["mix_actual"]
    colors = palette.source_colors(run.domains)
    left = max(width_of(s) for s in run.sources) + GUTTER
    most = max(max(mixes[n].values()) for n in names)
    x = Scale(0, most, left, WIDTH - 200)
    drift = {s: actual[s] - after[s] for s in run.sources}
    parts, top = [_legend(names, x), text(WIDTH, 14, "epochs at the end", "muted", "end")], 34.0
    for domain in palette.domain_order(run.domains):
        members = [s for s in run.domains if run.domains[s] == domain]
        parts.append(text(0, top + 20, domain, "panel"))
        said = " → ".join(words.share(sum(mixes[n][s] for s in members)) for n in names)
        parts.append(text(0, top + 36, said, "muted"))
        for source in members:
            parts.append(text(left - 10, top + 20, source, "name", "end", style=f"fill:{colors[source]}"))
            for row, name in enumerate(names):
                value, y = mixes[name][source], top + (3 + 14 * row if len(names) > 1 else 10)
                tip = f"{source}, {name}: {words.share(value)}"
                pale = "0.4" if name != names[-1] else None
                parts.append(rect(x(0), y, x(value) - x(0), 11, colors[source], tip, opacity=pale))
                parts.append(text(x(value) + 6, y + 9.5, words.share(value), "tick"))
            if abs(drift[source]) >= 0.001:
                at = x(min(actual[source], most))
                parts.append(line(at, top + 14, at, top + 31, "mark"))
            passes = f"{run.end['epochs_by_source'][source]:.2f}"
            parts.append(text(WIDTH, top + 20, passes, "tick", "end"))
            top += 36
        top += 10
    parts.append(line(x(0), 34, x(0), top - 10, "axis"))
    body = picture(WIDTH, top - 4, parts, "Mixture per phase")
    if len(names) == 1:
        lead = (
            f"One phase, {names[0]}, has trained so far; these are its target shares of sequences. "
            "Influence, once it is measured, weighs the sources of the next:"
        )
        command = f"python tools/make_mix.py {run.root / 'config.yaml'} NEXT_PHASE.yaml mix.phase=NEXT_PHASE"
        return Figure("mixture", "Mixture", lead, body, command=command)
    note = f"Target shares of sequences in phases {names[0]} and {names[-1]}. "
    far = max(run.sources, key=lambda s: abs(drift[s]))
    if abs(drift[far]) >= 0.001:
        note += (
            f"Upright strokes: what {phase_name(names[-1])} drew, where that is not its target "
            f"(furthest: {far}, {words.share(actual[far])} instead of {words.share(after[far])})."
        )
    else:
        note += f"What {phase_name(names[-1])} drew is within 0.1 points of its target for every source."
    return Figure("mixture", "Mixture before and after", _mixture_lead(first, after), body, note)


def _mixture_lead(first: dict[str, float], after: dict[str, float]) -> str:
    down, up = summary.extremes({s: after[s] - first[s] for s in first})
    if round(after[up] - first[up], 4) <= 0:
        return "The last phase reads the same mixture as the first."
    return (
        f"{down} falls from {words.share(first[down])} to {words.share(after[down])} of the sequences; "
        f"{up} rises most, from {words.share(first[up])} to {words.share(after[up])}. Compare the two bars "
        "of each source, then the last column: what is read many times over teaches less each time."
    )


def _legend(names: Sequence[str], x: Scale) -> str:
    parts, at = [], x(0)
    for name in names:
        parts.append(rect(at, 5, 22, 10, INK, opacity="0.4" if name != names[-1] else None))
        said = phase_name(name)
        parts.append(text(at + 28, 14, said, "muted"))
        at += 28 + width_of(said) + 24
    return "".join(parts)


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
    marks = ticks(0, x.high, 6)
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
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
            parts.append(text(edge + 6, top + 14, words.tick(value, 0.01 if one else step / 10), "tick"))
            top += 23
        top += 8
    grid = [line(x(v), begin - 2, x(v), top - 6) for v in marks]
    grid += [text(x(v), top + 10, words.tick(v, step), "tick", "middle") for v in marks]
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
            command=f"torchrun --nproc-per-node 2 tools/train.py {reading.run.root / 'config.yaml'}",
        )
    total = sum(c.seconds for c in costs)
    rows = [_stage_row(c, c.seconds / total if total else 0.0) for c in costs]
    tokens = words.count(sum(c.tokens for c in costs))
    rows.append(
        f'<tr class="total"><th scope="row">total</th><td>{words.duration(total)}</td><td>{tokens}</td>'
        f"<td></td><td></td><td>{escape(words.hours(sum(c.device_hours for c in costs)))}</td><td></td></tr>"
    )
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
    return Figure(anchor, title, lead, table(head, rows, "numbers stages") + overhead(reading), note)


def _held(reading: Reading) -> str:
    """Memory and stragglers of the training steps, where they were recorded."""
    lines = reading.run.metrics
    memory = max((line.get("memory_bytes") or 0 for line in lines), default=0)
    ratios = [line["slowest_ratio"] for line in lines if line.get("slowest_ratio")]
    said = f" The first rank held at most {memory / 2**30:.1f} GiB." if memory else ""
    if ratios and (summary.ranks(reading.run) or 1) > 1:
        said += (
            f" The slowest rank of a step took {float(np.median(ratios)):.2f} times the median rank's time."
        )
    return said


def _stage_row(cost: summary.StageCost, share: float) -> str:
    bar = f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
    cells = [
        element("th", escape(cost.label), scope="row"),
        element("td", words.duration(cost.seconds)),
        element("td", words.count(cost.tokens) if cost.tokens else "–"),
        element("td", words.count(cost.rate) if cost.rate else "–"),
        element("td", str(cost.devices)),
        element("td", escape(words.hours(cost.device_hours))),
        element("td", f"{bar}{words.share(share)}", class_="share"),
    ]
    return element("tr", "".join(cells))
