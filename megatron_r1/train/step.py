"""One optimizer step: forward and backward of the micro-batches, gradient sum, Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.config import Config
from megatron_r1.model.gpt import Chunks, build_model, use_kernels
from megatron_r1.parallel import from_last_stage, sum_over
from megatron_r1.records import Batch
from megatron_r1.train.objective import Losses, Objective, next_token
from megatron_r1.train.optimizer import build_optimizer, guarded_step

# isort: split
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config


@dataclass
class Training:
    """The model as it is trained: bare, wrapped, and its optimizer."""

    gpt: Any
    """GPTModel, or Chunks of an interleaved pipeline; the state dict of checkpoints."""
    chunks: list[Any]
    """DistributedDataParallel around each (and around Float16Module for bf16)."""
    optimizer: Any
    objective: Objective
    own_end: backend.Mark = field(default_factory=backend.Mark)
    """Where this rank's own backward passes of the last step end."""

    @property
    def last(self) -> Any:
        """The part of the model that has the head, where this rank has it."""
        return self.gpt[-1] if isinstance(self.gpt, Chunks) else self.gpt


@dataclass(frozen=True)
class Shape:
    """Sizes of every micro-batch, which the pipeline schedules need beforehand."""

    micro_batch: int
    seq_length: int
    sources: int
    """Rows of the loss report: sources while training, capabilities while probing."""


@dataclass(frozen=True)
class StepResult:
    """What came of a step."""

    loss_N: Tensor
    """float64 [sources] summed label losses of the global batch."""
    tokens_N: Tensor
    """float64 [sources] label counts."""
    figures: dict[str, float]
    """The objective's figures besides the loss, means over the global batch's labels."""
    grad_norm: float
    """Of the mean gradient, before clipping."""
    lost: bool
    """A rank's batches could not be read, in this step or in one before."""
    left_out: bool
    """The weights were left as they were: loss or norm are not finite, or batches are lost."""
    seconds: float
    busy: float
    """Seconds until this rank's own backward passes ended, waiting left out."""

    def loss(self) -> float:
        """Mean loss over the global batch's labels: divided once."""
        return float(self.loss_N.sum() / self.tokens_N.sum())


def build_training(config: Config, objective: Objective = next_token) -> Training:
    """Model, gradient buffers and distributed optimizer on this rank, from `train.seed`."""
    backend.seed_model_parallel(config.train.seed)
    parts = config.parallel.virtual_pipeline
    gpts = [_build(config, chunk if parts > 1 else None) for chunk in range(parts)]
    for gpt in gpts if parts > 1 else ():
        use_kernels(gpt, plain_layers=not config.data.cross_documents)
    chunks = [_wrap(config, gpt) for gpt in gpts]
    optimizer = build_optimizer(config.optimizer, config.train.precision, chunks)
    training = Training(Chunks(gpts) if parts > 1 else gpts[0], chunks, optimizer, objective)

    def finalize(model: list[Any], _labels: Tensor, **kwargs: Any) -> None:
        training.own_end = backend.Mark()
        # `guarded_step` divides by the labels: here that is a wait and a pass over all gradients.
        finalize_model_grads(model, None, **kwargs)

    for gpt in gpts:
        core = get_model_config(gpt)
        core.finalize_model_grads_func = finalize
        core.grad_scale_func = optimizer.scale_loss
        no_sync = [chunk.no_sync for chunk in chunks]
        core.no_sync_func = no_sync if parts > 1 else no_sync[0]
        if parts > 1:
            core.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    return training


def _build(config: Config, chunk: int | None) -> Any:
    gpt = build_model(
        config.model,
        config.parallel,
        config.train.precision,
        config.data.seq_length,
        # Transformer Engine's attention takes documents apart in another layout only.
        plain_layers=not config.data.cross_documents,
        recompute=config.train.recompute,
        chunk=chunk,
    )
    gpt.head_chunk, gpt.z_loss = config.train.head_chunk, config.optimizer.z_loss
    return gpt


def _wrap(config: Config, gpt: Any) -> Any:
    core = get_model_config(gpt)
    model = DistributedDataParallel(
        core,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            use_distributed_optimizer=True,
            # megatron-core's default grows with the ranks and would put a small model into one
            # bucket at 168, which leaves nothing to overlap.
            bucket_size=max(1_000_000, config.model.parameters() // 8),
        ),
        Float16Module(core, gpt) if config.train.precision == "bf16" else gpt,
    )
    skip_exchange_with_nobody(model)
    model.broadcast_params()
    return model


def skip_exchange_with_nobody(model: Any) -> None:
    """Skip gradient exchange where one rank holds all the data. gloo would copy the gradients to itself."""
    for group in model.bucket_groups:
        if group.intra_distributed_optimizer_instance_size == 1:
            group.start_grad_sync = group.finish_grad_sync = group.start_param_sync = _nothing


def _nothing(*_: Any, **__: Any) -> None: ...


def train_step(
    training: Training,
    batches: Iterator[Batch],
    micro_batches: int,
    shape: Shape,
    lost: Callable[[], bool] = lambda: False,
) -> Callable[[], StepResult]:
    """Enqueue forward and backward of `micro_batches` batches, then one Adam step, and wait for none of it.

    The gradient is that of the mean over the global batch's labels, whatever the layout. The weights stay as
    they are if loss or gradient norm are not finite, or if `lost()` is true on any rank after the backward
    pass. The value waits until the device has taken this step, and no longer, and returns what came of it.
    """
    began = backend.Mark()
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    objective = training.objective
    sums_RN = run_schedule(training.chunks, objective, batches, micro_batches, shape, forward_only=False)
    numbers = torch.cat([sums_RN.flatten(), guarded_step(training.optimizer, sums_RN[:2], lost())])
    # To pinned memory, which no other step writes.
    on_host, own_end = numbers.to("cpu", non_blocking=True), training.own_end
    done = backend.Mark()

    def result() -> StepResult:
        done.wait()
        grad_norm, lost, left_out = on_host[-3:].tolist()
        seconds, busy = (mark.seconds_since(began) for mark in (done, own_end))
        loss_N, tokens_N, *figures_FN = on_host[:-3].view(-1, shape.sources)
        means = (float(figure_N.sum() / tokens_N.sum()) for figure_N in figures_FN)
        figures = dict(zip(_figures(objective), means, strict=True))
        return StepResult(loss_N, tokens_N, figures, grad_norm, lost > 0, left_out > 0, seconds, busy)

    return result


@torch.no_grad()
def label_losses(training: Training, batches: Iterator[Batch], micro_batches: int, shape: Shape) -> Tensor:
    """Summed label losses and label counts by `Batch.source_B`, float64 [2, sources], over all ranks."""
    for chunk in training.chunks:
        chunk.eval()
    try:
        sums_2N = run_schedule(training.chunks, next_token, batches, micro_batches, shape, forward_only=True)
        return sums_2N.cpu()
    finally:
        for chunk in training.chunks:
            chunk.train()


def run_schedule(
    chunks: list[Any],
    objective: Objective,
    batches: Iterator[Batch],
    micro_batches: int,
    shape: Shape,
    forward_only: bool,
) -> Tensor:
    """megatron-core's schedule for this layout. float64 [2 + figures, sources] on the device: sums of losses,
    label counts, and sums of the objective's figures."""
    # Interleaved, each part of the model takes every batch in its own time.
    several = len(chunks) > 1
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, objective=objective, sources=shape.sources),
        data_iterator=list(tee(batches, len(chunks))) if several else batches,
        model=chunks if several else chunks[0],
        num_microbatches=micro_batches,
        seq_length=shape.seq_length,
        micro_batch_size=shape.micro_batch,
        forward_only=forward_only,
    )
    # Only the last pipeline stage has losses; the others add zeros.
    rows = 2 + len(_figures(objective))
    sums = torch.zeros(rows, shape.sources, dtype=torch.float64, device=backend.device())
    for report in reports:
        sums += report["by_source"]
    return from_last_stage(sum_over("tokens", sums))


def _forward_step(
    batches: Iterator[Batch], model: Any, objective: Objective, sources: int
) -> tuple[Tensor | Losses, Callable[[Tensor | Losses], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    batch = next(batches)
    return objective(model, batch), partial(_sum_losses, batch, sources)


def _figures(objective: Objective) -> tuple[str, ...]:
    return getattr(objective, "figures", ())


def _sum_losses(
    batch: Batch, sources: int, losses: Tensor | Losses
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum, not mean: rows may hold different numbers of labels; the division comes once, at the end."""
    loss_BS, total, figures_FBS = losses if isinstance(losses, Losses) else Losses(losses)
    mask_BS = batch.loss_mask_BS
    loss_B, tokens_B = (loss_BS.float() * mask_BS).sum(1), mask_BS.sum(1)
    rows_RB = torch.stack([loss_B.detach(), tokens_B, *((figure * mask_BS).sum(1) for figure in figures_FBS)])
    by_source = torch.zeros(len(rows_RB), sources, dtype=torch.float64, device=loss_B.device)
    by_source.index_add_(1, batch.source_B, rows_RB.double())
    return loss_B.sum() if total is None else total, tokens_B.sum().to(torch.int), {"by_source": by_source}
