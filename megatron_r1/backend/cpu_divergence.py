"""The row functions of model/divergence.py for a CPU: fp32 and bf16 logits, by csrc/divergence.hpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_r1 import _csrc


def takes(x: Tensor) -> bool:
    """Whether such logits can be given. A subclass may have no numbers, but only count its memory."""
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def statistics(student_NV: Tensor, teacher_NV: Tensor | None, inverse: float) -> Tensor:
    """As `model.divergence.statistics`, float32 [8, N]. The logits of a row lie in order."""
    operands = map(_array, (student_NV, teacher_NV, inverse))
    return torch.from_numpy(_csrc.divergence_statistics(*operands, torch.get_num_threads()))


def gradient(*operands: Tensor | float | None) -> None:
    """As `model.divergence.gradient`, in place."""
    _csrc.divergence_gradient(*map(_array, operands), torch.get_num_threads())


def _array(x: Tensor | float | None) -> Any:
    """A tensor's memory as an array, of bf16 the bits; else x."""
    if not isinstance(x, Tensor):
        return x
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).detach().numpy()
