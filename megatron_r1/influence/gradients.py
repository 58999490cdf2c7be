"""Influence of examples, exact to first order, from one forward and backward pass (Eq. 2).

A capability's direction v_c is a tensor for each parameter of this rank's shard. Hooks on the layers of
megatron-core's GPTModel hand inputs and output gradients to a `Method` (influence/methods.py). No example's
whole gradient ever exists. Every parameter that `influence.layers` selects counts: linear layers, norm
weights and the tied embedding, whose two uses are scored against one direction.

Where the model is split, the products add up:

    over tensor-parallel ranks    for sharded parameters, and for norm weights under sequence parallelism
    once                          for replicated parameters
    over pipeline stages          for all parameters
    over context-parallel ranks   for all parameters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.data.windows import Examples
from megatron_r1.influence.engine import Engine, run_passes
from megatron_r1.influence.methods import Method
from megatron_r1.influence.parameters import EMBEDDING, named_parameters, sum_over_model
from megatron_r1.parallel import sum_over
from megatron_r1.records import Batch

# isort: split
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
)


@dataclass
class RowSums:
    """Sums of one micro-batch so far on this rank, X numbers an example."""

    tokens_BS: Tensor
    sharded_BX: Tensor
    """float64: products with sharded parameters."""
    replicated_BX: Tensor
    """float64: products that every tensor-parallel rank computes alike."""
    loss_B: Tensor
    """float64: weighted loss of each row. 0 before the last pipeline stage."""
    head_BSD: Tensor | None = None
    """For norms: at each place, the head's gradient of the row of the token there, float32."""
    look_up_BSD: Tensor | None = None
    """For norms: at each place, the look-up's gradient of the same row. 0 where another rank has the row."""


class Scorer:
    """Context manager that collects products of micro-batches from hooks on the model.

    Within it no parameter requires a gradient, so that autograd computes no weight gradients. `draws`: the
    head's layer runs, whose output `Engine.drawn_labels` reads; else head and loss are one operation. Raises
    ValueError where a parameter belongs to a layer that the scorer does not know.
    """

    def __init__(self, gpt: Any, method: Method, draws: bool = False):
        self.gpt, self.method, self.draws = gpt, method, draws
        self.sums: list[RowSums] = []
        """One for each micro-batch, in the order of the forward passes."""
        self._hooks = ExitStack()

    def __enter__(self) -> Scorer:
        names = {id(p): name for name, p in named_parameters(self.gpt).items()}
        covered: set[str] = set()
        for module in self.gpt.modules():
            if rule := self._rule(module):
                # The head of a stage that also holds the embedding has no weight of its own.
                tied = module.weight is None
                name = names[id(self.gpt.shared_embedding_or_output_weight() if tied else module.weight)]
                covered.add(name)
                # The graph begins at the embedding, whether it counts or not.
                if name in self.method.names or rule == self._embedding:
                    self._hooks.enter_context(module.register_forward_hook(partial(rule, name=name)))
        if rest := sorted(set(names.values()) - covered):
            self.__exit__()
            raise ValueError(
                f"no rule for the gradient of {', '.join(rest[:4])}: scoring knows megatron-core's own "
                f"parallel layers and RMSNorm without biases, not Transformer Engine's"
            )
        if not self.draws:
            self._hooks.callback(setattr, self.gpt, "head_watcher", self.gpt.head_watcher)
            self.gpt.head_watcher = self._watch_head
        for p in self.gpt.parameters():
            if p.requires_grad:
                self._hooks.callback(p.requires_grad_)
                p.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def begin(self, batch: Batch) -> Tensor:
        """Start a micro-batch, whose passes add to new sums. Returns the buffer of its losses, [B]."""
        zeros = torch.zeros(
            len(batch.tokens_BS), self.method.width, dtype=torch.float64, device=backend.device()
        )
        self.sums.append(RowSums(batch.tokens_BS, zeros, zeros.clone(), zeros[:, 0].clone()))
        return self.sums[-1].loss_B

    def _rule(self, module: Any) -> Callable[..., Tensor | None] | None:
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            return self._linear
        if isinstance(module, VocabParallelEmbedding):
            return self._embedding
        if isinstance(module, torch.nn.RMSNorm) and module.weight is not None:
            return self._norm
        return None

    def _linear(self, module: Any, inputs: tuple[Any, ...], output: Any, name: str) -> None:
        a_SBI, sums = inputs[0].detach(), self.sums[-1]
        # Under sequence parallelism a column-parallel layer gathers its input, and a row-parallel one
        # scatters its output.
        column = isinstance(module, ColumnParallelLinear)
        split = module.sequence_parallel

        def add(g_SBO: Tensor) -> None:
            a = _whole_sequence(a_SBI, module) if split and column else a_SBI
            g = _whole_sequence(g_SBO, module) if split and not column else g_SBO
            self._add_products(name, sums, a, g)

        output[0].register_hook(add)

    def _watch_head(self) -> Callable[[Tensor, Tensor], None]:
        return partial(self._add_products, EMBEDDING, self.sums[-1])

    def _add_products(self, name: str, sums: RowSums, a_SBI: Tensor, g_SBO: Tensor) -> None:
        if name not in self.method.names:
            return
        self.method.linear(name, a_SBI, g_SBO, sums.sharded_BX)
        if self.method.squares and name == EMBEDDING:
            group = parallel_state.get_tensor_model_parallel_group()
            index_BS, mine_BS = _mine(sums.tokens_BS, g_SBO.shape[2], group)
            sums.head_BSD = _head_rows(a_SBI, g_SBO, index_BS) * mine_BS[..., None]

    def _embedding(self, module: Any, inputs: tuple[Any, ...], output: Tensor, name: str) -> Tensor:
        sums = self.sums[-1]
        # With no parameter to differentiate, the graph begins here.
        out = output.detach().requires_grad_(True)

        def add(g: Tensor) -> None:
            g_BSD = _whole_sequence(g, module).transpose(0, 1) if module.reduce_scatter_embeddings else g
            index_BS, mine_BS = _mine(sums.tokens_BS, len(module.weight), module.tp_group)
            g_BSD = g_BSD * mine_BS[..., None]
            self.method.look_up(name, index_BS, g_BSD, sums.sharded_BX)
            if self.method.squares:
                sums.look_up_BSD = g_BSD

        if name in self.method.names:
            out.register_hook(add)
        return out

    def _norm(self, module: Any, inputs: tuple[Any, ...], output: Tensor, name: str) -> None:
        x_SBD, sums = inputs[0].detach(), self.sums[-1]
        # Each tensor-parallel rank has its own places of the sequence.
        split = getattr(module.weight, "sequence_parallel", False)
        group = parallel_state.get_tensor_model_parallel_group()

        def add(g_SBD: Tensor) -> None:
            x = x_SBD.float()
            square_SB1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
            g = (x * g_SBD.float()).mul_(torch.rsqrt(square_SB1 + module.eps))
            if split and self.method.squares:
                # A square of sums is no sum of squares.
                g = gather_from_sequence_parallel_region(g, group=group)
            if split and not self.method.squares:
                self.method.norm(name, g, group.rank() * len(g), sums.sharded_BX)
            else:
                self.method.norm(name, g, 0, sums.replicated_BX)

        output.register_hook(add)


def _mine(tokens_BS: Tensor, rows: int, group: Any) -> tuple[Tensor, Tensor]:
    """Each token's row in this rank's shard of the embedding (0 for other shards' rows), and whether it is
    one of this shard."""
    index_BS = tokens_BS - group.rank() * rows
    mine_BS = (index_BS >= 0) & (index_BS < rows)
    return torch.where(mine_BS, index_BS, 0), mine_BS


def _head_rows(a_SBD: Tensor, g_SBV: Tensor, index_BS: Tensor) -> Tensor:
    """Rows `index` of each example's gradient of the head, [B, S, D]."""
    g_BVS = g_SBV.permute(1, 2, 0)
    picked_BSS = g_BVS.gather(1, index_BS[..., None].expand(-1, -1, g_BVS.shape[2]))
    return torch.bmm(picked_BSS, a_SBD.transpose(0, 1)).float()


def _whole_sequence(x: Tensor, module: Any) -> Tensor:
    """[S / ranks, B, D] of each tensor-parallel rank -> [S, B, D] on all of them."""
    return gather_from_sequence_parallel_region(x.contiguous(), group=module.tp_group)


def score(
    model: Any, scorer: Scorer, batches: Iterator[Batch], passes: int, micro_batch: int, seq_length: int
) -> tuple[Tensor, Tensor]:
    """The method's rows [N, X] and the losses [N] of this data-parallel rank's N = passes * B rows: float64.

    A score is <v_c, grad l(x)>, positive where a step on the example lowers the capability's loss. All ranks
    of a model copy get the same result. Under context parallelism it is a part, and
    `sum_over("tokens", ...)` adds the parts up.
    """
    scorer.sums.clear()
    run_passes(model, batches, passes, micro_batch, seq_length, scorer.begin)
    if scorer.method.squares and EMBEDDING in scorer.method.names:
        _add_cross_terms(scorer)
    sharded_NX = torch.cat([sums.sharded_BX for sums in scorer.sums])
    replicated_NX = torch.cat([sums.replicated_BX for sums in scorer.sums])
    loss_N = torch.cat([sums.loss_B for sums in scorer.sums])
    scorer.sums.clear()
    return sum_over_model(sharded_NX, replicated_NX), sum_over("pipeline", loss_N)


def _add_cross_terms(scorer: Scorer) -> None:
    """Add twice the product of the tied embedding's two gradients to the squared norm of their sum."""
    for sums in scorer.sums:
        head_BSD, look_up_BSD = sums.head_BSD, sums.look_up_BSD
        # The first stage has the look-up's gradient, the last one the head's, those between them none.
        if head_BSD is None and look_up_BSD is not None:
            # Contiguous, as the last stage's is.
            head_BSD = torch.zeros(look_up_BSD.shape, device=look_up_BSD.device)
        if head_BSD is not None:
            sum_over("embedding", head_BSD)
        if head_BSD is not None and look_up_BSD is not None:
            sums.sharded_BX[:, -1] += 2 * (head_BSD.double() * look_up_BSD).sum((1, 2))


def score_examples(
    engine: Engine, method: Method, examples: Examples, first: int = 0, last: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The method's rows [N, X] and mean label losses [N] of the examples [first, last): float64, on every
    rank."""
    context, size = engine.context, engine.influence.micro_batch
    last = len(examples) if last is None else last
    passes = examples.passes(first, last, engine.rows_per_pass)
    batches = engine.batches(examples, first, last)
    with Scorer(engine.gpt, method) as scorer:
        row_NX, loss_N = score(engine.model, scorer, batches, passes, size, engine.seq_length)
    # [passes, ranks, B, X + 1]: each rank fills in its own rows, the others' zeros change nothing.
    mine = torch.cat([row_NX, loss_N[:, None]], 1).view(passes, size, -1)
    all_rows = mine.new_zeros(passes, context.data_size, size, mine.shape[-1])
    all_rows[:, context.data_rank] = mine
    rows_PX = sum_over("tokens", all_rows).flatten(0, 2)[: examples.pieces(first, last)].cpu().numpy()
    out = examples.join(first, last, rows_PX)
    if engine.influence.loss == "sum":
        out[:, -1] /= examples.length_N[first:last]
    return out[:, :-1], out[:, -1]
