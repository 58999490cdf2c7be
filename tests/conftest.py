"""Nothing is skipped by accident, and nothing is fetched.

The skipped tests must be those of skips.txt whose need is missing. Sockets of the tests connect to this
machine alone; what tests start is sent to a proxy that is not there.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Shared cores make single runs many times slower; a deadline would tell of nothing else.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Before any library reads them. The suite compares CPU results bit for bit, and it forks after torch is
# loaded. So it does not see a GPU; tests of the GPU start processes that do (tests/gpu).
os.environ.setdefault("SUITE_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_OFFLINE="1",
    # Read when triton is imported, where it is installed: kernels for a GPU run on the CPU.
    TRITON_INTERPRET="1",
    no_proxy="localhost,127.0.0.1,::1",
    **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
)
# Kernels run in Triton's interpreter, which is chosen when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
# Where tests run beside each other, threads of one would wait for cores of the other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Launches import the same modules again and again: let them keep what is compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _loopback_only(connect: Any) -> Any:
    def guarded(self: socket.socket, address: Any) -> Any:
        # A Unix socket's address is a path.
        if isinstance(address, tuple) and not _is_loopback(address[0]):
            raise AssertionError(f"a test connects to {address}; tests use no network")
        return connect(self, address)

    return guarded


for _name in ("connect", "connect_ex"):
    setattr(socket.socket, _name, _loopback_only(getattr(socket.socket, _name)))

_LIST = Path(__file__).parent / "skips.txt"


def _missing(needs: str) -> bool:
    return any(
        shutil.which(need) is None and importlib.util.find_spec(need) is None for need in needs.split(",")
    )


def _allowed() -> dict[str, str]:
    """Test -> what it needs."""
    lines = [line.split("#")[0].split() for line in _LIST.read_text().splitlines()]
    return {line[0]: line[1] for line in lines if line}


# Each file that takes long, the longest first: at the end no worker waits for another (Makefile).
_LONG = (
    "test_quickstart",
    "train/test_runs",
    "train/test_layouts",
    "train/test_steps",
    "report/test_page",
    "influence/test_score",
    "test_csrc",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / f"{name}.py": number for number, name in enumerate(_LONG)}
    assert all(path.exists() for path in place), f"a file of {_LONG} is not there"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus not in (0, pytest.ExitCode.OK):
        return
    skipped = {report.nodeid for report in reporter.stats.get("skipped", [])}
    # Of the reports: where tests run in several processes, this one collects no items.
    ran = skipped | {report.nodeid for report in reporter.stats.get("passed", [])}
    expected = {test for test, need in _allowed().items() if test in ran and _missing(need)}
    if skipped != expected:
        for test in sorted(skipped - expected):
            reporter.write_line(f"skipped, but not in {_LIST.name}: {test}", red=True)
        for test in sorted(expected - skipped):
            reporter.write_line(f"in {_LIST.name}, but ran: {test}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
