"""Influence of examples, exact to first order, from one forward and backward pass (Eq. 2).

A capability's direction v_c is held as a tensor for each parameter of this rank's shard. Hooks on the
layers of megatron-core's GPTModel form each example's gradient of one weight block, dot it with the C
directions at once and drop it, so that no example's whole gradient ever exists. Every parameter counts:
linear layers, norm weights, and the tied embedding by both of its uses against the one summed direction.

An example's loss is the mean over its labels; the number of tokens enters in Eq. 5.

Where the model is split, the products add up: over the tensor-parallel ranks for parameters that are
sharded (or whose gradients are partial sums, as the norms' under sequence parallelism), once for
replicated ones, and over the pipeline stages for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.parallel import ParallelContext, sum_over_data
from megatron_r1.records import Batch

# isort: split
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)

Directions = dict[str, Tensor]
"""Parameter name -> float32 [C, *shape of this rank's shard]."""

_BLOCK = 1 << 22
"""Elements of the per-example gradients formed at a time: they are dotted while the cache holds them."""


@dataclass
class RowSums:
    """What one micro-batch has gathered so far on this rank."""

    sharded_BC: Tensor
    """float64: products with parameters of which every tensor-parallel rank has its own part."""
    replicated_BC: Tensor
    """float64: products that every tensor-parallel rank computes alike."""
    loss_B: Tensor
    """float64: mean label loss of each row; zero but on the last pipeline stage."""


def dot_with_directions(a_SBI: Tensor, g_SBO: Tensor, direction_COI: Tensor) -> Tensor:
    """Product of each example's gradient of one linear layer with C directions, float64 [B, C].

    `a` are the layer's inputs and `g` the gradients of its outputs; <sum_s g_sb a_sb^T, V_c> is computed
    over blocks of output rows. Under tensor parallelism all three are this rank's shard: sum over ranks.
    """
    inputs, batch = a_SBI.shape[2], a_SBI.shape[1]
    outputs = g_SBO.shape[2]
    flat_CP = direction_COI.reshape(len(direction_COI), -1)
    a_BSI, g_BOS = a_SBI.transpose(0, 1), g_SBO.permute(1, 2, 0)
    rows = max(1, _BLOCK // (batch * inputs))
    out_BC = torch.zeros(batch, len(flat_CP), dtype=torch.float64, device=a_SBI.device)
    for first in range(0, outputs, rows):
        last = min(first + rows, outputs)
        gradient_BP = torch.bmm(g_BOS[:, first:last], a_BSI).view(batch, -1)
        out_BC += gradient_BP.float() @ flat_CP[:, first * inputs : last * inputs].T
    return out_BC


class Scorer:
    """Collects scores of micro-batches from hooks on the model; a context manager.

    Within it no parameter requires a gradient, so that no weight gradient but ours is computed. Raises
    ValueError where a parameter belongs to no layer it knows.
    """

    def __init__(self, gpt: Any, directions: Directions):
        self.gpt, self.directions = gpt, directions
        self.sums: list[RowSums] = []
        """One for each micro-batch, in the order of their forward passes."""
        self._capabilities = len(next(iter(directions.values())))
        self._hooks: list[Any] = []
        self._required = [p for p in gpt.parameters() if p.requires_grad]

    def __enter__(self) -> Scorer:
        names = {id(p): name for name, p in self.gpt.named_parameters()}
        covered: set[str] = set()
        for module in self.gpt.modules():
            rule = self._rule(module)
            if rule is None:
                continue
            weight = module.weight if module.weight is not None else self._tied_weight()
            name = names[id(weight)]
            covered.add(name)
            hook = partial(rule, direction=self.directions[name])
            self._hooks.append(module.register_forward_hook(hook))
        if rest := sorted(set(names.values()) - covered):
            self.__exit__(None, None, None)
            raise ValueError(
                f"no rule for the gradient of {', '.join(rest[:4])}: scoring knows megatron-core's own "
                f"parallel layers and RMSNorm without biases, not Transformer Engine's"
            )
        for p in self._required:
            p.requires_grad_(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for p in self._required:
            p.requires_grad_(True)

    def begin(self, rows: int) -> RowSums:
        """Start a micro-batch: the coming forward pass and its backward pass add to the sums returned."""
        zeros = torch.zeros(rows, self._capabilities, dtype=torch.float64, device=backend.device())
        self.sums.append(RowSums(zeros, zeros.clone(), zeros[:, 0].clone()))
        return self.sums[-1]

    def _tied_weight(self) -> Tensor:
        weight: Tensor = self.gpt.shared_embedding_or_output_weight()
        return weight

    def _rule(self, module: Any) -> Callable[..., Tensor | None] | None:
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            return self._linear
        if isinstance(module, VocabParallelEmbedding):
            return self._embedding
        if isinstance(module, torch.nn.RMSNorm) and module.weight is not None:
            return self._norm
        return None

    def _linear(self, module: Any, inputs: tuple[Any, ...], output: Any, direction: Tensor) -> None:
        a_SBI, sums = inputs[0].detach(), self.sums[-1]
        # Under sequence parallelism a column-parallel layer gathers its input, and a row-parallel one
        # scatters its output.
        column = isinstance(module, ColumnParallelLinear)
        split = module.sequence_parallel

        def add(g_SBO: Tensor) -> None:
            a = _whole_sequence(a_SBI, module) if split and column else a_SBI
            g = _whole_sequence(g_SBO, module) if split and not column else g_SBO
            sums.sharded_BC += dot_with_directions(a, g, direction)

        output[0].register_hook(add)

    def _embedding(self, module: Any, inputs: tuple[Any, ...], output: Tensor, direction: Tensor) -> Tensor:
        tokens_BS, sums = inputs[0], self.sums[-1]
        first, last = module.vocab_start_index, module.vocab_end_index
        # With no parameter to differentiate, the graph begins here.
        out = output.detach().requires_grad_(True)

        def add(g: Tensor) -> None:
            g_BSD = _whole_sequence(g, module).transpose(0, 1) if module.reduce_scatter_embeddings else g
            mine_BS = (tokens_BS >= first) & (tokens_BS < last)
            row_BS = torch.where(mine_BS, tokens_BS - first, 0)
            for c, direction_VD in enumerate(direction):
                rows_BSD = F.embedding(row_BS, direction_VD)
                sums.sharded_BC[:, c] += (torch.linalg.vecdot(g_BSD.float(), rows_BSD) * mine_BS).sum(1)

        out.register_hook(add)
        return out

    def _norm(self, module: Any, inputs: tuple[Any, ...], output: Tensor, direction: Tensor) -> None:
        x_SBD, sums = inputs[0].detach(), self.sums[-1]
        partial_sum = getattr(module.weight, "sequence_parallel", False)

        def add(g_SBD: Tensor) -> None:
            x = x_SBD.float()
            square_SB1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
            gradient_BD = (x * g_SBD.float()).mul_(torch.rsqrt(square_SB1 + module.eps)).sum(0)
            product_BC = gradient_BD @ direction.T
            if partial_sum:
                sums.sharded_BC += product_BC
            else:
                sums.replicated_BC += product_BC

        output.register_hook(add)


def _whole_sequence(x: Tensor, module: Any) -> Tensor:
    """[S / ranks, B, D] of each tensor-parallel rank -> [S, B, D] on all of them."""
    whole: Tensor = gather_from_sequence_parallel_region(x.contiguous(), group=module.tp_group)
    return whole


def score(
    model: Any, scorer: Scorer, batches: Iterator[Batch], passes: int, micro_batch: int, seq_length: int
) -> tuple[Tensor, Tensor]:
    """Scores and losses of this data-parallel rank's rows: float64 [passes * B, C] and [passes * B].

    score = <v_c, grad l(x)>: positive where a step on the example lowers the capability's loss. Every
    rank of a model copy calls this with the same batches, and gets the same result.
    """
    scorer.sums.clear()
    run_passes(model, batches, passes, micro_batch, seq_length, scorer.begin)
    sharded_NC = torch.cat([sums.sharded_BC for sums in scorer.sums])
    replicated_NC = torch.cat([sums.replicated_BC for sums in scorer.sums])
    loss_N = torch.cat([sums.loss_B for sums in scorer.sums])
    scorer.sums.clear()
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(sharded_NC, group=parallel_state.get_tensor_model_parallel_group())
    score_NC = sharded_NC + replicated_NC
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        for part in (score_NC, loss_N):
            dist.all_reduce(part, group=parallel_state.get_pipeline_model_parallel_group())
    return score_NC, loss_N


def run_passes(
    model: Any,
    batches: Iterator[Batch],
    passes: int,
    micro_batch: int,
    seq_length: int,
    begin: Callable[[int], RowSums | None],
) -> None:
    """Forward and backward of `passes` micro-batches by megatron-core's schedule for this layout.

    What is differentiated is the sum over rows of each row's mean label loss.
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
    batches: Iterator[Batch], model: Any, begin: Callable[[int], RowSums | None]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(batches)
    sums = begin(len(batch.tokens_BS))
    out = model(batch.tokens_BS, batch.position_BS, batch.segment_BS, labels=batch.labels_BS)
    return out, partial(_row_means, batch, sums)


def _row_means(
    batch: Batch, sums: RowSums | None, loss_BS: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows without labels, which fill up a micro-batch, have loss 0."""
    labels_B = batch.loss_mask_BS.sum(1)
    loss_B = (loss_BS.float() * batch.loss_mask_BS).sum(1) / labels_B.clamp(min=1)
    if sums is not None:
        sums.loss_B += loss_B.detach()
    return loss_B.sum(), labels_B.sum().to(torch.int), {}


def mean_gradient(
    model: Any,
    gpt: Any,
    batches: Iterator[Batch],
    passes: int,
    micro_batch: int,
    seq_length: int,
    examples: int,
    context: ParallelContext,
) -> dict[str, Tensor]:
    """Gradient of the mean over `examples` rows of each row's mean label loss: float32, this rank's shard.

    The batches are this data-parallel rank's; the result is the same on all of them.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in gpt.named_parameters()}
    hooks = [
        p.register_post_accumulate_grad_hook(partial(_add_and_free, sums[name]))
        for name, p in gpt.named_parameters()
    ]
    try:
        run_passes(model, batches, passes, micro_batch, seq_length, lambda _: None)
    finally:
        for hook in hooks:
            hook.remove()
    for name, p in gpt.named_parameters():
        gradient = sums[name]
        if getattr(p, "sequence_parallel", False) and context.tensor_size > 1:
            dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        # The first and the last stage hold a copy of the tied embedding each, and a use of it each.
        if getattr(p, "shared_embedding", False) and context.pipeline_size > 1:
            dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
        sum_over_data(gradient)
        gradient /= examples
    return sums


def _add_and_free(total: Tensor, p: Tensor) -> None:
    assert p.grad is not None
    total += p.grad
    p.grad = None
