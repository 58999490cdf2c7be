"""What the plan says a rank holds is what a rank of a real launch holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1 import backend, config_io
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import Config
from megatron_r1.launch.memory import rank_memory
from megatron_r1.launch.plan import Launch, plan_checkpoints, plan_launch
from megatron_r1.launch.text import text
from megatron_r1.launch.warnings import warnings
from megatron_r1.parallel import process_groups
from megatron_r1.records import Batch, TrainState
from megatron_r1.train.step import Shape, build_training, train_step
from tests.distributed import on_ranks

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = [
    (2, "bf16", ("train.recompute=selective",)),
    (2, "fp32", ("parallel={tensor: 2, sequence: true}",)),
    (4, "bf16", ("parallel={tensor: 2, pipeline: 2}",)),
    (4, "fp32", ("parallel={context: 2}", "train.head_chunk=64")),
]


def config(precision: str, *more: str) -> Config:
    return config_io.load(
        [
            str(ROOT / "examples/models/tiny.yaml"),
            "model={num_attention_heads: 4, num_query_groups: 2, vocab_size: 1000}",
            f"train={{run: none, global_batch: 16, micro_batch: 2, precision: {precision}}}",
            "data={seq_length: 128, sources: {a: {prefix: none}}}",
            "phases.one={steps: 1}",
            *more,
        ]
    )


@pytest.mark.parametrize("ranks, precision, layout", LAYOUTS)
def test_plan_is_what_real_ranks_hold(ranks: int, precision: str, layout: tuple[str, ...]) -> None:
    asked = config(precision, *layout)
    measured = on_ranks(ranks, _held, asked)
    for rank in (0, ranks - 1):
        held, plan = measured[rank], rank_memory(asked, ranks, rank, kernels=False)
        assert (plan.parameters, plan.gradients, plan.optimizer) == held[:3], rank
        assert plan.activations == pytest.approx(held[3], rel=0.05), rank


# GiB at the most, measured on one H100 with the loss and SwiGLU as kernels, 950M in bf16.
MEASURED = {8: 41.7, 16: 67.3}


@pytest.mark.parametrize("micro_batch", MEASURED)
def test_plan_is_what_a_gpu_held(micro_batch: int) -> None:
    asked = config_io.load(
        [
            str(ROOT / "examples/models/950m.yaml"),
            f"train={{run: none, global_batch: {micro_batch}, micro_batch: {micro_batch}}}",
            "data={seq_length: 2048, sources: {a: {prefix: none}}}",
            "phases.one={steps: 1}",
        ]
    )
    assert rank_memory(asked, 1).total / 2**30 == pytest.approx(MEASURED[micro_batch], rel=0.02)


def test_rank_of_168_of_the_950m_is_planned_from_the_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU: kernels run on real tensors alone."""
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    names = ("models/950m.yaml", "pretrain/phase1.yaml", "pretrain/phase2.yaml")
    asked = config_io.load([str(ROOT / "examples" / name) for name in names])
    plan = rank_memory(asked, 168, rank=167)
    numel = 949_685_760
    assert (plan.numel, plan.context.data_rank) == (numel, 167)
    assert 0 <= plan.parameters - 2 * numel < 2e6 and plan.gradients == 2 * plan.parameters
    # Main parameters and two moments, fp32, of a 168th.
    assert plan.optimizer == 12 * plan.optimizer_numel
    assert plan.optimizer_numel == pytest.approx(numel / 168, rel=0.01)
    assert plan.logits == 12 * 2048 * 128_256 * 2


def test_a_teacher_lies_on_each_rank_beside_the_fullest_step() -> None:
    asked = config(
        "bf16", "data.sources.a.tokens=100000", "phases.two={steps: 1, objective: {name: kd, teacher: none}}"
    )
    plan = plan_launch(asked, Launch(1), teachers={"two": (8_000_000_000, 1.6e10)})
    (held,) = plan.memory
    # The gradient of 2 x 128 hidden states; the chunks; in place of logits.
    distilled = 16e9 + 2 * 256 * asked.model.hidden_size + 2**30
    assert plan.total(held) == held.total - 256 * 1000 * 2 + distilled
    printed = text(plan)
    assert "8,000,000,000 x 2 B, whole on each rank" in printed
    assert f"{plan.total(held) / 2**30:.3f} GiB  of 80; the teacher's activations, workspace" in printed
    cached = plan_launch(
        config(
            "bf16",
            "data={cross_documents: false, eod: 0, sources: {a: {tokens: 100000}}}",
            "phases.one.objective={name: kd, cache: none}",
        ),
        Launch(1),
    )
    assert cached.total(cached.memory[0]) == plan.total(held) - 16e9
    small = Launch(1, gpu_memory=16e9)
    tight = "\n".join(warnings(plan_launch(asked, small, teachers={"two": (8_000_000_000, 1.6e10)})))
    assert "rank 0 holds at least" in tight and "or write a cache of the teacher" in tight


def _held(asked: Config) -> tuple[int, int, int, int]:
    """After a real step, bytes: buffers, gradients, optimizer's own tensors, most kept at once."""
    with process_groups(asked.parallel) as context:
        training = build_training(asked)
        shape = Shape(asked.train.micro_batch, asked.data.seq_length, 1)
        passes = asked.train.global_batch // (asked.train.micro_batch * context.data_size)
        kept = _KeptByAutograd([p for chunk in training.chunks for p in chunk.parameters()])
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            train_step(training, _batches(asked, context.context_size), passes, shape)
        buffers = [buffer for chunk in training.chunks for buffer in chunk.buffers]
        adam = [part.optimizer for part in training.optimizer.chained_optimizers]
        states = [s for inner in adam for state in inner.state.values() for s in state.values()]
        main = [p for inner in adam for group in inner.param_groups for p in group["params"]]
        return (
            sum(b.param_data.nbytes for b in buffers),
            sum(b.grad_data.nbytes for b in buffers),
            sum(t.nbytes for t in (states if asked.train.precision == "fp32" else states + main)),
            kept.most,
        )


def _batches(asked: Config, context_size: int) -> Iterator[Batch]:
    shape = (asked.train.micro_batch, asked.data.seq_length // context_size)
    generator = torch.Generator().manual_seed(1)
    while True:
        one, other = (torch.randint(0, 1000, shape, generator=generator) for _ in range(2))
        position = torch.arange(shape[1]).expand(shape).contiguous()
        yield Batch(one, other, torch.ones(shape), position, torch.zeros(shape[0], dtype=torch.long))


class _KeptByAutograd:
    """The most bytes at once of the storages, by address, that autograd holds; weights left out."""

    def __init__(self, weights: list[Any]):
        self.weights = {w.untyped_storage().data_ptr() for w in weights}
        self.held: list[int] = []
        self.bytes: dict[int, int] = {}
        self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        address = tensor.untyped_storage().data_ptr()
        if address in self.weights:
            return tensor
        box = _Box(tensor.detach())
        weakref.finalize(box, self.held.remove, address)
        self.held.append(address)
        self.bytes[address] = tensor.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.bytes[held] for held in set(self.held)))
        return box

    def unpack(self, box: Any) -> torch.Tensor:
        return box.tensor if isinstance(box, _Box) else box


class _Box:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def test_checkpoint_has_the_size_that_the_plan_says(tmp_path: Path) -> None:
    asked = config("bf16")
    on_ranks(2, _save, asked, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.distcp"))
    # Names and the archives' tables come on top of the elements.
    assert size == pytest.approx(plan_checkpoints(asked).size, rel=0.05)


def _save(asked: Config, directory: Path) -> None:
    with process_groups(asked.parallel) as context:
        training = build_training(asked)
        shape = Shape(asked.train.micro_batch, asked.data.seq_length, 1)
        train_step(training, _batches(asked, context.context_size), 1, shape)
        save_checkpoint(directory, training.gpt, training.optimizer, TrainState(), asked.model, "one", "")
