"""The funnel of the probing sets: of each source, the documents that every stage of curation read and kept.

`Reading.funnel` has it from the manifest beside the probing sets, where tools/curate_probes.py wrote one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_r1.report import plots
from megatron_r1.report.examples import ILLEGAL, Example, Extremes
from megatron_r1.report.load import Reading
from megatron_r1.system.errors import some

SHOWN, CHARACTERS = 3, 300
"""Examples at either end of a stage, and characters of each."""
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
        axis = {"title": None, "labelColor": plots.INK, "labelLimit": 110}
        chart = plots.draw(
            rows,
            "bar height: {band: 0.7}",
            "source stage kept:, share:.2%",
            x=x,
            x2={"datum": _FOOT},
            y={"field": "stage", "type": "nominal", "sort": [s["stage"] for s in stages], "axis": axis},
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
    return (
        f"Too few documents passed the threshold, so the best were taken, in {some(fallen)}."
        if fallen
        else ""
    )


def examples(reading: Reading) -> dict[str, list[Extremes]]:
    """Documents that each stage of a source kept and dropped, by source."""
    ends = "kept", "dropped"

    def end(source: str, given: list[dict[str, Any]]) -> list[Example]:
        texts = [ILLEGAL.sub("\ufffd", one["text"][:CHARACTERS]) for one in given[:SHOWN]]
        return [Example(source, n, given[n].get("score"), text=text) for n, text in enumerate(texts)]

    def groups(source: str, stages: list[dict[str, Any]]) -> Iterator[Extremes]:
        for stage in stages:
            if any((of := stage.get("examples", {})).values()):
                kept, dropped = (end(source, of[name]) for name in ends)
                yield Extremes(stage["stage"], kept, dropped, ends)

    return {source: list(groups(source, of["stages"])) for source, of in reading.funnel.items()}
