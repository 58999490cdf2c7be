"""DataInf against its formula on whole gradients by plain autograd, in every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ParallelConfig
from megatron_r1.influence.curvature import DataInf
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from tests.distributed import on_ranks
from tests.influence import tiny
from tests.influence.test_gradients import error

EXAMPLES = 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def _scores(parallel: ParallelConfig, checkpoints: Path) -> dict[str, np.ndarray]:
    """Of the standard rows by directions with H; on one rank also by the formula, parameter by parameter."""
    with process_groups(parallel) as context:
        gpt = tiny.build(parallel)
        ref = save_checkpoint(checkpoints, gpt, None, TrainState(), tiny.MODEL, "one", "")
        load_checkpoint(ref.path, gpt, None, tiny.MODEL)
        v = tiny.directions(gpt, context)
        rows = tiny.windows(EXAMPLES, seed=50)
        true = {name: w.double() for name, w in v.items()}
        out = {"plain": tiny.scores(gpt, context, v, tiny.windows())[0]}
        if context.world_size == 1:
            found = [tiny.row_gradient(gpt, row) for row in rows]
            for name, w in true.items():
                g_ND = torch.stack([g[name].flatten() for g in found]).double()
                flat_CD = w.flatten(1)
                square_N = g_ND.square().sum(1)
                lam = 0.1 * square_N.sum() / (EXAMPLES * g_ND.shape[1])
                terms = [
                    flat_CD - (flat_CD @ g)[:, None] * g / (lam + square)
                    for g, square in zip(g_ND, square_N, strict=True)
                ]
                true[name] = (sum(terms) / (EXAMPLES * lam)).view_as(w)
        DataInf().apply(v, tiny.engine(gpt, context), ref.path, [tiny.Windows(rows)])
        if context.world_size == 1:
            out["worst"] = np.array(max(error(v[n].numpy(), true[n].numpy()) for n in v))
        out["scores"] = tiny.scores(gpt, context, v, tiny.windows())[0]
        return out


@pytest.fixture(scope="module")
def alone(weights: Path) -> dict[str, np.ndarray]:
    return on_ranks(1, _scores, ParallelConfig(), weights)[0]


def test_directions_are_as_the_formula_says(alone: dict[str, np.ndarray]) -> None:
    assert float(alone["worst"]) < 1e-4
    assert abs(np.corrcoef(alone["scores"].ravel(), alone["plain"].ravel())[0, 1]) < 0.999


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(context=2),
    ],
    ids=str,
)
def test_two_ranks_find_the_same(
    alone: dict[str, np.ndarray], weights: Path, parallel: ParallelConfig
) -> None:
    for found in on_ranks(2, _scores, parallel, weights):
        assert error(found["scores"], alone["scores"]) < 5e-5
