"""Figures computed from a reading: what the report's sentences, tables and drawings say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_r1.records import ScoreTable
from megatron_r1.report.load import Reading, Run


@dataclass(frozen=True)
class HeldOut:
    """Held-out NLL per token of each arm at the last step that every arm has measured."""

    tokens: int
    by_arm: dict[str, dict[str, float]]
    """Arm -> capability -> nats per token."""

    def difference(self, capability: str) -> float | None:
        """The run less its control; negative: the run is better."""
        if len(self.by_arm) < 2:
            return None
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
    """Scores of one source, summed over checkpoints (Eq. 4)."""

    source: str
    score_NC: np.ndarray
    mean_C: np.ndarray
    """Token-weighted mean score per capability, rho of Eq. 5 before capabilities are summed."""
    error_C: np.ndarray
    """Standard error of that mean."""
    total: float
    """Sum of `mean_C` with the capabilities' weights, scaled to 1."""
    kept: float
    """Share of examples whose weighted sum of scores is positive (Eq. 6)."""


def influence(reading: Reading) -> list[SourceInfluence]:
    """Every scored source, the most helpful first."""
    mix = reading.run.config.mix
    by_step = mix is None or mix.checkpoint_weight == "step"
    given = mix.capability_weight if mix else {}
    out = []
    for table in reading.scores:
        if len(table.example_N) == 0:
            continue
        score_NC = _over_checkpoints(table, by_step)
        weight_C = np.array([given.get(c, 0.0) if given else 1.0 for c in table.capabilities])
        weight_C = weight_C / max(weight_C.sum(), 1e-30)
        share_N = table.length_N / table.length_N.sum()
        mean_C = share_N @ score_NC
        error_C = np.sqrt((share_N**2) @ (score_NC - mean_C) ** 2)
        total_N = score_NC @ weight_C
        out.append(
            SourceInfluence(
                table.source, score_NC, mean_C, error_C, float(share_N @ total_N), float((total_N > 0).mean())
            )
        )
    return sorted(out, key=lambda s: -s.total)


def _over_checkpoints(table: ScoreTable, by_step: bool) -> np.ndarray:
    """[N, C]: checkpoints summed with weights that add up to 1, proportional to the step or equal."""
    steps = np.asarray(table.steps, dtype=np.float64)
    alpha_K = steps / steps.sum() if by_step and steps.sum() > 0 else np.full(len(steps), 1 / len(steps))
    return table.score_NCK.astype(np.float64) @ alpha_K


@dataclass(frozen=True)
class StageCost:
    arm: str
    stage: str
    times: int
    """Ledger lines of this stage: more than one where it was interrupted or continued."""
    seconds: float
    tokens: int
    devices: int

    @property
    def rate(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


def stage_costs(reading: Reading) -> list[StageCost]:
    """Every stage of the run and then of the control, in the order in which they first finished."""
    rows: dict[tuple[str, str], StageCost] = {}
    runs = [("run", reading.run)] + ([("control", reading.control)] if reading.control else [])
    for arm, run in runs:
        for line in run.stages:
            key = (arm, line["stage"])
            old = rows.get(key, StageCost(*key, 0, 0.0, 0, 0))
            rows[key] = StageCost(
                *key,
                old.times + 1,
                old.seconds + line["seconds"],
                old.tokens + line["tokens"],
                max(old.devices, line["devices"]),
            )
    return list(rows.values())


def seconds_of(costs: list[StageCost], word: str) -> float:
    """Wall seconds of the stages named after `word`."""
    return sum(c.seconds for c in costs if word in c.stage.lower())


def ranks(run: Run) -> int | None:
    """Devices of the last training stage."""
    trained = [line["devices"] for line in run.stages if line["stage"].startswith("train")]
    return trained[-1] if trained else None


def mixtures(run: Run) -> dict[str, dict[str, float]]:
    """Phase -> source -> target share of sequences."""
    return {phase: run.last_of(phase)["mix_target"] for phase in run.phases}


def fall_by_source(run: Run) -> dict[str, float]:
    """How far each source's loss fell: mean of its first tenth of steps less mean of its last tenth, nats."""
    out = {}
    for source in run.sources:
        losses = source_losses(run, source)
        tenth = max(1, len(losses) // 10)
        if len(losses) >= 2:
            values = [loss for _, loss in losses]
            out[source] = float(np.mean(values[:tenth]) - np.mean(values[-tenth:]))
    return out


def source_losses(run: Run, source: str) -> list[tuple[int, float]]:
    """(tokens, loss) of the steps that drew from a source."""
    found = ((line["tokens"], line["loss_by_source"].get(source)) for line in run.metrics)
    return [(tokens, loss) for tokens, loss in found if loss is not None and math.isfinite(loss)]


def extremes(values: Mapping[str, float]) -> tuple[str, str]:
    """Names of the smallest and the greatest value."""
    return min(values, key=lambda k: values[k]), max(values, key=lambda k: values[k])
