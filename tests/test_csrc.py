"""The C++ tests beside the headers, under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "csrc" / "tests"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", sorted(path.stem for path in TESTS.glob("test_*.cpp")))
def test_header(name: str, tmp_path: Path) -> None:
    program = tmp_path / name
    subprocess.run([COMPILER, *FLAGS, TESTS / f"{name}.cpp", "-o", program], check=True)
    run = subprocess.run([program, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
