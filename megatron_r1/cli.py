"""What the tools share: a user's mistake is one message and exit status 2, from one rank."""

from __future__ import annotations

import os
import sys
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
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
