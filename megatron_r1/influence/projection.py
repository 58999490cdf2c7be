"""Gradients kept as small random projections, for later questions about other directions.

Two-sided, as LoGra's: a layer's gradient G [O, I] is kept as A^T G B with random A [O, k] and B [I, k],
entries normal with variance 1/k, so that the inner product of two projections has the inner product of
the gradients as its mean. From a layer's inputs a and output gradients g it is sum_s (A^T g_s) (B^T a_s)^T,
and G is never formed. A norm weight is kept as k numbers, one-sided.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.influence.methods import Directions
from megatron_r1.influence.passes import named_parameters
from megatron_r1.parallel import ParallelContext, sum_over


class Projection:
    """Where each parameter's numbers are in a row, and its random matrices on this rank.

    `shapes`: of this rank's shards, by name, in the order of the whole model; the columns of parameters that
    are elsewhere stay 0. `all_names`: of every selected parameter. Matrices follow from seed, name and place
    in the whole parameter, so that every layout projects alike.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        all_names: dict[str, int],
        k: int,
        seed: int,
        shard: tuple[int, int],
        device: torch.device,
    ):
        self.k = k
        self.columns: dict[str, slice] = {}
        self.width = 0
        for name, axes in all_names.items():
            size = k**axes
            self.columns[name] = slice(self.width, self.width + size)
            self.width += size
        rank, ranks = shard
        self._sides: dict[str, list[Tensor]] = {}
        for name, shape in shapes.items():
            self._sides[name] = [
                _matrix(name, axis, size, k, seed, *((rank, ranks) if split == axis else (0, 1))).to(device)
                for split in [split_axis(name)]
                for axis, size in enumerate(shape)
            ]

    def sides(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        return [side.to(dtype) for side in self._sides[name]]

    def of_directions(self, directions: Directions, capabilities: int) -> Tensor:
        """Projections of this rank's shards, [C, P]: sum over the ranks that hold the others."""
        first = next(iter(directions.values()), torch.zeros(0))
        out_CP = torch.zeros(capabilities, self.width, dtype=torch.float64, device=first.device)
        for name, direction in directions.items():
            sides = self.sides(name, direction.dtype)
            part = direction @ sides[-1]
            if len(sides) == 2:
                part = (sides[0].T @ part).flatten(1)
            out_CP[:, self.columns[name]] += part
        return out_CP


def split_axis(name: str) -> int | None:
    """The axis that tensor parallelism divides; None: every rank has all."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


def _matrix(name: str, axis: int, size: int, k: int, seed: int, rank: int, ranks: int) -> Tensor:
    """This rank's rows of a side's random matrix: float32 [size, k]."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), axis])
    whole = generator.standard_normal((size * ranks, k), np.float32) / np.float32(k**0.5)
    # The gate's rows and the other ones of a SwiGLU are divided each by themselves.
    halves = 2 if axis == 0 and name.endswith("linear_fc1.weight") else 1
    mine = whole.reshape(halves, ranks, size // halves, k)[:, rank].reshape(size, k)
    return torch.from_numpy(np.ascontiguousarray(mine))


def build_projection(
    names: list[str], directions: Directions, k: int, seed: int, context: ParallelContext
) -> Projection:
    """Of the selected parameters `names`, of which this rank has those of `directions`."""
    axes = {name: 1 if split_axis(name) is None else 2 for name in names}
    shapes = {name: tuple(direction.shape[1:]) for name, direction in directions.items()}
    shard = (context.tensor_rank, context.tensor_size)
    return Projection(shapes, axes, k, seed, shard, backend.device())


def projected_directions(
    projection: Projection, directions: Directions, capabilities: int, gpt: Any
) -> Tensor:
    """Of the whole model's directions, [C, P], the same on all ranks of a model copy."""
    # The last stage's copy of the tied embedding counts on the first.
    copies = {n for n, (local, _) in named_parameters(gpt).items() if local.startswith("output_layer")}
    mine = {name: v for name, v in directions.items() if name not in copies}
    shared = {name: v for name, v in mine.items() if split_axis(name) is None}
    sharded = {name: v for name, v in mine.items() if name not in shared}
    out_CP = projection.of_directions(sharded, capabilities).to(backend.device())
    sum_over("tensor", out_CP)
    out_CP += projection.of_directions(shared, capabilities).to(out_CP.device)
    return sum_over("pipeline", out_CP)


class Projected:
    """Keeps each example's projection (`projections`), and scores by it: unbiased, not exact."""

    squares = False

    def __init__(self, projection: Projection, names: frozenset[str], direction_CP: Tensor):
        """`direction_CP`: the directions' projections, complete."""
        self.projection, self.names = projection, names
        self.width = projection.width
        self.direction_CP = direction_CP

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        left_OK, right_IK = self.projection.sides(name, g_SBO.dtype)
        self._add(name, g_SBO @ left_OK, a_SBI @ right_IK, row_BX)

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        left_VK, right_DK = self.projection.sides(name, torch.float32)
        left_BSK = F.embedding(index_BS, left_VK)
        self._add(name, left_BSK.transpose(0, 1), (g_BSD.float() @ right_DK).transpose(0, 1), row_BX)

    def _add(self, name: str, left_SBK: Tensor, right_SBK: Tensor, row_BX: Tensor) -> None:
        small_BKK = torch.bmm(left_SBK.float().permute(1, 2, 0), right_SBK.float().transpose(0, 1))
        row_BX[:, self.projection.columns[name]] += small_BKK.flatten(1)

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        (side_DK,) = self.projection.sides(name, g_SBD.dtype)
        row_BX[:, self.projection.columns[name]] += g_SBD.sum(0) @ side_DK

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        scores_NC = row_NX @ self.direction_CP.to(row_NX.device).T
        return {"scores": scores_NC, "projections": row_NX}
