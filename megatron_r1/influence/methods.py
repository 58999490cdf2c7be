"""How products of an example's gradient with the directions are computed: one interface, `Method`.

Each hook of the scorer hands a method what passes one layer: inputs and output gradients, of this rank's
shard. The method adds to a row of numbers for each example whatever sums over layers, tensor-parallel
ranks, stages and tokens; `results` reads the finished rows. `WgradDot` is the default, and exact.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Directions = dict[str, Tensor]
"""Name in the whole model -> float32 [C, *shape of this rank's shard]; selected parameters only."""

_BLOCK = 1 << 22
"""Elements of the per-example gradients formed at a time."""
_CPU_BLOCK = 1 << 19
"""Of one example's: dotted while the cache holds them and the directions'."""


class Method(Protocol):
    width: int
    """Numbers in an example's row, X."""
    names: frozenset[str]
    """Parameters that count, of this rank."""
    squares: bool
    """Whether squared norms are wanted in the last column: no sum over ranks then, but of whole gradients."""

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        """Add what a weight [O, I] gives, whose gradient is sum_s g_sb a_sb^T."""

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        """Add what an embedding gives: row `index` of its gradient is a sum of g, which is 0 elsewhere."""

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        """Add what a norm weight [D] gives, whose gradient is sum_s g_sb, from sequence place `first` on."""

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        """Finished rows -> what the store keeps, by file name: `scores` [N, C] and more."""


def dot_with_directions(a_SBI: Tensor, g_SBO: Tensor, direction_COI: Tensor, squares: bool = False) -> Tensor:
    """Product of each example's gradient of one linear layer with C directions, float64 [B, C].

    `a` are the layer's inputs and `g` the gradients of its outputs; <sum_s g_sb a_sb^T, V_c> is computed
    over blocks of output rows. `squares`: the gradient's squared norm in one more column. Under tensor
    parallelism all three are this rank's shard: sum over ranks.
    """
    inputs, batch = a_SBI.shape[2], a_SBI.shape[1]
    outputs, c = g_SBO.shape[2], len(direction_COI)
    flat_CP = direction_COI.reshape(c, -1)
    a_BSI, g_BOS = a_SBI.transpose(0, 1), g_SBO.permute(1, 2, 0)
    out_BX = torch.zeros(batch, c + squares, dtype=torch.float64, device=a_SBI.device)
    # A CPU's plain products are faster than its batched ones (cpu_products.py).
    on_cpu = a_SBI.device.type == "cpu"
    together, block = (1, _CPU_BLOCK) if on_cpu else (batch, _BLOCK // batch)
    if on_cpu:
        a_BSI = a_BSI.contiguous()
    rows = max(1, block // inputs)
    for first in range(0, outputs, rows):
        last = min(first + rows, outputs)
        part_CP = flat_CP[:, first * inputs : last * inputs]
        for one in range(0, batch, together):
            some = slice(one, one + together)
            if on_cpu:
                gradient_P = (g_BOS[one, first:last] @ a_BSI[one]).view(-1).float()
                out_BX[one, :c].add_(torch.mv(part_CP, gradient_P))
                gradient_BP = gradient_P[None]
            else:
                gradient_BP = torch.bmm(g_BOS[:, first:last], a_BSI).view(batch, -1).float()
                out_BX[:, :c].add_(gradient_BP @ part_CP.T)
            if squares:
                out_BX[some, c].add_(torch.linalg.vector_norm(gradient_BP, dim=1).double().square())
    return out_BX


class WgradDot:
    """Each example's gradient of one layer is formed, dotted with the directions and dropped: exact.

    With `squares`, its squared norm too, from the same gradients (`results` gives `norms`).
    """

    def __init__(self, directions: Directions, capabilities: int, squares: bool = False):
        self.directions, self.capabilities, self.squares = directions, capabilities, squares
        self.names = frozenset(directions)
        self.width = capabilities + squares

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        row_BX += dot_with_directions(a_SBI, g_SBO, self.directions[name], self.squares)

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        for c, direction_VD in enumerate(self.directions[name]):
            rows_BSD = F.embedding(index_BS, direction_VD)
            row_BX[:, c] += torch.linalg.vecdot(g_BSD.float(), rows_BSD).sum(1)
        if self.squares:
            row_BX[:, -1] += _squared_rows(index_BS, g_BSD.float())

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        gradient_BD = g_SBD.sum(0)
        row_BX[:, : self.capabilities] += gradient_BD @ self.directions[name].T
        if self.squares:
            row_BX[:, -1] += gradient_BD.double().square().sum(1)

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        out = {"scores": row_NX[:, : self.capabilities]}
        if self.squares:
            out["norms"] = row_NX[:, -1].clamp(min=0).sqrt()
        return out


def _squared_rows(index_BS: Tensor, g_BSD: Tensor) -> Tensor:
    """Squared norm of each example's gradient of an embedding: equal indices add up first. [B]."""
    b, s, d = g_BSD.shape
    row = torch.arange(b, device=g_BSD.device)[:, None]
    key = index_BS * b + row
    used, place = torch.unique(key, return_inverse=True)
    sums = g_BSD.new_zeros(len(used), d).index_add_(0, place.flatten(), g_BSD.reshape(b * s, d))
    square = sums.double().square().sum(1)
    return square.new_zeros(b).index_add_(0, used % b, square)
