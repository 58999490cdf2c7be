"""Weight gradients summed right where DistributedDataParallel keeps them, without a copy between."""

from __future__ import annotations

from typing import Any

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
