"""Tests fetch nothing (tests/conftest.py)."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest


def test_only_this_machine_can_be_connected_to() -> None:
    """The address is one that nobody has (RFC 5737)."""
    with pytest.raises(AssertionError, match=r"203\.0\.113\.1"):
        socket.create_connection(("203.0.113.1", 80), timeout=0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_what_tests_start_finds_no_way_out() -> None:
    script = "import urllib.request as r; r.urlopen('http://203.0.113.1', timeout=1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Connection refused" in done.stderr
