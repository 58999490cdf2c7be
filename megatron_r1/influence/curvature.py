"""H of Eq. 2: its inverse is applied once to each direction, never to an example's gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1 import backend  # noqa: F401  (before megatron.core)
from megatron_r1.influence.methods import Directions
from megatron_r1.influence.passes import named_parameters

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

_KEY = "optimizer.state.exp_avg_sq"


def resolve(kind: str, checkpoints: list[Path]) -> str:
    """The curvature that "auto" means: one for all checkpoints, or their scores could not be summed."""
    if kind != "auto":
        return kind
    return "adam" if all(_has_moments(path) for path in checkpoints) else "identity"


def _has_moments(checkpoint: Path) -> bool:
    return any(key.startswith(_KEY) for key in dist_checkpointing.load_tensors_metadata(str(checkpoint)))


def precondition(kind: str, directions: Directions, checkpoint: Path, gpt: Any) -> None:
    """v_c <- H^-1 v_c in place, on this rank's shard.

    identity: H = 1, the effect of a step of gradient descent. adam: H = diag(sqrt(v / (1 - beta2^t)) + eps)
    with Adam's second moment v of the checkpoint: the effect of a step scaled as the optimizer would scale
    it. Raises ValueError where the checkpoint holds no optimizer state.
    """
    if kind == "identity":
        return
    assert kind == "adam"
    for name, scale in adam_scale(checkpoint, gpt).items():
        if name in directions:
            directions[name] /= scale


def adam_scale(checkpoint: Path, gpt: Any) -> dict[str, Tensor]:
    """sqrt(v / (1 - beta2^t)) + eps of each parameter: float32, this rank's shard, from any layout.

    The optimizer's state is saved as whole parameters, so that it reads as the weights do.
    """
    places = gpt.sharded_state_dict()
    wanted = {
        name: make_sharded_optimizer_tensor(places[local], torch.empty_like(p, dtype=torch.float32), _KEY)
        for name, (local, p) in named_parameters(gpt).items()
    }
    if not _has_moments(checkpoint):
        raise ValueError(
            f"{checkpoint} holds no optimizer state, which influence.curvature=adam needs; use identity"
        )
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    group = common["optimizer"]["optimizer"]["param_groups"][0]
    corrected = 1 - group["betas"][1] ** group["step"]
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    return {name: (loaded[name] / corrected).sqrt_().add_(group["eps"]) for name in wanted}
