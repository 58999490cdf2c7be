"""The model's parameters under parallelism: names, shards, the tied copy, and sums over ranks.

Names are megatron-core's, with layers numbered through the whole model in every pipeline layout. The tied
embedding is one parameter under one name. Scores sum its two uses, look-up and head.

Tensor parallelism shards matrices and replicates norm weights (`split_axis`). A pipeline's first and last
stage each hold a copy of the tied embedding. Sums over the model count the first stage's copy. `select`
serves `--check`, which runs without torch, so functions on tensors import torch when they are called.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_r1.system.errors import suggest

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

Gradient = dict[str, "Tensor"]
"""Name in the whole model -> gradient of this rank's shard, float32; selected parameters only."""
Directions = dict[str, "Tensor"]
"""Name in the whole model -> float32 [C, *shape of this rank's shard]; selected parameters only."""

_PIECE = 128
"""Products that float32 sums one after the other."""

EMBEDDING = "embedding.word_embeddings.weight"
_LINEAR = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
_KINDS = {"all": ("*",), "linear": tuple(f"*.{name}" for name in _LINEAR), "embedding": (EMBEDDING,)}


def parameter_names(num_layers: int) -> list[str]:
    """Names of a model's parameters, the same in every layout."""
    layers = [f"decoder.layers.{n}.{name}" for n in range(num_layers) for name in (*_LINEAR, *_NORMS)]
    return [EMBEDDING, *layers, "decoder.final_layernorm.weight"]


def select(layers: str | Sequence[str], num_layers: int) -> list[str]:
    """Names selected by "all", "linear" (the layers' matrices), "embedding" or globs over names.

    Raises ValueError, with a similar name, for a glob that selects nothing.
    """
    names = parameter_names(num_layers)
    chosen: set[str] = set()
    globs = [layers] if isinstance(layers, str) else list(layers)
    if not globs:
        raise ValueError("influence.layers is empty; use all, linear, embedding or names")
    for given in globs:
        matches = {name for glob in _KINDS.get(given, (given,)) for name in fnmatch.filter(names, glob)}
        if not matches:
            raise ValueError(
                f"influence.layers={given!r} selects no parameter{suggest(given, [*_KINDS, *names])}. Use "
                f"{', '.join(_KINDS)}, or globs over whole names: *mlp*, decoder.layers.0.*"
            )
        chosen |= matches
    return [name for name in names if name in chosen]


def split_axis(name: str) -> int | None:
    """The axis that tensor parallelism divides. None: every rank has the whole parameter."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


def whole_shape(name: str, shape: Sequence[int], ranks: int) -> list[int]:
    """Shape of a parameter of which each of `ranks` tensor-parallel ranks has a shard of `shape`."""
    return [size * ranks if axis == split_axis(name) else size for axis, size in enumerate(shape)]


def shard_of_axis(name: str, axis: int, whole_XK: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """A tensor-parallel rank's rows of `whole_XK`, which has a row for each place of a parameter's axis."""
    if axis != split_axis(name):
        return whole_XK
    # Both halves of a SwiGLU's first matrix, gate and up, are sharded by themselves.
    halves = 2 if name.endswith("linear_fc1.weight") else 1
    k = whole_XK.shape[1]
    return whole_XK.reshape(halves, ranks, -1, k)[:, rank].reshape(-1, k)


def local_names(gpt: Any) -> dict[str, str]:
    """Name in the whole model -> name in this rank's GPTModel, for each of its parameters."""
    numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(gpt.decoder.layers)}
    out = {}
    for local, _ in gpt.named_parameters():
        parts = local.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = numbers[parts[2]]
        # The last stage's copy of the tied embedding.
        out[EMBEDDING if parts[0] == "output_layer" else ".".join(parts)] = local
    return out


def named_parameters(gpt: Any) -> dict[str, Parameter]:
    """This rank's parameters by their name in the whole model."""
    return {name: gpt.get_parameter(local) for name, local in local_names(gpt).items()}


def sharded_and_replicated(tensors: Mapping[str, Tensor], gpt: Any) -> tuple[Gradient, Gradient]:
    """The tensors of sharded and of replicated parameters, without the last stage's copy of the embedding."""
    counted = {name: t for name, t in tensors.items() if name != EMBEDDING or gpt.pre_process}
    sharded = {name: t for name, t in counted.items() if split_axis(name) is not None}
    return sharded, {name: t for name, t in counted.items() if name not in sharded}


def sum_over_model(sharded: Tensor, replicated: Tensor) -> Tensor:
    """Sum of numbers from sharded and from replicated parameters over the ranks of a model copy.

    The result is the same on all of these ranks.
    """
    from megatron_r1.parallel import sum_over

    return sum_over("pipeline", sum_over("tensor", sharded) + replicated)


def sum_over_shards(part_LX: Tensor, names: Sequence[str]) -> Tensor:
    """Sums of numbers of each of the parameters `names` over tensor-parallel ranks.

    Replicated parameters count once.
    """
    from megatron.core import parallel_state as ps

    from megatron_r1.parallel import sum_over

    if ps.get_tensor_model_parallel_rank():
        part_LX[[number for number, name in enumerate(names) if split_axis(name) is None]] = 0
    return sum_over("tensor", part_LX) if len(names) else part_LX


def whole_mean(name: str, shard: Tensor) -> float:
    """Mean of the elements of a whole parameter, from this rank's shard."""
    from megatron.core import parallel_state as ps

    from megatron_r1.parallel import sum_over

    mean = shard.double().mean()
    if split_axis(name) is not None:
        sum_over("tensor", mean)
        mean /= ps.get_tensor_model_parallel_world_size()
    return float(mean)


def squared_norm(gradient: Gradient, gpt: Any) -> float:
    """Squared norm of the whole model's gradient, from each rank's shard. The same on all ranks."""
    import torch

    from megatron_r1 import backend
    from megatron_r1.parallel import sum_over

    parts_2 = torch.zeros(2, dtype=torch.float64, device=backend.device())
    for number, part in enumerate(sharded_and_replicated(gradient, gpt)):
        for g in part.values():
            parts_2[number] += g.double().square().sum()
    sum_over("tensor", parts_2[:1])
    return float(sum_over("pipeline", parts_2).sum())


def product(left_KL: Tensor, right_KR: Tensor, piece: int = _PIECE) -> Tensor:
    """sum_k left_k right_k^T, [.., L, R]: float32 sums `piece` products in order, and pairs of such sums.

    The error of one sum in order grows with the root of its length, and exceeds the scores' sixth digit. bf16
    is summed in one product, which rounds its result once.
    """
    half = left_KL.shape[-2] // 2
    if half * 2 <= piece or left_KL.dtype.itemsize < 4:
        return left_KL.mT @ right_KR
    total_LR = product(left_KL[..., :half, :], right_KR[..., :half, :], piece)
    return total_LR.add_(product(left_KL[..., half:, :], right_KR[..., half:, :], piece))


def times(x_SBK: Tensor, matrix_KR: Tensor) -> Tensor:
    """x M, [S, B, R], summed as `product` does, in pieces of twice the length: errors of tokens average."""
    return product(x_SBK.flatten(0, 1).T, matrix_KR, 2 * _PIECE).unflatten(0, x_SBK.shape[:2])


def dots(many_CX: Tensor, one_X: Tensor) -> Tensor:
    """<v_c, g> of C float32 tensors v with another, float64 [C]. torch sums pairwise, and `mv` in order."""
    import torch

    return torch.stack([(v_X * one_X).sum(-1).double().sum() for v_X in many_CX])


def complete_gradient(p: Parameter, gradient: Tensor) -> None:
    """Sum partial gradients over the ranks of a model copy, in place."""
    from megatron_r1.parallel import sum_over

    if getattr(p, "sequence_parallel", False):
        sum_over("tensor", gradient)
    # The first and the last stage hold a copy of the tied embedding each, and a use of it each.
    if getattr(p, "shared_embedding", False):
        sum_over("embedding", gradient)
