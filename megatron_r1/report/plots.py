"""Charts of a report: Vega-Lite specifications with their data. A figure is a list of panels.

Colours are CSS variables, so that one drawing serves light and dark; page.yaml has both values of each.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import altair as alt
import numpy as np
import yaml

from megatron_r1.records import CAPABILITIES
from megatron_r1.report import summary
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.summary import Points

PAGE: dict[str, Any] = yaml.safe_load((files(__package__) / "page.yaml").read_text(encoding="utf-8"))
_SHADES = 4
COLORS: dict[str, tuple[str, str]] = {name: tuple(both.split()) for name, both in PAGE["colors"].items()} | {
    f"{hue}-{i}": (shades.split()[i], shades.split()[i + _SHADES])
    for hue, shades in PAGE["hues"].items()
    for i in range(_SHADES)
}
"""Name -> colour in light and in dark mode."""
INK, MUTED, CONTROL, NEGATIVE = "var(--ink)", "var(--muted)", "var(--control)", "var(--negative)"
_TICKS = "replace(format(datum.value, '~s'), 'G', 'B')"
"""Tokens on an axis: 700k, 2.6M, 1B."""
_POINTS = 300
"""Of a drawn curve, at most about so many."""
_DOTTED = 24
"""Measurements that stand apart far enough to be drawn as dots."""


@dataclass(frozen=True)
class Curve:
    name: str
    points: Points
    color: str
    dashed: bool = False


def colors(domains: Mapping[str, str]) -> dict[str, str]:
    """Colour of each source. A capability always has its own hue; other domains take the next, in order.
    Domain by domain, capabilities first."""
    hues, named = list(PAGE["hues"]), dict.fromkeys(domains.values())
    others = [d for d in named if d not in CAPABILITIES]
    spare = hues[len(CAPABILITIES) :]
    hue = dict(zip(CAPABILITIES, hues, strict=False)) | {
        d: spare[i % len(spare)] for i, d in enumerate(others)
    }
    members = {d: [s for s in domains if domains[s] == d] for d in (*CAPABILITIES, *others)}
    return {s: f"var(--{hue[d]}-{i % _SHADES})" for d, of in members.items() for i, s in enumerate(of)}


def draw(rows: Iterable[Mapping[str, Any]], mark: str, tips: str = "", **channels: Any) -> alt.Chart:
    """A layer of these rows, numbers at six digits. `mark`: its type and options, as YAML behind the type;
    `tips`: fields to show under the pointer, each with a format of its number if it is one."""
    short = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return redraw(alt.Chart(alt.Data(values=short), mark="point"), mark, tips, **channels)


def redraw(chart: alt.Chart, mark: str, tips: str = "", **channels: Any) -> alt.Chart:
    """The same rows and channels by another mark."""
    kind, _, options = mark.partition(" ")
    shown = [(*tip.split(":", 1), "")[:2] for tip in tips.split()]
    if shown:
        channels["tooltip"] = [
            {"field": name, "format": form, "type": "quantitative"}
            if form
            else {"field": name, "type": "nominal"}
            for name, form in shown
        ]
    chart = chart.encode(**channels)
    chart.mark = {"type": kind, **yaml.safe_load(f"{{{options}}}")}
    return chart


def number(
    field: str, domain: Sequence[float] | None = None, scale: Any = None, **axis: Any
) -> dict[str, Any]:
    """A quantitative channel: no title unless it is given, `domain` exactly."""
    domain_of = {} if domain is None else {"domain": list(domain), "nice": False}
    shown = {"title": None, "tickCount": 5, **axis}
    return {"field": field, "type": "quantitative", "scale": domain_of | (scale or {}), "axis": shown}


def tokens(low: float, high: float) -> dict[str, Any]:
    count = {"expr": "max(2, floor(width / 100))"}
    return number("tokens", (low, high), labelExpr=_TICKS, tickCount=count, title="tokens")


def by_source(shades: Mapping[str, str], legend: Any = None) -> dict[str, Any]:
    scale = {"domain": list(shades), "range": list(shades.values())}
    return {"field": "source", "type": "nominal", "scale": scale, "legend": legend}


def names(shades: Mapping[str, str], label: str = "datum.label") -> dict[str, Any]:
    """An axis whose labels are sources in their colours."""
    color = {"expr": f"{json.dumps(shades)}[{label}]"}
    look = {"labelFontWeight": 600, "labelLimit": 200, "labelOverlap": False}
    return {"title": None, "labelColor": color, "grid": False, **look}


def panel(
    layers: Sequence[alt.Chart], title: str = "", unit: str = "", height: float = 220
) -> alt.LayerChart:
    return alt.layer(*layers).properties(title=alt.Title(title, subtitle=unit), height=height)


def phase_marks(run: Run, named: bool = False, clip: str = "clip: true") -> list[alt.Chart]:
    """A broken line where a phase begins; its name, where there is room for it."""
    rows = [{"tokens": begin, "phase": phase, "wide": end - begin} for phase, begin, end in run.spans]
    wide = [row for row in rows if row["wide"] > 0.08 * (run.spans[-1][2] - run.spans[0][1])]
    rules = draw([row for row in rows if row["tokens"]], f"rule strokeDash: [2, 4], {clip}", x="tokens:Q")
    text = draw(
        wide, f"text align: left, dx: 5, color: {MUTED}, {clip}", x="tokens:Q", y=alt.value(5), text="phase:N"
    )
    return [rules, text] if named else [rules]


def curves(
    run: Run,
    drawn: Sequence[Curve],
    title: str = "",
    unit: str = "nats per token",
    *,
    smoothed: bool = False,
    span: tuple[float, float] | None = None,
    since: float = 0.0,
    named: bool = False,
    form: str = ".3f",
    height: float = 220,
) -> alt.LayerChart:
    """Curves over tokens, each with its last value in the legend; `smoothed`: the measured ones faint behind.

    Rows: name, kind ("value", or "raw" of those behind), tokens, value. `span`: of the y axis. `since`: tokens
    at which the x axis begins.
    """
    lines = [(c, "raw", c.points) for c in drawn if smoothed]
    lines += [(c, "value", summary.calm(run, c.points) if smoothed else c.points) for c in drawn]
    ends = {c.name: values[-1] for c, kind, (_, values) in lines if kind == "value"}
    rows = [
        {"name": c.name, "kind": kind, "tokens": float(t), "value": float(v)}
        for c, kind, points in lines
        for t, v in zip(*summary.thin(points, _POINTS), strict=True)
    ]
    every, last = [row["value"] for row in rows], max(run.end["tokens"], *(row["tokens"] for row in rows))
    labels = json.dumps({name: f"{name}  {value:{form}}" for name, value in ends.items()})
    look = {
        "columns": 2,
        "symbolType": "stroke",
        "symbolStrokeWidth": 2,
        "symbolSize": 400,
        "symbolOpacity": 1,
    }
    legend = look | {"labelExpr": f"{labels}[datum.label]"}
    order = sorted(drawn, key=lambda c: -ends[c.name])
    domain = [c.name for c in order]
    color = {"domain": domain, "range": [c.color for c in order]}
    dash = {"domain": domain, "range": [[5, 4] if c.dashed else [1, 0] for c in order]}
    base = draw(
        rows,
        "line",
        x=tokens(since, 1.01 * last),
        y=number("value", span or padded(min(every), max(every))),
        color={"field": "name", "type": "nominal", "scale": color, "legend": legend},
        strokeDash={"field": "name", "type": "nominal", "scale": dash, "legend": legend},
    )
    raw, value = (base.transform_filter(f"datum.kind == '{kind}'") for kind in ("raw", "value"))
    layers = [redraw(raw, "line strokeWidth: 1, opacity: 0.28, clip: true")] if smoothed else []
    layers.append(redraw(value, "line strokeWidth: 2, clip: true"))
    if max(len(c.points[0]) for c in drawn) <= _DOTTED:
        layers.append(redraw(value, "circle size: 22, opacity: 1, clip: true"))
    # Invisible dots carry the tips; the page shows the one under the pointer.
    layers.append(redraw(value, "circle size: 90, opacity: 0, clip: true", "name tokens:.3s value:,.5~g"))
    return panel([*layers, *phase_marks(run, named)], title, unit, height)


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with a little room above and below."""
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def late_span(run: Run, drawn: Iterable[Points]) -> tuple[float, float] | None:
    """All values but the first steep fall, which would flatten the rest."""
    first = run.columns["tokens"][len(run.columns["tokens"]) // 25]
    late = np.concatenate([values[at >= first] for at, values in drawn] or [np.empty(0)])
    return padded(float(late.min()), float(late.max())) if len(late) else None


def arms(reading: Reading, name: str, color: str = INK, since: float = 0.0) -> list[Curve]:
    """A metric of each arm that has it. The control's begins at the run's last point before the fork."""
    out: list[Curve] = []
    for arm, run in reading.arms.items():
        at, values = run.points(name)
        if out and len(values):
            before = np.flatnonzero(out[0].points[0] < run.first["tokens"])[-1:]
            at, values = (
                np.append(ours[before], own) for ours, own in zip(out[0].points, (at, values), strict=True)
            )
        if (at >= since).any():
            out.append(
                Curve(arm, (at[at >= since], values[at >= since]), CONTROL if out else color, bool(out))
            )
    return out


def loss(reading: Reading) -> list[alt.LayerChart]:
    """Training loss of both arms; marks on the axis where a step was skipped."""
    run, drawn = reading.run, arms(reading, "loss")
    if not drawn:
        return []
    span = late_span(run, (c.points for c in drawn))
    chart = curves(run, drawn, smoothed=True, span=span, named=True, height=300)
    skipped = [
        {"arm": arm, "tokens": float(at), "step": float(step)}
        for arm, of in reading.arms.items()
        for at, step in zip(of.columns["tokens"][of.skipped], of.columns["step"][of.skipped], strict=True)
    ]
    mark = f"tick color: {NEGATIVE}, size: 12, clip: true"
    marks = [draw(skipped, mark, "arm step:,", x="tokens:Q", y=alt.value(294))] if skipped else []
    return [alt.layer(*chart.layer, *marks, title=chart.title, height=300)]


def loss_by_source(reading: Reading) -> list[alt.LayerChart]:
    """A panel per domain, a curve per source, all on the same axes."""
    run, shades = reading.run, colors(reading.run.domains)
    points = {s: run.points(f"loss_by_source/{s}") for s in run.measured("loss_by_source")}
    span, out = late_span(run, points.values()), []
    for domain in dict.fromkeys(run.domains[s] for s in shades):
        members = [Curve(s, points[s], shades[s]) for s in points if run.domains[s] == domain]
        out += [curves(run, members, domain, smoothed=True, span=span)] if members else []
    return out


def held_out(reading: Reading) -> list[alt.LayerChart]:
    """A panel per capability: the whole run, then what follows the fork."""
    run, fork, out = reading.run, summary.fork(reading), []
    for since, place in [(0.0, "")] + ([(fork, ", from the fork on")] if fork else []):
        for c in run.measured("probe_nll"):
            drawn = arms(reading, f"probe_nll/{c}", colors({c: c})[c], since)
            out += [curves(run, drawn, f"{c}{place}", since=since)] if drawn else []
    return out


def measures(reading: Reading) -> list[alt.LayerChart]:
    """RankMe of both arms, and the loss on each source's held-back text, whichever there are."""
    run, shades = reading.run, colors(reading.run.domains)
    ranks = arms(reading, "rank_me")
    losses = [Curve(s, run.points(f"validation_nll/{s}"), shades[s]) for s in run.measured("validation_nll")]
    out = [curves(run, ranks, "RankMe", "directions in use", form=".1f")] if ranks else []
    return out + ([curves(run, losses, "validation loss per source")] if losses else [])


def schedule(reading: Reading) -> list[alt.LayerChart]:
    """Learning rate, gradient norm and throughput of both arms."""
    out = []
    for name, title, unit, form in (
        ("learning_rate", "learning rate", "as scheduled", ".3g"),
        ("grad_norm", "gradient norm", "before clipping", ".3f"),
        ("tokens_per_second", "throughput", "tokens per second, all ranks", ",.0f"),
    ):
        if drawn := arms(reading, name):
            exact = name == "learning_rate"
            span = None if exact else late_span(reading.run, (c.points for c in drawn))
            look: dict[str, Any] = {"smoothed": not exact, "span": span, "form": form, "height": 170}
            out.append(curves(reading.run, drawn, title, unit, **look))
    return out


def histograms(reading: Reading, scores: summary.Scores, bins: int = 48) -> list[alt.LayerChart]:
    """A panel per capability: for each source how its examples' scores are distributed."""
    shades, found, out = colors(reading.run.domains), scores.sources, []
    name = f"{json.dumps([s.source for s in found])}[floor(datum.value)]"
    rows_axis = {"values": [row + 0.5 for row in range(len(found))], "labelExpr": name, **names(shades, name)}
    for c, capability in enumerate(scores.capabilities):
        every = np.concatenate([s.score_NC[:, c] for s in found])
        low, high = np.percentile(every[np.isfinite(every)], (1, 99)) if np.isfinite(every).any() else (0, 0)
        edges = np.linspace(*padded(min(float(low), 0.0), max(float(high), 0.0)), bins + 1)
        bars, means = [], []
        for row, s in enumerate(found):
            share = np.histogram(s.score_NC[:, c], edges)[0] / len(s.score_NC)
            base = {"source": s.source, "foot": row + 0.95}
            for k in np.flatnonzero(share):
                at = {"low": float(edges[k]), "high": float(edges[k + 1]), "share": float(share[k])}
                bars.append(base | at | {"top": row + 0.95 - 0.85 * float(share[k] / share.max())})
            positive = float((s.score_NC[:, c] > 0).mean())
            means.append(base | {"low": float(s.mean_C[c]), "positive": positive, "top": float(row)})
        chart = draw(
            bars,
            "rect clip: true",
            "source low:.3g high:.3g share:.1%",
            x=number("low", (edges[0], edges[-1]), title="lowers the loss →", format=".3~g", tickCount=4),
            x2="high:Q",
            y=number("top", (0, len(found)), {"reverse": True}, **rows_axis),
            y2="foot:Q",
            color=by_source(shades),
        )
        stroke = f"rule color: {INK}, strokeWidth: 2, clip: true"
        strokes = draw(means, stroke, "source low:.3g positive:.1%", x="low:Q", y="top:Q", y2="foot:Q")
        zero = draw([{"zero": 0}], "rule", x="zero:Q")
        out.append(panel([zero, chart, strokes], capability, "score", 34 * len(found)))
    return out


def predicted(reading: Reading, scores: summary.Scores) -> list[alt.LayerChart]:
    """A panel per capability, a dot per source: measured impact of leaving it out over its mean score."""
    shades, out = colors(reading.run.domains), []
    for c, capability in enumerate(scores.capabilities):
        impact = reading.measured_impact.get(capability, {})
        pairs = {s.source: (float(s.mean_C[c]), impact.get(s.source, np.nan)) for s in scores.sources}
        rows = [{"source": s, "score": x, "impact": y} for s, (x, y) in pairs.items() if np.isfinite(x + y)]
        # Of fewer than three sources there is no rank correlation to speak of.
        if len(rows) < 3:
            continue
        free = {"zero": False, "padding": 16}
        x = number("score", scale=free, title="mean score", format=".3~g", tickCount=4)
        y, color = number("impact", scale=free), by_source(shades)
        dots = draw(
            rows, "circle size: 60, opacity: 1", "source score:.4g impact:+.3f", x=x, y=y, color=color
        )
        labels = [redraw(dots, "text dy: -11", text="source:N")] if len(rows) <= 16 else []
        rank = summary.spearman([row["score"] for row in rows], [row["impact"] for row in rows])
        unit = f"nats per token without the source; rank correlation {rank:.2f}".replace("-", "−")
        out.append(panel([dots, *labels], capability, unit, 240))
    return out


def mixture(reading: Reading) -> list[alt.LayerChart]:
    """Paired bars: target share of each source in the first and the last phase; a stroke where the last
    phase drew another share."""
    run, shades = reading.run, colors(reading.run.domains)
    phases, drawn = list(dict.fromkeys([run.phases[0], run.phases[-1]])), run.end["mix_actual"]
    rows = [
        {"source": s, "domain": run.domains[s], "phase": p, "share": run.last[p]["mix_target"].get(s, 0.0)}
        for p in phases
        for s in shades
    ]
    last = [row | {"drawn": drawn.get(row["source"], 0.0)} for row in rows if row["phase"] == phases[-1]]
    pale = {"domain": phases, "range": [0.4, 1.0][-len(phases) :]}
    bars = draw(
        rows,
        "bar",
        "source domain phase share:.2%",
        x=number("share", format="~%", title="share of sequences"),
        y={"field": "source", "type": "nominal", "sort": list(shades), "axis": names(shades)},
        yOffset={"field": "phase", "type": "nominal", "sort": phases, "scale": {"paddingOuter": 0.12}},
        color=by_source(shades),
        opacity={"field": "phase", "type": "nominal", "scale": pale, "legend": {"symbolFillColor": INK}},
    )
    text = redraw(
        bars,
        "text align: left, dx: 8, color: var(--ink)",
        text={"field": "share", "format": ".1%"},
        color=alt.value(INK),
    )
    off = [row for row in last if abs(row["drawn"] - row["share"]) >= 0.001]
    tick = draw(off, "tick", "source drawn:.2%", x="drawn:Q", y="source:N", yOffset="phase:N")
    return [panel([bars, text, *([tick] if off else [])], height=(18 * len(phases) + 8) * len(shades))]


def mixture_over_time(reading: Reading) -> list[alt.LayerChart]:
    """Share of each source in the tokens of the steps, stacked over tokens; a phase's means as numbers."""
    run, shades = reading.run, colors(reading.run.domains)
    whole, bands, means = run.spans[-1][2] - run.spans[0][1], [], []
    for stretch in summary.drawn(run):
        top = 0.0
        for source in shades:
            share = stretch.share[source]
            row = {"source": source, "phase": stretch.phase, "share": share, "low": top, "high": top + share}
            bands += [row | {"tokens": stretch.begin, "to": stretch.end}] if share else []
            top += share
    for phase, begin, end in run.spans:
        top = 0.0
        for source in shades:
            share = run.last[phase]["mix_actual"].get(source, 0.0)
            row = {"tokens": (begin + end) / 2, "high": top + share / 2, "share": share}
            means += [row] if share > 0.045 and end - begin > 0.07 * whole else []
            top += share
    chart = draw(
        bands,
        "rect clip: true",
        "source phase share:.1% tokens:.3s to:.3s",
        x=tokens(run.spans[0][1], run.spans[-1][2]),
        x2="to:Q",
        y=number("low", (0, 1), {"reverse": True}, labels=False),
        y2="high:Q",
        color=by_source(shades, {"columns": {"expr": "max(2, floor(width / 150))"}, "symbolType": "square"}),
    )
    text = {"field": "share", "format": ".1%"}
    numbers = draw(means, "text color: var(--card), fontWeight: bold", x="tokens:Q", y="high:Q", text=text)
    return [panel([chart, numbers, *phase_marks(run, True)], height=max(300, 17 * len(shades)))]


def epochs(reading: Reading) -> list[alt.LayerChart]:
    """Passes over each source at the end; a stroke for the control's."""
    run, shades = reading.run, colors(reading.run.domains)
    passes = run.end["epochs_by_source"]
    against = reading.control.end["epochs_by_source"] if reading.control else {}
    bars = draw(
        [{"source": s, "epochs": passes[s], "control": against.get(s)} for s in shades],
        "bar height: {band: 0.7}",
        "source epochs:.3f control:.3f" if against else "source epochs:.3f",
        x=number("epochs", title="epochs"),
        y={"field": "source", "type": "nominal", "sort": list(shades), "axis": names(shades)},
        color=by_source(shades),
    )
    layers = [
        bars,
        redraw(
            bars, "text align: left, dx: 8", text={"field": "epochs", "format": ".3~g"}, color=alt.value(INK)
        ),
    ]
    layers += [redraw(bars, "tick", x="control:Q", color=alt.value(INK))] if against else []
    one = max([*passes.values(), *against.values()]) > 0.4
    layers += [draw([{"epochs": 1}], f"rule color: {INK}", x="epochs:Q")] if one else []
    return [panel(layers, height=24 * len(shades))]


def checkpoints(run: Run, saved: summary.Checkpoints) -> list[alt.LayerChart]:
    """A lane of strokes for what holds of the checkpoints, over tokens."""
    lanes = {
        "complete": saved.complete,
        "kept for good": [one for one in saved.complete if one.pinned],
        "influence scored": [one for one in saved.complete if one.scored],
        "not complete": saved.partial,
    }
    rows: list[dict[str, Any]] = [
        {
            "lane": f"{lane}  {len(of):,}",
            "step": one.step,
            "tokens": float(one.step * run.config.tokens_per_step()),
        }
        for lane, of in lanes.items()
        for one in of
    ]
    if not saved.complete:
        return []
    order = list(dict.fromkeys(row["lane"] for row in rows))
    axis = {"title": None, "labelColor": INK, "grid": True, "labelLimit": 200}
    color = {"condition": {"test": "indexof(datum.lane, 'not') == 0", "value": NEGATIVE}, "value": INK}
    last = 1.01 * max(run.end["tokens"], *(row["tokens"] for row in rows))
    y = {"field": "lane", "type": "nominal", "sort": order, "axis": axis}
    ticks = draw(
        rows, "tick size: 15, clip: true", "lane step:, tokens:.3s", x=tokens(0.0, last), y=y, color=color
    )
    return [panel([ticks, *phase_marks(run)], height=26 * len(order))]
