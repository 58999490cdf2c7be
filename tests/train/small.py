"""Small runs on forked ranks, and what they report."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1 import config_io
from megatron_r1.config import Config
from tests import launch


def written(root: Path, end: int | None = None) -> Path:
    """Two datasets, `a` and `b`, and a small probing set of each. end: as of write_corpus."""
    for number, name in enumerate("ab"):
        launch.write_corpus(root / name, 60, seed=number, end=end)
        launch.write_corpus(root / f"probe_{name}", 5, seed=number + 2, end=end)
    return root


def config(root: Path, run: str, steps: int, *more: str) -> Config:
    return config_io.load(
        [
            *launch.TINY_MODEL,
            "model.num_layers=4",
            f"train={{run: '{root}/{run}', global_batch: 8, micro_batch: 2, precision: fp32}}",
            "train.checkpoint_every=2",
            f"data={{seq_length: 32, sources: {{a: {{prefix: '{root}/a'}}, b: {{prefix: '{root}/b'}}}}}}",
            f"data.probes={{a: '{root}/probe_a', b: '{root}/probe_b'}}",
            f"phases.one={{steps: {steps}, learning_rate: 0.01, decay: constant}}",
            *more,
        ]
    )


def figures(run: Path) -> dict[int, list[float]]:
    """Step -> loss, gradient norm, loss by source, held-out NLL."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: [
            line["loss"],
            line["grad_norm"],
            *line["loss_by_source"].values(),
            *line.get("probe_nll", {}).values(),
        ]
        for line in lines
    }
