"""The report as one HTML page that needs nothing from outside, and its figures as pictures."""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment

from megatron_r1 import config_io
from megatron_r1.report import distillation, examples, funnel, plots, summary, tables
from megatron_r1.report.load import Reading
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import replacing, write_text
from megatron_r1.train.metrics import describe_lost

_VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
_PANEL = 420
"""Width of a panel in a picture, pixels."""


@dataclass(frozen=True)
class Figure:
    """Where it has neither panels, tables nor examples, `missing` says why and `command` makes them."""

    anchor: str
    panels: Sequence[Any] = ()
    tables: Sequence[tables.Table] = ()
    """Below the panels."""
    missing: str = ""
    """Names a sentence of the figure in page.yaml."""
    command: str = ""
    extremes: Sequence[examples.Extremes] = ()
    folded: Mapping[str, Sequence[examples.Extremes]] = field(default_factory=dict)
    """The same by what is to be clicked on to see them."""
    lead: str = ""
    """Before the caption."""

    @property
    def title(self) -> str:
        return str(plots.PAGE["figures"][self.anchor]["title"])

    @property
    def columns(self) -> int:
        """Panels side by side, where the window is wide enough."""
        return min(len(self.panels), plots.PAGE["figures"][self.anchor].get("columns", 3))

    @property
    def caption(self) -> str:
        texts = plots.PAGE["figures"][self.anchor]
        instead = texts[self.missing] if self.missing else "+"
        behind = f"{texts['caption']} {instead[1:]}" if instead.startswith("+") else instead
        return f"{self.lead} {behind}".strip()


class Report:
    def __init__(self, reading: Reading):
        self.reading = reading
        self.saved = summary.checkpoints(reading)
        self.complete = [one for one in self.saved if one.complete]
        self.scores = summary.scores(reading)
        self.costs = summary.stage_costs(reading)
        self.ends = summary.held_out(reading)
        self.figures = [f for f in self._figures() if f.panels or f.tables or f.extremes or f.command]

    def _figures(self) -> Iterator[Figure]:
        """In the order of the page. Those with nothing to show are left out."""
        reading, run, scores = self.reading, self.reading.run, self.scores
        train = summary.launch(run, "train")
        yield Figure("loss", plots.loss(reading))
        yield Figure("sources", plots.loss_by_source(reading))
        yield Figure("distillation", distillation.panels(reading))
        if self.ends is not None:
            alone = ("", "") if reading.control else ("no control", summary.control_command(run))
            yield Figure("heldout", plots.held_out(reading), [tables.held_out(self.ends[1])], *alone)
        elif run.config.data.probes:
            yield Figure("heldout", missing="not measured", command=train)
        else:
            yield Figure("heldout", missing="not named", command=f"{train} data.probes.code=PREFIX")
        yield Figure("gold", plots.gold(reading))
        said, shown = funnel.fallbacks(reading), funnel.examples(reading)
        yield Figure("funnel", funnel.bars(reading), lead=said, folded=shown)
        yield Figure("measures", plots.measures(reading))
        if scores is None:
            more = () if run.config.influence else ("influence.directions.code=PREFIX",)
            score = summary.launch(run, "compute_influence", *more)
            yield Figure("influence", missing="missing", command=score)
        else:
            yield Figure("influence", plots.histograms(reading, scores), lead=scores.unit)
            yield Figure("heat", tables=[tables.heat(reading, scores)])
            several = len(scores.tables[0].steps) > 1
            yield Figure("agreement", tables=[tables.agreement(scores)] if several else [])
            yield Figure("predicted", plots.predicted(reading, scores))
            tokenizer = examples.find_tokenizer(reading)
            again = f"python tools/report.py {run.root} --tokenizer MODEL"
            missing = ("", "") if tokenizer else ("no tokenizer", again)
            yield Figure("examples", (), (), *missing, examples.extremes(reading, scores, tokenizer))
        mix = f"python tools/make_mix.py {RunDir(run.root).config} NEXT_PHASE.yaml mix.phase=NEXT_PHASE"
        missing = ("one phase", mix) if len(run.phases) == 1 else ("", "")
        yield Figure("mixture", plots.mixture(reading), (), *missing)
        yield Figure("mixture-over-time", plots.mixture_over_time(reading))
        yield Figure("epochs", plots.epochs(reading))
        yield Figure("schedule", plots.schedule(reading))
        yield Figure("phases", tables=[tables.phases(reading)])
        if self.complete:
            listed = [tables.checkpoints(run, self.complete)]
            yield Figure("checkpoints", plots.checkpoints(run, self.saved), listed, command=train)
        else:
            yield Figure("checkpoints", missing="missing", command=train)
        if self.costs:
            yield Figure("cost", tables=[tables.stages(self.costs), *tables.overhead(self.costs)])
        else:
            yield Figure("cost", missing="missing", command=train)

    @cached_property
    def page(self) -> Any:
        """The template's module: as text the page; its macro `picture` draws a table. The same reading gives
        the same bytes."""
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {k: v for k, v in vars(tables).items() if callable(v)}
        template = environment.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
        bundle = vl_convert.javascript_bundle(vl_version=_VEGA_LITE)  # type: ignore[call-arg]
        script = bundle.replace("</script", "<\\/script") + "\n" + plots.PAGE["draw"]
        return template.make_module(
            {
                "report": self,
                "plots": plots,
                "tables": tables,
                "RunDir": RunDir,
                "lost": describe_lost,
                "ranks": summary.ranks(self.reading.run),
                "configuration": config_io.dump(self.reading.run.config),
                "specs": {f.anchor: [_in_page(panel) for panel in f.panels] for f in self.figures},
                "script": script,
                "hash": f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}",
            }
        )

    def write(self) -> Path:
        """Write RUN/reports/index.html, whole or not at all."""
        path = RunDir(self.reading.run.root).reports / "index.html"
        # A name in a damaged file may hold half a character.
        write_text(path, str(self.page).encode(errors="replace").decode())
        return path

    def write_pictures(self, kind: str) -> Iterator[Path]:
        """Write RUN/reports/ANCHOR.png or .svg of each figure; ANCHOR-2 and so on of its tables."""
        for figure in self.figures:
            for number, drawing in enumerate(self.pictures(figure), 1):
                name = f"{figure.anchor}{f'-{number}' if number > 1 else ''}.{kind}"
                path = RunDir(self.reading.run.root).reports / name
                png = kind == "png"
                with replacing(path) as stream:
                    stream.write(vl_convert.svg_to_png(drawing, scale=2) if png else drawing.encode())
                yield path

    def pictures(self, figure: Figure) -> Iterable[str]:
        """SVG in the light colours of a figure's panels together, then of each table."""
        if figure.panels:
            width = _PANEL if figure.columns > 1 else 2 * _PANEL
            drawn = [panel.properties(width=width) for panel in figure.panels]
            whole = alt.concat(*drawn, columns=figure.columns, title=alt.Title(figure.title, fontSize=18))
            spec = whole.resolve_scale(color="independent", strokeDash="independent").to_dict(validate=False)
            config = plots.PAGE["config"] | {"background": "var(--card)", "padding": 20}
            light = _in_light(json.dumps(_finite(spec | {"config": config}), ensure_ascii=False))
            yield _legal(vl_convert.vegalite_to_svg(_legal(light), _VEGA_LITE))
        for table in figure.tables:
            yield _legal(_in_light(str(self.page.picture(table, figure.title))))


def _legal(text: str) -> str:
    return examples.ILLEGAL.sub("\ufffd", text)


def _in_light(text: str) -> str:
    return re.sub(r"var\(--([\w-]+)\)", lambda m: plots.COLORS[m[1]][0], text)


def _in_page(panel: Any) -> dict[str, Any]:
    """As wide as its place there; curves with zoom."""
    spec: dict[str, Any] = panel.to_dict(validate=False)
    if curves := spec["layer"][0].get("layer"):
        curves[0]["params"] = [plots.PAGE["zoom"]]
    wide = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return {k: _finite(v) for k, v in (spec | wide).items() if k not in ("$schema", "config")}


def _finite(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinite number."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
