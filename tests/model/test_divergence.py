"""Projection and divergence from a teacher as one operation, against whole logits in float64."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_r1.config import ParallelConfig
from megatron_r1.model import divergence
from megatron_r1.model.divergence import DenseTarget, SparseTarget, Target, linear_divergence
from megatron_r1.parallel import cut_to_rank, process_groups
from tests.distributed import on_ranks
from tests.influence import tiny

# isort: split
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

N, D, V, PADDED, K = 37, 16, 250, 256, 9
UPSTREAM = 0.37
NAMES = ("loss", "figures", "gradient of the hidden states", "gradient of the weight")
KINDS = ("dense", "head", "sampled", "top", "tail")


@dataclasses.dataclass
class Case:
    """Float64; padded rows are large, so that a leak shows."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    counts: Tensor
    target: Target
    temperature: float
    share: float

    def to(self, dtype: torch.dtype) -> Case:
        """Inputs of the type; numbers of records are kept at least in float32."""
        wide = torch.promote_types(dtype, torch.float32)
        records = isinstance(self.target, SparseTarget)
        fields: dict[str, Any] = {
            name: value.to(wide if records else dtype)
            for name, value in vars(self.target).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        target = dataclasses.replace(self.target, **fields)
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        return dataclasses.replace(self, hidden=hidden, weight=weight, target=target)

    def result(self, **others: Any) -> tuple[Tensor, Tensor, Tensor]:
        terms = {"tokens": V, "temperature": self.temperature, "weight": self.share, **others}
        return linear_divergence(self.hidden, self.weight, self.labels, self.counts, self.target, **terms)

    def ours(self, **others: Any) -> tuple[Tensor, ...]:
        """NAMES, the gradients of UPSTREAM times the sum that counts."""
        total, loss, figures = self.result(**others)
        assert not loss.requires_grad and not figures.requires_grad
        torch.testing.assert_close(total, (loss * self.counts).sum().to(total.dtype))
        return loss, figures, *torch.autograd.grad(total, (self.hidden, self.weight), UPSTREAM * total**0)

    def plain(self, upstream: float = UPSTREAM, tokens: int = V) -> tuple[Tensor, ...]:
        """The same by whole logits, softmax and autograd, in the type of the inputs."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        z = (self.hidden @ self.weight.t())[:, :tokens].to(wide)
        ce = F.cross_entropy(z, self.labels, reduction="none")
        log_q = (z / self.temperature).log_softmax(1)
        if isinstance(self.target, DenseTarget):
            log_p = (whole(self.target).to(wide) / self.temperature).log_softmax(1)
            kl, entropy = (log_p.exp() * (log_p - log_q)).sum(1), -(log_p.exp() * log_p).sum(1)
            top = log_p.argmax(1)
        else:
            kl, entropy, top = of_records(self.target, log_q), self.target.entropy_N, likeliest(self.target)
        loss = (1 - self.share) * ce + self.share * self.temperature**2 * kl
        figures = torch.stack([kl, ce, entropy.to(wide), (top == z.argmax(1)).to(wide)]).detach()
        of = torch.autograd.grad((loss * self.counts).sum() * upstream, (self.hidden, self.weight))
        return loss.detach(), figures, *of


def whole(target: DenseTarget) -> Tensor:
    z = target.hidden_ND @ target.weight_VD.t()
    if target.bias_V is not None:
        z = z + target.bias_V
    if target.softcap is not None:
        z = target.softcap * torch.tanh(z / target.softcap)
    return z * target.scale


def of_records(records: SparseTarget, log_q: Tensor) -> Tensor:
    """Row by row, entry by entry; with a tail as a divergence of K + 1 outcomes."""
    rows = []
    for ids, shares, entropy, log_q_V in zip(
        records.ids_NK, records.share_NK.to(log_q), records.entropy_N.to(log_q), log_q, strict=True
    ):
        used = shares > 0
        ids, shares = ids[used].long(), shares[used]
        if not records.tail:
            rows.append(-(shares * log_q_V[ids]).sum() - entropy)
            continue
        others = torch.ones(len(log_q_V), dtype=torch.bool)
        others[ids] = False
        p = torch.cat([shares, (1 - shares.sum())[None]])
        log_outcomes = torch.cat([log_q_V[ids], log_q_V[others].logsumexp(0)[None]])
        rows.append((p * (p.log() - log_outcomes)).sum())
    return torch.stack(rows)


def likeliest(records: SparseTarget) -> Tensor:
    return records.ids_NK.long().gather(1, records.share_NK.argmax(1, keepdim=True))[:, 0]


def record(p_NV: Tensor, kind: str, entries: int = K) -> SparseTarget:
    """Of the exact distributions: draws, with rows of fewer entries than others, or the largest."""
    entropy = -torch.xlogy(p_NV, p_NV).sum(1)
    if kind == "sampled":
        counts = torch.zeros_like(p_NV)
        draws = torch.multinomial(p_NV, entries, replacement=True)
        counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=p_NV.dtype))
        share, ids = (counts / entries).topk(entries, 1)
    else:
        share, ids = p_NV.topk(entries, 1)
    # Where no entry is, any id may stand; also one that is in the row, or the label.
    ids = torch.where(share > 0, ids, ids[:, :1])
    return SparseTarget(ids.int(), share, entropy, kind == "tail")


def case(kind: str = "dense", temperature: float = 1.0, share: float = 1.0, scale: float = 1.0) -> Case:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).double() * scale / 2, torch.randn(PADDED, D).double()
    weight[V:] *= 100
    # A teacher like the student: in some rows both hold the same token for the likeliest.
    near, rest = (hidden + torch.randn(N, D) / 8, weight[:V]), (torch.randn(N, 3) / 2, torch.randn(V, 3))
    of_teacher = [torch.cat([x, y.double()], 1) for x, y in zip(near, rest, strict=True)]
    dense = DenseTarget(of_teacher[0], of_teacher[1])
    if kind == "head":
        dense = dataclasses.replace(dense, bias_V=torch.randn(V).double(), softcap=5.0, scale=0.7)
    p_NV = (whole(dense) / temperature).softmax(1)
    labels = torch.multinomial(p_NV, 1)[:, 0]
    counts = torch.rand(N) * (torch.rand(N) > 0.3)
    target = dense if kind in ("dense", "head") else record(p_NV, kind)
    agree = likeliest(record(p_NV, "top")) == (hidden @ weight[:V].t()).argmax(1)
    assert 0.2 < agree.double().mean() < 0.8
    return Case(hidden.requires_grad_(), weight.requires_grad_(), labels, counts, target, temperature, share)


def in_chunks(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Of at most `rows` rows of float64 logits, and blocks of 3."""
    patch.setattr(divergence, "_CHUNK", rows * V * 8)
    patch.setattr(divergence, "_BLOCK", {"cpu": 3 * V})


def assert_within(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], loss: float, gradient: float) -> None:
    for name, a, b, bound in zip(NAMES, ours, exact, (loss, loss, gradient, gradient), strict=True):
        size = b.abs().max()
        error = (a.double() - b.double()).abs().max()
        assert error <= bound * (size if "gradient" in name else size.clamp(min=1)), (name, float(error))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_it_is_the_plain_loss(
    kind: str, temperature: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact_case = case(kind, temperature, share)
    exact = exact_case.plain()
    assert_within(exact_case.ours(), exact, 1e-12, 1e-12)
    in_chunks(monkeypatch, 8)
    assert_within(exact_case.ours(), exact, 1e-12, 1e-12)
    rounded = exact_case.to(torch.float32)
    exact = rounded.to(torch.float64).plain()
    for kernels in (None, divergence):
        ours = rounded.ours(kernels=kernels)
        # Of a label the divergence's rounding counts T^2 times, of their mean it does not.
        assert_within(ours, exact, 1e-6 * temperature**2, 1e-5)
        mean, exact_mean = ((x[0] * rounded.counts).sum() / rounded.counts.sum() for x in (ours, exact))
        assert (mean - exact_mean).abs() <= 1e-6 * exact_mean.abs().clamp(min=1)
    # Padded rows get no gradient; rows that do not count give none.
    of_hidden, of_weight = exact_case.ours()[2:]
    assert not of_weight[V:].any() and not of_hidden[exact_case.counts == 0].any()


@pytest.mark.parametrize("kernels", [None, divergence], ids=["default", "plain"])
@pytest.mark.parametrize("kind", ["dense", "head", "sampled", "tail"])
@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (2.0, 0.5)])
def test_bf16_is_no_worse_than_plain_bf16(
    kernels: Any, kind: str, temperature: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, 8)
    inputs = case(kind, temperature, share).to(torch.bfloat16)
    plain, exact = inputs.plain(1.0), inputs.to(torch.float64).plain(1.0)
    # As in training: into a buffer, and the upstream gradient is 1.
    buffer = inputs.weight.main_grad = torch.zeros(PADDED, D)  # type: ignore[attr-defined]
    inputs.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    total, loss, _ = inputs.result(kernels=kernels)
    total.backward()
    assert inputs.hidden.grad is not None
    for ours, torch_s, true in zip(
        (loss, inputs.hidden.grad, buffer), (plain[0], *plain[2:]), (exact[0], *exact[2:]), strict=True
    ):
        assert (ours - true).norm() <= 1.1 * (torch_s - true).norm()


def test_records_of_all_tokens_are_the_teacher() -> None:
    for temperature in (1.0, 2.0):
        dense = case("dense", temperature, 0.5)
        p_NV = (whole(dense.target) / temperature).softmax(1)  # type: ignore[arg-type]
        for kind in ("top", "tail"):
            records = dataclasses.replace(dense, target=record(p_NV, kind, V))
            assert_within(records.ours(), dense.ours(), 1e-12, 1e-12)
            as_fp32 = records.to(torch.float32)
            assert_within(as_fp32.ours(), dense.ours(), 1e-5, 1e-5)


def test_a_tail_s_gradient_is_the_slope() -> None:
    """Of the loss along random directions, by central differences."""
    for temperature, share in ((1.0, 1.0), (2.0, 0.5)):
        inputs = case("tail", temperature, share)
        inputs.counts = inputs.counts.double()
        of_hidden, of_weight = inputs.ours()[2:]
        for seed in range(4):
            torch.manual_seed(seed)
            along = torch.randn_like(of_hidden), torch.randn_like(of_weight)
            ends = []
            for step in (1e-5, -1e-5):
                hidden, weight = inputs.hidden + step * along[0], inputs.weight + step * along[1]
                moved = dataclasses.replace(inputs, hidden=hidden, weight=weight)
                ends.append((moved.ours()[0] * inputs.counts).sum().item())
            slope = UPSTREAM * (ends[0] - ends[1]) / 2e-5
            ours = ((of_hidden * along[0]).sum() + (of_weight * along[1]).sum()).item()
            assert ours == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("gap", [15.0, 40.0, 120.0])
def test_a_tail_that_the_student_excludes_is_exact(gap: float) -> None:
    """q_tail is e^-gap: 1 - sum q would be 0, its logarithm infinite. The last is beyond float32."""
    weight = torch.cat([torch.full((2, 1), gap), torch.zeros(V - 2, 1)]).requires_grad_()
    hidden = torch.ones(1, 1).requires_grad_()
    share = torch.tensor([[0.5, 0.25]])
    records = SparseTarget(torch.tensor([[0, 1]]), share, torch.zeros(1), True)
    inputs = Case(hidden, weight, torch.tensor([0]), torch.ones(1), records, 1.0, 1.0)
    exact = inputs.to(torch.float64).plain()
    ours = inputs.ours()
    assert_within(ours, exact, 1e-6 * gap, 1e-5)
    # Of the others' gradient each has its part.
    torch.testing.assert_close(ours[3][2:].double(), exact[3][2:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["dense", "sampled", "tail"])
def test_a_certain_label_leaves_a_small_gradient_exact(kind: str) -> None:
    """Where q is near p or the onehot, their difference must not be that of two rounded numbers."""
    weight = torch.tensor([[9.0], [0.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    dense = DenseTarget(hidden, torch.tensor([[10.0], [0.0], [0.0]], dtype=torch.bfloat16))
    p = whole(dense).double().softmax(1)
    target = dense if kind == "dense" else record(p.float(), kind, 1)
    for share in (1.0, 0.5):
        inputs = Case(hidden, weight, torch.tensor([0]), torch.ones(1), target, 1.0, share).to(torch.bfloat16)
        ours, exact = inputs.ours(tokens=3)[2], inputs.to(torch.float64).plain()[2]
        torch.testing.assert_close(ours.double(), exact, rtol=2**-6, atol=0)


def test_a_gradient_buffer_is_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """By each micro-batch once, and never by a scaled one."""
    in_chunks(monkeypatch, 8)
    inputs = case("dense", 2.0, 0.5).to(torch.float32)
    before, weight = torch.randn(PADDED, D), inputs.weight
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False  # type: ignore[attr-defined]
    of_hidden, of_weight = inputs.to(torch.float64).plain(1.0)[2:]
    for _ in range(2):
        inputs.result()[0].backward()
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    added = weight.main_grad - before  # type: ignore[attr-defined]
    assert (added - 2 * of_weight).abs().max() <= 1e-5 * of_weight.abs().max()
    assert inputs.hidden.grad is not None and not weight.grad.any()  # type: ignore[union-attr]
    assert (inputs.hidden.grad - 2 * of_hidden).abs().max() <= 1e-5 * of_hidden.abs().max()
    with pytest.raises(RuntimeError, match="in its buffer and cannot be scaled"):
        (3 * inputs.result()[0]).backward()
    added = weight.main_grad.clone()  # type: ignore[attr-defined]
    with torch.no_grad():
        inputs.result()
    assert torch.equal(weight.main_grad, added)  # type: ignore[attr-defined]


def test_what_needs_no_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case("sampled", 2.0, 0.5)
    expected = inputs.ours()
    frozen = dataclasses.replace(inputs, weight=inputs.weight.detach())
    monkeypatch.setattr(divergence, "add_product", None)
    (of_hidden,) = torch.autograd.grad(frozen.result()[0], inputs.hidden)
    torch.testing.assert_close(of_hidden * UPSTREAM, expected[2])
    with torch.no_grad():
        total, loss, figures = inputs.result()
    assert not total.requires_grad and torch.equal(loss, expected[0]) and torch.equal(figures, expected[1])


@pytest.mark.parametrize("kind", ["dense", "sampled", "tail"])
def test_what_is_no_number_spoils_its_token_alone(kind: str) -> None:
    inputs = case(kind, 1.0, 0.5).to(torch.float32)
    with torch.no_grad():
        inputs.hidden[3, 2] = float("nan")
    inputs.counts += 0.1
    total, loss, _ = inputs.result()
    (of_hidden,) = torch.autograd.grad(total, inputs.hidden)
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    assert of_hidden.isnan().any(1).nonzero().flatten().tolist() == [3]


class _Group:
    """Of `ranks` ranks, none of which is asked."""

    def __init__(self, ranks: int, rank: int):
        self.size, self.rank = lambda: ranks, lambda: rank


def test_vocabularies_that_do_not_fit_are_refused() -> None:
    inputs = case()
    with pytest.raises(ValueError, match=r"teacher has 257 tokens, the student 256: raise model.vocab_size"):
        inputs.ours(tokens=PADDED + 1)
    with pytest.raises(
        ValueError, match=r"rank 1 has none of the 250 tokens: lower parallel.tensor or model"
    ):
        inputs.ours(group=_Group(2, 0))
    with pytest.raises(ValueError, match="rank 0 has 249 tokens of the student and 250 of the teacher"):
        inputs.ours(tokens=V - 1)


def estimates(target: SparseTarget, inputs: Case) -> tuple[Tensor, Tensor]:
    """Each record's KL, and its gradient of the same hidden state, [R] and [R, D]."""
    rows = len(target.ids_NK)
    hidden = inputs.hidden.detach()[:1].expand(rows, -1).clone().requires_grad_()
    labels, counts = inputs.labels[:1].expand(rows), torch.ones(rows)
    total, _, figures = linear_divergence(hidden, inputs.weight.detach(), labels, counts, target, tokens=V)
    return figures[0], torch.autograd.grad(total, hidden)[0]


def inside(sample_R: Tensor, exact: Tensor) -> bool:
    """Whether the exact value is in the sample's t-interval of 1 - 1e-5."""
    interval = stats.t.ppf(1 - 5e-6, len(sample_R) - 1) * sample_R.std() / len(sample_R) ** 0.5
    return bool((sample_R.mean() - exact).abs() <= interval + 1e-12)


def test_sampled_records_are_unbiased_and_the_largest_are_not() -> None:
    inputs = case()
    assert isinstance(inputs.target, DenseTarget)
    p_RV = whole(inputs.target)[:1].softmax(1).expand(20_000, -1)
    of_hidden, kl = inputs.plain()[2][0] / inputs.counts[0] / UPSTREAM, inputs.plain()[1][0, 0]
    assert inputs.counts[0] > 0
    torch.manual_seed(1)
    along_DX = torch.cat([torch.randn(D, 20).double(), of_hidden[:, None]], 1)
    kl_R, gradient_RD = estimates(record(p_RV, "sampled", 50), inputs)
    assert inside(kl_R, kl)
    for along in along_DX.t():
        assert inside(gradient_RD @ along, of_hidden @ along)
    # The intervals are narrow.
    assert (gradient_RD @ of_hidden).std() / 20_000**0.5 * 5 < 0.02 * of_hidden.square().sum()
    largest = record(p_RV[:100], "top", 50)
    renormalised = dataclasses.replace(
        largest, share_NK=largest.share_NK / largest.share_NK.sum(1, keepdim=True)
    )
    for biased in (largest, renormalised):
        kl_R, gradient_RD = estimates(biased, inputs)
        assert not inside(kl_R, kl)
        assert not any(inside(gradient_RD @ along, of_hidden @ along) for along in along_DX.t())


class _Live(TorchDispatchMode):
    """Bytes of tensors that came to be and are alive, at most at a time, and elements of the largest."""

    def __init__(self, *inputs: Tensor):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._known:
                size = x.untyped_storage().nbytes()
                self._known.add(key)
                weakref.finalize(x.untyped_storage(), self._free, key, size)
                self.live += size
                self.peak, self.largest = max(self.peak, self.live), max(self.largest, x.numel())
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak(kind: str, rows: int, vocabulary: int, hidden_size: int) -> int:
    """Bytes of a forward and backward pass beyond its inputs, by shapes alone."""
    with FakeTensorMode():
        hidden, weight, head = (
            torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
            for shape in ((rows, hidden_size), (vocabulary, hidden_size), (vocabulary, 64))
        )
        weight.main_grad = main_grad = torch.empty(vocabulary, hidden_size)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        number, labels, ids = torch.empty(rows), torch.zeros(rows).long(), torch.zeros(rows, 50).int()
        target: Target = SparseTarget(ids, torch.empty(rows, 50), number, True)
        if kind == "dense":
            target = DenseTarget(hidden.detach()[:, :64], head.detach())
        plain: dict[str, Any] = {"tokens": vocabulary, "kernels": divergence}
        with _Live(hidden, weight, head, main_grad, number, labels, ids) as live:
            Case(hidden, weight, labels, number, target, 2.0, 0.5).result(**plain)[0].backward()
    return live.peak


def test_memory_is_bounded_whatever_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 16,384 tokens and a vocabulary of 128k would be 4 GB a model in bf16."""
    monkeypatch.setattr(divergence, "_BLOCK", {})  # the widest blocks
    sizes = 1 << 17, 2048
    one, two = peak("dense", 1024, *sizes), peak("dense", 2048, *sizes)
    # A chunk more grows it by what is kept of each row: the gradient of the hidden state, and numbers.
    assert 0 < two - one <= 1024 * (2 * 2048 + 100)
    assert two + 14 * (two - one) <= 1e9
    # The gradient of this head would be 8.6 GB.
    assert peak("dense", 2048, 1 << 18, 8192) <= 1e9
    assert peak("tail", 2048, *sizes) <= 1e9 and peak("tail", 1 << 20, 256, 16) <= 1e9


def shards(kind: str, context: Any) -> tuple[Tensor, ...]:
    """NAMES of this rank's shard, the gradient of the hidden states summed over the ranks."""
    inputs, group = case(kind, 2.0, 0.5), ps.get_tensor_model_parallel_group()
    half = PADDED // 2
    mine = slice(context.tensor_rank * half, (context.tensor_rank + 1) * half)
    if isinstance(inputs.target, DenseTarget):
        bias = None if inputs.target.bias_V is None else inputs.target.bias_V[mine]
        target = dataclasses.replace(inputs.target, weight_VD=inputs.target.weight_VD[mine], bias_V=bias)
        inputs = dataclasses.replace(inputs, target=target)
    inputs.weight = inputs.weight.detach()[mine].requires_grad_()
    *others, of_hidden, of_weight = inputs.ours(group=group)
    torch.distributed.all_reduce(of_hidden, group=group)
    return *others, of_hidden, of_weight


TOKENS = 123
"""Of the 128 rows of the tiny model's embedding."""


def through_the_model(context: Any, parallel: ParallelConfig, records: bool) -> dict[str, Tensor]:
    """Losses and figures of this rank's tokens, and gradients of embedding and norms, of the whole batch."""
    gpt = tiny.build(parallel)
    batch = tiny_batch()
    half = tiny.MODEL.vocab_size // context.tensor_size
    mine = slice(context.tensor_rank * half, min((context.tensor_rank + 1) * half, TOKENS))
    head, batch = batch.pop("head"), cut_to_rank(batch)
    with gpt.distilling(tiny_target(batch, head, mine, records), batch["counts"], TOKENS, 2.0, 0.5):
        total, loss, figures = gpt(batch["tokens"], batch["position"], None, labels=batch["labels"])
    total.backward()
    out = {"loss": loss, "figures": figures}
    for name, p in gpt.named_parameters():
        if "embedding" in name or "norm" in name:
            of_rows = "context" if context.context_size > 1 else "tensor" if parallel.sequence else None
            if of_rows == "context" or (of_rows == "tensor" and "norm" in name):
                torch.distributed.all_reduce(p.grad)
            out[name] = p.grad
    return out


def tiny_batch() -> dict[str, Tensor]:
    torch.manual_seed(5)
    window = torch.from_numpy(tiny.windows(3)) % TOKENS
    return {
        "tokens": window[:, :-1],
        "labels": window[:, 1:].contiguous(),
        "position": torch.arange(tiny.SEQ).expand(3, -1),
        "counts": (torch.rand(3, tiny.SEQ) > 0.2).float(),
        "teacher": torch.randn(3, tiny.SEQ, 8),
        "head": torch.randn(TOKENS, 8),
    }


def tiny_target(batch: dict[str, Tensor], head: Tensor, mine: slice, records: bool) -> Target:
    hidden = batch["teacher"].transpose(0, 1).flatten(0, 1)
    if records:
        return record((hidden @ head.t() / 2).softmax(1), "tail")
    return DenseTarget(hidden, head[mine])


def on_two_ranks() -> list[Any]:
    """A rank's body: `shards` of each kind, then what comes through the model in each layout."""
    found: list[Any] = []
    with process_groups(ParallelConfig(tensor=2)) as context:
        found.append([shards(kind, context) for kind in KINDS])
        for records in (False, True):
            found.append(through_the_model(context, ParallelConfig(tensor=2), records))
        sequence = ParallelConfig(tensor=2, sequence=True)
        found.append(through_the_model(context, sequence, False))
        # The same ranks in another layout: a second start would take seconds.
        ps.destroy_model_parallel()
        ps.initialize_model_parallel(context_parallel_size=2)
        context = dataclasses.replace(context, tensor_rank=0, tensor_size=1, context_size=2)
        for records in (False, True):
            found.append(through_the_model(context, ParallelConfig(context=2), records))
    return found


def whole_model(records: bool) -> dict[str, Tensor]:
    """What `through_the_model` finds, by whole logits and autograd."""
    batch = tiny_batch()
    target = tiny_target(batch, batch.pop("head"), slice(None, TOKENS), records)
    labels, counts = (batch[name].t().flatten() for name in ("labels", "counts"))
    with process_groups(ParallelConfig()):
        gpt = tiny.build()
        z = gpt(batch["tokens"], batch["position"], None).transpose(0, 1).flatten(0, 1)
        # As a projection of the logits, whose weight is the unit matrix.
        inputs = Case(z.detach(), torch.eye(tiny.MODEL.vocab_size), labels, counts, target, 2.0, 0.5)
        loss, figures, of_z, _ = inputs.to(torch.float64).plain(tokens=TOKENS, upstream=1.0)
        z.backward(of_z.float())
    out = {name: p.grad for name, p in gpt.named_parameters() if "embedding" in name or "norm" in name}
    shape = tiny.SEQ, 3
    return {"loss": loss.view(shape).t(), "figures": figures.view(4, *shape).transpose(1, 2), **out}


def test_divided_vocabularies_and_sequences_agree() -> None:
    ranks = on_ranks(2, on_two_ranks)
    for kind, *results in zip(KINDS, *(rank[0] for rank in ranks), strict=True):
        exact = case(kind, 2.0, 0.5).plain()
        loss, figures, of_hidden, _ = results[0]
        of_weight = torch.cat([result[3] for result in results])
        assert_within((loss, figures, of_hidden, of_weight), exact, 1e-12, 1e-12)
        assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    models = {records: whole_model(records) for records in (False, True)}
    for number, records in ((1, False), (2, True), (3, False), (4, False), (5, True)):
        layout = "tensor" if number < 4 else "context"
        for name, expected in models[records].items():
            first, second = (rank[number][name] for rank in ranks)
            ours = first
            if layout == "tensor" and "embedding" in name:
                ours = torch.cat([first, second])
            elif layout == "context" and name in ("loss", "figures"):
                # Each has the first and the last of its quarters.
                (a, d), (b, c) = first.chunk(2, -1), second.chunk(2, -1)
                ours = torch.cat([a, b, c, d], -1)
            assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), (layout, records, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrappers_hand_on_what_comes_of_it(precision: str) -> None:
    """Float16Module and DistributedDataParallel, whose buffers get the gradients."""
    exact = whole_model(False)
    with process_groups(ParallelConfig()):
        gpt = tiny.build(precision=precision)
        core = get_model_config(gpt)
        model = Float16Module(core, gpt) if precision == "bf16" else gpt
        model = DistributedDataParallel(core, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        model.zero_grad_buffer()
        batch = tiny_batch()
        target = tiny_target(batch, batch.pop("head"), slice(None, TOKENS), False)
        if precision == "bf16":
            assert isinstance(target, DenseTarget)
            target = DenseTarget(target.hidden_ND.bfloat16(), target.weight_VD.bfloat16())
        with gpt.distilling(target, batch["counts"], TOKENS, 2.0, 0.5):
            total, loss, figures = model(batch["tokens"], batch["position"], None, labels=batch["labels"])
        total.backward()
        plain = model(batch["tokens"], batch["position"], None, labels=batch["labels"])
    bound = 1e-5 if precision == "fp32" else 0.05
    assert total.dtype == loss.dtype == figures.dtype == torch.float32
    found = {name: p.main_grad for name, p in gpt.named_parameters()} | {"loss": loss, "figures": figures[:3]}
    exact["figures"] = exact["figures"][:3]
    for name, expected in exact.items():
        assert (found[name] - expected).norm() <= bound * expected.norm(), name
    # Outside of it the model has its own loss again, with the padded rows in the softmax.
    assert (
        isinstance(plain, Tensor)
        and plain.shape == loss.shape
        and (plain.detach() > exact["figures"][1]).all()
    )
