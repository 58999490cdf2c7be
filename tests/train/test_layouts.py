"""One checkpoint, any layout: the same losses and gradient norms, resharded on load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import launch

STEPS = 6
LAYOUTS = {
    "data": [],
    "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2"],
    "context": ["parallel.context=2"],
}


def words(root: Path, run: str, *more: str) -> list[str]:
    return [
        "tools/train.py",
        *launch.TINY_MODEL,
        f"train={{run: '{root}/{run}', global_batch: 8, micro_batch: 2, precision: fp32}}",
        "train.checkpoint_every=2",
        f"data={{seq_length: 32, sources: {{a: {{prefix: '{root}/a'}}, b: {{prefix: '{root}/b'}}}}}}",
        f"data.probes={{a: '{root}/a', b: '{root}/b'}}",
        f"phases.one={{steps: {STEPS}, learning_rate: 0.01, decay: constant}}",
        *more,
    ]


def figures(run: Path) -> dict[int, list[float]]:
    """Step -> loss, gradient norm, loss by source and held-out NLL."""
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank's run, the reference."""
    root = tmp_path_factory.mktemp("layouts")
    for number, name in enumerate("ab"):
        launch.write_corpus(root / name, 60, seed=number)
    launch.finish(launch.command(*words(root, "one"), ranks=1), root / "log")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_of_any_layout_train_as_one(root: Path, layout: str) -> None:
    branch = f"train.init_from={root}/one/checkpoints/step_00000002"
    launch.finish(launch.command(*words(root, layout, branch, *LAYOUTS[layout])), root / f"log {layout}")
    alone, together = figures(root / "one"), figures(root / layout)
    assert list(together) == list(range(3, STEPS + 1))
    for step, values in together.items():
        assert values == pytest.approx(alone[step], rel=1e-5)
