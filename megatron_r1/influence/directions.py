"""Mean gradients of probing sets on disk while a checkpoint is scored, so that a kill does not cost them.

    RUN/influence/step_N/.directions/HASH/tensor_0.pipeline_0.pt    this rank's shard, float32

The hash is of all that decides a direction's bits, the layout included. Curvature is applied after reading.
The files go when the checkpoint's scores are complete: three directions of a model are as large as an
optimizer's state.

An example that lies in a probing set is scored against the direction without it (`influence.exclude_self`).
A direction is v_c = H^-1 (1/M) sum_z g_z over the M windows of P_c. Without one of them, x, it gives

    <v_c^{-x}, g_x> = (M <v_c, g_x> - <H^-1 g_x, g_x>) / (M - 1)

exactly, where H is diagonal and measured on something else: none, or Adam's second moment.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.config import ParallelConfig
from megatron_r1.influence.curvature import adam_scale
from megatron_r1.influence.datainf import Gradient
from megatron_r1.influence.passes import squared_norm
from megatron_r1.parallel import ParallelContext
from megatron_r1.system.files import replacing

# isort: split
from megatron.core import parallel_state

_DECIDING = ("probe_examples", "seed", "loss", "layers")
"""Of the manifest's section `influence`."""


class DirectionCache:
    """Of one checkpoint. Every rank of the launch calls the same methods; they share the directory.

    `inputs`: the manifest of any of the checkpoint's parts.
    """

    def __init__(
        self,
        directory: Path,
        inputs: Mapping[str, Any],
        micro_batch: int,
        parallel: ParallelConfig,
        context: ParallelContext,
    ):
        self._root, self._context, self._hashes = directory / ".directions", context, inputs["directions"]
        self._key = {
            **{name: inputs[name] for name in ("weights", "seq_length", "eod", "precision")},
            **{name: inputs["influence"][name] for name in _DECIDING},
            "layout": [parallel.tensor, parallel.pipeline, parallel.context, parallel.sequence],
            # Which rows are added up together.
            "batch": [micro_batch, context.data_size],
        }

    def load(self, capability: str) -> dict[str, torch.Tensor] | None:
        """A direction's shard; None, on all ranks, where any has to compute it."""
        path = self._path(capability)
        there = torch.tensor(int(path.is_file()), device=backend.device())
        dist.all_reduce(there, dist.ReduceOp.MIN)
        if not there.item():
            return None
        return torch.load(path, map_location=backend.device(), weights_only=True)

    def save(self, capability: str, gradient: dict[str, torch.Tensor]) -> None:
        """Of several ranks that hold the same shard, the first writes it."""
        if self._context.data_rank == 0 and parallel_state.get_context_parallel_rank() == 0:
            path = self._path(capability)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                torch.save({name: t.cpu() for name, t in gradient.items()}, stream)

    def clear(self) -> None:
        """Called by one rank, once nobody will ask again."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _path(self, capability: str) -> Path:
        key = json.dumps([self._key, capability, self._hashes[capability]])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        shard = f"tensor_{self._context.tensor_rank}.pipeline_{self._context.pipeline_rank}"
        return self._root / digest / f"{shard}.pt"


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
