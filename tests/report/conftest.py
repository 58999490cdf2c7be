"""A run directory in the real formats, without training anything: what the trainer and the scorer leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_r1 import config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.records import CAPABILITIES, ScoreTable, TrainState
from megatron_r1.report import load, summary
from megatron_r1.run import ledger
from tests.mixture import mixture_scores

SOURCES: dict[str, tuple[str, float]] = (
    yaml.safe_load("""{python-stdlib: [code, 5.2], torch-source: [code, 4.8],
    sympy: [math, 5.0], gcide: [knowledge, 5.9], base64: [none, 7.9]}""")
)
"""Name -> domain, and the loss that it approaches."""
MIXED = {"python-stdlib": 0.4, "torch-source": 0.2, "sympy": 0.25, "gcide": 0.15}
HELPS = yaml.safe_load("""{code: [0.9, 0.1, 0.05], math: [0.3, 0.7, 0.1], knowledge: [0.1, 0.05, 0.8],
    none: [-0.4, -0.5, -0.3]}""")
"""Mean score by the source's domain, for code, math and knowledge."""
UNIFORM_STEPS, MIXED_STEPS = 100, 75
BATCH, LENGTH = 16, 256
TOKENS = BATCH * LENGTH
GIVEN = """
model: {num_layers: 4, hidden_size: 192, ffn_hidden_size: 640, num_attention_heads: 3, num_query_groups: 1,
  vocab_size: 4096}
data: {seq_length: 256, probes: {code: heldout_code, math: heldout_math, knowledge: heldout_knowledge}}
train: {global_batch: 16, micro_batch: 8, precision: fp32}
phases: {uniform: {steps: 100}}
influence: {directions: {code: probe_code, math: probe_math, knowledge: probe_knowledge}}
mix: {phase: influence}
"""


def make_arm(root: Path, last: str, weights: Any, first_step: int, gain: float, domains: Any = None) -> None:
    """Write config.yaml, metrics.jsonl and ledger.jsonl of one arm; its metrics begin after `first_step`."""
    sources = domains or {name: domain for name, (domain, _) in SOURCES.items()}
    given = yaml.safe_load(GIVEN)
    given["data"]["sources"] = {s: {"prefix": f"data/{s}", "domain": domain} for s, domain in sources.items()}
    given["train"]["run"] = str(root)
    second = {"weights": weights, "steps": MIXED_STEPS, "learning_rate": 2e-3, "max_epochs": 0.5}
    given["phases"][last] = second
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    config = config_io.load([str(root / "config.yaml")])
    (root / "config.yaml").write_text(config_io.dump(config))
    random, drawn, lines = np.random.default_rng(len(last)), dict.fromkeys(sources, 0.0), []
    for step in range(1, UNIFORM_STEPS + MIXED_STEPS + 1):
        phase = "uniform" if step <= UNIFORM_STEPS else last
        given = config.phase_weights(phase)
        target = {s: given.get(s, 0.0) / sum(given.values()) for s in sources}
        drawn = {s: n + target[s] * BATCH for s, n in drawn.items()}
        fall, own = np.exp(-step / 35), [s for s in sources if target[s]]
        ends = {s: SOURCES.get(s, ("", 5.0))[1] + 0.08 * random.standard_normal() for s in own}
        losses = {s: 8.4 * fall + end * (1 - fall) for s, end in ends.items()}
        fixed = {"learning_rate": 4e-3, "grad_norm": 1.0, "seconds": 0.4, "tokens_per_second": TOKENS / 0.4}
        line = fixed | {"step": step, "phase": phase, "tokens": step * TOKENS, "loss_by_source": losses}
        line |= {"mix_target": target, "mix_actual": dict(target)}
        line["loss"] = sum(target[s] * loss for s, loss in losses.items())
        line["tokens_by_source"] = {s: n * LENGTH for s, n in drawn.items()}
        line["epochs_by_source"] = {s: n / (300 + 400 * i) for i, (s, n) in enumerate(drawn.items())}
        if step > UNIFORM_STEPS:
            kl = 3 * fall - gain / 10
            line["kd"] = {"kl": kl, "ce": kl + 2, "teacher_entropy": 1.5 + fall, "agreement": 1 - fall}
        if step % 25 == 0:
            better = gain * max(0, step - UNIFORM_STEPS) / MIXED_STEPS
            line["probe_nll"] = {
                c: 8.4 * fall + 5 * (1 - fall) - better * (1 - 0.6 * i) for i, c in enumerate(CAPABILITIES)
            }
            line["gold_bpb"] = {name: 2 * line["loss"] / (9 - gain) for name in ("gsm8k", "mbpp")}
            line["rank_me"] = 10 + step / 10
            line["validation_nll"] = {s: 0.1 + loss for s, loss in losses.items()}
        lines += [json.dumps(line) + "\n"] if step > first_step else []
    (root / "metrics.jsonl").write_text("".join(lines))
    if not first_step:
        ledger.append(root, "gather text", seconds=21.0)
        ledger.append(root, "train uniform", devices=2, tokens=UNIFORM_STEPS * TOKENS, seconds=48.0)
        for step in (50, 75, 100):
            ledger.append(root, f"influence step {step}", devices=2, tokens=7 * 64 * LENGTH, seconds=11.0)
        ledger.append(root, "mix", seconds=1.2)
    ledger.append(root, f"train {last}", devices=2, tokens=MIXED_STEPS * TOKENS, seconds=36.0)


def make_scores(examples: int = 64) -> list[ScoreTable]:
    """Scores of every source at three checkpoints; base64 harms, the others help their own domain most."""
    random, tables = np.random.default_rng(0), []
    for name, (domain, _) in SOURCES.items():
        mean_C = np.array(HELPS[domain]) * (1 + 0.2 * random.standard_normal(3))
        score_NCK = mean_C[None, :, None] + 0.35 * random.standard_normal((examples, 3, 3))
        number_N, length_N = np.arange(examples), np.full(examples, LENGTH)
        scores = score_NCK.astype(np.float32)
        tables.append(ScoreTable(name, CAPABILITIES, (50, 75, 100), number_N, length_N, scores))
    return tables


def write_scores(root: Path, tables: list[ScoreTable]) -> None:
    """RUN/influence as tools/compute_influence.py leaves it."""
    for position, table in enumerate(tables):
        for k, step in enumerate(table.steps):
            given = (table.source, table.score_NCK[:, :, k], table.example_N, table.length_N)
            named = list(table.capabilities)
            mixture_scores.write_scores(root, step, *given, position=position, capabilities=named)


def curate(root: Path) -> dict[str, Any]:
    """Name probing sets in RUN/probes, and leave the manifest of their curation there. Returns its funnel."""
    given = yaml.safe_load((root / "config.yaml").read_text())
    given["data"]["probes"] = {c: str(root / "probes" / f"heldout_{c}") for c in CAPABILITIES}
    (root / "config.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    funnel = {}
    for n, source in enumerate(given["data"]["sources"]):
        kept = [{"text": f"kept </pre> \x0b of {source}" + "!" * 400, "score": 4.5}, *[{"text": "more"}] * 4]
        quality = {"stage": "quality", "in": 900, "kept": 125, "threshold": 4.0 - n, "fallback": n > 0}
        quality["examples"] = {"kept": kept, "dropped": [{"text": "buy now", "score": 0.25}]}
        last = {"stage": "duplicates", "in": 125, "kept": 100 * n, "threshold": None, "fallback": False}
        stages = [quality, {**last, "examples": {"kept": [], "dropped": []}}]
        funnel[source] = {"documents": 60_000, "read": 900, "share_read": 0.015, "stages": stages}
    (root / "probes").mkdir(exist_ok=True)
    (root / "probes" / "manifest.json").write_text(json.dumps({"request": {}, "funnel": funnel}))
    return funnel


def save(run: Path, *steps: int, size: int = 1000) -> None:
    """Complete checkpoints with one file of `size` bytes beside the description."""
    directory, config = run / "checkpoints", config_io.load([str(run / "config.yaml")])
    for step in steps:
        temporary = checkpoint_files.begin(directory, step)
        (temporary / "__0_0.distcp").write_bytes(bytes(size))
        facts = checkpoint_files.facts_of([temporary / "__0_0.distcp"])
        state = TrainState(step, step * BATCH, step * TOKENS)
        checkpoint_files.publish(directory, facts, state, config.model, "any", "{}")
        checkpoint_files.release(directory)


def change(run: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Pass every line of metrics.jsonl through `edit`, which changes it in place."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        edit(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def scores_of(root: Path) -> summary.Scores:
    scores = summary.scores(load.read_all(root))
    assert scores is not None
    return scores


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
    """The pair with influence scores of every source, and with curated probing sets."""
    write_scores(pair, make_scores())
    curate(pair)
    return pair
