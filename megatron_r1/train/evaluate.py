"""Measurements between steps: held-out losses of capabilities and sources, gold answers, and RankMe."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.config import Config
from megatron_r1.data.indexed import document_starts
from megatron_r1.data.loader import example_batches
from megatron_r1.data.open import OpenData
from megatron_r1.data.windows import Answers, Examples
from megatron_r1.parallel import ParallelContext, from_last_stage, on_device, sum_over
from megatron_r1.records import Batch, Corpus
from megatron_r1.train.step import Shape, Training, label_losses


class Evaluation:
    """Losses on `data.probes` by capability, on documents of each source that are set aside, on `data.gold`.

    Raises ValueError if one of their windows holds a token that the model has no row for.
    """

    def __init__(self, config: Config, data: OpenData, training: Training, context: ParallelContext):
        self._training, self._context, self._eod = training, context, data.eod
        seq_length, self._micro_batch = config.data.seq_length, config.train.micro_batch
        # An interleaved pipeline takes micro-batches in groups of its stages.
        self._multiple = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
        probing = [(probe, np.arange(probe.windows(seq_length))) for probe in data.probes]
        validation = _validation(data.corpora, seq_length, config.train.validation_windows)
        self._sets = {
            what: (Examples(sets, seq_length), [corpus.name for corpus, _ in sets])
            for what, sets in (("probe_nll", probing), ("validation_nll", validation))
            if sets
        }
        self._gold, self._answers = data.gold, _answers(data.gold, config)
        for examples in (*(examples for examples, _ in self._sets.values()), *self._answers):
            if mistake := examples.unknown_id(config.model.vocab_size):
                raise ValueError(mistake)

    def measure(self) -> dict[str, Any]:
        """Nats a label, by capability and by source; RankMe of the first set's hidden states (Eq. 8).

        Of gold answers, by set, bits per UTF-8 byte: the sum of -log2 p of their tokens over their bytes.
        """
        measured: dict[str, Any] = {}
        for what, (examples, names) in self._sets.items():
            with OutputEmbeddings(self._training.last) as embeddings:
                loss_N, tokens_N = self._losses(examples, len(names), embeddings.watch)
            measured[what] = dict(zip(names, (loss_N / tokens_N).tolist(), strict=True))
            if "rank_me" not in measured:
                measured["rank_me"] = embeddings.rank_me()
        if self._gold:
            parts = [self._losses(answers, len(self._gold)) for answers in self._answers]
            nats_N, labels_N = torch.stack(parts).sum(0).tolist()
            measured["gold_bpb"] = {}
            for of, nats, labels in zip(self._gold, nats_N, labels_N, strict=True):
                # All tokens of the answers and no other: their bytes are those of all items.
                assert of.gold and labels == of.tokens - sum(of.gold.prompt_tokens)
                measured["gold_bpb"][of.name] = nats / math.log(2) / of.gold.bytes
        return measured

    def _losses(self, examples: Examples, sets: int, watch: Watch = iter) -> Tensor:
        """Sums of losses and numbers of labels by set, float64 [2, sets]. `watch`: sees all batches."""
        span, size, multiple = (0, len(examples)), self._micro_batch, self._multiple
        passes = -(-examples.passes(*span, size * self._context.data_size) // multiple) * multiple
        rows = example_batches(examples, span, size, self._context, self._eod, passes)
        batches = watch(on_device(batch) for batch, _ in rows)
        return label_losses(self._training, batches, passes, Shape(size, examples.seq_length, sets))


Watch = Callable[[Iterator[Batch]], Iterator[Batch]]
_NARROWEST = 128
"""Labels of a row, below which rows are not made narrower."""


def _answers(gold: list[Corpus], config: Config) -> list[Answers]:
    """All answers. Those that fit half a row, a quarter and so on have rows of that width: most are short."""
    length, parts = config.data.seq_length, 2 * config.parallel.context * config.parallel.tensor
    labels = [np.diff(document_starts(corpus)) - 1 for corpus in gold]
    widths = [length]
    while widths[-1] > _NARROWEST and widths[-1] % (2 * parts) == 0:
        widths.append(widths[-1] // 2)
    spans = zip(widths, [*widths[1:], 0], strict=True)
    chosen = [
        (width, [np.flatnonzero((less < n_N) & ((n_N <= width) | (width == length))) for n_N in labels])
        for width, less in spans
    ]
    return [Answers(list(zip(gold, sets, strict=True)), w) for w, sets in chosen if any(map(len, sets))]


def _validation(corpora: list[Corpus], seq_length: int, most: int) -> list[tuple[Corpus, np.ndarray]]:
    """The first `most` windows behind the documents that each source trains on."""
    sets = []
    for corpus in corpora:
        whole = replace(corpus, tokens=corpus.tokens + corpus.set_aside)
        first = -(-corpus.tokens // seq_length)
        last = min(whole.windows(seq_length), first + most)
        if first < last:
            sets.append((whole, np.arange(first, last)))
    return sets


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
