"""DataInf: the inverse of each parameter's damped mean of outer products g g^T, in closed form.

    lambda_l  = 0.1 / (n d_l) sum_i |g_il|^2                                   d_l numbers in parameter l
    H_l^-1 v ~ 1 / (n lambda_l) sum_i ( v - <g_il, v> / (lambda_l + |g_il|^2) g_il )

over the gradients g_i of n examples. Each is one pass of a single example, twice: once for lambda, once for
the sum. Whole gradients exist for one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.influence.methods import Directions
from megatron_r1.influence.passes import complete_gradient, named_parameters, run_passes
from megatron_r1.parallel import ParallelContext, sum_over
from megatron_r1.records import Batch

_DAMPING = 0.1

Gradient = dict[str, Tensor]


def apply_inverse(
    directions: Directions,
    gradients: Callable[[], Iterator[Gradient]],
    examples: int,
    gpt: Any,
    context: ParallelContext,
) -> None:
    """v_c <- H^-1 v_c in place, on this rank's shard.

    `gradients`: this data-parallel rank's share of the gradients of `examples` examples, the same at every
    call, as many on every rank (zeros fill up).
    """
    mine = {name: p for name, (_, p) in named_parameters(gpt).items() if name in directions}
    sharded_L = torch.tensor([getattr(p, "tensor_model_parallel", False) for p in mine.values()])
    sharded_L = sharded_L.to(backend.device())
    ranks_L = torch.where(sharded_L, context.tensor_size, 1)
    size_L = torch.tensor([p.numel() for p in mine.values()], device=backend.device()) * ranks_L

    def whole(part_LX: Tensor) -> Tensor:
        """Sums over shards; what every tensor-parallel rank has alike is counted once."""
        if len(part_LX):
            sum_over("tensor", part_LX)
        return part_LX / (context.tensor_size / ranks_L)[:, None]

    total_L1 = torch.zeros(len(mine), 1, dtype=torch.float64, device=backend.device())
    for gradient in gradients():
        total_L1 += whole(_products(mine, gradient, {n: g[None] for n, g in gradient.items()}, 1))
    sum_over("data", total_L1)
    damping_L = _DAMPING * total_L1[:, 0] / (examples * size_L)
    if bool((damping_L <= 0).any()):
        zero = [name for name, damping in zip(mine, damping_L, strict=True) if damping <= 0]
        raise ValueError(
            f"influence.curvature=datainf: {examples} examples have no gradient of {', '.join(zero[:4])}; "
            f"raise influence.curvature_examples or leave these out of influence.layers"
        )
    capabilities = len(next(iter(directions.values()), ()))
    sums = {name: torch.zeros_like(direction) for name, direction in directions.items()}
    for gradient in gradients():
        square_L = whole(_products(mine, gradient, {n: g[None] for n, g in gradient.items()}, 1))[:, 0]
        dot_LC = whole(_products(mine, gradient, directions, capabilities))
        share_LC = (dot_LC / (damping_L + square_L)[:, None]).float()
        for share_C, (name, total) in zip(share_LC, sums.items(), strict=True):
            total += torch.tensordot(share_C[:, None], gradient[name][None], dims=1)
    for damping, (name, total) in zip(damping_L, sums.items(), strict=True):
        directions[name] -= sum_over("data", total) / examples
        directions[name] /= damping.float()


def _products(mine: dict[str, Any], gradient: Gradient, others: Gradient, columns: int) -> Tensor:
    """<g_l, w_l> for each of the `columns` tensors w_l in `others`: float64 [L, columns]."""
    rows = [(others[name].flatten(1) @ gradient[name].flatten()).double() for name in mine]
    empty = torch.zeros(0, columns, dtype=torch.float64, device=backend.device())
    return torch.stack(rows) if rows else empty


def example_gradients(
    model: Any,
    gpt: Any,
    names: frozenset[str],
    batches: Iterator[Batch],
    seq_length: int,
) -> Iterator[Gradient]:
    """Whole gradients of the loss of single rows, float32, this rank's shard; batches are of one row."""
    mine = {name: p for name, (_, p) in named_parameters(gpt).items()}
    for batch in batches:
        run_passes(model, iter([batch]), 1, 1, seq_length)
        gradient = {}
        for name, p in mine.items():
            if name in names:
                found = torch.zeros_like(p) if p.grad is None else p.grad
                gradient[name] = found.float()
                complete_gradient(p, gradient[name])
                sum_over("context", gradient[name])
            p.grad = None
        yield gradient
