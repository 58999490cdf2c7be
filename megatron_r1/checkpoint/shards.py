"""The distributed optimizer's state as rectangles of its parameters: no rank asks another for its part.

A data-parallel rank holds main parameter and moments of a run of elements of some parameters. Such a run
is at most three rectangles of a matrix: the end of a row, whole rows, the beginning of a row. Written as
those, under megatron-core's own names for whole parameters, every rank saves and loads what it holds, and
any layout reads what any other wrote. megatron-core's way to the same file gathers all state on every
rank first; it also looks parameters up in a padded buffer where the gathered one has no padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from operator import add
from typing import Any

import torch

from megatron_r1 import backend  # noqa: F401  (before megatron.core)

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""megatron-core's name for optimizer state that is stored as whole parameters."""


@contextmanager
def rectangles_of(optimizer: Any) -> Iterator[None]:
    """Within, `optimizer.sharded_state_dict` refers to this rank's own state, in place.

    Loading such a state dict fills the optimizer itself, and `optimizer.load_state_dict` has only the
    rest to do.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for part in parts:
        part.sharded_param_state_fully_reshardable = lambda model, *_a, part=part, **_k: _state(part, model)
        part.load_parameter_state_from_fully_reshardable = lambda _: None
    try:
        yield
    finally:
        for part in parts:
            del part.sharded_param_state_fully_reshardable
            del part.load_parameter_state_from_fully_reshardable


def _state(part: Any, model: Any) -> dict[str, ShardedTensor]:
    """Every rectangle of every parameter's state that a DistributedOptimizer holds on this rank."""
    described = {
        shard.data: shard
        for shard in nested_values(model)
        if isinstance(shard, (ShardedTensor, ShardedTensorFactory))
    }
    held = {}
    buckets = chain.from_iterable(chain.from_iterable(of.values()) for of in part.gbuf_ranges)
    for param, ranges in chain.from_iterable(bucket["param_map"].items() for bucket in buckets):
        for key, flat in part._get_main_param_and_optimizer_states(param).items():
            # torch's own Adam counts steps here; ours counts them in the group.
            if key != "step":
                for shard in _rectangles(described[param], key, flat, ranges["param"].start):
                    held[f"{shard.key} {shard.global_offset}"] = shard
    return held


def _rectangles(param: Any, state: str, flat: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """Elements [start, start + len(flat)) of a parameter's shard as rectangles of the global tensor(s).

    `param` describes the shard; a factory stores it as several tensors (gate and up of SwiGLU).
    """
    whole = torch.empty(param.data.shape, dtype=flat.dtype, device="meta")
    # The optimizer shards what data-parallel ranks replicate.
    key, replica_id = f"optimizer.state.{state}.{param.key}", (*param.replica_id[:2], 0)
    meant = {"key": key, "data": whole, "replica_id": replica_id}
    if isinstance(param, ShardedTensorFactory):
        shards = list(nested_values(replace(param, **meant).build()))
    else:
        shards = [replace(param, dtype=flat.dtype, **meant)]
    end = start + flat.numel()
    for shard in shards:
        assert shard.data.is_contiguous()
        begin = shard.data.storage_offset()
        low, high = max(start, begin), min(end, begin + shard.data.numel())
        for offset, size in rectangles(tuple(shard.local_shape), low - begin, high - begin):
            taken, ahead = low - start, shard.prepend_axis_num
            low += math.prod(size)
            shape = (1,) * ahead + size
            yield replace(
                shard,
                data=flat[taken : low - start].detach().view(shape),
                local_shape=shape,
                global_offset=tuple(map(add, shard.global_offset, (0,) * ahead + offset)),
                # Not a regular grid, and one that has its leading axes.
                axis_fragmentations=None,
                prepend_axis_num=0,
            )


Box = tuple[tuple[int, ...], ...]
"""Offset and size."""


def rectangles(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """(offset, size) of the fewest boxes that hold elements [start, end) of a C-ordered tensor, in order."""
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:
        yield from _within_row(shape, last, start - last * row, end - last * row)
        return
    yield from _within_row(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _within_row(shape, last, 0, end - last * row)


def _within_row(shape: tuple[int, ...], number: int, start: int, end: int) -> Iterator[Box]:
    for offset, size in rectangles(shape[1:], start, end):
        yield (number, *offset), (1, *size)
