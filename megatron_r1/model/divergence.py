"""Vocabulary projection and KL divergence from a teacher as one operation, in chunks of tokens.

With z_s and z_t the logits of student and teacher, T the temperature, p = softmax(z_t / T),
q = softmax(z_s / T) and q_1 = softmax(z_s), the loss of a label and the gradient of its logits are

    L = (1 - w) CE + w T^2 KL(p || q),    dL/dz_s = (1 - w) (q_1 - onehot) + w T (q - p).

The loss of the micro-batch is one number, so the gradients of hidden states and weight are formed while a
chunk's logits exist. Neither model's logits exist whole, and a product is not made twice. A weight with a
gradient buffer has its products added there in the forward pass. The backward pass cannot scale them, and
asserts that it need not: the gradient that arrives is 1.

A cached record names K tokens. The row functions see a number whose exponential is 0 in their place, and
the K logits are added apart. So the mass of all other tokens is a sum of its own, exact where it is small.

Under tensor parallelism the rows of both weights are shards of the vocabulary. The numbers of a row are
reduced over the ranks twice a chunk, and dH is each rank's part of a sum.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.backend import cpu_divergence
from megatron_r1.model.loss import add_product, label_columns, main_gradient, reduced, say_added, slices

FIGURES = ("kl", "ce", "teacher_entropy", "agreement")
"""Of each label: KL(teacher || student) at temperature T and cross-entropy of the label at 1, nats; the
teacher's entropy at T, nats; 1 where both hold the same token for the likeliest, else 0."""

_CHUNK = 1 << 29
"""Bytes of logits, of both models or with records, that exist at a time. The temporaries of a block come on
top."""
_ENTRY = 64
"""Bytes of an entry of a record while its chunk is worked on."""
_BLOCK = {"cpu": 1 << 20}
"""Logits that the plain row functions widen at a time on a device: what a CPU's caches hold."""
_ABSENT = -1e30
"""A logit whose exponential is 0 beside any other."""


@dataclass(frozen=True)
class DenseTarget:
    """A teacher at hand: its logits are scale * softcap(H W^T + bias), with softcap(z) = c tanh(z / c)."""

    hidden_ND: Tensor
    weight_VD: Tensor
    """This rank's shard of the vocabulary, without padded rows."""
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, rows: slice) -> Tensor:
        """[n, V] of these rows."""
        hidden, head = self.hidden_ND[rows], self.weight_VD.t()
        logits = hidden @ head if self.bias_V is None else torch.addmm(self.bias_V, hidden, head)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1 else logits.mul_(self.scale)


@dataclass(frozen=True)
class SparseTarget:
    """Cached records: K tokens of each label's distribution, on every rank the same. No token comes twice."""

    ids_NK: Tensor
    share_NK: Tensor
    """Probability at temperature T, or its unbiased estimate; 0: no entry."""
    entropy_N: Tensor
    """Of the whole distribution at T, nats."""
    tail: bool
    """What the shares of a row lack to 1 is the mass of all other tokens together."""


Target = DenseTarget | SparseTarget


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    counts_N: Tensor,
    target: Target,
    *,
    tokens: int,
    temperature: float = 1.0,
    weight: float = 1.0,
    group: Any = None,
    kernels: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, loss [N], FIGURES [4, N]) of a student with logits H W^T; float32, of float64 inputs float64.

    total = sum of counts_N * loss_N; only it has a graph. `counts_N`: what each label counts, 0 for none.
    `tokens`: ids of the vocabulary; rows of W from there on are padding, outside both softmaxes. `weight`: of
    the divergence; the label's cross-entropy has the rest. `group`: the tensor-parallel group, whose ranks
    hold consecutive shards; the gradient of H is then a part, to be summed over it. `kernels`: has
    `statistics` and `gradient` as this module; None: backend/cpu_divergence.py for fp32 and bf16 on a CPU,
    else this module. A weight that requires no gradient gets none.

    Of sampled records (`tail` false) the divergence and its gradient are unbiased estimates. Of records with
    `tail` it is that of K + 1 outcomes. An upstream gradient that is no power of two rounds that of H again.
    With a gradient buffer it must be 1, and each forward pass needs its backward pass, or a buffer set to 0.

    Raises ValueError where a rank's shard is padding alone, or W has fewer rows than `tokens`.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    first, shard = rank * len(weight_VD), len(weight_VD)
    if tokens > (rows := ranks * shard):
        raise ValueError(f"the teacher has {tokens} tokens, the student {rows}: raise model.vocab_size")
    if tokens <= rows - shard:  # of the last rank; all raise
        way_out = "lower parallel.tensor or model.vocab_size"
        raise ValueError(f"tensor-parallel rank {ranks - 1} has none of the {tokens} tokens: {way_out}")
    width = min(tokens - first, shard)
    if isinstance(target, DenseTarget) and (rows := len(target.weight_VD)) != width:
        raise ValueError(f"rank {rank} has {width} tokens of the student and {rows} of the teacher")
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()  # no gradient is formed
    if kernels is None:
        operands = [hidden_ND, target.hidden_ND] if isinstance(target, DenseTarget) else [hidden_ND]
        kernels = cpu_divergence if all(map(cpu_divergence.takes, operands)) else sys.modules[__name__]
    counts_N = counts_N.to(_wide(hidden_ND))
    group = group if ranks > 1 else None
    task = _Task(target, labels_N - first, counts_N, temperature, weight, group, first, width, kernels)
    return _LinearDivergence.apply(hidden_ND, weight_VD, task)


def statistics(student_NV: Tensor, teacher_NV: Tensor | None, inverse: float) -> Tensor:
    """Numbers of each row, [8, N] in float32, for float64 logits in float64. `inverse`: 1 / T.

    0 m_s = max z_s, 1 sum exp((z_s - m_s) / T), 2 m_t = max z_t, 3 sum exp((z_t - m_t) / T),
    4 sum exp((z_t - m_t) / T) (z_t - m_t) / T, 5 sum exp((z_t - m_t) / T) ((z_t - m_t) - (z_s - m_s)) / T,
    6 sum exp(z_s - m_s), 7 z_s where z_t is largest. Without a teacher 2 to 5 and 7 are 0.
    """
    numbers_8N = student_NV.new_zeros(8, len(student_NV), dtype=_wide(student_NV))
    for rows in _blocks(student_NV):
        number = numbers_8N[:, rows]
        z_s = student_NV[rows].to(number.dtype)
        number[0] = z_s.amax(1)
        z_s = z_s - number[0, :, None]
        number[1], number[6] = (z_s * inverse).exp_().sum(1), z_s.exp().sum(1)
        if teacher_NV is None:
            continue
        z_t = teacher_NV[rows].to(number.dtype)
        number[2], top = z_t.max(1)
        number[7] = student_NV[rows].gather(1, top[:, None])[:, 0]
        z_t = z_t - number[2, :, None]
        e_t = (z_t * inverse).exp_()
        number[3], number[4] = e_t.sum(1), (e_t * z_t).sum(1) * inverse
        number[5] = z_t.sub_(z_s).mul_(e_t).sum(1) * inverse
    return numbers_8N


def gradient(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    max_s_N: Tensor,
    max_t_N: Tensor | None,
    inverse: float,
    a_N: Tensor,
    b_N: Tensor | None,
    c_N: Tensor | None,
) -> None:
    """z_s -> a exp((z_s - m_s) / T) - b exp((z_t - m_t) / T) + c exp(z_s - m_s) in place, rounded once.

    `c_N` None: 0. Without a teacher `max_t_N` and `b_N` are None.
    """
    for rows in _blocks(student_NV):
        z_s = student_NV[rows].to(a_N.dtype) - max_s_N[rows, None]
        value = (z_s * inverse).exp_().mul_(a_N[rows, None])
        if c_N is not None:
            value.addcmul_(z_s.exp_(), c_N[rows, None])
        if teacher_NV is not None and max_t_N is not None and b_N is not None:
            z_t = teacher_NV[rows].to(a_N.dtype) - max_t_N[rows, None]
            value.addcmul_(z_t.mul_(inverse).exp_(), b_N[rows, None], value=-1)
        student_NV[rows] = value


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(logits_NV: Tensor) -> list[slice]:
    rows, width = logits_NV.shape
    return slices(rows, max(1, _BLOCK.get(logits_NV.device.type, 1 << 23) // width))


_Compared = tuple[Tensor, Callable[[], None]]
"""FIGURES [4, n] of a chunk's rows, and what makes the student's logits their gradient, in place."""


@dataclass(frozen=True)
class _Task:
    target: Target
    labels_N: Tensor
    """In this rank's numbering of the tokens."""
    counts_N: Tensor
    temperature: float
    weight: float
    group: Any
    first: int
    """Id of this rank's first token."""
    width: int
    """This rank's tokens."""
    kernels: Any

    def compare(self, rows: slice, student_NV: Tensor) -> _Compared:
        if isinstance(self.target, DenseTarget):
            return self._with_logits(rows, student_NV, self.target.logits(rows))
        return self._with_records(rows, student_NV, self.target)

    def loss(self, kl_N: Tensor, ce_N: Tensor) -> Tensor:
        return (1 - self.weight) * ce_N + self.weight * self.temperature**2 * kl_N

    def _joined(self, a_N: Tensor, c_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a exp((z - m) / T) + c exp(z - m), where it is one term."""
        return (a_N + c_N, None) if self.temperature == 1 or self.weight == 1 else (a_N, c_N)

    def _with_logits(self, rows: slice, student_NV: Tensor, teacher_NV: Tensor) -> _Compared:
        inverse = 1 / self.temperature
        mine_N1, column_N1 = label_columns(self.labels_N[rows, None], self.width)
        label_N1 = student_NV.gather(1, column_N1).to(self.counts_N.dtype)
        own = self.kernels.statistics(student_NV, teacher_NV, inverse)
        max_s, max_t = reduced(own[[0, 2]], self.group, dist.ReduceOp.MAX)
        # This rank's sums are relative to its own largest logits.
        by_s, by_t = own[0] - max_s, own[2] - max_t
        shrink, agree = (by_t * inverse).exp(), (own[7] == max_s) & (own[2] == max_t)
        sums = [own[1] * (by_s * inverse).exp(), own[6] * by_s.exp(), own[3] * shrink, agree.to(own.dtype)]
        sums += [(own[4] + own[3] * by_t * inverse) * shrink]
        sums += [(own[5] + own[3] * (by_t - by_s) * inverse) * shrink]
        sums += [torch.where(mine_N1, label_N1, 0.0)[:, 0]]
        sum_s, sum_1, sum_t, agree, x, d, label = reduced(torch.stack(sums), self.group)
        kl, entropy = d / sum_t + (sum_s / sum_t).log(), sum_t.log() - x / sum_t

        def to_gradient() -> None:
            kd = self.counts_N[rows] * self.weight * self.temperature
            ce = self.counts_N[rows] * (1 - self.weight)
            a, c = self._joined(kd / sum_s, ce / sum_1)
            numbers = max_s, max_t, inverse, a, kd / sum_t, c
            # At the label the difference is formed before it is rounded: it may be small.
            gradient(label_N1, teacher_NV.gather(1, column_N1), *numbers)
            self.kernels.gradient(student_NV, teacher_NV, *numbers)
            if self.weight < 1:
                # Another rank's label: what is there is written again.
                value_N1 = (label_N1 - ce[:, None]).to(student_NV.dtype)
                value_N1 = torch.where(mine_N1, value_N1, student_NV.gather(1, column_N1))
                student_NV.scatter_(1, column_N1, value_N1)

        figures = torch.stack([kl, max_s + sum_1.log() - label, entropy, agree.clamp(max=1)])
        return figures, to_gradient

    def _with_records(self, rows: slice, student_NV: Tensor, records: SparseTarget) -> _Compared:
        """Where the label is not among the entries, it is one more, without a share."""
        inverse, wide, label_N1 = 1 / self.temperature, self.counts_N.dtype, self.labels_N[rows, None]
        id_NK = torch.cat([records.ids_NK[rows].long() - self.first, label_N1], 1)
        share_NK, entropy = F.pad(records.share_NK[rows].to(wide), (0, 1)), records.entropy_N[rows].to(wide)
        is_label_NK, valid_NK = id_NK == label_N1, share_NK > 0
        valid_NK[:, -1] = ~(is_label_NK & valid_NK).any(1)
        mine_NK, column_NK = label_columns(id_NK, self.width)
        mine_NK = mine_NK & valid_NK
        # An entry that is not here adds 0 to some logit: to pick the others, the host would wait for a GPU.
        place_N = (column_NK + torch.arange(len(id_NK), device=id_NK.device)[:, None] * self.width).flatten()
        z_NK = torch.where(mine_NK, student_NV.gather(1, column_NK).to(wide), 0.0)
        student_NV.view(-1).index_add_(0, place_N, (mine_NK * _ABSENT).flatten().to(student_NV.dtype))
        own = self.kernels.statistics(student_NV, None, inverse)
        max_rest = reduced(own[0].clone(), self.group, dist.ReduceOp.MAX)
        by = own[0] - max_rest
        sums = torch.stack([own[1] * (by * inverse).exp(), own[6] * by.exp(), *z_NK.t()])
        sum_rest, sum_rest_1, *z = reduced(sums, self.group)
        z_NK = torch.stack(z, 1).masked_fill_(~valid_NK, _ABSENT)
        by = max_rest - (largest := torch.maximum(max_rest, z_NK.amax(1)))
        z_NK -= largest[:, None]
        agree = z_NK.gather(1, share_NK.argmax(1, keepdim=True))[:, 0] == 0
        # Logarithms of the other tokens' sums, at T and at 1.
        rest_N1, rest_1_N1 = (by * inverse + sum_rest.log())[:, None], (by + sum_rest_1.log())[:, None]
        inputs = z_NK.requires_grad_(), rest_N1.requires_grad_(), rest_1_N1.requires_grad_()
        with torch.enable_grad():
            all_N1 = torch.cat([z_NK * inverse, rest_N1], 1).logsumexp(1, keepdim=True)
            kl = (share_NK * (all_N1 - z_NK * inverse)).sum(1)
            if records.tail:
                # The label's logit, where it is no entry, is among the other tokens'.
                log_tail = torch.logaddexp(rest_N1, z_NK[:, -1:] * inverse) - all_N1
                # Where there are no others, the shares' rounding is nobody's mass.
                tail = torch.where(log_tail[:, 0] > _ABSENT / 1e10, (1 - share_NK.sum(1)).clamp(min=0), 0.0)
                log_p = torch.xlogy(share_NK, share_NK).sum(1) + torch.xlogy(tail, tail)
                kl = kl + log_p - tail * log_tail[:, 0]
            else:
                kl = kl - entropy
            ce = torch.cat([z_NK, rest_1_N1], 1).logsumexp(1)
            ce = ce - torch.where(is_label_NK & valid_NK, z_NK, 0.0).sum(1)
            total = (self.counts_N[rows] * self.loss(kl, ce)).sum()

        def to_gradient() -> None:
            by_z_NK, by_rest_N1, by_rest_1_N1 = torch.autograd.grad(total, inputs)
            a, c = self._joined(by_rest_N1[:, 0] * inverse / sum_rest, by_rest_1_N1[:, 0] / sum_rest_1)
            self.kernels.gradient(student_NV, None, max_rest, None, inverse, a, None, c)
            value_NK = torch.where(mine_NK, by_z_NK, 0.0).to(student_NV.dtype)
            student_NV.view(-1).index_add_(0, place_N, value_NK.flatten())

        return torch.stack([kl, ce, entropy, agree.to(wide)]).detach(), to_gradient


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
        counts_N, own_VD, tokens = task.counts_N, weight_VD[: task.width], len(hidden_ND)
        grad_ND = torch.empty_like(hidden_ND) if any(ctx.needs_input_grad) else None
        total_VD = main_VD = main_gradient(weight_VD)
        if main_VD is None and ctx.needs_input_grad[1]:
            total_VD = torch.zeros_like(weight_VD, dtype=counts_N.dtype)
        figures_FN = counts_N.new_empty(len(FIGURES), tokens)
        row = task.width * hidden_ND.element_size()
        row += row if isinstance(task.target, DenseTarget) else _ENTRY * task.target.ids_NK.shape[1]
        for rows in slices(tokens, max(1, _CHUNK // row)):
            student = to_gradient = None  # the last chunk's logits go before the next come
            student = hidden_ND[rows] @ own_VD.t()
            figures_FN[:, rows], to_gradient = task.compare(rows, student)
            if grad_ND is None:
                continue
            to_gradient()
            grad_ND[rows] = student @ own_VD
            if total_VD is not None:
                add_product(total_VD[: task.width], student, hidden_ND[rows])
        loss_N = task.loss(figures_FN[0], figures_FN[1])
        ctx.added = main_VD is not None
        ctx.save_for_backward(grad_ND, None if ctx.added else total_VD)
        ctx.weight = weight_VD
        ctx.mark_non_differentiable(loss_N, figures_FN)
        return (counts_N * loss_N).sum(), loss_N, figures_FN

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_ND, grad_VD = ctx.saved_tensors
        if ctx.added:
            # A GPU is not waited for.
            torch._assert_async(grad == 1, "the weight's gradient is in its buffer and cannot be scaled")
            say_added(ctx.weight)
            return grad_ND, None, None
        return grad_ND * grad, None if grad_VD is None else (grad_VD * grad).to(ctx.weight.dtype), None
