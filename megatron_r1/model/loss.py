"""Vocabulary projection and cross-entropy as one operation, whole or in chunks of tokens.

The gradient of token i's logits is g_i (softmax(z_i) - onehot_i), with g_i the gradient of its loss. As g_i
scales a row, it can wait: with m_i the largest logit and s_i = sum exp(z_i - m_i),

    E_i = exp(z_i - m_i) - s_i onehot_i,   dH = a * (E W),   dW = E^T (a * H),   a_i = g_i / s_i

so the logits become E while they lie in the cache, and the backward pass is two matrix products. In chunks
E is formed again instead of kept: a third more products, and the logits of one chunk at a time.

With z-loss, c log^2(sum exp z), the softmax counts b_i = 1 + 2 c log(sum exp z_i) times: s_i becomes
s_i / b_i in both, so that b_i, which bf16 cannot tell from 1, stays in float32.

Under tensor parallelism the rows of W are a shard of the vocabulary; m, s and the label's logit are reduced
over the ranks, and dH is each rank's part of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def main_gradient(weight: Any) -> Tensor | None:
    """The buffer, fp32 or the weight's type, into which a backward pass may add; None without one."""
    if not weight.requires_grad or not hasattr(weight, "grad_added_to_main_grad"):
        return None
    return weight.main_grad


def say_added(weight: Any) -> None:
    """The gradient is in the buffer: return None to autograd, and nothing is added to it again."""
    weight.grad_added_to_main_grad = True
    # Where megatron-core reduces while the backward pass runs, it insists on a gradient to be there.
    weight.grad = weight.new_zeros(()).expand_as(weight)


_ROWS = 16
"""Tokens whose logits pass through the exponential together on a CPU: what its caches hold."""
_FORWARD_CHUNK = 1024
"""Tokens whose logits exist at a time where no gradient is wanted, and chunks cost nothing."""
_STRIPE = 8192
"""Rows of the weight's gradient formed at a time where it is summed in another type: likewise."""


Watch = Callable[[Tensor, Tensor], None]


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    group: Any = None,
    chunk: int | None = None,
    z_loss: float = 0.0,
    kernels: Any = None,
    watch: Watch | None = None,
) -> Tensor:
    """Cross-entropy of softmax(H W^T) against the labels, nats, float32 [N].

    `group`: the tensor-parallel group, whose ranks hold consecutive shards of W; the gradient of H is then
    a part, to be summed over it. `chunk`: tokens whose logits exist at a time; None: all of them, where a
    backward pass is to come. `z_loss` c: the gradient is that of cross-entropy + c log^2(sum exp z), which
    keeps logits from drifting; the value stays the cross-entropy. `kernels`: backend/triton_kernels.py, where
    a GPU can run it; None: the plain form. Both call the same collectives. `watch`: gets dW's factors, a * H
    and E, in the backward pass, for each chunk. A weight that requires no gradient gets none.
    """
    if not torch.is_grad_enabled():
        chunk = chunk or _FORWARD_CHUNK
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, group, chunk, z_loss, kernels, watch)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        group: Any,
        chunk: int | None,
        z_loss: float,
        kernels: Any,
        watch: Watch | None,
    ) -> Tensor:
        tokens, shard = len(hidden_ND), len(weight_VD)
        if group is not None and group.size() > 1:
            # Labels of other ranks' shards fall outside [0, V).
            labels_N = labels_N - group.rank() * shard
        else:
            group = None
        size = min(chunk or tokens, tokens)
        keep = size == tokens and any(ctx.needs_input_grad)
        max_N, sum_N, label_N = hidden_ND.new_empty(3, tokens, dtype=torch.float32)
        for rows in slices(tokens, size):
            logits = hidden_ND[:0]  # the last chunk's go before the next come
            logits = hidden_ND[rows] @ weight_VD.t()
            if kernels is not None:
                # Statistics of one rank are those of all: then the logits need not be read again.
                ours = kernels.row_statistics(logits, labels_N[rows], keep and group is None, z_loss)
                max_N[rows] = reduced(ours[0].clone(), group, dist.ReduceOp.MAX)
                label_N[rows] = reduced(ours[2], group)
                sum_N[rows] = reduced(ours[1] * (ours[0] - max_N[rows]).exp(), group)
                continue
            mine, column = label_columns(labels_N[rows], shard)
            max_N[rows] = reduced(logits.amax(1).float(), group, dist.ReduceOp.MAX)
            label = torch.where(mine, logits.gather(1, column[:, None])[:, 0].float(), 0.0)
            label_N[rows] = reduced(label, group)
            sum_N[rows] = reduced(_exponentiate(logits, max_N[rows]), group)
        normaliser_N = max_N + sum_N.log()
        if z_loss:
            sum_N = sum_N / (1 + 2 * z_loss * normaliser_N)
        if keep and kernels is None:
            _subtract_labels(logits, labels_N, max_N, sum_N, label_N)
        elif keep and group is not None:
            kernels.to_residual(logits, labels_N, max_N, sum_N, label_N)
        ctx.save_for_backward(hidden_ND, labels_N, max_N, sum_N, label_N, logits if keep else None)
        ctx.weight, ctx.size, ctx.kernels, ctx.watch = weight_VD, size, kernels, watch
        return normaliser_N - label_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_ND, labels_N, max_N, sum_N, label_N, kept = ctx.saved_tensors
        weight_VD: Tensor = ctx.weight
        main_VD = main_gradient(weight_VD)
        total_VD = main_VD
        if main_VD is None and ctx.needs_input_grad[1]:
            total_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND)
        for rows in slices(len(hidden_ND), ctx.size):
            hidden, factor = hidden_ND[rows], (grad_N[rows] / sum_N[rows])[:, None]
            residual = hidden[:0] if kept is None else kept  # the last chunk's goes before the next comes
            if kept is None:
                residual = hidden @ weight_VD.t()
                numbers = (labels_N[rows], max_N[rows], sum_N[rows], label_N[rows])
                if ctx.kernels is not None:
                    ctx.kernels.to_residual(residual, *numbers)
                else:
                    _exponentiate(residual, max_N[rows])
                    _subtract_labels(residual, *numbers)
            grad_ND[rows] = (residual @ weight_VD) * factor
            scaled = (hidden * factor).to(hidden.dtype)
            if total_VD is not None:
                add_product(total_VD, residual, scaled)
            if ctx.watch is not None:
                ctx.watch(scaled, residual)
        if main_VD is not None:
            say_added(weight_VD)
            total_VD = None
        return grad_ND, None if total_VD is None else total_VD.to(weight_VD.dtype), *[None] * 6


def slices(length: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def label_columns(labels_N: Tensor, shard: int) -> tuple[Tensor, Tensor]:
    """Whether each label lies in this rank's shard, and a column that is always inside."""
    return (labels_N >= 0) & (labels_N < shard), labels_N.clamp(0, shard - 1)


def reduced(values: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> Tensor:
    if group is not None:
        dist.all_reduce(values, op, group=group)
    return values


def _exponentiate(logits_NV: Tensor, max_N: Tensor) -> Tensor:
    """z -> exp(z - m) in place, computed in float32; the sum of each row, float32 [N]."""
    sum_N = torch.empty_like(max_N)
    for rows in slices(len(logits_NV), _ROWS if logits_NV.device.type == "cpu" else len(logits_NV)):
        part = logits_NV[rows]
        wide = part.float().sub_(max_N[rows, None]).exp_()
        sum_N[rows] = wide.sum(1)
        if wide is not part:
            part.copy_(wide)
    return sum_N


def _subtract_labels(
    exponentials_NV: Tensor,
    labels_N: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    label_N: Tensor,
) -> None:
    """E, in place. At a label's place the difference is formed before it is rounded: it may be small."""
    mine_N, column_N = label_columns(labels_N, exponentials_NV.shape[1])
    value_N = ((label_N - max_N).exp() - sum_N).to(exponentials_NV.dtype)
    # Another rank's label: what is there is written again. To pick the rows, the host would wait for a GPU.
    value_N = torch.where(mine_N, value_N, exponentials_NV.gather(1, column_N[:, None])[:, 0])
    exponentials_NV.scatter_(1, column_N[:, None], value_N[:, None])


def add_product(total_VD: Tensor, residual_NV: Tensor, hidden_ND: Tensor) -> None:
    """total += E^T H, by stripes that the cache holds between product and sum."""
    for stripe in slices(len(total_VD), _STRIPE):
        total_VD[stripe].add_(residual_NV[:, stripe].t() @ hidden_ND)  # += would copy the sum to itself
