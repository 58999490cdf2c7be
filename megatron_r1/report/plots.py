"""Charts of a report: Vega-Lite specifications with their data. A figure is a list of panels.

Colours are CSS variables, so that one drawing serves light and dark. page.yaml has both values of each.
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

from megatron_r1.records import CAPABILITIES
from megatron_r1.report import summary
from megatron_r1.report.load import Points, Reading, Run
from megatron_r1.system.yaml_io import parse_yaml

PAGE: dict[str, Any] = parse_yaml((files(__package__) / "page.yaml").read_text("utf-8"), "page.yaml").tree
_SHADES = 4
_BETWEEN = [0, 4, 8, 12, 2, 6, 10, 1, 3, 5, 7, 9, 11]
"""Shades of a hue in the order in which sources get them, in quarters of the way from one to the next."""


def _blend(shades: Sequence[str], quarters: int) -> str:
    """A colour between two neighbouring shades, channel by channel."""
    channels = zip(*(bytes.fromhex(shade[1:]) for shade in shades), strict=True)
    return f"#{bytes(round(np.interp(quarters / 4, range(_SHADES), of)) for of in channels).hex()}"


COLORS: dict[str, list[str]] = {name: both.split() for name, both in PAGE["colors"].items()} | {
    f"{hue}-{i}": [_blend(of.split()[:_SHADES], at), _blend(of.split()[_SHADES:], at)]
    for hue, of in PAGE["hues"].items()
    for i, at in enumerate(_BETWEEN)
}
"""Name -> colour in light and in dark mode."""
INK, CONTROL = "var(--ink)", "var(--control)"
NATS = "nats per token"
Rows = list[dict[str, Any]]
Panels = list[Any]
"""Layer charts. Altair's own types say more than mypy can follow."""


def colors(domains: Mapping[str, str]) -> dict[str, str]:
    """Colour of each source, domain by domain: a hue for a domain, a shade for a source. A capability always
    has its own hue; other domains take the next in turn."""
    hues = list(PAGE["hues"])
    of: dict[str, str] = {}
    for i, domain in enumerate(dict.fromkeys((*CAPABILITIES, *domains.values()))):
        hue = hues[i if i < len(CAPABILITIES) else len(CAPABILITIES) + i % (len(hues) - len(CAPABILITIES))]
        members = [s for s in domains if domains[s] == domain]
        of |= {s: f"var(--{hue}-{shade % len(_BETWEEN)})" for shade, s in enumerate(members)}
    return of


def draw(rows: Iterable[Mapping[str, Any]], mark: str, tips: str = "", **channels: Any) -> Any:
    """A layer of these rows, numbers at six digits. `mark`: its type, then options as YAML. `tips`: fields to
    show under the pointer, each number with its format."""
    short = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return redraw(alt.Chart(alt.Data(values=short), mark="point"), mark, tips, **channels)


def redraw(chart: Any, mark: str, tips: str = "", **channels: Any) -> Any:
    """The same rows and channels by another mark."""
    kind, _, options = mark.partition(" ")
    shown = [(*tip.split(":", 1), "")[:2] for tip in tips.split()]
    types: dict[bool, Any] = {True: "quantitative", False: "nominal"}
    fields = [alt.Tooltip(field=name, type=types[bool(form)], format=form) for name, form in shown]
    # Altair takes 20 ms to find the class of a dictionary.
    typed = {n: getattr(alt, n[:1].upper() + n[1:])(**c) if "field" in c else c for n, c in channels.items()}
    chart = chart.encode(**typed, **({"tooltip": fields} if fields else {}))
    chart.mark = {"type": kind, **parse_yaml(f"{{{options}}}", mark).tree}
    return chart


def number(field: str, domain: Sequence[float] = (), scale: Any = None, **axis: Any) -> dict[str, Any]:
    """A position by a number, on exactly this domain where one is given. No title unless there is one."""
    limits = {"domain": [float(v) for v in domain], "nice": False} if domain else {}
    shown = {"title": None, "tickCount": 5, **axis}
    return {"field": field, "type": "quantitative", "scale": limits | (scale or {}), "axis": shown}


def named(field: str, values: Mapping[str, Any], legend: Any = None) -> dict[str, Any]:
    """A look by a name: value of each name."""
    scale = {"domain": list(values), "range": list(values.values())}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def labels(shades: Mapping[str, str], name: str = "datum.label") -> dict[str, Any]:
    """An axis whose labels are sources in their colours."""
    color = {"expr": f"{json.dumps(shades)}[{name}]"}
    look = {"labelFontWeight": 600, "labelLimit": 200, "labelOverlap": False, "grid": False}
    return {"title": None, "labelColor": color, **look}


def source_rows(shades: Mapping[str, str]) -> dict[str, Any]:
    y = {"field": "source", "type": "nominal", "sort": list(shades), "axis": labels(shades)}
    return {"y": y, "color": named("source", shades)}


def tokens(low: float, high: float) -> dict[str, Any]:
    ticks = {"labelExpr": "replace(format(datum.value, '~s'), 'G', 'B')", "title": "tokens"}
    return number("tokens", (low, high), tickCount={"expr": "max(2, floor(width / 100))"}, **ticks)


def panel(layers: Sequence[Any], title: str = "", unit: str = "", height: float = 220) -> Any:
    return alt.layer(*layers).properties(title=alt.Title(title, subtitle=unit), height=height)


def phase_marks(run: Run, color: str = "") -> Panels:
    """A broken line where a phase begins. `color`: of its name, where there is room for one."""
    rows: Rows = [{"tokens": begin, "phase": phase, "wide": end - begin} for phase, begin, end in run.spans]
    wide = [row for row in rows if row["wide"] > 0.08 * sum(row["wide"] for row in rows)]
    rules = draw([row for row in rows if row["tokens"]], "rule strokeDash: [2, 4], clip: true", x="tokens:Q")
    mark = f"text align: left, dx: 5, clip: true, color: {color}"
    return [rules, *([draw(wide, mark, x="tokens:Q", y=alt.value(6), text="phase:N")] if color else [])]


@dataclass(frozen=True)
class Curve:
    name: str
    points: Points
    color: str
    """The control's is also drawn dashed."""


def curves(
    run: Run,
    drawn: Sequence[Curve],
    title: str = "",
    unit: str = NATS,
    *,
    smoothed: bool = False,
    span: Sequence[float] = (),
    since: float = 0.0,
    color: str = "",
    form: str = ".3f",
    height: float = 220,
) -> Any:
    """Curves over tokens, each with its last value in the legend; `smoothed`: the measured ones faint behind.

    Rows: name, kind ("value", or "raw" of those behind), tokens, value. `span`: of the y axis. `since`: where
    the x axis begins. `color`: of phases' names.
    """
    lines = [(c, "raw", summary.thin(c.points)) for c in drawn if smoothed]
    calm = summary.calm if smoothed else lambda run, points: summary.thin(points, 150)
    lines += [(c, "value", calm(run, c.points)) for c in drawn]
    rows: Rows = [
        {"name": c.name, "kind": kind, "tokens": float(t), "value": float(v)}
        for c, kind, (at, values) in lines
        for t, v in zip(at, values, strict=True)
    ]
    ends = {row["name"]: row["value"] for row in rows}
    order = sorted(drawn, key=lambda c: -ends[c.name])
    texts = json.dumps({name: f"{name}  {value:{form}}" for name, value in ends.items()})
    legend = PAGE["legend"] | {"labelExpr": f"{texts}[datum.label]"}
    every, last = [row["value"] for row in rows], max(run.reach, *(row["tokens"] for row in rows))
    base = draw(
        rows,
        "line",
        x=tokens(since, 1.01 * last),
        y=number("value", span or padded(min(every), max(every))),
        color=named("name", {c.name: c.color for c in order}, legend),
        strokeDash=named("name", {c.name: [5, 4] if c.color == CONTROL else [1, 0] for c in order}, legend),
    )
    raw, value = (base.transform_filter(f"datum.kind == '{kind}'") for kind in ("raw", "value"))
    layers = [redraw(raw, "line strokeWidth: 1, opacity: 0.28, clip: true")] if smoothed else []
    layers.append(redraw(value, "line strokeWidth: 2, clip: true"))
    # Dots where they stand apart. Invisible ones carry the tips; the page shows the one under the pointer.
    if not smoothed and len(rows) <= 24 * len(lines):
        layers.append(redraw(value, "circle size: 22, opacity: 1, clip: true"))
    layers.append(redraw(value, "circle size: 90, opacity: 0, clip: true", "name tokens:.3s value:,.5~g"))
    # Layered by themselves, so that they share one copy of the rows.
    return panel([alt.layer(*layers), *phase_marks(run, color)], title, unit, height)


def padded(low: float, high: float) -> tuple[float, float]:
    """A range with a little room above and below."""
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room


def late_span(run: Run, drawn: Iterable[Points]) -> tuple[float, float]:
    """All values but the first steep fall, which would flatten the rest."""
    first = run.columns["tokens"][len(run.columns["tokens"]) // 25]
    late = np.concatenate([values[at >= first] for at, values in drawn])
    return padded(float(late.min()), float(late.max())) if len(late) else (0.0, 1.0)


def arms(reading: Reading, name: str, color: str = INK, since: float = 0.0) -> list[Curve]:
    """A metric of each arm that has it. The control's begins at the run's last point before the fork."""
    out: list[Curve] = []
    for arm, run in reading.arms.items():
        at, values = run.points(name)
        if out and len(values):
            own, before = out[0].points, np.flatnonzero(out[0].points[0] < run.first["tokens"])[-1:]
            at, values = np.append(own[0][before], at), np.append(own[1][before], values)
        late = at >= since
        if late.any():
            out.append(Curve(arm, (at[late], values[late]), CONTROL if out else color))
    return out


def over_steps(reading: Reading, name: str, title: str = "", unit: str = NATS, **look: Any) -> Panels:
    """A metric of every step, of both arms; nothing where there is none."""
    if not (drawn := arms(reading, name)):
        return []
    span = late_span(reading.run, [c.points for c in drawn])
    return [curves(reading.run, drawn, title, unit, span=span, **({"smoothed": True} | look))]


def loss(reading: Reading) -> Panels:
    """Training loss of both arms; marks on the axis where a step was skipped."""
    skipped = [
        {"arm": arm, "tokens": float(run.columns["tokens"][row]), "step": float(run.columns["step"][row])}
        for arm, run in reading.arms.items()
        for row in run.skipped
    ]
    mark = "tick color: var(--negative), size: 12, clip: true"
    marks = draw(skipped, mark, "arm step:,", x="tokens:Q", y=alt.value(294))
    size = reading.run.config.tokens_per_step()
    gaps = [
        {"arm": arm, "first": a, "last": b, "tokens": float((a - 1) * size), "end": float(b * size)}
        for arm, run in reading.arms.items()
        for a, b in run.lost
    ]
    # A stroke, too: a few steps of a long run are narrower than a pixel.
    mark = "rect color: var(--negative), opacity: 0.25, stroke: var(--negative), clip: true"
    lost = draw(gaps, mark, "arm first:, last:,", x="tokens:Q", x2="end:Q")
    drawn = over_steps(reading, "loss", color="var(--muted)", height=300)
    return [panel([*chart.layer, *([lost] if gaps else []), marks], height=300) for chart in drawn]


def loss_by_source(reading: Reading) -> Panels:
    """A panel per domain, a curve per source, all on the same axes."""
    run, shades = reading.run, colors(reading.run.domains)
    measured = set(run.measured("loss_by_source"))
    drawn = [Curve(s, run.points(f"loss_by_source/{s}"), shades[s]) for s in shades if s in measured]
    by_domain: dict[str, list[Curve]] = {}
    for c in drawn:
        by_domain.setdefault(run.domains[c.name], []).append(c)
    span = late_span(run, [c.points for c in drawn]) if drawn else ()
    return [curves(run, members, domain, smoothed=True, span=span) for domain, members in by_domain.items()]


def held_out(reading: Reading) -> Panels:
    """A panel per capability: the whole run, then what follows the fork."""
    run, fork, out = reading.run, summary.fork(reading), []
    for since, place in [(0.0, "")] + ([(fork, ", from the fork on")] if fork else []):
        for c in run.measured("probe_nll"):
            drawn = arms(reading, f"probe_nll/{c}", colors({c: c})[c], since)
            out += [curves(run, drawn, f"{c}{place}", since=since)] if drawn else []
    return out


def gold(reading: Reading) -> Panels:
    """A panel per set of gold answers: bits per byte of both arms."""
    names, look = reading.run.measured("gold_bpb"), {"smoothed": False, "height": 170}
    return [
        p for name in names for p in over_steps(reading, f"gold_bpb/{name}", name, "bits per byte", **look)
    ]


def measures(reading: Reading) -> Panels:
    """RankMe of both arms, and the loss on each source's held-back text, whichever there are."""
    run, shades = reading.run, colors(reading.run.domains)
    losses = [Curve(s, run.points(f"validation_nll/{s}"), shades[s]) for s in run.measured("validation_nll")]
    ranks = over_steps(reading, "rank_me", "RankMe", "directions in use", smoothed=False, form=".1f")
    return ranks + ([curves(run, losses, "validation loss per source")] if losses else [])


def schedule(reading: Reading) -> Panels:
    """Learning rate, gradient norm and throughput of both arms."""
    rate = {"smoothed": False, "form": ".3g", "height": 170}
    return [
        *over_steps(reading, "learning_rate", "learning rate", "as scheduled", **rate),
        *over_steps(reading, "grad_norm", "gradient norm", "before clipping", height=170),
        *over_steps(reading, "tokens_per_second", "throughput", "tokens per second", form=",.0f", height=170),
    ]


def histograms(reading: Reading, scores: summary.Scores, bins: int = 48) -> Panels:
    """A panel per capability: for each source how its examples' scores are distributed."""
    shades, scored, out = colors(reading.run.domains), scores.sources, []
    name = f"{json.dumps([s.source for s in scored])}[floor(datum.value)]"
    at = {"values": [row + 0.5 for row in range(len(scored))], "tickCount": len(scored)}
    axis = at | {"labelExpr": name} | labels(shades, name)
    for c, capability in enumerate(scores.capabilities):
        every = np.concatenate([s.score_NC[:, c] for s in scored])
        low, high = np.percentile(every[np.isfinite(every)], (1, 99)) if np.isfinite(every).any() else (0, 0)
        edges = np.linspace(*padded(min(float(low), 0.0), max(float(high), 0.0)), bins + 1).tolist()
        bars, means = Rows(), Rows()
        for foot, s in enumerate(scored, 1):
            share = np.histogram(s.score_NC[:, c], edges)[0] / len(s.score_NC)
            row = {"source": s.source, "foot": foot - 0.05}
            top = row["foot"] - 0.85 * share / (share.max() or 1.0)
            bars += [
                row | {"low": edges[k], "high": edges[k + 1], "share": float(share[k]), "top": float(top[k])}
                for k in np.flatnonzero(share)
            ]
            positive = float((s.score_NC[:, c] > 0).mean())
            means.append(row | {"low": float(s.mean_C[c]), "positive": positive, "top": foot - 1.0})
        place: dict[str, Any] = {
            "x": number("low", (edges[0], edges[-1]), title="lowers the loss →", format=".3~g", tickCount=4),
            "y": number("top", (0, len(scored)), {"reverse": True}, **axis),
            "y2": "foot:Q",
        }
        look, tips = named("source", shades), "source low:.3g high:.3g share:.1%"
        chart = draw(bars, "rect clip: true", tips, x2="high:Q", color=look, **place)
        mark = "rule color: var(--ink), strokeWidth: 2, clip: true"
        strokes = draw(means, mark, "source low:.3g positive:.1%", **place)
        zero = draw([{"zero": 0}], "rule", x="zero:Q")
        out.append(panel([zero, chart, strokes], capability, "score", 34 * len(scored)))
    return out


def predicted(reading: Reading, scores: summary.Scores) -> Panels:
    """A panel per capability, a dot per source: measured impact of leaving it out over its mean score."""
    out, free, shades = [], {"zero": False, "padding": 16}, colors(reading.run.domains)
    for c, capability in enumerate(scores.capabilities):
        impact = reading.measured_impact.get(capability, {})
        pairs = [(s.source, float(s.mean_C[c]), impact.get(s.source, np.nan)) for s in scores.sources]
        rows: Rows = [{"source": s, "score": x, "impact": y} for s, x, y in pairs if np.isfinite(x + y)]
        # Of fewer than three sources there is no rank correlation to speak of.
        if len(rows) < 3:
            continue
        dots = draw(
            rows,
            "circle size: 60, opacity: 1",
            "source score:.4g impact:+.3f",
            x=number("score", scale=free, title="mean score", format=".3~g", tickCount=4),
            y=number("impact", scale=free),
            color=named("source", shades),
        )
        names = [redraw(dots, "text dy: -11", text="source:N")] if len(rows) <= 16 else []
        rank = summary.spearman([row["score"] for row in rows], [row["impact"] for row in rows])
        unit = f"nats per token without the source; rank correlation {rank:.2f}"
        out.append(panel([dots, *names], capability, unit, 240))
    return out


def mixture(reading: Reading) -> Panels:
    """Paired bars: target share of each source in the first and the last phase; a stroke where the last
    phase drew another share."""
    run, shades = reading.run, colors(reading.run.domains)
    phases, rows = list(dict.fromkeys([run.phases[0], run.phases[-1]])), []
    for phase, s in itertools.product(phases, shades):
        share, drew = (run.last[phase][of].get(s, 0.0) for of in ("mix_target", "mix_actual"))
        off = phase == phases[-1] and abs(drew - share) >= 0.001
        row = {"source": s, "domain": run.domains[s], "phase": phase, "share": share}
        rows.append(row | {"drew": drew if off else None, "edge": max(share, drew) if off else share})
    opacity = dict(zip(phases, [0.4, 1.0][-len(phases) :], strict=True))
    bars = draw(
        rows,
        "bar",
        "source domain phase share:.2%",
        x=number("share", format="~%", title="share of sequences"),
        yOffset={"field": "phase", "type": "nominal", "sort": phases, "scale": {"paddingOuter": 0.12}},
        opacity=named("phase", opacity, {"symbolFillColor": INK}),
        **source_rows(shades),
    )
    shown, ink = {"field": "share", "type": "quantitative", "format": ".1%"}, alt.value(INK)
    text = redraw(bars, "text align: left, dx: 8", x="edge:Q", text=shown, color=ink)
    tick = redraw(bars, "tick", "source drew:.2%", x="drew:Q", color=ink)
    return [panel([bars, text, tick], height=(18 * len(phases) + 8) * len(shades))]


def mixture_over_time(reading: Reading) -> Panels:
    """Share of each source in the tokens of the steps, stacked over tokens; a phase's means as numbers."""
    run, shades = reading.run, colors(reading.run.domains)
    bands, means = Rows(), Rows()
    wide = [span for span in run.spans if span[2] - span[1] > 0.07 * run.end["tokens"]]
    spans = [(*span, run.last[span[0]]["mix_actual"]) for span in wide]
    for drawn, out in ((summary.drawn(run), bands), (spans, means)):
        for phase, begin, end, shares in drawn:
            at = {"phase": phase, "tokens": begin, "to": end, "middle": (begin + end) / 2}
            held = {s: shares[s] for s in shades if shares.get(s)}
            edges = itertools.pairwise(itertools.accumulate(held.values(), initial=0.0))
            for (s, share), (low, high) in zip(held.items(), edges, strict=True):
                place = {"low": low, "high": high, "inside": (high + low) / 2}
                out.append({"source": s, "share": share} | at | place)
    columns = {"expr": "max(2, floor(width / 150))"}
    chart = draw(
        bands,
        "rect clip: true",
        "source phase share:.1% tokens:.3s to:.3s",
        x=tokens(run.spans[0][1], run.spans[-1][2]),
        y=number("low", (0, 1), {"reverse": True}, labels=False),
        x2="to:Q",
        y2="high:Q",
        color=named("source", shades, {"columns": columns, "symbolType": "square"}),
    )
    large = [row for row in means if row["share"] > 0.045]
    text = {"field": "share", "type": "quantitative", "format": ".1%"}
    numbers = draw(large, "text color: var(--card), fontWeight: bold", x="middle:Q", y="inside:Q", text=text)
    return [panel([chart, numbers, *phase_marks(run, "var(--card)")], height=max(300, 17 * len(shades)))]


def epochs(reading: Reading) -> Panels:
    """Passes over each source at the end; a stroke for the control's."""
    shades, passes = colors(reading.run.domains), dict(reading.run.end["epochs_by_source"])
    passes = {s: passes.get(s, 0.0) for s in shades}
    against = reading.control.end["epochs_by_source"] if reading.control else {}
    edges = {s: max(passes[s], against.get(s, 0.0)) for s in shades}
    bars = draw(
        [{"source": s, "epochs": passes[s], "control": against.get(s), "edge": edges[s]} for s in shades],
        "bar height: {band: 0.7}",
        "source epochs:.3f control:.3f",
        x=number("epochs", title="epochs"),
        **source_rows(shades),
    )
    shown, ink = {"field": "epochs", "type": "quantitative", "format": ".3~g"}, alt.value(INK)
    text = redraw(bars, "text align: left, dx: 8", x="edge:Q", text=shown, color=ink)
    ticks = redraw(bars, "tick", x="control:Q", color=ink)
    one = [draw([{"epochs": 1}], "rule color: var(--ink)", x="epochs:Q")] if max(edges.values()) > 0.4 else []
    return [panel([*one, bars, text, ticks], height=24 * len(shades))]


def checkpoints(run: Run, saved: Sequence[summary.Saved]) -> Panels:
    """A lane of strokes for what holds of the checkpoints, over tokens."""
    complete, per_step = [one for one in saved if one.complete], run.config.tokens_per_step()
    lanes = {
        "complete": complete,
        "kept for good": [one for one in complete if one.pinned],
        "influence scored": [one for one in complete if one.scored],
        "not complete": [one for one in saved if not one.complete],
    }
    rows: Rows = [
        {"lane": f"{lane}  {len(of):,}", "step": one.step, "tokens": float(one.step * per_step)}
        for lane, of in lanes.items()
        for one in of
    ]
    order = list(dict.fromkeys(row["lane"] for row in rows))
    axis = {"title": None, "labelColor": INK, "grid": True, "labelLimit": 200}
    partial = {"test": "indexof(datum.lane, 'not') == 0", "value": "var(--negative)"}
    ticks = draw(
        rows,
        "tick size: 15, clip: true",
        "lane step:, tokens:.3s",
        x=tokens(0.0, 1.01 * max(run.reach, *(row["tokens"] for row in rows))),
        y={"field": "lane", "type": "nominal", "sort": order, "axis": axis},
        color={"condition": partial, "value": INK},
    )
    return [panel([ticks, *phase_marks(run)], height=26 * len(order))]
