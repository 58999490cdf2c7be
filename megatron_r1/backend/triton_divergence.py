"""The row functions of model/divergence.py for a GPU, in Triton.

All compute in float32 and round once, where they store. None adds atomically, so results repeat bit for bit.
This file imports triton: ask `backend.has_triton()` before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
"""Logits of a row that a program holds at a time: 8 a thread, 128 bits in bf16."""


@triton.jit
def _load(row_ptr, column, V: tl.constexpr, absent: tl.constexpr):
    return tl.load(row_ptr + column, mask=column < V, other=absent).to(tl.float32)


@triton.jit
def divergence_statistics_kernel(
    student_ptr, teacher_ptr, out_ptr, rows, inverse, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row a program, read twice: for its largest logits and for the sums, of which a thread has its own."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr, out_ptr = student_ptr + row * V, out_ptr + row
    most_s = tl.full((BLOCK,), float("-inf"), tl.float32)
    zeros = tl.zeros((BLOCK,), tl.float32)
    most_t, sum_s, sum_1, sum_t, entropy, difference = most_s, zeros, zeros, zeros, zeros, zeros
    place = tl.full((BLOCK,), V, tl.int32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        most_s = tl.maximum(most_s, _load(student_ptr, column, V, float("-inf")))
        if teacher_ptr is not None:
            most_t = tl.maximum(most_t, _load(teacher_ptr + row * V, column, V, float("-inf")))
    max_s, max_t = tl.max(most_s, 0), tl.max(most_t, 0)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        own = _load(student_ptr, column, V, 0.0) - max_s
        sum_s += tl.where(column < V, tl.exp(own * inverse), 0.0)
        sum_1 += tl.where(column < V, tl.exp(own), 0.0)
        if teacher_ptr is not None:
            its = _load(teacher_ptr + row * V, column, V, 0.0) - max_t
            e = tl.where(column < V, tl.exp(its * inverse), 0.0)
            sum_t, entropy = sum_t + e, entropy + e * (its * inverse)
            difference += e * ((its - own) * inverse)
            place = tl.minimum(place, tl.where((its == 0) & (column < V), column, V))
    total = tl.sum(sum_s, 0)
    # The largest of numbers may pass over NaN, a sum does not.
    tl.store(out_ptr, tl.where(total == total, max_s, total))
    tl.store(out_ptr + rows, total)
    tl.store(out_ptr + 6 * rows, tl.sum(sum_1, 0))
    if teacher_ptr is not None:
        total, at = tl.sum(sum_t, 0), tl.min(place, 0)
        tl.store(out_ptr + 2 * rows, tl.where(total == total, max_t, total))
        tl.store(out_ptr + 3 * rows, total)
        tl.store(out_ptr + 4 * rows, tl.sum(entropy, 0))
        tl.store(out_ptr + 5 * rows, tl.sum(difference, 0))
        tl.store(out_ptr + 7 * rows, tl.where(total == total, _load(student_ptr, at, V, 0.0), total))


@triton.jit
def divergence_gradient_kernel(
    student_ptr, teacher_ptr, max_s_ptr, max_t_ptr, inverse, a_ptr, b_ptr, c_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    student_ptr += row * V
    own = _load(student_ptr, column, V, 0.0) - tl.load(max_s_ptr + row)
    value = tl.load(a_ptr + row) * tl.exp(own * inverse)
    if teacher_ptr is not None:
        its = _load(teacher_ptr + row * V, column, V, 0.0) - tl.load(max_t_ptr + row)
        value -= tl.load(b_ptr + row) * tl.exp(its * inverse)
    if c_ptr is not None:
        value += tl.load(c_ptr + row) * tl.exp(own)
    tl.store(student_ptr + column, value.to(student_ptr.dtype.element_ty), mask=column < V)


def statistics(student_NV: Tensor, teacher_NV: Tensor | None, inverse: float) -> Tensor:
    """As `model.divergence.statistics`, float32 [8, N]. Logits are contiguous."""
    rows, width = student_NV.shape
    assert student_NV.is_contiguous() and (teacher_NV is None or teacher_NV.is_contiguous())
    out_8N = student_NV.new_zeros(8, rows, dtype=torch.float32)
    words = rows, inverse, width, min(_BLOCK, triton.next_power_of_2(width))
    divergence_statistics_kernel[(rows,)](student_NV, teacher_NV, out_8N, *words, num_warps=8)
    return out_8N


def gradient(student_NV: Tensor, teacher_NV: Tensor | None, *numbers: Tensor | float | None) -> None:
    """As `model.divergence.gradient`, in place. Logits and numbers are contiguous."""
    operands = student_NV, teacher_NV, *numbers
    assert all(x.is_contiguous() for x in operands if isinstance(x, Tensor))
    rows, width = student_NV.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    divergence_gradient_kernel[(rows, triton.cdiv(width, block))](*operands, width, block, num_warps=8)
