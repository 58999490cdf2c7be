"""The report as one HTML page that needs nothing from outside, and its figures as pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from jinja2 import Environment

from megatron_r1 import config_io
from megatron_r1.report import examples, plots, summary, tables
from megatron_r1.report.load import Reading, Run
from megatron_r1.run_dir import RunDir, replacing, write_text
from megatron_r1.train.schedule import phase_spans

_VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
_ZOOM = {"type": "interval", "zoom": "wheel![event.ctrlKey]"}
"""Turning the wheel alone scrolls the page."""
_PANEL, _COLUMNS = 420, 3
"""Width of a panel in a picture, and panels side by side."""


@dataclass(frozen=True)
class Figure:
    anchor: str
    title: str
    caption: str
    """How to read it; or, with a command, what is missing."""
    panels: Sequence[Any] = ()
    """Altair charts."""
    tables: Sequence[tables.Table] = ()
    """Below the panels."""
    command: str = ""
    """Makes what is missing, or goes on."""
    extremes: Sequence[examples.Extremes] = ()
    columns: int = _COLUMNS
    """Panels side by side, where the window is wide enough."""


@dataclass(frozen=True)
class Card:
    """Computed numbers, at the head of the page."""

    title: str
    value: str = ""
    text: str = ""
    table: tables.Table | None = None


@dataclass(frozen=True)
class Report:
    reading: Reading
    figures: list[Figure]
    cards: list[Card]


def build(reading: Reading) -> Report:
    scores, (complete, partial) = summary.scores(reading), summary.checkpoints(reading)
    made = [
        *_training(reading),
        *_influence(reading, scores),
        *_mixture(reading),
        _checkpoints(reading, complete, partial),
        _cost(reading),
    ]
    cards = [
        _held_out_card(reading),
        _influence_card(reading, scores),
        _loss_card(reading),
        _checkpoint_card(reading.run, complete, partial),
        _time_card(reading),
    ]
    return Report(reading, made, cards)


def _training(reading: Reading) -> Iterator[Figure]:
    run = reading.run
    yield Figure(
        "loss",
        "Training loss",
        "Faint: every step. Strong: smoothed within a phase. Look for spikes and for a curve that stops falling. "
        "A mark on the axis is a step that was skipped because its loss or gradient was bad. Arms that have "
        "parted read different text: compare them by the held-out loss.",
        plots.loss(reading),
    )
    yield Figure(
        "sources",
        "Training loss per source",
        "Mean loss of each source's tokens in a step, of the run alone. All panels share the y axis. A curve that "
        "stays high and flat is text from which nothing more is learned. A curve that ends early belongs to a "
        "source that is no longer drawn.",
        plots.loss_by_source(reading),
        columns=2,
    )
    title, ends = "Held-out loss per capability", summary.held_out(reading)
    how = (
        "Mean negative log-likelihood per token of text that is kept out of training. Lower is better. The table "
        "compares the arms at the last step that both have measured. "
    )
    if ends is None:
        more = [] if run.config.data.probes else ["data.probes.code=PREFIX"]
        caption = "No held-out loss was measured yet at a step that every arm has reached. Training measures it:"
        if more:
            caption = "No held-out sets are named, so no loss on them is known. Training with them measures it:"
        yield Figure("heldout", title, caption, command=summary.launch(run, "train", *more))
    elif reading.control is None:
        how += "There is no control run to compare with. This trains one:"
        command = summary.control_command(run)
        yield Figure("heldout", title, how, plots.held_out(reading), [tables.held_out(ends)], command)
    else:
        yield Figure("heldout", title, how, plots.held_out(reading), [tables.held_out(ends)])
    if panels := plots.measures(reading):
        yield Figure(
            "measures",
            "Rank of the embeddings, loss on held-back text",
            "RankMe is the exponential of the entropy of the singular values of the hidden states before the head, "
            "over the probing text (Eq. 8): about so many directions are in use. Look for a collapse. Validation is "
            "text of each source behind the documents it trains on: look for a curve that turns up.",
            panels,
            columns=2,
        )
    yield Figure(
        "schedule",
        "Learning rate, gradient norm, throughput",
        "The gradient norm is that before clipping. Look for a norm that grows over many steps, and for "
        "throughput that falls.",
        plots.schedule(reading),
    )
    yield Figure(
        "phases",
        "Phases",
        "What was asked of each phase, and how far it came. The whole configuration is at the end of the page.",
        tables=[tables.phases(reading)],
    )


def _influence(reading: Reading, scores: summary.Scores | None) -> Iterator[Figure]:
    run = reading.run
    if scores is None:
        more = [] if run.config.influence is not None else ["influence.directions.code=PREFIX"]
        caption = "No complete influence scores, so the worth of a source for a capability is not known. This measures it:"
        yield Figure("influence", "Influence", caption, command=summary.launch(run, "compute_influence", *more))
        return
    yield Figure(
        "influence",
        "Influence per example",
        f"{scores.unit} Scores are summed over checkpoints (Eq. 4). Each row is scaled to its own peak and drawn from "
        "the 1st to the 99th percentile of all sources. Upright stroke: token-weighted mean. Right of 0, a step on "
        "the example lowers the capability's loss; left of 0, it raises it.",
        plots.histograms(reading, scores),
    )
    yield Figure(
        "heat",
        "Influence per source and capability",
        "Token-weighted mean score (rho of Eq. 5) ± its standard error over examples. Blue lowers the capability's "
        "loss, orange raises it; the shade is relative to the greatest value of the column. Joint: the capabilities' "
        "weighted mean, from which the mixture is made. An example helps where its joint score at the last "
        "checkpoint is above mix.keep_above (Eq. 6).",
        tables=[tables.heat(reading, scores)],
    )
    if len(scores.tables[0].steps) > 1:
        yield Figure(
            "agreement",
            "Agreement between checkpoints",
            "Spearman's rank correlation of the scores of all examples, and of the sources' mean scores. 1: the same "
            "order. 0: nothing in common. Near 1, a mixture made from these scores should hold for the next phase; "
            "where the numbers fall, score again.",
            tables=[tables.agreement(scores)],
        )
    if panels := plots.predicted(reading, scores):
        yield Figure(
            "predicted",
            "Predicted and measured",
            "Right: mean score of the source's examples. Up: how much higher the loss on the capability's probing set "
            "ended in a run without the source (Eq. 1). Sources far from the rising line of the others are "
            "misjudged by their scores. Capabilities measured for fewer than three sources are left out.",
            panels,
        )
    tokenizer = examples.find_tokenizer(reading)
    caption = (
        f"The {examples.SHOWN} examples at either end of each capability's scores, at most {examples.PER_SOURCE} of a "
        "source. The lowest score may still be above 0. Places are counted from 0. Read a few: is the text with the "
        "highest scores what the capability is about, and is the other text worth training on?"
    )
    command = "" if tokenizer else f"python tools/report.py {run.root} --tokenizer MODEL"
    if command:
        caption += " The text needs the tokenizer that made the datasets:"
    found = examples.extremes(reading, scores, tokenizer)
    title = "Examples of the highest and the lowest score"
    yield Figure("examples", title, caption, command=command, extremes=found)


def _mixture(reading: Reading) -> Iterator[Figure]:
    run = reading.run
    caption, command, title = (
        "Target share of each source in the sequences of the first phase (pale) and of the last. An upright stroke "
        "is what the last phase drew, where that is not its target.",
        "",
        "Mixture before and after",
    )
    if len(run.phases) == 1:
        title = "Mixture"
        caption = (
            "Target share of each source in the sequences of the one phase that has trained. Influence, once it is "
            "measured, weighs the sources of the next:"
        )
        command = f"python tools/make_mix.py {RunDir(run.root).config} NEXT_PHASE.yaml mix.phase=NEXT_PHASE"
    yield Figure("mixture", title, caption, plots.mixture(reading), command=command)
    yield Figure(
        "mixture-over-time",
        "Mixture over time",
        "Share of each source in the tokens that the steps drew. Numbers: the phase so far. Within a phase the bands "
        "should stand still; a band that thins out belongs to a source that came to its cap on epochs.",
        plots.mixture_over_time(reading),
    )
    yield Figure(
        "epochs",
        "Epochs per source",
        "Sequences drawn from a source over the sequences that it has, all phases together. An upright stroke is the "
        "control's. Look for bars far beyond one epoch: text that is read again teaches less.",
        plots.epochs(reading),
    )


def _checkpoints(reading: Reading, complete: list[summary.Saved], partial: list[summary.Saved]) -> Figure:
    run, command = reading.run, summary.launch(reading.run, "train")
    if not complete:
        caption = (
            f"No complete checkpoint lies in {RunDir(run.root).checkpoints}. One is saved every "
            f"{tables.many(run.config.train.checkpoint_every, 'step')} and at the end of each phase:"
        )
        return Figure("checkpoints", "Checkpoints", caption, command=command)
    keep = run.config.train.keep_last
    caption = "Sizes are of all files of all ranks. Listed are the newest, the ends of phases, the scored, some between. "
    if keep is None:
        caption += "train.keep_last is not set, so none is ever deleted. "
    else:
        caption += f"What is not kept for good stays while it is among the newest {keep:,}. "
    if complete[-1].step >= phase_spans(run.config)[-1].end:
        caption += "The recipe ends at the newest; with one more phase in the configuration this goes on from it:"
    else:
        caption += "This goes on from the newest:"
    panels = plots.checkpoints(run, complete, partial)
    return Figure("checkpoints", "Checkpoints", caption, panels, [tables.checkpoints(run, complete)], command)


def _cost(reading: Reading) -> Figure:
    caption = (
        "Wall time as the ledger has it; a stage that ran in several parts is summed over them. Rank-hours count the "
        "wall time once for each rank. Look for the stage worth making faster."
    )
    if made := tables.stages(reading):
        return Figure("cost", "Where the time went", caption, tables=made)
    caption = "The ledger is empty; every stage adds a line when it finishes. Training, for instance:"
    return Figure("cost", "Where the time went", caption, command=summary.launch(reading.run, "train"))


def _held_out_card(reading: Reading) -> Card:
    title, ends = "Held-out loss at the end, nats per token", summary.held_out(reading)
    if ends is None:
        return Card(title, "–", "not measured")
    return Card(title, text=f"at {tables.count(ends.tokens)} tokens", table=tables.held_out(ends))


def _influence_card(reading: Reading, scores: summary.Scores | None) -> Card:
    title = "Source of least influence"
    if scores is None:
        return Card(title, "–", "influence not measured yet")
    best, worst = scores.sources[0], scores.sources[-1]
    sign = "positive: its text still lowers the loss" if worst.joint > 0 else "negative: its text raises the loss"
    text = f"lowest joint score, {tables.compact(worst.joint)}, {sign if worst.joint else 'no effect'}. "
    text += f"Highest: {best.source}, {tables.compact(best.joint)}."
    phases = reading.run.phases
    if len(phases) > 1:
        shares = [reading.run.last[p]["mix_target"].get(worst.source, 0.0) for p in (phases[0], phases[-1])]
        text += f" Its share went from {tables.percent(shares[0])} to {tables.percent(shares[1])}."
    return Card(title, worst.source, text)


def _loss_card(reading: Reading) -> Card:
    run = reading.run
    _, losses = run.points("loss")
    if not len(losses):
        return Card("Training loss at the end", "–", "no step had a loss that is a number")
    tenth = max(1, len(losses) // 10)
    last, before = losses[-tenth:].mean(), losses[-2 * tenth : -tenth].mean() if len(losses) > 1 else losses[0]
    text = f"mean of the last tenth, {tables.signed(last - before, 2)} against the tenth before; first step {losses[0]:.2f}."
    if skipped := len(plots.skipped(run)[0]):
        text += f" {tables.many(skipped, 'step')} skipped as bad."
    if len(memory := run.points("memory_bytes")[1]):
        text += f" The first rank held at most {tables.size(memory.max())}."
    slowest = run.points("slowest_ratio")[1]
    if len(slowest) and (summary.ranks(run) or 1) > 1:
        text += f" The slowest rank of a step took {np.median(slowest):.2f} times the median rank's time."
    return Card("Training loss at the end, nats per token", f"{last:.3f}", text)


def _checkpoint_card(run: Run, complete: list[summary.Saved], partial: list[summary.Saved]) -> Card:
    text = ""
    if complete:
        newest = complete[-1]
        text = f"{tables.size(sum(s.size for s in complete))} in all; the newest is {newest.path}."
        if (behind := run.end["step"] - newest.step) > 0:
            text += f" The run came {tables.many(behind, 'step')} further, which would be trained again."
    for hidden, why in (
        (True, "being written or deleted, or left so by a launch that was killed; the next save removes"),
        (False, "whose description is missing or damaged: a last one so stops a resume; remove"),
    ):
        names = [saved.path.name for saved in partial if saved.path.name.startswith(".") == hidden]
        shown = names if len(names) < 4 else [*names[:3], f"{len(names) - 3} more"]
        if names:
            text += f" Not complete: {', '.join(shown)}, {why} {'it' if len(names) == 1 else 'them'}."
    if saving := run.points("saving_seconds")[1].sum():
        share = saving / (saving + run.points("seconds")[1].sum())
        text += f" Saving held the first rank up for {tables.duration(saving)}, {tables.percent(share)} of its steps' time."
    return Card("Complete checkpoints", f"{len(complete):,}", text.strip())


def _time_card(reading: Reading) -> Card:
    costs = summary.stage_costs(reading)
    total = sum(c.seconds for c in costs)
    if not total:
        total = sum(arm.points("seconds")[1].sum() for arm in reading.arms.values())
        return Card("Total time", tables.duration(total), "of training steps; the ledger is empty")
    names = {"train": "training", "train control": "its control", "influence": "measuring influence", "other": "other"}
    parts = {name: sum(c.seconds for c in costs if c.kind == kind) / total for kind, name in names.items()}
    text = ", ".join(f"{name} {tables.percent(share, 0)}" for name, share in parts.items() if share)
    return Card("Total time", tables.duration(total), text)


def about(reading: Reading) -> str:
    """What was trained, on what, with what."""
    run = reading.run
    config, ranks, members = run.config, summary.ranks(run), list(run.domains.values())
    domains = ", ".join(f"{members.count(d)} {d}" for d in plots.domain_order(run.domains))
    text = (
        f"A model of {tables.count(config.model.parameters())} parameters ({config.model.num_layers} layers, "
        f"width {config.model.hidden_size:,}), trained on {tables.count(run.end['tokens'])} tokens in "
        f"{tables.many(run.end['step'], 'step')} of {config.tokens_per_step():,}, from "
        f"{tables.many(len(run.domains), 'source')} ({domains}), in {config.train.precision}"
    )
    text += f" on {tables.many(ranks, 'rank')}" if ranks else ""
    text += f". Phases: {', '.join(run.phases)}."
    if reading.control:
        name = list(reading.arms)[1]
        text += f" Control: arm {name}, to {tables.count(reading.control.end['tokens'])} tokens."
    return text


def _specification(chart: Any) -> dict[str, Any]:
    """For the page: as wide as its place there, with zoom where both axes are numbers."""
    spec: dict[str, Any] = chart.to_dict(validate=False)
    spec |= {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    if any(layer["mark"]["type"] == "line" for layer in spec["layer"]):
        spec["layer"][0]["params"] = [{"name": "zoom", "select": _ZOOM, "bind": "scales"}]
    return spec


def render(report: Report) -> str:
    """The page; the same reading gives the same bytes."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (files(__package__) / "page.html").read_text(encoding="utf-8")
    )
    reading = report.reading
    return template.render(
        report=report,
        run=reading.run,
        about=about(reading),
        colors=plots.COLORS,
        shades=plots.colors(reading.run.domains),
        compact=tables.compact,
        configuration=config_io.dump(reading.run.config),
        specs={f.anchor: [_specification(panel) for panel in f.panels] for f in report.figures},
        config=plots.CONFIG,
        script=vl_convert.javascript_bundle(vl_version=_VEGA_LITE).replace("</script", "<\\/script"),
    )


def write(report: Report) -> Path:
    """Write RUN/reports/index.html, whole or not at all."""
    path = RunDir(report.reading.run.root).reports / "index.html"
    write_text(path, render(report))
    return path


def pictures(figure: Figure) -> Iterator[dict[str, Any]]:
    """A specification in the light colours, that stands by itself, of a figure's panels and of each table."""
    drawn = [panel.properties(width=_PANEL if len(figure.panels) > 1 else 2 * _PANEL) for panel in figure.panels]
    whole = [alt.concat(*drawn, columns=figure.columns).resolve_scale(color="independent", strokeDash="independent")]
    charts = (whole if drawn else []) + [tables.chart(table) for table in figure.tables]
    for chart in charts:
        title = {"text": figure.title, "fontSize": 18, "offset": 16}
        spec = chart.to_dict(validate=False) | {"config": plots.CONFIG | {"padding": 20}, "title": title}
        text = json.dumps(spec | {"background": "var(--card)"})
        yield json.loads(re.sub(r"var\(--([\w-]+)\)", lambda m: plots.COLORS[m[1]][0], text))


def write_pictures(report: Report, kind: str) -> list[Path]:
    """Write RUN/reports/ANCHOR.png or .svg of each figure: ANCHOR-2, and so on, where it has tables, too."""
    directory = RunDir(report.reading.run.root).reports
    written = []
    for figure in report.figures:
        for number, spec in enumerate(pictures(figure), 1):
            path = directory / f"{figure.anchor}{f'-{number}' if number > 1 else ''}.{kind}"
            with replacing(path) as stream:
                if kind == "png":
                    stream.write(vl_convert.vegalite_to_png(spec, vl_version=_VEGA_LITE, scale=2))
                else:
                    stream.write(vl_convert.vegalite_to_svg(spec, vl_version=_VEGA_LITE).encode())
            written.append(path)
    return written
