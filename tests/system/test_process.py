"""Who holds a run directory, and who ends with whom."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.system.process import RunBusyError, RunLock

HOLD = """
import sys, time
from pathlib import Path
from megatron_r1.system.process import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take(share=sys.argv[2] == "share")
print("held", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import time
from megatron_r1.system.process import exit_when_orphaned
exit_when_orphaned(); print("child", flush=True); time.sleep(60)
'''])
print(child.pid, flush=True); child.wait()
"""


def start(code: str, *words: object, log: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    with open(log or os.devnull, "w") as error:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error, text=True)


def test_a_second_launch_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path, "alone")
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(RunBusyError, match=f"in use by process {holder.pid}"):
        RunLock(tmp_path).take(patience=0.2)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).take(patience=5)


def test_a_surviving_rank_keeps_the_next_launch_out(tmp_path: Path) -> None:
    first = start(HOLD, tmp_path, "share")
    assert first.stdout and first.stdout.readline() == "held\n"
    other = RunLock(tmp_path)
    other.join()
    first.kill()
    first.wait()
    with pytest.raises(RunBusyError):
        RunLock(tmp_path).take(patience=0.2)
    other.release()
    RunLock(tmp_path).take(patience=0.2)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_ends_with_its_parent_and_says_why(tmp_path: Path) -> None:
    parent = start(PARENT, log=tmp_path / "log")
    assert parent.stdout
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    child = int((lines - {"child"}).pop())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not alive(child):
            text = f"error: process {child} ends because the command that started it is gone"
            assert text in (tmp_path / "log").read_text()
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def test_only_who_may_write_in_the_run_can_hold_its_lock(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o600), (0o002, 0o660), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            RunLock(tmp_path / f"{umask:o}")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask:o}/.lock").stat().st_mode) == mode


def test_a_lock_that_another_holds_is_not_laid_on_the_last_launch(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / ".lock").write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname()}))
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(RunBusyError) as caught:
            RunLock(tmp_path).take(patience=0)
    for part in (
        f"another process, which holds {tmp_path}/.lock",
        f"process {ended.pid} on ",
        "and has ended",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"[" * 10**6, b"\xff", b'{"pid": [1], "host": {}}', b'{"pid": "\\u001b[2J"}',
     b'{"pid": 1, "host": "' + b"x" * 10**6 + b'"}'],
    ids=range(8),
)  # fmt: skip
def test_a_lock_s_hostile_content_is_a_short_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(RunBusyError, match="is in use by another process, which holds") as caught:
            RunLock(tmp_path).take(patience=0)
    assert len(str(caught.value)) < 400


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.lock is a link"):
        RunLock(tmp_path)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("lost", ["refused", "taken between"])
def test_a_lock_that_was_lost_as_it_was_turned_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Over NFS the exclusive lock is let go before it is shared."""
    real = fcntl.flock

    def flock(file: Any, kind: int) -> None:
        if kind & fcntl.LOCK_SH:
            if lost == "refused":
                raise BlockingIOError
            Path(file.name).write_text('{"pid": 1, "host": "elsewhere", "take": "x"}')
        real(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunBusyError, match=r"was taken by .* while this launch started"):
        RunLock(tmp_path).take(share=True)


def test_a_lock_without_room_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(value: object, file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.lock'"):
        RunLock(tmp_path).take()
