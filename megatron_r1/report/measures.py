"""Figure of what is measured beside the held-out loss: RankMe, and each source's held-back text."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.report import palette, words
from megatron_r1.report.figure import (
    WIDTH,
    Curve,
    Figure,
    arm_curves,
    padded,
    phase_marks,
    token_axes,
    token_panel,
)
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.svg import end_labels, path, picture, text, width_of

HEIGHT = 210.0


def figure(reading: Reading) -> Figure | None:
    """RankMe on the left, validation losses on the right, whichever there are; None where neither is."""
    run = reading.run
    ranks = [arm.points("rank_me") for _, arm in reading.arms]
    colors = palette.source_colors(run.domains)
    losses = {s: run.points("validation_nll", s) for s in run.domains}
    losses = {s: points for s, points in losses.items() if points}
    shown = [bool(ranks[0]), bool(losses)]
    if not any(shown):
        return None
    cell = WIDTH / sum(shown)
    height = max(HEIGHT, 15.0 * len(losses) + 10)
    parts, said, note, titles = [], [], [], []
    if ranks[0]:
        parts.append(_panel(reading, "RankMe", list(arm_curves(reading, ranks)), 1, 0.0, cell, height))
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
        drawn = [(s, points, colors[s], "curve") for s, points in losses.items()]
        parts.append(_panel(reading, "validation loss per source", drawn, 2, WIDTH - cell, cell, height))
        titles.append("loss on each source's held-back text")
        said.append(_gap(run, losses) + " Look for a curve that turns up while its source is trained on.")
        note.append("Validation: text of each source behind the documents it trains on, nats per token.")
    name = words.both(titles)
    body = picture(WIDTH, height + 90, parts, "RankMe and validation loss over tokens")
    return Figure("measures", name[0].upper() + name[1:], " ".join(said), body, " ".join(note))


def _panel(
    reading: Reading, name: str, curves: Sequence[Curve], digits: int, left: float, cell: float, height: float
) -> str:
    """Curves over tokens, each with its name and last value."""
    values = [v for _, points, _, _ in curves for _, v in points]
    ends = [(*points[-1], f"{said} {points[-1][1]:.{digits}f}", color) for said, points, color, _ in curves]
    margin = max(width_of(said) for _, _, said, _ in ends) + 30
    span = padded(min(values), max(values))
    panel = token_panel(reading, left + 50, left + cell - margin, 48, 48 + height, span)
    parts = [text(left + 42, 16, name, "panel"), token_axes(panel, "", "tokens", most=4)]
    parts.append(phase_marks(panel, reading.run, named=False))
    parts += [path(panel.at(points), color, cls, said) for said, points, color, cls in curves]
    return "".join([*parts, end_labels(panel, ends)])


def _gap(run: Run, losses: dict[str, list[tuple[float, float]]]) -> str:
    """Which source's held-back text ends hardest, and whether any has become harder again."""
    hard = max(losses, key=lambda s: losses[s][-1][1])
    lead = f"{hard} ends hardest on held-back text, at {losses[hard][-1][1]:.2f} nats per token."
    risen = [s for s, points in losses.items() if points[-1][1] > min(v for _, v in points) + 0.005]
    if risen:
        lead += f" Above {'its' if len(risen) == 1 else 'their'} lowest at the end: {words.both(risen)}."
    return lead
