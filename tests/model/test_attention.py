"""Attention within documents, against a softmax over explicit pairs of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_r1.config import ParallelConfig
from megatron_r1.model.attention import SdpaAttention
from megatron_r1.parallel import cut_to_rank, process_groups
from tests.distributed import on_ranks

# isort: split
from megatron.core.process_groups_config import ProcessGroupCollection

S, B, HEADS, GROUPS, D = 24, 2, 4, 2, 8
SEGMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 18, [0] * 24], dtype=torch.int32)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, and what the output's gradient will be."""
    torch.manual_seed(0)
    sizes = (HEADS * D, GROUPS * D, GROUPS * D, HEADS * D)
    return tuple(torch.randn(S, B, size) for size in sizes)  # type: ignore[return-value]


def attention(group: object = None) -> SdpaAttention:
    config = SimpleNamespace(attention_dropout=0.0)
    return SdpaAttention(config, pg_collection=SimpleNamespace(cp=group))


def oracle(query: Tensor, key: Tensor, value: Tensor, segment_BS: Tensor | None) -> Tensor:
    """[S, B, HEADS * D], one pair of tokens at a time."""
    out = torch.zeros(S, B, HEADS, D)
    q, k, v = query.view(S, B, HEADS, D), key.view(S, B, GROUPS, D), value.view(S, B, GROUPS, D)
    for b in range(B):
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            for i in range(S):
                seen = [j for j in range(i + 1) if segment_BS is None or segment_BS[b, j] == segment_BS[b, i]]
                scores = torch.stack([q[i, b, head] @ k[j, b, group] for j in seen]) / D**0.5
                weights = scores.softmax(0)
                out[i, b, head] = sum(w * v[j, b, group] for w, j in zip(weights, seen, strict=True))
    return out.view(S, B, -1)


def shaped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = query.shape[0]
    return query.view(s, B, HEADS, D), key.view(s, B, GROUPS, D), value.view(s, B, GROUPS, D)


@pytest.mark.parametrize("segment_BS", [None, SEGMENTS], ids=["across", "within"])
def test_a_token_sees_what_came_before_it_in_its_document(segment_BS: Tensor | None) -> None:
    query, key, value, _ = inputs()
    got = attention()(*shaped(query, key, value), segment_BS)
    torch.testing.assert_close(got, oracle(query, key, value, segment_BS))


def _under_context_parallelism() -> list[Tensor]:
    """This rank's share of output and input gradients, and the same by one rank alone."""
    with process_groups(ParallelConfig(context=2)):
        group = ProcessGroupCollection.use_mpu_process_groups().cp
        *qkv, grad = inputs()

        def mine(x: Tensor) -> Tensor:
            return cut_to_rank({"x": x.transpose(0, 1)})["x"].transpose(0, 1).contiguous()

        segment = cut_to_rank({"x": SEGMENTS})["x"]
        leaves = [mine(x).requires_grad_() for x in qkv]
        out = attention(group)(*shaped(*leaves), segment)
        out.backward(mine(grad))
        whole = [x.clone().requires_grad_() for x in qkv]
        whole_rank = attention()(*shaped(*whole), SEGMENTS)
        whole_rank.backward(grad)
        got = [out.detach(), *(x.grad for x in leaves)]
        want = [whole_rank.detach(), *(x.grad for x in whole)]
        return [mine(w) - g for w, g in zip(want, got, strict=True)]  # type: ignore[arg-type]


def test_context_parallel_ranks_attend_within_documents_as_one_does() -> None:
    for differences in on_ranks(2, _under_context_parallelism):
        for difference in differences:
            assert difference.abs().max() < 1e-5
