"""Row functions of the divergence for a CPU and a GPU against sums of float64, taken one by one."""

from __future__ import annotations

import math
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_r1.backend import cpu_divergence
from megatron_r1.model import divergence
from tests.interpreter import HAS_TRITON

FORMS: list[ModuleType] = [cpu_divergence]
if HAS_TRITON:
    from megatron_r1.backend import triton_divergence

    FORMS.append(triton_divergence)

SHAPES = [(3, 5000, torch.float32, torch.float32), (2, 2049, torch.bfloat16, torch.bfloat16)]
SHAPES += [(1, 1, torch.float32, torch.float32), (2, 49, torch.float32, torch.bfloat16)]


def logits(rows: int, width: int, dtype: torch.dtype, seed: int, shift: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * 4 + shift).to(dtype)


def row_numbers(z_s: list[float], z_t: list[float] | None, inverse: float) -> list[float]:
    """The eight, from their definitions."""
    m_s = max(z_s)
    s = [math.exp((z - m_s) * inverse) for z in z_s]
    sum_1 = math.fsum(math.exp(z - m_s) for z in z_s)
    if z_t is None:
        return [m_s, math.fsum(s), 0, 0, 0, 0, sum_1, 0]
    m_t = max(z_t)
    e = [math.exp((z - m_t) * inverse) for z in z_t]
    x = math.fsum(p * (z - m_t) * inverse for p, z in zip(e, z_t, strict=True))
    cross = math.fsum(p * (z - m_s) * inverse for p, z in zip(e, z_s, strict=True))
    return [m_s, math.fsum(s), m_t, math.fsum(e), x, x - cross, sum_1, z_s[z_t.index(m_t)]]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])
@pytest.mark.parametrize("inverse", [1.0, 0.5])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("rows", "width", "of_s", "of_t"), SHAPES)
def test_rows_are_those_of_float64(
    form: ModuleType,
    inverse: float,
    teacher: bool,
    rows: int,
    width: int,
    of_s: torch.dtype,
    of_t: torch.dtype,
) -> None:
    """Numbers to 1e-6. The gradient to a few roundings of float32 of its terms, or one of bf16 of itself."""
    student, its = logits(rows, width, of_s, 1, 7.0), logits(rows, width, of_t, 2, -60.0)
    found = form.statistics(student, its if teacher else None, inverse)
    assert found.dtype == torch.float32 and found.shape == (8, rows)
    pairs = zip(student.tolist(), its.tolist(), strict=True)
    exact = torch.tensor([row_numbers(s, t if teacher else None, inverse) for s, t in pairs]).T.double()
    most = exact.abs()
    # The terms of a difference have both signs.
    most[5] = most[4] + (most[5] - most[4]).abs()
    assert ((found - exact).abs() <= 1e-6 * most).all(), (found - exact).abs() / most
    a, b, c = (torch.rand(rows, generator=torch.Generator().manual_seed(k)) / width for k in range(3))
    for one in (None, c):
        ours = student.clone()
        of_teacher = (its, found[2], b) if teacher else (None, None, None)
        form.gradient(ours, of_teacher[0], found[0], of_teacher[1], inverse, a, of_teacher[2], one)
        own, other = student.double() - exact[0, :, None], its.double() - exact[2, :, None]
        terms = [a[:, None] * (own * inverse).exp()]
        terms += [-b[:, None] * (other * inverse).exp()] if teacher else []
        terms += [] if one is None else [one[:, None] * own.exp()]
        true = torch.stack(terms).sum(0)
        # Triton's interpreter cuts bits off where a GPU rounds.
        rounding = 2.0**-8 if form is cpu_divergence else 2.0**-7
        bound = (
            (rounding * true.abs() if of_s == torch.bfloat16 else 0.0)
            + 3e-6 * torch.stack(terms).abs().sum(0)
            + 1e-30
        )
        assert ours.dtype == of_s and ((ours.double() - true).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.rpartition(".")[2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_gives_nan_and_the_first_of_equals_is_picked(form: ModuleType, dtype: torch.dtype) -> None:
    student, teacher = logits(4, 3000, dtype, 1, 0.0), logits(4, 3000, dtype, 2, 0.0)
    teacher[3, [70, 2990]] = 40.0
    student[1, 2999], teacher[2, 0] = math.nan, math.nan
    number_8N = form.statistics(student, teacher, 1.0)
    assert number_8N[:, [0, 3]].isfinite().all() and number_8N[7, 3] == student[3, 70]
    assert number_8N[[0, 1, 5, 6], 1].isnan().all() and number_8N[2:5, 1].isfinite().all()
    assert number_8N[[2, 3, 4, 5, 7], 2].isnan().all() and number_8N[[0, 1, 6], 2].isfinite().all()


def test_threads_and_rows_that_lie_apart_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first columns of wider tables, whose others stay as they were."""
    wide = [logits(7, 400, torch.float32, seed, 0.0) for seed in (1, 2)]
    student, teacher = wide[0][:, :300], wide[1][:, :300]
    ones = torch.ones(7)
    expected = cpu_divergence.statistics(student.contiguous(), teacher.contiguous(), 0.7)
    slope, outside = student.clone().contiguous(), wide[0][:, 300:].clone()
    numbers = expected[0], expected[2], 0.7, ones, ones, None
    cpu_divergence.gradient(slope, teacher.contiguous(), *numbers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(cpu_divergence.statistics(student, teacher, 0.7), expected)
    cpu_divergence.gradient(student, teacher, *numbers)
    assert torch.equal(student, slope) and torch.equal(wide[0][:, 300:], outside)


@pytest.mark.parametrize(
    ("of_s", "of_t", "used"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float64, False),
        (torch.float64, torch.float64, False),
    ],
)
def test_the_loss_chooses_them_by_type(of_s: torch.dtype, of_t: torch.dtype, used: bool) -> None:
    hidden, weight = logits(6, 8, of_s, 1, 0.0).requires_grad_(), logits(50, 8, of_s, 2, 0.0)
    target = divergence.DenseTarget(logits(6, 8, of_t, 3, 0.0), logits(40, 8, of_t, 4, 0.0))
    label_N, one_N = torch.arange(6), torch.ones(6)
    slopes = []
    for kernels in (None, divergence):
        with mock.patch.object(cpu_divergence, "gradient", wraps=cpu_divergence.gradient) as called:
            options = {"tokens": 40, "temperature": 2.0, "weight": 0.5, "kernels": kernels}
            total = divergence.linear_divergence(hidden, weight, label_N, one_N, target, **options)[0]
            slopes += torch.autograd.grad(total, hidden)
        assert called.called == (used and kernels is None)
    # Both round a gradient of logits to bf16, after sums in another order.
    most = 2.0**-7 if of_s == torch.bfloat16 else 1e-6
    assert (slopes[0] - slopes[1]).norm() <= most * slopes[1].norm()
