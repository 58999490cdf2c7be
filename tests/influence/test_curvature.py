"""Adam's second moment against the optimizer that saved it, in every layout; a new curvature."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import Config, OptimizerConfig, ParallelConfig
from megatron_r1.data.windows import Examples
from megatron_r1.influence.curvature import CURVATURES, adam_scale
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.parameters import Directions
from megatron_r1.influence.score import compute_influence
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from megatron_r1.train.optimizer import build_optimizer, set_schedule
from tests.distributed import RankFailedError, on_ranks
from tests.influence import tiny
from tests.influence.test_score import changed, copied, tables

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.utils import get_model_config

STEPS = 3


def _train(directory: Path) -> dict[str, np.ndarray]:
    """A few steps; the second moment by its definition, from the gradients seen."""
    with process_groups(ParallelConfig()):
        gpt = tiny.build()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        model = DistributedDataParallel(get_model_config(gpt), ddp, gpt)
        optimizer = build_optimizer(OptimizerConfig(clip_grad=0.0), "fp32", [model])
        set_schedule(optimizer, 0.01, 0.0)
        v = {name: np.zeros(p.shape) for name, p in gpt.named_parameters()}
        for step in range(STEPS):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            window = torch.from_numpy(tiny.windows(4, seed=step))
            position = torch.arange(tiny.SEQ).expand(4, -1)
            model.module(window[:, :-1], position, None, labels=window[:, 1:].contiguous()).mean().backward()
            model.finish_grad_sync()
            for name, p in gpt.named_parameters():
                v[name] = 0.95 * v[name] + 0.05 * p.main_grad.double().numpy() ** 2
            optimizer.step()
        save_checkpoint(directory, gpt, optimizer, TrainState(STEPS), tiny.MODEL, "one", "")
        save_checkpoint(directory / "bare", gpt, None, TrainState(STEPS), tiny.MODEL, "one", "")
        return v


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    root = tmp_path_factory.mktemp("adam")
    return root / f"step_{STEPS:08d}", on_ranks(1, _train, root)[0]


def _scale(path: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    with process_groups(parallel):
        return {name: t.numpy() for name, t in adam_scale(path, tiny.build(parallel)).items()}


def test_the_scale_is_adams(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, v = saved
    found = on_ranks(1, _scale, path, ParallelConfig())[0]
    assert found.keys() == v.keys()
    for name, moment in v.items():
        true = np.sqrt(moment / (1 - 0.95**STEPS)) + 1e-8
        np.testing.assert_allclose(found[name], true, rtol=1e-4, atol=1e-9)


def _score(path: Path, parallel: ParallelConfig) -> np.ndarray:
    with process_groups(parallel) as context:
        gpt = tiny.build(parallel)
        load_checkpoint(path, gpt, None, tiny.MODEL)
        v = tiny.directions(gpt, context)
        CURVATURES["adam"]().apply(v, tiny.engine(gpt, context), path, [])
        return tiny.scores(gpt, context, v, tiny.windows())[0]


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)])
def test_every_rank_reads_its_shard(saved: Any, parallel: ParallelConfig) -> None:
    alone = on_ranks(1, _score, saved[0], ParallelConfig())[0]
    for found in on_ranks(2, _score, saved[0], parallel):
        np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-5 * np.abs(alone).max())


def test_a_checkpoint_without_an_optimizer_is_refused(saved: Any) -> None:
    bare = saved[0].parent / "bare" / saved[0].name
    with pytest.raises(RankFailedError, match=r"no optimizer state, which influence\.curvature=adam needs"):
        on_ranks(1, _scale, bare, ParallelConfig())


class Halves:
    """H = 2: all that a curvature needs."""

    def apply(
        self, directions: Directions, engine: Engine, checkpoint: Path, sources: Sequence[Examples]
    ) -> None:
        assert list(sources) == []
        for direction in directions.values():
            direction /= 2


def _scored_with(name: str, config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CURVATURES, "halves", Halves)
        compute_influence(changed(config, influence={"curvature": name}))


def test_a_new_curvature_is_a_class_and_a_line(trained: Config, tmp_path: Path) -> None:
    scores, norms = {}, {}
    for name in ("identity", "halves"):
        config = changed(copied(trained, tmp_path / name), influence={"steps": [4], "examples": 4})
        on_ranks(1, _scored_with, name, config)
        scores[name] = tables(config)[0].score_NCK
        manifest = json.loads((tmp_path / name / "run/influence/step_00000004/a/manifest.json").read_text())
        assert manifest["influence"]["curvature"] == name
        norms[name] = np.array(list(manifest["direction_norms"].values()))
    assert np.array_equal(scores["halves"], scores["identity"] / 2)
    assert np.array_equal(norms["halves"], norms["identity"] / 2)
