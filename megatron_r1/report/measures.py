"""Figure of what is measured beside the held-out loss: RankMe, and each source's held-back text."""

from __future__ import annotations

from megatron_r1.report import palette, words
from megatron_r1.report.figure import (
    WIDTH,
    Figure,
    arm_curves,
    padded,
    phase_marks,
    token_axes,
    token_panel,
)
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.svg import Points, end_labels, path, picture, text, width_of

HEIGHT = 210.0


def figure(reading: Reading) -> Figure | None:
    """RankMe on the left, validation losses on the right, whichever there are; None where neither is."""
    run = reading.run
    ranks = [arm.points("rank_me") for _, arm in reading.arms]
    losses: dict[str, Points] = {s: run.points("validation_nll", s) for s in run.domains}
    losses = {s: points for s, points in losses.items() if points}
    shown = [bool(ranks[0]), bool(losses)]
    if not any(shown):
        return None
    cell = WIDTH / sum(shown)
    height = max(HEIGHT, 15.0 * len(losses) + 10)
    parts, said, note, titles = [], [], [], []
    if ranks[0]:
        parts.append(_rank_panel(reading, ranks, cell, height))
        first, last = ranks[0][0][1], ranks[0][-1][1]
        titles.append("rank of the embeddings")
        said.append(
            f"RankMe goes from {first:.1f} to {last:.1f}: about so many directions do the output embeddings "
            "use. Look for a rank that collapses."
        )
        note.append(
            "RankMe: exponential of the entropy of the singular values of the hidden states before the head, "
            "over the probing text (Eq. 8)."
        )
    if losses:
        parts.append(_loss_panel(reading, losses, WIDTH - cell, cell, height))
        titles.append("loss on each source's held-back text")
        said.append(_gap(run, losses) + " Look for a curve that turns up while its source is trained on.")
        note.append("Validation: text of each source behind the documents it trains on, nats per token.")
    name = words.both(titles)
    body = picture(WIDTH, height + 90, parts, "RankMe and validation loss over tokens")
    return Figure("measures", name[0].upper() + name[1:], " ".join(said), body, " ".join(note))


def _rank_panel(reading: Reading, ranks: list[list[tuple[float, float]]], cell: float, height: float) -> str:
    values = [v for points in ranks for _, v in points]
    margin = max(width_of(f"{name} 00.0") for name, _ in reading.arms) + 30
    panel = token_panel(reading, 50, cell - margin, 48, 48 + height, padded(min(values), max(values)))
    parts, labels = [text(42, 16, "RankMe", "panel"), token_axes(panel, "", "tokens", most=4)], []
    parts.append(phase_marks(panel, reading.run, named=False))
    for name, points, color, cls in arm_curves(reading, ranks):
        parts.append(path(panel.at(points), color, cls, name))
        labels.append((*points[-1], f"{name} {points[-1][1]:.1f}", color))
    return "".join([*parts, end_labels(panel, labels)])


def _loss_panel(reading: Reading, losses: dict[str, Points], left: float, cell: float, height: float) -> str:
    colors = palette.source_colors(reading.run.domains)
    values = [v for points in losses.values() for _, v in points]
    margin = max(width_of(f"{s} 0.00") for s in losses) + 22
    panel = token_panel(
        reading, left + 50, left + cell - margin, 48, 48 + height, padded(min(values), max(values))
    )
    parts = [
        text(left + 42, 16, "validation loss per source", "panel"),
        token_axes(panel, "", "tokens", most=4),
    ]
    parts.append(phase_marks(panel, reading.run, named=False))
    parts += [path(panel.at(points), colors[s], "curve", s) for s, points in losses.items()]
    ends = [(*points[-1], f"{s} {points[-1][1]:.2f}", colors[s]) for s, points in losses.items()]
    return "".join([*parts, end_labels(panel, ends)])


def _gap(run: Run, losses: dict[str, Points]) -> str:
    """Which source's held-back text ends hardest, and whether any has become harder again."""
    hard = max(losses, key=lambda s: losses[s][-1][1])
    lead = f"{hard} ends hardest on held-back text, at {losses[hard][-1][1]:.2f} nats per token."
    risen = [s for s, points in losses.items() if points[-1][1] > min(v for _, v in points) + 0.005]
    if risen:
        lead += f" Above {'its' if len(risen) == 1 else 'their'} lowest at the end: {words.both(risen)}."
    return lead
