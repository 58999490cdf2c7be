"""Sharded checkpoints through megatron-core's dist_checkpointing: save, find, load, reshard.

A checkpoint is a directory `checkpoints/step_00000120/` that appears whole, by a rename after every
rank has written and flushed, or not at all. Any layout loads what any other saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1 import backend  # noqa: F401  (before megatron.core)
from megatron_r1.config import ModelConfig
from megatron_r1.records import CheckpointRef, TrainState
from megatron_r1.run_dir import sync

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

_META = "megatron_r1.json"
# The optimizer's shards as whole parameters, so that any TP, PP and DP size can load them.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(
    directory: Path,
    gpt: Any,
    optimizer: Any,
    state: TrainState,
    model: ModelConfig,
    phase: str,
    plan: str,
) -> CheckpointRef:
    """Write `directory/step_N` from all ranks; returns when it is complete on disk.

    `plan` is the data plan (JSON) in which the data position counts: a resumed run must agree with it.
    """
    final = directory / f"step_{state.step:08d}"
    ref = CheckpointRef(final, state.step, phase)
    if _complete(final):
        return ref
    temporary = directory / f".step_{state.step:08d}.tmp"
    if dist.get_rank() == 0:
        # What a killed save left.
        for leftover in directory.glob(".step_*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    dist.barrier()
    # Saved synchronously, the writers report within this process: megatron-core's own queue would
    # start a server process for that, several seconds at the first save.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(_state_dict(gpt, optimizer), str(temporary), content_metadata=_SHARDING)
    if dist.get_rank() == 0:
        meta = {
            "format": 1,
            "phase": phase,
            "state": dataclasses.asdict(state),
            "model": dataclasses.asdict(model),
            "plan": plan,
            "bytes": {p.name: p.stat().st_size for p in sorted(temporary.iterdir())},
        }
        (temporary / _META).write_text(json.dumps(meta, indent=1))
        for path in temporary.iterdir():
            sync(path)
        os.rename(temporary, final)
        sync(directory)
    dist.barrier()
    return ref


def found(directory: Path) -> list[CheckpointRef]:
    """Complete checkpoints under `directory`, in training order."""
    refs = []
    for path in sorted(directory.glob("step_*")):
        if _complete(path):
            refs.append(CheckpointRef(path, int(path.name.removeprefix("step_")), read_meta(path)["phase"]))
    return refs


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises ValueError where there is none, or a file is short."""
    try:
        meta = json.loads((path / _META).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is no complete checkpoint ({_META} is missing); name a step_N directory"
        ) from None
    for name, size in meta["bytes"].items():
        actual = (path / name).stat().st_size if (path / name).exists() else 0
        if actual != size:
            raise ValueError(
                f"{path / name} has {actual} bytes where {size} were saved; the checkpoint is damaged, "
                f"remove {path} and continue from an earlier one"
            )
    return meta


def check_model(path: Path, model: ModelConfig) -> dict[str, Any]:
    """`read_meta` of a checkpoint of this model. Raises ValueError when it holds another one."""
    meta = read_meta(path)
    theirs = meta["model"]
    changed = [
        f"{key} {theirs.get(key)} there, {value} here"
        for key, value in dataclasses.asdict(model).items()
        if theirs.get(key) != value
    ]
    if changed:
        raise ValueError(f"{path} holds another model: {'; '.join(changed)}")
    return meta


def load(path: Path, gpt: Any, optimizer: Any | None, model: ModelConfig) -> TrainState:
    """Fill the model, and the optimizer unless None, from a checkpoint of the same model.

    Raises ValueError when the checkpoint is of another shape.
    """
    meta = check_model(path, model)
    loaded = dist_checkpointing.load(_state_dict(gpt, optimizer, loading=True), str(path))
    gpt.load_state_dict(loaded["model"])
    if optimizer is not None:
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
    return TrainState(**meta["state"])


def _state_dict(gpt: Any, optimizer: Any | None, loading: bool = False) -> dict[str, Any]:
    model = gpt.sharded_state_dict()
    if optimizer is None:
        return {"model": model}
    with _places_without_padding(optimizer):
        state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=_SHARDING)
    return {"model": model, "optimizer": state}


@contextmanager
def _places_without_padding(optimizer: Any) -> Iterator[None]:
    """Let megatron-core find each parameter's state where it has put it.

    It gathers the state of all buckets one after the other, without the padding at each bucket's end,
    but looks a parameter up at its place in the padded buffer (0.16.1 and 0.19.2). Wherever a bucket but
    the last is padded, every later parameter would be saved shifted, and the last one cut off.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for part in parts for buffer in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            shift, shifts = 0, []
            for (start, end), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
                shifts.append(shift)
                shift += end - start - bucket.numel_unpadded
            buffer.param_index_map = {
                param: (start - shifts[number], end - shifts[number], number)
                for param, (start, end, number) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def _complete(path: Path) -> bool:
    return (path / _META).is_file()
