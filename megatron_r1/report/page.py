"""One self-contained HTML page (also well-formed XML): head, figures, no script, nothing from outside."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from megatron_r1.report import (
    agreement,
    bars,
    checkpoints,
    curves,
    examples,
    influence,
    measures,
    mixture,
    palette,
    predicted,
    summary,
    words,
)
from megatron_r1.report.figure import Figure
from megatron_r1.report.load import Reading
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import write_text

STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
:root{--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 var(--font)}
main{max-width:1120px;margin:0 auto;padding:36px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:20px;margin:0 0 6px;letter-spacing:-.005em}
p{margin:0 0 12px;max-width:78ch;overflow-wrap:break-word}
nav{margin:14px 0 26px;font-size:14px;display:flex;flex-wrap:wrap;gap:4px 18px}
nav a{color:var(--muted);text-decoration:none;border-bottom:1px solid var(--grid)}
nav a:hover{color:var(--ink)}
.about{color:var(--muted);max-width:96ch}
.cards{display:grid;grid-template-columns:minmax(0,1.45fr) minmax(0,1fr) minmax(0,1fr);gap:16px;margin:22px 0}
.cards section,figure{background:var(--card);border:1px solid var(--grid);border-radius:10px}
.cards section{padding:16px 20px}
.cards h2{font-size:13px;font-weight:600;color:var(--muted);margin:0 0 8px;letter-spacing:0}
.cards p{margin:6px 0 0;font-size:14px;color:var(--muted)}
.big{font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
.cards table{font-size:14px}
figure{margin:0 0 22px;padding:22px 26px 18px}
figure svg{display:block;width:100%;height:auto;overflow:visible}
.scroll{overflow-x:auto;margin-top:8px}
.note{font-size:13px;color:var(--muted);margin:12px 0 0;max-width:110ch}
pre{margin:0 0 10px;padding:10px 14px;background:var(--page);border:1px solid var(--grid);border-radius:6px;
font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:15px}
.numbers th,.numbers td{padding:5px 12px;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--grid)}
.numbers th:first-child,.numbers td:first-child{text-align:left;padding-left:0}
.numbers thead th{font-weight:500;color:var(--muted);font-size:13px;vertical-align:bottom}
.numbers tbody th{font-weight:550}
.numbers tbody tr:last-child th,.numbers tbody tr:last-child td{border-bottom:0}
.strong{font-weight:650}
.heat td{padding:7px 14px;border:2px solid var(--card)}
.numbers.heat th{border-bottom:0}
.heat td.domain{text-align:left;color:var(--muted)}
.heat th:nth-child(2){text-align:left}
small{color:var(--muted);font-size:12px}
.heat small{color:inherit;opacity:.75}
.stages{width:100%}
.stages .total th,.stages .total td{font-weight:650;border-top:1px solid var(--axis)}
.share{width:26%}
.numbers td.share{text-align:left}
h3{font-size:16px;margin:18px 0 4px}
h4{font-size:13px;font-weight:600;color:var(--muted);margin:0 0 4px}
.pair{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:4px 26px}
.example{font-size:13px;margin:0 0 10px}
.example p{margin:0 0 3px;color:var(--muted);font-size:12px;overflow-wrap:anywhere}
.example pre{margin:0;padding:8px 10px;max-height:150px;overflow:auto;font-size:11.5px;line-height:1.4;
white-space:pre-wrap;overflow-wrap:anywhere}
.bar{display:inline-block;width:calc(100% - 70px);height:11px;margin-right:10px;background:var(--grid);
border-radius:2px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--blue-0)}
svg text{font:12px var(--font);fill:var(--ink);font-variant-numeric:tabular-nums}
svg .tick,svg .muted,svg .domain{fill:var(--muted)}
svg .panel{font-size:14px;font-weight:650}
svg .name{font-weight:550}
.grid{stroke:var(--grid)}
.axis{stroke:var(--axis)}
.zero{stroke:var(--ink);stroke-width:1.2}
.mark{stroke:var(--ink);stroke-width:2}
.phase{stroke:var(--axis);stroke-dasharray:2 4}
.curve,.raw,.leader{fill:none;stroke-linejoin:round;stroke-linecap:round}
.curve{stroke-width:2}
.dashed{stroke-dasharray:6 5;stroke-linecap:butt}
.raw{stroke-width:1;opacity:.28}
.leader{stroke-width:1;opacity:.5}
.area{opacity:.8}
.band{stroke:var(--card);stroke-width:.6;stroke-linejoin:round}
svg .inside{font-size:11px;fill:var(--card)}
svg .strong{font-weight:650}
svg .small{font-size:10.5px;opacity:.75}
@media screen and (max-width:820px){.pair,.cards{grid-template-columns:1fr}figure{padding:18px 14px}
figure .art{overflow-x:auto}}
@media print{body{background:none;font-size:12px}main{max-width:none;padding:0}nav{display:none}
h1{font-size:22px}h2,.big{font-size:16px}.cards,.cards table,.cards p{font-size:11px}.note,pre{font-size:10px}
figure{padding:12px 14px;margin-bottom:12px}figure svg{min-width:0!important}.scroll{overflow:visible}
.cards section{padding:10px 12px}table,.numbers thead th{font-size:11px}small{font-size:9px}
.numbers th,.numbers td,.heat td{padding:3px 7px}p,.note,.about{max-width:none}
figure,.cards section{break-inside:avoid;border-color:#ccc}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def write(reading: Reading) -> Path:
    """Write RUN/reports/index.html, whole or not at all."""
    path = RunDir(reading.run.root).reports / "index.html"
    write_text(path, render(reading))
    return path


def render(reading: Reading) -> str:
    """The page; the same reading gives the same bytes."""
    shown = all_figures(reading)
    name = reading.run.name
    light = palette.variables(palette.LIGHT, palette.LIGHT_SHADES)
    dark = palette.variables(palette.DARK, palette.DARK_SHADES)
    style = f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE}"
    links = "".join(f'<a href="#{f.anchor}">{escape(f.title)}</a>' for f in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(name)}: training report</title><style>{style}</style></head>\n<body><main>"
        f'<header><h1>{escape(name)}</h1><p class="about">{escape(about(reading))}</p>'
        f"{cards(reading)}</header>"
        f"<nav>{links}</nav>\n{''.join(_figure(f) for f in shown)}</main></body></html>\n"
    )


def all_figures(reading: Reading) -> list[Figure]:
    made = [
        curves.loss(reading),
        curves.loss_by_source(reading),
        influence.histograms(reading),
        influence.heat(reading),
        agreement.figure(reading),
        predicted.figure(reading),
        examples.figure(reading),
        mixture.before_and_after(reading),
        mixture.over_time(reading),
        bars.epochs(reading),
        curves.held_out(reading),
        measures.figure(reading),
        checkpoints.figure(reading),
        bars.stages(reading),
    ]
    return [f for f in made if f is not None]


def about(reading: Reading) -> str:
    """What was trained, on what, with what."""
    run = reading.run
    config, ranks = run.config, summary.ranks(run)
    members = list(run.domains.values())
    domains = [f"{members.count(d)} {d}" for d in palette.domain_order(run.domains)]
    said = (
        f"A model of {words.count(config.model.parameters())} parameters ({config.model.num_layers} layers, "
        f"width {config.model.hidden_size:,}), trained on {words.count(run.end['tokens'])} tokens in "
        f"{words.many(run.end['step'], 'step')} of {config.tokens_per_step():,}, from "
        f"{words.many(len(run.sources), 'source')} ({', '.join(domains)}), in {config.train.precision}"
    )
    said += f" on {words.many(ranks, 'rank')}" if ranks else ""
    said += f"; {'phase' if len(run.phases) == 1 else 'phases'} {words.both(run.phases)}."
    if reading.control:
        said += f" Control: arm {reading.arms[1][0]}, to {words.count(reading.control.end['tokens'])} tokens."
    return said


def cards(reading: Reading) -> str:
    """The three key numbers."""
    return f'<div class="cards">{_held_out_card(reading)}{_worst_card(reading)}{_time_card(reading)}</div>'


def _held_out_card(reading: Reading) -> str:
    title = "Held-out loss at the end, nats per token"
    ends = summary.held_out(reading)
    if ends is None:
        return _big(title, "–", "not measured")
    return _card(title, curves.held_out_table(ends, brief=True).html())


def _worst_card(reading: Reading) -> str:
    title = "Worst source found"
    found = summary.influence(reading)
    if not found:
        return _big(title, "–", "influence not measured yet")
    best, worst = found[0], found[-1]
    low, high = words.compact(worst.total), words.compact(best.total)
    said = f"mean influence {low}; best: {best.source}, {high}"
    mixes = list(summary.mixtures(reading.run).values())
    if len(mixes) > 1:
        shares = [words.share(mix.get(worst.source, 0.0)) for mix in (mixes[0], mixes[-1])]
        said += f". Its share went from {shares[0]} to {shares[1]}"
    return _big(title, worst.source, said)


def _time_card(reading: Reading) -> str:
    costs = summary.stage_costs(reading)
    total = sum(c.seconds for c in costs)
    if total:
        parts = [
            ("train", "training"),
            ("train control", "its control"),
            ("influence", "measuring influence"),
        ]
        shares = [(name, summary.seconds_of(costs, kind) / total) for kind, name in parts]
        said = ", ".join(f"{name} {words.percent(100 * share)}" for name, share in shares if share)
        said += f"{', other ' if said else 'other '}{words.percent(100 * (1 - sum(s for _, s in shares)))}"
    else:
        total = sum(line["seconds"] for _, arm in reading.arms for line in arm.metrics)
        said = "of training steps; the ledger is empty"
    return _big("Total time", words.duration(total), said)


def _big(title: str, value: str, said: str) -> str:
    return _card(title, f'<div class="big">{escape(value)}</div><p>{escape(said)}</p>')


def _card(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(figure: Figure) -> str:
    parts = [f"<h2>{escape(figure.title)}</h2>", f"<p>{escape(figure.lead)}</p>"]
    if figure.command:
        parts.append(f"<pre>{escape(figure.command)}</pre>")
    shown = figure.body + "".join(table.html() for table in figure.tables)
    if shown:
        parts.append(f'<div class="art">{shown}</div>')
    if figure.note:
        parts.append(f'<p class="note">{escape(figure.note)}</p>')
    return f'<figure id="{figure.anchor}">{"".join(parts)}</figure>\n'
