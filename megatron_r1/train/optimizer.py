"""AdamW for megatron-core's distributed optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_r1 import backend  # noqa: F401  (before megatron.core)
from megatron_r1.config import OptimizerConfig

# isort: split
from megatron.core import optimizer as core_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the contract of Apex's and Transformer Engine's FusedAdam, on torch's fused kernel.

    The contract: the step counts per group and not per parameter, the state is exp_avg and exp_avg_sq.
    megatron-core's distributed optimizer resumes only optimizers of that contract (with
    torch.optim.AdamW, loading fails), and so checkpoints interchange with a GPU's.
    """

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
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            if not params:
                continue
            step = torch.tensor(float(group["step"]), device=params[0].device)
            self._kernel(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )


def build_optimizer(config: OptimizerConfig, precision: str, model: list[Any]) -> Any:
    """megatron-core's distributed optimizer over `model` (DistributedDataParallel chunks)."""
    if core_optimizer.USING_PYTORCH_OPTIMIZER:
        # Neither Transformer Engine nor Apex: give megatron-core the one optimizer it can resume.
        core_optimizer.Adam = distrib_optimizer.Adam = FusedAdam  # type: ignore[misc]
        core_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = False
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


def guarded_step(
    optimizer: Any, refuses: Callable[[float], str | None], discard: bool = False
) -> tuple[float, str | None]:
    """One Adam step on the summed gradients, unless `refuses(norm)` says why not: (norm, why not).

    megatron-core's own `step`, with the question between norm and clipping. The norm is the global one,
    alike on every rank. `discard`: this rank's gradients are not to be used; the norm is then NaN on
    every rank.
    """
    if optimizer.prepare_grads():
        return math.inf, refuses(math.inf)
    if discard:
        next(p for p in optimizer.get_parameters() if p.numel()).grad.fill_(math.nan)
    norm = float(optimizer.get_grad_norm())
    refused = refuses(norm)
    if refused is None:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
        optimizer.step_with_ready_grads()
        _count_empty_groups(optimizer)
    return norm, refused


def _count_empty_groups(optimizer: Any) -> None:
    """Adam counts a group's steps, but on a rank that holds none of its parameters it never looks at it.

    megatron-core saves the first rank's groups for all: its count must stand for the others', too.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            if not group["params"]:
                group["step"] = group.get("step", 0) + 1


def forget_moments(optimizer: Any) -> None:
    """Adam begins anew: moments 0, step 0."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for state in inner.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].zero_()
        for group in inner.param_groups:
            group["step"] = 0


def set_schedule(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Learning rate and decay of the coming step. Norm weights carry wd_mult 0, which megatron-core
    applies in its own scheduler only."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
