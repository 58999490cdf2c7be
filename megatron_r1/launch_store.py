"""Where the ranks of one launch find each other, also when torchrun has started them again."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

_KEY = "megatron_r1/store"
_TRY = timedelta(seconds=2)


def launch_store(timeout: timedelta) -> dist.Store:
    """The store of this launch, as the environment of torchrun or another launcher names it.

    Under `torchrun --max-restarts` the launcher keeps one store for all attempts, and ranks would read
    the addresses of dead ones in it. There the first rank opens a store of its own and says so in the
    launcher's; the others try what they read there until it answers, for the store of an attempt dies
    with it. Raises TimeoutError.
    """
    launcher, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return launcher
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        token = uuid.uuid4().hex
        own = dist.TCPStore(host, 0, world_size, True, timeout, wait_for_workers=False)
        own.set(_KEY, token)
        launcher.set(_KEY, f"{own.port} {token}")
        return own
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        port, token = launcher.get(_KEY).decode().split()
        with suppress(dist.DistError):
            theirs = dist.TCPStore(host, int(port), world_size, False, _TRY, wait_for_workers=False)
            # The port may be another store's by now.
            if theirs.get(_KEY).decode() == token:
                theirs.set_timeout(timeout)
                return theirs
        time.sleep(0.2)
    raise TimeoutError(f"rank {rank} found no store of rank 0 at {host} within {timeout}")
