"""KL divergence and distillation against torch's own kl_div, whole and sharded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.config import ParallelConfig
from megatron_r1.parallel import process_groups
from megatron_r1.records import Batch
from megatron_r1.train.objective import Distillation, kl_divergence
from tests.distributed import on_ranks
from tests.influence import tiny

# isort: split
from megatron.core import parallel_state as ps

ROWS, V = 7, 40


def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and the gradient of each row's loss."""
    torch.manual_seed(0)
    return torch.randn(ROWS, V) * 3, torch.randn(ROWS, V) * 3, torch.rand(ROWS)


def by_torch() -> tuple[Tensor, Tensor]:
    student, teacher, grad = logits()
    student.requires_grad_()
    loss = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    loss.sum(-1).backward(grad)
    assert student.grad is not None
    return loss.sum(-1).detach(), student.grad


def test_it_is_torchs_kl_divergence() -> None:
    student, teacher, grad = logits()
    student.requires_grad_()
    loss = kl_divergence(student, teacher)
    loss.backward(grad)
    for got, want in zip((loss, student.grad), by_torch(), strict=True):
        torch.testing.assert_close(got, want)


def _sharded() -> tuple[Tensor, Tensor]:
    with process_groups(ParallelConfig(tensor=2)) as context:
        mine = slice(context.tensor_rank * V // 2, (context.tensor_rank + 1) * V // 2)
        student, teacher, grad = logits()
        shard = student[:, mine].clone().requires_grad_()
        loss = kl_divergence(shard, teacher[:, mine], ps.get_tensor_model_parallel_group())
        loss.backward(grad)
        return loss.detach(), shard.grad  # type: ignore[return-value]


def test_shards_of_the_vocabulary_give_the_same() -> None:
    want_loss, want_grad = by_torch()
    shards = on_ranks(2, _sharded)
    for loss, _ in shards:
        torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(torch.cat([grad for _, grad in shards], dim=1), want_grad)


def _distilled() -> float:
    """Steps towards a teacher of other weights; the divergence before and after, as a ratio."""
    with process_groups(ParallelConfig()):
        student = tiny.build()
        teacher = tiny.build()
        with torch.no_grad():
            for p in teacher.parameters():
                p.add_(0.05 * torch.randn_like(p))
        window = torch.from_numpy(tiny.windows(4))
        position = torch.arange(tiny.SEQ).expand(4, -1)
        mask = torch.ones(4, tiny.SEQ)
        batch = Batch(window[:, :-1], window[:, 1:], mask, position, torch.zeros(4, dtype=torch.long))
        objective = Distillation(lambda b: teacher(b.tokens_BS, b.position_BS, b.documents))
        adam = torch.optim.Adam(student.parameters(), lr=3e-3)
        losses = []
        for _ in range(20):
            adam.zero_grad()
            loss = objective(student, batch).mean()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
        assert all(p.grad is None for p in teacher.parameters())
        return losses[-1] / losses[0]


def test_a_student_comes_closer_to_its_teacher() -> None:
    assert on_ranks(1, _distilled)[0] < 0.5


def _under_pipeline() -> None:
    with process_groups(ParallelConfig(pipeline=2)), pytest.raises(ValueError, match=r"parallel.pipeline=1"):
        Distillation(lambda b: b.tokens_BS)


def test_a_pipeline_is_refused() -> None:
    on_ranks(2, _under_pipeline)
