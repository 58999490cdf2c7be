"""Charts of a report, as Vega-Lite specifications with their data. A figure is a list of panels.

Colours are CSS variables, so that one drawing serves light and dark. `COLORS` has both values of each.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from megatron_r1.records import CAPABILITIES
from megatron_r1.report import summary
from megatron_r1.report.load import Reading, Run

_HUES = {
    "blue": "#1f5fa8 #3f8fdc #0b3266 #6b86c9 #6cb0f5 #3d86d8 #b4d6fb #8ea4e0",
    "orange": "#c75000 #d98200 #7c3000 #b87333 #ff9a45 #d27414 #ffcb98 #d6a06a",
    "teal": "#00796b #1e9e86 #00423a #5b8f84 #3fc9ad #1f9c86 #a5e8da #86b5ab",
    "magenta": "#a8286e #cf5fa3 #611442 #a4658d #ea83bd #c65a9f #f8c1e0 #c795b4",
    "olive": "#6b6b00 #8f8a1e #424200 #85855a #c9c24a #98922a #e6e2a0 #b3b08a",
    "grey": "#4f555e #7d838c #2a2e34 #8b8378 #b8bdc5 #868c95 #dfe2e6 #a8a094",
}
"""A hue per domain, a shade per source: four shades for light, four for dark. The first four hues stay apart
under the common colour-vision deficiencies."""
_SHADES = 4
COLORS = {
    "page": ("#f7f6f3", "#131518"),
    "card": ("#ffffff", "#1b1e22"),
    "ink": ("#1c1f24", "#eae8e3"),
    "muted": ("#5d636d", "#a0a5ad"),
    "grid": ("#e4e2dc", "#30343a"),
    "axis": ("#9a9ea6", "#6d727a"),
    "control": ("#6b7078", "#a6abb3"),
    "positive": ("#1f5fa8", "#6cb0f5"),
    "negative": ("#c75000", "#ff8c3c"),
    **{
        f"{hue}-{i}": (shades.split()[i], shades.split()[i + _SHADES])
        for hue, shades in _HUES.items()
        for i in range(_SHADES)
    },
}
"""Name -> colour in light and in dark mode."""
INK, MUTED, CONTROL = "var(--ink)", "var(--muted)", "var(--control)"
_TICKS = "replace(format(datum.value, '~s'), 'G', 'B')"
"""Tokens on an axis: 700k, 2.6M, 1B."""
_HOVER = {"filled": True, "size": 90, "opacity": 0, "clip": True}
"""Invisible dots that carry the tips of a curve; the page shows the one under the pointer."""
_POINTS = 300
"""Of a drawn curve, at most about so many."""
CONFIG: dict[str, Any] = {
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, 'DejaVu Sans', sans-serif",
    "background": "transparent",
    "padding": 2,
    "view": {"stroke": None},
    "title": {"anchor": "start", "color": INK, "subtitleColor": MUTED, "fontSize": 14, "offset": 8},
    "axis": {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "gridColor": "var(--grid)",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleAnchor": "end",
    },
    "axisX": {"grid": False, "tickSize": 4},
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    "legend": {"labelColor": INK, "labelFontSize": 11.5, "labelLimit": 260, "rowPadding": 3, "columnPadding": 14, "offset": 6},
    "text": {"color": INK, "fontSize": 11},
    "rule": {"color": "var(--axis)"},
    "tick": {"color": INK, "thickness": 2},
}


def domain_order(domains: Mapping[str, str]) -> list[str]:
    """Capabilities first, in their own order, then whatever else the sources name."""
    named = list(dict.fromkeys(domains.values()))
    return [c for c in CAPABILITIES if c in named] + [d for d in named if d not in CAPABILITIES]


def colors(domains: Mapping[str, str]) -> dict[str, str]:
    """Colour of each source. A capability always has its own hue; other domains take the next, in order."""
    hues, others = list(_HUES), [d for d in domain_order(domains) if d not in CAPABILITIES]
    spare = hues[len(CAPABILITIES) :]
    hue = dict(zip(CAPABILITIES, hues, strict=False)) | {d: spare[i % len(spare)] for i, d in enumerate(others)}
    used, out = dict.fromkeys(hues, 0), {}
    for source, domain in domains.items():
        out[source] = f"var(--{hue[domain]}-{used[hue[domain]] % _SHADES})"
        used[hue[domain]] += 1
    return out


@dataclass(frozen=True)
class Curve:
    name: str
    points: tuple[np.ndarray, np.ndarray]
    """Tokens, values."""
    color: str
    dashed: bool = False


def table(rows: Iterable[Mapping[str, Any]]) -> alt.Chart:
    """A chart of these rows, numbers at six digits."""
    short = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return alt.Chart(alt.Data(values=short))


def tokens_axis(low: float, high: float) -> alt.X:
    count = alt.ExprRef("max(2, floor(width / 100))")
    axis = alt.Axis(labelExpr=_TICKS, tickCount=count, title="tokens", labelSeparation=6)
    return alt.X("tokens:Q", scale=alt.Scale(domain=[low, high], nice=False), axis=axis)


def sources_axis(reading: Reading) -> tuple[alt.Y, alt.Color]:
    """A row per source, domain by domain, and the colours of the sources without a legend."""
    shades, domains = colors(reading.run.domains), reading.run.domains
    order = [s for domain in domain_order(domains) for s in domains if domains[s] == domain]
    axis = alt.Axis(title=None, labelColor=_label_colors(shades), labelFontWeight=600, labelLimit=200, labelOverlap=False)
    return alt.Y("source:N", sort=order, axis=axis), _source_color(shades)


def _source_color(shades: Mapping[str, str], legend: Any = None) -> alt.Color:
    return alt.Color("source:N", scale=alt.Scale(domain=list(shades), range=list(shades.values())), legend=legend)


def _label_colors(shades: Mapping[str, str], name: str = "datum.label") -> alt.ExprRef:
    return alt.ExprRef(f"{json.dumps(shades)}[{name}]")


def titled(chart: Any, title: str, unit: str = "", height: float = 220) -> Any:
    return chart.properties(title=alt.Title(title, subtitle=unit), height=height)


def phase_marks(run: Run, named: bool) -> list[alt.Chart]:
    """A broken line where a phase begins and its name, where there is room for it."""
    whole = run.spans[-1][2] - run.spans[0][1]
    rows = [{"tokens": begin, "to": end, "phase": phase} for phase, begin, end in run.spans]
    rules = [row for row in rows if float(str(row["tokens"])) > 0]
    drawn = [table(rules).mark_rule(strokeDash=[2, 4], clip=True).encode(x="tokens:Q")] if rules else []
    wide = [row for row, (_, begin, end) in zip(rows, run.spans, strict=True) if end - begin > 0.08 * whole]
    if named and wide:
        names = table(wide).mark_text(align="left", dx=5, color=MUTED, clip=True)
        drawn.append(names.encode(x="tokens:Q", y=alt.value(5), text="phase:N"))
    return drawn


def reach(run: Run) -> int:
    """Neighbours on either side of a smoothed point: a tenth of a short run in all, 2 % of a long one."""
    steps = len(run.columns["tokens"])
    return max(2, min(steps // 20, max(8, steps // 100)))


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and its `reach` neighbours on either side."""
    total, at = np.cumsum(np.insert(values, 0, 0.0)), np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    mean: np.ndarray = (total[high] - total[low]) / (high - low)
    return mean


def calm(run: Run, points: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed within each phase: a new mixture moves the loss at once, which must stay visible."""
    tokens, values = points
    cuts = np.searchsorted(tokens, [begin for _, begin, _ in run.spans[1:]], side="right")
    return tokens, np.concatenate([smooth(part, reach(run)) for part in np.split(values, cuts)])


def thin(points: tuple[np.ndarray, np.ndarray], most: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points that keep the outline: both ends, lowest and highest of each stretch."""
    tokens, values = points
    if len(values) <= most:
        return points
    cuts = np.linspace(0, len(values), most // 2 + 1, dtype=int)
    parts = [(a, values[a:b]) for a, b in itertools.pairwise(cuts)]
    keep = {int(a + at) for a, part in parts for at in (np.argmin(part), np.argmax(part))}
    order = sorted(keep | {0, len(values) - 1})
    return tokens[order], values[order]


def curves(
    run: Run,
    drawn: Sequence[Curve],
    title: str,
    unit: str,
    *,
    smoothed: bool = False,
    span: tuple[float, float] | None = None,
    since: float = 0.0,
    named: bool = False,
    form: str = ".3f",
    height: float = 220,
) -> Any:
    """Curves over tokens, each with its last value in the legend; `smoothed`: the measured ones faint behind.

    Rows: name, kind ("value", or "raw" of those behind), tokens, value. `span`: of the y axis; `since`: tokens
    at which the x axis begins.
    """
    lines = [(c, "raw", c.points) for c in drawn if smoothed]
    lines += [(c, "value", calm(run, c.points) if smoothed else c.points) for c in drawn]
    ends = {c.name: points[1][-1] for c, kind, points in lines if kind == "value"}
    order = sorted(drawn, key=lambda c: -ends[c.name])
    rows = [
        {"name": c.name, "kind": kind, "tokens": float(t), "value": float(v)}
        for c, kind, points in lines
        for t, v in zip(*thin(points), strict=True)
    ]
    labels = json.dumps({name: f"{name}  {value:{form}}" for name, value in ends.items()})
    legend = alt.Legend(
        title=None,
        orient="top",
        columns=2,
        labelExpr=f"{labels}[datum.label]",
        symbolType="stroke",
        symbolStrokeWidth=2,
        symbolSize=400,
        symbolOpacity=1,
    )
    names = [c.name for c in order]
    color = alt.Color("name:N", scale=alt.Scale(domain=names, range=[c.color for c in order]), legend=legend)
    dash_range = [[5, 4] if c.dashed else [1, 0] for c in order]
    dash = alt.StrokeDash("name:N", scale=alt.Scale(domain=names, range=dash_range), legend=legend)
    every = [row["value"] for row in rows]
    scale = alt.Scale(domain=span or padded(min(every), max(every)), nice=False)
    base = table(rows).encode(
        x=tokens_axis(since, 1.01 * max(run.end["tokens"], *(row["tokens"] for row in rows))),
        y=alt.Y("value:Q", scale=scale, axis=alt.Axis(title=None, tickCount=5)),
        color=color,
    )
    values = base.transform_filter("datum.kind == 'value'")
    tips = ["name:N", alt.Tooltip("tokens:Q", format=".3s"), alt.Tooltip("value:Q", format=",.5~g")]
    layers = [values.mark_line(strokeWidth=2, clip=True).encode(strokeDash=dash)]
    if smoothed:
        raw = base.transform_filter("datum.kind == 'raw'")
        layers.insert(0, raw.mark_line(strokeWidth=1, opacity=0.28, clip=True))
    if max(len(c.points[0]) for c in drawn) <= 24:
        layers.append(values.mark_circle(size=22, opacity=1, clip=True))
    layers.append(values.mark_circle(**_HOVER).encode(tooltip=tips))
    return titled(alt.layer(*layers, *phase_marks(run, named)), title, unit, height)


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with a little room above and below."""
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def late_span(run: Run, points: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float] | None:
    """All values but the first steep fall, which would flatten the rest."""
    first = run.columns["tokens"][len(run.columns["tokens"]) // 25]
    values = [v[t >= first] for t, v in points]
    late = np.concatenate([*values, np.empty(0)])
    return padded(float(late.min()), float(late.max())) if len(late) else None


def arm_curves(reading: Reading, name: str, color: str = INK, since: float = 0.0) -> list[Curve]:
    """A metric of each arm that has it. The control's begins at the run's last point before the fork."""
    out: list[Curve] = []
    for arm, run in reading.arms.items():
        tokens, values = run.points(name)
        if out and len(values):
            ours = out[0].points
            before = np.flatnonzero(ours[0] < run.first["tokens"])[-1:]
            tokens, values = np.append(ours[0][before], tokens), np.append(ours[1][before], values)
        keep = tokens >= since
        if keep.any():
            out.append(Curve(arm, (tokens[keep], values[keep]), CONTROL if out else color, bool(out)))
    return out


def loss(reading: Reading) -> list[Any]:
    """Training loss of both arms; marks on the axis where a step was skipped."""
    run, drawn = reading.run, arm_curves(reading, "loss")
    if not drawn:
        return []
    span = late_span(run, (c.points for c in drawn))
    chart = curves(run, drawn, "", "nats per token", smoothed=True, span=span, named=True, height=300)
    rows = [
        {"tokens": float(tokens), "step": float(step), "tip": f"step {step:,.0f} of {arm} was skipped"}
        for arm, of in reading.arms.items()
        for tokens, step in zip(*skipped(of), strict=True)
    ]
    if rows:
        marks = table(rows).mark_tick(orient="vertical", color="var(--negative)", size=12, clip=True)
        chart += marks.encode(x="tokens:Q", y=alt.value(294), tooltip="tip:N")
    return [chart]


def skipped(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and numbers of the steps whose update was left out."""
    at = np.nan_to_num(run.columns.get("skipped", np.zeros(1))) > 0
    found = np.flatnonzero(at)
    return run.columns["tokens"][found], run.columns["step"][found]


def loss_by_source(reading: Reading) -> list[Any]:
    """A panel per domain, a curve per source, all on the same axes."""
    run, shades = reading.run, colors(reading.run.domains)
    points = {s: run.points(f"loss_by_source/{s}") for s in run.measured("loss_by_source")}
    span = late_span(run, points.values())
    return [
        curves(run, members, domain, "nats per token", smoothed=True, span=span)
        for domain in domain_order(run.domains)
        if (members := [Curve(s, points[s], shades[s]) for s in points if run.domains[s] == domain])
    ]


def held_out(reading: Reading) -> list[Any]:
    """A panel per capability: the whole run, then what follows the fork."""
    run, fork = reading.run, summary.fork(reading)
    out = []
    for since, place in [(0.0, "")] + ([(fork, ", from the fork on")] if fork else []):
        for capability in run.measured("probe_nll"):
            color = colors({capability: capability})[capability]
            drawn = arm_curves(reading, f"probe_nll/{capability}", color, since)
            if drawn:
                out.append(curves(run, drawn, f"{capability}{place}", "nats per token", since=since))
    return out


def measures(reading: Reading) -> list[Any]:
    """RankMe of both arms, and the loss on each source's held-back text, whichever there are."""
    run, shades = reading.run, colors(reading.run.domains)
    ranks = arm_curves(reading, "rank_me")
    losses = [Curve(s, run.points(f"validation_nll/{s}"), shades[s]) for s in run.measured("validation_nll")]
    out = [curves(run, ranks, "RankMe", "directions in use", form=".1f")] if ranks else []
    return out + ([curves(run, losses, "validation loss per source", "nats per token")] if losses else [])


def schedule(reading: Reading) -> list[Any]:
    """Learning rate, gradient norm and throughput of both arms."""
    shown = [
        ("learning_rate", "learning rate", "as scheduled", ".3g"),
        ("grad_norm", "gradient norm", "before clipping", ".3f"),
        ("tokens_per_second", "throughput", "tokens per second, all ranks", ",.0f"),
    ]
    out = []
    for name, title, unit, form in shown:
        if drawn := arm_curves(reading, name):
            exact = name == "learning_rate"
            span = None if exact else late_span(reading.run, (c.points for c in drawn))
            chart = curves(reading.run, drawn, title, unit, smoothed=not exact, span=span, form=form, height=170)
            out.append(chart)
    return out


def histograms(reading: Reading, scores: summary.Scores | None, bins: int = 48) -> list[Any]:
    """A panel per capability: for each source how its examples' scores are distributed."""
    found, shades = scores.sources if scores else [], colors(reading.run.domains)
    out = []
    for column, capability in enumerate(scores.capabilities if scores else ()):
        every = np.concatenate([s.score_NC[:, column] for s in found])
        every = every[np.isfinite(every)]
        low, high = np.percentile(every, (1, 99)) if len(every) else (0.0, 0.0)
        low, high = padded(min(float(low), 0.0), max(float(high), 0.0))
        edges = np.linspace(low, high, bins + 1)
        rows, means = [], []
        for base, s in enumerate(found):
            values = s.score_NC[:, column]
            share = np.histogram(values, edges)[0] / max(1, len(values))
            above = f"{(values > 0).mean():.0%}"
            peak = share.max() or 1.0
            mean = {"mean": float(s.mean_C[column]), "top": float(base), "foot": base + 0.95, "source": s.source}
            means.append(mean | {"above 0": above})
            for k in np.flatnonzero(share):
                at = {"from": float(edges[k]), "to": float(edges[k + 1]), "share": float(share[k])}
                rows.append(at | {"source": s.source, "top": base + 0.95 - 0.85 * share[k] / peak, "foot": base + 0.95})
        name = f"{json.dumps([s.source for s in found])}[floor(datum.value)]"
        axis = alt.Axis(
            title=None,
            values=[base + 0.5 for base in range(len(found))],
            labelExpr=name,
            labelColor=_label_colors(shades, name),
            labelFontWeight=600,
            labelLimit=200,
            labelOverlap=False,
            grid=False,
        )
        y = alt.Y("top:Q", scale=alt.Scale(domain=[0, len(found)], reverse=True, nice=False), axis=axis)
        x_axis = alt.Axis(title="lowers the loss →", format=".3~g", tickCount=4)
        x = alt.X("from:Q", scale=alt.Scale(domain=[low, high], nice=False), axis=x_axis)
        tips = ["source:N", *(alt.Tooltip(f"{n}:Q", format=".3g") for n in ("from", "to"))]
        bars = table(rows).mark_rect(clip=True).encode(
            x=x,
            x2="to:Q",
            y=y,
            y2="foot:Q",
            color=_source_color(shades),
            tooltip=[*tips, alt.Tooltip("share:Q", format=".1%", title="of its examples")],
        )
        strokes = table(means).mark_rule(color=INK, strokeWidth=2, clip=True).encode(
            x="mean:Q",
            y="top:Q",
            y2="foot:Q",
            tooltip=["source:N", alt.Tooltip("mean:Q", format=".3g"), alt.Tooltip("above 0:N", title="scores above 0")],
        )
        zero = table([{"zero": 0}]).mark_rule(color="var(--axis)").encode(x="zero:Q")
        out.append(titled(alt.layer(zero, bars, strokes), capability, "score", 34 * len(found)))
    return out


def predicted(reading: Reading, scores: summary.Scores | None) -> list[Any]:
    """A panel per capability, a dot per source: measured impact of leaving it out over its mean score."""
    if not scores or not reading.measured_impact:
        return []
    from scipy.stats import spearmanr

    shades = colors(reading.run.domains)
    out = []
    for column, capability in enumerate(scores.capabilities):
        impact = reading.measured_impact.get(capability, {})
        rows = [
            {"source": s.source, "score": float(s.mean_C[column]), "impact": impact[s.source]}
            for s in scores.sources
            if math.isfinite(impact.get(s.source, math.nan)) and np.isfinite(s.mean_C[column])
        ]
        # Of fewer than three sources there is no rank correlation to speak of.
        if len(rows) < 3:
            continue
        rank = float(spearmanr([row["score"] for row in rows], [row["impact"] for row in rows]).statistic)
        free = alt.Scale(zero=False, padding=16)
        dots = table(rows).encode(
            x=alt.X("score:Q", scale=free, axis=alt.Axis(title="mean score", format=".3~g", tickCount=4)),
            y=alt.Y("impact:Q", scale=free, axis=alt.Axis(title=None, tickCount=5)),
            color=_source_color(shades),
            tooltip=["source:N", alt.Tooltip("score:Q", format=".4g"), alt.Tooltip("impact:Q", format="+.3f")],
        )
        names = [dots.mark_text(dy=-11).encode(text="source:N")] if len(rows) <= 16 else []
        unit = f"nats per token without the source; rank correlation {rank:.2f}".replace("-", "−")
        out.append(titled(alt.layer(dots.mark_circle(size=60, opacity=1), *names), capability, unit, 240))
    return out


def mixture(reading: Reading) -> list[Any]:
    """Paired bars: target share of each source in the first and the last phase; a stroke where the last
    phase drew another share."""
    run, (y, color) = reading.run, sources_axis(reading)
    phases = list(dict.fromkeys([run.phases[0], run.phases[-1]]))
    rows = [
        {"source": s, "domain": run.domains[s], "phase": phase, "share": run.last[phase]["mix_target"].get(s, 0.0)}
        for phase in phases
        for s in run.domains
    ]
    drawn = run.end["mix_actual"]
    strokes = [
        {"source": row["source"], "phase": row["phase"], "drawn": drawn.get(row["source"], 0.0)}
        for row in rows
        if row["phase"] == phases[-1] and abs(drawn.get(row["source"], 0.0) - row["share"]) >= 0.001
    ]
    offset = alt.YOffset("phase:N", sort=phases, scale=alt.Scale(paddingOuter=0.12))
    x = alt.X("share:Q", axis=alt.Axis(format="~%", title="share of sequences", tickCount=6))
    pale = alt.Scale(domain=phases, range=[0.4, 1.0] if len(phases) > 1 else [1.0])
    base = table(rows).encode(x=x, y=y, yOffset=offset)
    bars = base.mark_bar().encode(
        color=color,
        opacity=alt.Opacity("phase:N", scale=pale, legend=alt.Legend(title=None, orient="top", symbolFillColor=INK)),
        tooltip=["source:N", "domain:N", "phase:N", alt.Tooltip("share:Q", format=".2%")],
    )
    layers = [bars, base.mark_text(align="left", dx=8).encode(text=alt.Text("share:Q", format=".1%"))]
    if strokes:
        marks = table(strokes).mark_tick(orient="vertical").encode(x="drawn:Q", y=y, yOffset=offset)
        layers.append(marks.encode(tooltip=["source:N", alt.Tooltip("drawn:Q", format=".2%")]))
    return [titled(alt.layer(*layers), "", "", (18 * len(phases) + 8) * len(run.domains))]


def mixture_over_time(reading: Reading) -> list[Any]:
    """Share of each source in the tokens of the steps, stacked over tokens; a phase's means as numbers."""
    run, shades = reading.run, colors(reading.run.domains)
    rows, numbers = [], []
    for stretch in summary.drawn(run):
        top = 0.0
        for source, share in stretch["share"].items():
            if share > 0:
                at = {"phase": stretch["phase"], "tokens": stretch["begin"], "to": stretch["end"]}
                rows.append(at | {"source": source, "share": share, "low": top, "high": top + share})
            top += share
    whole = run.spans[-1][2] - run.spans[0][1]
    for phase, begin, end in run.spans:
        means, top = run.last[phase]["mix_actual"], 0.0
        for source in run.domains:
            share = means.get(source, 0.0)
            if share > 0.045 and end - begin > 0.07 * whole:
                numbers.append({"tokens": (begin + end) / 2, "high": top + share / 2, "share": share})
            top += share
    y = alt.Y("low:Q", scale=alt.Scale(domain=[0, 1], reverse=True), axis=None)
    bands = table(rows).mark_rect(clip=True).encode(
        x=tokens_axis(run.spans[0][1], run.spans[-1][2]),
        x2="to:Q",
        y=y,
        y2="high:Q",
        color=_source_color(shades, alt.Legend(title=None, orient="top", columns=6, symbolType="square")),
        tooltip=[
            "source:N",
            "phase:N",
            alt.Tooltip("share:Q", format=".1%"),
            alt.Tooltip("tokens:Q", format=".3s", title="from"),
            alt.Tooltip("to:Q", format=".3s"),
        ],
    )
    means = table(numbers).mark_text(color="var(--card)", fontWeight="bold")
    means = means.encode(x="tokens:Q", y="high:Q", text=alt.Text("share:Q", format=".1%"))
    spans = [{"tokens": (a + b) / 2, "phase": p} for p, a, b in run.spans if b - a > 0.08 * whole]
    names = table(spans).mark_text(color=MUTED, dy=-8).encode(x="tokens:Q", y=alt.value(0), text="phase:N")
    rules = [table([{"tokens": a} for _, a, _ in run.spans[1:]]).mark_rule(color="var(--card)", strokeWidth=2)]
    layers = [bands, *(r.encode(x="tokens:Q") for r in rules if len(run.spans) > 1), means, names]
    return [titled(alt.layer(*layers), "", "", max(300, 17 * len(shades)))]


def epochs(reading: Reading) -> list[Any]:
    """Passes over each source at the end; a stroke for the control's."""
    run, (y, color) = reading.run, sources_axis(reading)
    passes = run.end["epochs_by_source"]
    against = reading.control.end["epochs_by_source"] if reading.control else {}
    base = table({"source": s, "epochs": passes[s], "control": against.get(s)} for s in run.domains).encode(y=y)
    x = alt.X("epochs:Q", axis=alt.Axis(title="epochs", tickCount=6))
    shown = ("epochs", "control") if against else ("epochs",)
    tips = ["source:N", *(alt.Tooltip(f"{name}:Q", format=".3f") for name in shown)]
    bars = base.mark_bar(height={"band": 0.7}).encode(x=x, color=color, tooltip=tips)
    layers = [bars, base.mark_text(align="left", dx=8).encode(x=x, text=alt.Text("epochs:Q", format=".3~g"))]
    if against:
        layers.append(base.mark_tick(orient="vertical").encode(x="control:Q", tooltip=tips))
    if max([*passes.values(), *against.values()]) > 0.4:
        layers.insert(0, table([{"epochs": 1}]).mark_rule(color=INK).encode(x="epochs:Q"))
    return [titled(alt.layer(*layers), "", "", 24 * len(passes))]


def checkpoints(run: Run, complete: list[summary.Saved], partial: list[summary.Saved]) -> list[Any]:
    """A lane of strokes for what holds of the checkpoints, over tokens."""
    lanes = {
        "complete": [saved.step for saved in complete],
        "kept for good": [saved.step for saved in complete if saved.pinned],
        "influence scored": [saved.step for saved in complete if saved.scored],
        "not complete": [saved.step for saved in partial],
    }
    if not complete:
        return []
    per_step = run.config.tokens_per_step()
    rows = [
        {"lane": f"{lane}  {len(steps):,}", "tokens": float(step * per_step), "step": step, "bad": lane == "not complete"}
        for lane, steps in lanes.items()
        for step in steps
    ]
    most = max(run.end["tokens"], *(row["tokens"] for row in rows))
    order = list(dict.fromkeys(row["lane"] for row in rows))
    color = alt.condition("datum.bad", alt.value("var(--negative)"), alt.value(INK))
    ticks = table(rows).mark_tick(orient="vertical", size=15, clip=True).encode(
        x=tokens_axis(0.0, 1.01 * most),
        y=alt.Y("lane:N", sort=order, axis=alt.Axis(title=None, labelColor=INK, grid=True, labelLimit=200)),
        color=color,
        tooltip=["lane:N", alt.Tooltip("step:Q", format=","), alt.Tooltip("tokens:Q", format=".3s")],
    )
    return [titled(alt.layer(*phase_marks(run, False), ticks), "", "", 26 * len(order))]
