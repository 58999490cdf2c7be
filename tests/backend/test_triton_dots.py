"""The kernel of products in Triton's interpreter, and its compilation for GPUs that this machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.influence import methods
from tests.influence.test_exactness import error, exact
from tests.launch import ROOT

pytest.importorskip("triton")
from megatron_r1.backend import triton_dots

Sums = Callable[[Tensor, Tensor, bool], Tensor]


def _true(gradient: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return gradient.double() @ direction.double().T, gradient.double().square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capabilities", [1, 3, 16, 18])
@pytest.mark.parametrize("squares", [False, True])
def test_products_and_squares_are_those_of_float64(
    dtype: torch.dtype, capabilities: int, squares: bool
) -> None:
    """Of rows that end within a tile, of one sign, from a slice of longer directions."""
    generator = torch.Generator().manual_seed(capabilities)
    gradient = torch.rand(3, 5001, generator=generator).to(dtype)
    direction = torch.rand(capabilities, 7000, generator=generator)[:, 999:6000]
    out = triton_dots.dots(gradient, direction, squares)
    true_BC, true_B = _true(gradient, direction)
    assert out.dtype == torch.float64 and out.shape == (3, capabilities + squares)
    torch.testing.assert_close(out[:, :capabilities], true_BC, rtol=2e-7, atol=0)
    if squares:
        torch.testing.assert_close(out[:, -1], true_B, rtol=2e-7, atol=0)


def test_float32_sums_stay_short() -> None:
    """Ones beside a number of 2^24, to which float32 can add none of them: sums in order would lose 1.5 %."""
    gradient = torch.ones(1, 1 << 18)
    gradient[0, 0] = 1 << 24
    out = triton_dots.dots(gradient, torch.ones(1, 1 << 18), False)
    assert float(out) == pytest.approx(float(gradient.double().sum()), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_rows_are_those_of_float64(dtype: torch.dtype) -> None:
    """Of rows that end within a tile, one operand's a slice of longer ones."""
    generator = torch.Generator().manual_seed(1)
    left, right = torch.rand(5, 2100, generator=generator), torch.rand(5, 3000, generator=generator)
    left, right = left.to(dtype), right.to(dtype)[:, 300:2400]
    out = triton_dots.row_dots(left, right)
    assert out.dtype == torch.float32 and out.shape == (5,)
    torch.testing.assert_close(out.double(), (left.double() * right.double()).sum(1), rtol=2e-7, atol=0)


def test_numbers_of_a_row_that_lie_apart_are_refused() -> None:
    x = torch.rand(8, 8)
    for left, right in ((x.t(), x), (x, x.t())):
        with pytest.raises(AssertionError):
            triton_dots.row_dots(left, right)
        with pytest.raises(AssertionError):
            triton_dots.dots(left, right, False)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_scores_of_tokens_use_the_kernel(
    kernel: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """Of layers with more outputs than inputs, and with fewer."""
    plain, seen = triton_dots.row_dots, []
    monkeypatch.setattr(triton_dots, "row_dots", lambda *rows: seen.append(rows) or plain(*rows))
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(1)
    a, g = (torch.randn(6, 2, n, generator=generator) for n in (inputs, outputs))
    v = torch.randn(3, outputs, inputs, generator=generator)
    row = torch.zeros(2, 18, dtype=torch.float64)
    methods.Ghost({"x": v}, 3, 6, per_token=True).linear("x", a, g, row)
    true = torch.einsum("sbo,coi,sbi->bsc", g.double(), v.double(), a.double())
    assert error(row.view(2, 6, 3), true) < 4e-7
    # The trial, and three directions on the shorter side.
    assert [tuple(left.shape) for left, _ in seen[1:]] == [(12, 96)] * 3


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    methods._reductions.cache_clear()
    yield
    methods._reductions.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_use_the_kernel(kernel: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Blocks of 64 rows and a rest, of which only the kernel knows."""
    monkeypatch.setattr(methods, "_block", lambda: 64 * 2 * 48)
    monkeypatch.setattr(methods, "_sums", _refuse_rows(methods._sums))
    generator = torch.Generator().manual_seed(1)
    a, g = (torch.randn(32, 2, n, generator=generator).to(dtype) for n in (48, 150))
    v = torch.randn(3, 150, 48, generator=generator)
    out = torch.zeros(2, 4, dtype=torch.float64)
    methods._add_together(out, a, g, v)
    true_BC, true_B = exact(a, g, v)
    # bf16 rounds each number of a gradient once, by 2^-9 at most.
    most = 4e-7 if dtype == torch.float32 else 2e-3
    assert error(out[:, :3], true_BC) < most
    assert ((out[:, 3].sqrt() - true_B).abs() / true_B).max() < most


def _refuse_rows(sums: Sums) -> Sums:
    def only_the_trial(gradient_BP: Tensor, direction_CP: Tensor, squares: bool) -> Tensor:
        assert gradient_BP.shape[1] == methods._TRIAL, "a layer's products by torch's operators"
        return sums(gradient_BP, direction_CP, squares)

    return only_the_trial


@pytest.mark.parametrize("fault", ["wrong", "not a number", "does not compile", "rows"])
def test_a_kernel_that_fails_its_trial_is_left_out(
    kernel: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    def spoilt(gradient_BP: Tensor, direction_CP: Tensor, squares: bool) -> Tensor:
        if fault == "does not compile":
            raise RuntimeError("ptxas fatal")
        return methods._sums(gradient_BP, direction_CP, squares) * (1.001 if fault == "wrong" else torch.nan)

    if fault == "rows":
        monkeypatch.setattr(triton_dots, "row_dots", lambda left, right: methods._row_sums(left, right) + 0.1)
    else:
        monkeypatch.setattr(triton_dots, "dots", spoilt)
    reductions = methods._reductions(torch.device("cpu"), torch.float32, 2, 3)
    assert reductions == (methods._sums, methods._row_sums)
    assert methods._reductions(torch.device("cpu"), torch.float32, 2, 3) is reductions
    text = capfd.readouterr().err
    assert text.count("the kernels of products are left out: ") == 1 and text.count("\n") == 1, text


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_r1.backend.triton_dots import _LONGEST, _TILE, _row_sums, _tile_sums

def compiled(kernel, constants, kinds):
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    for architecture in (80, 90):
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert len(made.asm["cubin"]) > 0
        print(kernel.__name__, architecture, kinds, constants)

for kind in ("*bf16", "*fp32"):
    numbers = dict(length="i32", batch="i32", out_ptr="*fp32")
    kinds = dict(gradient_ptr=kind, direction_ptr="*fp32", gradient_stride="i32", direction_stride="i64")
    for directions in (3, 16):
        columns = triton.next_power_of_2(directions)
        tile = min(_LONGEST, _TILE // columns)
        constants = dict(directions=directions, columns=columns, squares=True, tile=tile)
        compiled(_tile_sums, constants, numbers | kinds)
    kinds = dict(left_ptr=kind, right_ptr=kind, left_stride="i32", right_stride="i32")
    compiled(_row_sums, dict(tile=1024), numbers | kinds)
"""


def test_the_kernels_compile_for_gpus() -> None:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=variables)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 12, done.stderr[-3000:]
