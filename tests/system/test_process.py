"""Who holds a run directory, and who ends with whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
