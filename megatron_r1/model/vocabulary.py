"""GPTModel whose two uses of the tied embedding, look-up and loss, are this project's own.

Both add their gradients where DistributedDataParallel keeps them: no dense gradient of a look-up that
touches few rows, no copy in the model's type, and whole logits only where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend  # noqa: F401  (before megatron.core)
from megatron_r1.model.divergence import FIGURES, DenseTarget, SparseTarget, linear_divergence
from megatron_r1.model.loss import Watch, linear_cross_entropy, main_gradient, say_added

# isort: split
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


class VocabularyGpt(GPTModel):
    """Label losses [B, S] without whole logits; everything else is GPTModel's."""

    head_chunk: int | None = None
    """Tokens whose logits exist at a time while training; None: all of the micro-batch."""
    z_loss: float = 0.0
    loss_kernels: Any = None
    """All three: see `linear_cross_entropy`."""
    head_watcher: Callable[[], Watch] | None = None
    """Called in each forward pass of a frozen head; what it returns gets the factors of the head's gradient,
    [S, B, D] and [S, B, V]. None: the head's layer runs, whose hooks see the logits."""

    divergence_kernels: Any = None
    """See `linear_divergence`."""
    _distillation: tuple[DenseTarget | SparseTarget, Tensor, int, float, float] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.pre_process:
            embedding = self.embedding.word_embeddings
            embedding.__class__ = _Embedding
            # megatron-core asks for zeros where a gradient was added to the buffer already, to add them.
            embedding.weight.zero_out_wgrad = False

    @contextmanager
    def distilling(
        self,
        target: DenseTarget | SparseTarget,
        counts_BS: Tensor,
        tokens: int,
        temperature: float = 1.0,
        weight: float = 1.0,
    ) -> Iterator[None]:
        """Within, a call with labels returns (total [], loss [B, S], FIGURES [4, B, S]) as `linear_divergence`.

        Only `total` has a graph. Rows of the target are in the order [S, B]. Wrappers of the model hand the
        three on. The model must not be divided into pipeline stages.
        """
        self._distillation = target, counts_BS, tokens, temperature, weight
        try:
            yield
        finally:
            self._distillation = None

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Any:
        weight = self.shared_embedding_or_output_weight() if self.post_process else None
        own = self.head_watcher or self._distillation
        if weight is None or labels is None or not (weight.requires_grad or own):
            return super()._postprocess(hidden_states, labels=labels, **others)
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_SBD = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        s, b, d = hidden_SBD.shape
        if self._distillation is not None:
            target, counts_BS, tokens, temperature, share = self._distillation
            total, loss_N, figures_FN = linear_divergence(
                hidden_SBD.reshape(s * b, d),
                weight,
                labels.t().reshape(s * b),
                counts_BS.t().reshape(s * b),
                target,
                tokens=tokens,
                temperature=temperature,
                weight=share,
                group=group,
                kernels=self.divergence_kernels,
            )
            figures_FBS = figures_FN.view(len(FIGURES), s, b).transpose(1, 2).contiguous()
            return total, loss_N.view(s, b).t().contiguous(), figures_FBS
        watch = self.head_watcher() if self.head_watcher else None
        loss_N = linear_cross_entropy(
            hidden_SBD.reshape(s * b, d),
            weight,
            labels.t().reshape(s * b),
            group,
            self.head_chunk,
            self.z_loss,
            self.loss_kernels,
            watch and (lambda *factors: watch(*(x.view(s, b, -1) for x in factors))),
        )
        return loss_N.view(s, b).t().contiguous()


class _Embedding(VocabParallelEmbedding):
    """megatron-core's, but for the gradient of its weight."""

    def forward(self, input_: Tensor) -> Tensor:
        rows_BS, elsewhere_BS = input_, None
        if self.tp_group.size() > 1:
            elsewhere_BS = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            rows_BS = (input_ - self.vocab_start_index).masked_fill(elsewhere_BS, 0)
        out: Tensor = _LookUp.apply(rows_BS, self.weight)
        if elsewhere_BS is not None:
            out = out.masked_fill(elsewhere_BS[..., None], 0.0)
        if self.reduce_scatter_embeddings:
            out = out.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out, group=self.tp_group)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BS: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_BS)
        ctx.weight = weight_VD
        return F.embedding(rows_BS, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[None, Tensor | None]:  # type: ignore[override]
        (rows_BS,) = ctx.saved_tensors
        main_VD = main_gradient(ctx.weight)
        total_VD = torch.zeros_like(ctx.weight) if main_VD is None else main_VD
        total_VD.index_add_(0, rows_BS.flatten(), grad_BSD.flatten(0, 1).to(total_VD.dtype))
        if main_VD is None:
            return None, total_VD
        say_added(ctx.weight)
        return None, None
