"""The C++ tests beside the headers, under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "csrc" / "tests"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O0", "-g", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
BUILDS = [(path.stem, 8) for path in sorted(TESTS.glob("test_*.cpp"))]
# What a CPU without AVX-512, and one without any of it (arm64), would run.
BUILDS += [(name, width) for name in ("test_gather", "test_greedy") for width in (4, 2)]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(("name", "width"), BUILDS)
def test_header(name: str, width: int, tmp_path: Path) -> None:
    program = tmp_path / name
    flags = [*FLAGS, f"-DR1_MAX_WIDTH={width}"]
    subprocess.run([COMPILER, *flags, TESTS / f"{name}.cpp", "-o", program], check=True)
    run = subprocess.run([program, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
