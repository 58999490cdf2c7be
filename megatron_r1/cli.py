"""What the tools share: a user's mistake is one message and exit status 2, Ctrl-C one line and 130."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

TRACEBACK = "MEGATRON_R1_TRACEBACK"
"""Environment: set it to see where a message comes from."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ValueError, OSError and a busy run directory into `error: ...` on stderr and status 2."""
    from megatron_r1.run_lock import RunBusyError

    try:
        yield
    except (ValueError, OSError, RunBusyError) as error:
        if os.environ.get(TRACEBACK):
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Most mistakes are every rank's, and the first one says them; the launcher ends this one
            # before it repeats them, unless the mistake is its alone.
            time.sleep(3)
        print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        sys.exit(130)
