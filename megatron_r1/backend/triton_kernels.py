"""Kernels for a GPU, in Triton: cross-entropy over logits, SwiGLU, and norm and rotation of queries and keys.

Each moves its operands once where torch's operations move them three to eight times. All compute in float32
and round once, where they store. None adds atomically, so results repeat bit for bit. Triton compiles a
kernel at its first call and keeps it on disk. This file imports triton: ask `backend.has_triton()` before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def cross_entropy_kernel(
    logits_ptr, label_ptr, max_ptr, sum_ptr, picked_ptr, z_loss,
    V: tl.constexpr, BLOCK: tl.constexpr, STATISTICS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A row a program. Statistics are stored, or those of all ranks are loaded; then the row becomes E."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(label_ptr + row)
    if STATISTICS:
        # Before the loop: its reductions hold every thread back until all have read.
        picked = tl.load(logits_ptr + label, mask=(label >= 0) & (label < V), other=0.0).to(tl.float32)
        largest = -_INFINITY
        total = 0.0
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + column, mask=column < V, other=-_INFINITY).to(tl.float32)
            above = tl.maximum(largest, tl.max(z, 0))
            # Of logits that all are -inf so far, no difference from their largest is a number.
            shift = tl.where(above == -_INFINITY, 0.0, above)
            total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), 0)
            largest = above
        tl.store(max_ptr + row, largest)
        tl.store(sum_ptr + row, total)
        tl.store(picked_ptr + row, picked)
    else:
        largest = tl.load(max_ptr + row)
        total = tl.load(sum_ptr + row)
        picked = tl.load(picked_ptr + row)
    if RESIDUAL:
        total = total / (1 + 2 * z_loss * (largest + tl.log(total)))
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            residual = tl.exp(z - largest)
            # The difference is formed before it is rounded: it may be small.
            residual = tl.where(column == label, tl.exp(picked - largest) - total, residual)
            tl.store(logits_ptr + column, residual.to(logits_ptr.dtype.element_ty), mask=column < V)


def _cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, numbers_3N: Tensor, z_loss: float, **parts: bool
) -> None:
    tokens, vocabulary = logits_NV.shape
    assert logits_NV.is_contiguous() and labels_N.is_contiguous()
    block = min(8192, triton.next_power_of_2(vocabulary))
    warps = max(4, block // 512)
    cross_entropy_kernel[(tokens,)](
        logits_NV, labels_N, *numbers_3N, z_loss, vocabulary, block, **parts, num_warps=warps
    )


def row_statistics(logits_NV: Tensor, labels_N: Tensor, to_residual: bool, z_loss: float) -> Tensor:
    """Of each row m = max z, sum exp(z - m) and the label's logit, 0 for a label outside; float32 [3, N].

    `to_residual`: the logits become E (model/loss.py), with these numbers, in the same pass.
    """
    numbers_3N = logits_NV.new_empty(3, len(logits_NV), dtype=torch.float32)
    _cross_entropy(logits_NV, labels_N, numbers_3N, z_loss, STATISTICS=True, RESIDUAL=to_residual)
    return numbers_3N


def to_residual(logits_NV: Tensor, labels_N: Tensor, max_N: Tensor, sum_N: Tensor, label_N: Tensor) -> None:
    """The logits [N, V] become E of model/loss.py, whose three float32 [N] are those over all ranks."""
    numbers_3N = torch.stack((max_N, sum_N, label_N))
    _cross_entropy(logits_NV, labels_N, numbers_3N, 0.0, STATISTICS=False, RESIDUAL=True)


@triton.jit
def swiglu_kernel(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x_ptr += row * 2 * width
    gate = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(x_ptr, grad_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x_ptr += row * 2 * width
    out_ptr += row * 2 * width
    gate = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    of_gate = grad * up * share * (1 + gate * (1 - share))
    of_up = grad * gate * share
    tl.store(out_ptr + column, of_gate.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + width + column, of_up.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """silu(gate) * up of contiguous x [..., gate, up 2F] -> [..., F]; with its `grad`, the gradient of x."""
    width = x.shape[-1] // 2
    assert x.is_contiguous() and (grad is None or grad.is_contiguous())
    block = min(1024, triton.next_power_of_2(width))
    grid = (x.numel() // (2 * width), triton.cdiv(width, block))
    if grad is None:
        out = x.new_empty(*x.shape[:-1], width)
        swiglu_kernel[grid](x, out, width, block)
    else:
        out = torch.empty_like(x)
        swiglu_backward_kernel[grid](x, grad, out, width, block)
    return out


@triton.jit
def rotation_kernel(
    x_ptr, turn_ptr, out_ptr, batch, eps, GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A block of heads of a token a program; `place` in a group: the queries, the key. Values stay in x."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, place = head // (QUERIES + 1), head % (QUERIES + 1)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (group < GROUPS)[:, None] & (column < HALF)
    source = x_ptr + row * GROUPS * (QUERIES + 2) * 2 * HALF
    source += (group * (QUERIES + 2) + place)[:, None] * 2 * HALF + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first + second * second, 1) / (2 * HALF)
        scale = tl.rsqrt(square + eps)[:, None]
        first *= scale
        second *= scale
    turn = turn_ptr + row // batch * 2 * HALF + column
    cos = tl.load(turn, mask=column < HALF, other=0.0)
    sin = tl.load(turn + HALF, mask=column < HALF, other=0.0)
    position = tl.where(place == QUERIES, GROUPS * QUERIES + group, group * QUERIES + place)
    target = out_ptr + row * GROUPS * (QUERIES + 1) * 2 * HALF + position[:, None] * 2 * HALF + column
    tl.store(target, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _one_of(a_ptr, a, b_ptr, b, c_ptr, c):
    """float32 from the place whose mask is set: the other loads give zeros and move nothing."""
    found = tl.load(a_ptr, mask=a, other=0.0) + tl.load(b_ptr, mask=b, other=0.0)
    return (found + tl.load(c_ptr, mask=c, other=0.0)).to(tl.float32)


@triton.jit
def rotation_backward_kernel(
    x_ptr, turn_ptr, query_ptr, key_ptr, value_ptr, query_s, query_b, query_h, key_s, key_b, key_h,
    value_s, value_b, value_h, out_ptr, batch, eps, GROUPS: tl.constexpr, QUERIES: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """As the forward one; `place` in a group: the queries, the key, the value, whose gradient is copied."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    group, place = (head // (QUERIES + 2))[:, None], (head % (QUERIES + 2))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (group < GROUPS) & (column < HALF)
    s, b = row // batch, row % batch
    query_at = query_ptr + s * query_s + b * query_b + (group * QUERIES + place) * query_h + column
    key_at = key_ptr + s * key_s + b * key_b + group * key_h + column
    value_at = value_ptr + s * value_s + b * value_b + group * value_h + column
    is_query, is_key, is_value = inside & (place < QUERIES), inside & (place == QUERIES), place > QUERIES
    first = _one_of(query_at, is_query, key_at, is_key, value_at, inside & is_value)
    second = _one_of(query_at + HALF, is_query, key_at + HALF, is_key, value_at + HALF, inside & is_value)
    cos = tl.load(turn_ptr + s * 2 * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(turn_ptr + s * 2 * HALF + HALF + column, mask=column < HALF, other=0.0)
    of_first, of_second = first * cos + second * sin, second * cos - first * sin
    offset = row * GROUPS * (QUERIES + 2) * 2 * HALF + head[:, None] * 2 * HALF + column
    if NORM:
        x = tl.load(x_ptr + offset, mask=inside & (place <= QUERIES), other=0.0).to(tl.float32)
        y = tl.load(x_ptr + offset + HALF, mask=inside & (place <= QUERIES), other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1) / (2 * HALF) + eps)[:, None]
        along = tl.sum(of_first * x + of_second * y, 1)[:, None] / (2 * HALF) * scale * scale
        of_first = scale * (of_first - x * along)
        of_second = scale * (of_second - y * along)
    of_first, of_second = tl.where(is_value, first, of_first), tl.where(is_value, second, of_second)
    tl.store(out_ptr + offset, of_first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + offset + HALF, of_second.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(heads: int, half: int) -> tuple[int, int]:
    return min(32, triton.next_power_of_2(heads)), triton.next_power_of_2(half)


def rotate(mixed_SBGHD: Tensor, turn_SD: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """Queries [S, B, G * (H - 2), D] and keys [S, B, G, D] of contiguous H = queries, key, value of G groups.

    Each is divided by its root mean square over D, with `eps`, unless that is None. Then its halves are
    turned: `turn_SD` holds the cosines and then the sines of a token's D / 2 angles, float32. Both results
    are parts of one tensor.
    """
    s, b, groups, parts, d = mixed_SBGHD.shape
    assert mixed_SBGHD.is_contiguous() and turn_SD.is_contiguous() and turn_SD.shape == (s, d), turn_SD.shape
    heads, columns = _tile(groups * (parts - 1), d // 2)
    out = mixed_SBGHD.new_empty(s, b, groups * (parts - 1), d)
    grid = (s * b, triton.cdiv(groups * (parts - 1), heads))
    shape = (groups, parts - 2, d // 2, heads, columns, eps is not None)
    rotation_kernel[grid](mixed_SBGHD, turn_SD, out, b, eps or 0.0, *shape)
    query, key = out.split([groups * (parts - 2), groups], dim=2)
    return query, key


def rotate_backward(
    mixed_SBGHD: Tensor, turn_SD: Tensor, eps: float | None, grads: tuple[Tensor, ...]
) -> Tensor:
    """The gradient of `rotate`'s operand, from those of queries, keys and values [S, B, heads, D]."""
    s, b, groups, parts, d = mixed_SBGHD.shape
    grads_3 = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    strides = [stride for grad in grads_3 for stride in grad.stride()[:3]]
    heads, columns = _tile(groups * parts, d // 2)
    out = torch.empty_like(mixed_SBGHD)
    grid = (s * b, triton.cdiv(groups * parts, heads))
    shape = (groups, parts - 2, d // 2, heads, columns, eps is not None)
    rotation_backward_kernel[grid](mixed_SBGHD, turn_SD, *grads_3, *strides, out, b, eps or 0.0, *shape)
    return out
