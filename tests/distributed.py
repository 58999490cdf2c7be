"""Ranks as forks of this process, which has imported megatron.core once: a third of a second a launch."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_r1 import backend  # noqa: F401  (before megatron.core)

# isort: split
import megatron.core.models.gpt  # noqa: F401  (paid here, not in every fork)


class RankFailedError(AssertionError):
    """A rank ended otherwise than by returning; the message is its traceback or its status."""


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """What `body(*args)` returns on each of `ranks` ranks, in an environment like torchrun's.

    `body` joins the process groups itself (`parallel.process_groups`). Raises RankFailedError as soon as
    one rank fails, after ending the others. One thread a rank: OpenMP does not survive a fork.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, children = [], {}
    for rank in range(ranks):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, ranks, port, writer, body, args)
        os.close(writer)
        pipes.append(reader)
        children[pid] = rank
    try:
        failed = _wait(dict(children), seconds)
        answers = [_read(pipe) for pipe in pipes]
    finally:
        for pipe in pipes:
            os.close(pipe)
    errors = [error for _, error in answers if error]
    if failed is not None or errors:
        raise RankFailedError("\n".join(errors) or failed)
    return [value for value, _ in answers]


def _be_rank(rank: int, ranks: int, port: int, writer: int, body: Callable[..., Any], args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        answer, status = (body(*args), ""), 0
    except BaseException:
        answer, status = (None, f"rank {rank}: {traceback.format_exc()}"), 1
    # To a file, not through the pipe: a full pipe would wait for a reader that waits for this process.
    path = Path(f"/tmp/megatron_r1_test_{os.getpid()}")
    path.write_bytes(pickle.dumps(answer))
    os.write(writer, str(path).encode())
    # Nothing that the parent registered (pytest's own end, say) may run here.
    os._exit(status)


def _wait(children: dict[int, int], seconds: float) -> str | None:
    """Until all have ended; what went wrong first, if anything did."""
    end, failed = time.monotonic() + seconds, None
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            rank = children.pop(pid)
            if status != 0 and failed is None:
                failed = f"rank {rank} ended with status {os.waitstatus_to_exitcode(status)}"
                # Its peers would wait for it; they get a moment to fail by themselves.
                end = min(end, time.monotonic() + 2)
        elif time.monotonic() > end:
            for other in children:
                os.kill(other, signal.SIGKILL)
            failed = failed or f"ranks {sorted(children.values())} still ran after {seconds} s"
            end = float("inf")
        else:
            time.sleep(0.005)
    return failed


def _read(pipe: int) -> tuple[Any, str]:
    name = os.read(pipe, 4096).decode()
    if not name:
        return None, ""
    path = Path(name)
    answer: tuple[Any, str] = pickle.loads(path.read_bytes())
    path.unlink()
    return answer
