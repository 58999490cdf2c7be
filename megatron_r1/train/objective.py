"""What a training step minimises: a loss for every label of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_r1.model.divergence import kl_divergence
from megatron_r1.records import Batch

# isort: split
from megatron.core import parallel_state as ps

Objective = Callable[[Any, Batch], Tensor]
"""(model, batch) -> loss [B, S] on the last pipeline stage, elsewhere what the model hands on."""


def next_token(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, nats."""
    return model(batch.tokens_BS, batch.position_BS, batch.segment_BS, labels=batch.labels_BS)


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
        student_BSV = model(batch.tokens_BS, batch.position_BS, batch.segment_BS)
        return kl_divergence(student_BSV, teacher_BSV, ps.get_tensor_model_parallel_group())
