"""Documents end to end, as a GPU attends them: where they begin, torch's kernel, whole runs.

The kernel itself runs on a GPU alone (tests/gpu). Here a function of its signature computes one document
after the other by the CPU's own attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from megatron_r1 import backend
from megatron_r1.backend.cpu_attention import causal_attention
from megatron_r1.config import Config
from megatron_r1.train import loop
from tests.distributed import on_ranks
from tests.model.test_attention import GROUPS, HEADS, SEGMENTS, B, D, S, attention, inputs, shaped
from tests.train import small

STARTS = [0, 5, 6, 24, 48]
"""Of SEGMENTS."""
rows = st.integers(1, 6).flatmap(
    lambda s: st.lists(st.lists(st.integers(0, 2), min_size=s, max_size=s), min_size=1, max_size=4)
)


@given(rows)
def test_documents_begin_where_their_number_changes_and_with_each_row(step_BS: list[list[int]]) -> None:
    """Numbers rise by 0, 1 or 2 from token to token; the oracle goes through them one by one."""
    number_BS = torch.tensor(step_BS, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    want = []
    for b, row in enumerate(number_BS.tolist()):
        want += [b * len(row) + s for s in range(len(row)) if s == 0 or row[s] != row[s - 1]]
    starts = backend.document_starts(number_BS)
    assert starts.dtype == torch.int32 and starts.tolist() == [*want, number_BS.numel()]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float | None) -> Tensor:
    """What varlen_attn computes."""
    cu_seq_q, cu_seq_k, max_q, max_k = rest
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q is cu_seq_k and max_q == max_k
    assert (cu_seq_q.diff() <= max_q).all() and cu_seq_q[-1] == len(query)
    parts = []
    for first, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (t[first:end].transpose(0, 1)[None] for t in (query, key, value))
        parts.append(causal_attention(q, k, v, scale or q.shape[-1] ** -0.5)[0].transpose(0, 1))
    return torch.cat(parts)


def attended(attention_mask: Tensor) -> list[Tensor]:
    """Output and gradients of bf16 attention."""
    *qkv, grad = (x.bfloat16() for x in inputs())
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attention()(*shaped(*leaves), attention_mask)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]  # type: ignore[misc]


def test_documents_end_to_end_are_attended_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "document_attention", lambda: one_by_one)
    starts = backend.document_starts(SEGMENTS)
    assert starts.tolist() == STARTS
    for got, want in zip(attended(starts), attended(SEGMENTS), strict=True):
        assert got.is_contiguous() and torch.equal(got, want)


def test_in_fp32_the_documents_are_masked() -> None:
    """No kernel takes it; the numbers of the documents are found again from where they begin."""
    query, key, value, _ = inputs()
    got = attention()(*shaped(query, key, value), torch.tensor(STARTS, dtype=torch.int32))
    torch.testing.assert_close(got, attention()(*shaped(query, key, value), SEGMENTS))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(backend, "HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    backend.document_attention.cache_clear()
    yield monkeypatch
    backend.document_attention.cache_clear()


def test_torch_takes_the_call(pretended: pytest.MonkeyPatch) -> None:
    """Of tensors without elements torch's own operator knows the shapes, also of the gradients."""
    attend = backend.document_attention()
    assert attend is not None
    asked = inspect.signature(varlen.varlen_attn).bind(*[None] * 7, scale=None, **attend.keywords)  # type: ignore[attr-defined]
    assert asked.arguments["window_size"] == (-1, 0) and asked.arguments["enable_gqa"] is True
    q, k, v = (torch.empty(S * B, n, D, dtype=torch.bfloat16, device="meta") for n in (HEADS, GROUPS, GROUPS))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    starts = torch.tensor(STARTS, dtype=torch.int32, device="meta")
    out = attend(*leaves, starts, starts, S, S, scale=None)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    out.backward(torch.empty_like(out))
    assert [t.grad.shape for t in leaves if t.grad is not None] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("what", ["an old card", "torch without it", "torch without a scale", "a CPU"])
def test_elsewhere_there_is_none(pretended: pytest.MonkeyPatch, what: str) -> None:
    if what == "an old card":
        pretended.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    elif what == "torch without it":
        pretended.setattr(backend, "_VARLEN", "torch.nn.attention.absent")
    elif what == "torch without a scale":
        pretended.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal=False: query)
    else:
        pretended.setattr(backend, "HAS_CUDA", False)
    assert backend.document_attention() is None


def _counted(config: Config, end_to_end: bool) -> list[int]:
    """Train; how often documents were counted and attended."""
    calls = [0, 0]
    starts = backend.document_starts

    def counting(number_BS: Tensor) -> Tensor:
        calls[0] += 1
        return starts(number_BS)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        calls[1] += 1
        return one_by_one(*args, **kwargs)

    if end_to_end:
        backend.document_starts = counting
        backend.document_attention = lambda: attend  # type: ignore[assignment]
    loop.train(config)
    return calls


def test_a_pipeline_that_recomputes_counts_documents_once_a_batch(tmp_path: Path) -> None:
    """Two stages of two layers, two passes a step, all recomputed; the same bits as one by one."""
    small.written(tmp_path, end=7)
    apart = ("data.cross_documents=false", "data.eod=7", "train.precision=bf16", "train.recompute=full")
    more = (*apart, "parallel.pipeline=2", "train.global_batch=4")
    layers, passes = 2, 2
    configs = [small.config(tmp_path, name, 1, *more) for name in ("apart", "end_to_end")]
    on_ranks(2, _counted, configs[0], False)
    for counted, attended in on_ranks(2, _counted, configs[1], True):
        # Beside the passes of the step, those that measure held-out losses, where nothing is recomputed.
        assert counted > passes and attended == layers * (counted + passes)
    assert small.figures(tmp_path / "apart") == small.figures(tmp_path / "end_to_end")
