"""The allocator's settings reach the process, and the user's own stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.system.process import allocator_environment
from megatron_r1.system.terminal import user_errors

SCRIPT = (
    "import os, sys; from megatron_r1.system.process import keep_freed_memory; keep_freed_memory(); "
    "print(os.environ.get('GLIBC_TUNABLES'), *sys.argv[1:])"
)


def run(**environment: str) -> str:
    root = str(Path(__file__).resolve().parent.parent.parent)
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, "a=b", "--flag"],
        env={**kept, "PYTHONPATH": root, "RANK": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_process_starts_again_with_the_allocator_and_its_arguments() -> None:
    assert run().split() == [str(allocator_environment().get("GLIBC_TUNABLES")), "a=b", "--flag"]


def test_the_users_own_setting_stays() -> None:
    assert run(GLIBC_TUNABLES="glibc.malloc.arena_max=1").split()[0] == "glibc.malloc.arena_max=1"


def test_a_reader_that_is_gone_ends_a_tool_in_silence() -> None:
    """As after `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    script = "from megatron_r1.system.terminal import user_errors\nwith user_errors():\n    print('x' * 100)"
    root = str(Path(__file__).resolve().parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, user_errors():
        raise BrokenPipeError(32, "Broken pipe")
    assert caught.value.code == 2 and "Broken pipe" in capsys.readouterr().err
