"""The funnel of the probing sets: of each source, the documents that every stage of curation read and kept.

`Reading.funnel` has it from the manifest beside the probing sets, where tools/curate_probes.py wrote one.
"""

from __future__ import annotations

from typing import Any

from megatron_r1.report import plots
from megatron_r1.report.examples import ILLEGAL, Example, Extremes
from megatron_r1.report.load import Reading
from megatron_r1.system.errors import some

ENDS, SHOWN, CHARACTERS = ("kept", "dropped"), 3, 300
"""Of a stage, examples at either end, and characters of each."""
_FOOT = 0.8
"""Where bars on the logarithmic axis begin, so that one document has a bar and none has not."""


def bars(reading: Reading) -> plots.Panels:
    """A panel per source, a bar per stage. All panels share one logarithmic axis of documents.

    Rows: source, stage, kept, share of the stage before, end of the bar, label (kept, and the threshold).
    """
    shades, out = plots.colors(reading.run.domains), []
    most = max([10, *(of["read"] for of in reading.funnel.values())])
    # Room for the label behind the longest bar.
    x = plots.number("end", (_FOOT, most * (most / _FOOT) ** 0.6), {"type": "log"}, format="~s")
    for source, of in reading.funnel.items():
        stages = [{"stage": "read", "in": of["read"], "kept": of["read"]}, *of["stages"]]
        rows = [
            {"source": source, "stage": s["stage"], "kept": s["kept"], "share": s["kept"] / (s["in"] or 1)}
            | {"end": float(max(s["kept"], _FOOT)), "label": f"{s['kept']:,}{_reached(s, '  at ')}"}
            for s in stages
        ]
        chart = plots.draw(
            rows,
            "bar height: {band: 0.7}",
            "source stage kept:, share:.2%",
            x=x,
            x2={"datum": _FOOT},
            y={"field": "stage", "type": "nominal", "sort": [s["stage"] for s in stages]}
            | {"axis": {"title": None, "labelColor": plots.INK, "labelLimit": 110}},
            color={"value": shades.get(source, plots.INK)},
        )
        text = plots.redraw(chart, "text align: left, dx: 5", text="label:N", color={"value": plots.INK})
        size = "" if of.get("documents") is None else f"of {of['documents']:,.0f} documents"
        out.append(plots.panel([chart, text], source, size, 20 * len(rows)))
    return out


def _reached(stage: dict[str, Any], before: str) -> str:
    return "" if stage.get("threshold") is None else f"{before}{stage['threshold']:.3g}"


def fallbacks(reading: Reading) -> str:
    """A sentence on the stages of which too few documents passed the threshold; empty where there is none."""
    fallen = [
        f"{source} ({s['stage']}{_reached(s, ' down to ')})"
        for source, of in reading.funnel.items()
        for s in of["stages"]
        if s.get("fallback")
    ]
    sentence = f"Too few documents passed the threshold, so the best were taken, in {some(fallen)}."
    return sentence if fallen else ""


def examples(reading: Reading) -> dict[str, list[Extremes]]:
    """Documents that each stage of a source kept and dropped, by source."""
    out: dict[str, list[Extremes]] = {}
    for source, of in reading.funnel.items():
        ends = {s["stage"]: [_end(source, s["examples"][end]) for end in ENDS] for s in of["stages"]}
        out[source] = [Extremes(stage, *shown, ends=ENDS) for stage, shown in ends.items() if any(shown)]
    return out


def _end(source: str, given: list[dict[str, Any]]) -> list[Example]:
    texts = [ILLEGAL.sub("\ufffd", one["text"][:CHARACTERS]) for one in given[:SHOWN]]
    return [Example(source, n, given[n].get("score"), text=text) for n, text in enumerate(texts)]
