"""Loading of sharded checkpoints through megatron-core's dist_checkpointing.

Every layout loads the checkpoints of every other layout. Every file is verified before it is used.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint.files import NOT_WEIGHTS, check_model, corruptions, raise_corrupt
from megatron_r1.checkpoint.shards import METADATA, rectangles_of
from megatron_r1.config import ModelConfig
from megatron_r1.parallel import gather_objects
from megatron_r1.records import TrainState

# isort: split
from megatron.core import dist_checkpointing


def load_checkpoint(
    path: Path, gpt: Any, optimizer: Any | None, model: ModelConfig, but: Container[str] = ()
) -> TrainState:
    """Fill the model, and the optimizer unless None, from a checkpoint of the same model, fields `but` aside.

    Every file is verified first, each by one rank. Raises ValueError on all ranks when the checkpoint is
    of another shape, or names the files that are missing, short or altered.
    """
    meta = check_model(path, model, but)
    mine = corruptions(path, meta["files"], dist.get_rank(), dist.get_world_size())
    raise_corrupt(path, [one for share in gather_objects(mine) for one in share])
    wanted: dict[str, Any] = {"model": gpt.sharded_state_dict()}
    if optimizer is None:
        gpt.load_state_dict(dist_checkpointing.load(wanted, str(path))["model"])
        return TrainState(**meta["state"])
    with torch.no_grad(), rectangles_of(optimizer):
        wanted["optimizer"] = optimizer.sharded_state_dict(
            wanted["model"], is_loading=True, metadata=METADATA
        )
        loaded = dist_checkpointing.load(wanted, str(path))
        gpt.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    return TrainState(**meta["state"])


def load_weights(path: Path, gpt: Any, optimizer: Any, model: ModelConfig) -> None:
    """Begin anew with a checkpoint's weights: Adam's state stays empty. Errors as of `load_checkpoint`."""
    load_checkpoint(path, gpt, None, model, but=NOT_WEIGHTS)
    # The optimizer's main parameters are copies.
    optimizer.reload_model_params()
