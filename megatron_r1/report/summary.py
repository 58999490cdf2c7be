"""Numbers of a report, computed from a reading. No drawing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config, MixConfig
from megatron_r1.launch import paper
from megatron_r1.mixture.masks import joint_scores
from megatron_r1.mixture.scores import in_units
from megatron_r1.mixture.weights import checkpoint_weights, scale_of
from megatron_r1.records import ScoreTable
from megatron_r1.report.load import Points, Reading, Run, mix_settings
from megatron_r1.run.layout import RunDir
from megatron_r1.train.schedule import phase_spans, retention

_PER_NODE = 8
"""GPUs of a node, for commands."""
PAPER: dict[str, float] = paper.PAPER["spent"]
"""Appendix D.3, GPU hours of the 950M model."""


def held_out(reading: Reading) -> tuple[float, dict[str, dict[str, float]]] | None:
    """(tokens, {arm: {capability: held-out NLL per token}}) of the last step that every arm has measured;
    None where no arm was measured, or the arms never at the same step."""
    curves = {
        arm: {c: dict(zip(*run.points(f"probe_nll/{c}"), strict=True)) for c in run.measured("probe_nll")}
        for arm, run in reading.arms.items()
    }
    if not all(curves.values()):
        return None
    common = set.intersection(*(set(curve) for of in curves.values() for curve in of.values()))
    last = max(common, default=None)
    return None if last is None else (last, {arm: {c: of[c][last] for c in of} for arm, of in curves.items()})


def stretches(run: Run, tokens: np.ndarray, most: int) -> np.ndarray:
    """Bounds [K + 1] of about `most` even stretches of rows, three steps or more each, none over a phase's
    begin. `tokens`: of the rows."""
    count, bounds = min(most, len(tokens) // 3), [0]
    for _, begin, end in run.spans:
        a, b = np.searchsorted(tokens, (begin, end), side="right")
        pieces = max(1, round(count * (b - a) / max(1, len(tokens))))
        bounds += np.linspace(a, b, 1 + pieces, dtype=int).tolist()
    return np.unique([*bounds, len(tokens)])


def calm(run: Run, points: Points, most: int = 100) -> Points:
    """Means of stretches, at their middles, and the last at its end: a new mixture moves the loss at once,
    which must stay visible."""
    tokens, values = points
    bounds = stretches(run, tokens, most)
    middles = (tokens[bounds[:-1]] + tokens[bounds[1:] - 1]) / 2
    middles[-1] = tokens[-1]
    return middles, np.add.reduceat(values, bounds[:-1]) / np.diff(bounds)


def thin(points: Points, most: int = 300) -> Points:
    """At most about `most` points that keep the outline: both ends, lowest and highest of each stretch."""
    tokens, values = points
    if len(values) <= most:
        return points
    keep = {0, len(values) - 1}
    for a, b in itertools.pairwise(np.linspace(0, len(values), most // 2 + 1, dtype=int).tolist()):
        keep |= {a + int(values[a:b].argmin()), a + int(values[a:b].argmax())}
    return tokens[sorted(keep)], values[sorted(keep)]


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
    influences = []
    for table, joint_N in zip(tables, joint_scores(tables, mix), strict=True):
        score_NC = np.einsum("nck,k->nc", (table.score_NCK - offset_CK) / scale_CK, time_K)
        share_N = table.length_N / table.length_N.sum()
        mean_C = share_N @ score_NC
        error_C = np.sqrt((share_N**2) @ (score_NC - mean_C) ** 2)
        sums = float(mean_C @ weight_C), float((joint_N > mix.keep_above).mean())
        influences.append(SourceInfluence(table.source, table.example_N, score_NC, mean_C, error_C, *sums))
    if not all(np.isfinite([*s.mean_C, *s.error_C, s.joint]).all() for s in influences):
        way_out = "mend the weights of mix in config.yaml, or move mix.json away"
        raise ValueError(f"{reading.run.root}: its scores, as mix weighs them, are no numbers; {way_out}")
    influences.sort(key=lambda s: -s.joint)
    return Scores(tables[0].capabilities, influences, tables, _unit(reading, mix, tables[0]))


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
        mix, steps, alpha_CK = mix_settings(made), tuple(made["steps"]), np.array(made["alpha"])
    else:
        alpha_CK = checkpoint_weights(mix, capabilities, steps)
    columns = [tables[0].steps.index(step) for step in steps]
    tables = [replace(t, steps=steps, score_NCK=t.score_NCK[:, :, columns]) for t in tables]
    counted = {name: [s for s in of if s.step in steps] for name, of in reading.scored.items()}
    return mix, alpha_CK, [in_units(t, counted[t.source], mix) for t in tables]


def _unit(reading: Reading, mix: MixConfig, table: ScoreTable) -> str:
    how = reading.scored[table.source][-1].manifest.get("influence", {})
    unit = {
        "raw": "nats per token by which the capability's loss falls, for a step of size 1 on the example",
        "zscore": "standard deviation of the capability's scores over the tokens of all sources",
        "cosine": "cosine between the example's gradient and the capability's direction",
    }[mix.scale]
    steps = ", ".join(f"{step:,}" for step in table.steps)
    scored = f"it was scored at step {steps} with curvature {how.get('curvature', 'identity')}"
    return f"An example is a {how.get('unit', 'window')}; {scored}. Unit of a score: {unit}."


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Rank correlation; NaN where either side is all one value."""
    # Two seconds that a page without scores need not spend.
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else float("nan")


def agreement(scores: Scores) -> list[tuple[int, int, list[float]]]:
    """Rank correlation of scores between checkpoints: of each with the next, of the first with the last.

    (step, step, of the examples by capability and then of the sources by capability).
    """
    steps, tables = scores.tables[0].steps, scores.tables
    score_NCK = np.concatenate([t.score_NCK for t in tables])
    mean_GCK = np.stack([np.einsum("n,nck->ck", t.length_N / t.length_N.sum(), t.score_NCK) for t in tables])
    pairs = list(itertools.pairwise(range(len(steps)))) + ([(0, len(steps) - 1)] if len(steps) > 2 else [])
    kinds = [(of, c) for of in (score_NCK, mean_GCK) for c in range(len(scores.capabilities))]
    return [(steps[a], steps[b], [spearman(of[:, c, a], of[:, c, b]) for of, c in kinds]) for a, b in pairs]


def drawn(run: Run, most: int = 100) -> list[tuple[str, float, float, dict[str, float]]]:
    """(phase, begin and end in tokens, share of each source in the tokens drawn) of stretches of steps.

    Counts start with the run's first sample, so that a stretch's own are a difference. A run that forks off
    another has no count before its first step: there the phase's share so far stands in.
    """
    tokens, out = run.columns["tokens"], []
    none = np.zeros(len(tokens))
    of_each = [run.columns.get(f"tokens_by_source/{s}", none) for s in run.domains]
    count_ST = np.array([np.insert(counts, 0, 0.0) for counts in of_each])
    count_ST = np.where(np.abs(count_ST) < 1e100, count_ST, 0.0)
    for a, b in itertools.pairwise(stretches(run, tokens, most).tolist()):
        phase = next((name for name, _, end in run.spans if tokens[b - 1] <= end), run.phases[-1])
        share_S = np.maximum(count_ST[:, b] - count_ST[:, a], 0.0)
        if not a and run.first["step"] > 1:
            share_S = np.array([run.first["mix_actual"].get(s, 0.0) for s in run.domains])
        share = dict(zip(run.domains, (share_S / max(share_S.sum(), 1e-12)).tolist(), strict=True))
        out.append((phase, float(tokens[a - 1]) if a else run.spans[0][1], float(tokens[b - 1]), share))
    return out


def capped(run: Run, phase: str) -> list[str]:
    """Sources that a phase drew until they had been read as often as `max_epochs` allows."""
    cap = run.config.phases[phase].max_epochs
    caps = cap if isinstance(cap, dict) else dict.fromkeys(run.domains, cap)
    passes, share = (run.last[phase][name] for name in ("epochs_by_source", "mix_actual"))
    # Epochs end on a whole window, which may lie a little below the cap.
    return [s for s, c in caps.items() if c and passes.get(s, 0.0) >= 0.999 * c and share.get(s)]


@dataclass(frozen=True)
class StageCost:
    label: str
    kind: str
    """train, train control, influence or other."""
    seconds: float
    tokens: int
    devices: int
    device_hours: float


def stage_costs(reading: Reading) -> list[StageCost]:
    """Every stage of the run and then of the control, in the order in which they first finished.

    Datasets preprocessed and checkpoints scored are many stages of one kind: three or more become one.
    """
    out = []
    for arm, run in [("", reading.run)] + ([("control", reading.control)] if reading.control else []):
        rows: dict[str, list[dict[str, Any]]] = {}
        kinds = [line["stage"].split()[0] for line in run.stages]
        for line, kind in zip(run.stages, kinds, strict=True):
            many = kind in ("preprocess", "influence") and kinds.count(kind) > 2
            rows.setdefault(kind if many else line["stage"], []).append(line)
        for stage, lines in rows.items():
            total = {key: sum(line[key] for line in lines) for key in ("seconds", "tokens", "device_hours")}
            kind = "influence" if stage.split()[0] == "influence" else "other"
            if stage in (f"train {phase}" for phase in run.config.phases):
                kind = f"train {arm}".strip()
            names = {line["stage"] for line in lines}
            label = f"{stage} ({len(names)} stages)" if len(names) > 1 else stage
            label += f", {len(lines)} times" if len(lines) > len(names) else ""
            label += f" ({arm})" if arm not in stage else ""
            out.append(StageCost(label, kind, devices=max(line["devices"] for line in lines), **total))
    return out


def overhead(costs: list[StageCost]) -> dict[str, float] | None:
    """Device-hours by row of `PAPER`; None before anything was trained and scored."""
    probes, scoring, controls, training = PAPER
    hours = dict.fromkeys(PAPER, 0.0)
    for cost in costs:
        if cost.kind == "influence" or cost.label.split()[0] in ("mix", "query"):
            hours[scoring] += cost.device_hours
        elif cost.kind != "other":
            hours[training if cost.kind == "train" else controls] += cost.device_hours
        elif cost.label.startswith(("set probes aside", "curate probes")):
            hours[probes] += cost.device_hours
    return hours if hours[training] and hours[scoring] else None


def ranks(run: Run) -> int | None:
    """Devices of the last training stage."""
    trained = [f"train {phase}" for phase in run.config.phases]
    return next((line["devices"] for line in reversed(run.stages) if line["stage"] in trained), None)


def launch(run: Run, tool: str, *overrides: str) -> str:
    """The command that starts a tool with the run's configuration, on as many ranks as have trained it."""
    count = ranks(run) or 2
    # The fewest nodes that share the ranks evenly.
    nodes = next(n for n in range(-(-count // _PER_NODE), count + 1) if count % n == 0)
    where = f"--nnodes {nodes} " if nodes > 1 else ""
    start = f"torchrun {where}--nproc-per-node {count // nodes} tools/{tool}.py {RunDir(run.root).config}"
    return " ".join([start, *overrides])


def control_command(run: Run) -> str:
    """Trains the control of a run: its last phase again on the uniform blend, from the same checkpoint."""
    start = []
    if len(run.phases) > 1:
        step = run.last[run.phases[-2]]["step"]
        start = [f"train.init_from={checkpoint_files.step_path(RunDir(run.root).checkpoints, step)}"]
        # The run's own beginning, which is not the control's.
        start += ["train.init_weights=null"] if run.config.train.init_weights else []
        start += ["train.expect=null"] if run.config.train.expect else []
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
    complete: bool
    """Neither under way, nor left behind, nor without a readable description."""


def checkpoints(reading: Reading) -> list[Saved]:
    """In training order; first those with a hidden name, which are under way or left behind."""
    config, directory = reading.run.config, RunDir(reading.run.root).checkpoints
    whole = {ref.path for ref in checkpoint_files.complete_checkpoints(directory)}
    whole.difference_update(checkpoint_files.damaged(directory))
    scored = {one.step for of in reading.scored.values() for one in of}
    out = []
    for path in sorted([*directory.glob("step_*"), *directory.glob(".step_*")]):
        hidden, _, number = path.name.partition("step_")
        number = number.split(".")[0] if hidden else number
        # Copies of other names are left alone.
        if number.isdecimal() and f"{int(number):08d}" == number:
            pinned, seen = pinned_as(config, int(number)), int(number) in scored
            out.append(Saved(path, int(number), _size(path), pinned, seen, path in whole))
    return out


def _size(directory: Path) -> int:
    """Bytes of a checkpoint's files. What lies below folders or behind links is not of it."""
    # A run that trains may take a checkpoint away meanwhile.
    with suppress(OSError):
        return sum(path.lstat().st_size for path in directory.iterdir())
    return 0


def pinned_as(config: Config, step: int) -> str:
    """Why the checkpoint of a step is never deleted; empty where it is not kept for good."""
    ended, every = [span.name for span in phase_spans(config) if span.end == step], config.train.keep_every
    if ended:
        return f"end of {ended[0]}"
    if config.influence and step in config.influence.steps:
        return "influence.steps"
    if step in retention(config).steps:
        return "train.keep_spaced"
    return "train.keep_every" if every and step % every == 0 else ""
