"""What is measured between steps: held-out losses of capabilities and sources, and RankMe."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.config import Config
from megatron_r1.data.indexed import open_corpus
from megatron_r1.data.open import document_end, launched
from megatron_r1.parallel import ParallelContext, from_last_stage, sum_over
from megatron_r1.records import Batch, Corpus
from megatron_r1.train.batches import HeldOut
from megatron_r1.train.step import Shape, Training, label_losses


class Evaluation:
    """Losses on `data.probes` by capability, and on each source's documents that are set aside.

    Raises ValueError where a probing set holds no window, or a token that the model has no row for.
    """

    def __init__(self, config: Config, corpora: list[Corpus], training: Training, context: ParallelContext):
        self._training = training
        seq_length, micro_batch = config.data.seq_length, config.train.micro_batch
        eod = document_end(config)
        # An interleaved pipeline takes micro-batches in groups of its stages.
        multiple = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
        self._sets = {
            name: (
                HeldOut(windows, seq_length, config.model.vocab_size, micro_batch, context, eod, multiple),
                tuple(windows),
            )
            for name, windows in (
                ("probe_nll", _probing(config)),
                ("validation_nll", _validation(config, corpora)),
            )
            if windows
        }
        self._shape = (micro_batch, seq_length)

    def measure(self) -> dict[str, Any]:
        """Nats a label, by capability and by source; RankMe of the first set's hidden states (Eq. 8)."""
        found: dict[str, Any] = {}
        for what, (held_out, names) in self._sets.items():
            with OutputEmbeddings(self._training.last) as embeddings:
                batches = embeddings.watch(held_out.batches())
                loss_N, tokens_N = label_losses(
                    self._training, batches, held_out.passes, Shape(*self._shape, sources=len(names))
                )
            found[what] = dict(zip(names, (loss_N / tokens_N).tolist(), strict=True))
            if "rank_me" not in found:
                found["rank_me"] = embeddings.rank_me()
        return found


def _probing(config: Config) -> dict[str, tuple[Corpus, np.ndarray]]:
    """All windows of each capability's probing set."""
    found = {}
    for name, prefix in config.data.probes.items():
        probe = open_corpus(name, prefix, share=launched())
        count = probe.windows(config.data.seq_length)
        if count == 0:
            raise ValueError(
                f"probing set {name} ({prefix}) holds {probe.tokens} tokens, less than one window of "
                f"{config.data.seq_length}; set more documents aside"
            )
        found[name] = (probe, np.arange(count))
    return found


def _validation(config: Config, corpora: list[Corpus]) -> dict[str, tuple[Corpus, np.ndarray]]:
    """The first `train.validation_windows` windows behind the documents that each source trains on."""
    found = {}
    for corpus in corpora:
        whole = open_corpus(corpus.name, corpus.prefix, share=launched())
        first = -(-corpus.tokens // config.data.seq_length)
        last = min(whole.windows(config.data.seq_length), first + config.train.validation_windows)
        if first < last:
            found[corpus.name] = (whole, np.arange(first, last))
    return found


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
