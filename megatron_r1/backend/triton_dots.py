"""Products of gradients with directions in one kernel, which reads each number once. Needs Triton.

torch's operators convert the gradients of a block to float32 first. Their float32 product with few columns
runs without tensor cores. Here a program reads a tile of every direction, and the same tile of one example's
gradient after the other. Its sums over the tile are written down, and summed in float64. Nothing is added by
atomics, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192
"""Numbers of all directions that a program holds in registers."""
_LONGEST = 2048
"""Most numbers of a gradient in a tile. float32 sums at most 64 of them in order, a thread's, then pairs."""
MOST = 16
"""Directions of one launch."""


@triton.jit
def _tile_sums(
    gradient_ptr, direction_ptr, out_ptr, length, batch, gradient_stride, direction_stride,
    directions: tl.constexpr, columns: tl.constexpr, squares: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """out [tiles, batch, directions + squares]: this program's row of it."""
    number = tl.program_id(0)
    place = number.to(tl.int64) * tile + tl.arange(0, tile)
    inside = place < length
    column = tl.arange(0, columns)
    held = tl.load(
        direction_ptr + column[:, None].to(tl.int64) * direction_stride + place[None, :],
        mask=(column[:, None] < directions) & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    out_ptr += number.to(tl.int64) * batch * (directions + squares)
    for _ in range(batch):
        g = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + column, tl.sum(held * g[None, :], axis=1), mask=column < directions)
        if squares:
            tl.store(out_ptr + directions, tl.sum(g * g, axis=0))
        gradient_ptr += gradient_stride
        out_ptr += directions + squares


def dots(gradient_BP: Tensor, direction_CP: Tensor, squares: bool) -> Tensor:
    """<g_b, v_c>, and |g_b|^2 as a further column where `squares` is set: float64 [B, C + squares].

    Numbers of a row are contiguous; rows may lie apart. `gradient_BP`: of any floating type.
    """
    (batch, length), total = gradient_BP.shape, len(direction_CP)
    assert gradient_BP.stride(1) == direction_CP.stride(1) == 1
    out = gradient_BP.new_empty(batch, total + squares, dtype=torch.float64)
    for first in range(0, total, MOST):
        part_CP = direction_CP[first : first + MOST]
        c, last = len(part_CP), squares and first + MOST >= total
        columns = triton.next_power_of_2(c)
        tile = min(_LONGEST, _TILE // columns)
        tiles = triton.cdiv(length, tile)
        sums = gradient_BP.new_empty(tiles, batch, c + last, dtype=torch.float32)
        _tile_sums[(tiles,)](
            gradient_BP, part_CP, sums, length, batch, gradient_BP.stride(0), part_CP.stride(0),
            directions=c, columns=columns, squares=last, tile=tile,
        )  # fmt: skip
        out[:, first : first + c + last] = sums.sum(0, dtype=torch.float64)
    return out


@triton.jit
def _row_sums(left_ptr, right_ptr, out_ptr, length, left_stride, right_stride, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [rows]: this program's row."""
    row = tl.program_id(0).to(tl.int64)
    left_ptr += row * left_stride
    right_ptr += row * right_stride
    total = tl.zeros((tile,), tl.float32)
    for first in range(0, length, tile):
        place = first + tl.arange(0, tile)
        left = tl.load(left_ptr + place, mask=place < length, other=0.0).to(tl.float32)
        total += left * tl.load(right_ptr + place, mask=place < length, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, axis=0))


def row_dots(left_NK: Tensor, right_NK: Tensor) -> Tensor:
    """<x_n, y_n> of each row: float32 [N]. Numbers of a row are contiguous; rows may lie apart."""
    assert left_NK.stride(1) == right_NK.stride(1) == 1
    out_N = left_NK.new_empty(len(left_NK), dtype=torch.float32)
    _row_sums[(len(out_N),)](
        left_NK, right_NK, out_N, left_NK.shape[1], left_NK.stride(0), right_NK.stride(0), tile=1024
    )
    return out_N
