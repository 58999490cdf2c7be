"""KL divergence from a teacher's distribution over the vocabulary, also where that is sharded."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def kl_divergence(student_NV: Tensor, teacher_NV: Tensor, group: Any = None) -> Tensor:
    """KL(teacher || student) of each row, nats, float32 [...]; gradients reach the student's logits only.

    Logits [..., V], or with `group`, the tensor-parallel group, each rank's consecutive shard of them.
    Memory: one more tensor of the student's logits' size, kept for the backward pass.
    """
    return _KlDivergence.apply(student_NV, teacher_NV.detach(), group)


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, group: Any) -> Tensor:
        if group is not None and group.size() == 1:
            group = None
        log_student, log_teacher = _log_softmax(student_NV, group), _log_softmax(teacher_NV, group)
        teacher = log_teacher.exp()
        loss_N = (teacher * (log_teacher - log_student)).sum(-1)
        if group is not None:
            dist.all_reduce(loss_N, group=group)
        # The gradient of the student's logits: softmax(student) - softmax(teacher).
        ctx.save_for_backward((log_student.exp_() - teacher).to(student_NV.dtype))
        return loss_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (difference_NV,) = ctx.saved_tensors
        return difference_NV * grad_N[..., None].to(difference_NV.dtype), None, None


def _log_softmax(logits_NV: Tensor, group: Any) -> Tensor:
    """This rank's shard of the log-probabilities, float32."""
    logits_NV = logits_NV.float()
    if group is None:
        return logits_NV.log_softmax(-1)
    max_N = logits_NV.amax(-1, keepdim=True)
    dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
    shifted_NV = logits_NV - max_N
    sum_N = shifted_NV.exp().sum(-1, keepdim=True)
    dist.all_reduce(sum_N, group=group)
    return shifted_NV - sum_N.log()
