"""The report's figures of training: loss, loss per source, mixture, held-out loss, epochs, cost.

Each takes a reading and returns a `Figure`; what a figure lacks is said with the command that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from megatron_r1.report import palette, summary, words
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.svg import (
    Panel,
    Scale,
    axes,
    clipped,
    element,
    end_labels,
    line,
    path,
    picture,
    rect,
    smooth,
    text,
    thin,
    ticks,
    width_of,
)

WIDTH = 1040.0
CONTROL = "var(--control)"
INK = "var(--ink)"


@dataclass(frozen=True)
class Figure:
    anchor: str
    title: str
    lead: str
    """Plain sentences: what it shows and what to look for. Text, not markup."""
    body: str = ""
    """Markup; empty where data are missing."""
    note: str = ""
    """How it is drawn. Text."""
    command: str = ""
    """Makes what is missing."""


def loss(reading: Reading) -> Figure:
    """Training loss per step of both arms."""
    run = reading.run
    panel = _token_panel(reading, 64, WIDTH - 150, 26, 320, _loss_range(reading))
    labels = []
    drawn = []
    for (name, arm), color in zip(reading.arms, (INK, CONTROL), strict=False):
        raw = [(float(m["tokens"]), float(m["loss"])) for m in arm.metrics]
        calm = _calm(arm, raw)
        start = _branch(run, arm, _calm(run, [(float(m["tokens"]), float(m["loss"])) for m in run.metrics]))
        dash = "curve dashed" if arm is not run else "curve"
        drawn.append(path(panel.at(thin(raw)), color, "raw"))
        drawn.append(path(panel.at(thin([*start, *calm])), color, dash))
        labels.append((*calm[-1], f"{name} {calm[-1][1]:.2f}", color))
    body = picture(
        WIDTH,
        366,
        [
            _token_axes(panel, "loss, nats per token"),
            _phase_marks(panel, run),
            clipped(panel, "clip-loss", "".join(drawn)),
            end_labels(panel, labels),
        ],
        "Training loss over tokens",
    )
    first, last = run.metrics[0]["loss"], labels[0][1]
    lead = f"Training loss falls from {first:.2f} to {last:.2f} nats per token over {words.count(run.end['tokens'])} tokens."
    lead += _still_falling(_calm(run, [(m["tokens"], m["loss"]) for m in run.metrics]))
    if reading.control and len(run.phases) > 1:
        lead += (
            " From the last phase on the arms read different text, so this loss does not compare them:"
            " the held-out loss below does. Look here for spikes and for a curve that stops falling."
        )
    else:
        lead += " Look for spikes and for a curve that stops falling."
    high = panel.y.high
    note = f"Faint: every step. Strong: smoothed over {2 * _reach(run) + 1} steps within a phase."
    if first > high:
        note += f" The first steps lie above the frame (from {first:.2f})."
    return Figure("loss", "Training loss", lead, body, note)


def loss_by_source(reading: Reading) -> Figure:
    """One panel per domain, a curve per source."""
    run = reading.run
    colors = palette.source_colors(run.domains)
    domains = palette.domain_order(run.domains)
    losses = {s: [(float(t), v) for t, v in summary.source_losses(run, s)] for s in run.sources}
    losses = {s: points for s, points in losses.items() if points}
    calm = {s: _calm(run, points) for s, points in losses.items()}
    late = [v for s, points in losses.items() for t, v in points[max(0, len(points) // 25) :]]
    span = _padded(min(late), max(late))
    margin = max(width_of(f"{s} 0.00") for s in run.sources) + 20
    columns = 2 if len(domains) > 1 else 1
    cell = WIDTH / columns
    height = max(190.0, 16.0 * max(list(run.domains.values()).count(d) for d in domains) + 60)
    parts = []
    for i, domain in enumerate(domains):
        left, top = (i % columns) * cell, (i // columns) * (height + 76)
        panel = _token_panel(reading, left + 46, left + cell - margin, top + 40, top + 40 + height, span)
        members = [s for s in losses if run.domains[s] == domain]
        curves = [path(panel.at(thin(losses[s], 240)), colors[s], "raw", s) for s in members]
        curves += [path(panel.at(thin(calm[s], 240)), colors[s], "curve", s) for s in members]
        parts += [
            text(left + 46, top + 16, domain, "panel"),
            _token_axes(panel, ""),
            _phase_marks(panel, run, named=False),
            clipped(panel, f"clip-source-{i}", "".join(curves)),
            end_labels(panel, [(*calm[s][-1], f"{s} {calm[s][-1][1]:.2f}", colors[s]) for s in members]),
        ]
    rows = -(-len(domains) // columns)
    body = picture(WIDTH, rows * (height + 76), parts, "Training loss per source over tokens")
    low, high = summary.extremes({s: points[-1][1] for s, points in calm.items()})
    slow, fast = summary.extremes(summary.fall_by_source(run))
    falls = summary.fall_by_source(run)
    lead = (
        f"{high} stays the hardest to predict ({calm[high][-1][1]:.2f} nats per token), {low} ends lowest "
        f"({calm[low][-1][1]:.2f}). {fast} is learned most (its loss falls by {falls[fast]:.2f}), "
        f"{slow} least ({falls[slow]:.2f}). A curve that stays high and flat is text that cannot be learned."
    )
    ended = [s for s, points in calm.items() if points[-1][0] < 0.98 * run.end["tokens"]]
    if ended:
        lead += f" {words.both(ended)} {'ends' if len(ended) == 1 else 'end'} early: the mixture stopped drawing it."
    note = (
        f"{reading.arms[0][0]} arm. Mean loss of each source's tokens in a step: faint as measured, strong smoothed "
        f"over {2 * _reach(run) + 1} of its steps. All panels share their axes; x: tokens; broken line: a new phase."
    )
    return Figure("sources", "Training loss per source", lead, body, note)


def mixture(reading: Reading) -> Figure:
    """Source weights of the first and the last phase, paired bars by domain."""
    run = reading.run
    mixes = summary.mixtures(run)
    names = list(mixes) if len(mixes) < 3 else [run.phases[0], run.phases[-1]]
    before, after = mixes[names[0]], mixes[names[-1]]
    actual = run.end["mix_actual"]
    epochs = run.end["epochs_by_source"]
    colors = palette.source_colors(run.domains)
    left = max(width_of(s) for s in run.sources) + 110
    most = max(max(mixes[n].values()) for n in names)
    x = Scale(0, most, left, WIDTH - 220)
    parts, top = [_mixture_legend(names, x), text(WIDTH, 14, "epochs read at the end", "muted", "end")], 34.0
    drift = {s: actual[s] - after[s] for s in run.sources}
    for domain in palette.domain_order(run.domains):
        members = [s for s in run.sources if run.domains[s] == domain]
        parts.append(text(0, top + 20, domain, "panel"))
        said = " → ".join(words.share(sum(mixes[n][s] for s in members)) for n in dict.fromkeys(names))
        parts.append(text(0, top + 36, said, "muted"))
        for source in members:
            parts.append(text(left - 10, top + 20, source, "name", "end", style=f"fill:{colors[source]}"))
            for row, name in enumerate(names):
                value, y = mixes[name][source], top + 3 + 14 * row
                fade = "0.4" if row < len(names) - 1 else None
                tip = f"{source}, {name}: {words.share(value)}"
                parts.append(rect(x(0), y, x(value) - x(0), 11, colors[source], tip, opacity=fade))
                parts.append(text(x(value) + 6, y + 9.5, words.share(value), "tick"))
            if abs(drift[source]) >= 0.001:
                at = x(min(actual[source], most))
                parts.append(line(at, top + 14, at, top + 31, "mark"))
            parts.append(text(WIDTH, top + 20, f"{epochs[source]:.2f}", "tick", "end"))
            top += 36
        top += 10
    parts.append(line(x(0), 34, x(0), top - 10, "axis"))
    body = picture(WIDTH, top, parts, "Mixture per phase")
    if len(names) == 1:
        return Figure(
            "mixture",
            "Mixture",
            f"Only phase {names[0]} has trained; its target shares are shown. Weights for a next phase, from influence:",
            body,
            command=f"python tools/make_mix.py {run.root / 'config.yaml'}",
        )
    change = {s: after[s] - before[s] for s in run.sources}
    down, up = summary.extremes(change)
    lead = (
        f"{down} falls from {words.share(before[down])} to {words.share(after[down])} of the sequences; "
        f"{up} rises most, from {words.share(before[up])} to {words.share(after[up])}. Compare the two bars of "
        "each source, then the last column: a source read many times over teaches less each time."
    )
    note = f"Target shares of phases {names[0]} and {names[-1]}."
    far = max(run.sources, key=lambda s: abs(drift[s]))
    if abs(drift[far]) >= 0.001:
        note += (
            f" Short upright strokes: what was drawn in phase {names[-1]}, where it is not the target "
            f"(furthest: {far}, {words.share(actual[far])} for {words.share(after[far])})."
        )
    else:
        note += f" What phase {names[-1]} drew is within 0.1 points of its target for every source."
    return Figure("mixture", "Mixture before and after", lead, body, note)


def held_out(reading: Reading) -> Figure:
    """Held-out NLL per capability over training, and its end in a table."""
    run, anchor, title = reading.run, "heldout", "Held-out loss per capability"
    ends = summary.held_out(reading)
    if ends is None:
        return Figure(
            anchor,
            title,
            "No step carries a held-out loss of every arm yet; name probing sets to measure it while training:",
            command=f"torchrun --nproc-per-node 2 tools/train.py {run.root / 'config.yaml'} "
            "data.probes.code=PREFIX train.probe_every=100",
        )
    capabilities = list(next(iter(ends.by_arm.values())))
    colors = palette.capability_colors(capabilities)
    cell = WIDTH / len(capabilities)
    parts = []
    fork = _fork(reading)
    rows = [0.0] if fork is None else [0.0, fork]
    for column, capability in enumerate(capabilities):
        series = [
            [(float(m["tokens"]), m["probe_nll"][capability]) for m in arm.probed] for _, arm in reading.arms
        ]
        series = [
            [*_branch(run, arm, series[0]), *s] for (_, arm), s in zip(reading.arms, series, strict=True)
        ]
        for row, since in enumerate(rows):
            top = 44 + row * 268
            shown = [[p for p in s if p[0] >= since] for s in series]
            values = [v for s in shown for _, v in s]
            left = column * cell + 50
            panel = Panel(
                Scale(since, float(max(s[-1][0] for s in series)), left, (column + 1) * cell - 112),
                Scale(*_padded(min(values), max(values)), top + 180, top),
            )
            strokes = (colors[capability], CONTROL)
            if row == 0:
                parts.append(text(left - 8, top - 28, capability, "panel"))
            parts.append(_token_axes(panel, "nats per token" if row == 0 else "from the fork on", most=3))
            if row == 0:
                parts.append(_phase_marks(panel, run, named=False))
            labels = []
            for (name, arm), points, color in zip(reading.arms, shown, strokes, strict=False):
                at = panel.at(points)
                parts.append(path(at, color, "curve" if arm is run else "curve dashed", name))
                parts += [element("circle", cx=a, cy=b, r=2.2, style=f"fill:{color}") for a, b in _some(at)]
                digits = 2 if row == 0 else 3
                labels.append((*points[-1], f"{name} {points[-1][1]:.{digits}f}", color))
            parts.append(end_labels(panel, labels))
    body = picture(WIDTH, 268.0 * len(rows) - 4, parts, "Held-out loss per capability over tokens")
    body += _held_out_table(ends, capabilities)
    note = (
        f"Mean negative log-likelihood per token of text that no arm trains on; the table is at "
        f"{words.count(ends.tokens)} tokens. The upper row shows the whole run, the lower one what follows the fork, "
        "each on its own scale."
        if fork is not None
        else "Mean negative log-likelihood per token of text that the run does not train on."
    )
    if reading.control is None:
        lead = (
            f"At {words.count(ends.tokens)} tokens the held-out loss is "
            + words.both([f"{v:.3f} for {c}" for c, v in next(iter(ends.by_arm.values())).items()])
            + " nats per token. There is no control run to compare with; this trains one:"
        )
        return Figure(anchor, title, lead, body, note, command=control_command(run))
    return Figure(
        anchor, title, _compared(reading, ends), body, note + " One run of each arm: no error bars."
    )


def _compared(reading: Reading, ends: summary.HeldOut) -> str:
    """Which arm ended ahead, on what, and by how much."""
    (name, _), (control, _) = reading.arms
    gaps = {c: ends.difference(c) or 0.0 for c in next(iter(ends.by_arm.values()))}
    ahead = [f"{c} by {-d:.3f}" for c, d in gaps.items() if round(d, 3) < 0]
    behind = [f"{c} by {d:.3f}" for c, d in gaps.items() if round(d, 3) > 0]
    level = [c for c, d in gaps.items() if round(d, 3) == 0]
    said = [f"ahead on {words.both(ahead)}"] if ahead else []
    said += [f"behind on {words.both(behind)}"] if behind else []
    said += [f"level on {words.both(level)}"] if level else []
    return (
        f"After the same number of tokens, arm {name} is {words.both(said)} nats per token, compared with "
        f"{control}. Lower is better; look at the lower row, where the arms part."
    )


def _held_out_table(ends: summary.HeldOut, capabilities: Sequence[str]) -> str:
    arms = list(ends.by_arm)
    head = ["held-out loss at the end", *arms] + (["difference", ""] if len(arms) == 2 else [])
    rows = []
    for c in capabilities:
        cells = [element("th", escape(c), scope="row")] + [
            element("td", f"{ends.by_arm[a][c]:.3f}") for a in arms
        ]
        gap = ends.difference(c)
        if gap is not None:
            change = words.signed(100 * gap / ends.by_arm[arms[1]][c], 1)
            cells += [element("td", words.signed(gap), class_="strong"), element("td", f"{change} %")]
        rows.append(element("tr", "".join(cells)))
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[str], cls: str = "numbers") -> str:
    """An HTML table from column names (text) and ready rows (markup)."""
    names = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    return (
        f'<div class="scroll"><table class="{cls}"><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def epochs(reading: Reading) -> Figure:
    """Passes over each source at the end."""
    run, control = reading.run, reading.control
    colors = palette.source_colors(run.domains)
    passes = run.end["epochs_by_source"]
    against = control.end["epochs_by_source"] if control else {}
    most = max([1.0, *passes.values(), *against.values()])
    left = max(width_of(s) for s in run.sources) + 110
    x = Scale(0, most * 1.02, left, WIDTH - 70)
    parts, top = [], 26.0
    begin = top
    for domain in palette.domain_order(run.domains):
        members = [s for s in run.sources if run.domains[s] == domain]
        parts.append(text(0, top + 13, domain, "panel"))
        for source in members:
            value = passes[source]
            parts.append(text(left - 10, top + 13, source, "name", "end", style=f"fill:{colors[source]}"))
            parts.append(
                rect(x(0), top + 2, x(value) - x(0), 15, colors[source], f"{source}: {value:.2f} epochs")
            )
            clear = value
            if source in against:
                at = x(against[source])
                parts.append(line(at, top, at, top + 19, "mark"))
                clear = max(value, against[source]) if against[source] < value + most * 0.06 else value
            parts.append(text(x(clear) + 7, top + 14, f"{value:.2f}", "tick"))
            top += 24
        top += 8
    grid = [line(x(v), begin - 4, x(v), top - 4) for v in ticks(0, x.high, 8)]
    one = [
        line(x(1), begin - 4, x(1), top - 4, "phase"),
        text(x(1), begin - 10, "one epoch", "muted", "middle"),
    ]
    body = picture(
        WIDTH, top, [*grid, *one, *parts, line(x(0), begin - 4, x(0), top - 4, "axis")], "Epochs per source"
    )
    repeated = {s: v for s, v in passes.items() if v > 1}
    if repeated:
        lead = (
            f"{words.both([f'{s} ({v:.1f} times)' for s, v in sorted(repeated.items(), key=lambda i: -i[1])])} "
            f"{'was' if len(repeated) == 1 else 'were'} read more than once; the rest was not read through."
            if len(repeated) < len(passes)
            else "Every source was read more than once."
        )
    else:
        top_source = summary.extremes(passes)[1]
        lead = (
            f"No source was read through: {top_source} came furthest, {passes[top_source]:.2f} of an epoch."
        )
    lead += " Look for bars far beyond the line at one epoch: repeated text helps less each time (about four passes are nearly as good as new)."
    note = "Sequences drawn from a source over the sequences that it has, all phases together."
    if against:
        note += f" Upright strokes: {reading.arms[1][0]}."
    return Figure("epochs", "Epochs per source", lead, body, note)


def stages(reading: Reading) -> Figure:
    """Time and tokens of every stage, from the ledgers."""
    costs = summary.stage_costs(reading)
    anchor, title = "cost", "Where the time went"
    if not costs:
        return Figure(
            anchor,
            title,
            "The ledger is empty: every stage adds its line when it finishes, training for instance by",
            command=f"torchrun --nproc-per-node 2 tools/train.py {reading.run.root / 'config.yaml'}",
        )
    total = sum(c.seconds for c in costs)
    arms = len({c.arm for c in costs}) > 1
    rows = []
    for c in costs:
        part = c.seconds / total if total else 0.0
        name = f"{c.stage} (control)" if arms and c.arm == "control" and "control" not in c.stage else c.stage
        name += f" × {c.times}" if c.times > 1 else ""
        bar = f'<span class="bar"><i style="width:{100 * part:.1f}%"></i></span>'
        rows.append(
            "<tr>"
            + element("th", escape(name), scope="row")
            + element("td", words.duration(c.seconds))
            + element("td", words.count(c.tokens) if c.tokens else "–")
            + element("td", words.count(c.rate) if c.rate else "–")
            + element("td", str(c.devices))
            + element("td", f"{bar}{100 * part:.1f} %", class_="share")
            + "</tr>"
        )
    rows.append(
        '<tr class="total">'
        + element("th", "total", scope="row")
        + element("td", words.duration(total))
        + element("td", words.count(sum(c.tokens for c in costs)))
        + "<td>–</td><td>–</td><td></td></tr>"
    )
    head = ["stage", "wall time", "tokens", "tokens per second", "ranks", "share of the time"]
    longest = max(costs, key=lambda c: c.seconds)
    training, scoring = summary.seconds_of(costs, "train"), summary.seconds_of(costs, "influence")
    lead = (
        f"All stages took {words.duration(total)}; {longest.stage} took the most, "
        f"{words.duration(longest.seconds)} ({100 * longest.seconds / total:.0f} %)."
    )
    if training and scoring:
        lead += (
            f" Measuring influence cost {words.duration(scoring)}, {100 * scoring / training:.0f} % of the "
            f"{words.duration(training)} of training it steered."
        )
    lead += " Look for the stage worth making faster."
    note = "Wall time per stage as the ledger has it, attempts that were cut off and continued included."
    return Figure(anchor, title, lead, table(head, rows, "numbers stages"), note)


def control_command(run: Run) -> str:
    """Trains the control of a run: its last phase again on the uniform blend, from the same checkpoint."""
    last = run.phases[-1]
    if len(run.phases) < 2:
        start = ""
    else:
        step = run.last_of(run.phases[-2])["step"]
        start = f" train.init_from={run.root / 'checkpoints' / f'step_{step:08d}'}"
    return (
        f"torchrun --nproc-per-node 2 tools/train.py {run.root / 'config.yaml'} "
        f"train.run={run.root / 'control'}{start} phases.{last}.weights=uniform"
    )


def _reach(run: Run) -> int:
    """Neighbours on either side of a smoothed point: about 4 % of the run in all."""
    return max(2, len(run.metrics) // 50)


def _calm(run: Run, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Smoothed within each phase: a new mixture moves the loss at once, and that must stay visible."""
    ends = [float(run.last_of(p)["tokens"]) for p in run.phases]
    out: list[tuple[float, float]] = []
    begin = -math.inf
    for end in ends:
        part = [p for p in points if begin < p[0] <= end]
        values = smooth([v for _, v in part], _reach(run))
        out += [(t, float(v)) for (t, _), v in zip(part, values, strict=True)]
        begin = end
    return out


def _branch(run: Run, arm: Run, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The run's last point before `arm` begins: where the control forks off."""
    if arm is run:
        return []
    return [p for p in points if p[0] < arm.metrics[0]["tokens"]][-1:]


def _fork(reading: Reading) -> float | None:
    """Tokens at which the control leaves the run; None where there is none or it starts from nothing."""
    if reading.control is None:
        return None
    first = reading.control.metrics[0]["tokens"]
    shared = [m["tokens"] for m in reading.run.metrics if m["tokens"] < first]
    return float(shared[-1]) if shared else None


def _some(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Dots at the measurements, where they are few enough to stand apart."""
    return points if len(points) <= 24 else []


def _loss_range(reading: Reading) -> tuple[float, float]:
    """All losses but the first steep fall, which would flatten the rest."""
    values = [float(m["loss"]) for _, arm in reading.arms for m in arm.metrics if math.isfinite(m["loss"])]
    skipped = len(reading.run.metrics) // 25
    late = [float(m["loss"]) for m in reading.run.metrics[skipped:] if math.isfinite(m["loss"])]
    return _padded(min(values), max(late))


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def _token_panel(
    reading: Reading, left: float, right: float, top: float, bottom: float, span: tuple[float, float]
) -> Panel:
    """x: tokens from 0 to the furthest arm's end; y: `span`."""
    most = max(arm.end["tokens"] for _, arm in reading.arms)
    return Panel(Scale(0.0, float(most), left, right), Scale(*span, bottom, top))


def _token_axes(panel: Panel, y_label: str, most: int = 6) -> str:
    xs, ys = ticks(panel.x.low, panel.x.high, most), ticks(panel.y.low, panel.y.high, 5)
    step = ys[1] - ys[0] if len(ys) > 1 else 0.01
    named = [(v, words.count(v)) for v in xs]
    return axes(
        panel,
        named,
        [(v, words.tick(v, step)) for v in ys],
        "tokens" if most > 3 and y_label else "",
        y_label,
    )


def _phase_marks(panel: Panel, run: Run, named: bool = True) -> str:
    """A broken line where a phase begins, and the phases' names above."""
    parts = []
    start = 0.0
    for phase in run.phases:
        end = float(run.last_of(phase)["tokens"])
        left, right = panel.x(start), panel.x(end)
        if start > 0:
            parts.append(line(left, panel.y.end, left, panel.y.start, "phase"))
        if named and right - left > width_of(phase) + 50:
            parts.append(text((left + right) / 2, panel.y.end - 10, f"phase {phase}", "muted", "middle"))
        start = end
    return "".join(parts)


def _mixture_legend(names: Sequence[str], x: Scale) -> str:
    parts, at = [], x(0)
    for row, name in enumerate(names):
        fade = "0.4" if row < len(names) - 1 else None
        parts.append(rect(at, 5, 22, 10, INK, opacity=fade))
        said = f"phase {name}"
        parts.append(text(at + 28, 14, said, "muted"))
        at += 28 + width_of(said) + 24
    return "".join(parts)


def _still_falling(calm: Sequence[tuple[float, float]]) -> str:
    """Whether the last tenth of the run still lowered the loss."""
    tenth = max(1, len(calm) // 10)
    if len(calm) < 10:
        return ""
    change = calm[-1][1] - calm[-1 - tenth][1]
    if change < -0.005:
        return f" Over the last tenth it still fell by {-change:.2f}."
    return (
        f" Over the last tenth it rose by {change:.2f}."
        if change > 0.005
        else " Over the last tenth it stood still."
    )
