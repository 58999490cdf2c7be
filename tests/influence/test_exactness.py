"""Relative errors of products and norms against float64, where a layer has up to 8 million of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.backend import cpu_products
from megatron_r1.influence import methods
from megatron_r1.influence.methods import Ghost, LowRank, dot_with_directions
from megatron_r1.influence.parameters import dots
from megatron_r1.influence.projection import Projected, Projection

NAME = "decoder.layers.0.mlp.linear_fc2.weight"
SHAPES = {
    "the vocabulary of Llama 3": (16, 2, 128256, 64),
    "the quickstart's head": (256, 4, 4096, 192),
    "the quickstart's fc1": (256, 2, 1280, 192),
    "the quickstart's fc2": (256, 2, 192, 640),
    "a long sequence": (1024, 1, 192, 192),
}
"""Tokens, examples, outputs and inputs of a layer."""
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "of one sign": torch.abs,
    "of heavy tails": lambda x: x * torch.exp(2 * x.flip(0)),
}


@pytest.fixture(autouse=True)
def _products() -> Iterator[None]:
    """One thread: the suite runs a test on each core."""
    cpu_products.use_onednn()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(shape: str, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """a [S, B, I], g [S, B, O] and two directions [2, O, I]."""
    s, b, o, i = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    normal = (torch.randn(*size, generator=generator) for size in ((s, b, i), (s, b, o), (2, o, i)))
    a, g, v = (KINDS[kind](x) for x in normal)
    return a, g, v


def exact(a: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Products [B, C] and norms [B] in float64."""
    gradient_BOI = torch.einsum("sbo,sbi->boi", g.double(), a.double())
    products = [torch.einsum("boi,oi->b", gradient_BOI, direction.double()) for direction in v]
    return torch.stack(products, 1), gradient_BOI.square().sum((1, 2)).sqrt()


def error(found: Tensor, true: Tensor) -> float:
    """Relative to the true values as one vector."""
    return float((found.double().cpu() - true).norm() / true.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_norms_have_the_digits_of_float32(shape: str, kind: str) -> None:
    a, g, v = layer(shape, kind)
    true_BC, true_B = exact(a, g, v)
    most = 1e-6 if "vocabulary" in shape else 4e-7
    found = dot_with_directions(a, g, v, squares=True)
    batched = torch.zeros_like(found)
    methods._add_together(batched, a, g, v)
    for out in (found, batched):
        assert error(out[:, :2], true_BC) < most
        assert ((out[:, 2].sqrt() - true_B).abs() / true_B).max() < most


@pytest.mark.parametrize("shape", ["the vocabulary of Llama 3", "the quickstart's head"])
def test_other_methods_sum_as_exactly(shape: str) -> None:
    """Each against its own formula in float64."""
    a, g, v = layer(shape, "normal")
    most, batch = 1e-6, a.shape[1]
    row_BX = torch.zeros(batch, 2, dtype=torch.float64)
    Ghost({NAME: v}, 2, len(a)).linear(NAME, a, g, row_BX)
    assert error(row_BX, exact(a, g, v)[0]) < most
    low = LowRank({NAME: v}, 2, 4)
    left, right = (factor.double() for factor in low._factors[NAME])
    row_BX = torch.zeros(batch, 2, dtype=torch.float64)
    low.linear(NAME, a, g, row_BX)
    true_BR = ((g.double() @ left) * (a.double() @ right)).sum(0)
    assert error(row_BX, true_BR.unflatten(-1, (2, -1)).sum(-1)) < most
    projection = Projection([NAME], {NAME: v}, 4, 1)
    left, right = projection.sides(NAME, torch.float64)
    row_BX = torch.zeros(batch, 16, dtype=torch.float64)
    Projected(projection, frozenset([NAME]), row_BX).linear(NAME, a, g, row_BX)
    assert (
        error(row_BX, torch.einsum("sbk,sbl->bkl", g.double() @ left, a.double() @ right).flatten(1)) < most
    )
    true_CP = (left.T @ (v.double() @ right)).flatten(1)
    placed = {NAME: v.to(backend.device())}
    assert error(Projection([NAME], placed, 4, 1).of_directions(placed, 2), true_CP) < most
    # The damping of DataInf: squares are summed, too.
    assert error(dots(v, v[0]), (v.double() * v[0].double()).sum((1, 2))) < most
