"""The row functions of model/divergence.py for a CPU: fp32 and bf16 logits, by csrc/divergence.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_r1 import _csrc


def takes(dtype: torch.dtype) -> bool:
    """Whether logits of this type can be given."""
    return dtype in (torch.float32, torch.bfloat16)


def statistics(student_NV: Tensor, teacher_NV: Tensor | None, inverse: float) -> Tensor:
    """As `model.divergence.statistics`, float32 [8, N]. The logits of a row lie in order."""
    logits = _array(student_NV), _array(teacher_NV)
    return torch.from_numpy(_csrc.divergence_statistics(*logits, inverse, torch.get_num_threads()))


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
    logits_and_largest = map(_array, (student_NV, teacher_NV, max_s_N, max_t_N))
    numbers = map(_array, (a_N, b_N, c_N))
    _csrc.divergence_gradient(*logits_and_largest, inverse, *numbers, torch.get_num_threads())


def _array(x: Tensor | None) -> Any:
    """The tensor's memory as an array; of bf16 the bits."""
    return None if x is None else (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).detach().numpy()
