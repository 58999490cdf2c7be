"""Large float32 products through oneDNN equal the same products in float64, whatever the layout."""

import warnings

import pytest
import torch

from megatron_r1.backend import cpu_products


@pytest.fixture(autouse=True)
def onednn():
    """On every CPU; where the process would not take oneDNN by itself, for one test."""
    cpu_products.use_onednn()
    with torch.library._scoped_library("aten", "IMPL") as library:
        if not cpu_products.wanted():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is replaced
                library.impl("mm", cpu_products._product, "CPU")
        yield


def layouts():
    base = torch.randn(300, 400, generator=torch.Generator().manual_seed(3))
    return {
        "whole": base[:192, :160].contiguous(),
        "columns": base[:192, 7:167],
        "transposed": base[:160, 5:197].t(),
        "one row for all": base[:1, :160].expand(192, 160),
        "one column for all": base[:192, :1].expand(192, 160),
        "overlapping": base.flatten().as_strided((192, 160), (3, 1)),
        "steps": base[:192, :320:2],
    }


@pytest.mark.parametrize("left", layouts())
@pytest.mark.parametrize("right", layouts())
def test_equals_float64(left, right):
    a, b = layouts()[left], layouts()[right].t()
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_is_what_autograd_and_layers_use():
    layer = torch.nn.Linear(160, 192, bias=False)
    x = torch.randn(2, 96, 160, requires_grad=True)
    with torch.profiler.profile() as profile:
        (layer(x).square().sum() / 2).backward()
    used = sum(e.count for e in profile.key_averages() if e.key == "mkldnn::_linear_pointwise")
    assert used == 3
    y = x.double() @ layer.weight.double().t()
    torch.testing.assert_close(x.grad.double(), y @ layer.weight.double(), rtol=1e-5, atol=1e-4)


def test_other_types_and_wrong_shapes_stay_torch_s():
    a = torch.randn(128, 64).bfloat16()
    torch.testing.assert_close(a @ a.t(), torch.mm(a, a.t(), out=torch.empty(128, 128).bfloat16()))
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|mat1 and mat2"):
        torch.randn(128, 64) @ torch.randn(65, 128)
    with pytest.raises(RuntimeError, match="must be a matrix"):
        torch.mm(torch.randn(128, 64), torch.randn(64))
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        torch.randn(128, 64) @ torch.randn(64, 128).double()
