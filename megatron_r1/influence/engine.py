"""A model on this rank, its examples, and forward and backward passes over them.

The loss of a row is the sum of its label losses times the batch's loss mask. The mask carries each label's
weight (`weigh`). An example's loss may be a mean or a sum. It may be spread over several rows, or over the
ranks that share a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron_r1 import backend
from megatron_r1.config import Config, InfluenceConfig
from megatron_r1.data.loader import example_batches
from megatron_r1.data.windows import Examples, Unit
from megatron_r1.influence.parameters import Gradient, complete_gradient, named_parameters, select
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import ParallelContext, cut_to_rank, on_device, sum_over
from megatron_r1.records import Batch, Corpus

# isort: split
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

_PLACES = 64
"""Places of the sequence whose probabilities, in float64, are in memory at a time."""


def weigh(batch: Batch, label_weight_B: np.ndarray) -> Batch:
    """The batch with a weight for each row's labels, on the device, cut to this rank's tokens."""
    weight_B1 = torch.from_numpy(label_weight_B.astype(np.float32))[:, None]
    return on_device(dataclasses.replace(batch, loss_mask_BS=batch.loss_mask_BS * weight_B1))


Begin = Callable[[Batch], Tensor]
"""Called with each micro-batch before its forward pass. Returns a buffer, [B]. The last pipeline stage adds
each row's weighted loss to it."""


def run_passes(
    model: Any,
    batches: Iterator[Batch],
    passes: int,
    micro_batch: int,
    seq_length: int,
    begin: Begin | None = None,
) -> None:
    """Forward and backward of `passes` micro-batches by megatron-core's schedule for this layout."""

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        losses_B = begin(batch) if begin is not None else None

        def weighted_loss(loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            """Rows without labels, which fill up a micro-batch, have loss 0."""
            loss_B = (loss_BS.float() * batch.loss_mask_BS).sum(1)
            if losses_B is not None:
                losses_B.add_(loss_B.detach())
            return loss_B.sum(), batch.loss_mask_BS.count_nonzero().to(torch.int), {}

        out = model(batch.tokens_BS, batch.position_BS, batch.documents, labels=batch.labels_BS)
        return out, weighted_loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=model,
        num_microbatches=passes,
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        forward_only=False,
    )


@dataclass(frozen=True)
class Engine:
    """Every rank of the launch calls the same methods."""

    model: Any
    """`gpt`, wrapped for its precision. The schedule calls it."""
    gpt: Any
    context: ParallelContext
    influence: InfluenceConfig
    seq_length: int
    eod: int | None = None
    """The token that ends each document where windows do not attend across them."""

    @classmethod
    def build(cls, config: Config, eod: int | None, context: ParallelContext) -> Engine:
        """The model of the configuration, with weights still to be loaded."""
        assert config.influence is not None
        backend.seed_model_parallel(config.train.seed)
        precision, seq_length = config.train.precision, config.data.seq_length
        # Hooks reach into each layer, which Transformer Engine's fused ones do not allow.
        gpt: Any = build_model(config.model, config.parallel, precision, seq_length, plain_layers=True)
        model = Float16Module(get_model_config(gpt), gpt) if precision == "bf16" else gpt
        return cls(model, gpt, context, config.influence, seq_length, eod)

    @cached_property
    def names(self) -> list[str]:
        """Names of the whole model's parameters that count."""
        return select(self.influence.layers, self.gpt.config.num_layers)

    @property
    def capabilities(self) -> int:
        return len(self.influence.directions)

    @property
    def rows_per_pass(self) -> int:
        """Rows of all ranks together."""
        return self.influence.micro_batch * self.context.data_size

    def examples(self, corpus: Corpus, number_N: np.ndarray, unit: Unit = "window") -> Examples:
        return Examples([(corpus, number_N)], self.seq_length, unit)

    def batches(
        self, examples: Examples, first: int = 0, last: int | None = None, micro_batch: int | None = None
    ) -> Iterator[Batch]:
        """This data-parallel rank's micro-batches of the examples [first, last)."""
        last, size = len(examples) if last is None else last, micro_batch or self.influence.micro_batch
        for batch, length_B in example_batches(examples, (first, last), size, self.context, self.eod):
            yield weigh(batch, 1 / length_B if self.influence.loss == "mean" else np.ones(size))

    def mean_gradient(
        self, windows: Examples, advance: Callable[[int], object] = lambda count: None
    ) -> Gradient:
        """Gradient of the mean of the windows' losses, the same on all data-parallel ranks.

        `advance` is called with the number of windows of each pass.
        """

        def counted() -> Iterator[Batch]:
            for number, batch in enumerate(self.batches(windows)):
                advance(min(self.rows_per_pass, len(windows) - number * self.rows_per_pass))
                yield batch

        passes = windows.passes(0, len(windows), self.rows_per_pass)
        gradient = self.summed_gradient(counted(), passes, self.influence.micro_batch)
        for g in gradient.values():
            sum_over("tokens", g).div_(len(windows))
        return gradient

    def example_gradients(self, *sources: Examples) -> Iterator[Gradient]:
        """Gradients of single windows' losses, this data-parallel rank's share of each source.

        Every rank gets the same number of gradients. The last ones may be 0.
        """
        for batch in chain.from_iterable(self.batches(windows, micro_batch=1) for windows in sources):
            gradient = self.summed_gradient(iter([batch]), 1, 1)
            for g in gradient.values():
                sum_over("context", g)
            yield gradient

    def summed_gradient(self, batches: Iterator[Batch], passes: int, micro_batch: int) -> Gradient:
        """Sum over this rank's rows and tokens, complete over tensor-parallel ranks and stages."""
        mine = named_parameters(self.gpt)
        sums = {
            name: torch.zeros_like(p, dtype=torch.float32) for name, p in mine.items() if name in self.names
        }
        with ExitStack() as hooks:
            for name, p in mine.items():
                add = partial(_add_and_free, sums.get(name))
                hooks.enter_context(p.register_post_accumulate_grad_hook(add))
            run_passes(self.model, batches, passes, micro_batch, self.seq_length)
        for name, gradient in sums.items():
            complete_gradient(mine[name], gradient)
        return sums

    @contextmanager
    def drawn_labels(self, windows: Examples, source: int) -> Iterator[Iterator[Batch]]:
        """The batches of one source, each label drawn from the model's prediction during the forward pass.

        Labels follow from `influence.seed`, the source's number and the window's place. They are the same at
        every call and in every layout.
        """
        batch: Batch
        uniform_BS: Tensor

        def batches() -> Iterator[Batch]:
            nonlocal batch, uniform_BS
            # Each batch's forward pass comes before the next batch is asked for.
            for number, given in enumerate(self.batches(windows)):
                size = len(given.tokens_BS)
                # By the row's place among all ranks' rows: the same in every layout.
                row_B = (number * self.context.data_size + self.context.data_rank) * size + np.arange(size)
                random = (np.random.default_rng([self.influence.seed, source, row]) for row in row_B.tolist())
                whole_BS = torch.from_numpy(np.stack([r.random(self.seq_length) for r in random]))
                uniform_BS = cut_to_rank({"uniform": whole_BS.to(backend.device())})["uniform"]
                # A copy: tokens may lie in the same memory.
                batch = dataclasses.replace(given, labels_BS=given.labels_BS.clone())
                yield batch

        def write(module: Any, inputs: Any, output: Any) -> None:
            """Overwrite the batch's labels where the head's output passes, before the loss reads them."""
            group = parallel_state.get_tensor_model_parallel_group()
            for first in range(0, len(output[0]), _PLACES):
                logits_SBV = output[0].detach()[first : first + _PLACES]
                part = slice(first, first + len(logits_SBV))
                uniform_SB = uniform_BS[:, part].T
                label_N = draw(logits_SBV.flatten(0, 1), uniform_SB.flatten(), group)
                batch.labels_BS[:, part] = label_N.view_as(uniform_SB).T

        with ExitStack() as hooks:
            if self.gpt.post_process:
                hooks.enter_context(self.gpt.output_layer.register_forward_hook(write))
            yield batches()


def _add_and_free(total: Tensor | None, p: Parameter) -> None:
    assert p.grad is not None
    if total is not None:
        total += p.grad
    p.grad = None


def draw(logits_NV: Tensor, uniform_N: Tensor, group: Any) -> Tensor:
    """A label for each token from softmax(logits), by its inverse distribution function: int64 [N].

    `logits_NV`: this rank's consecutive shard of the vocabulary. `uniform_N` in [0, 1), the same on all ranks
    of the tensor-parallel `group`. The result is the same on all of them, too.
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
