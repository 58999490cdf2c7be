"""AdamW for megatron-core's distributed optimizer, and a step of it without a wait."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1 import backend  # (before megatron.core)
from megatron_r1.config import OptimizerConfig

# isort: split
from megatron.core import optimizer as core_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer

_PIECE = 1 << 18
"""Numbers whose float32 norm torch forms at once. A CPU adds them in order: of 1.5e8 it loses 2 %."""


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the contract of Apex's and Transformer Engine's FusedAdam, on torch's fused kernel.

    The contract: the step counts per group and not per parameter, the state is exp_avg and exp_avg_sq.
    megatron-core's distributed optimizer resumes only optimizers of that contract (with
    torch.optim.AdamW, loading fails). A group's `step` is brought up to date by `state_dict`.
    """

    grad_scale: Tensor | None = None
    """float32 []: the next step divides gradients by it, in place."""
    found_inf: Tensor | None = None
    """float32 []: where it is 1 the next step leaves weights, moments and `steps` as they are."""
    steps: Tensor | None = None
    """float32 []: steps taken. One number for all groups, also those that this rank holds nothing of."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        # megatron-core 0.19 passes it for graph capture of the optimizer, which nothing here asks for.
        assert not capturable
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True)
        super().__init__(params, defaults)
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.steps is None:
            self.steps = torch.zeros((), device=backend.device())
        # On the device: whether the step before was taken may not be known here yet.
        self.steps += 1 if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            if not params:
                continue
            self._kernel(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [self.steps] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
            )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.steps is not None:
            state["param_groups"] = [{**group, "step": int(self.steps)} for group in state["param_groups"]]
        return state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        steps = max((group.get("step", 0) for group in self.param_groups), default=0)
        self.steps = torch.full((), float(steps), device=backend.device()) if steps else None

    def forget(self) -> None:
        """Begin anew: moments 0, step 0."""
        self.steps = torch.zeros((), device=backend.device())
        for moment in (moment for state in self.state.values() for moment in state.values()):
            moment.zero_()


def build_optimizer(config: OptimizerConfig, precision: str, model: list[Any]) -> Any:
    """megatron-core's distributed optimizer over `model` (DistributedDataParallel chunks)."""
    # Also where Transformer Engine or Apex is: theirs cannot leave a step out on the device.
    core_optimizer.Adam = distrib_optimizer.Adam = FusedAdam  # type: ignore[misc]
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
    )
    # Only megatron-core's own gathering of the state would use those; optimizer_shards.py gathers nothing.
    return get_megatron_optimizer(core, model, use_gloo_process_groups=False)


def parts_of(optimizer: Any) -> list[Any]:
    """The distributed optimizers that megatron-core has chained, or the only one."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@torch.no_grad()
def guarded_step(optimizer: Any, sums_2N: Tensor, lost: bool) -> Tensor:
    """One Adam step on gradients summed over labels, clipped; float64 [3] on the device, alike on all ranks.

    `sums_2N`: losses and labels of the global batch, by source. `lost`: this rank's gradients are not to be
    used. The result: the norm of the mean gradient before clipping, the number of ranks that have `lost`
    theirs, 1 where the step was left out. It is left out where loss or norm are not finite, or a rank has
    lost its gradients. Weights, moments and step count then stay as they are. Nothing here waits for the
    device.
    """
    optimizer.prepare_grads()
    loss, labels = sums_2N.sum(1)
    gradients = [gradient for part in parts_of(optimizer) for gradient in part.get_main_grads_for_grad_norm()]
    # The zero is for a rank that holds none.
    pieces = [labels.float().new_zeros(1), *(p for g in gradients for p in g.flatten().split(_PIECE))]
    squares = torch.stack(torch._foreach_norm(pieces)).double().square().sum()
    # One sum over the ranks for both.
    total = torch.stack([squares, torch.full_like(squares, lost)])
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    norm, lost_ranks = total[0].sqrt() / labels, total[1]
    left_out = ~((loss / labels).isfinite() & norm.isfinite()) | (lost_ranks > 0)
    clip = optimizer.config.clip_grad
    scale = labels * ((norm + 1e-6) / clip).clamp(min=1) if clip > 0 else labels
    for part in parts_of(optimizer):
        part.optimizer.grad_scale, part.optimizer.found_inf = scale.float(), left_out.float()
    optimizer.step_with_ready_grads()
    return torch.stack([norm, lost_ranks, left_out.double()])


def forget_moments(optimizer: Any) -> None:
    """Adam begins anew: moments 0, step 0."""
    for part in parts_of(optimizer):
        part.optimizer.forget()


def set_schedule(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Learning rate and decay of the coming step. Norm weights carry wd_mult 0, which megatron-core
    applies in its own scheduler only."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
