"""A teacher on this rank: logits of documents, and targets of a training step.

Each document is a sequence of its own, with positions from 0 and the teacher's token before it. Sequences of
like length share a batch, padded on the right. Nothing sees the padding, because the models are causal.
"""

from __future__ import annotations

import dataclasses
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
from megatron_r1.export.pretrained import Pretrained, batches
from megatron_r1.model.divergence import DenseTarget
from megatron_r1.parallel import cut_to_rank
from megatron_r1.records import Batch

_LOGITS = 256 << 20
"""Bytes of float32 logits that `Teacher.logits` makes at a time, or more for one long sequence."""
_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Of the largest logit, between trunk and head apart and the model's own forward."""


class Teacher(Pretrained):
    """A frozen causal language model on this rank's device: eval mode, no graph.

    `bos` as of `Described`, which gives `tokens`, `longest`, `bos`, `identity`, `parameters` and
    `flops_per_token`. `together` as of `Pretrained`. Its weights are read at once. Raises as both do, and
    ValueError for logits of 16 tokens that are not finite.
    """

    automatic = "AutoModelForCausalLM"

    def __init__(self, model: str, precision: str, bos: str | int = "auto", together: bool = False):
        self.described = said = Described(model, bos)
        super().__init__(model, 1, precision=precision, together=together)
        self.tokens, self.bos, self.longest = said.tokens, said.bos, said.longest
        self.parameters, self.flops_per_token = said.parameters, said.flops_per_token
        self.network.requires_grad_(False)
        ids_1S = (torch.arange(16)[None] * 7919 % self.tokens).to(backend.device())
        own_SV = self._forward(ids_1S)[0, :, : self.tokens].float()
        self._near = _TOLERANCE[precision] * own_SV.abs().max()
        if not own_SV.isfinite().all():
            raise ValueError(f"{model}: its logits are not finite; its weights are damaged")
        before_SV = self._forward(ids_1S[:, :8])[0, :, : self.tokens].float()
        if not (before_SV - own_SV[:8]).abs().max() <= self._near:
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
        c = self._sizes
        # A model may have neither, or call them otherwise.
        with suppress(AttributeError, TypeError, NotImplementedError, RuntimeError):
            layer, self._trunk = self.network.get_output_embeddings(), self.network.get_decoder()
            # Llama 4 names another attribute as its trunk.
            self._trunk = self.network.model if self._trunk is self.network else self._trunk
            hidden_SD, bias_V = self._hidden(ids_1S)[0], getattr(layer, "bias", None)
            head = DenseTarget(
                hidden_SD,
                layer.weight[: self.tokens],
                None if bias_V is None else bias_V[: self.tokens],
                getattr(c, "final_logit_softcapping", None),
                getattr(c, "logit_scale", 1.0)
                / getattr(c, "logits_scaling", 1.0)
                * getattr(c, "lm_head_multiplier", 1.0),
            )
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
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
        """(numbers of the sequences of a batch, tokens put before each, results [B, S, ...])."""
        # Data from elsewhere may begin its documents with it.
        lead_N = np.array([self.bos is not None and one[0] != self.bos for one in sequences], np.int64)
        length_N = np.array([len(one) for one in sequences], np.int64) + lead_N
        for batch in batches(length_N, budget):
            ids_BS = np.zeros((len(batch), length_N[batch[0]]), np.int64)
            for row_S, n in zip(ids_BS, batch, strict=True):
                row_S[0] = self.bos or 0
                row_S[lead_N[n] : length_N[n]] = sequences[n]
            yield batch, lead_N[batch], forward(on_device(ids_BS))

    def logits(self, sequences: Sequence[np.ndarray]) -> Iterator[tuple[int, int, Tensor]]:
        """(number of the sequence, position of the first row, logits [n, tokens]), in any order of sequences.

        Row o is the distribution behind tokens 0 to o of the sequence. Sequences have at least one token,
        and with `bos` at most `longest`. Logits may be views; they are not looked at, and may be NaN.
        """
        rows = max(1, _LOGITS // (4 * self.tokens))
        forward, budget = (self._hidden, pretrained.BATCH_TOKENS) if self._head else (self._forward, rows)
        for batch, lead_B, out_BSX in self._passes(sequences, forward, budget):
            for n, lead, out_SX in zip(batch.tolist(), lead_B.tolist(), out_BSX, strict=True):
                own_SX = out_SX[lead : lead + len(sequences[n])]
                for first in range(0, len(own_SX), rows):
                    part_NX = own_SX[first : first + rows]
                    head = self._head and dataclasses.replace(self._head, hidden_ND=part_NX)
                    yield n, first, head.logits(slice(None)) if head else part_NX[:, : self.tokens]

    def targets(self, eod: int | None, rows: int) -> Callable[[Batch], DenseTarget]:
        """Batch -> what the student's distributions are compared with, in the order s * B + b of its rows.

        `eod`: the token that ends a document; None: a row is one sequence. `rows`: the student's rows of the
        vocabulary on a tensor-parallel rank. The ranks of a tensor-parallel group share the sequences. A
        context-parallel rank runs whole rows, as far as its tokens see them. Hidden states that are not
        finite raise ValueError on a CPU. A GPU is not waited for: there the loss becomes NaN, and the step is
        left out.

        ValueError where trunk and head are not the model's own forward.
        """
        if self._head is None:
            way_out = "write a cache with it instead (tools/cache_teacher.py)"
            raise ValueError(f"{self.model}: its layers and its head apart do not give its logits; {way_out}")
        return _Online(self, self._head, eod, rows)


class _Online:
    def __init__(self, teacher: Teacher, head: DenseTarget, eod: int | None, rows: int):
        from megatron.core import parallel_state as ps

        self._teacher, self._head, self._eod = teacher, head, eod
        self._group = ps.get_tensor_model_parallel_group()
        self._rank, self._ranks = self._group.rank(), self._group.size()
        self._shard = slice(rows * self._rank, rows * (self._rank + 1))

    def __call__(self, batch: Batch) -> DenseTarget:
        assert batch.whole_BS is not None, "parallel.on_device sets it"
        token_BS = batch.whole_BS.numpy()
        b, s = token_BS.shape
        # Where each token of the whole rows goes; -1: to another context-parallel rank.
        number_BS = cut_to_rank({"number": torch.arange(b * s).view(b, s)})["number"].numpy()
        to_N = np.full(b * s, -1)
        to_N[number_BS.T.ravel()] = np.arange(number_BS.size)
        every = np.split(np.arange(b * s), self._first_of_sequences(token_BS)[1:])
        # Of a sequence only what this rank's tokens see.
        parts = [part[: own[-1] + 1] for part in every if len(own := np.flatnonzero(to_N[part] >= 0))]
        flat_N, mine = token_BS.ravel(), self._mine([len(part) for part in parts])
        hidden_ND = self._head.weight_VD.new_zeros(number_BS.size, self._head.weight_VD.shape[1])
        sequences = [flat_N[parts[m]] for m in mine]
        passes = self._teacher._passes(sequences, self._teacher._hidden, pretrained.BATCH_TOKENS)
        for order, lead_B, out_BSD in passes:
            width = out_BSD.shape[1]
            to = [to_N[parts[mine[n]]] for n in order]
            begin_B = np.arange(len(order)) * width + lead_B
            of = [begin + np.arange(len(one)) for begin, one in zip(begin_B, to, strict=True)]
            to_K = np.concatenate(to)
            from_K = on_device(np.concatenate(of)[to_K >= 0])
            part_KD = out_BSD.flatten(0, 1).index_select(0, from_K)
            hidden_ND.index_copy_(0, on_device(to_K[to_K >= 0]), part_KD)
        if self._ranks > 1:
            # A gather: where one rank has a row, the others have zeros.
            dist.all_reduce(hidden_ND, group=self._group)
        if not backend.HAS_CUDA and not (whole_N := hidden_ND.isfinite().all(1)).all():
            row = int(torch.argmin(whole_N.int())) % b
            raise ValueError(f"{self._teacher.model}: hidden states of row {row} of a batch are not finite")
        weight_VD, bias_V = self._head.weight_VD[self._shard], self._head.bias_V
        bias_V = None if bias_V is None else bias_V[self._shard]
        return dataclasses.replace(self._head, hidden_ND=hidden_ND, weight_VD=weight_VD, bias_V=bias_V)

    def _first_of_sequences(self, token_BS: np.ndarray) -> np.ndarray:
        """Number of the first token of each sequence."""
        first_BS = np.zeros(token_BS.shape, bool)
        first_BS[:, 0] = True
        if self._eod is not None:
            first_BS[:, 1:] = token_BS[:, :-1] == self._eod
        return np.flatnonzero(first_BS)

    def _mine(self, lengths: list[int]) -> list[int]:
        """This rank's share of sequences: from the longest on, each to the rank with the fewest tokens."""
        held, mine = [0] * self._ranks, list[int]()
        for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
            rank = held.index(min(held))
            held[rank] += lengths[n]
            if rank == self._rank:
                mine.append(n)
        return mine


def on_device(array: np.ndarray) -> Tensor:
    """The array on this rank's device. A GPU is not waited for."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if backend.HAS_CUDA else tensor).to(backend.device(), non_blocking=True)
