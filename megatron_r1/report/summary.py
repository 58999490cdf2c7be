"""Figures computed from a reading: what the report's sentences, tables and drawings say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from megatron_r1.config import MixConfig
from megatron_r1.mixture.masks import joint_scores
from megatron_r1.mixture.scores import in_units
from megatron_r1.mixture.weights import checkpoint_weights, scale_of
from megatron_r1.records import ScoreTable
from megatron_r1.report.load import Reading, Run

_PER_NODE = 8
"""GPUs of a node, for commands."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out NLL per token of each arm at the last step that every arm has measured."""

    tokens: int
    by_arm: dict[str, dict[str, float]]
    """Arm -> capability -> nats per token."""

    def difference(self, capability: str) -> float:
        """The run less its control; negative: the run is better."""
        run, control = self.by_arm.values()
        return run[capability] - control[capability]


def held_out(reading: Reading) -> HeldOut | None:
    """None where no arm was measured, or the arms never at the same step."""
    measured = [{line["tokens"]: line["probe_nll"] for line in run.probed} for _, run in reading.arms]
    common = set.intersection(*(set(m) for m in measured))
    if not common:
        return None
    tokens = max(common)
    return HeldOut(tokens, {name: m[tokens] for (name, _), m in zip(reading.arms, measured, strict=True)})


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
    total: float
    """The capabilities' weighted mean of `mean_C`."""
    kept: float
    """Share of examples whose joint score at the last checkpoint is positive (Eq. 6)."""


def influence(reading: Reading) -> list[SourceInfluence]:
    """Every scored source, the most helpful first. Checkpoints and capabilities weigh as in the mixture."""
    tables = [table for table in reading.scores if len(table.example_N)]
    if not tables:
        return []
    mix, alpha_CK, tables = weighing(reading, tables)
    weight_C, time_K = alpha_CK.sum(1), alpha_CK.sum(0)
    offset_CK, scale_CK = scale_of(tables, mix)
    out = []
    for table, joint_N in zip(tables, joint_scores(tables, mix), strict=True):
        score_NC = np.einsum("nck,k->nc", (table.score_NCK - offset_CK) / scale_CK, time_K)
        share_N = table.length_N / table.length_N.sum()
        mean_C = share_N @ score_NC
        error_C = np.sqrt((share_N**2) @ (score_NC - mean_C) ** 2)
        kept = float((joint_N > mix.keep_above).mean())
        total = float(mean_C @ weight_C)
        out.append(SourceInfluence(table.source, table.example_N, score_NC, mean_C, error_C, total, kept))
    return sorted(out, key=lambda s: -s.total)


def weighing(reading: Reading, tables: list[ScoreTable]) -> tuple[MixConfig, np.ndarray, list[ScoreTable]]:
    """How scores are weighed: mix, alpha of Eq. 4 [C, K], and the tables at the checkpoints it uses.

    As in the mixture that was made, where it fits these scores; else as the configuration says.
    """
    first, made = tables[0], reading.mix
    if made and made["capabilities"] == list(first.capabilities) and set(made["steps"]) <= set(first.steps):
        known = {f.name for f in fields(MixConfig)}
        mix = MixConfig(**{"phase": "", **{k: v for k, v in made.get("mix", {}).items() if k in known}})
        steps, alpha_CK = tuple(made["steps"]), np.array(made["alpha"])
    else:
        mix, steps = reading.run.config.mix or MixConfig(""), first.steps
        alpha_CK = checkpoint_weights(mix, first.capabilities, steps)
    columns = [first.steps.index(step) for step in steps]
    tables = [replace(t, steps=steps, score_NCK=t.score_NCK[:, :, columns]) for t in tables]
    found = {name: [s for s in of if s.step in steps] for name, of in reading.scored.items()}
    return mix, alpha_CK, [in_units(t, found[t.source], mix) for t in tables]


@dataclass(frozen=True)
class StageCost:
    label: str
    kind: Literal["train", "train control", "influence", "other"]
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
    runs = [("", reading.run)] + ([("control", reading.control)] if reading.control else [])
    for arm, run in runs:
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


def _kind(
    arm: str, stage: str, trained: list[str]
) -> Literal["train", "train control", "influence", "other"]:
    if stage in trained:
        return "train control" if arm else "train"
    return "influence" if stage.split()[0] == "influence" else "other"


def _label(arm: str, stage: str, lines: list[dict[str, Any]]) -> str:
    """A stage's name, how many stages it stands for, how often it ran, and whose it is."""
    names = {line["stage"] for line in lines}
    said = f"{stage} ({len(names)} stages)" if len(names) > 1 else stage
    said += f", {len(lines)} times" if len(lines) > len(names) else ""
    return f"{said} (control)" if arm and arm not in stage else said


def seconds_of(costs: list[StageCost], *kinds: str) -> float:
    """Wall seconds of the stages of these kinds."""
    return sum(c.seconds for c in costs if c.kind in kinds)


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
    start = (
        f"torchrun {where}--nproc-per-node {-(-count // nodes)} tools/{tool}.py {run.root / 'config.yaml'}"
    )
    return " ".join([start, *overrides])


def mixtures(run: Run) -> dict[str, dict[str, float]]:
    """Phase -> source -> target share of sequences."""
    return {phase: run.last_of(phase)["mix_target"] for phase in run.phases}


def skipped(run: Run) -> list[bool]:
    """Of every step whether its update was left out."""
    return [bool(line.get("skipped")) for line in run.metrics]


def fall_by_source(run: Run) -> dict[str, float]:
    """How far each source's loss fell: mean of its first tenth of steps less mean of its last tenth, nats."""
    out = {}
    for source in run.sources:
        values = [loss for _, loss in run.points("loss_by_source", source)]
        tenth = max(1, len(values) // 10)
        if len(values) >= 2:
            out[source] = float(np.mean(values[:tenth]) - np.mean(values[-tenth:]))
    return out


def extremes(values: Mapping[str, float]) -> tuple[str, str]:
    """Names of the smallest and the greatest value."""
    return min(values, key=lambda k: values[k]), max(values, key=lambda k: values[k])
