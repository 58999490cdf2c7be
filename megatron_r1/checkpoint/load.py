"""Sharded checkpoints through megatron-core's dist_checkpointing: save, load, reshard.

Any layout loads what any other saved. Saving copies this rank's part and leaves the writing to a thread;
what is on the disk in the end is the state of the step at which it began.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.files import (
    NOT_WEIGHTS,
    check_model,
)
from megatron_r1.checkpoint.shards import METADATA, rectangles_of
from megatron_r1.config import ModelConfig
from megatron_r1.parallel import gather_objects
from megatron_r1.records import TrainState

# isort: split
from megatron.core import dist_checkpointing


def load_checkpoint(path: Path, gpt: Any, optimizer: Any | None, model: ModelConfig) -> TrainState:
    """Fill the model, and the optimizer unless None, from a checkpoint of the same model.

    Every file is verified first, each by one rank. Raises ValueError on all ranks when the checkpoint is
    of another shape, or names the files that are missing, short or altered.
    """
    meta = check_model(path, model)
    _verify(path, meta)
    wanted: dict[str, Any] = {"model": gpt.sharded_state_dict()}
    if optimizer is None:
        loaded = dist_checkpointing.load(wanted, str(path))
        gpt.load_state_dict(loaded["model"])
        return TrainState(**meta["state"])
    with torch.no_grad(), rectangles_of(optimizer):
        wanted["optimizer"] = optimizer.sharded_state_dict(
            wanted["model"], is_loading=True, metadata=METADATA
        )
        loaded = dist_checkpointing.load(wanted, str(path))
        gpt.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    return TrainState(**meta["state"])


def _verify(path: Path, meta: dict[str, Any]) -> None:
    """Read every file, each on one rank. Raises ValueError on all ranks, naming what is damaged."""
    mine = checkpoint_files.corruptions(path, meta["files"], dist.get_rank(), dist.get_world_size())
    checkpoint_files.raise_corrupt(path, [one for share in gather_objects(mine) for one in share])


def load_weights(path: Path, gpt: Any, optimizer: Any, model: ModelConfig) -> None:
    """Begin anew with a checkpoint's weights: Adam's state stays empty. Errors as of `load`."""
    meta = check_model(path, model, but=NOT_WEIGHTS)
    _verify(path, meta)
    loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, str(path))
    gpt.load_state_dict(loaded["model"])
    # The optimizer's main parameters are copies.
    optimizer.reload_model_params()
