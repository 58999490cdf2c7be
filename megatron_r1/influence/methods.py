"""Products of an example's gradient with the directions. All methods have one interface, `Method`.

The scorer's hooks hand a method the inputs and output gradients of each layer, of this rank's shard. The
method adds to a row of numbers for each example. Rows are sums over layers, tensor-parallel ranks, stages and
tokens. `results` reads the finished rows. `WgradDot` is the default, and exact.

A new method is a class with these methods, a line in `METHODS`, and its name in `InfluenceConfig.method`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.parameters import Directions, product, times
from megatron_r1.influence.projection import projected
from megatron_r1.system.terminal import say

_BLOCKS = 1 << 22, 1 << 28
"""Fewest and most elements of the examples' gradients formed at a time on a GPU, by its free memory."""
_ROWS = 64
"""Rows of a block are a multiple of it: a product's kernel for other shapes takes twice the time."""
_CPU_BLOCK = 1 << 18
"""Elements of one example's gradient formed at a time on a CPU, whose cache holds them."""
_TRIAL = 5120
"""Elements of a row on which the kernel is tried: two and a half of its tiles."""
_PIECE = 64
"""Most products that float32 sums one after the other where examples are batched. bf16's rounding exceeds the
error of four times as many."""


class Method(Protocol):
    width: int
    """Numbers in an example's row, X."""
    names: frozenset[str]
    """Parameters that count, of this rank."""
    squares: bool
    """Whether the last column holds squared norms. Norms need whole gradients, not sums over ranks."""

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        """Add the products of a weight [O, I], whose gradient is sum_s g_sb a_sb^T."""

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        """Add the products of an embedding. Row `index` of its gradient is a sum of g, other rows are 0."""

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        """Add the products of a norm weight [D], whose gradient is sum_s g_sb, from place `first` on."""

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        """Finished rows -> arrays for the store, by file name: `scores` [N, C] and more."""


def dot_with_directions(a_SBI: Tensor, g_SBO: Tensor, direction_COI: Tensor, squares: bool = False) -> Tensor:
    """Product of each example's gradient of one linear layer with C directions, float64 [B, C].

    `a` are the layer's inputs, `g` the gradients of its outputs. <sum_s g_sb a_sb^T, V_c> is computed over
    blocks of output rows. `squares` adds a column: the gradient's squared norm. Under tensor parallelism all
    tensors are this rank's shard, and the products are to be summed over ranks.

    A layer has up to 10^8 products. float32 sums them in short pieces, and float64 sums the pieces: one sum
    after the other in float32 is wrong in the fourth digit, and of squares it is too small.
    """
    out_BX = a_SBI.new_zeros(a_SBI.shape[1], len(direction_COI) + squares, dtype=torch.float64)
    # A CPU's plain products are faster than its batched ones (cpu_products.py).
    add = _add_one_by_one if a_SBI.device.type == "cpu" else _add_together
    add(out_BX, a_SBI, g_SBO, direction_COI)
    return out_BX


def _add_one_by_one(out_BX: Tensor, a_SBI: Tensor, g_SBO: Tensor, direction_COI: Tensor) -> None:
    c, (_, outputs, inputs) = len(direction_COI), direction_COI.shape
    size = max(1, _CPU_BLOCK // inputs)
    for first in range(0, outputs, size):
        left_SBL, right_SBR = g_SBO[..., first : first + size], a_SBI
        part_CLR = direction_COI[:, first : first + size]
        if outputs > inputs:
            # With the longer axis as columns the gradient's product takes half the time.
            left_SBL, right_SBR = right_SBR, left_SBL
            part_CLR = part_CLR.transpose(1, 2).contiguous()
        product_CLR = torch.empty_like(part_CLR)
        for out_X, left_SL, right_SR in zip(out_BX, left_SBL.unbind(1), right_SBR.unbind(1), strict=True):
            gradient_LR = product(left_SL, right_SR).float()
            # torch sums pairwise, where a product of matrix and vector sums one after the other.
            out_X[:c] += torch.mul(part_CLR, gradient_LR, out=product_CLR).sum(2).double().sum(1)
            if len(out_X) > c:
                out_X[c] += torch.square(gradient_LR, out=product_CLR[0]).sum(1).double().sum()


def _add_together(out_BX: Tensor, a_SBI: Tensor, g_SBO: Tensor, direction_COI: Tensor) -> None:
    c, (batch, inputs) = len(direction_COI), a_SBI.shape[1:]
    a_BSI, g_BSO = a_SBI.transpose(0, 1), g_SBO.transpose(0, 1)
    dots, _ = _reductions(a_SBI.device, a_SBI.dtype, batch, c)
    size = rows_at_a_time(batch * inputs)
    for first in range(0, g_BSO.shape[2], size):
        gradient_BOI = product(g_BSO[..., first : first + size], a_BSI)
        part_COI = direction_COI[:, first : first + size]
        out_BX += dots(gradient_BOI.flatten(1), part_COI.flatten(1), out_BX.shape[1] > c)


def rows_at_a_time(elements: int) -> int:
    """Rows of the examples' gradients in a block on a GPU, where one row of all of them has `elements`."""
    return max(_ROWS, _block() // elements // _ROWS * _ROWS)


@functools.cache
def _block() -> int:
    """Elements of a block, which with its float32 copies takes a third of the memory free at the first call.

    A power of 2, so that other launches on the same kind of GPU have the same blocks.
    """
    least, most = _BLOCKS
    share = (backend.free_memory() or 0) // 64
    return max(least, min(most, 1 << share.bit_length() >> 1))


def token_dots(left_SBK: Tensor, right_SBK: Tensor) -> Tensor:
    """<x_sb, y_sb> at each place: float32 [S, B]. Numbers of a place are contiguous."""
    _, row_dots = _reductions(left_SBK.device, left_SBK.dtype, left_SBK.shape[1], 1)
    return row_dots(left_SBK.flatten(0, 1), right_SBK.flatten(0, 1)).view(left_SBK.shape[:2])


Reductions = tuple[Callable[[Tensor, Tensor, bool], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""(gradient [B, P], directions [C, P], squares) -> products and squares, float64 [B, C + squares];
(x [N, K], y [N, K]) -> products of rows, float32 [N]."""


@functools.cache
def _reductions(device: torch.device, dtype: torch.dtype, batch: int, capabilities: int) -> Reductions:
    """The kernels, if there is Triton and the kernels' sums are those of the operators on a first trial."""
    plain = _sums, _row_sums
    if not backend.has_triton():
        return plain
    random = torch.Generator(device).manual_seed(1)
    x_NP = torch.randn(batch + capabilities, _TRIAL, generator=random, device=device)
    gradient, direction = x_NP[:batch].to(dtype), x_NP[batch:]
    rows = gradient, direction[:1].to(dtype).expand(batch, -1)
    try:
        from megatron_r1.backend import triton_dots

        # Products of two such rows are about sqrt(P). Squares are P, and have an error of P 2^-24.
        wrong = triton_dots.dots(gradient, direction, True) - _sums(gradient, direction, True)
        wrong_rows = triton_dots.row_dots(*rows) - _row_sums(*rows)
        error = max(float(x.abs().max()) for x in (wrong, wrong_rows)) / _TRIAL**0.5
        if error < 1e-4:
            return triton_dots.dots, triton_dots.row_dots
        reason = f"products are {error:.1e} from those of torch's operators"
    except Exception as failure:  # of a compiler, of any kind
        reason = str(failure)[:200]
    say(f"influence: the kernels of products are left out: {reason}")
    return plain


def _row_sums(left_NK: Tensor, right_NK: Tensor) -> Tensor:
    return left_NK.float().mul(right_NK).sum(-1)


def _sums(gradient_BP: Tensor, direction_CP: Tensor, squares: bool) -> Tensor:
    """The products by torch's operators, whose float32 sums are short, on any device."""
    piece = math.gcd(gradient_BP.shape[1], _PIECE if gradient_BP.dtype.itemsize > 2 else 4 * _PIECE)
    gradient_MBP = gradient_BP.float().unflatten(1, (-1, piece)).transpose(0, 1)
    direction_MPC = direction_CP.unflatten(1, (-1, piece)).permute(1, 2, 0)
    out_BC = torch.bmm(gradient_MBP, direction_MPC).sum(0, dtype=torch.float64)
    if not squares:
        return out_BC
    square_B = torch.linalg.vector_norm(gradient_MBP, dim=2).double().square().sum(0)
    return torch.cat([out_BC, square_B[:, None]], 1)


class WgradDot:
    """Exact: forms each example's gradient of one layer, dots it with the directions and drops it.

    `squares`: also the gradient's squared norm. `results` then gives `norms`.
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
            row_BX[:, c] += torch.linalg.vecdot(g_BSD.float(), rows_BSD).double().sum(1)
        if self.squares:
            row_BX[:, -1] += _squared_rows(index_BS, g_BSD.double())

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        gradient_BD = g_SBD.sum(0).double()
        row_BX[:, : self.capabilities] += gradient_BD @ self.directions[name].double().T
        if self.squares:
            row_BX[:, -1] += gradient_BD.square().sum(1)

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        out = {"scores": row_NX[:, : self.capabilities]}
        if self.squares:
            out["norms"] = row_NX[:, -1].clamp(min=0).sqrt()
        return out


def _squared_rows(index_BS: Tensor, g_BSD: Tensor) -> Tensor:
    """Squared norm of each example's gradient of an embedding, float64 [B]. Equal indices add up first."""
    b, s, d = g_BSD.shape
    sorted_BS, order_BS = index_BS.sort(1)
    # Each token's place among the different tokens of its example: no sizes that the host must wait for.
    number_BS = F.pad(sorted_BS.diff(dim=1) != 0, (1, 0)).cumsum(1)
    number_BS += torch.arange(0, b * s, s, device=g_BSD.device)[:, None]
    place_BS = torch.empty_like(order_BS).scatter_(1, order_BS, number_BS)
    sums_ND = g_BSD.new_zeros(b * s, d).index_add_(0, place_BS.flatten(), g_BSD.reshape(b * s, d))
    return sums_ND.square_().view(b, -1).sum(1)


class Ghost:
    """Exact, token by token: of a linear layer, <g_s a_s^T, V_c> = g_s^T V_c a_s at each place s.

    No example's gradient is formed, but each direction is multiplied with every token. With several
    directions this is slower than `WgradDot`. `per_token`: a row holds [S, C], and `results` gives
    `token_scores`, whose sums are the examples' scores.
    """

    squares = False

    def __init__(self, directions: Directions, capabilities: int, seq_length: int, per_token: bool = False):
        self.directions, self.capabilities, self.per_token = directions, capabilities, per_token
        self.names = frozenset(directions)
        self.width = seq_length * capabilities if per_token else capabilities

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        # Through the direction to its shorter side, where the tokens' products are summed.
        wide_SBL, short_SBK = (g_SBO, a_SBI) if g_SBO.shape[2] > a_SBI.shape[2] else (a_SBI, g_SBO)
        for c, direction_OI in enumerate(self.directions[name].to(g_SBO.dtype)):
            passed_SBK = times(wide_SBL, direction_OI if wide_SBL is g_SBO else direction_OI.T)
            self._add(row_BX, c, token_dots(passed_SBK, short_SBK).T, 0)

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        for c, direction_VD in enumerate(self.directions[name]):
            rows_BSD = F.embedding(index_BS, direction_VD)
            self._add(row_BX, c, torch.linalg.vecdot(g_BSD.float(), rows_BSD), 0)

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        for c, token_SB in enumerate((g_SBD.double() @ self.directions[name].double().T).unbind(-1)):
            self._add(row_BX, c, token_SB.T, first)

    def _add(self, row_BX: Tensor, c: int, token_BS: Tensor, first: int) -> None:
        if self.per_token:
            token_BSC = row_BX.view(len(row_BX), -1, self.capabilities)
            token_BSC[:, first : first + token_BS.shape[1], c] += token_BS
        else:
            row_BX[:, c] += token_BS.double().sum(1)

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        if not self.per_token:
            return {"scores": row_NX}
        token_NSC = row_NX.view(len(row_NX), -1, self.capabilities)
        return {"scores": token_NSC.sum(1), "token_scores": token_NSC}


class LowRank(WgradDot):
    """V_c ~ L_c R_c^T of rank `rank`, for this rank's shard of each matrix.

        <sum_s g_s a_s^T, L_c R_c^T> = sum_s <L_c^T g_s, R_c^T a_s>

    Faster than `WgradDot`. Only norm weights and look-ups are exact.
    """

    def __init__(self, directions: Directions, capabilities: int, rank: int):
        super().__init__(directions, capabilities)
        self._factors = {
            name: truncated(direction, rank) for name, direction in directions.items() if direction.dim() == 3
        }

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        left_OR, right_IR = (factor.to(g_SBO.dtype) for factor in self._factors[name])
        product_SBR = times(g_SBO, left_OR).float() * times(a_SBI, right_IR).float()
        row_BX += product_SBR.double().sum(0).unflatten(-1, (self.capabilities, -1)).sum(-1)


def truncated(direction_COI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [O, C r] and [I, C r] of the best approximation of rank r of each direction.

    From the eigenvectors of V^T V or V V^T: a singular value decomposition of a vocabulary's matrix would
    cost more than the scores.
    """
    factors = []
    for direction_OI in direction_COI:
        outputs, inputs = direction_OI.shape
        wide = direction_OI if inputs <= outputs else direction_OI.T
        vectors = torch.linalg.eigh(product(wide, wide).double()).eigenvectors[:, -rank:].to(wide.dtype)
        factors.append((wide @ vectors, vectors) if inputs <= outputs else (vectors, wide @ vectors))
    left, right = zip(*factors, strict=True)
    return torch.cat(left, 1).contiguous(), torch.cat(right, 1).contiguous()


METHODS: dict[str, Callable[[Directions, Engine], Method]] = {
    "wgrad-dot": lambda v, engine: WgradDot(v, engine.capabilities, engine.influence.norms),
    "ghost": lambda v, engine: Ghost(v, engine.capabilities, engine.seq_length, engine.influence.per_token),
    "lowrank": lambda v, engine: LowRank(v, engine.capabilities, engine.influence.rank),
    "projected": projected,
}
"""`influence.method` -> the method for directions v, as the engine's configuration sets it. Every rank of a
model copy calls it."""


def correlation(score_NC: Tensor, exact_NC: Tensor) -> Tensor:
    """Pearson's over examples, for each capability: [C]. 0 where one of the two is constant."""
    x_NC, y_NC = score_NC - score_NC.mean(0), exact_NC - exact_NC.mean(0)
    scale_C = x_NC.norm(dim=0) * y_NC.norm(dim=0)
    return torch.where(scale_C > 0, (x_NC * y_NC).sum(0) / scale_C, 0.0)
