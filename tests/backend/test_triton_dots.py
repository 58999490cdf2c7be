"""The kernel of products in Triton's interpreter, and its compilation for GPUs that this machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.influence import methods
from tests.influence.test_exactness import error, exact
from tests.launch import ROOT

pytest.importorskip("triton")
from megatron_r1.backend import triton_dots


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


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    methods._reduction.cache_clear()
    yield
    methods._reduction.cache_clear()


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


def _refuse_rows(sums: methods.Reduction) -> methods.Reduction:
    def only_the_trial(gradient_BP: Tensor, direction_CP: Tensor, squares: bool) -> Tensor:
        assert gradient_BP.shape[1] == methods._TRIAL, "a layer's products by torch's operators"
        return sums(gradient_BP, direction_CP, squares)

    return only_the_trial


@pytest.mark.parametrize("fault", ["wrong", "not a number", "does not compile"])
def test_a_kernel_that_fails_its_trial_is_left_out(
    kernel: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    def spoilt(gradient_BP: Tensor, direction_CP: Tensor, squares: bool) -> Tensor:
        if fault == "does not compile":
            raise RuntimeError("ptxas fatal")
        return methods._sums(gradient_BP, direction_CP, squares) * (1.001 if fault == "wrong" else torch.nan)

    monkeypatch.setattr(triton_dots, "dots", spoilt)
    reduce = methods._reduction(torch.device("cpu"), torch.float32, 2, 3)
    assert reduce is methods._sums
    assert methods._reduction(torch.device("cpu"), torch.float32, 2, 3) is reduce
    text = capfd.readouterr().err
    assert text.count("the kernel of products is left out: ") == 1 and text.count("\n") == 1, text


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_r1.backend.triton_dots import _LONGEST, _TILE, _tile_sums

for kind in ("bf16", "fp32"):
    for directions in (3, 16):
        columns = triton.next_power_of_2(directions)
        tile = min(_LONGEST, _TILE // columns)
        constants = dict(directions=directions, columns=columns, squares=True, tile=tile)
        pointers = dict(gradient_ptr=f"*{kind}", direction_ptr="*fp32", out_ptr="*fp32")
        numbers = dict(length="i32", batch="i32", gradient_stride="i32", direction_stride="i64")
        signature = {name: "constexpr" for name in constants} | pointers | numbers
        signature = {name: signature[name] for name in _tile_sums.arg_names}
        source = ASTSource(fn=_tile_sums, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
        assert len(made.asm["cubin"]) > 0
        print(kind, directions, made.metadata.shared)
"""


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernel_compiles_for_gpus(architecture: int) -> None:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(architecture)], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4, done.stderr[-3000:]
