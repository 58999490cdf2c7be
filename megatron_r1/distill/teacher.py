"""A teacher on this rank: logits of documents, and targets of a training step.

Each document is a sequence of its own, with positions from 0 and the teacher's token before it. Sequences of
like length share a batch, padded on the right. Nothing sees the padding, because the models are causal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.distill.describe import Described
from megatron_r1.export import pretrained
from megatron_r1.export.pretrained import Pretrained
from megatron_r1.model.divergence import DenseTarget
from megatron_r1.parallel import cut_to_rank
from megatron_r1.records import Batch

_LOGITS = 256 << 20
"""Bytes of float32 logits that `Teacher.logits` makes at a time, or more for one long sequence."""
_PADDING = 64
"""Tokens that take about as long as another pass."""
_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Of the largest logit, between trunk and head apart and the model's own forward."""
_CAP = "final_logit_softcapping"
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
"""Fields of a model's configuration for its head, and the power of each in the factor of the logits."""


class Teacher(Pretrained):
    """A frozen causal language model on this rank's device: eval mode, no graph.

    `bos` as of `Described`, which gives `tokens`, `longest`, `bos`, `identity`, `parameters` and
    `flops_per_token`. `together` as of `Pretrained`. Its weights are read at once. Raises as both do, and
    ValueError for logits of 16 tokens that are not finite.
    """

    automatic = "AutoModelForCausalLM"

    def __init__(self, model: str, precision: str, bos: str | int = "auto", together: bool = False):
        self.described = described = Described(model, bos)
        super().__init__(model, 1, precision=precision, together=together)
        self.tokens, self.bos, self.longest = described.tokens, described.bos, described.longest
        self.parameters, self.flops_per_token = described.parameters, described.flops_per_token
        self.network.requires_grad_(False)
        ids_1S = (torch.arange(16)[None] * 7919 % self.tokens).to(backend.device())
        own_SV = self._forward(ids_1S)[0, :, : self.tokens].float()
        self._near = _TOLERANCE[precision] * own_SV.abs().max()
        if not own_SV.isfinite().all():
            raise ValueError(f"{model}: its logits are not finite; its weights are damaged")
        before_SV = self._forward(ids_1S[:, :8])[0, :, : self.tokens].float()
        # The mean, because another rounding may send a token to another expert.
        if not (before_SV - own_SV[:8]).abs().mean() <= self._near:
            raise ValueError(f"{model}: its logits depend on the tokens behind; take a causal model")
        self._trunk: Any = None
        self._head = self._find_head(ids_1S, own_SV)
        if together and dist.is_initialized():
            # The files of a converted checkpoint go with the first rank's object.
            dist.barrier()

    @property
    def identity(self) -> str:  # type: ignore[override]
        return self.described.identity

    def _find_head(self, ids_1S: Tensor, own_SV: Tensor) -> DenseTarget | None:
        """The head, without hidden states. None: it and the trunk do not give the model's own logits."""
        c, tokens = self._sizes, self.tokens
        # A model may have neither, or call them otherwise.
        with suppress(AttributeError, TypeError, NotImplementedError, RuntimeError):
            layer, self._trunk = self.network.get_output_embeddings(), self.network.get_decoder()
            # Llama 4 names another attribute as its trunk.
            self._trunk = self.network.model if self._trunk is self.network else self._trunk
            hidden_SD, bias_V = self._hidden(ids_1S)[0], getattr(layer, "bias", None)
            bias_V, cap = None if bias_V is None else bias_V[:tokens], getattr(c, _CAP, None)
            scale = math.prod(getattr(c, name, 1.0) ** power for name, power in _SCALES.items())
            head = DenseTarget(hidden_SD, layer.weight[:tokens], bias_V, cap, scale)
            if (head.logits(slice(None)).float() - own_SV).abs().max() <= self._near:
                return dataclasses.replace(head, hidden_ND=hidden_SD[:0])
        return None

    @torch.no_grad()
    def _forward(self, ids_BS: Tensor) -> Tensor:
        with self._fails_to("run"):
            return self.network(input_ids=ids_BS, use_cache=False).logits

    @torch.no_grad()
    def _hidden(self, ids_BS: Tensor) -> Tensor:
        return self._trunk(input_ids=ids_BS, use_cache=False).last_hidden_state

    def _passes(
        self, sequences: Sequence[np.ndarray], forward: Callable[[Tensor], Tensor], budget: int
    ) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """(numbers of the sequences of a batch, the row where each begins, results [rows, ...])."""
        # Data from elsewhere may begin its documents with it.
        lead_N = np.array([self.bos is not None and one[0] != self.bos for one in sequences], np.int64)
        length_N = np.array([len(one) for one in sequences], np.int64) + lead_N
        for batch in _batches(length_N, budget):
            ids_BS = np.full((len(batch), length_N[batch[0]]), self.bos or 0)
            for row_S, n in zip(ids_BS, batch, strict=True):
                row_S[lead_N[n] : length_N[n]] = sequences[n]
            begin_B = np.arange(len(batch)) * ids_BS.shape[1] + lead_N[batch]
            yield batch.tolist(), begin_B.tolist(), forward(on_device(ids_BS)).flatten(0, 1)

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[tuple[int, int, Tensor]]:
        """(number of the sequence, position of the first row, logits [n, tokens]), in any order of sequences.

        Row o is the distribution behind tokens 0 to o of the sequence. Sequences have at least one token,
        and with `bos` at most `longest`. Logits may be views; they are not looked at, and may be NaN.
        """
        rows = max(1, _LOGITS // (4 * self.tokens))
        forward, budget = (self._hidden, pretrained.BATCH_TOKENS) if self._head else (self._forward, rows)
        for batch, begin_B, out_NX in self._passes(sequences, forward, budget):
            for n, begin in zip(batch, begin_B, strict=True):
                for first in range(0, length := len(sequences[n]), rows):
                    part_NX = out_NX[begin + first : begin + min(length, first + rows)]
                    head = self._head and dataclasses.replace(self._head, hidden_ND=part_NX)
                    yield n, first, head.logits(slice(None)) if head else part_NX[:, : self.tokens]

    def targets(self, eod: int | None, rows: int) -> Callable[[Batch], DenseTarget]:
        """Batch -> what the student's distributions are compared with, in the order s * B + b of its rows.

        `eod`: the token that ends a document; None: a row is one sequence. `rows`: the student's rows of the
        vocabulary on a tensor-parallel rank. The ranks of a tensor-parallel group share the sequences. A
        context-parallel rank runs whole rows, as far as its tokens see them. Hidden states may be NaN: the
        step's loss then is, and all ranks leave the step out.

        ValueError where trunk and head are not the model's own forward.
        """
        from megatron.core import parallel_state as ps

        if (head := self._head) is None:
            way_out = "write a cache with it instead (tools/cache_teacher.py)"
            raise ValueError(f"{self.model}: its layers and its head apart do not give its logits; {way_out}")
        group = ps.get_tensor_model_parallel_group()
        rank, ranks = group.rank(), group.size()
        shard = slice(rows * rank, rows * (rank + 1))
        head = dataclasses.replace(
            head, weight_VD=head.weight_VD[shard], bias_V=None if head.bias_V is None else head.bias_V[shard]
        )

        def target(batch: Batch) -> DenseTarget:
            assert batch.whole_BS is not None, "parallel.on_device sets it"
            token_BS = batch.whole_BS.numpy()
            number_BS = np.arange(token_BS.size).reshape(token_BS.shape)
            own_BS = cut_to_rank({"number": torch.from_numpy(number_BS)})["number"].numpy()
            # Where each token of the whole rows goes; -1: to another context-parallel rank.
            to_N = np.full(token_BS.size, -1)
            to_N[own_BS.T.ravel()] = np.arange(own_BS.size)
            ends_BS = token_BS[:, :-1] == (-1 if eod is None else eod)
            first_M = np.flatnonzero(np.insert(ends_BS, 0, True, axis=1))
            every = np.split(number_BS.ravel(), first_M[1:])
            # Of a sequence only what this rank's tokens see.
            parts = [part[: own[-1] + 1] for part in every if len(own := np.flatnonzero(to_N[part] >= 0))]
            mine = sorted(parts, key=len, reverse=True)[rank::ranks]
            hidden_ND = head.weight_VD.new_zeros(own_BS.size, head.weight_VD.shape[1])
            sequences = [token_BS.ravel()[part] for part in mine]
            for order, begin_B, out_ND in self._passes(sequences, self._hidden, pretrained.BATCH_TOKENS):
                pairs = [(begin, mine[n]) for n, begin in zip(order, begin_B, strict=True)]
                from_K = np.concatenate([begin + np.arange(len(part)) for begin, part in pairs])
                to_K = to_N[np.concatenate([part for _, part in pairs])]
                part_KD = out_ND.index_select(0, on_device(from_K[to_K >= 0]))
                hidden_ND.index_copy_(0, on_device(to_K[to_K >= 0]), part_KD)
            if ranks > 1:
                # A gather: where one rank has a row, the others have zeros.
                dist.all_reduce(hidden_ND, group=group)
            return dataclasses.replace(head, hidden_ND=hidden_ND)

        return target


def _batches(length_N: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Numbers of the sequences of each batch, from the longest on, at most `budget` tokens or one sequence.

    Padding takes at most a tenth of a batch and `_PADDING`.
    """
    batch, padding = list[int](), 0
    for n in np.argsort(-length_N, kind="stable").tolist():
        size = len(batch) * length_N[batch[0]] if batch else 0
        padding += length_N[batch[0]] - length_N[n] if batch else 0
        if batch and (size + length_N[batch[0]] > budget or padding > _PADDING + size // 10):
            yield np.array(batch)
            batch, padding = [], 0
        batch.append(n)
    if batch:
        yield np.array(batch)


def on_device(array: np.ndarray) -> Tensor:
    """The array on this rank's device. A GPU is not waited for."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if backend.HAS_CUDA else tensor).to(backend.device(), non_blocking=True)
