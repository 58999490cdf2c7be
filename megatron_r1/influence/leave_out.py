"""Examples that lie in a probing set, scored against its direction without them (`influence.exclude_self`).

A direction is v_c = H^-1 (1/M) sum_z g_z over the M windows of P_c. Without one of them, x, it gives

    <v_c^{-x}, g_x> = (M <v_c, g_x> - <H^-1 g_x, g_x>) / (M - 1)

exactly, where H is diagonal and measured on something else: none, or Adam's second moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_r1.influence.curvature import adam_scale
from megatron_r1.influence.datainf import Gradient
from megatron_r1.influence.passes import squared_norm


def own_products(kind: str, checkpoint: Path, gradients: Iterator[Gradient], gpt: Any) -> Tensor:
    """<H^-1 g, g> of each gradient g: float64 [N], the same on all ranks of a model copy.

    `kind`: identity or adam. `gradients`: whole ones, this rank's shard.
    """
    root: Gradient = {}
    if kind == "adam":
        root = {name: scale.sqrt_() for name, scale in adam_scale(checkpoint, gpt).items()}
    found = [
        squared_norm({name: g / root[name] if root else g for name, g in gradient.items()}, gpt)
        for gradient in gradients
    ]
    return torch.tensor(found, dtype=torch.float64)


def without_own(score_NC: Tensor, own_N: Tensor, shared_NC: Tensor, size_C: Tensor) -> Tensor:
    """Scores [N, C] with each example left out of the directions that hold it.

    `own_N`: <H^-1 g, g>, read where any of `shared_NC` is true. `size_C`: M, at least 2 where shared.
    """
    left_NC = (size_C * score_NC - own_N[:, None]) / (size_C - 1)
    return torch.where(shared_NC, left_NC, score_NC)
