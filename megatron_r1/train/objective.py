"""Objectives of a training step, a loss for every label of a batch: cross-entropy, or KL from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.records import Batch

# isort: split
from megatron.core import parallel_state as ps

Objective = Callable[[Any, Batch], Tensor]
"""(model, batch) -> loss [B, S] on the last pipeline stage, elsewhere what the model hands on."""


def next_token(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, nats."""
    return model(batch.tokens_BS, batch.position_BS, batch.documents, labels=batch.labels_BS)


class Distillation:
    """KL(teacher || student) of each next-token distribution (paper, mid-training).

    `teacher`: batch -> logits [B, S, V], under tensor parallelism this rank's shard of the vocabulary.
    It is frozen: no gradient is taken through it. ValueError under pipeline parallelism, where no stage
    but the last has a distribution to compare.
    """

    def __init__(self, teacher: Callable[[Batch], Tensor]):
        if ps.get_pipeline_model_parallel_world_size() > 1:
            raise ValueError(
                "a teacher's logits are compared with the student's on one stage: set parallel.pipeline=1"
            )
        self._teacher = teacher

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher_BSV = self._teacher(batch)
        student_BSV = model(batch.tokens_BS, batch.position_BS, batch.documents)
        return kl_divergence(student_BSV, teacher_BSV, ps.get_tensor_model_parallel_group())


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
