"""Random projections of gradients, stored for later queries about other directions.

Two-sided, as LoGra's: a layer's gradient G [O, I] is kept as A^T G B with random A [O, k] and B [I, k],
entries normal with variance 1/k, so that the inner product of two projections has the inner product of
the gradients as its mean. From a layer's inputs a and output gradients g it is sum_s (A^T g_s) (B^T a_s)^T,
and G is never formed. A norm weight is kept as k numbers, one-sided.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.parameters import (
    Directions,
    product,
    shard_of_axis,
    sharded_and_replicated,
    split_axis,
    sum_over_model,
    times,
    whole_shape,
)


class Projection:
    """Each parameter's columns in a row, and its random matrices on this rank.

    `names`: every selected parameter, in the order of the whole model. `directions`: of this rank's shards.
    Columns of other ranks' parameters stay 0. `shard`: tensor-parallel rank and ranks. Matrices follow from
    seed, name and place in the whole parameter, so that every layout projects alike.
    """

    def __init__(
        self, names: Sequence[str], directions: Directions, k: int, seed: int, shard: tuple[int, int] = (0, 1)
    ):
        self.columns: dict[str, slice] = {}
        self.width = 0
        for name in names:
            size = k if split_axis(name) is None else k**2
            self.columns[name] = slice(self.width, self.width + size)
            self.width += size
        self._sides = {
            name: [
                _matrix(name, axis, size, k, seed, shard).to(direction.device)
                for axis, size in enumerate(whole_shape(name, direction.shape[1:], shard[1]))
            ]
            for name, direction in directions.items()
        }

    def sides(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        return [side.to(dtype) for side in self._sides[name]]

    def of_directions(self, directions: Directions, capabilities: int) -> Tensor:
        """Projections of this rank's shards, [C, P]. Their sum over ranks is the whole model's."""
        out_CP = torch.zeros(capabilities, self.width, dtype=torch.float64, device=backend.device())
        for name, direction in directions.items():
            *left, right = self.sides(name, torch.float64)
            for out_P, v in zip(out_CP, direction, strict=True):
                part = v.double() @ right
                out_P[self.columns[name]] += (left[0].T @ part).flatten() if left else part
        return out_CP


def _matrix(name: str, axis: int, size: int, k: int, seed: int, shard: tuple[int, int]) -> Tensor:
    """This rank's rows of the random matrix of an axis of `size` in the whole parameter: float32 [.., k]."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), axis])
    whole_XK = generator.standard_normal((size, k), np.float32) / np.float32(k**0.5)
    return torch.from_numpy(np.ascontiguousarray(shard_of_axis(name, axis, whole_XK, *shard)))


def projected_directions(
    projection: Projection, directions: Directions, capabilities: int, gpt: Any
) -> Tensor:
    """Of the whole model's directions, [C, P], the same on all ranks of a model copy."""
    sharded, replicated = sharded_and_replicated(directions, gpt)
    return sum_over_model(
        projection.of_directions(sharded, capabilities), projection.of_directions(replicated, capabilities)
    )


class Projected:
    """Stores each example's projection (`projections`) and scores by it. Unbiased, not exact."""

    squares = False

    def __init__(self, projection: Projection, names: frozenset[str], direction_CP: Tensor):
        """`direction_CP`: the directions' projections, complete."""
        self.projection, self.names = projection, names
        self.width = projection.width
        self.direction_CP = direction_CP

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        left_OK, right_IK = self.projection.sides(name, g_SBO.dtype)
        self._add(name, times(g_SBO, left_OK), times(a_SBI, right_IK), row_BX)

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        left_VK, right_DK = self.projection.sides(name, torch.float32)
        left_BSK = F.embedding(index_BS, left_VK)
        self._add(name, left_BSK.transpose(0, 1), times(g_BSD.float(), right_DK).transpose(0, 1), row_BX)

    def _add(self, name: str, left_SBK: Tensor, right_SBK: Tensor, row_BX: Tensor) -> None:
        small_BKK = product(left_SBK.float().transpose(0, 1), right_SBK.float().transpose(0, 1))
        row_BX[:, self.projection.columns[name]] += small_BKK.flatten(1)

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        (side_DK,) = self.projection.sides(name, torch.float64)
        row_BX[:, self.projection.columns[name]] += g_SBD.sum(0).double() @ side_DK

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        scores_NC = row_NX @ self.direction_CP.to(row_NX.device).T
        return {"scores": scores_NC, "projections": row_NX}


def projected(directions: Directions, engine: Engine) -> Projected:
    influence, context = engine.influence, engine.context
    shard = context.tensor_rank, context.tensor_size
    projection = Projection(engine.names, directions, influence.projection, influence.seed, shard)
    direction_CP = projected_directions(projection, directions, engine.capabilities, engine.gpt)
    return Projected(projection, frozenset(directions), direction_CP)
