"""K-FAC and EK-FAC: the second moment of examples' gradients, by layer, as a Kronecker product.

Of a linear weight [O, I], with a its inputs, g the gradients of its outputs, tokens taken as independent
("expand" of Eschenhagen et al., 2023), N examples of S tokens:

    H ~ G (x) A      A = 1 / (N S) sum_ns a a^T      G = 1 / N sum_ns g g^T
    H^-1 V ~ Q_G [ (Q_G^T V Q_A) / (L + 0.1 mean L) ] Q_A^T      Q: eigenvectors of G and A

    kfac   L = lambda_G lambda_A^T                        (Martens and Grosse, 2015)
    ekfac  L = 1 / N sum_n (Q_G^T [sum_s g a^T] Q_A)^2    (George et al., 2018), by a second pass

The tied embedding [V, D] has no V x V factor: its diagonal stands for it, in either form,

    H ~ diag(r) (x) C / tr C      r = E diag(W W^T)      C = E W^T W      W: the gradient of an example

with tokens, and the two uses, taken as independent. Norm weights: the diagonal of their second moment.
Labels are drawn from the model's own predictions, for the true Fisher information. With the data's labels
the second moment of gradients is the empirical Fisher information: where a model fits badly it is no
curvature of the loss, and gradients of one example's tokens are correlated. Drawn labels are independent
given the text, with gradients of mean zero (Kunstner et al., 2019).

Under tensor parallelism the factors are those of whole layers, from gathered inputs or gradients; of a
weight, a direction or L, a rank never holds more than its shard's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.data.windows import Examples
from megatron_r1.influence.engine import Engine, run_passes
from megatron_r1.influence.gradients import Scorer
from megatron_r1.influence.methods import Method, rows_at_a_time
from megatron_r1.influence.parameters import (
    EMBEDDING,
    Directions,
    complete_gradient,
    named_parameters,
    split_axis,
    whole_mean,
    whole_shape,
)
from megatron_r1.parallel import ParallelContext, sum_over

# isort: split
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

_DAMPING = 0.1
"""Share of a layer's mean eigenvalue."""
_AT_ONCE = 1 << 30
"""Elements of factors that a rank holds at a time (or one layer's). Further layers take further passes."""
_BLOCK = 1 << 22
"""Elements of the examples' rotated gradients formed at a time on a CPU."""
_STRIPE = 8192
"""Columns of the head's gradient squared at a time."""

Sides = tuple[Tensor, Tensor]
"""Factors or bases of a weight's two axes: X, which tensor parallelism divides, and Y. Both are whole."""
Bases = dict[str, Sides]


class Kfac:
    name = "kfac"

    def apply(self, directions: Directions, engine: Engine, checkpoint: Path, sets: list[Examples]) -> None:
        """See `curvature.Curvature`. Raises ValueError where a parameter has no gradient on any example."""
        examples = sum(map(len, sets))
        for names in _groups(directions, engine.context):
            factors = _Factors({name: directions[name] for name in names}, engine)
            _collect(factors, engine, sets)
            factors.finish(examples, engine.seq_length)
            bases = factors.sides
            eigenvalues = _decompose(bases) | factors.norms
            if self.name == "ekfac":
                moments = _Moments({n: sides for n, sides in bases.items() if n != EMBEDDING}, engine.context)
                _collect(moments, engine, sets)
                for name, sum_XY in moments.squares_XY.items():
                    eigenvalues[name] = sum_over("data", sum_XY).div_(examples)
            damping = {name: _DAMPING * whole_mean(name, value) for name, value in eigenvalues.items()}
            check_gradients(self.name, damping, examples)
            for name, value in eigenvalues.items():
                divisor = value + damping[name]
                direction, basis = directions[name], bases.get(name)
                directions[name] = _divided(name, direction, basis, divisor) if basis else direction / divisor


class EKfac(Kfac):
    name = "ekfac"


def check_gradients(kind: str, damping: dict[str, float], examples: int) -> None:
    """Raises ValueError where the damping of a parameter is not positive: H has no inverse."""
    if zero := [name for name, value in damping.items() if not value > 0]:
        raise ValueError(
            f"influence.curvature={kind}: {examples} examples have no gradient of {', '.join(zero[:4])}; "
            f"raise influence.curvature_examples or leave these out of influence.layers"
        )


def _collect(collector: _Collector, engine: Engine, sets: list[Examples]) -> None:
    """Hand `collector` inputs and output gradients of layers, from passes with drawn labels."""
    size, seq_length = engine.influence.micro_batch, engine.seq_length
    for number, windows in enumerate(sets):
        passes = windows.passes(0, len(windows), engine.rows_per_pass)
        with (
            engine.drawn_labels(windows, number) as batches,
            Scorer(engine.gpt, collector, draws=True) as scorer,
        ):
            run_passes(engine.model, batches, passes, size, seq_length, scorer.begin)


def _groups(directions: Directions, context: ParallelContext) -> Iterator[list[str]]:
    """Groups of names whose factors are in memory at a time.

    Every rank has the same number of groups, because the stages of a pipeline run their passes together.
    """
    groups: list[list[str]] = [[]]
    held = 0
    # The embedding's factors are summed over two stages: in the same group on both.
    for name in sorted(directions, key=lambda name: name != EMBEDDING):
        shape = whole_shape(name, directions[name].shape[1:], context.tensor_size)
        size = sum(side**2 for side in shape) if name != EMBEDDING else shape[0] + shape[1] ** 2
        if groups[-1] and held + size > _AT_ONCE:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    count = torch.tensor(len(groups), device=backend.device())
    dist.all_reduce(count, dist.ReduceOp.MAX)
    yield from groups + [[]] * (int(count) - len(groups))


class _Collector(Method):
    """Receives a method's inputs, but sums over all examples. No example has a row."""

    squares = False
    width = 1

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        raise NotImplementedError

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        raise NotImplementedError

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        return {}


class _Factors(_Collector):
    """The first pass: both sides of each matrix, and the norms' squares."""

    def __init__(self, directions: Directions, engine: Engine):
        self.names = frozenset(directions)
        self.sides: dict[str, Sides] = {}
        self.norms: dict[str, Tensor] = {}
        self._parameters = named_parameters(engine.gpt)
        for name, direction in directions.items():
            axis = split_axis(name)
            if axis is None:
                self.norms[name] = torch.zeros_like(direction[0])
                continue
            shape = whole_shape(name, direction.shape[1:], engine.context.tensor_size)
            x, y = shape[axis], shape[1 - axis]
            left = direction.shape[1:2] if name == EMBEDDING else (x, x)
            self.sides[name] = direction.new_zeros(left), direction.new_zeros(y, y)

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        if name == EMBEDDING:
            self._head(a_SBI.flatten(0, 1).float(), g_SBO.flatten(0, 1))
            return
        tokens = _tokens(name, a_SBI, g_SBO)
        # Rows that fill up a batch have no gradient; their inputs must not count either.
        real_B = tokens[split_axis(name) != 0].any(-1).any(0)
        for x_SBX, factor_XX in zip(tokens, self.sides[name], strict=True):
            _add_products(factor_XX, (x_SBX * real_B[:, None]).flatten(0, 1))

    def _head(self, a_ND: Tensor, g_NV: Tensor) -> None:
        left_V, right_DD = self.sides[EMBEDDING]
        size_N, square_N = a_ND.square().sum(1), torch.zeros_like(a_ND[:, 0])
        for part_V, part_NV in zip(left_V.split(_STRIPE), g_NV.split(_STRIPE, 1), strict=True):
            square_NV = part_NV.float().square()
            part_V += size_N @ square_NV
            square_N += square_NV.sum(1)
        right_DD.addmm_((a_ND * square_N[:, None]).T, a_ND)

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        left_V, right_DD = self.sides[name]
        g_ND = g_BSD.flatten(0, 1).float()
        left_V.index_add_(0, index_BS.flatten(), g_ND.square().sum(1))
        right_DD.addmm_(g_ND.T, g_ND)

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        gradient_BD = g_SBD.sum(0)
        complete_gradient(self._parameters[name], gradient_BD)
        self.norms[name] += sum_over("context", gradient_BD).square().sum(0)

    def finish(self, examples: int, seq_length: int) -> None:
        """Sums over ranks -> means."""
        for sum_D in self.norms.values():
            sum_over("data", sum_D).div_(examples)
        for name, (left, right) in self.sides.items():
            for side in (left, right):
                sum_over("tokens", side)
                if name == EMBEDDING:
                    sum_over("embedding", side)
            left /= examples
            if name == EMBEDDING:
                sum_over("tensor", right)
                right /= right.trace().clamp(min=torch.finfo(right.dtype).tiny)
            else:
                right /= examples * seq_length


class _Moments(_Collector):
    """The second pass: squares of each example's gradient of a linear layer in its own basis, this rank's
    rows."""

    def __init__(self, bases: Bases, context: ParallelContext):
        self.names = frozenset(bases)
        self._bases = bases
        self.squares_XY = {
            name: left.new_zeros(len(left) // context.tensor_size, len(right))
            for name, (left, right) in bases.items()
        }

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        left_SBX, right_SBY = (x.float() for x in _tokens(name, a_SBI, g_SBO))
        left, right = self._bases[name]
        left_BXS = (left_SBX @ left[:, _mine(len(left))]).permute(1, 2, 0)
        right_BSY = (right_SBY @ right).transpose(0, 1)
        size = len(right_BSY) * len(right)
        rows = max(1, _BLOCK // size) if right.device.type == "cpu" else rows_at_a_time(size)
        for total_XY, part_BXS in zip(
            self.squares_XY[name].split(rows), left_BXS.split(rows, dim=1), strict=True
        ):
            total_XY += sum_over("context", torch.bmm(part_BXS, right_BSY)).square_().sum(0)


def _tokens(name: str, a_SBI: Tensor, g_SBO: Tensor) -> Sides:
    """The tokens' vectors along each axis of a weight, whole: [S, B, X], [S, B, Y]."""
    left, right = (g_SBO, a_SBI) if split_axis(name) == 0 else (a_SBI, g_SBO)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        left = gather_from_tensor_model_parallel_region(left.contiguous(), group=group)
    return left, right


def _add_products(total_XX: Tensor, x_NX: Tensor) -> None:
    """total += sum_n x_n x_n^T, summed in float32. On a GPU bf16 is multiplied as it is, which is exact."""
    mixed = x_NX.device.type != "cpu" and "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8
    if x_NX.dtype == torch.float32 or not mixed:
        x_NX = x_NX.float()
        total_XX.addmm_(x_NX.T, x_NX)
    else:
        total_XX += torch.mm(x_NX.T, x_NX, out_dtype=torch.float32)


def _mine(size: int, rank: int | None = None) -> slice:
    """This rank's part, or another's, of an axis that tensor parallelism divides."""
    part = size // parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank() if rank is None else rank
    return slice(rank * part, (rank + 1) * part)


def _decompose(sides: Bases) -> dict[str, Tensor]:
    """Factors -> their eigenvectors, in place; products of eigenvalues [X, Y], this rank's rows, by name.

    The embedding's first side is diagonal and stays. The ranks of a stage share the work. Each gets the same
    bits, because eigenvectors of nearly equal eigenvalues are arbitrary.
    """
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    factors = [factor for pair in sides.values() for factor in pair if factor.dim() == 2]
    values = [torch.empty_like(factor[0]) for factor in factors]
    for number in range(group.rank(), len(factors), group.size()):
        value_X, vector_XX = torch.linalg.eigh(factors[number].double())
        values[number].copy_(value_X.clamp_(min=0))
        factors[number].copy_(vector_XX)
    for number, (value_X, vector_XX) in enumerate(zip(values, factors, strict=True)):
        owner = dist.get_global_rank(group, number % group.size())
        dist.broadcast(value_X, owner, group=group)
        dist.broadcast(vector_XX, owner, group=group)
    remaining = iter(values)
    return {
        name: torch.outer(next(remaining)[_mine(len(left))] if left.dim() == 2 else left, next(remaining))
        for name, (left, _) in sides.items()
    }


def _divided(name: str, direction: Tensor, basis: Sides, divisor_XY: Tensor) -> Tensor:
    """Q_X [ (Q_X^T V Q_Y) / divisor ] Q_Y^T of each direction."""
    left, right = basis
    first = split_axis(name) == 0
    v_CXY = (direction if first else direction.transpose(1, 2)) @ right
    if left.dim() == 2:
        v_CXY = _times(left, _times(left.T, v_CXY) / divisor_XY) @ right.T
    else:
        v_CXY = (v_CXY / divisor_XY) @ right.T
    return v_CXY if first else v_CXY.transpose(1, 2).contiguous()


def _times(matrix_XX: Tensor, v_CXY: Tensor) -> Tensor:
    """M v. Each tensor-parallel rank holds its own rows of v and of the result."""
    group = parallel_state.get_tensor_model_parallel_group()
    columns = matrix_XX[:, _mine(len(matrix_XX))]
    out = v_CXY
    for rank in range(group.size()):
        part = columns[_mine(len(matrix_XX), rank)] @ v_CXY
        dist.reduce(part, dist.get_global_rank(group, rank), group=group)
        if rank == group.rank():
            out = part
    return out
