"""H of Eq. 2: its inverse is applied once to each direction, never to an example's gradient.

    identity   H = 1, the effect of a step of gradient descent
    adam       H = diag(sqrt(v / (1 - beta2^t)) + eps), the effect of a step scaled as the optimizer would
               scale it; v is Adam's second moment in the checkpoint
    datainf    each parameter's damped mean of g g^T over examples' gradients g (Kwon et al., 2024)
    kfac       a Kronecker product for each layer (influence/kfac.py)
    ekfac      the same, with eigenvalues that are measured

A new curvature is a class with `apply`, a line in `CURVATURES`, and its name in `InfluenceConfig.curvature`.
If fields of the configuration decide its bits, they stand in `influence.plan.FIELDS`, which needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.checkpoint.load import contents_of, load_state
from megatron_r1.data.windows import Examples
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.kfac import EKfac, Kfac, check_gradients
from megatron_r1.influence.parameters import (
    Directions,
    Gradient,
    dots,
    local_names,
    sum_over_shards,
    whole_shape,
)
from megatron_r1.parallel import sum_over

# isort: split
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

_KEY = "optimizer.state.exp_avg_sq"
_DAMPING = 0.1
"""DataInf's share of the mean square of a parameter's gradients."""


class Curvature(Protocol):
    def apply(self, directions: Directions, engine: Engine, checkpoint: Path, sets: list[Examples]) -> None:
        """v_c <- H^-1 v_c in place, on this rank's shard. Every rank of the launch calls this.

        `engine` holds the weights of `checkpoint`. `sets`: the windows of each source that H is measured on,
        empty unless the curvature's fields in `influence.plan.FIELDS` hold `curvature_examples`. Raises
        ValueError where checkpoint or windows do not give H.
        """


class Identity:
    def diagonal(self, checkpoint: Path, gpt: Any) -> Gradient:
        """Diagonal of H, whose other elements are 0. Empty where H = 1. `exclude_self` divides by it."""
        return {}

    def apply(self, directions: Directions, engine: Engine, checkpoint: Path, sets: list[Examples]) -> None:
        for name, scale in self.diagonal(checkpoint, engine.gpt).items():
            if name in directions:
                directions[name] /= scale


class Adam(Identity):
    def diagonal(self, checkpoint: Path, gpt: Any) -> Gradient:
        return adam_scale(checkpoint, gpt)


def resolve(kind: str, checkpoints: list[Path]) -> str:
    """The curvature that "auto" stands for. Sums of scores need the same one at all checkpoints."""
    if kind != "auto":
        return kind
    return "adam" if all(_has_moments(path) for path in checkpoints) else "identity"


def _has_moments(checkpoint: Path) -> bool:
    return any(key.startswith(_KEY) for key in contents_of(checkpoint).tensors)


def adam_scale(checkpoint: Path, gpt: Any) -> Gradient:
    """sqrt(v / (1 - beta2^t)) + eps of each parameter: float32, this rank's shard, from any layout.

    The optimizer's state is saved as whole parameters and loads as the weights do. Raises ValueError where
    the checkpoint holds none.
    """
    places, wanted = gpt.sharded_state_dict(), {}
    for name, local in local_names(gpt).items():
        moments = torch.empty_like(gpt.get_parameter(local), dtype=torch.float32)
        wanted[name] = make_sharded_optimizer_tensor(places[local], moments, _KEY)
    contents = contents_of(checkpoint)
    if not any(key.startswith(_KEY) for key in contents.tensors):
        raise ValueError(
            f"{checkpoint} holds no optimizer state, which influence.curvature=adam needs; use identity"
        )
    try:
        group = contents.common["optimizer"]["optimizer"]["param_groups"][0]
        corrected = 1 - float(group["betas"][1]) ** int(group["step"])
        eps = float(group["eps"])
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        corrected = 0.0
    if not corrected > 0:
        raise ValueError(f"{checkpoint} holds no betas, eps and step of its optimizer")
    loaded = load_state(contents, wanted)
    return {name: (loaded[name] / corrected).sqrt_().add_(eps) for name in wanted}


class DataInf:
    """The inverse of each parameter's damped mean of outer products, in closed form:

        lambda_l  = 0.1 / (n d_l) sum_i |g_il|^2                              d_l numbers in parameter l
        H_l^-1 v ~ 1 / (n lambda_l) sum_i ( v - <g_il, v> / (lambda_l + |g_il|^2) g_il )

    over the gradients g_i of n examples. Each example passes by itself, once for lambda and once for the sum.
    Whole gradients exist for one example at a time.
    """

    def apply(self, directions: Directions, engine: Engine, checkpoint: Path, sets: list[Examples]) -> None:
        names, examples = list(directions), sum(map(len, sets))
        shapes = (whole_shape(n, v.shape[1:], engine.context.tensor_size) for n, v in directions.items())
        size_L = torch.tensor([torch.Size(shape).numel() for shape in shapes], device=backend.device())

        def products(gradient: Gradient, others: Gradient, columns: int) -> Tensor:
            """<g_l, w_l> over whole parameters, for `columns` tensors w_l: float64 [L, columns]."""
            part_LX = torch.zeros(len(names), columns, dtype=torch.float64, device=backend.device())
            for part_X, name in zip(part_LX, names, strict=True):
                part_X.copy_(dots(others[name], gradient[name]))
            return sum_over_shards(part_LX, names)

        def squares(gradient: Gradient) -> Tensor:
            return products(gradient, {name: g[None] for name, g in gradient.items()}, 1)[:, 0]

        total_L = torch.zeros(len(names), dtype=torch.float64, device=backend.device())
        for gradient in engine.example_gradients(*sets):
            total_L += squares(gradient)
        damping_L = _DAMPING * sum_over("data", total_L) / (examples * size_L)
        check_gradients("datainf", dict(zip(names, damping_L.tolist(), strict=True)), examples)
        capabilities = len(next(iter(directions.values()), ()))
        sums = {name: torch.zeros_like(direction) for name, direction in directions.items()}
        for gradient in engine.example_gradients(*sets):
            dot_LC = products(gradient, directions, capabilities)
            share_LC = (dot_LC / (damping_L + squares(gradient))[:, None]).float()
            for share_C, (name, total) in zip(share_LC, sums.items(), strict=True):
                total += torch.tensordot(share_C[:, None], gradient[name][None], dims=1)
        for damping, (name, total) in zip(damping_L, sums.items(), strict=True):
            directions[name] -= sum_over("data", total) / examples
            directions[name] /= damping.float()


CURVATURES: dict[str, type[Curvature]] = {
    "identity": Identity,
    "adam": Adam,
    "datainf": DataInf,
    "kfac": Kfac,
    "ekfac": EKfac,
}
"""By `influence.curvature`."""
