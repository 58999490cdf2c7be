"""Figure of the run's checkpoints: which there are, how large, why they stay, what was measured at them."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.report import summary, words
from megatron_r1.report.figure import INK, WIDTH, Figure, phase_marks, token_axes
from megatron_r1.report.load import Reading, Run
from megatron_r1.report.svg import Panel, Scale, line, picture, rect, text
from megatron_r1.report.table import Cell, Table
from megatron_r1.run.layout import RunDir
from megatron_r1.train.schedule import phase_spans, retained_steps

_LISTED = 12
"""Rows of the table."""
_LANE = 24.0
_LEFT = 190.0
"""Names of the lanes."""


@dataclass(frozen=True)
class Saved:
    path: Path
    step: int
    size: int
    """Bytes of its files."""


def figure(reading: Reading) -> Figure:
    """A lane of strokes for what holds of the checkpoints, and a table of the most telling."""
    run = reading.run
    complete, partial = found(run)
    command = summary.launch(run, "train")
    if not complete:
        lead = (
            f"No complete checkpoint lies in {RunDir(run.root).checkpoints}. One is saved every "
            f"{words.many(run.config.train.checkpoint_every, 'step')} and at the end of each phase:"
        )
        return Figure("checkpoints", "Checkpoints", f"{_said_of(partial)} {lead}".strip(), command=command)
    pinned = {saved.step: why for saved in complete if (why := pinned_as(run.config, saved.step))}
    scored = {one.step for of in reading.scored.values() for one in of}
    lanes = {
        "complete": [saved.step for saved in complete],
        "kept for good": list(pinned),
        "influence scored": [saved.step for saved in complete if saved.step in scored],
        "not complete": [saved.step for saved in partial],
    }
    body = _timeline(run, {name: steps for name, steps in lanes.items() if steps})
    table = _table(reading, complete, pinned, scored)
    keep = run.config.train.keep_last
    note = "Size: all files of all ranks. "
    if keep is None:
        note += "train.keep_last is not set: none is ever deleted."
    else:
        note += f"What is not kept for good stays while it is among the newest {keep:,}."
    note += _held_up(run)
    if len(complete) > _LISTED:
        note += " Listed: the newest, what ends a phase or was scored, and some between."
    return Figure("checkpoints", "Checkpoints", _lead(run, complete, partial), body, note, command, [table])


def _held_up(run: Run) -> str:
    """What saving cost the first rank, between the steps that are recorded."""
    saving = sum(line.get("saving_seconds", 0.0) for line in run.metrics)
    if not saving:
        return ""
    share = saving / (saving + sum(line["seconds"] for line in run.metrics))
    return (
        f" Between the steps, saving held the first rank up for {words.duration(saving)} in all, "
        f"{words.share(share)} of their time; the wait for a launch's last checkpoint is not in it."
    )


def found(run: Run) -> tuple[list[Saved], list[Saved]]:
    """The complete checkpoints in training order, and what is under way, was left behind, or lacks or has
    lost its description."""
    directory = RunDir(run.root).checkpoints
    whole = {ref.path for ref in checkpoint_files.found(directory)} - set(checkpoint_files.damaged(directory))
    complete: list[Saved] = []
    partial: list[Saved] = []
    for path in sorted([*directory.glob("step_*"), *directory.glob(".step_*")]):
        number = path.name.removeprefix(".").removeprefix("step_").split(".")[0]
        if number.isdigit():
            (complete if path in whole else partial).append(Saved(path, int(number), _size(path)))
    return sorted(complete, key=lambda saved: saved.step), partial


def _size(directory: Path) -> int:
    size = 0
    for path in directory.rglob("*"):
        # A run that trains may take a checkpoint away meanwhile.
        with suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def pinned_as(config: Config, step: int) -> str:
    """Why the checkpoint of a step is never deleted; empty where it is not kept for good."""
    ended = [span.name for span in phase_spans(config) if span.end == step]
    if ended:
        return f"end of {ended[0]}"
    if config.influence and step in config.influence.steps:
        return "influence.steps"
    if step in retained_steps(config):
        return "train.keep_spaced"
    every = config.train.keep_every
    return "train.keep_every" if every and step % every == 0 else ""


def _lead(run: Run, complete: list[Saved], partial: list[Saved]) -> str:
    newest = complete[-1]
    lead = (
        f"{words.many(len(complete), 'complete checkpoint')}, {words.size(sum(s.size for s in complete))} in "
        f"all; the newest is {newest.path}, after {words.count(newest.step * run.config.tokens_per_step())} "
        "tokens."
    )
    behind = run.end["step"] - newest.step
    if behind > 0:
        lead += f" The run came {words.many(behind, 'step')} further, which would be trained again."
    lead += f"{_said_of(partial)} Look for gaps between them, and at the size before more are kept."
    if newest.step >= phase_spans(run.config)[-1].end:
        return lead + " The recipe ends there; with one more phase in the configuration this goes on from it:"
    return lead + " This goes on from it:"


def _said_of(partial: list[Saved]) -> str:
    """What is not complete: what the next save takes away, and what somebody has to."""
    said = ""
    for hidden, why in (
        (True, "being written or deleted, or left so by a launch that was killed; the next save removes"),
        (False, "whose description is missing or damaged: a last one so stops a resume; remove"),
    ):
        names = [saved.path.name for saved in partial if saved.path.name.startswith(".") == hidden]
        shown = names if len(names) < 4 else [*names[:3], f"{len(names) - 3} more"]
        if names:
            said += f" Not complete: {words.both(shown)}, {why} {'it' if len(names) == 1 else 'them'}."
    return said


def _timeline(run: Run, lanes: dict[str, list[int]]) -> str:
    tokens = run.config.tokens_per_step()
    end = float(max(run.end["tokens"], tokens * max(step for steps in lanes.values() for step in steps)))
    top, bottom = 30.0, 30.0 + _LANE * len(lanes)
    panel = Panel(Scale(0.0, end, _LEFT, WIDTH - 20), Scale(0.0, 1.0, bottom, top))
    parts = [token_axes(panel, x_label="tokens", y_marks=[]), phase_marks(panel, run)]
    for row, (name, steps) in enumerate(lanes.items()):
        middle = top + _LANE * (row + 0.5)
        parts.append(text(0, middle + 4, name, "name"))
        parts.append(text(_LEFT - 20, middle + 4, f"{len(steps):,}", "tick", "end"))
        parts.append(line(_LEFT, middle, WIDTH - 20, middle))
        color = "rgb(var(--negative))" if name == "not complete" else INK
        for step in steps:
            tip = f"step {step:,}, {name}"
            parts.append(rect(panel.x(step * tokens) - 1.5, middle - 7, 3, 14, color, tip))
    return picture(WIDTH, bottom + 42, parts, "Checkpoints over tokens")


def _table(reading: Reading, complete: list[Saved], pinned: dict[int, str], scored: Collection[int]) -> Table:
    run = reading.run
    measured = {line["step"]: line["probe_nll"] for line in run.probed}
    capabilities = list(dict.fromkeys(c for nll in measured.values() for c in nll))
    head = ["step", "tokens", "phase", "size", *(f"held-out {c}" for c in capabilities), "influence"]
    rows = []
    for saved in _telling(run.config, complete, scored):
        nll = measured.get(saved.step, {})
        phase = next((s.name for s in phase_spans(run.config) if s.start < saved.step <= s.end), "–")
        rows.append(
            [
                Cell(f"{saved.step:,}"),
                Cell(words.count(saved.step * run.config.tokens_per_step())),
                Cell(phase),
                Cell(words.size(saved.size)),
                *(Cell(f"{nll[c]:.3f}" if c in nll else "–") for c in capabilities),
                Cell("scored" if saved.step in scored else "–"),
                Cell(pinned.get(saved.step, "–")),
            ]
        )
    return Table([*head, "kept for good"], rows)


def _telling(config: Config, complete: list[Saved], scored: Collection[int]) -> list[Saved]:
    """As many as are listed: the newest three, ends of phases, the scored, some between."""
    ends = {span.end for span in phase_spans(config)}
    order = [*complete[:-4:-1], *(s for s in complete if s.step in ends)]
    order += [s for s in reversed(complete) if s.step in scored]
    order += complete[:: -(-len(complete) // _LISTED)]
    chosen = list(dict.fromkeys(order))[:_LISTED]
    return sorted(chosen, key=lambda saved: saved.step)
