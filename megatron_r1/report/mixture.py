"""Figures of the mixture: targets of the first and the last phase, and what the steps really drew."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from megatron_r1.report import palette, summary, words
from megatron_r1.report.figure import (
    GUTTER,
    INK,
    WIDTH,
    Figure,
    phase_marks,
    phase_name,
    reach,
    token_axes,
    token_panel,
)
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.svg import (
    Points,
    Scale,
    end_labels,
    line,
    picture,
    polygon,
    rect,
    smooth,
    text,
    width_of,
)

_POINTS = 240
"""Of an outline, over the whole run."""


def drawn(run: Run) -> np.ndarray:
    """Share of each step's tokens that it drew from each source, [T, S], sources as in `run.domains`."""
    sources = list(run.domains)
    total_TS = np.array([[line["tokens_by_source"].get(s, 0.0) for s in sources] for line in run.metrics])
    # Counted from the run's first sample on, so a step's own are the difference. The first line may be far
    # behind that sample, where the run forks off another: it says what its phase has drawn so far.
    step_TS = np.diff(total_TS, axis=0)
    share_TS = step_TS / np.maximum(step_TS.sum(1, keepdims=True), 1e-12)
    return np.vstack([[run.metrics[0]["mix_actual"].get(s, 0.0) for s in sources], share_TS])


def over_time(reading: Reading) -> Figure:
    """What the steps drew from each source, stacked, over tokens."""
    run = reading.run
    colors, names = palette.source_colors(run.domains), list(run.domains)
    height = max(300.0, 15.0 * len(names) + 10)
    margin = max(width_of(f"{s} 00.0 %") for s in names) + 22
    panel = token_panel(reading, 50, WIDTH - margin, 30, 30 + height, (0.0, 1.0))
    share_TS, tokens = drawn(run), [float(line["tokens"]) for line in run.metrics]
    bands, numbers, means = [], [], {}
    for phase, begin, _ in run.spans:
        steps = [t for t, line in enumerate(run.metrics) if line["phase"] == phase]
        mean_S = share_TS[steps].mean(0)
        means[phase] = dict(zip(names, mean_S.tolist(), strict=True))
        smooth_TS = np.stack([smooth(share_TS[steps, s], reach(run)) for s in range(len(names))], axis=1)
        count = max(2, _POINTS * len(steps) // len(tokens))
        few = np.unique(np.linspace(0, len(steps) - 1, count, dtype=int))
        # From where the phase begins, at its first value: a step's tokens are those behind it.
        x = [panel.x(begin), *(panel.x(tokens[steps[t]]) for t in few)]
        edge_TS = 1 - np.cumsum(np.insert(smooth_TS[[0, *few]], 0, 0.0, axis=1), axis=1)
        for s, source in enumerate(names):
            upper, lower = (
                [(a, panel.y(v)) for a, v in zip(x, edge_TS[:, k], strict=True)] for k in (s, s + 1)
            )
            said = words.share(mean_S[s])
            if mean_S[s] > 0:
                tip = f"{source}, {phase_name(phase)}: {said}"
                bands.append(polygon([*upper, *reversed(lower)], colors[source], "band", tip))
            # The last phase's stand with the names.
            if phase != run.phases[-1]:
                numbers.append(_inside(upper, lower, said))
    middle_S = (edge_TS[-1, 1:] + edge_TS[-1, :-1]) / 2
    labels = [
        (tokens[-1], float(middle_S[s]), f"{source} {words.share(mean_S[s])}", colors[source])
        for s, source in enumerate(names)
    ]
    quarters = [(v, words.percent(100 * v)) for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    frame = token_axes(panel, x_label="tokens", y_marks=quarters)
    parts = [frame, *bands, *numbers, phase_marks(panel, run), end_labels(panel, labels)]
    body = picture(WIDTH, height + 72, parts, "Share of each source in the tokens of the steps")
    note = (
        f"Smoothed over {2 * reach(run) + 1} steps within a phase. Numbers: the phase's mean; of the last "
        "phase, at the right."
    )
    if len(means) > 1:
        note += f" Phases, in order: {words.both(run.phases)}."
    return Figure("mixture-over-time", "Mixture over time", _drawn_lead(run, means), body, note)


def _inside(upper: Points, lower: Points, said: str) -> str:
    """Words in the middle of a band, where it is wide and high enough all along them."""
    at, half = (upper[0][0] + upper[-1][0]) / 2, width_of(said) / 2
    top = max((y for x, y in upper if abs(x - at) <= half), default=math.inf)
    bottom = min((y for x, y in lower if abs(x - at) <= half), default=-math.inf)
    if bottom - top < 13 or at - half < upper[0][0]:
        return ""
    return text(at, (top + bottom) / 2 + 4, said, "inside", "middle")


def _drawn_lead(run: Run, means: dict[str, dict[str, float]]) -> str:
    """The greatest change from a phase to the next, what is no longer drawn, and what ran into its cap."""
    phases = list(means)
    last = means[phases[-1]]
    if len(phases) == 1:
        low, high = summary.extremes(last)
        lead = f"There is one phase, {phases[0]}: {words.share(last[high])} of the tokens are {high}'s"
        lead += f", the most, and {words.share(last[low])} {low}'s, the least." if low != high else "."
    else:
        changes = {
            (source, a, b): abs(means[b][source] - means[a][source])
            for a, b in itertools.pairwise(phases)
            for source in last
        }
        source, a, b = max(changes, key=lambda key: changes[key])
        lead = (
            f"The greatest change is that of {source}, from {words.share(means[a][source])} of the tokens in "
            f"{phase_name(a)} to {words.share(means[b][source])} in {phase_name(b)}."
        )
    for phase, sources in _capped(run).items():
        lead += (
            f" In {phase_name(phase)}, {words.both(sources)} came to the cap on epochs: the others took over."
        )
    gone = [s for s in last if not last[s] and any(mean[s] for mean in means.values())]
    if gone:
        lead += f" No longer drawn in {phase_name(phases[-1])}: {words.both(gone)}."
    return lead + (
        " Within a phase the bands should stand still; look for one that thins out: its source came to its "
        "cap on epochs, and the others take its share."
    )


def _capped(run: Run) -> dict[str, list[str]]:
    """Phase -> sources that it drew until they had been read as often as `max_epochs` allows."""
    out = {}
    for phase in run.phases:
        cap = run.config.phases[phase].max_epochs if phase in run.config.phases else None
        caps = cap if isinstance(cap, dict) else dict.fromkeys(run.sources, cap)
        end = run.last_of(phase)
        # Epochs end on a whole window, which may lie a little below the cap.
        found = [s for s, c in caps.items() if c and end["epochs_by_source"].get(s, 0.0) >= 0.999 * c]
        if found := [s for s in found if end["mix_actual"].get(s)]:
            out[phase] = found
    return out


def before_and_after(reading: Reading) -> Figure:
    """Source weights of the first and the last phase, paired bars by domain."""
    run = reading.run
    mixes = summary.mixtures(run)
    names = list(dict.fromkeys([run.phases[0], run.phases[-1]]))
    first, after = mixes[names[0]], mixes[names[-1]]
    actual = run.end["mix_actual"]
    colors = palette.source_colors(run.domains)
    left = max(width_of(s) for s in run.sources) + GUTTER
    most = max(max(mixes[n].values()) for n in names)
    x = Scale(0, most, left, WIDTH - 200)
    drift = {s: actual[s] - after[s] for s in run.sources}
    parts, top = [_legend(names, x), text(WIDTH, 14, "epochs at the end", "muted", "end")], 34.0
    for domain in palette.domain_order(run.domains):
        members = [s for s in run.domains if run.domains[s] == domain]
        parts.append(text(0, top + 20, domain, "panel"))
        said = " → ".join(words.share(sum(mixes[n][s] for s in members)) for n in names)
        parts.append(text(0, top + 36, said, "muted"))
        for source in members:
            parts.append(text(left - 10, top + 20, source, "name", "end", style=f"fill:{colors[source]}"))
            for row, name in enumerate(names):
                value, y = mixes[name][source], top + (3 + 14 * row if len(names) > 1 else 10)
                tip = f"{source}, {name}: {words.share(value)}"
                pale = 0.4 if name != names[-1] else 1.0
                edge = x(value)
                parts.append(rect(x(0), y, edge - x(0), 11, colors[source], tip, opacity=pale))
                if name == names[-1] and abs(drift[source]) >= 0.001:
                    at = x(min(actual[source], most))
                    parts.append(line(at, y - 3, at, y + 14, "mark"))
                    # The number stands clear of a stroke just behind the bar's end.
                    edge = max(edge, at)
                parts.append(text(edge + 6, y + 9.5, words.share(value), "tick"))
            passes = f"{run.end['epochs_by_source'][source]:.2f}"
            parts.append(text(WIDTH, top + 20, passes, "tick", "end"))
            top += 36
        top += 10
    parts.append(line(x(0), 34, x(0), top - 10, "axis"))
    body = picture(WIDTH, top - 4, parts, "Mixture per phase")
    if len(names) == 1:
        lead = (
            f"One phase, {names[0]}, has trained so far; these are its target shares of sequences. "
            "Influence, once it is measured, weighs the sources of the next:"
        )
        command = f"python tools/make_mix.py {run.root / 'config.yaml'} NEXT_PHASE.yaml mix.phase=NEXT_PHASE"
        return Figure("mixture", "Mixture", lead, body, command=command)
    note = f"Target shares of sequences in phases {names[0]} and {names[-1]}. "
    far = max(run.sources, key=lambda s: abs(drift[s]))
    if abs(drift[far]) >= 0.001:
        note += (
            f"Upright strokes: what {phase_name(names[-1])} drew, where that is not its target "
            f"(furthest: {far}, {words.share(actual[far])} instead of {words.share(after[far])})."
        )
    else:
        note += f"What {phase_name(names[-1])} drew is within 0.1 points of its target for every source."
    return Figure("mixture", "Mixture before and after", _change(first, after), body, note)


def _change(first: dict[str, float], after: dict[str, float]) -> str:
    down, up = summary.extremes({s: after[s] - first[s] for s in first})
    if round(after[up] - first[up], 4) <= 0:
        return "The last phase reads the same mixture as the first."
    return (
        f"{down} falls from {words.share(first[down])} to {words.share(after[down])} of the sequences; "
        f"{up} rises most, from {words.share(first[up])} to {words.share(after[up])}. Compare the two bars "
        "of each source, then the last column: what is read many times over teaches less each time."
    )


def _legend(names: Sequence[str], x: Scale) -> str:
    parts, at = [], x(0)
    for name in names:
        parts.append(rect(at, 5, 22, 10, INK, opacity=0.4 if name != names[-1] else 1.0))
        said = phase_name(name)
        parts.append(text(at + 28, 14, said, "muted"))
        at += 28 + width_of(said) + 24
    return "".join(parts)
