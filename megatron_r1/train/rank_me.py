"""RankMe (Eq. 8): how many directions the model's output embeddings use, of `hidden_size`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.parallel import from_last_stage, sum_over
from megatron_r1.records import Batch


class OutputEmbeddings:
    """Second moments of the hidden states before the head, gathered while batches pass through the model.

    As a context manager it watches the decoder's output; rows without labels are left out. Memory: one
    float64 [D, D]; cost: 2 D^2 FLOP a token.
    """

    def __init__(self, gpt: Any):
        self._gpt = gpt
        size = gpt.config.hidden_size
        self._gram_DD = torch.zeros(size, size, dtype=torch.float64, device=backend.device())
        # Interleaved, the first part of the model takes batches long before the last has passed them.
        self._real: deque[Tensor] = deque()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, noted as they are taken."""
        for batch in batches:
            self._real.append(batch.loss_mask_BS.any(dim=1))
            yield batch

    def __enter__(self) -> OutputEmbeddings:
        self._hook = self._gpt.decoder.register_forward_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _add(self, _module: Any, _inputs: Any, hidden_SBD: Any) -> None:
        if not self._gpt.post_process:
            return
        rows_ND = hidden_SBD.detach()[:, self._real.popleft()].flatten(0, 1).float()
        self._gram_DD += (rows_ND.t() @ rows_ND).double()

    def rank_me(self) -> float:
        """Of all tokens seen on all ranks; every rank calls this and gets the same number."""
        gram_DD = sum_over("tokens", self._gram_DD)
        if self._gpt.config.sequence_parallel:
            sum_over("tensor", gram_DD)
        return rank_me(from_last_stage(gram_DD))


def rank_me(gram_DD: Tensor) -> float:
    """exp of the entropy of p_k = sigma_k / sum sigma + 1e-7, sigma the singular values of Z, from Z^T Z."""
    sigma_D = torch.linalg.eigvalsh(gram_DD.double().cpu()).clamp(min=0).sqrt()
    p_D = sigma_D / sigma_D.sum() + 1e-7
    return float(torch.exp(-(p_D * p_D.log()).sum()))
