"""What is installed: every package that constraints.txt names, held to hashes, and no code of a dataset."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.launch import ROOT

HASHED = (ROOT / "constraints-hashed.txt").read_text().replace("\\\n", "")


def _pins(text: str) -> set[tuple[str, str, str]]:
    """Name, version and the Python it is for."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)(?: *; *python_(?:full_)?version ([<>=]+))?", text, re.M)
    return {(re.sub(r"[-_.]+", "-", name).lower(), version, marker) for name, version, marker in found}


def test_hashes_are_of_what_is_pinned() -> None:
    """`make lock` was run after constraints.txt changed. torch has builds without public hashes."""
    pinned = _pins((ROOT / "constraints.txt").read_text())
    assert {pin for pin in pinned if pin[0] != "torch"} == _pins(HASHED)
    for line in HASHED.splitlines():
        assert line[:1] in ("", "#") or re.search(r"==\S+ .*--hash=sha256:[0-9a-f]{64}", line), line


def test_no_dataset_brings_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "datasets>=4" in project["dependencies"]
    for folder in ("megatron_r1", "tools", "examples"):
        for path in Path(ROOT, folder).rglob("*.py"):
            assert not re.search(r"trust_remote_code *= *True", path.read_text()), path
