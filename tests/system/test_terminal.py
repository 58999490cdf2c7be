"""The allocator's settings reach the process, and the user's own stay."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.system.process import allocator_environment
from megatron_r1.system.terminal import count, number, positive, say, user_errors

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


def _told(capsys: pytest.CaptureFixture[str], error: BaseException) -> str:
    with pytest.raises(SystemExit) as caught, user_errors():
        raise error
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_message_is_bounded_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _told(capsys, ValueError("a: no b\n  c")) == "error: a: no b\n  c\n"
    assert len(_told(capsys, ValueError("x" * 10**7))) < 1100
    lines = _told(capsys, OSError("\n".join(f"line {n}" for n in range(5000)))).splitlines()
    assert len(lines) == 201 and lines[-1] == "and 4800 lines more"


def test_names_of_others_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (
        lambda text: _told(capsys, ValueError(text)),
        lambda text: say(text) or capsys.readouterr().err,
    ):
        text = str(show("a\x1b[2J\x1b]0;title\x07\r\u202eb"))
        assert text.endswith("a\\x1b[2J\\x1b]0;title\\x07\\r\\u202eb\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RecursionError("maximum recursion depth exceeded"), "error: a file is nested deeper than"),
        (MemoryError(), "error: not enough memory (size unknown)"),
        (
            MemoryError("Unable to allocate 8.00 PiB"),
            "error: not enough memory (Unable to allocate 8.00",
        ),
    ],
)
def test_what_ran_out_is_one_line_with_a_way_to_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    told = _told(capsys, error)
    assert told.startswith(message) and told.count("\n") == 1 and "MEGATRON_R1_TRACEBACK=1" in told
    monkeypatch.setenv("MEGATRON_R1_TRACEBACK", "1")
    with pytest.raises(type(error)), user_errors():
        raise error


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (count, "0", "0 must be an integer at least 1"),
        (count, "2.5", "2.5 must be an integer at least 1"),
        (positive, "nan", "nan must be a number above 0"),
        (positive, "-inf", "-inf must be a number above 0"),
        (number(float, 0, 0.5, above=True), "0", "0 must be a number above 0 and at most 0.5"),
        (number(int, 0), "9" * 5000, "must be an integer at least 0"),
    ],
)
def test_an_option_s_number_is_named(kind: Any, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message) as caught:
        kind(text)
    assert len(str(caught.value)) < 300
    assert (count("3"), positive("0.5"), number(int, 0)("0")) == (3, 0.5, 0)
