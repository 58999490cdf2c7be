"""RankMe against singular values of the hidden states themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_r1.config import ParallelConfig
from megatron_r1.parallel import process_groups
from megatron_r1.records import Batch
from megatron_r1.train.evaluate import OutputEmbeddings, rank_me
from tests.distributed import on_ranks
from tests.influence import tiny

ROWS = 6
REAL = 4


def batch() -> Batch:
    window = torch.from_numpy(tiny.windows(ROWS))
    labels = window[:, 1:].contiguous()
    return Batch(
        tokens_BS=window[:, :-1].contiguous(),
        labels_BS=labels,
        loss_mask_BS=(torch.arange(ROWS) < REAL)[:, None].expand_as(labels).float(),
        position_BS=torch.arange(tiny.SEQ).expand_as(labels),
        source_B=torch.zeros(ROWS, dtype=torch.long),
    )


def _ranked(parallel: ParallelConfig) -> tuple[float, np.ndarray]:
    """RankMe as reported, and the hidden states of this rank."""
    with process_groups(parallel):
        gpt = tiny.build(parallel)
        seen = []
        gpt.decoder.register_forward_hook(lambda _m, _i, hidden: seen.append(hidden.detach()))
        with torch.no_grad(), OutputEmbeddings(gpt) as embeddings:
            for one in embeddings.watch(iter([batch()])):
                gpt(one.tokens_BS, one.position_BS, None, labels=one.labels_BS)
        return embeddings.rank_me(), seen[0].numpy()


def _by_definition(hidden_SBD: np.ndarray) -> float:
    rows = hidden_SBD[:, :REAL].reshape(-1, hidden_SBD.shape[-1]).astype(np.float64)
    sigma = np.linalg.svd(rows, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def test_it_is_the_entropy_of_the_singular_values() -> None:
    measured, hidden = on_ranks(1, _ranked, ParallelConfig())[0]
    assert measured == pytest.approx(_by_definition(hidden), rel=1e-4)
    assert 1 < measured < tiny.MODEL.hidden_size


def test_sequence_parallel_ranks_see_every_token_once() -> None:
    one = on_ranks(1, _ranked, ParallelConfig())[0][0]
    for measured, _ in on_ranks(2, _ranked, ParallelConfig(tensor=2, sequence=True)):
        assert measured == pytest.approx(one, rel=1e-5)


def test_extremes() -> None:
    assert rank_me(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rank_me(torch.ones(16, 16)) == pytest.approx(1, abs=1e-3)
