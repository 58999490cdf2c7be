"""Process groups and what the ranks of a launch share: ParallelContext, store, sums, a batch's parts."""

from __future__ import annotations

import dataclasses
import inspect
import ipaddress
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_r1 import backend
from megatron_r1.backend import cpu_products
from megatron_r1.config import ParallelConfig
from megatron_r1.records import Batch, TeacherRecords
from megatron_r1.system.errors import rewording
from megatron_r1.system.json_io import parse_json
from megatron_r1.system.process import RunBusyError, RunLock, exit_when_orphaned, launch_number
from megatron_r1.system.terminal import say

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class ParallelContext:
    """Place of this rank. Ranks are ordered as megatron-core's default: tensor, context, data, pipeline."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_size: int
    data_rank: int
    """Among the ranks that hold different samples."""
    data_size: int

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which speaks for all."""
        return self.rank == 0

    @property
    def first_of_copy(self) -> bool:
        """Whether this is the first of the ranks that hold the same samples."""
        return self.rank % (self.tensor_size * self.context_size) == 0 and self.pipeline_rank == 0

    def announce(self, line: str) -> None:
        """Print a line on the first rank alone."""
        if self.leads:
            say(line, result=True)


@contextmanager
def process_groups(config: ParallelConfig) -> Iterator[ParallelContext]:
    """Join the launch's process group and megatron-core's, and leave them at the end.

    Without torchrun this is a launch of one rank.
    """
    backend.use_local_device(launch_number("LOCAL_RANK", 0), launch_number("LOCAL_WORLD_SIZE", 1))
    cpu_products.use_onednn()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", _LOOPBACK)
    if on_one_machine() and "lo" in dict(socket.if_nameindex()).values():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    try:
        launch = launch_store(_TIMEOUT) if "MASTER_PORT" in os.environ else (dist.HashStore(), 0, 1)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise OSError(f"no store of the launch at {where}: {str(error).splitlines()[0][:200]}") from None
    store, rank, world_size = launch
    dist.init_process_group(
        backend.DISTRIBUTED_BACKEND,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        # NCCL would guess the device, and warn.
        device_id=backend.device() if backend.HAS_CUDA else None,
    )
    with model_groups(config) as context:
        yield context


@contextmanager
def model_groups(config: ParallelConfig, gloo: bool = True) -> Iterator[ParallelContext]:
    """megatron-core's groups in the process group; both are left at the end. gloo: gloo groups, too."""
    from megatron.core import parallel_state as ps

    try:
        ps.initialize_model_parallel(
            config.tensor,
            config.pipeline,
            config.virtual_pipeline if config.virtual_pipeline > 1 else None,
            context_parallel_size=config.context,
            create_gloo_process_groups=gloo,
        )
        yield ParallelContext(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tensor_rank=ps.get_tensor_model_parallel_rank(),
            tensor_size=ps.get_tensor_model_parallel_world_size(),
            pipeline_rank=ps.get_pipeline_model_parallel_rank(),
            pipeline_size=ps.get_pipeline_model_parallel_world_size(),
            context_size=ps.get_context_parallel_world_size(),
            data_rank=ps.get_data_parallel_rank(),
            data_size=ps.get_data_parallel_world_size(),
        )
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def holding(directory: Path, context: ParallelContext) -> Iterator[None]:
    """Hold the lock on `directory` in every rank of this launch. Raises RunBusyError in every rank if
    another launch has it, or if the first rank cannot write it."""
    lock, busy = RunLock(directory), ""
    if context.leads:
        try:
            lock.take(share=True)
        except (RunBusyError, OSError) as error:
            busy = str(error)
    if busy := broadcast_object(busy):
        raise RunBusyError(busy)
    if not context.leads:
        lock.join()
    try:
        yield
        dist.barrier()
    finally:
        lock.release()


def broadcast_object(value: object) -> Any:
    """`value` of the first rank on every rank. It is sent as JSON: a pickle from elsewhere would run code."""
    content = _content(value)
    size = torch.tensor([content.numel()], device=backend.device())
    dist.broadcast(size, 0)
    if dist.get_rank() > 0:
        content = content.new_empty(int(size))
    dist.broadcast(content, 0)
    return _value(content)


def gather_objects(value: object) -> list[Any]:
    """Every rank's `value`, on every rank, as JSON."""
    content = _content(value)
    size = torch.tensor([content.numel()], device=backend.device())
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    padded = content.new_zeros(int(torch.cat(sizes).max()))
    padded[: content.numel()] = content
    contents = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(contents, padded)
    return [_value(one[: int(size)]) for one, size in zip(contents, sizes, strict=True)]


def _content(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(backend.device())


def _value(content: torch.Tensor) -> Any:
    return parse_json(content.cpu().numpy().tobytes(), "a message between ranks")


Sharers = Literal["tensor", "pipeline", "context", "data", "tokens", "embedding"]
"""Ranks among which something is divided: the model's axes, samples, tokens (samples or context), and the two
ends of a pipeline, which both hold the tied embedding."""


def sum_over(sharers: Sharers, tensor: torch.Tensor) -> torch.Tensor:
    """Sum over this rank's group of `sharers`, in place."""
    from megatron.core import parallel_state as ps

    group = {
        "tensor": ps.get_tensor_model_parallel_group,
        "pipeline": ps.get_pipeline_model_parallel_group,
        "context": ps.get_context_parallel_group,
        "data": ps.get_data_parallel_group,
        "tokens": partial(ps.get_data_parallel_group, with_context_parallel=True),
        "embedding": ps.get_embedding_group,
    }[sharers]()
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's on every stage, in place."""
    from megatron.core import parallel_state as ps

    if ps.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            tensor, ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group()
        )
    return tensor


def on_device(batch: Batch) -> Batch:
    """The batch on this rank's device, cut to this context-parallel rank's part of each sequence."""
    from megatron.core import parallel_state as ps

    whole = ps.get_context_parallel_world_size() == 1
    if whole and batch.documents is not None and backend.document_attention() is not None:
        # Once a batch, and here, where counting documents waits for no device.
        batch = dataclasses.replace(batch, documents=backend.document_starts(batch.documents))
    tensors = _placed(batch)
    cut = cut_to_rank({name: tensor for name, tensor in tensors.items() if tensor.dim() == 2})
    teacher = None if batch.teacher is None else TeacherRecords(**cut_to_rank(_placed(batch.teacher)))
    return Batch(**{**tensors, **cut, "teacher": teacher, "whole_BS": batch.tokens_BS})  # type: ignore[arg-type]


def _placed(record: Any) -> dict[str, torch.Tensor]:
    """The tensors of a record by their names, on this rank's device."""
    tensors = {name: value for name, value in vars(record).items() if isinstance(value, torch.Tensor)}
    return {name: value.to(backend.device(), non_blocking=True) for name, value in tensors.items()}


def cut_to_rank(whole_BS: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's tokens of each tensor, where context parallelism divides the sequence."""
    from megatron.core import parallel_state as ps
    from megatron.core.utils import get_batch_on_this_cp_rank

    if ps.get_context_parallel_world_size() == 1:
        return whole_BS
    # Required by megatron-core 0.19.
    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    return get_batch_on_this_cp_rank(whole_BS, **({"is_hybrid_cp": False} if "is_hybrid_cp" in known else {}))


_KEY = "megatron_r1/store"
_TRY = timedelta(seconds=2)
_LOOPBACK = "127.0.0.1"


def on_one_machine() -> bool:
    """Whether all ranks of this launch are here: then no other machine need reach any of its sockets."""
    if launch_number("WORLD_SIZE", 1) == launch_number("LOCAL_WORLD_SIZE", 1):
        return True
    host = os.environ["MASTER_ADDR"]
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextmanager
def meeting(folder: Path, rank: int, ranks: int) -> Iterator[Callable[[Any], Any]]:
    """Where the ranks of a launch meet: a function that gives every rank the first rank's value.

    The first rank, which alone prepares, holds the lock of the folder. It may take hours, so the others wait
    at a store: a collective would time out.
    """
    if rank == 0:
        lock = RunLock(folder)
        lock.take()
    if ranks == 1:
        try:
            yield lambda value: value
        finally:
            lock.release()
        return
    exit_when_orphaned()
    backend.use_local_device(launch_number("LOCAL_RANK", 0), launch_number("LOCAL_WORLD_SIZE", 1))
    store, turns = launch_store(timedelta(days=30))[0], count()

    def arrive(place: str) -> None:
        store.add(place, 1)
        while rank == 0 and store.add(place, 0) < ranks:
            time.sleep(0.1)

    def meet(value: Any) -> Any:
        turn = next(turns)
        arrive(f"there/{turn}")
        if rank == 0:
            store.set(f"value/{turn}", json.dumps(value))
        return parse_json(store.get(f"value/{turn}"), "a message between ranks")

    with rewording(lambda error: f"the first rank has ended ({error!s:.200})", dist.DistError):
        yield meet
        # The first rank's process is the store.
        arrive("left")


def launch_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world size) of this launch, as the environment of torchrun or another launcher says.

    On one machine a store that the first rank opens listens on the loopback address. torch's would listen on
    all. Under `torchrun --max-restarts` the launcher keeps one store for all attempts, and ranks would read
    the addresses of dead ones in it. There the first rank opens a store of its own and writes its port to
    the launcher's. The others try the port that they read there until it answers, because the store of an
    attempt dies with it. The same holds where torchrun has no store
    (examples/launch/one_machine.sh): a file in the folder of the attempt takes its place, since the port that
    torchrun names may be taken by the time the first rank is here. Raises ValueError for an environment that
    is none, OSError for a port that is taken, TimeoutError.
    """
    rank, world_size, port = (
        launch_number(*one) for one in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 0))
    )
    if rank >= world_size:
        raise ValueError(f"RANK={rank} in the environment is not below WORLD_SIZE={world_size}")
    host = _LOOPBACK if (here := on_one_machine()) else os.environ["MASTER_ADDR"]
    launcher: dist.Store
    if not here or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        launcher, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
        if not launch_number("TORCHELASTIC_MAX_RESTARTS", 0):
            return launcher, rank, world_size
    elif (error := os.environ.get("TORCHELASTIC_ERROR_FILE")) and (of := Path(error).parent.parent).is_dir():
        launcher = dist.FileStore(str(of / "store"), world_size)
        launcher.set_timeout(timeout)
    else:
        return _open_store(host, port, world_size, rank == 0, timeout), rank, world_size
    if rank == 0:
        token = uuid.uuid4().hex
        own = _open_store(host, 0, world_size, True, timeout)
        own.set(_KEY, token)
        launcher.set(_KEY, f"{own.port} {token}")
        return own, rank, world_size
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        found, token = launcher.get(_KEY).decode().split()
        with suppress(dist.DistError):
            theirs = _open_store(host, int(found), world_size, False, _TRY)
            # The port may be another store's by now.
            if theirs.get(_KEY).decode() == token:
                theirs.set_timeout(timeout)
                return theirs, rank, world_size
        time.sleep(0.2)
    raise TimeoutError(f"rank {rank} found no store of rank 0 at {host} within {timeout}")


def _open_store(host: str, port: int, world_size: int, serve: bool, timeout: timedelta) -> dist.TCPStore:
    """A client of the store at host:port, or that store; port 0: any that is free."""
    open_at = partial(dist.TCPStore, host, world_size=world_size, timeout=timeout, wait_for_workers=False)
    if not serve or host != _LOOPBACK:
        return open_at(port=port, is_master=serve)
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise OSError(f"MASTER_PORT={port} cannot be opened on {host}: {error}; give another") from None
    port = listener.getsockname()[1]
    return open_at(port=port, is_master=True, master_listen_fd=listener.detach())


class DelayedAllReduce:
    """Sums of every rank's numbers, flags and microseconds, one step late.

    All ranks meet in every step: numbers submitted at its beginning have arrived by its end, so every rank
    reads the same sums at the same step. The sum travels over gloo in the background, whatever
    the device. All ranks construct it together.
    """

    def __init__(self, flags: int):
        self._group = dist.new_group(backend="gloo")
        self._sums = torch.zeros(flags, dtype=torch.int64)
        self._work: Any = None

    def submit(self, *flags: int) -> None:
        """Give this rank's numbers. Every rank calls this once a step, after `result`."""
        self._sums = torch.tensor(flags, dtype=torch.int64)
        self._work = dist.all_reduce(self._sums, group=self._group, async_op=True)

    def result(self) -> list[int]:
        """Each number's sum over the ranks at the last `submit`; zeros before the first."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [int(flag) for flag in self._sums.tolist()]
