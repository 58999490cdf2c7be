"""The C++ tests beside the headers, under the sanitizers for addresses and undefined behaviour; a fuzz."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1 import _csrc

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "csrc" / "tests"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
SANITIZERS = ["-std=c++17", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [*SANITIZERS, "-Og", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror"]
BUILDS = [(path.stem, 8) for path in sorted(TESTS.glob("test_*.cpp"))]
# What a CPU without AVX-512, and one without any of it (arm64), would run.
BUILDS += [(name, width) for name in ("test_gather", "test_greedy", "test_records") for width in (4, 2)]
NEVER = 2**64 - 1


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(("name", "width"), BUILDS)
def test_header(name: str, width: int, tmp_path: Path) -> None:
    program = tmp_path / name
    flags = [*FLAGS, f"-DR1_MAX_WIDTH={width}"]
    subprocess.run([COMPILER, *flags, TESTS / f"{name}.cpp", "-o", program], check=True)
    run = subprocess.run([program, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# -- the module, called with anything


def fuzz(calls: int, seed: int, *extension: Path, **environment: str) -> dict[str, int]:
    """Calls of each entry of the module. An entry that the fuzz does not know fails it."""
    command = [sys.executable, ROOT / "tests" / "fuzz_csrc.py", str(calls), str(seed), *extension]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert ran.returncode == 0, ran.stderr[-4000:]
    return dict(json.loads(ran.stdout.splitlines()[-1])["called"])


def test_any_call_answers_or_raises() -> None:
    """300 calls of the module as it is installed; the sanitizers take a minute to build (make soak)."""
    assert sum(fuzz(300, seed=3).values()) >= 300


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_any_call_leaves_memory_alone(tmp_path: Path) -> None:
    """10,000 calls under the sanitizers."""
    import pybind11

    built = tmp_path / "_csrc.so"
    include = [
        f"-I{folder}" for folder in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    ]
    flags = [*SANITIZERS, "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-D_GLIBCXX_ASSERTIONS"]
    # Ctrl-C is heard as fast as without the sanitizers.
    flags += ["-DR1_WORK=(1ull<<22)"]
    subprocess.run([COMPILER, *flags, *include, ROOT / "csrc" / "bindings.cpp", "-o", built], check=True)
    names = [f"lib{name}.so" for name in ("asan", "ubsan", "stdc++")]
    libraries = [
        subprocess.run([COMPILER, f"-print-file-name={n}"], stdout=-1, text=True).stdout.strip()
        for n in names
    ]
    limits = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048"
    called = fuzz(
        10_000, 1, built, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS=limits, PYTHONMALLOC="malloc"
    )
    assert sum(called.values()) >= 10_000 and min(called.values()) >= 50


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def add_phase(plan: Any, **changes: Any) -> Any:
    """A phase of two sources with 10 windows each; `changes` by the argument's name."""
    arguments: dict[str, Any] = dict(
        start=0, weights=u64(1, 1), exact=np.array([0.5, 0.5]), windows=u64(10, 10)
    )
    arguments |= dict(limit=u64(NEVER, NEVER), first_draw=u64(0, 0), first_epoch=u64(0, 0), keep=[None, None])
    plan.add_phase(*{**arguments, **changes}.values())
    return plan


def made_plan(megatron: bool = False, **changes: Any) -> Any:
    return add_phase(_csrc.Plan(megatron, True, u64(1, 2)), **changes)


def statistics(student: Any, teacher: Any = None, inverse: Any = 1.0, threads: Any = 1) -> Any:
    return _csrc.divergence_statistics(student, teacher, inverse, threads)


def gradient(student: Any, teacher: Any = None, a: Any = None, b: Any = None) -> None:
    ones = np.ones(2, np.float32)
    _csrc.divergence_gradient(student, teacher, ones, ones, 1.0, ones if a is None else a, b, None, 1)


ROWS = np.zeros((2, 3), np.float32)
READ_ONLY = np.frombuffer(ROWS.tobytes(), np.float32).reshape(2, 3)
NONE_KEPT = _csrc.Keep(10, np.zeros(2, np.uint8))
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "keep of 2^64 - 1": (
        lambda: _csrc.Keep(NEVER, np.zeros(0, np.uint8)),
        ValueError,
        "windows must be from 0",
    ),
    "keep of too few bytes": (lambda: _csrc.Keep(9, np.zeros(1, np.uint8)), ValueError, "has 2 bytes, got 1"),
    "keep of bools": (lambda: _csrc.Keep(1, np.ones(1, bool)), TypeError, "whole numbers, not of bool"),
    "keep of 256": (lambda: _csrc.Keep(8, [256]), ValueError, "entry 0 is 256"),
    "mask that keeps fewer": (lambda: made_plan(keep=[NONE_KEPT, None]), ValueError, "its mask keeps 0"),
    "mask of another type": (lambda: made_plan(keep=[3, None]), TypeError, "Keep or None, not int"),
    "mask that was not made": (
        lambda: made_plan(keep=[_csrc.Keep.__new__(_csrc.Keep), None]),
        TypeError,
        "its __init__ has not run",
    ),
    "weight without windows": (
        lambda: made_plan(windows=u64(0, 1)),
        ValueError,
        "source 0: a weight, but no window",
    ),
    "2^62 windows": (lambda: made_plan(windows=u64(2**62, 1)), ValueError, "fewer than 2"),
    "weights beyond 64 bits": (lambda: made_plan(weights=u64(2**63, 2**63)), ValueError, "sum to 2"),
    "no weight": (lambda: made_plan(weights=u64(0, 0)), ValueError, "draws nothing"),
    "first phase late": (lambda: made_plan(start=5), ValueError, "use 0 for the first one"),
    "phase on the last one": (lambda: add_phase(made_plan()), ValueError, "more than the 0 of the last"),
    "draws to come": (lambda: made_plan(first_draw=u64(1, 0)), ValueError, "only 0 draws come before"),
    "epoch 2^63": (lambda: made_plan(first_epoch=u64(2**63, 0)), ValueError, "first epoch"),
    "one limit for two": (lambda: made_plan(limit=u64(1)), ValueError, "1 values for 2 sources"),
    "NaN": (lambda: made_plan(True, exact=np.array([np.nan, 1])), ValueError, "weight 0 is nan"),
    "inf in all": (lambda: made_plan(True, exact=np.array([1e308, 1e308])), ValueError, "sum of the weights"),
    "negative weight": (
        lambda: _csrc.megatron_order(np.array([1.5, -0.5]), 3),
        ValueError,
        "weight 1 is -0.5",
    ),
    "no weights": (lambda: _csrc.megatron_order(np.zeros(0), 3), ValueError, "0 weights"),
    "source 2 of 2": (lambda: made_plan().count(2, 1), IndexError, "source 2 of 2"),
    "source -1": (lambda: made_plan().position(-1, 1), IndexError, "got -1"),
    "draw -1": (lambda: made_plan().position(0, -1), IndexError, "draws count from 0.*got -1"),
    "sample 1.5": (
        lambda: made_plan().locate(np.float32(1.5)),
        TypeError,
        "a whole number, not numpy.float32",
    ),
    "samples 1.5": (lambda: made_plan().locate_many(np.array([1.5])), TypeError, "not of float64"),
    "samples beyond int64": (
        lambda: made_plan().locate_many(u64(2**63)),
        ValueError,
        "entry 0 is 9223372036854775808",
    ),
    "range beyond 2^62": (lambda: made_plan().locate_range(2**61, 2**61 + 1), IndexError, "not below 2"),
    "megatron as text": (
        lambda: _csrc.Plan("no", True, u64(1)),
        TypeError,
        "megatron must be a bool, not str",
    ),
    "plan that was not made": (lambda: _csrc.Plan.__new__(_csrc.Plan).bounds(), TypeError, "has not run"),
    "logits as a list": (lambda: statistics([[1.0]]), TypeError, "student must be an array, not list"),
    "logits of float64": (
        lambda: statistics(np.zeros((2, 3))),
        TypeError,
        "float32 or uint16, not of float64",
    ),
    "logits of another byte order": (lambda: statistics(ROWS.astype(">f4")), TypeError, "not of >f4"),
    "logits in columns": (lambda: statistics(np.zeros((3, 2), np.float32).T), ValueError, "lie in order"),
    "logits backwards": (lambda: statistics(ROWS[:, ::-1]), ValueError, "lie in order"),
    "rows on top of each other": (
        lambda: gradient(np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (2, 3), (4, 4))),
        ValueError,
        "lie in order",
    ),
    "one row alone": (lambda: statistics(ROWS[0]), ValueError, "student must be .rows, tokens."),
    "no rows": (lambda: statistics(ROWS[:0]), ValueError, "lie in order"),
    "teacher of another shape": (
        lambda: statistics(ROWS, ROWS[:, :2]),
        ValueError,
        r"teacher has logits \[2, 2\], the student \[2, 3\]",
    ),
    "temperature of 0": (lambda: statistics(ROWS, inverse=float("inf")), ValueError, "finite, got inf"),
    "no threads": (lambda: statistics(ROWS, threads=0), ValueError, "threads must be from 1"),
    "factor of one row of two": (
        lambda: gradient(ROWS, None, ROWS[0, :1]),
        ValueError,
        "a has 1 numbers for 2",
    ),
    "teacher without b": (lambda: gradient(ROWS, ROWS), ValueError, "b must be one-dimensional"),
    "logits that may not change": (lambda: gradient(READ_ONLY), ValueError, "not writeable"),
    "copy": (lambda: copy.copy(made_plan()), TypeError, "cannot pickle or copy"),
    "pickle": (lambda: pickle.dumps(_csrc.Streams(), 0), TypeError, "cannot pickle or copy"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        call()


def test_a_batch_that_no_memory_holds(tmp_path: Path) -> None:
    """2^21 rows of 2^38 tokens: rows x tokens x bytes is 0 in 64 bits."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    streams = _csrc.Streams()
    streams.add(path, 2, 2**39)
    rows = np.zeros(2**21, np.int32), np.zeros(2**21, np.int64)
    with pytest.raises(ValueError, match=f"{2**21} rows of {2**38} tokens do not fit"):
        streams.gather(*rows, 2**38, None)
    with pytest.raises(MemoryError):
        streams.whole_windows(*rows, 2**38)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "tokens").write_bytes(b"1234")
    odd = os.fsencode(tmp_path) + b"/\xff"
    Path(os.fsdecode(odd)).write_bytes(b"1234")
    streams = _csrc.Streams()
    for path, kind, message in (
        (tmp_path, ValueError, "is no regular file"),
        (tmp_path / "pipe", ValueError, "is no regular file"),
        (f"{tmp_path / 'tokens'}\0", ValueError, "null"),
        (odd, ValueError, "holds 4 bytes, but 3 tokens of 2"),
        (odd + b"?", FileNotFoundError, "No such file"),
        (7, TypeError, "PathLike"),
    ):
        with pytest.raises(kind, match=message):
            streams.add(path, 2, 3)
    streams.add(odd, 2, 2)
    assert streams.whole_windows([0], [0], 1).tolist() == [[0x3231, 0x3433]]


@pytest.mark.parametrize("ask", ["locate", "counts", "count", "position"])
def test_years_of_work_hear_ctrl_c(ask: str) -> None:
    plan = made_plan(True)
    arguments = (0, 2**61) if ask in ("count", "position") else (2**61,)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            getattr(plan, ask)(*arguments)
        assert plan.locate(7) == made_plan(True).locate(7)
        # A handler that asks the same plan would wait for itself.
        signal.signal(signal.SIGALRM, lambda *_: plan.locate(3))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(RuntimeError, match="from within one of its own calls"):
            plan.locate(2**61)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_arrays_may_change_while_they_are_read(tmp_path: Path) -> None:
    """The windows that were checked are those that are read, whatever another thread writes."""
    path = tmp_path / "tokens"
    np.arange(20_001, dtype=np.uint16).tofile(path)
    streams = _csrc.Streams()
    streams.add(path, 2, 20_001)
    source, window = np.zeros(200, np.int32), np.zeros(200, np.int64)
    samples, done = np.arange(20_000), threading.Event()
    plan = made_plan(True)

    def change() -> None:
        while not done.is_set():
            source[:] = 2**30
            samples[::3] = -1
            source[:] = 0
            samples[:] = np.random.default_rng(0).permutation(20_000)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(40):
            for call in (
                lambda: streams.gather(source, window, 1000, 0)[0],
                lambda: plan.locate_many(samples)[2],
            ):
                try:
                    answer = call()
                except IndexError:
                    continue
                assert answer.min() >= 0 and answer.max() < 1000
    finally:
        done.set()
        thread.join()
