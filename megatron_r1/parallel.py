"""Process groups -> ParallelContext; what a rank shares with the others, and its part of a batch."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_r1 import backend, cpu_products
from megatron_r1.config import ParallelConfig
from megatron_r1.launch_store import launch_store
from megatron_r1.records import Batch
from megatron_r1.run_lock import RunBusyError, RunLock

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands. Ranks order as megatron-core's default: tensor, context, data, pipeline."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_size: int
    data_rank: int
    """Among the ranks that hold different samples."""
    data_size: int

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which speaks for all."""
        return self.rank == 0

    def announce(self, line: str) -> None:
        """Print a line on the first rank alone."""
        if self.leads:
            print(line, flush=True)


@contextmanager
def process_groups(config: ParallelConfig) -> Iterator[ParallelContext]:
    """Join the launch's process group and megatron-core's, and leave them at the end.

    Without torchrun this is a launch of one rank.
    """
    from megatron.core import parallel_state

    backend.use_local_device()
    cpu_products.use_onednn()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" in os.environ:
        dist.init_process_group(
            backend.DISTRIBUTED_BACKEND,
            store=launch_store(_TIMEOUT),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=_TIMEOUT,
        )
    else:
        store = dist.HashStore()
        dist.init_process_group(backend.DISTRIBUTED_BACKEND, store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(
            config.tensor,
            config.pipeline,
            config.virtual_pipeline if config.virtual_pipeline > 1 else None,
            context_parallel_size=config.context,
        )
        yield current()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def current() -> ParallelContext:
    """The context of megatron-core's process groups as they are now."""
    from megatron.core import parallel_state as ps

    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=ps.get_tensor_model_parallel_world_size(),
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        pipeline_size=ps.get_pipeline_model_parallel_world_size(),
        context_size=ps.get_context_parallel_world_size(),
        data_rank=ps.get_data_parallel_rank(),
        data_size=ps.get_data_parallel_world_size(),
    )


@contextmanager
def holding(directory: Path, context: ParallelContext) -> Iterator[None]:
    """Hold the lock on `directory` in every rank of this launch. Raises RunBusyError in every rank where
    another launch has it."""
    lock, busy = RunLock(directory), ""
    if context.leads:
        try:
            lock.take(share=True)
        except RunBusyError as error:
            busy = str(error)
    if busy := broadcast_object(busy):
        raise RunBusyError(busy)
    if not context.leads:
        lock.join()
    try:
        yield
        dist.barrier()
    finally:
        lock.release()


def broadcast_object(value: object) -> Any:
    """`value` of the first rank on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=backend.device())
    return box[0]


def gather_objects(value: object) -> list[Any]:
    """Every rank's `value`, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


Sharers = Literal["tensor", "pipeline", "context", "data", "tokens", "embedding"]
"""Ranks among which something is divided: the model's axes, samples, tokens (samples or context), and the two
ends of a pipeline, which both hold the tied embedding."""


def sum_over(sharers: Sharers, tensor: torch.Tensor) -> torch.Tensor:
    """Sum over this rank's group of `sharers`, in place."""
    from megatron.core import parallel_state as ps

    group = {
        "tensor": ps.get_tensor_model_parallel_group,
        "pipeline": ps.get_pipeline_model_parallel_group,
        "context": ps.get_context_parallel_group,
        "data": ps.get_data_parallel_group,
        "tokens": partial(ps.get_data_parallel_group, with_context_parallel=True),
        "embedding": ps.get_embedding_group,
    }[sharers]()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's on every stage, in place."""
    from megatron.core import parallel_state as ps

    if ps.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            tensor, ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group()
        )
    return tensor


def on_device(batch: Batch) -> Batch:
    """The batch on this rank's device, cut to this context-parallel rank's part of each sequence."""
    tensors = {
        field.name: value.to(backend.device(), non_blocking=True)
        for field in dataclasses.fields(batch)
        if (value := getattr(batch, field.name)) is not None
    }
    return Batch(**{**tensors, **cut_to_rank({name: t for name, t in tensors.items() if t.dim() == 2})})


def cut_to_rank(whole_BS: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's tokens of each tensor, where context parallelism divides the sequence."""
    from megatron.core import parallel_state as ps
    from megatron.core.utils import get_batch_on_this_cp_rank

    if ps.get_context_parallel_world_size() == 1:
        return whole_BS
    # megatron-core 0.19 wants to be told.
    told = "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters
    return get_batch_on_this_cp_rank(whole_BS, **({"is_hybrid_cp": False} if told else {}))
