"""Adam's second moment from a checkpoint, against the optimizer that saved it, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import OptimizerConfig, ParallelConfig
from megatron_r1.influence.curvature import adam_scale, precondition
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from megatron_r1.train.optimizer import build_optimizer, set_schedule
from tests.distributed import RankFailedError, on_ranks
from tests.influence import tiny

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
        precondition("adam", v, path, gpt)
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
