"""Passes whose labels the model draws from its own predictions, for the true Fisher information.

With the data's labels the second moment of gradients is the empirical Fisher information: where a model fits
badly it is no curvature of the loss, and gradients of one example's tokens are correlated. Drawn labels are
independent given the text, with gradients of mean zero (Kunstner et al., 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.influence.gradients import Scorer
from megatron_r1.influence.methods import Method
from megatron_r1.influence.passes import run_passes
from megatron_r1.parallel import ParallelContext, cut_to_rank
from megatron_r1.records import Batch

# isort: split
from megatron.core import parallel_state

_PLACES = 64
"""Places of the sequence whose probabilities exist, in float64, at a time."""


def draw(logits_NV: Tensor, uniform_N: Tensor, group: Any) -> Tensor:
    """A label for each token from softmax(logits), by its inverse distribution function: int64 [N].

    `logits_NV`: this rank's consecutive shard of the vocabulary; `uniform_N` in [0, 1), the same on all ranks
    of the tensor-parallel `group`, and so is the result.
    """
    logits_NV = logits_NV.double()
    max_N = logits_NV.amax(1)
    dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
    below_NV = (logits_NV - max_N[:, None]).exp_().cumsum_(1)
    mass_RN = max_N.new_zeros(group.size(), len(max_N))
    mass_RN[group.rank()] = below_NV[:, -1]
    dist.all_reduce(mass_RN, group=group)
    wanted_N = uniform_N * mass_RN.sum(0) - mass_RN[: group.rank()].sum(0)
    # Of each shard, how many columns lie wholly below: all of an earlier one's, none of a later one's.
    label_N = (below_NV <= wanted_N[:, None]).sum(1)
    dist.all_reduce(label_N, group=group)
    return label_N.clamp_(max=group.size() * logits_NV.shape[1] - 1)


class _DrawnLabels:
    """The rows of one source, each label drawn where the head's output passes, before the loss reads it."""

    def __init__(self, batches: Iterator[Batch], seed: list[int], seq_length: int, context: ParallelContext):
        self._batches, self._seed, self._seq_length, self._context = batches, seed, seq_length, context
        self._batch: Batch
        self._uniform_BS: Tensor

    def __iter__(self) -> Iterator[Batch]:
        """Each batch's forward pass comes before the next batch is asked for."""
        ranks, rank = self._context.data_size, self._context.data_rank
        for number, batch in enumerate(self._batches):
            size = len(batch.tokens_BS)
            # By the row's place among all ranks' rows: the same in every layout.
            row_B = (number * ranks + rank) * size + np.arange(size)
            random = (np.random.default_rng([*self._seed, row]) for row in row_B.tolist())
            whole_BS = torch.from_numpy(np.stack([r.random(self._seq_length) for r in random]))
            whole_BS = whole_BS.to(backend.device())
            self._uniform_BS = cut_to_rank({"uniform": whole_BS})["uniform"]
            # A copy: tokens may lie in the same memory.
            self._batch = dataclasses.replace(batch, labels_BS=batch.labels_BS.clone())
            yield self._batch

    def write(self, module: Any, inputs: Any, output: Any) -> None:
        """A forward hook of the head."""
        group = parallel_state.get_tensor_model_parallel_group()
        for first in range(0, len(output[0]), _PLACES):
            logits_SBV = output[0].detach()[first : first + _PLACES]
            part = slice(first, first + len(logits_SBV))
            uniform_SB = self._uniform_BS[:, part].T
            label_N = draw(logits_SBV.flatten(0, 1), uniform_SB.flatten(), group)
            self._batch.labels_BS[:, part] = label_N.view_as(uniform_SB).T


@dataclass(frozen=True)
class DrawnPasses:
    """Forward and backward passes of all sources' examples, for losses of drawn labels."""

    model: Any
    gpt: Any
    sources: Callable[[], Iterator[tuple[Iterator[Batch], int]]]
    """Of each source, this data-parallel rank's micro-batches and their number; the same at every call. Rows
    that fill up a micro-batch have weight 0."""
    examples: int
    """In all, of `seq_length` tokens each."""
    micro_batch: int
    seq_length: int
    seed: int
    context: ParallelContext

    def run(self, method: Method) -> None:
        """Hand inputs and output gradients of layers to `method`, which keeps what it sees; its rows are
        dropped. Labels are the same at every call and in every layout. Every rank of the launch calls it."""
        for number, (batches, passes) in enumerate(self.sources()):
            labels = _DrawnLabels(batches, [self.seed, number], self.seq_length, self.context)
            gpt = self.gpt
            hook = gpt.output_layer.register_forward_hook(labels.write) if gpt.post_process else None
            try:
                with Scorer(gpt, method) as scorer:
                    run_passes(
                        self.model, iter(labels), passes, self.micro_batch, self.seq_length, scorer.begin
                    )
            finally:
                if hook is not None:
                    hook.remove()
