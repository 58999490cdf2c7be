"""A run directory in the real formats, without training anything: what the trainer and the scorer leave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_r1 import config_io
from megatron_r1.config import (
    Config,
    DataConfig,
    InfluenceConfig,
    MixConfig,
    ModelConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_r1.records import CAPABILITIES, ScoreTable
from megatron_r1.run import ledger
from tests.mixture import mixture_scores

SOURCES = {
    "python-stdlib": ("code", 5.2),
    "torch-source": ("code", 4.8),
    "sympy": ("math", 5.0),
    "mathlib-python": ("math", 5.1),
    "gcide": ("knowledge", 5.9),
    "world-factbook": ("knowledge", 5.4),
    "base64": ("none", 7.9),
}
"""Name -> domain, and the loss that it approaches."""
MIXED = {
    "python-stdlib": 0.25,
    "torch-source": 0.12,
    "sympy": 0.21,
    "mathlib-python": 0.08,
    "gcide": 0.22,
    "world-factbook": 0.12,
}
HELPS = {
    "code": (0.9, 0.1, 0.05),
    "math": (0.3, 0.7, 0.1),
    "knowledge": (0.1, 0.05, 0.8),
    "none": (-0.4, -0.5, -0.3),
}
"""Mean score by the source's domain, for code, math and knowledge."""
UNIFORM_STEPS, MIXED_STEPS = 100, 75
BATCH, LENGTH = 16, 256


def make_config(run: Path, phases: dict[str, PhaseConfig], sources: dict[str, str]) -> Config:
    probes = {c: f"probes/heldout_{c}" for c in CAPABILITIES}
    return Config(
        model=ModelConfig(4, 192, 640, 3, 1, 4096),
        data=DataConfig(
            {name: SourceConfig(f"data/{name}", domain=domain) for name, domain in sources.items()},
            seq_length=LENGTH,
            probes=probes,
        ),
        train=TrainConfig(str(run), BATCH, 8, precision="fp32", checkpoint_every=25, probe_every=25),
        phases=phases,
        influence=InfluenceConfig({c: f"probes/probe_{c}" for c in CAPABILITIES}),
        mix=MixConfig("influence"),
    )


def make_arm(root: Path, last: str, weights: dict[str, float] | str, first_step: int, gain: float) -> None:
    """Write config.yaml, metrics.jsonl and ledger.jsonl of one arm; its metrics begin after `first_step`."""
    root.mkdir(parents=True, exist_ok=True)
    phases = {
        "uniform": PhaseConfig(steps=UNIFORM_STEPS),
        last: PhaseConfig(weights=weights, steps=MIXED_STEPS),  # type: ignore[arg-type]
    }
    config = make_config(root, phases, {name: domain for name, (domain, _) in SOURCES.items()})
    (root / "config.yaml").write_text(config_io.dump(config))
    random = np.random.default_rng(len(last))
    drawn = dict.fromkeys(SOURCES, 0.0)
    lines = []
    for step in range(1, UNIFORM_STEPS + MIXED_STEPS + 1):
        phase = "uniform" if step <= UNIFORM_STEPS else last
        given = config.phase_weights(phase)
        target = {s: given.get(s, 0.0) / sum(given.values()) for s in SOURCES}
        for s in SOURCES:
            drawn[s] += target[s] * BATCH
        fall = np.exp(-step / 35)
        losses = {
            s: 8.4 * fall + low * (1 - fall) - 0.002 * step * (low < 7) + 0.08 * random.standard_normal()
            for s, (_, low) in SOURCES.items()
            if target[s]
        }
        line = {
            "step": step,
            "phase": phase,
            "samples": step * BATCH,
            "tokens": step * BATCH * LENGTH,
            "loss": sum(target[s] * loss for s, loss in losses.items()),
            "loss_by_source": losses,
            "tokens_by_source": {s: round(n) * LENGTH for s, n in drawn.items()},
            "epochs_by_source": {s: n / (300 + 400 * i) for i, (s, n) in enumerate(drawn.items())},
            "mix_target": target,
            "mix_actual": target,
            "learning_rate": 4e-3,
            "grad_norm": 1.0,
            "seconds": 0.4,
            "tokens_per_second": BATCH * LENGTH / 0.4,
        }
        if step % 25 == 0:
            better = gain * max(0, step - UNIFORM_STEPS) / MIXED_STEPS
            line["probe_nll"] = {
                c: 8.4 * fall + (5.1 + 0.3 * i) * (1 - fall) - 0.002 * step - better * (1 - 0.6 * i)
                for i, c in enumerate(CAPABILITIES)
            }
            line["rank_me"] = 10 + step / 10
            line["validation_nll"] = {s: 0.1 + loss for s, loss in losses.items()}
        if step > first_step:
            lines.append(json.dumps(line))
    (root / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if not first_step:
        ledger.append(root, "gather text", seconds=21.0)
        ledger.append(root, "train uniform", devices=2, tokens=UNIFORM_STEPS * BATCH * LENGTH, seconds=48.0)
        for step in (50, 75, 100):
            ledger.append(root, f"influence step {step}", devices=2, tokens=7 * 64 * LENGTH, seconds=11.0)
        ledger.append(root, "mix", seconds=1.2)
    ledger.append(root, f"train {last}", devices=2, tokens=MIXED_STEPS * BATCH * LENGTH, seconds=36.0)


def make_scores(examples: int = 64) -> list[ScoreTable]:
    """Scores of every source at three checkpoints; base64 harms, the others help their own domain most."""
    random = np.random.default_rng(0)
    tables = []
    for name, (domain, _) in SOURCES.items():
        mean_C = np.array(HELPS[domain]) * (1 + 0.2 * random.standard_normal(3))
        score_NCK = mean_C[None, :, None] + 0.35 * random.standard_normal((examples, 3, 3))
        tables.append(
            ScoreTable(
                name,
                CAPABILITIES,
                (50, 75, 100),
                np.arange(examples),
                np.full(examples, LENGTH),
                score_NCK.astype(np.float32),
            )
        )
    return tables


def write_scores(root: Path, tables: list[ScoreTable]) -> None:
    """RUN/influence as tools/compute_influence.py leaves it."""
    for position, table in enumerate(tables):
        for k, step in enumerate(table.steps):
            mixture_scores.write_scores(
                root,
                step,
                table.source,
                table.score_NCK[:, :, k],
                table.example_N,
                table.length_N,
                position=position,
                capabilities=list(table.capabilities),
            )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two phases, without control and scores."""
    root = tmp_path / "runs" / "demo"
    make_arm(root, "influence", MIXED, 0, 0.2)
    return root


@pytest.fixture
def pair(run: Path) -> Path:
    """The same run with its control beside it."""
    make_arm(run / "control", "control", "uniform", UNIFORM_STEPS, 0.0)
    return run


@pytest.fixture
def whole(pair: Path) -> Path:
    """The pair with influence scores of every source."""
    write_scores(pair, make_scores())
    return pair
