"""The row functions of model/divergence.py for a GPU, in Triton.

All compute in float32 and round once, where they store. None adds atomically, so results repeat bit for bit.
This file imports triton: ask `backend.has_triton()` before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INFINITY = tl.constexpr(float("inf"))
_BLOCK = 2048
"""Logits of a row that a program holds at a time: 8 a thread, 128 bits in bf16."""


@triton.jit
def divergence_statistics_kernel(
    student_ptr, teacher_ptr, out_ptr, rows, inverse,
    V: tl.constexpr, BLOCK: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """A row a program, read twice: for its largest logits and for the sums, of which a thread has its own."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * V
    teacher_ptr += row * V
    out_ptr += row
    lane = tl.arange(0, BLOCK)
    most_s = tl.full((BLOCK,), -_INFINITY, tl.float32)
    most_t = tl.full((BLOCK,), -_INFINITY, tl.float32)
    for first in range(0, V, BLOCK):
        inside = first + lane < V
        z_s = tl.load(student_ptr + first + lane, mask=inside, other=-_INFINITY)
        most_s = tl.maximum(most_s, z_s.to(tl.float32))
        if TEACHER:
            z_t = tl.load(teacher_ptr + first + lane, mask=inside, other=-_INFINITY)
            most_t = tl.maximum(most_t, z_t.to(tl.float32))
    max_s, max_t = tl.max(most_s, 0), tl.max(most_t, 0)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_1 = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    entropy = tl.zeros((BLOCK,), tl.float32)
    difference = tl.zeros((BLOCK,), tl.float32)
    place = tl.full((BLOCK,), V, tl.int32)
    for first in range(0, V, BLOCK):
        inside = first + lane < V
        own = tl.load(student_ptr + first + lane, mask=inside, other=0.0).to(tl.float32) - max_s
        sum_s += tl.where(inside, tl.exp(own * inverse), 0.0)
        sum_1 += tl.where(inside, tl.exp(own), 0.0)
        if TEACHER:
            its = tl.load(teacher_ptr + first + lane, mask=inside, other=0.0).to(tl.float32) - max_t
            e = tl.where(inside, tl.exp(its * inverse), 0.0)
            sum_t += e
            entropy += e * (its * inverse)
            difference += e * ((its - own) * inverse)
            place = tl.minimum(place, tl.where(inside & (its == 0), first + lane, V))
    total_s = tl.sum(sum_s, 0)
    # The largest of numbers may pass over NaN, a sum does not.
    tl.store(out_ptr, tl.where(total_s == total_s, max_s, total_s))
    tl.store(out_ptr + rows, total_s)
    tl.store(out_ptr + 6 * rows, tl.sum(sum_1, 0))
    if TEACHER:
        total_t = tl.sum(sum_t, 0)
        at = tl.min(place, 0)
        tl.store(out_ptr + 2 * rows, tl.where(total_t == total_t, max_t, total_t))
        tl.store(out_ptr + 3 * rows, total_t)
        tl.store(out_ptr + 4 * rows, tl.sum(entropy, 0))
        tl.store(out_ptr + 5 * rows, tl.sum(difference, 0))
        picked = tl.load(student_ptr + at, mask=at < V, other=0.0).to(tl.float32)
        tl.store(out_ptr + 7 * rows, tl.where(total_t == total_t, picked, total_t))


@triton.jit
def divergence_gradient_kernel(
    student_ptr, teacher_ptr, max_s_ptr, max_t_ptr, inverse, a_ptr, b_ptr, c_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, TEACHER: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    student_ptr += row * V
    own = tl.load(student_ptr + column, mask=inside, other=0.0).to(tl.float32) - tl.load(max_s_ptr + row)
    value = tl.load(a_ptr + row) * tl.exp(own * inverse)
    if TEACHER:
        z_t = tl.load(teacher_ptr + row * V + column, mask=inside, other=0.0).to(tl.float32)
        value -= tl.load(b_ptr + row) * tl.exp((z_t - tl.load(max_t_ptr + row)) * inverse)
    if ONE:
        value += tl.load(c_ptr + row) * tl.exp(own)
    tl.store(student_ptr + column, value.to(student_ptr.dtype.element_ty), mask=inside)


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


def statistics(student_NV: Tensor, teacher_NV: Tensor | None, inverse: float) -> Tensor:
    """As `model.divergence.statistics`, float32 [8, N]."""
    rows, width = student_NV.shape
    teacher = student_NV if teacher_NV is None else teacher_NV
    assert student_NV.is_contiguous() and teacher.is_contiguous() and teacher.shape == student_NV.shape
    out_8N = student_NV.new_zeros(8, rows, dtype=torch.float32)
    words = rows, inverse, width, _block(width), teacher_NV is not None
    divergence_statistics_kernel[(rows,)](student_NV, teacher, out_8N, *words, num_warps=8)
    return out_8N


def gradient(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    max_s_N: Tensor,
    max_t_N: Tensor | None,
    inverse: float,
    a_N: Tensor,
    b_N: Tensor | None,
    c_N: Tensor | None,
) -> None:
    """As `model.divergence.gradient`, in place."""
    rows, width = student_NV.shape
    # What is absent is not read.
    teacher, max_t, b, c = (a_N if x is None else x for x in (teacher_NV, max_t_N, b_N, c_N))
    numbers = [x.float().contiguous() for x in (max_s_N, max_t, a_N, b, c)]
    assert student_NV.is_contiguous() and (teacher_NV is None or teacher.is_contiguous())
    divergence_gradient_kernel[(rows, triton.cdiv(width, _block(width)))](
        student_NV, teacher, *numbers[:2], inverse, *numbers[2:], width, _block(width),
        teacher_NV is not None, c_N is not None, num_warps=8,
    )  # fmt: skip
