"""`influence.method` -> the method object, for this rank's shards."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_r1 import backend
from megatron_r1.config import Config, InfluenceConfig
from megatron_r1.influence.layers import select
from megatron_r1.influence.methods import Directions, Ghost, LowRank, Method, WgradDot
from megatron_r1.influence.passes import named_parameters
from megatron_r1.influence.projected import Projected, Projection, split_axis
from megatron_r1.parallel import ParallelContext, sum_over


def build_method(
    influence: InfluenceConfig, directions: Directions, config: Config, gpt: Any, context: ParallelContext
) -> Method:
    """Every rank of a model copy calls this."""
    capabilities = len(influence.directions)
    if influence.method == "ghost":
        return Ghost(directions, capabilities, config.data.seq_length, influence.per_token)
    if influence.method == "lowrank":
        return LowRank(directions, capabilities, influence.rank)
    if influence.method == "projected":
        names = select(influence.layers, config.model.num_layers)
        projection = build_projection(names, directions, influence.projection, influence.seed, context)
        projected_CP = projected_directions(projection, directions, capabilities, gpt)
        return Projected(projection, frozenset(directions), projected_CP)
    return WgradDot(directions, capabilities, influence.norms)


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
