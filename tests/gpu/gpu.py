"""Processes that see the GPU, which tests/conftest.py hides from the suite itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

from tests.launch import ROOT


def has(*modules: str) -> bool:
    """This machine has a GPU, and Python has these modules."""
    return shutil.which("nvidia-smi") is not None and all(map(importlib.util.find_spec, modules))


def environment(visible: bool = True) -> dict[str, str]:
    """The variables of a process: on the GPU, or on the CPU of the same machine."""
    devices = os.environ["SUITE_VISIBLE_DEVICES"] if visible else ""
    path = os.pathsep.join([str(ROOT), *_path()])
    return {"CUDA_VISIBLE_DEVICES": devices, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}


def python(program: str, *words: object) -> str:
    """The output of a program that sees the GPU. Raises AssertionError with what it printed, if it fails."""
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment()}
    )
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stderr[-6000:]}"
    return done.stdout


def _path() -> list[str]:
    return [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
