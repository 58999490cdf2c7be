"""Numbers of a report, computed from a reading. No drawing."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1 import checkpoint_files
from megatron_r1.config import Config, MixConfig
from megatron_r1.influence.keep_masks import joint_scores
from megatron_r1.influence.units import in_units
from megatron_r1.influence.weights import checkpoint_weights, scale_of
from megatron_r1.records import ScoreTable
from megatron_r1.report.load import Reading, Run
from megatron_r1.run_dir import RunDir
from megatron_r1.train.schedule import kept_steps, phase_spans

_PER_NODE = 8
"""GPUs of a node, for commands."""
PAPER = {
    "representative and probing sets": 200.0,
    "influence scores and mixture": 5_100.0 + 1_100.0,
    "leave-one-out and control runs": 50.0 * 8,
    "training": 28_000.0 + 10_000.0 + 600.0,
}
"""Appendix D.3, GPU hours of the 950M model."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out NLL per token of each arm at the last step that every arm has measured."""

    tokens: float
    by_arm: dict[str, dict[str, float]]
    """Arm -> capability -> nats per token."""

    def difference(self, capability: str) -> float:
        """The run less its control; negative: the run is better."""
        run, control = self.by_arm.values()
        return run[capability] - control[capability]


def held_out(reading: Reading) -> HeldOut | None:
    """None where no arm was measured, or the arms never at the same step."""
    curves = {
        name: {c: dict(zip(*arm.points(f"probe_nll/{c}"), strict=True)) for c in arm.measured("probe_nll")}
        for name, arm in reading.arms.items()
    }
    common = set.intersection(*(set(curve) for of in curves.values() for curve in of.values() or [{}]))
    if not common or not all(curves.values()):
        return None
    tokens = max(common)
    return HeldOut(tokens, {name: {c: of[c][tokens] for c in of} for name, of in curves.items()})


def fork(reading: Reading) -> float | None:
    """Tokens at which the control leaves the run; None where there is none or it starts from nothing."""
    if reading.control is None:
        return None
    tokens = reading.run.columns["tokens"]
    before = tokens[tokens < reading.control.first["tokens"]]
    return float(before[-1]) if len(before) else None


@dataclass(frozen=True)
class SourceInfluence:
    """Scores of one source, summed over checkpoints (Eq. 4), scaled as the mixture scales them."""

    source: str
    example_N: np.ndarray
    """Numbers of its windows or documents."""
    score_NC: np.ndarray
    mean_C: np.ndarray
    """Token-weighted mean score per capability: rho of Eq. 5, as tools/make_mix.py prints it."""
    error_C: np.ndarray
    """Standard error of that mean."""
    joint: float
    """The capabilities' weighted mean of `mean_C`."""
    helping: float
    """Share of examples that help: joint score at the last checkpoint above `mix.keep_above` (Eq. 6)."""


@dataclass(frozen=True)
class Scores:
    capabilities: tuple[str, ...]
    sources: list[SourceInfluence]
    """By joint score, the highest first."""
    tables: list[ScoreTable]
    """At the checkpoints that count."""
    unit: str
    """What was scored, with which curvature, in which unit. A sentence or two."""


def scores(reading: Reading) -> Scores | None:
    """None where no source has any. Checkpoints and capabilities weigh as in the mixture."""
    mix, alpha_CK, tables = _weighing(reading)
    if not tables:
        return None
    weight_C, time_K = alpha_CK.sum(1), alpha_CK.sum(0)
    offset_CK, scale_CK = scale_of(tables, mix)
    found = []
    for table, joint_N in zip(tables, joint_scores(tables, mix), strict=True):
        score_NC = np.einsum("nck,k->nc", (table.score_NCK - offset_CK) / scale_CK, time_K)
        share_N = table.length_N / table.length_N.sum()
        mean_C = share_N @ score_NC
        error_C = np.sqrt((share_N**2) @ (score_NC - mean_C) ** 2)
        helping = float((joint_N > mix.keep_above).mean())
        joint = float(mean_C @ weight_C)
        found.append(SourceInfluence(table.source, table.example_N, score_NC, mean_C, error_C, joint, helping))
    found.sort(key=lambda s: -s.joint)
    return Scores(tables[0].capabilities, found, tables, _unit(reading, mix, tables[0]))


def _weighing(reading: Reading) -> tuple[MixConfig, np.ndarray, list[ScoreTable]]:
    """How scores are weighed: mix, alpha of Eq. 4 [C, K], and the tables at the checkpoints it uses.

    As in the mixture that was made, where it fits these scores; else as the configuration says.
    """
    tables, made = [t for t in reading.scores if len(t.example_N)], reading.mix
    mix = reading.run.config.mix or MixConfig("")
    if not tables:
        return mix, np.empty((0, 0)), []
    capabilities, steps = tables[0].capabilities, tables[0].steps
    if made and made["capabilities"] == list(capabilities) and set(made["steps"]) <= set(steps):
        known = {f.name for f in fields(MixConfig)}
        mix = MixConfig(**{"phase": "", **{k: v for k, v in made.get("mix", {}).items() if k in known}})
        steps, alpha_CK = tuple(made["steps"]), np.array(made["alpha"])
    else:
        alpha_CK = checkpoint_weights(mix, capabilities, steps)
    columns = [tables[0].steps.index(step) for step in steps]
    tables = [replace(t, steps=steps, score_NCK=t.score_NCK[:, :, columns]) for t in tables]
    found = {name: [s for s in of if s.step in steps] for name, of in reading.scored.items()}
    return mix, alpha_CK, [in_units(t, found[t.source], mix) for t in tables]


def _unit(reading: Reading, mix: MixConfig, table: ScoreTable) -> str:
    how = reading.scored[table.source][-1].manifest.get("influence", {})
    unit = {
        "raw": "nats per token by which the capability's loss falls, for a step of size 1 on the example",
        "zscore": "standard deviation of the capability's scores over the tokens of all sources",
        "cosine": "cosine between the example's gradient and the capability's direction",
    }[mix.scale]
    steps = ", ".join(f"{step:,}" for step in table.steps)
    return (
        f"An example is a {how.get('unit', 'window')}; it was scored at step {steps} with curvature "
        f"{how.get('curvature', 'identity')}. Unit of a score: {unit}."
    )


def agreement(scores: Scores) -> list[tuple[int, int, list[float]]]:
    """Spearman's rank correlation of scores between checkpoints: of each with the next, of the first with
    the last. (step, step, correlation of the examples by capability, then of the sources).
    """
    from scipy.stats import spearmanr

    steps, tables = scores.tables[0].steps, scores.tables
    score_NCK = np.concatenate([t.score_NCK for t in tables])
    mean_GCK = np.stack([np.einsum("n,nck->ck", t.length_N / t.length_N.sum(), t.score_NCK) for t in tables])
    pairs = [(k, k + 1) for k in range(len(steps) - 1)] + ([(0, len(steps) - 1)] if len(steps) > 2 else [])
    rows = []
    for a, b in pairs:
        columns = [(of[:, c, a], of[:, c, b]) for of in (score_NCK, mean_GCK) for c in range(of.shape[1])]
        # Of equal values there are no ranks.
        ranks = [float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else np.nan for x, y in columns]
        rows.append((steps[a], steps[b], ranks))
    return rows


def drawn(run: Run, bins: int = 160) -> list[dict[str, Any]]:
    """Share of each source in the tokens of consecutive stretches of steps, none over a phase's begin.

    {phase, begin, end: tokens, share: {source: share}}. Counts start with the run's first sample, so that a
    stretch's own are a difference. A run that forks off another has no count before its first step: there
    the phase's share so far stands in.
    """
    tokens = run.columns["tokens"]
    count_ST = np.stack([run.columns[f"tokens_by_source/{s}"] for s in run.domains])
    out = []
    for phase, begin, end in run.spans:
        first, last = np.searchsorted(tokens, (begin, end), side="right")
        ends = np.unique(np.linspace(first, last, max(1, round(bins * (last - first) / len(tokens))) + 1, dtype=int))
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            before_S = count_ST[:, a - 1] if a else np.zeros(len(count_ST))
            share_S = count_ST[:, b - 1] - before_S
            if not a and run.first["step"] > 1:
                share_S = np.array([run.first["mix_actual"].get(s, 0.0) for s in run.domains])
            share_S = share_S / max(share_S.sum(), 1e-12)
            left = float(tokens[a - 1]) if a else begin
            shares = dict(zip(run.domains, share_S.tolist(), strict=True))
            out.append({"phase": phase, "begin": left, "end": float(tokens[b - 1]), "share": shares})
    return out


def capped(run: Run, phase: str) -> list[str]:
    """Sources that a phase drew until they had been read as often as `max_epochs` allows."""
    cap = run.config.phases[phase].max_epochs if phase in run.config.phases else None
    caps = cap if isinstance(cap, dict) else dict.fromkeys(run.domains, cap)
    end = run.last[phase]
    # Epochs end on a whole window, which may lie a little below the cap.
    found = [s for s, c in caps.items() if c and end["epochs_by_source"].get(s, 0.0) >= 0.999 * c]
    return [s for s in found if end["mix_actual"].get(s)]


@dataclass(frozen=True)
class StageCost:
    label: str
    kind: str
    """train, train control, influence or other."""
    seconds: float
    tokens: int
    devices: int
    device_hours: float

    @property
    def rate(self) -> float | None:
        """Tokens per second."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def stage_costs(reading: Reading) -> list[StageCost]:
    """Every stage of the run and then of the control, in the order in which they first finished.

    Datasets preprocessed and checkpoints scored are many stages of one kind: three or more become one.
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    trained: dict[str, list[str]] = {}
    for arm, run in (("", reading.run), ("control", reading.control)):
        if run is None:
            continue
        trained[arm] = [f"train {phase}" for phase in run.config.phases]
        kinds = [line["stage"].split()[0] for line in run.stages]
        for line, kind in zip(run.stages, kinds, strict=True):
            many = kind in ("preprocess", "influence") and kinds.count(kind) > 2
            rows.setdefault((arm, kind if many else line["stage"]), []).append(line)
    return [
        StageCost(
            _label(arm, stage, lines),
            _kind(arm, stage, trained[arm]),
            sum(line["seconds"] for line in lines),
            sum(line["tokens"] for line in lines),
            max(line["devices"] for line in lines),
            sum(line["device_hours"] for line in lines),
        )
        for (arm, stage), lines in rows.items()
    ]


def _kind(arm: str, stage: str, trained: list[str]) -> str:
    if stage in trained:
        return "train control" if arm else "train"
    return "influence" if stage.split()[0] == "influence" else "other"


def _label(arm: str, stage: str, lines: list[dict[str, Any]]) -> str:
    """A stage's name, how many stages it stands for, how often it ran, and whose it is."""
    names = {line["stage"] for line in lines}
    label = f"{stage} ({len(names)} stages)" if len(names) > 1 else stage
    label += f", {len(lines)} times" if len(lines) > len(names) else ""
    return f"{label} (control)" if arm and arm not in stage else label


def overhead(costs: list[StageCost]) -> dict[str, float] | None:
    """Device-hours by row of the paper's table of appendix D.3; None before anything was trained and scored."""
    hours = dict.fromkeys(PAPER, 0.0)
    for cost in costs:
        if cost.kind == "train control":
            row = "leave-one-out and control runs"
        elif cost.kind == "influence" or cost.label.split()[0] in ("influence", "mix", "query"):
            row = "influence scores and mixture"
        elif cost.label.startswith("set probes aside"):
            row = "representative and probing sets"
        elif cost.kind == "train":
            row = "training"
        else:
            continue
        hours[row] += cost.device_hours
    return hours if hours["training"] and hours["influence scores and mixture"] else None


def ranks(run: Run) -> int | None:
    """Devices of the last training stage."""
    trained = [f"train {phase}" for phase in run.config.phases]
    devices = [line["devices"] for line in run.stages if line["stage"] in trained]
    return devices[-1] if devices else None


def launch(run: Run, tool: str, *overrides: str) -> str:
    """The command that starts a tool with the run's configuration, on as many ranks as have trained it."""
    count = ranks(run) or 2
    nodes = -(-count // _PER_NODE)
    where = f"--nnodes {nodes} " if nodes > 1 else ""
    start = f"torchrun {where}--nproc-per-node {-(-count // nodes)} tools/{tool}.py {RunDir(run.root).config}"
    return " ".join([start, *overrides])


def control_command(run: Run) -> str:
    """Trains the control of a run: its last phase again on the uniform blend, from the same checkpoint."""
    start = []
    if len(run.phases) > 1:
        step = run.last[run.phases[-2]]["step"]
        start = [f"train.init_from={checkpoint_files.step_path(RunDir(run.root).checkpoints, step)}"]
    weights = f"phases.{run.phases[-1]}.weights=uniform"
    return launch(run, "train", f"train.run={run.root / 'control'}", *start, weights)


@dataclass(frozen=True)
class Saved:
    """A checkpoint's directory."""

    path: Path
    step: int
    size: int
    """Bytes of its files."""
    pinned: str
    """Why it is never deleted; empty where it is not kept for good."""
    scored: bool


def checkpoints(reading: Reading) -> tuple[list[Saved], list[Saved]]:
    """The complete checkpoints in training order, and those under way, left behind, or without a readable
    description."""
    config, directory = reading.run.config, RunDir(reading.run.root).checkpoints
    whole = {ref.path for ref in checkpoint_files.found(directory)} - set(checkpoint_files.damaged(directory))
    scored = {one.step for of in reading.scored.values() for one in of}
    complete: list[Saved] = []
    partial: list[Saved] = []
    for path in sorted([*directory.glob("step_*"), *directory.glob(".step_*")]):
        number = path.name.removeprefix(".").removeprefix("step_").split(".")[0]
        if number.isdigit():
            step = int(number)
            saved = Saved(path, step, _size(path), pinned_as(config, step), step in scored)
            (complete if path in whole else partial).append(saved)
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
    if step in kept_steps(config):
        return "train.keep_spaced"
    every = config.train.keep_every
    return "train.keep_every" if every and step % every == 0 else ""


def telling(config: Config, complete: list[Saved], most: int = 12) -> list[Saved]:
    """As many checkpoints as a table lists: the newest three, ends of phases, the scored, some between."""
    ends = {span.end for span in phase_spans(config)}
    order = [*complete[:-4:-1], *(s for s in complete if s.step in ends)]
    order += [s for s in reversed(complete) if s.scored]
    order += complete[:: -(-len(complete) // most) or 1]
    return sorted(list(dict.fromkeys(order))[:most], key=lambda saved: saved.step)
