"""Ranks as forks of a server that has imported once what ranks import (preloaded.py)."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megatron_r1 import backend  # noqa: F401  (before megatron.core)

# isort: split
import megatron.core.models.gpt  # noqa: F401  (paid by the server, not by every fork)

# Forks of a server that only imports: a fork of the test process would inherit the thread pools of
# whatever tests ran before, without their threads, and wait for them.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.preloaded"])


class RankFailedError(AssertionError):
    """A rank ended otherwise than by returning; the message is its traceback or its status."""


def on_ranks(ranks: int, body: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """What `body(*args)` returns on each of `ranks` ranks, in an environment like torchrun's.

    `body`, a function of a module, joins the process groups itself (`parallel.process_groups`). Raises
    RankFailedError as soon as one rank fails, after ending the others. One thread a rank.
    """
    with tempfile.TemporaryDirectory() as directory:
        children, answers = start_ranks(ranks, Path(directory), body, *args)
        failed = _wait(children, seconds)
        for log in sorted(Path(directory).glob("*.log")):
            print(log.read_text(errors="replace"), end="")
        found = [pickle.loads(path.read_bytes()) for path in answers if path.exists()]
    errors = [error for _, error in found if error]
    if failed is not None or errors:
        raise RankFailedError("\n".join(errors) or failed)
    return [value for value, _ in found]


def start_ranks(
    ranks: int, directory: Path, body: Callable[..., Any], *args: Any
) -> tuple[list[BaseProcess], list[Path]]:
    """The processes of a launch, and the files under `directory` to which each writes what it found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = [directory / str(rank) for rank in range(ranks)]
    children: list[BaseProcess] = [
        _FORKS.Process(target=_be_rank, args=(rank, ranks, port, answers[rank], body, args))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    return children, answers


def _be_rank(
    rank: int, ranks: int, port: int, answer: Path, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
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
    # The server's output is not the test's; the test prints this once the rank has ended.
    with open(answer.with_suffix(".log"), "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        found, status = (body(*args), ""), 0
    except BaseException:
        found, status = (None, f"rank {rank}: {traceback.format_exc()}"), 1
    sys.stdout.flush()
    answer.write_bytes(pickle.dumps(found))
    # Without the interpreter's end: threads of the process group may still wait for a peer that failed.
    os._exit(status)


def _wait(children: list[BaseProcess], seconds: float) -> str | None:
    """Until all have ended; what went wrong first, if anything did."""
    end, failed = time.monotonic() + seconds, None
    left = dict(enumerate(children))
    while left:
        for rank, child in list(left.items()):
            child.join(timeout=0.005)
            if child.exitcode is None:
                continue
            del left[rank]
            if child.exitcode != 0 and failed is None:
                failed = f"rank {rank} ended with status {child.exitcode}"
                # Its peers would wait for it; they get a moment to fail by themselves.
                end = min(end, time.monotonic() + 2)
        if time.monotonic() > end:
            for child in left.values():
                child.kill()
            failed = failed or f"ranks {sorted(left)} still ran after {seconds} s"
            end = float("inf")
    return failed
