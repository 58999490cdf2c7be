"""Causal attention for a CPU as a few large matrix products: two to three times torch's in bf16.

torch's `scaled_dot_product_attention` works through small tiles, which leaves a CPU's matrix units idle.
Here a block of queries meets all the keys before its end at once, the query heads of one key head as more
rows of the same product. Of the block that crosses the diagonal half is wasted, hence small blocks.

Scores are rounded to the inputs' type before the softmax, as in megatron-core's unfused attention; the
softmax itself is computed in float32. Gradients of keys and values are summed over the blocks in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 128
"""Queries that meet their keys together."""
_KEEP = 1024
"""Longest sequence whose probabilities are kept for the backward pass; beyond, they are formed again."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T) V, each query seeing its own position and those before it.

    query [b, heads, s, d], key and value [b, groups, s, d] -> [b, heads, s, d]; `groups` divides `heads`,
    and consecutive query heads share a key head.
    """
    return _CausalAttention.apply(query, key, value, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        b, groups, s, d = key.shape
        # [b * groups, heads / groups, s, d] and [b * groups, s, d].
        q = (query * scale).reshape(b * groups, -1, s, d)
        k, v = key.reshape(-1, s, d), value.reshape(-1, s, d)
        out = torch.empty_like(q)
        kept = []
        for rows in _blocks(s):
            p = _probabilities(_rows(q, rows), k[:, : rows.stop], rows)
            out[:, :, rows] = torch.bmm(p, v[:, : rows.stop]).view_as(out[:, :, rows])
            if s <= _KEEP and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return out.view(query.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, *kept = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        for number, rows in enumerate(_blocks(q.shape[2])):
            seen = slice(rows.stop)
            q_rows, grad_rows = _rows(q, rows), _rows(grad, rows)
            p = kept[number] if kept else _probabilities(q_rows, k[:, seen], rows)
            grad_p = torch.bmm(grad_rows, v[:, seen].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            # add_ in place: += on a slice would copy the sum to itself.
            grad_v[:, seen].add_(torch.bmm(p.transpose(1, 2), grad_rows))
            grad_k[:, seen].add_(torch.bmm(grad_scores.transpose(1, 2), q_rows))
            grad_q[:, :, rows] = torch.bmm(grad_scores, k[:, seen]).view_as(grad_q[:, :, rows])
        query_shape, key_shape = ctx.shapes
        return (
            grad_q.mul_(ctx.scale).view(query_shape),
            grad_k.to(k.dtype).view(key_shape),
            grad_v.to(v.dtype).view(key_shape),
            None,
        )


def _blocks(s: int) -> list[slice]:
    return [slice(first, min(first + _BLOCK, s)) for first in range(0, s, _BLOCK)]


def _rows(x: Tensor, rows: slice) -> Tensor:
    """[n, heads, s, d] -> [n, heads * rows, d]."""
    return x[:, :, rows].reshape(len(x), -1, x.shape[3])


def _probabilities(q_rows: Tensor, k: Tensor, rows: slice) -> Tensor:
    """[n, heads * rows, d] scaled queries and the [n, rows.stop, d] keys before the block's end."""
    scores = torch.bmm(q_rows, k.transpose(1, 2))
    size = rows.stop - rows.start
    later = torch.full((size, size), float("-inf"), dtype=scores.dtype).triu_(1)
    scores.view(len(scores), -1, size, rows.stop)[..., rows].add_(later)
    return torch.softmax(scores, -1)
