"""Objectives of a training step, a loss for every label of a batch: cross-entropy, or KL from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_r1.config import ObjectiveConfig
from megatron_r1.data.loader import Records
from megatron_r1.model.divergence import FIGURES, DenseTarget, SparseTarget
from megatron_r1.parallel import ParallelContext
from megatron_r1.records import Batch

# isort: split
from megatron.core import parallel_state as ps


class Losses(NamedTuple):
    """Losses of a batch's labels, and what an objective has formed besides."""

    loss_BS: Tensor
    total: Tensor | None = None
    """Sum of the losses that count, from which alone gradients flow; None: `loss_BS` has a graph."""
    figures_FBS: Tensor | tuple[()] = ()
    """`figures` of each label, without a graph."""


Objective = Callable[[Any, Batch], Tensor | Losses]
"""(model, batch) -> loss [B, S] on the last pipeline stage, elsewhere what the model hands on."""
Targets = Callable[[Batch], DenseTarget | SparseTarget]
"""A teacher's distribution behind each token of a batch, rows in the order s * B + b."""


class PhaseTeacher(Protocol):
    """The teacher of a phase, opened and not yet loaded."""

    @property
    def identities(self) -> dict[str, str]:
        """Path as configured -> identity of what lies there, alike on all ranks."""

    @property
    def tokens(self) -> int:
        """Ids of the vocabulary, rows that pad it left out."""

    @property
    def records(self) -> Records | None:
        """Looks a batch's records up; None: the teacher runs beside the student."""

    def targets(self, context: ParallelContext) -> Targets:
        """Load what is needed. All ranks call this together."""


def next_token(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, nats."""
    return model(batch.tokens_BS, batch.position_BS, batch.documents, labels=batch.labels_BS)


class Distillation:
    """(1 - weight) CE + temperature^2 weight KL(teacher || student) of each label (paper, mid-training).

    `gpt`: the bare model that is trained. The teacher is frozen: no gradient is taken through it. ValueError
    under pipeline parallelism, where no stage but the last has a distribution to compare.
    """

    figures = FIGURES

    def __init__(self, gpt: Any, targets: Targets, tokens: int, config: ObjectiveConfig):
        if ps.get_pipeline_model_parallel_world_size() > 1:
            raise ValueError("a teacher is compared with the student on one stage: set parallel.pipeline=1")
        self._gpt, self._targets, self._how = gpt, targets, (tokens, config.temperature, config.weight)

    def __call__(self, model: Any, batch: Batch) -> Losses:
        with torch.no_grad():
            target = self._targets(batch)
        with self._gpt.distilling(target, batch.loss_mask_BS, *self._how):
            total, loss_BS, figures_FBS = next_token(model, batch)
        return Losses(loss_BS, total, figures_FBS)
