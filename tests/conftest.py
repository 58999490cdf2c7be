"""Nothing is skipped by accident: the skipped tests must be those of skips.txt whose need is missing."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

# Shared cores make single runs many times slower; a deadline would tell of nothing else.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

_LIST = Path(__file__).parent / "skips.txt"


def _missing(need: str) -> bool:
    return shutil.which(need) is None and importlib.util.find_spec(need) is None


def _allowed() -> dict[str, str]:
    """Test -> what it needs."""
    lines = [line.split("#")[0].split() for line in _LIST.read_text().splitlines()]
    return {line[0]: line[1] for line in lines if line}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or exitstatus not in (0, pytest.ExitCode.OK):
        return
    skipped = {report.nodeid for report in reporter.stats.get("skipped", [])}
    ran = {item.nodeid for item in session.items}
    expected = {test for test, need in _allowed().items() if test in ran and _missing(need)}
    if skipped != expected:
        for test in sorted(skipped - expected):
            reporter.write_line(f"skipped, but not in {_LIST.name}: {test}", red=True)
        for test in sorted(expected - skipped):
            reporter.write_line(f"in {_LIST.name}, but ran: {test}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
