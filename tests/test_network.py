"""Tests fetch nothing (tests/conftest.py), and a launch on one machine can be reached from nowhere else."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from megatron_r1 import parallel
from megatron_r1.config import ParallelConfig
from tests import launch
from tests.distributed import on_ranks


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


def _listen(environment: dict[str, str | None]) -> tuple[set[str], dict[str, str | None]]:
    for name, value in environment.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    with parallel.process_groups(ParallelConfig()):
        asked = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        return launch.listeners(psutil.Process()), {name: os.environ.get(name) for name in asked}


@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_WORLD_SIZE": "1"},
        {"MASTER_ADDR": socket.gethostname()},
        {"TORCHELASTIC_ERROR_FILE": "attempt/0/error.json", "MASTER_PORT": "1"},
    ],
)
def test_ranks_on_one_machine_listen_there_alone(environment: dict[str, str], tmp_path: Path) -> None:
    """Also where a launcher tells no local ranks, but a loopback address, and where torchrun has no store."""
    (tmp_path / "attempt").mkdir()
    if file := environment.get("TORCHELASTIC_ERROR_FILE"):
        environment = {**environment, "TORCHELASTIC_ERROR_FILE": str(tmp_path / file)}
    for listened, interfaces in on_ranks(2, _listen, environment):
        assert listened == {"127.0.0.1"}
        assert set(interfaces.values()) == {"lo"}


def test_an_interface_that_the_user_names_stays() -> None:
    for _, interfaces in on_ranks(2, _listen, {"NCCL_SOCKET_IFNAME": "eth7"}):
        assert interfaces["NCCL_SOCKET_IFNAME"] == "eth7"


def test_ranks_on_several_machines_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node0"}.items():
        monkeypatch.setenv(name, value)
    assert not parallel.on_one_machine()
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    assert not parallel.on_one_machine()


def test_a_process_alone_listens_here() -> None:
    """Without a launcher there is no store."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    [(listened, _)] = on_ranks(1, _listen, dict.fromkeys(names))
    assert listened == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 cannot be opened"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment is no number"),
        ({"RANK": "-1"}, "RANK='-1' in the environment is no number"),
        ({"RANK": "1"}, "RANK=1 in the environment is not below WORLD_SIZE=1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 in the environment is no number of ranks"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two' in the environment is no number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999"),
    ],
)
def test_an_environment_that_is_none_is_one_line(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**usual, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        parallel.launch_store(timedelta(seconds=1))
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(("tool", "value"), [("train", "0"), ("compute_influence", "x")])
def test_a_number_of_ranks_that_is_none_is_one_line(tool: str, value: str, tmp_path: Path) -> None:
    words = [str(launch.ROOT / f"tools/{tool}.py"), str(launch.ROOT / "examples/models/tiny.yaml"), "--check"]
    words += ["data={sources: {a: {prefix: none}}, seq_length: 8}", "phases={one: {steps: 1}}"]
    words += [f"train={{run: {tmp_path}, global_batch: 1, micro_batch: 1}}"]
    environment = {**os.environ, "PYTHONPATH": str(launch.ROOT), "WORLD_SIZE": value}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "WORLD_SIZE=" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr) < 1000


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        usual = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in usual.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(OSError, match=f"MASTER_PORT={port} cannot be opened on 127.0.0.1: .*in use"):
            parallel.launch_store(timedelta(seconds=1))


def test_a_launch_without_its_first_rank_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**usual, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "_TIMEOUT", timedelta(seconds=1))
    message = r"no store of the launch at 127\.0\.0\.1:1: .*timed out"
    with pytest.raises(OSError, match=message) as raised, parallel.process_groups(ParallelConfig()):
        pass
    assert "\n" not in str(raised.value)


def _exchange() -> tuple[Any, Any]:
    def refuse(*_: object) -> None:
        raise AssertionError("a pickle from another rank")

    with (
        parallel.process_groups(ParallelConfig()) as context,
        mock.patch.object(pickle, "loads", refuse),
        mock.patch("torch.distributed.distributed_c10d._unpickler", refuse),
    ):
        mine = {"rank": context.rank, "text": "\udc80ü" * context.rank, "none": None}
        return parallel.gather_objects(mine), parallel.broadcast_object([0.1, mine] if context.leads else 7)


def test_ranks_unpickle_nothing_of_one_another() -> None:
    gathered, sent = on_ranks(2, _exchange)[1]
    zero, one = ({"rank": rank, "text": "\udc80ü" * rank, "none": None} for rank in range(2))
    assert gathered == [zero, one]
    assert sent == [0.1, zero]
