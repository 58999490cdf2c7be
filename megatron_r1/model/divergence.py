"""Vocabulary projection and KL divergence from a teacher as one operation, in chunks of tokens.

With z_s and z_t the logits of student and teacher, T the temperature, p = softmax(z_t / T),
q = softmax(z_s / T) and q_1 = softmax(z_s), the loss of a label and the gradient of its logits are

    L = (1 - w) CE + w T^2 KL(p || q),    dL/dz_s = (1 - w) (q_1 - onehot) + w T (q - p).

The loss of the micro-batch is one number, so the gradients of hidden states and weight are formed while a
chunk's logits exist, and the backward pass scales them. Neither model's logits exist whole, and a product
is not made twice.

A cached record names K tokens. The row functions see a number whose exponential is 0 in their place, and
the K logits are added apart. So the mass of all other tokens is a sum of its own, exact where it is small.

Under tensor parallelism the rows of both weights are shards of the vocabulary. The numbers of a row are
reduced over the ranks twice a chunk, and dH is each rank's part of a sum.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.model.loss import add_product, label_columns, main_gradient, reduced, say_added, slices

FIGURES = ("kl", "ce", "teacher_entropy", "agreement")
"""Of each label: KL(teacher || student) at temperature T and cross-entropy of the label at 1, nats; the
teacher's entropy at T, nats; 1 where both hold the same token for the likeliest, else 0."""

_CHUNK = 3 << 28
"""Bytes of logits, of both models together, that exist at a time. The temporaries of a block come on top."""
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


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    counts_N: Tensor,
    target: DenseTarget | SparseTarget,
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
    `statistics` and `gradient` as this module. A weight that requires no gradient gets none.

    Of sampled records (`tail` false) the divergence and its gradient are unbiased estimates. Of records with
    `tail` it is that of K + 1 outcomes.

    Raises ValueError where a rank's shard is padding alone, or W has fewer rows than `tokens`.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    shard = len(weight_VD)
    if tokens > ranks * shard:
        raise ValueError(
            f"the teacher's vocabulary has {tokens} tokens, the student's {ranks * shard}: "
            "raise model.vocab_size"
        )
    if (width := min(tokens - rank * shard, shard)) <= 0:
        raise ValueError(
            f"tensor-parallel rank {rank} holds no token of {tokens}: "
            "lower parallel.tensor or model.vocab_size"
        )
    if isinstance(target, DenseTarget) and len(target.weight_VD) != width:
        raise ValueError(f"the teacher's shard has {len(target.weight_VD)} tokens, the student's {width}")
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()  # no gradient is formed
    kernels, group = kernels or sys.modules[__name__], group if ranks > 1 else None
    form = _Form(temperature, weight, group, rank * shard, width, kernels)
    return _LinearDivergence.apply(hidden_ND, weight_VD, labels_N, counts_N, target, form)


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
    return slices(rows, max(1, _BLOCK.get(logits_NV.device.type, 1 << 24) // width))


@dataclass(frozen=True)
class _Form:
    """The loss, and this rank's part of the vocabulary: `width` tokens from the id `first` on."""

    temperature: float
    weight: float
    group: Any
    first: int
    width: int
    kernels: Any


@dataclass(frozen=True)
class _Labels:
    """A chunk's, in this rank's numbering of the tokens."""

    id_N: Tensor
    mine_N: Tensor
    column_N1: Tensor
    logit_N: Tensor
    """0 where the label is another rank's."""
    count_N: Tensor


@dataclass(frozen=True)
class _Rows:
    """A chunk's figures, and the numbers that make its logits their gradient: see `gradient`."""

    figures_FN: Tensor
    max_s_N: Tensor
    max_t_N: Tensor | None
    a_N: Tensor
    b_N: Tensor | None
    c_N: Tensor
    apart_N: Tensor
    """Whether the label's part of the gradient is still to be subtracted, on this rank."""
    entries: tuple[Tensor, Tensor] | None = None
    """Flat places in the logits, and the gradient there."""


def _dense(form: _Form, student_NV: Tensor, teacher_NV: Tensor, labels: _Labels) -> _Rows:
    inverse = 1 / form.temperature
    own = form.kernels.statistics(student_NV, teacher_NV, inverse)
    max_s, max_t = reduced(own[[0, 2]], form.group, dist.ReduceOp.MAX)
    # This rank's sums are relative to its own largest logits.
    by_s, by_t = own[0] - max_s, own[2] - max_t
    shrink = (by_t * inverse).exp()
    sums = [own[1] * (by_s * inverse).exp(), own[6] * by_s.exp(), own[3] * shrink]
    sums += [(own[4] + own[3] * by_t * inverse) * shrink]
    sums += [(own[5] + own[3] * (by_t - by_s) * inverse) * shrink]
    sums += [((own[7] == max_s) & (own[2] == max_t)).to(own.dtype), labels.logit_N]
    sum_s, sum_1, sum_t, x, d, agree, label = reduced(torch.stack(sums), form.group)
    kl, entropy = d / sum_t + (sum_s / sum_t).log(), sum_t.log() - x / sum_t
    figures = torch.stack([kl, max_s + sum_1.log() - label, entropy, agree.clamp(max=1)])
    kd = labels.count_N * (form.weight * form.temperature)
    ce = labels.count_N * (1 - form.weight)
    return _Rows(figures, max_s, max_t, kd / sum_s, kd / sum_t, ce / sum_1, labels.mine_N)


def _sparse(form: _Form, student_NV: Tensor, target: SparseTarget, rows: slice, labels: _Labels) -> _Rows:
    """Leaves `_ABSENT` where the entries' logits are."""
    inverse, wide = 1 / form.temperature, labels.logit_N.dtype
    id_NK, share_NK = target.ids_NK[rows].long() - form.first, target.share_NK[rows].to(wide)
    entropy, mass, top = target.entropy_N[rows].to(wide), share_NK.sum(1), share_NK.argmax(1, keepdim=True)
    mine_NK, column_NK = label_columns(id_NK, form.width)
    mine_NK = mine_NK & (share_NK > 0)
    # An entry that is not here adds 0 to some logit: to pick those that are, the host would wait for a GPU.
    place_NK = column_NK + torch.arange(len(id_NK), device=id_NK.device)[:, None] * form.width
    z_NK = torch.where(mine_NK, student_NV.gather(1, column_NK).to(wide), _ABSENT)
    student_NV.view(-1).index_add_(0, place_NK.flatten(), (mine_NK * _ABSENT).to(student_NV.dtype).flatten())
    own = form.kernels.statistics(student_NV, None, inverse)
    max_rest, largest = reduced(torch.stack([own[0], z_NK.amax(1)]), form.group, dist.ReduceOp.MAX)
    largest, by = torch.maximum(max_rest, largest), own[0] - max_rest
    z_NK -= largest[:, None]
    e_NK, e_1_NK = (z_NK * inverse).exp(), z_NK.exp()
    cross = (torch.where(mine_NK, share_NK, 0.0) * z_NK).sum(1) * inverse
    sums = [own[1] * (by * inverse).exp(), own[6] * by.exp(), e_NK.sum(1), e_1_NK.sum(1)]
    sums += [cross, (z_NK.gather(1, top)[:, 0] == 0).to(wide), labels.logit_N]
    rest, rest_1, sum_s, sum_1, cross, agree, label = reduced(torch.stack(sums), form.group)
    by = max_rest - largest
    sum_s, sum_1 = sum_s + rest * (by * inverse).exp(), sum_1 + rest_1 * by.exp()
    kl, tail = mass * sum_s.log() - cross, torch.zeros_like(mass)
    if target.tail:
        # Where the entries are all tokens, the shares' rounding is nobody's mass.
        tail = torch.where(max_rest > _ABSENT / 2, (1 - mass).clamp(min=0), 0.0)
        kl += torch.xlogy(share_NK, share_NK).sum(1) + torch.xlogy(tail, tail)
        kl -= tail * (by * inverse + (rest / sum_s).log())
    else:
        kl -= entropy
    figures = torch.stack([kl, largest + sum_1.log() - label, entropy, agree])
    kd = labels.count_N * (form.weight * form.temperature)
    ce = labels.count_N * (1 - form.weight)
    mass = mass + tail
    is_label_NK = mine_NK & (id_NK == labels.id_N[:, None])
    value_NK = kd[:, None] * (e_NK * (mass / sum_s)[:, None] - share_NK)
    value_NK += ce[:, None] * (e_1_NK / sum_1[:, None] - is_label_NK.to(wide))
    a = kd * (mass / sum_s * (by * inverse).exp() - tail / rest)
    apart = labels.mine_N & ~is_label_NK.any(1)
    entries = place_NK.flatten(), torch.where(mine_NK, value_NK, 0.0).flatten()
    return _Rows(figures, max_rest, None, a, None, ce / sum_1 * by.exp(), apart, entries)


def _to_gradient(
    form: _Form, student_NV: Tensor, teacher_NV: Tensor | None, labels: _Labels, rows: _Rows
) -> None:
    """The gradient of the student's logits in their place. A difference is formed before it is rounded."""
    inverse, a, c = 1 / form.temperature, rows.a_N, rows.c_N
    plain = form.temperature == 1 or form.weight == 1
    a, c = (a + c, None) if plain else (a, c)
    z = labels.logit_N - rows.max_s_N
    value = a * (z * inverse).exp() - labels.count_N * (1 - form.weight)
    if c is not None:
        value += c * z.exp()
    if teacher_NV is not None:
        assert rows.max_t_N is not None and rows.b_N is not None
        z = teacher_NV.gather(1, labels.column_N1)[:, 0].to(a.dtype) - rows.max_t_N
        value -= rows.b_N * (z * inverse).exp()
    form.kernels.gradient(student_NV, teacher_NV, rows.max_s_N, rows.max_t_N, inverse, a, rows.b_N, c)
    if rows.entries is not None:
        place, entry = rows.entries
        student_NV.view(-1).index_add_(0, place, entry.to(student_NV.dtype))
    if form.weight < 1:
        # Where nothing is to be subtracted, what is there is written again.
        there_N1 = student_NV.gather(1, labels.column_N1)
        value_N1 = torch.where(rows.apart_N, value, 0.0)[:, None].to(student_NV.dtype)
        student_NV.scatter_(1, labels.column_N1, torch.where(rows.apart_N[:, None], value_N1, there_N1))


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        counts_N: Tensor,
        target: DenseTarget | SparseTarget,
        form: _Form,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, tokens, own_VD = _wide(hidden_ND), len(hidden_ND), weight_VD[: form.width]
        labels_N, counts_N = labels_N - form.first, counts_N.to(wide)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if of_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if of_weight else None
        figures_FN = hidden_ND.new_empty(len(FIGURES), tokens, dtype=wide)
        models = 2 if isinstance(target, DenseTarget) else 1
        for rows in slices(tokens, max(1, _CHUNK // (models * form.width * hidden_ND.element_size()))):
            student = teacher = None  # the last chunk's go before the next come
            student = hidden_ND[rows] @ own_VD.t()
            mine, column = label_columns(labels_N[rows], form.width)
            logit = torch.where(mine, student.gather(1, column[:, None])[:, 0].to(wide), 0.0)
            labels = _Labels(labels_N[rows], mine, column[:, None], logit, counts_N[rows])
            if isinstance(target, DenseTarget):
                teacher = target.logits(rows)
                found = _dense(form, student, teacher, labels)
            else:
                found = _sparse(form, student, target, rows, labels)
            figures_FN[:, rows] = found.figures_FN
            if of_hidden or of_weight:
                _to_gradient(form, student, teacher, labels, found)
            if grad_ND is not None:
                grad_ND[rows] = student @ own_VD
            if grad_VD is not None:
                add_product(grad_VD[: form.width], student, hidden_ND[rows])
        loss_N = (1 - form.weight) * figures_FN[1] + form.weight * form.temperature**2 * figures_FN[0]
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.weight = weight_VD
        ctx.mark_non_differentiable(loss_N, figures_FN)
        return (counts_N * loss_N).sum(), loss_N, figures_FN

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_ND, grad_VD = ctx.saved_tensors
        main_VD = main_gradient(ctx.weight)
        if grad_VD is not None and main_VD is not None:
            main_VD.addcmul_(grad_VD, grad)
            say_added(ctx.weight)
            grad_VD = None
        of_weight = None if grad_VD is None else (grad_VD * grad).to(ctx.weight.dtype)
        return None if grad_ND is None else grad_ND * grad, of_weight, *[None] * 4
