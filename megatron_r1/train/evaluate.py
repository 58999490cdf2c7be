"""What is measured between steps: held-out losses of capabilities and sources, and RankMe."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_r1.config import Config
from megatron_r1.data.indexed import open_corpus
from megatron_r1.data.sources import document_end, launched
from megatron_r1.parallel import ParallelContext
from megatron_r1.records import Corpus
from megatron_r1.train.batches import HeldOut
from megatron_r1.train.rank_me import OutputEmbeddings
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
