"""Attention by blocks against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.backend import cpu_attention
from megatron_r1.backend.cpu_attention import causal_attention


@pytest.mark.parametrize("keep", [0, 1024])
@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_values_and_gradients_are_torchs(length: int, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "_KEEP", keep)
    torch.manual_seed(length)
    # As megatron-core hands them over: [s, b, heads, d] seen as [b, heads, s, d].
    q, k, v = (torch.randn(length, 2, heads, 16).permute(1, 2, 0, 3).requires_grad_() for heads in (6, 2, 2))
    upstream = torch.randn(2, 6, length, 16)
    attended = causal_attention(q, k, v, 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attended, expected, atol=1e-6, rtol=1e-5)
    for ours, torchs in zip(
        torch.autograd.grad(attended, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_bf16_is_within_its_own_rounding() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 64) for heads in (9, 3, 3))
    exact = causal_attention(q, k, v, 0.125)
    low = causal_attention(*(t.bfloat16() for t in (q, k, v)), 0.125)
    assert (low.float() - exact).abs().max() < 2**-5
    assert (low.float() - exact).norm() / exact.norm() < 2**-7
