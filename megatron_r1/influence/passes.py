"""Forward and backward passes over examples, and mean gradients from them.

What is differentiated is, of each row, the sum of its label losses times the batch's loss mask: the mask
carries each label's weight (`weigh`), so that an example's loss may be a mean or a sum, and may be spread
over several rows or over the ranks that share a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_r1 import backend
from megatron_r1.influence.parameters import EMBEDDING
from megatron_r1.parallel import on_device, sum_over
from megatron_r1.records import Batch

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func


def named_parameters(gpt: Any) -> dict[str, tuple[str, Parameter]]:
    """This rank's parameters by their name in the whole model (influence/layers.py), with their name here."""
    numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(gpt.decoder.layers)}
    out = {}
    for local, p in gpt.named_parameters():
        parts = local.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(numbers[parts[2]])
        # The last stage's copy of the tied embedding.
        out[EMBEDDING if parts[0] == "output_layer" else ".".join(parts)] = (local, p)
    return out


def weigh(batch: Batch, label_weight_B: np.ndarray) -> Batch:
    """The batch whose labels in row b count with a weight; on the device, cut to this rank's tokens."""
    weight_B1 = torch.from_numpy(label_weight_B.astype(np.float32))[:, None]
    return on_device(dataclasses.replace(batch, loss_mask_BS=batch.loss_mask_BS * weight_B1))


def run_passes(
    model: Any,
    batches: Iterator[Batch],
    passes: int,
    micro_batch: int,
    seq_length: int,
    begin: Callable[[Batch], Tensor] | None = None,
) -> None:
    """Forward and backward of `passes` micro-batches by megatron-core's schedule for this layout.

    `begin` is called with each micro-batch before its forward pass, and answers with a buffer, [B], to which
    each row's weighted loss is added on the last pipeline stage.
    """
    get_forward_backward_func()(
        forward_step_func=partial(_forward_step, begin=begin),
        data_iterator=batches,
        model=model,
        num_microbatches=passes,
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        forward_only=False,
    )


def _forward_step(
    batches: Iterator[Batch], model: Any, begin: Callable[[Batch], Tensor] | None
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(batches)
    losses_B = begin(batch) if begin is not None else None
    out = model(batch.tokens_BS, batch.position_BS, batch.segment_BS, labels=batch.labels_BS)
    return out, partial(_weighted, batch, losses_B)


def _weighted(
    batch: Batch, losses_B: Tensor | None, loss_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows without labels, which fill up a micro-batch, have loss 0."""
    loss_B = (loss_BS.float() * batch.loss_mask_BS).sum(1)
    if losses_B is not None:
        losses_B += loss_B.detach()
    return loss_B.sum(), batch.loss_mask_BS.count_nonzero().to(torch.int), {}


def mean_gradient(
    model: Any,
    gpt: Any,
    batches: Iterator[Batch],
    passes: int,
    micro_batch: int,
    seq_length: int,
    examples: int,
    names: Collection[str],
) -> dict[str, Tensor]:
    """Gradient of the mean over `examples` rows of each row's loss, of the parameters `names`: float32, this
    rank's shard.

    The batches are this data-parallel rank's; the result is the
    same on all of them.
    """
    mine = {name: p for name, (_, p) in named_parameters(gpt).items()}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in mine.items() if name in names}
    hooks = [
        p.register_post_accumulate_grad_hook(partial(_add_and_free, sums.get(name)))
        for name, p in mine.items()
    ]
    try:
        run_passes(model, batches, passes, micro_batch, seq_length)
    finally:
        for hook in hooks:
            hook.remove()
    for name, gradient in sums.items():
        complete_gradient(mine[name], gradient)
        sum_over("tokens", gradient).div_(examples)
    return sums


def complete_gradient(p: Parameter, gradient: Tensor) -> None:
    """Add up, in place, what the ranks of a model copy hold in part."""
    if getattr(p, "sequence_parallel", False):
        sum_over("tensor", gradient)
    # The first and the last stage hold a copy of the tied embedding each, and a use of it each.
    if getattr(p, "shared_embedding", False):
        sum_over("embedding", gradient)


def squared_norm(gradient: dict[str, Tensor], gpt: Any) -> float:
    """Of the whole model's gradient, from each rank's shard of it; the same on all ranks."""
    parts_2 = torch.zeros(2, dtype=torch.float64, device=backend.device())
    for name, (local, p) in named_parameters(gpt).items():
        # The last stage's copy of the tied embedding counts on the first.
        if name in gradient and not local.startswith("output_layer"):
            replicated = int(not getattr(p, "tensor_model_parallel", False))
            parts_2[replicated] += gradient[name].double().square().sum()
    sum_over("tensor", parts_2[:1])
    return float(sum_over("pipeline", parts_2).sum())


def _add_and_free(total: Tensor | None, p: Tensor) -> None:
    assert p.grad is not None
    if total is not None:
        total += p.grad
    p.grad = None
