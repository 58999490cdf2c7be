"""Saving of sharded checkpoints through megatron-core's dist_checkpointing.

A save copies this rank's part and leaves the writing to a thread. The files hold the state of the step at
which the save began. Every layout loads them (load.py).
"""

from __future__ import annotations

import gc
import inspect
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.files import FileFacts, Retention
from megatron_r1.checkpoint.shards import METADATA, rectangles_of
from megatron_r1.config import ModelConfig
from megatron_r1.parallel import broadcast_object, gather_objects
from megatron_r1.records import CheckpointRef, TrainState
from megatron_r1.system.files import sync
from megatron_r1.system.terminal import say

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import common, filesystem_async

# 0.19 has another package write by default; here it is only asked what is to be written.
_ASYNC = {"async_sharded_save": True}
if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
    _ASYNC["async_strategy"] = "mcore"  # type: ignore[assignment]

_FIRST_RANK_WRITES = [
    (serialization, "save_config"),
    (filesystem_async.FileSystemWriterAsync, "finish"),
    # Of 0.16.
    (getattr(common, "TorchCommonSaveStrategy", None), "save_common"),
]


def save_checkpoint(
    directory: Path, gpt: Any, optimizer: Any, state: TrainState, model: ModelConfig, phase: str, plan: str
) -> CheckpointRef:
    """Write `directory/step_N` from all ranks; returns when it is complete on disk. See `Saver.save`."""
    saver = Saver(directory)
    ref = saver.save(gpt, optimizer, state, model, phase, plan)
    saver.wait()
    return ref


@dataclass
class _Flight:
    """A save that has begun."""

    ref: CheckpointRef
    temporary: Path
    request: Any
    """megatron-core's: what this rank writes, and what completes the checkpoint on all."""
    publish: Callable[[FileFacts], None]
    facts: FileFacts = field(default_factory=dict)
    error: str = ""

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=_write, args=(self,), name="checkpoint", daemon=True)
        self.thread.start()


class Saver:
    """Saves of one run, one at a time, in the background. Every rank has one and calls it alike.

    Host memory: a copy of what this rank writes, kept from save to save.
    """

    def __init__(self, directory: Path, retention: Retention | None = None):
        self._directory = directory
        self._retention = retention or Retention()
        self._copies: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._flight: _Flight | None = None
        self._remover: threading.Thread | None = None
        self._staying: set[int] = set()
        """Surplus that could not go, which was said."""

    def save(
        self, gpt: Any, optimizer: Any, state: TrainState, model: ModelConfig, phase: str, plan: str
    ) -> CheckpointRef:
        """Begin to write `directory/step_N`. The state may change once this returns.

        `plan`: the data plan as JSON, which a resumed run must agree with. `optimizer` None: weights only.
        Waits for a save that is under way. Raises OSError on all ranks if the disk is full or not writable.
        """
        self.wait()
        final = checkpoint_files.step_path(self._directory, state.step)
        ref = CheckpointRef(final, state.step)
        if (final / checkpoint_files.META).is_file():
            return ref
        temporary = checkpoint_files.temporary_path(self._directory, state.step)

        def begin() -> None:
            if self._remover is not None:
                self._remover.join()
            checkpoint_files.begin(self._directory, state.step)

        with self._cleaning(temporary):
            _on_first_rank(begin, ref)
            # The writers report within this process: megatron-core's own queue would start a server for that,
            # which runs the main program again.
            filesystem_async._results_queue = queue.Queue()
            with _first_rank_writes(ref):
                copied, about = self._copied(_sharded(gpt, optimizer)), dict(METADATA)
                request = dist_checkpointing.save(copied, str(temporary), content_metadata=about, **_ASYNC)
        saved = replace(state)

        def publish(facts: FileFacts) -> None:
            checkpoint_files.publish(self._directory, facts, saved, model, phase, plan)

        self._flight = _Flight(ref, temporary, request, publish)
        return ref

    @property
    def writing(self) -> bool:
        """Whether this rank's part of a save is not on the disk yet."""
        return self._flight is not None and self._flight.thread.is_alive()

    def poll(self, writing: int) -> None:
        """Complete the save under way once no rank is `writing`, a number that all ranks have agreed on.
        Raises OSError on all ranks if any could not write; earlier checkpoints stay."""
        if not writing:
            self.wait()

    def wait(self) -> None:
        """Complete the save under way, if there is one; see `poll`."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        flight.thread.join()
        reports = gather_objects((flight.error, flight.facts))
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(reports) if error]

        def publish() -> None:
            facts: FileFacts = {name: fact for _, part in reports for name, fact in part.items()}
            rest = [p for p in flight.temporary.iterdir() if p.name not in facts]
            for path in rest:
                sync(path)
            flight.publish(facts | checkpoint_files.facts_of(rest))

        with self._cleaning(flight.temporary):
            if errors:
                raise OSError(_failed(flight.ref, "; ".join(errors)))
            _on_first_rank(lambda: checkpoint_files.release(self._directory), flight.ref)
            with _first_rank_writes(flight.ref):
                for finish in flight.request.finalize_fns:
                    finish()
            _on_first_rank(publish, flight.ref)
        if dist.get_rank() == 0:
            self._remove_surplus()

    @contextmanager
    def _cleaning(self, temporary: Path) -> Iterator[None]:
        """Leave nothing of a save that has failed, which every rank learns at the same place."""
        try:
            yield
        except OSError:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                with suppress(OSError):
                    checkpoint_files.release(self._directory)
            raise

    def _remove_surplus(self) -> None:
        """Only now that a newer checkpoint is complete. Deleting may take long, and nobody waits for it."""
        hidden = []
        for step in self._retention.surplus(checkpoint_files.saved_steps(self._directory)):
            path = checkpoint_files.step_path(self._directory, step)
            try:
                if path.is_symlink():
                    raise OSError(f"{path} is a link")
                hidden.append(checkpoint_files.discard(path))
            except OSError as error:
                if step not in self._staying:
                    say(f"warning: train.keep_last: {error}; it stays, and no room is freed")
                self._staying.add(step)
        if hidden:
            delete = partial(shutil.rmtree, ignore_errors=True)
            self._remover = threading.Thread(target=lambda: list(map(delete, hidden)), name="remover")
            self._remover.start()

    def _copied(self, sharded: dict[str, Any]) -> dict[str, Any]:
        """The same state with the tensors that this rank writes copied to the host.

        The copies are kept: fresh memory costs more than the copying.
        """
        apply_factories(sharded)
        for shard in nested_values(sharded):
            if not isinstance(shard, ShardedTensor) or not is_main_replica(shard.replica_id):
                continue
            copy = self._copies.get(place := (shard.key, shard.global_offset))
            if copy is None:
                copy = torch.empty(shard.data.shape, dtype=shard.dtype, pin_memory=backend.HAS_CUDA)
                self._copies[place] = copy
            shard.data = copy.copy_(shard.data.detach(), non_blocking=True)
        if backend.HAS_CUDA:
            torch.accelerator.synchronize()
        return sharded


def _sharded(gpt: Any, optimizer: Any | None) -> dict[str, Any]:
    """The state to save, in place."""
    model = gpt.sharded_state_dict()
    if optimizer is None:
        return {"model": model}
    # megatron-core collects garbage here, after the gathering that this does without: a quarter of a second
    # for all that lives, which is why nothing does to the collector.
    gc.freeze()
    try:
        with rectangles_of(optimizer):
            return {"model": model, "optimizer": optimizer.sharded_state_dict(model, metadata=METADATA)}
    finally:
        gc.unfreeze()


def _write(flight: _Flight) -> None:
    """Write this rank's files, flushed, and take their checksums. Runs in a thread; never raises.

    megatron-core forks writers instead. Forks copy the memory and the process groups' threads, and gain
    nothing, because a write releases the interpreter lock.
    """
    if flight.request.async_fn is None:
        return
    try:
        if sys.platform == "linux":
            # There a thread has a priority of its own: where training computes on the same cores, it
            # goes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        transforms = flight.request.async_fn.args[0]
        _, buckets, answer = flight.request.async_fn_args
        written = {}
        for number, bucket in enumerate(buckets):
            results: queue.Queue[Any] = queue.Queue()
            begun: queue.Queue[int] = queue.Queue()
            begun.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, number, bucket, results, begun, use_fsync=True
            )
            _, written[number] = results.get()
            if isinstance(written[number], Exception):
                raise written[number]
            flight.facts.update(checkpoint_files.facts_of([Path(bucket[0])]))
        answer.put(written)
    except Exception as error:
        flight.error = _cause(error)
        # At once: until all ranks know, the run's logs need room, too.
        for path, *_ in flight.request.async_fn_args[1]:
            Path(path).unlink(missing_ok=True)


def _cause(error: BaseException) -> str:
    """The system's message, where torch says only that a write came out short."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    return str(inner) if inner is not None else f"{type(error).__name__}: {error}"


def _on_first_rank(action: Callable[[], None], ref: CheckpointRef) -> None:
    """Run `action` on the first rank; where it fails, OSError on all."""
    error: object = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as caught:
            error = _failed(ref, str(caught))
    error = broadcast_object(error)
    if error is not None:
        raise OSError(error)


@contextmanager
def _first_rank_writes(ref: CheckpointRef) -> Iterator[None]:
    """Within, what megatron-core writes on the first rank alone; where that fails, OSError on all behind it.

    It writes between steps that all ranks take together, and an error there would leave the others waiting.
    """
    errors: list[BaseException] = []

    def collecting(write: Callable[..., None]) -> Callable[..., None]:
        def collect(*args: Any, **options: Any) -> None:
            try:
                write(*args, **options)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        return collect

    writes = {place: getattr(*place) for place in _FIRST_RANK_WRITES if hasattr(*place)}
    for place, write in writes.items():
        setattr(*place, collecting(write))
    try:
        yield
    finally:
        for place, write in writes.items():
            setattr(*place, write)

    def report() -> None:
        for error in errors:
            raise OSError(_cause(error))

    _on_first_rank(report, ref)


def _failed(ref: CheckpointRef, why: str) -> str:
    way_out = "earlier checkpoints are whole: make room, and the same command goes on from the last of them"
    return f"{ref.path} could not be saved ({why}); {way_out}"
