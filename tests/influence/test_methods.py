"""Every method against exact scores of the whole, and against itself in other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import InfluenceConfig, ParallelConfig
from megatron_r1.influence.curvature import CURVATURES
from megatron_r1.influence.methods import METHODS, Ghost, LowRank, Method, correlation, truncated
from megatron_r1.influence.parameters import parameter_names
from megatron_r1.influence.plan import FIELDS
from megatron_r1.influence.projection import Projected, Projection, projected_directions
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from tests.distributed import on_ranks
from tests.influence import tiny
from tests.influence.test_gradients import error

Found = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def _measured(parallel: ParallelConfig, checkpoints: Path) -> Found:
    """Results of every method on the standard rows, on this rank."""
    with process_groups(parallel) as context:
        gpt = tiny.build(parallel)
        ref = save_checkpoint(checkpoints, gpt, None, TrainState(), tiny.MODEL, "one", "")
        load_checkpoint(ref.path, gpt, None, tiny.MODEL)
        v = tiny.directions(gpt, context)
        shard = context.tensor_rank, context.tensor_size
        projection = Projection(parameter_names(tiny.MODEL.num_layers), v, 4, 5, shard)
        projected_CP = projected_directions(projection, v, 3, gpt)
        methods: dict[str, Method] = {
            "ghost": Ghost(v, 3, tiny.SEQ),
            "tokens": Ghost(v, 3, tiny.SEQ, per_token=True),
            "low rank": LowRank(v, 3, rank=8),
            "whole rank": LowRank(v, 3, rank=64),
            "projected": Projected(projection, frozenset(v), projected_CP),
        }
        if parallel.context > 1:
            del methods["tokens"]
        found: Found = {"exact": {"scores": tiny.scores(gpt, context, v, tiny.windows())[0]}}
        for name, method in methods.items():
            row_NX = torch.from_numpy(tiny.rows(gpt, context, method, tiny.windows())[0])
            found[name] = {key: t.numpy() for key, t in method.results(row_NX).items()}
        return found


@pytest.fixture(scope="module")
def alone(weights: Path) -> Found:
    return on_ranks(1, _measured, ParallelConfig(), weights)[0]


def test_the_configuration_names_every_method_and_curvature() -> None:
    hints = get_type_hints(InfluenceConfig)
    assert set(get_args(hints["method"])) == METHODS.keys()
    assert set(get_args(hints["curvature"])) - {"auto"} == CURVATURES.keys()
    assert FIELDS.keys() <= METHODS.keys() | CURVATURES.keys()


def test_exact_methods_agree(alone: Found) -> None:
    exact = alone["exact"]["scores"]
    for name in ("ghost", "tokens", "whole rank"):
        assert error(alone[name]["scores"], exact) < 1e-5, name


def test_scores_of_tokens_sum_to_the_examples(alone: Found) -> None:
    tokens = alone["tokens"]["token_scores"]
    assert tokens.shape == (tiny.ROWS, tiny.SEQ, 3)
    assert error(tokens.sum(1), alone["exact"]["scores"]) < 1e-5
    assert (np.abs(tokens) > 0).all()


def test_low_rank_is_near_and_not_the_same(alone: Found) -> None:
    near, exact = (torch.from_numpy(alone[name]["scores"]) for name in ("low rank", "exact"))
    assert 0.9 < correlation(near, exact).min() < 1
    true = np.corrcoef(near[:, 1], exact[:, 1])[0, 1]
    assert correlation(near, exact)[1].item() == pytest.approx(true)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(tensor=2),
        ParallelConfig(pipeline=2),
        ParallelConfig(context=2),
    ],
    ids=str,
)
def test_two_ranks_measure_as_one(alone: Found, weights: Path, parallel: ParallelConfig) -> None:
    for found in on_ranks(2, _measured, parallel, weights):
        for method, results in found.items():
            # A shard is truncated by itself, which is another approximation.
            if method == "low rank" and parallel.tensor > 1:
                continue
            for key, values in results.items():
                assert error(values, alone[method][key]) < 2e-5, (method, key)


def test_truncated_directions_are_the_best_of_their_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    for outputs, inputs in ((12, 7), (7, 12)):
        v_COI = torch.randn(2, outputs, inputs, generator=generator)
        left, right = truncated(v_COI, 3)
        for c in range(2):
            found = left[:, 3 * c : 3 * c + 3] @ right[:, 3 * c : 3 * c + 3].T
            u, s, vt = torch.linalg.svd(v_COI[c], full_matrices=False)
            torch.testing.assert_close(found, (u[:, :3] * s[:3]) @ vt[:3], rtol=1e-4, atol=1e-5)


def test_inner_products_of_projections_have_their_mean_and_variance() -> None:
    """Of <A^T G B, A^T V B>, by the moments of Wishart matrices A A^T and B B^T."""
    name, k = "decoder.layers.0.mlp.linear_fc2.weight", 6
    generator = torch.Generator().manual_seed(2)
    g, v = (torch.randn(10, 15, generator=generator) for _ in range(2))
    v += 0.5 * g
    found = []
    for seed in range(4000):
        directions = {name: torch.stack([g, v])}
        kept = Projection([name], directions, k, seed).of_directions(directions, 2)
        found.append(float(kept[0] @ kept[1]))
    g, v = g.double(), v.double()

    def twice(n: torch.Tensor) -> torch.Tensor:
        """E[W N W] with W = B B^T."""
        return n + (n.T + n.trace() * torch.eye(len(n))) / k

    n = v.T @ g
    over_b = n.square().sum() + (n @ n).trace()
    over_a = (g @ twice(v.T @ v) @ g.T).trace() + (g @ twice(n) @ v.T).trace()
    variance = float(over_a + over_b) / k
    true = float((g * v).sum())
    assert abs(np.mean(found) - true) < 3 * (variance / len(found)) ** 0.5
    assert np.var(found) == pytest.approx(variance, rel=0.15)
