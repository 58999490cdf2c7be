"""One launch at a time writes to a run directory, and no rank outlives the command that started it.

A rank whose launcher was killed would go on writing beside the command that was started again. Two
things prevent it: every rank holds a lock on the run directory for as long as it lives, and a thread
in it ends the process once its parent is gone. SIGTERM is a request to save and stop, as schedulers send
it before they kill.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_r1.system.errors import RunBusyError, brief, shown
from megatron_r1.system.files import make_folder, naming, ours
from megatron_r1.system.json_io import read_object
from megatron_r1.system.terminal import say

_OWNER = "MEGATRON_R1_OWNER"
"""Environment: "PID:START" of the command on whose behalf a launch runs."""


_LOOK_SECONDS = 0.3


class RunLock:
    """The lock file `DIR/.lock`, held until this process ends.

    The first rank takes it exclusively, which fails while any rank of an earlier launch lives, and
    then shares it; the other ranks join. A process that dies, however it dies, lets go.
    """

    def __init__(self, directory: Path):
        make_folder(directory)
        self.path = directory / ".lock"
        self._file = open(self.path, "a+", encoding="utf-8", opener=ours)  # noqa: SIM115  (held for life)
        # Whoever can open the file can hold it: those who may not write in the run need not read its lock.
        mode = os.fstat(self._file.fileno()).st_mode & 0o666
        with suppress(OSError):
            os.fchmod(self._file.fileno(), mode & 0o222 | (mode & 0o222) << 1)

    def take(self, patience: float = 20.0, share: bool = False) -> None:
        """Wait up to `patience` seconds for every earlier holder to end; then hold the lock.

        `share`: let the other ranks of this launch join. Raises RunBusyError that says who holds the lock,
        as far as that is known.
        """
        start = time.monotonic()
        while not self._try(fcntl.LOCK_EX):
            if time.monotonic() - start > patience:
                way_out = "wait for it to end, or stop it, and start again"
                raise RunBusyError(f"{self.path.parent} is in use by {self._holder()}; {way_out}")
            time.sleep(0.1)
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "take": os.urandom(8).hex()}
        with naming(self.path):
            self._file.truncate(0)
            json.dump(mine, self._file)
            self._file.flush()
        # The lock may be lost as it is turned: over NFS it is let go first. Who took it has written there.
        if share:
            self.join(mine)

    def join(self, written: dict[str, Any] | None = None) -> None:
        """Hold the lock beside the first rank, which took it to share. `written`: what that rank wrote."""
        if not self._try(fcntl.LOCK_SH) or (written and self._content() != written):
            raise RunBusyError(f"{self.path.parent} was taken by {self._holder()} while this launch started")

    def release(self) -> None:
        self._file.close()

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if kind == fcntl.LOCK_EX:
                say(f"warning: no file locks on {self.path}: start one command at a time")
        return True

    def _content(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return read_object(self.path, most=4096)
        return {}

    def _holder(self) -> str:
        """Who holds the lock: the last that took it, if it lives."""
        pid, host = (self._content().get(name) for name in ("pid", "host"))
        if type(pid) is not int or not isinstance(host, str):
            return f"another process, which holds {self.path}"
        last = f"process {pid} on {brief(host)}"
        if host != socket.gethostname() or not Path("/proc").is_dir() or _start_time(pid):
            return last
        return f"another process, which holds {self.path} ({last} held it last, and has ended)"


def owner_environment() -> dict[str, str]:
    """Environment of launches that must end with this command."""
    return {_OWNER: f"{os.getpid()}:{_start_time(os.getpid())}"}


def exit_when_orphaned() -> None:
    """End this process (status 1) once its parent, or the owner in the environment, is gone. The first rank
    says so, if somebody still reads."""
    parent = os.getppid()
    owner = os.environ.get(_OWNER)

    def watch() -> None:
        while os.getppid() == parent and (owner is None or _alive(owner)):
            time.sleep(_LOOK_SECONDS)
        if os.environ.get("RANK", "0") == "0":
            why = f"error: process {os.getpid()} ends because the command that started it is gone"
            with suppress(OSError, ValueError):
                print(f"{why}; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="exit-when-orphaned", daemon=True).start()


def _start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks, so that a number used again is not mistaken for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _alive(owner: str) -> bool:
    pid, _, start = owner.partition(":")
    return not Path("/proc").is_dir() or _start_time(int(pid)) == start


_SAME_REQUEST = 5.0
"""Seconds within which another SIGTERM is the same request: a scheduler signals every process, and so
does a launcher that got the signal itself."""


class StopRequest:
    """Notes SIGTERM while it is entered; a later one ends the process as it would have ended before."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and now - self._since > _SAME_REQUEST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.requested:
            self.requested, self._since = True, now


def launch_number(name: str, default: int) -> int:
    """A number that a launcher sets in the environment. ValueError for any other value, and for no ranks."""
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise ValueError(f"{name}={shown(value)} in the environment is no number; the launcher sets it")
    if name.endswith("WORLD_SIZE") and int(value) == 0:
        raise ValueError(f"{name}={value} in the environment is no number of ranks; the launcher sets it")
    return int(value)


_ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"


def allocator_environment() -> dict[str, str]:
    """Environment in which glibc keeps freed memory, in huge pages. Empty with a GPU, or without glibc."""
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


_OPEN_BESIDES = 150
"""Files and sockets that a launch's process opens beside its datasets."""


def allow_open_files(count: int, what: str) -> None:
    """Raise this process's limit of open files for `count` files that stay open.

    Raises ValueError with the number needed where the system does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, no_limit = count + _OPEN_BESIDES, resource.RLIM_INFINITY
    if hard != no_limit and hard < needed:
        fault = f"{count} {what} need a limit of {needed} open files, and the hard limit is {hard}"
        raise ValueError(f"{fault}: raise it (ulimit -Hn {needed})")
    if soft != no_limit and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
