"""Layers with kernels for a GPU compute what megatron-core's compute; a kernel that does not is left out."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.config import Config, DataConfig, ModelConfig, ParallelConfig, RopeScaling, TrainConfig
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from megatron_r1.records import Batch
from megatron_r1.train.optimizer import set_schedule
from megatron_r1.train.step import Shape, build_training, train_step
from tests.distributed import on_ranks
from tests.interpreter import needs_triton

pytestmark = needs_triton

MODEL = ModelConfig(2, 48, 72, 6, 2, 300, head_dim=16)
SCALED = dataclasses.replace(
    MODEL, qk_norm=False, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16), num_query_groups=6
)


def fused() -> Any:
    return importlib.import_module("megatron_r1.model.fused")


def loss_and_gradients(
    kernels: bool,
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
    recompute: str,
    chunk: int | None,
) -> dict[str, Tensor]:
    """A rank's body: label losses and the gradient of each parameter of the model from seed 1."""
    backend.has_triton = lambda: kernels
    with process_groups(parallel) as context:
        backend.seed_model_parallel(1)
        gpt: Any = build_model(model, parallel, precision, 24, recompute=recompute)
        gpt.head_chunk = chunk
        kinds = {type(m).__name__ for m in gpt.modules()}
        assert ({"FusedMlp", "FusedSelfAttention"} <= kinds) == kernels and (
            gpt.loss_kernels is not None
        ) == kernels
        generator = torch.Generator().manual_seed(2)
        token_BS = torch.randint(model.vocab_size, (2, 25), generator=generator)
        position_S = torch.arange(24)
        if parallel.context > 1:
            position_S = torch.cat([position_S.chunk(4)[i] for i in (context.rank, 3 - context.rank)])
        token, label = token_BS[:, position_S], token_BS[:, position_S + 1]
        called = {}
        for name in ("rotate", "swiglu", "row_statistics") if kernels else ():
            called[name] = mock.Mock(wraps=getattr(fused().triton_kernels, name))
            setattr(fused().triton_kernels, name, called[name])
        loss_BS = gpt(token, position_S.expand(2, -1), None, labels=label)
        assert all(one.called for one in called.values()), called
        loss_BS.sum().backward()
        found = {name: p.grad for name, p in gpt.named_parameters()}
    return {"loss": loss_BS.detach(), **found}


def check(most: float, ranks: int, *how: Any) -> None:
    plain, ours = (on_ranks(ranks, loss_and_gradients, kernels, *how) for kernels in (False, True))
    for of_rank, expected in zip(ours, plain, strict=True):
        assert of_rank.keys() == expected.keys()
        for name, value in of_rank.items():
            assert (value - expected[name]).norm() <= most * expected[name].norm(), name


@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        (1, (MODEL, ParallelConfig(), "fp32", "none", None)),
        (1, (SCALED, ParallelConfig(), "fp32", "full", 8)),
        (1, (MODEL, ParallelConfig(), "fp32", "selective", None)),
        (2, (MODEL, ParallelConfig(tensor=2, sequence=True), "fp32", "none", None)),
        (2, (MODEL, ParallelConfig(context=2), "fp32", "none", None)),
    ],
    ids=["whole", "scaled-recomputed", "selective", "tensor-sequence", "context"],
)
def test_the_model_computes_what_megatron_core_s_layers_do(ranks: int, how: tuple[Any, ...]) -> None:
    check(1e-5, ranks, *how)


SHAPES = {
    "preset": (300, 72, 6, 4, 64, 1e-5, 2048),
    "uneven": (301, 1100, 3, 2, 10, 1e-5, 100),
    "no-norm": (8, 7, 1, 1, 6, None, 32768),
    "many-heads": (8, 8, 20, 3, 128, 1e-5, 64),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernels_compute_what_plain_torch_does(dtype: torch.dtype, shape: str) -> None:
    """In float64. The interpreter rounds bf16 towards zero, which doubles the error of the plain form."""
    for name, (kernel, plain, *inputs) in fused()._cases((dtype, *SHAPES[shape])).items():
        most = 1e-6 if dtype == torch.float32 else 2.2 * fused()._error(name, plain, plain, *inputs)
        assert 0 < fused()._error(name, kernel, plain, *inputs) <= most, name


def test_gradients_may_lie_in_any_order() -> None:
    """Attention's backward pass returns what suits it: [B, heads, S, D], or a view of a larger tensor."""
    _, _, mixed_SBGHD = fused()._cases((torch.float32, 8, 8, 2, 3, 16, 1e-5, 64))["rotation"]
    turn_SD = fused()._turn(torch.rand(8, 16).mul(5)[:, :8].repeat(1, 2))
    mixed_SBGHD.requires_grad_()
    outs = fused()._Rotation.apply(mixed_SBGHD, turn_SD, 1e-5)
    upstream = [torch.randn(o.shape) for o in outs]
    other = [g.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for g in upstream[:2]]
    other.append(torch.stack((upstream[2], upstream[2]), -1)[..., 0])
    expected = torch.autograd.grad(outs, mixed_SBGHD, upstream, retain_graph=True)
    assert torch.equal(torch.autograd.grad(outs, mixed_SBGHD, other)[0], expected[0])


SMALL = (torch.float32, 300, 72, 2, 3, 16, 1e-5, 64)


def test_a_kernel_that_computes_something_else_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fused().triton_kernels.swiglu
    monkeypatch.setattr(fused().triton_kernels, "swiglu", lambda *words: real(*words) * (1 + 1e-4))
    assert fused()._passed.__wrapped__(SMALL) == {"divergence", "loss", "rotation"}
    said = capsys.readouterr().err
    assert "Triton kernels: divergence, loss, rotation | checked in" in said
    assert "Triton kernel SwiGLU is left out: relative error 1.0e-04, at most 1e-05" in said


def test_a_model_built_where_gradients_are_off_has_the_kernels() -> None:
    with torch.no_grad():
        assert fused()._passed.__wrapped__(SMALL) == {"divergence", "loss", "SwiGLU", "rotation"}


def test_a_kernel_that_does_not_compile_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("PTXAS error")

    monkeypatch.setattr(fused().triton_kernels, "swiglu", fails)
    assert fused()._passed.__wrapped__(SMALL) == {"divergence", "loss", "rotation"}
    assert "Triton kernel SwiGLU does not run: RuntimeError: PTXAS error" in capsys.readouterr().err


def left_out_by_one() -> list[str]:
    """A rank's body: the last rank's SwiGLU gives no numbers."""
    with process_groups(ParallelConfig(tensor=2)) as context:
        if context.rank == 1:
            fused().triton_kernels.swiglu = lambda x, grad=None: (
                (x[..., :72] if grad is None else x) * float("nan")
            )
        return sorted(fused()._passed(SMALL))


def test_ranks_agree_on_what_is_left_out() -> None:
    assert on_ranks(2, left_out_by_one) == [["divergence", "loss", "rotation"]] * 2


def interleaved(kernels: bool) -> tuple[list[str], list[tuple[float, float]]]:
    """A rank's body: kinds of layers of its two parts, and loss and gradient norm of two steps."""
    backend.has_triton = lambda: kernels
    config = Config(
        model=dataclasses.replace(MODEL, num_layers=4),
        parallel=ParallelConfig(pipeline=2, virtual_pipeline=2),
        data=DataConfig(sources={}, seq_length=24),
        train=TrainConfig(run="none", global_batch=4, micro_batch=2, precision="fp32"),
        phases={},
    )
    with process_groups(config.parallel):
        training = build_training(config)
        token_BS = torch.randint(300, (2, 25), generator=torch.Generator().manual_seed(1))
        one_BS, number_BS = torch.ones(2, 24), torch.arange(24).repeat(2, 1)
        batch = Batch(
            token_BS[:, :-1].contiguous(),
            token_BS[:, 1:].contiguous(),
            one_BS,
            number_BS,
            one_BS[:, 0].long(),
        )
        steps = []
        for _ in range(2):
            set_schedule(training.optimizer, 1e-3, 0.1)
            result = train_step(training, iter([batch] * 2), 2, Shape(2, 24, 2))()
            steps.append((result.loss(), result.grad_norm))
        fused_parts = [
            {type(m).__name__ for m in gpt.modules() if "Fused" in type(m).__name__} for gpt in training.gpt
        ]
        assert all((gpt.loss_kernels is not None) == kernels for gpt in training.gpt)
        return [" ".join(sorted(part)) for part in fused_parts], steps


def test_an_interleaved_pipeline_trains_by_the_kernels() -> None:
    """The ends of the pipeline meet while parts are made, and all ranks in the trial of the kernels."""
    (none, plain), _ = on_ranks(2, interleaved, False)
    both = "FusedMlp FusedSelfAttention"
    assert none == ["", ""]
    for kinds, steps in on_ranks(2, interleaved, True, seconds=120):
        assert kinds == [both, both]
        assert steps == [pytest.approx(step, rel=1e-5) for step in plain]
