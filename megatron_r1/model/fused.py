"""Layers of megatron-core's GPTModel with this project's kernels for a GPU, checked before they are used.

Modules keep their parameters, their names and the modules within: what is saved, sharded or watched is the
same. A call that the kernels do not cover takes the plain way. This file imports triton: ask
`backend.has_triton()` before.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.backend import triton_divergence, triton_kernels
from megatron_r1.model.divergence import DenseTarget, linear_divergence
from megatron_r1.model.loss import linear_cross_entropy
from megatron_r1.system.terminal import is_first_rank, message_of, say

# isort: split
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.torch_norm import L2Norm


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return triton_kernels.swiglu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return triton_kernels.swiglu(x, grad.contiguous())


class _Rotation(torch.autograd.Function):
    """QKV [S, B, G, queries + 2, D], `_turn` [S, D] -> queries, keys, values [S, B, heads, D].

    `eps`: of the norm of queries and keys before they are rotated; None: no norm.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed_SBGHD: Tensor, turn_SD: Tensor, eps: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(mixed_SBGHD, turn_SD)
        ctx.eps = eps
        return *triton_kernels.rotate(mixed_SBGHD, turn_SD, eps), mixed_SBGHD[..., -1, :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        mixed_SBGHD, turn_SD = ctx.saved_tensors
        return triton_kernels.rotate_backward(mixed_SBGHD, turn_SD, ctx.eps, grads), None, None


@functools.lru_cache(maxsize=2)
def _turn(angle_SD: Tensor) -> Tensor:
    """Cosines, then sines of angles [S, ..., D] with equal halves, float32 [S, D].

    megatron-core hands every layer of every step the same tensor. A tensor is its own key: by identity.
    """
    first, second = angle_SD.float().flatten(1).chunk(2, 1)
    return torch.cat((first.cos(), second.sin()), 1)


class FusedMlp(MLP):
    """megatron-core's with SwiGLU as one kernel."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(_Swiglu.apply(gate_up))


class FusedSelfAttention(SelfAttention):
    """megatron-core's with split, norm and rotation of queries and keys as one kernel."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, rotary_pos_emb: Any = None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(rotary_pos_emb, Tensor) or any(value is not None for value in others.values()):
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **others)
        mixed, _ = self.linear_qkv(hidden_states)
        s, b, _ = mixed.shape
        d = self.hidden_size_per_attention_head
        qkv = _Rotation.apply(
            mixed.view(s, b, self.num_query_groups_per_partition, -1, d),
            _turn(rotary_pos_emb),
            self.q_layernorm.eps if isinstance(self.q_layernorm, L2Norm) else None,
        )
        out = self.core_attention(*qkv, attention_mask, attn_mask_type=self.attn_mask_type)
        return self.linear_proj(out)


def install(gpt: Any, layers: bool) -> None:
    """Let a new model use the kernels that `_passed` names; `layers` False: in its loss alone.

    Every rank calls this.
    """
    config, ranks = gpt.config, gpt.config.tensor_model_parallel_size
    groups, eps = config.num_query_groups, config.layernorm_epsilon if config.qk_l2_norm else None
    heads = groups // ranks, config.num_attention_heads // groups, config.kv_channels
    widths = gpt.vocab_size // ranks, config.ffn_hidden_size // ranks, *heads
    passed = _passed((config.params_dtype, *widths, eps, gpt.max_sequence_length))
    gpt.loss_kernels = triton_kernels if "loss" in passed else None
    gpt.divergence_kernels = triton_divergence if "divergence" in passed else None
    kinds = {MLP: ("SwiGLU", FusedMlp), SelfAttention: ("rotation", FusedSelfAttention)}
    for module in gpt.modules() if layers else ():
        name, kind = kinds.get(type(module), ("", None))
        if name in passed:
            module.__class__ = kind


@functools.cache
def _passed(shape: tuple[Any, ...]) -> frozenset[str]:
    """Names of the kernels that compile on all ranks and agree with plain torch in float64.

    `shape`: that of `_cases`. The relative error of values and gradients, in norm, may be 1e-5 in float32 and
    1e-2 in bfloat16. A line says the seconds, which are mostly Triton's at a first run, and one names each
    kernel that is left out.
    """
    start, bound = time.perf_counter(), 1e-5 if shape[0] == torch.float32 else 1e-2
    cases = _cases(shape)
    error_K = torch.tensor([_error(name, *case) for name, case in cases.items()], device=backend.device())
    if dist.is_initialized():
        dist.all_reduce(error_K, dist.ReduceOp.MAX)
    left_out = {name: e for name, e in zip(cases, error_K.tolist(), strict=True) if e > bound}
    if is_first_rank():
        used = ", ".join(name for name in cases if name not in left_out) or "none"
        say(f"Triton kernels: {used} | checked in {time.perf_counter() - start:.1f} s")
        for name, error in left_out.items():
            say(f"Triton kernel {name} is left out: relative error {error:.1e}, at most {bound:g}")
    return frozenset(cases.keys() - left_out)


@torch.enable_grad()
def _error(name: str, kernel: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor) -> float:
    """The largest relative error of a value or a gradient; infinity where the kernel does not run."""
    results: list[list[Tensor]] = []
    upstream: list[Tensor] = []
    try:
        for function, widened in ((kernel, Tensor.detach), (plain, Tensor.double)):
            leaves = [widened(x).requires_grad_() for x in inputs]
            out = function(*leaves)
            outs = out if isinstance(out, tuple) else (out,)
            upstream = upstream or [torch.linspace(-1, 2, o.numel()).to(o).view(o.shape) for o in outs]
            grads = torch.autograd.grad(outs, leaves, [widened(u) for u in upstream])
            results.append([*outs, *grads])
        pairs = zip(*results, strict=True)
        error_T = torch.stack([(ours - exact).norm() / exact.norm() for ours, exact in pairs]).detach()
    except Exception as error:  # the compiler's or the driver's: whatever it is, the plain form runs
        say(f"Triton kernel {name} does not run: {type(error).__name__}: {message_of(error)}")
        return float("inf")
    # What is no number would get lost in the largest of the ranks.
    return float(error_T.nan_to_num(float("inf"), float("inf")).max())


def _cases(shape: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """By name: kernel, plain form, and operands of a few tokens.

    `shape`: type, vocabulary, width of the feed-forward, groups of queries, queries of a group and width of a
    head, all of this rank, `eps` of `triton_kernels.rotate`, length of a sequence.
    """
    dtype, vocabulary, ffn, groups, queries, d, eps, length = shape
    device = backend.device()
    generator = torch.Generator(device).manual_seed(1)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).to(dtype)

    label_N = torch.randint(vocabulary, (8,), device=device, generator=generator)
    teacher = randn(8, 64) / 8, randn(vocabulary, 64)
    position_S = torch.linspace(0, length - 1, 8, device=device).round()
    angle_SD = torch.outer(position_S, 1e4 ** -torch.linspace(0, 1, d // 2, device=device)).repeat(1, 2)

    def rotated(mixed_SBGHD: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (x.flatten(2, 3) for x in mixed_SBGHD.split([queries, 1, 1], dim=3))
        cos, sin = (f(angle_SD[:, None, None, : d // 2]).to(mixed_SBGHD) for f in (torch.cos, torch.sin))
        turned = []
        for x in (query, key):
            first, second = (x if eps is None else F.rms_norm(x, (d,), eps=eps)).chunk(2, -1)
            turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
        return *turned, value

    def divergence(hidden: Tensor, weight: Tensor) -> Tensor:
        z, z_t = hidden @ weight.t(), teacher[0].to(hidden) @ teacher[1].to(weight).t()
        log_q, log_p, log_q_1 = ((x - x.logsumexp(1, keepdim=True)) for x in (z / 2, z_t / 2, z))
        kl = (log_p.exp() * (log_p - log_q)).sum()
        return 0.5 * 2**2 * kl - 0.5 * log_q_1.gather(1, label_N[:, None]).sum()

    ones_N = torch.ones(8, device=device)
    form = {"tokens": vocabulary, "temperature": 2.0, "weight": 0.5, "kernels": triton_divergence}
    return {
        "divergence": (
            lambda h, w: linear_divergence(h, w, label_N, ones_N, DenseTarget(*teacher), **form)[0],
            divergence,
            *(randn(8, 64) / 8, randn(vocabulary, 64)),
        ),
        "loss": (
            lambda h, w: linear_cross_entropy(h, w, label_N, kernels=triton_kernels),
            # F.cross_entropy is among the operators that `train.deterministic` refuses on a GPU.
            lambda h, w: (z := h @ w.t()).logsumexp(1) - z.gather(1, label_N[:, None])[:, 0],
            *(randn(8, 64) / 8, randn(vocabulary, 64)),
        ),
        "SwiGLU": (_Swiglu.apply, lambda x: F.silu(x[..., :ffn]) * x[..., ffn:], randn(8, 2 * ffn)),
        "rotation": (
            lambda x: _Rotation.apply(x, _turn(angle_SD), eps),
            rotated,
            randn(8, 2, groups, queries + 2, d),
        ),
    }
