"""What the tools share: a user's mistake is one message and exit status 2, Ctrl-C one line and 130."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

TRACEBACK = "MEGATRON_R1_TRACEBACK"
"""Environment: set it to see where a message comes from."""
_STATUSES = """Exit status: 0 done, 2 a mistake in what was asked or found (one message says which), 130
interrupted; any other is a fault, with its traceback."""
_ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"


def tool_parser(doc: str, statuses: str = "") -> argparse.ArgumentParser:
    """A tool's parser, from its docstring: what it does, then the options, then, from the first command in it
    on, examples. `statuses`: exit statuses of this tool alone."""
    what, examples = re.split(r"\n\n(?=python |torchrun )", doc, maxsplit=1)
    return argparse.ArgumentParser(
        description=what,
        epilog="\n".join([examples, _STATUSES, statuses]).rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def announce_torch(run: str) -> None:
    """Say, once a launch and before torch is imported, what the silence is that follows."""
    if os.environ.get("RANK", "0") == "0":
        line = f"{run}: configuration checked; loading torch, which takes some seconds"
        print(line, file=sys.stderr, flush=True)


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


def allocator_environment() -> dict[str, str]:
    """What glibc must find at a process's start to keep freed memory, in huge pages; empty where it does
    not matter: with a GPU, or without glibc."""
    try:
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        glibc = None
    return {"GLIBC_TUNABLES": _ALLOCATOR} if glibc and not os.path.exists("/dev/nvidiactl") else {}


def keep_freed_memory() -> None:
    """Start this process anew, once, with `allocator_environment`; a setting of the user's stays.

    A training step frees and asks for the same gigabytes; glibc would return them to the kernel and have
    them cleared each time, a third of the step on a CPU (docs/speed.md). Call it before anything that takes
    long: it is lost.
    """
    environment = allocator_environment()
    if not environment or any(name in os.environ for name in environment):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **environment})
