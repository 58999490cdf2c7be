"""Figure of Eq. 1 against Eq. 2: what runs without each source measured, beside what its scores predicted."""

from __future__ import annotations

import math

import numpy as np

from megatron_r1.report import palette, summary, words
from megatron_r1.report.agreement import spearman
from megatron_r1.report.figure import WIDTH, Figure, marks, padded
from megatron_r1.report.load import Reading
from megatron_r1.report.svg import Panel, Scale, axes, element, picture, spread, text

_HEIGHT = 230.0
_NAMED = 16
"""Sources whose names still find room beside their dots."""


def figure(reading: Reading) -> Figure | None:
    """One panel a capability, one dot a source; None where nothing was measured or scored."""
    found = summary.influence(reading)
    measured = reading.measured_impact
    if not found or not measured:
        return None
    capabilities = list(reading.scores[0].capabilities)
    shown = [c for c in capabilities if len(set(measured.get(c, {})) & {s.source for s in found}) > 2]
    if not shown:
        return None
    colors = palette.source_colors(reading.run.domains)
    cell = WIDTH / len(shown)
    parts, said = [], []
    for place, capability in enumerate(shown):
        impact = measured[capability]
        column = capabilities.index(capability)
        dots = [
            (s.source, float(s.mean_C[column]), float(impact[s.source])) for s in found if s.source in impact
        ]
        dots = [d for d in dots if math.isfinite(d[1]) and math.isfinite(d[2])]
        rank = spearman(*(np.array([d[axis] for d in dots]) for axis in (1, 2)))
        label = words.minus(f"{rank:.2f}")
        said.append(f"{capability} {label}")
        parts += _panel(f"{capability}, rank correlation {label}", dots, colors, place * cell, cell)
    lead = (
        f"A run without a source shows what the source was worth. The order of the scores and of these "
        f"measurements correlates by {words.both(said)}. Look for sources far from the rising line that "
        f"the others make: there the scores misjudge."
    )
    few = [c for c in capabilities if c in measured and c not in shown]
    note = (
        "Right: mean score of the source's examples, as the mixture weighs them. Up: how much higher the "
        "loss on the capability's probing set ended without the source, nats per token (Eq. 1)."
    )
    note += f" Left out, measured for fewer than three sources: {words.both(few)}." if few else ""
    body = picture(WIDTH, _HEIGHT + 92, parts, "measured impact of leaving a source out over its mean score")
    return Figure("predicted", "Predicted and measured", lead, body, note)


def _panel(
    name: str, dots: list[tuple[str, float, float]], colors: dict[str, str], left: float, cell: float
) -> list[str]:
    largest = max(max(abs(x) for _, x, _ in dots), 1e-300)
    power = words.power_of(largest)
    scale = 10.0**-power
    x_low, x_high = padded(min(x for _, x, _ in dots) * scale, max(x for _, x, _ in dots) * scale)
    y_low, y_high = padded(min(y for _, _, y in dots), max(y for _, _, y in dots))
    panel = Panel(Scale(x_low, x_high, left + 58, left + cell - 20), Scale(y_low, y_high, 48 + _HEIGHT, 48.0))
    unit = f"mean score {words.power(power)}" if power else "mean score"
    parts = [
        text(left + 50, 16, name, "panel"),
        axes(panel, marks(x_low, x_high, 4), marks(y_low, y_high, 5), unit, "nats without it"),
    ]
    places = spread([panel.y(y) for _, _, y in dots], 13.0, panel.y.end, panel.y.start)
    for (source, x, y), place in zip(dots, places, strict=True):
        tip = f"{source}: {words.compact(x)}, {words.signed(y)} nats"
        style = f"fill:{colors.get(source, 'var(--control)')}"
        at = {"cx": panel.x(x * scale), "cy": panel.y(y)}
        parts.append(element("circle", tip=tip, **at, r=4.0, style=style))
        if len(dots) <= _NAMED:
            right = panel.x(x * scale) < (panel.x.start + panel.x.end) / 2
            side = ("start", 8.0) if right else ("end", -8.0)
            parts.append(text(at["cx"] + side[1], place + 4, source, "name", side[0], style=style))
    return parts
