"""Projection and loss as one operation against the two in a row."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.config import ParallelConfig
from megatron_r1.model.loss import linear_cross_entropy
from megatron_r1.parallel import process_groups
from tests.distributed import on_ranks
from tests.interpreter import KERNELS, needs_triton

TOKENS, HIDDEN, VOCABULARY = 37, 16, 300
NAMES = ("loss", "gradient of the hidden states", "gradient of the weight")


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels, and the gradient of each token's loss, zero for some."""
    torch.manual_seed(0)
    hidden = (torch.randn(TOKENS, HIDDEN) * scale).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN).to(dtype)
    upstream = torch.rand(TOKENS) * (torch.rand(TOKENS) > 0.3)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(VOCABULARY, (TOKENS,)), upstream


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, ...]:
    """In float64."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = h @ w.t()
    loss = F.cross_entropy(logits, labels, reduction="none")
    total = loss + z_loss * logits.logsumexp(1) ** 2
    return loss.detach(), *torch.autograd.grad(total, (h, w), upstream.double())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk", [None, 1, 8, TOKENS, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_fp32_is_plain_cross_entropy(chunk: int | None, scale: float, kernels: Any) -> None:
    hidden, weight, labels, upstream = inputs(scale=scale)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, kernels=kernels)
    results = loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)
    for name, ours, exact in zip(NAMES, results, plain(hidden, weight, labels, upstream), strict=True):
        # The logits' own rounding grows with them.
        assert (ours - exact).abs().max() <= 1e-6 * max(scale, 1) * exact.abs().max().clamp(min=1), name


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk", [None, 8])
def test_z_loss_is_in_the_gradient_alone(chunk: int | None, kernels: Any) -> None:
    hidden, weight, labels, upstream = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, z_loss=0.1, kernels=kernels)
    results = loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)
    for name, ours, exact in zip(NAMES, results, plain(hidden, weight, labels, upstream, 0.1), strict=True):
        assert (ours - exact).abs().max() <= 1e-6 * exact.abs().max().clamp(min=1), name


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_usual_z_loss_arrives_in_bf16(kernels: Any) -> None:
    """At 1e-4 the softmax counts 1.002 times, which bf16 rounds to 1."""
    torch.manual_seed(1)
    hidden = torch.randn(256, 64).bfloat16().requires_grad_()
    weight = (torch.randn(4096, 64) / 4).bfloat16().requires_grad_()
    labels, upstream = torch.randint(4096, (256,)), torch.ones(256)
    ours, exact = [], []
    for z_loss in (0.0, 1e-4):
        loss = linear_cross_entropy(hidden, weight, labels, z_loss=z_loss, kernels=kernels)
        ours.append(torch.autograd.grad(loss, (hidden, weight), upstream))
        exact.append(plain(hidden, weight, labels, upstream, z_loss)[1:])
    for with_z, without, with_z_exact, without_exact in zip(*reversed(ours), *reversed(exact), strict=True):
        wanted = with_z_exact - without_exact
        arrived = ((with_z.double() - without.double()) * wanted).sum() / wanted.square().sum()
        assert 0.8 < arrived < 1.25


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk", [None, 8])
def test_bf16_is_within_its_rounding(chunk: int | None, kernels: Any) -> None:
    hidden, weight, labels, upstream = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, kernels=kernels)
    results = loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)
    for name, ours, exact in zip(NAMES, results, plain(hidden, weight, labels, upstream), strict=True):
        assert (ours - exact).norm() <= 2**-7 * exact.norm(), name


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk", [None, 8])
def test_a_certain_label_leaves_a_small_gradient_exact(chunk: int | None, kernels: Any) -> None:
    """Where p is near 1, p - 1 must not be the difference of two rounded numbers."""
    weight = torch.tensor([[6.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]), chunk=chunk, kernels=kernels)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    assert gradient.item() == pytest.approx(-6 * torch.sigmoid(torch.tensor(-6.0)).item(), rel=2**-7)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_gradient_buffer_is_added_to(kernels: Any) -> None:
    hidden, weight, labels, upstream = inputs(torch.bfloat16)
    before = torch.randn(VOCABULARY, HIDDEN)
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, labels, kernels=kernels).backward(upstream)
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    exact = plain(hidden, weight, labels, upstream)[2]
    assert (weight.main_grad - before - exact).norm() <= 2**-7 * exact.norm()  # type: ignore[attr-defined]


def on_a_shard(ranks: int, chunk: int | None, form: str | None, z_loss: float) -> tuple[Tensor, ...]:
    """A rank's body: loss, gradient of the hidden states summed over ranks, gradient of its shard."""
    with process_groups(ParallelConfig(tensor=ranks)) as context:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        kernels = importlib.import_module(form) if form else None
        hidden, weight, labels, upstream = inputs()
        shard = weight.detach().chunk(ranks)[context.tensor_rank].clone().requires_grad_()
        loss = linear_cross_entropy(hidden, shard, labels, group, chunk, z_loss, kernels)
        of_hidden, of_shard = torch.autograd.grad(loss, (hidden, shard), upstream)
        torch.distributed.all_reduce(of_hidden, group=group)
        return loss.detach(), of_hidden, of_shard


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("chunk", "z_loss"), [(None, 0.0), (8, 0.0), (None, 0.1)])
def test_shards_of_the_vocabulary_agree(chunk: int | None, z_loss: float, kernels: Any) -> None:
    exact = plain(*inputs(), z_loss)
    ranks = on_ranks(2, on_a_shard, 2, chunk, kernels and kernels.__name__, z_loss)
    results = ranks[0][0], ranks[0][1], torch.cat([rank[2] for rank in ranks])
    for name, ours, expected in zip(NAMES, results, exact, strict=True):
        assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1), name
    assert torch.equal(ranks[0][0], ranks[1][0])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("column", [3, 299])
def test_a_logit_that_is_no_number_makes_its_loss_none(column: int, kernels: Any) -> None:
    hidden, weight, labels, _ = inputs()
    weight.data[column, 0] = float("nan")
    assert linear_cross_entropy(hidden, weight, labels, kernels=kernels).isnan().all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("vocabulary", [1, 8192, 8193, 20_001])
def test_any_size_of_the_vocabulary(vocabulary: int, kernels: Any) -> None:
    """Around the kernel's block of 8192, with each first and last column a label."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (3, vocabulary))
    labels, upstream = torch.tensor([0, vocabulary - 1, vocabulary // 2]), torch.tensor([1.0, 2.0, 3.0])
    loss = linear_cross_entropy(hidden, weight, labels, kernels=kernels)
    results = loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)
    for name, ours, exact in zip(NAMES, results, plain(hidden, weight, labels, upstream), strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max().clamp(min=1), name


@needs_triton
@pytest.mark.parametrize("all_of", ["block", "row"])
def test_the_kernel_s_sums_pass_over_blocks_without_a_finite_logit(all_of: str) -> None:
    """A block is 8192 logits. The sum of a row of -inf is 0: another rank's share of it may be finite."""
    kernels = importlib.import_module("megatron_r1.backend.triton_kernels")
    logits = torch.randn(3, 8200)
    logits[1, : 8192 if all_of == "block" else 8200] = -float("inf")
    exact = logits.double()
    labels = torch.tensor([5, 8195, 8199])
    largest, total, picked = kernels.row_statistics(logits, labels, False, 0.0)
    assert torch.equal(largest.double(), exact.amax(1))
    assert torch.equal(picked.double(), exact.gather(1, labels[:, None])[:, 0])
    want = (exact - exact.amax(1, keepdim=True)).exp().sum(1).nan_to_num(0)
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk", [None, 5])
def test_what_is_no_number_gives_no_loss_of_its_token_alone(
    kernels: Any, value: float, chunk: int | None
) -> None:
    hidden, weight, labels, upstream = inputs()
    with torch.no_grad():
        hidden[3, 2] = value
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk, kernels=kernels)
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight), upstream + 0.1)
    assert of_hidden.isnan().any(1).nonzero().flatten().tolist() == [3] and of_weight.isnan().all()
