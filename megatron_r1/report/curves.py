"""Figures over tokens: training loss, loss per source, held-out loss per capability."""

from __future__ import annotations

import math

from megatron_r1.checkpoint.files import step_path
from megatron_r1.report import palette, summary, words
from megatron_r1.report.figure import (
    CONTROL,
    WIDTH,
    Figure,
    arm_curves,
    calm,
    padded,
    phase_marks,
    reach,
    token_axes,
    token_panel,
)
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.svg import (
    Panel,
    Points,
    Scale,
    clipped,
    element,
    end_labels,
    line,
    path,
    picture,
    text,
    thin,
    width_of,
)
from megatron_r1.report.table import Cell, Table
from megatron_r1.run.layout import RunDir

HELD_OUT = "Held-out loss per capability"
ROW_HEIGHT = 250.0


def loss(reading: Reading) -> Figure:
    """Training loss per step of both arms."""
    run = reading.run
    margin = max(width_of(f"{name} 0.00") for name, _ in reading.arms) + 30
    panel = token_panel(reading, 64, WIDTH - margin, 26, 320, _loss_range(reading))
    drawn, labels = [], []
    raw = [_losses(arm) for _, arm in reading.arms]
    smoothed = [calm(arm, points, reach(run)) for (_, arm), points in zip(reading.arms, raw, strict=True)]
    for faint, (name, points, color, cls) in zip(raw, arm_curves(reading, smoothed), strict=True):
        drawn.append(path(panel.at(thin(faint)), color, "raw"))
        drawn.append(path(panel.at(thin(points)), color, cls))
        labels.append((*points[-1], f"{name} {points[-1][1]:.2f}", color))
    body = picture(
        WIDTH,
        362,
        [
            token_axes(panel, "loss, nats per token", "tokens"),
            phase_marks(panel, run),
            clipped(panel, "clip-loss", "".join(drawn)),
            _skip_marks(panel, reading),
            end_labels(panel, labels),
        ],
        "Training loss over tokens",
    )
    first, last = raw[0][0][1], labels[0][1]
    tokens = words.count(run.end["tokens"])
    lead = f"Training loss goes from {first:.2f} to {last:.2f} nats per token over {tokens} tokens."
    lead += _still_falling(raw[0])
    if reading.control:
        lead += (
            " Where the arms part they read different text, so this loss does not compare them:"
            " the held-out loss below does."
        )
    skipped = sum(summary.skipped(run))
    if skipped:
        lead += f" {words.many(skipped, 'step')} {'was' if skipped == 1 else 'were'} skipped as bad."
    lead += " Look for spikes and for a curve that stops falling."
    note = f"Faint: every step. Strong: smoothed over {2 * reach(run) + 1} steps within a phase."
    if any(any(summary.skipped(arm)) for _, arm in reading.arms):
        note += " Marks on the axis: steps whose loss or gradient was bad, so that no update was made."
    if first > panel.y.high:
        note += f" The first steps lie above the frame (from {first:.2f})."
    return Figure("loss", "Training loss", lead, body, note)


def _skip_marks(panel: Panel, reading: Reading) -> str:
    """A stroke on the axis at every step that changed nothing."""
    parts = []
    for (_, arm), color in zip(reading.arms, ("rgb(var(--negative))", CONTROL), strict=False):
        for at, skipped in zip(arm.metrics, summary.skipped(arm), strict=True):
            if skipped:
                x, foot = panel.x(float(at["tokens"])), panel.y.start
                tip = f"step {at['step']:,} was skipped"
                parts.append(line(x, foot, x, foot - 12, "mark", tip=tip, style=f"stroke:{color}"))
    return "".join(parts)


def _losses(run: Run) -> list[tuple[float, float]]:
    """(tokens, loss) of every step whose loss is a number; a run that has none is drawn as nothing."""
    return run.points("loss") or [(float(run.end["tokens"]), math.nan)]


def _loss_range(reading: Reading) -> tuple[float, float]:
    """All losses but the first steep fall, which would flatten the rest."""
    values = [v for _, arm in reading.arms for _, v in _losses(arm) if math.isfinite(v)]
    late = [v for _, v in _losses(reading.run)[len(reading.run.metrics) // 25 :] if math.isfinite(v)]
    return padded(min(values), max(late)) if late else (0.0, 1.0)


def _still_falling(points: Points) -> str:
    """Whether the last tenth of the run lowered the loss further."""
    tenth = len(points) // 10
    if tenth < 3:
        return ""
    last = sum(v for _, v in points[-tenth:]) / tenth
    change = last - sum(v for _, v in points[-2 * tenth : -tenth]) / tenth
    if abs(change) < 0.005:
        return " Over its last tenth it stands still."
    return (
        f" Its last tenth averages {abs(change):.2f} {'below' if change < 0 else 'above'} the tenth before."
    )


def loss_by_source(reading: Reading) -> Figure:
    """One panel per domain, a curve per source."""
    run = reading.run
    colors = palette.source_colors(run.domains)
    losses: dict[str, Points] = {s: run.points("loss_by_source", s) for s in run.sources}
    losses = {s: points for s, points in losses.items() if points}
    domains = [d for d in palette.domain_order(run.domains) if any(run.domains[s] == d for s in losses)]
    smoothed = {s: calm(run, points, reach(run)) for s, points in losses.items()}
    late = [v for points in losses.values() for _, v in points[len(points) // 25 :]]
    span = padded(min(late), max(late)) if late else (0.0, 1.0)
    margin = max(width_of(f"{s} 0.00") for s in run.sources) + 22
    columns = min(2, len(domains))
    cell = WIDTH / max(1, columns)
    height = max(190.0, 15.0 * max((list(run.domains.values()).count(d) for d in domains), default=1) + 20)
    parts = []
    for i, domain in enumerate(domains):
        left, top = (i % columns) * cell, (i // columns) * (height + 74)
        panel = token_panel(reading, left + 46, left + cell - margin, top + 34, top + 34 + height, span)
        members = [s for s in losses if run.domains[s] == domain]
        drawn = [path(panel.at(thin(losses[s], 240)), colors[s], "raw", s) for s in members]
        drawn += [path(panel.at(thin(smoothed[s], 240)), colors[s], "curve", s) for s in members]
        ends = [(*smoothed[s][-1], f"{s} {smoothed[s][-1][1]:.2f}", colors[s]) for s in members]
        parts += [
            text(left + 46, top + 16, domain, "panel"),
            token_axes(panel),
            phase_marks(panel, run, named=False),
            clipped(panel, f"clip-source-{i}", "".join(drawn)),
            end_labels(panel, ends),
        ]
    body = picture(
        WIDTH,
        -(-len(domains) // max(1, columns)) * (height + 74),
        parts,
        "Training loss per source over tokens",
    )
    note = (
        f"Arm {reading.arms[0][0]}. Mean loss of each source's tokens in a step: faint as measured, strong "
        f"smoothed over {2 * reach(run) + 1} of its steps. All panels share their axes: tokens, and nats per "
        "token. Broken line: a new phase."
    )
    return Figure("sources", "Training loss per source", _source_lead(run, smoothed), body, note)


def _source_lead(run: Run, smoothed: dict[str, list[tuple[float, float]]]) -> str:
    """Which source is hardest, which easiest, which was learned and which was not."""
    falls = summary.fall_by_source(run)
    if not falls:
        return "No source has two steps with a loss yet."
    ends = {s: smoothed[s][-1][1] for s in smoothed}
    low, high = summary.extremes(ends)
    slow, fast = summary.extremes(falls)
    lead = (
        f"{high} stays the hardest to predict ({ends[high]:.2f} nats per token), {low} ends lowest "
        f"({ends[low]:.2f}). {fast} is learned most (its loss falls by {falls[fast]:.2f}), "
        f"{slow} least ({falls[slow]:.2f}). Look for a curve that stays high and flat: text from which "
        "nothing more is learned."
    )
    early = [s for s, points in smoothed.items() if points[-1][0] < 0.9 * run.end["tokens"]]
    if early:
        lead += f" The mixture stopped drawing {words.both(early)}, hence the early end."
    return lead


def held_out(reading: Reading) -> Figure:
    """Held-out NLL per capability over training, and its end in a table."""
    run = reading.run
    ends = summary.held_out(reading)
    if ends is None:
        return _not_measured(reading)
    capabilities = list(next(iter(ends.by_arm.values())))
    fork = _fork(reading)
    rows = 1 if fork is None else 2
    parts = [_held_out_column(reading, c, i, len(capabilities), fork) for i, c in enumerate(capabilities)]
    body = picture(WIDTH, ROW_HEIGHT * rows + 14, parts, "Held-out loss per capability over tokens")
    tables = [held_out_table(ends)]
    note = (
        f"Mean negative log-likelihood per token of text that is kept out of training; the table is at "
        f"{words.count(ends.tokens)} tokens, which every arm has read."
    )
    if fork is not None:
        note += " Upper row: the whole run. Lower row: from the fork on. Every panel has a scale of its own."
    if reading.control is None:
        values = [f"{v:.3f} ({c})" for c, v in next(iter(ends.by_arm.values())).items()]
        lead = (
            f"At {words.count(ends.tokens)} tokens the held-out loss is {words.both(values)}, in nats per "
            "token. There is no control run to compare with; this trains one:"
        )
        return Figure("heldout", HELD_OUT, lead, body, note, control_command(run), tables)
    note += " One run of each arm: no error bars."
    return Figure("heldout", HELD_OUT, _compared(reading, ends), body, note, tables=tables)


def _not_measured(reading: Reading) -> Figure:
    run = reading.run
    more = []
    if run.config.data.probes:
        lead = (
            "No held-out loss was measured yet at a step that every arm has reached. Training on measures it:"
        )
    else:
        lead = "No held-out sets are named, so no loss on them is known. Training with them measures it:"
        more = ["data.probes.code=PREFIX", f"train.probe_every={run.config.train.probe_every}"]
    return Figure("heldout", HELD_OUT, lead, command=summary.launch(run, "train", *more))


def _held_out_column(reading: Reading, capability: str, column: int, columns: int, fork: float | None) -> str:
    """One capability: the whole course above, what follows the fork below."""
    run = reading.run
    color = palette.capability_colors([capability])[capability]
    cell = WIDTH / columns
    left = column * cell + 50
    margin = max(width_of(f"{name} 0.000") for name, _ in reading.arms) + 22
    curves = list(
        arm_curves(reading, [arm.points("probe_nll", capability) for _, arm in reading.arms], color)
    )
    parts = [text(left - 8, 16, capability, "panel")]
    for row, since in enumerate([0.0] if fork is None else [0.0, fork]):
        top = 48 + row * ROW_HEIGHT
        values = [v for _, points, _, _ in curves for t, v in points if t >= since] or [0.0]
        last = max((points[-1][0] for _, points, _, _ in curves), default=since + 1)
        panel = Panel(
            Scale(since, last, left, max(left + 80, (column + 1) * cell - margin)),
            Scale(*padded(min(values), max(values)), top + 170, top),
        )
        parts.append(token_axes(panel, "from the fork on" if row else "nats per token", most=4))
        if row == 0:
            parts.append(phase_marks(panel, run, named=False))
        labels = []
        for name, points, stroke, cls in curves:
            at = panel.at([p for p in points if p[0] >= since])
            parts.append(path(at, stroke, cls, name))
            # Dots at the measurements, where they are few enough to stand apart.
            dots = at if len(at) <= 24 else []
            parts += [element("circle", cx=a, cy=b, r=2.2, style=f"fill:{stroke}") for a, b in dots]
            labels.append((*points[-1], f"{name} {points[-1][1]:.3f}", stroke))
        parts.append(end_labels(panel, labels))
    return "".join(parts)


def _compared(reading: Reading, ends: summary.HeldOut) -> str:
    """Which arm ended ahead, on what, and by how much."""
    (name, _), (control, _) = reading.arms
    gaps = {c: round(ends.difference(c), 3) for c in next(iter(ends.by_arm.values()))}
    ahead = [f"{c} by {-gap:.3f}" for c, gap in gaps.items() if gap < 0]
    behind = [f"{c} by {gap:.3f}" for c, gap in gaps.items() if gap > 0]
    level = [c for c, gap in gaps.items() if gap == 0]
    said = [f"ahead on {words.both(ahead)}"] if ahead else []
    said += [f"behind on {words.both(behind)}"] if behind else []
    said += [f"level on {words.both(level)}"] if level else []
    return (
        f"After the same number of tokens, arm {name} is {words.both(said)} nats per token, "
        f"compared with arm {control}. Lower is better; look at the lower row, where the arms part."
    )


def held_out_table(ends: summary.HeldOut, brief: bool = False) -> Table:
    """Held-out loss per capability and arm, and how far the arms are apart."""
    arms = list(ends.by_arm)
    head = ["" if brief else "nats per token at the end", *arms]
    rows = [[Cell(c), *(Cell(f"{ends.by_arm[arm][c]:.3f}") for arm in arms)] for c in ends.by_arm[arms[0]]]
    if len(arms) == 2:
        head += ["difference"] if brief else ["difference", ""]
        for c, row in zip(ends.by_arm[arms[0]], rows, strict=True):
            gap = ends.difference(c)
            row.append(Cell(words.signed(gap), kind="strong"))
            if not brief:
                row.append(Cell(f"{words.signed(100 * gap / ends.by_arm[arms[1]][c], 1)} %"))
    return Table(head, rows)


def control_command(run: Run) -> str:
    """Trains the control of a run: its last phase again on the uniform blend, from the same checkpoint."""
    start = []
    if len(run.phases) > 1:
        last = step_path(RunDir(run.root).checkpoints, run.last_of(run.phases[-2])["step"])
        start = [f"train.init_from={last}"]
    weights = f"phases.{run.phases[-1]}.weights=uniform"
    return summary.launch(run, "train", f"train.run={run.root / 'control'}", *start, weights)


def _fork(reading: Reading) -> float | None:
    """Tokens at which the control leaves the run; None where there is none or it starts from nothing."""
    if reading.control is None:
        return None
    first = reading.control.metrics[0]["tokens"]
    shared = [line["tokens"] for line in reading.run.metrics if line["tokens"] < first]
    return float(shared[-1]) if shared else None
