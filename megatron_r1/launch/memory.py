"""Memory of one rank of a launch of any size, from the real model, buffers and optimizer.

torch's fake process group plays the other ranks and FakeTensorMode the memory: megatron-core builds what it
would build on that rank, and megatron-core's schedule runs a step, but no element exists and nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1 import backend, parallel
from megatron_r1.backend import cpu_attention
from megatron_r1.config import Config
from megatron_r1.model import attention, loss
from megatron_r1.parallel import ParallelContext
from megatron_r1.records import Batch
from megatron_r1.train.objective import next_token
from megatron_r1.train.step import Shape, Training, build_training, run_schedule

# isort: split
from megatron.core.tensor_parallel import random
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.utils import get_model_config


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank holds. Workspace of single operations, the allocator's gaps and the communication
    library's buffers are not counted."""

    context: ParallelContext
    numel: int
    """Parameters on this rank."""
    parameters: int
    """megatron-core's parameter buffers, padding included."""
    gradients: int
    """Its gradient buffers, fp32."""
    optimizer: int
    """This data-parallel rank's share: Adam's moments and, for bf16, the fp32 main parameters."""
    optimizer_numel: int
    """Parameters in that share."""
    activations: int
    """Most that autograd keeps for backward passes at any moment of a step. Each storage counts once, weights
    do not count, kept logits do."""
    logits: int
    """One micro-batch's logits, or one `head_chunk` of them, on a rank that has the head; else 0."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


def rank_memory(config: Config, world_size: int, rank: int = 0, kernels: bool = True) -> RankMemory:
    """Build rank `rank` of `world_size` and run its step; no memory is taken. Seconds of one core.

    `kernels`: norms, attention and SwiGLU keep what their kernels on a GPU keep, else what a CPU keeps. The
    configuration must fit the launch (config_io.check_world). No process group may exist.
    """
    # The other ranks do not exist. What is received is whatever lay in the buffer.
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    with (
        parallel.model_groups(config.parallel, gloo=False) as context,
        _fake_memory(config.data.seq_length),
        _kernels() if kernels else contextlib.nullcontext(),
    ):
        training = build_training(config)
        return RankMemory(
            context,
            sum(p.numel() for chunk in training.chunks for p in chunk.parameters()),
            *static_bytes(training),
            _saved_in_a_step(config, training, context),
            _logits(config, context),
        )


def static_bytes(training: Training) -> tuple[int, int, int, int]:
    """Bytes of parameter buffers, gradient buffers and optimizer state, and the optimizer's parameters.

    Adam's moments are created where they are not there yet, as its first step would.
    """
    buffers = [b for chunk in training.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    optimizers = getattr(training.optimizer, "chained_optimizers", [training.optimizer])
    owned: list[Tensor] = []
    numel = 0
    for part in optimizers:
        part.init_state_fn(part.optimizer, part.config)
        main = [p for group in part.optimizer.param_groups for p in group["params"]]
        numel += sum(p.numel() for p in main)
        owned += [*main, *(v for p in main for v in part.optimizer.state[p].values() if torch.is_tensor(v))]
    # In fp32 the optimizer's parameters lie in the parameter buffers.
    known = {_storage(b.param_data) for b in buffers if b.param_data is not None}
    return (
        sum(b.param_data.nbytes for b in buffers if b.param_data is not None),
        sum(b.grad_data.nbytes for b in buffers),
        sum(t.nbytes for t in owned if _storage(t) not in known),
        numel,
    )


@contextlib.contextmanager
def _fake_memory(seq_length: int) -> Iterator[None]:
    """Tensors have a shape, a type and a storage's size, but no elements."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # It remembers tensors by weak references, on which Module.bfloat16() fails; a table will do as long
    # as the mode lives.
    mode.fake_tensor_converter.meta_converter.tensor_memo = {}  # type: ignore[assignment]
    # Where attention keeps no probabilities, its blocks decide over workspace alone, and one is quicker.
    block = seq_length if seq_length > cpu_attention._KEEP else cpu_attention._BLOCK
    with (
        mode,
        mock.patch.object(cpu_attention, "_BLOCK", block),
        # At its end it compares states of generators; nothing draws from them here.
        mock.patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
        # Gathered objects are sized by what tensors contain.
        mock.patch.object(dist, "all_gather_object", _own_object_of_all),
        # In place, and on a CPU in many small parts.
        mock.patch.object(loss, "_exponentiate", lambda logits_NV, max_N: torch.empty_like(max_N)),
        # Kernels need elements. They keep less than the plain form, which is counted.
        mock.patch.object(backend, "has_triton", lambda: False),
    ):
        yield


class _Kernel(torch.autograd.Function):
    """One that keeps its operands, and nothing else, for its backward pass."""

    @staticmethod
    def forward(ctx: Any, columns: int, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        return operands[0].new_empty(*operands[0].shape[:-1], columns)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *(torch.empty_like(operand) for operand in ctx.saved_tensors)


@contextlib.contextmanager
def _kernels() -> Iterator[None]:
    """Layers keep what they keep on a GPU. A kernel's sums of rows are left out: 4 B a row."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return _Kernel.apply(x.shape[-1], x, *self.parameters())

    def feed_forward(self: Any, x: Tensor, **_: Any) -> Any:
        gate_up = self.linear_fc1(x)[0]
        return self.linear_fc2(_Kernel.apply(gate_up.shape[-1] // 2, gate_up))

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return _Kernel.apply(value.shape[-1], query, key, value)

    with (
        mock.patch.object(attention.RMSNorm, "forward", norm),
        mock.patch.object(L2Norm, "forward", norm),
        mock.patch.object(MLP, "forward", feed_forward),
        mock.patch.object(attention, "causal_attention", attend),
    ):
        yield


def _own_object_of_all(gathered: list[Any], own: Any, group: Any = None) -> None:
    gathered[:] = [own] * len(gathered)


def _saved_in_a_step(config: Config, training: Training, context: ParallelContext) -> int:
    for chunk in training.chunks:
        # Reductions keep nothing for backward passes.
        get_model_config(chunk).finalize_model_grads_func = _nothing
        get_model_config(chunk).grad_sync_func = None
        for group in chunk.bucket_groups:
            group.start_grad_sync = group.finish_grad_sync = _nothing
    shape = Shape(config.train.micro_batch, config.data.seq_length, sources=1)
    passes = config.train.global_batch // (config.train.micro_batch * context.data_size)
    # A pipeline holds most once it is full; groups of the interleaved one stay whole.
    stages = config.parallel.pipeline * config.parallel.virtual_pipeline
    passes = min(passes, 2 * stages if stages > 1 else 1)
    with saved_tensors(training) as most:
        run_schedule(
            training.chunks, next_token, _batches(config, context), passes, shape, forward_only=False
        )
    return most()


def _nothing(*_: Any, **__: Any) -> None: ...


def _batches(config: Config, context: ParallelContext) -> Iterator[Batch]:
    rows, columns = config.train.micro_batch, config.data.seq_length // context.context_size
    while True:
        tokens_BS = torch.zeros(rows, columns, dtype=torch.long, device=backend.device())
        mask_BS = torch.ones(rows, columns, device=backend.device())
        source_B = torch.zeros(rows, dtype=torch.long, device=backend.device())
        # Without documents: where they are attended apart, their lengths decide over a few bytes more.
        yield Batch(tokens_BS, tokens_BS.clone(), mask_BS, tokens_BS.clone(), source_B)


@contextlib.contextmanager
def saved_tensors(training: Training) -> Iterator[Callable[[], int]]:
    """Within, count what autograd keeps; the value tells the most bytes at any moment so far.

    A storage counts once, however many views of it are kept, and weights do not count.
    """
    weights = {_storage(p) for chunk in training.chunks for p in chunk.parameters()}
    meter = _Meter()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t if _storage(t) in weights else _Kept(t, meter),
        lambda kept: kept.tensor if isinstance(kept, _Kept) else kept,
    ):
        yield lambda: meter.most


class _Meter:
    def __init__(self) -> None:
        self.now = self.most = 0
        self.uses: dict[int, int] = {}


class _Kept:
    """A saved tensor, counted for as long as autograd holds it."""

    def __init__(self, tensor: Tensor, meter: _Meter):
        # Detached: a tensor that an operation saves of its own output would keep itself alive.
        self.tensor, self.meter, self.storage = tensor.detach(), meter, _storage(tensor)
        self.bytes = tensor.untyped_storage().nbytes()
        uses = meter.uses.get(self.storage, 0)
        meter.uses[self.storage] = uses + 1
        if not uses:
            meter.now += self.bytes
            meter.most = max(meter.most, meter.now)

    def __del__(self) -> None:
        meter = self.meter
        meter.uses[self.storage] -= 1
        if not meter.uses[self.storage]:
            del meter.uses[self.storage]
            meter.now -= self.bytes


def _storage(tensor: Tensor) -> int:
    """Identity of the storage that a tensor, real or fake, lies in."""
    return tensor.untyped_storage()._cdata


def _logits(config: Config, context: ParallelContext) -> int:
    if context.pipeline_rank != context.pipeline_size - 1:
        return 0
    tokens = config.train.micro_batch * config.data.seq_length // context.context_size
    tokens = min(tokens, config.train.head_chunk or tokens)
    columns = config.model.vocab_size // context.tensor_size
    return tokens * columns * (2 if config.train.precision == "bf16" else 4)
