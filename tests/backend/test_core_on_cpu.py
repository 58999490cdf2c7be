"""The CPU path: megatron-core bound to the CPU, torch left alone, and nothing of it where CUDA exists."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.backend import core_on_cpu

WITH_CUDA = """
import sys, torch
torch.cuda.is_available = lambda: True
before = list(sys.meta_path)
from megatron_r1 import backend
assert sys.meta_path == before, "an import hook is active"
assert backend.DISTRIBUTED_BACKEND == "nccl"
import importlib.util
loader = importlib.util.find_spec("megatron.core").loader
assert type(loader).__module__ != "megatron_r1.backend", type(loader)
"""
TOO_LATE = """
import sys, types
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
import megatron_r1.backend
"""
ON_CPU = """
import inspect, torch
real = {name: getattr(torch.cuda, name) for name in ("current_device", "Stream", "synchronize")}
from megatron_r1 import backend
import megatron.core.tensor_parallel.random as random
import megatron.core.pipeline_parallel.schedules as schedules
assert random.get_cuda_rng_tracker() is not None
assert real == {name: getattr(torch.cuda, name) for name in real}, "torch was changed"
assert "__cpu_as_cuda__" in vars(schedules)
assert 'device="cuda"' in open(inspect.getsourcefile(schedules)).read(), "the file on disk was changed"
assert backend.device().type == "cpu" and backend.DISTRIBUTED_BACKEND == "gloo"
"""


@pytest.mark.parametrize("code", [WITH_CUDA, ON_CPU], ids=["with CUDA", "on a CPU"])
def test_megatron_core_is_rewritten_on_a_cpu_and_only_there(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_rewritten_module_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its own bytes or the rules change; what is damaged is compiled again."""
    module = tmp_path / "module.py"
    module.write_text("where = 'cuda'\n")
    compiled: list[str] = []

    def counted(*words: Any, **named: Any) -> Any:
        compiled.append(words[1])
        return compile(*words, **named)

    monkeypatch.setattr(core_on_cpu, "compile", counted, raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)

    def run() -> str:
        names: dict[str, str] = {}
        exec(core_on_cpu._Loader("module", str(module)).get_code("module"), names)
        return names["where"]

    assert run() == run() == "cpu" and len(compiled) == 1
    (cached,) = (tmp_path / "__pycache__").iterdir()
    cached.write_bytes(cached.read_bytes()[:40])
    assert run() == "cpu" and len(compiled) == 2
    module.write_text("where = 'cuda' + '0'\n")
    assert run() == "cpu0" and len(compiled) == 3
    monkeypatch.setattr(core_on_cpu, "_RULES", b"other rules")
    assert run() == "cpu0" and len(compiled) == 4


def test_importing_too_late_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", TOO_LATE], capture_output=True, text=True)
    assert "was imported before megatron_r1.backend; import megatron_r1.backend first" in done.stderr


def test_what_megatron_core_logs_at_every_start_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Lines of 0.19 alone; another line of the same logger is heard."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. Use another")
    logger.warning("a mistake of GPTModel IS DEPRECATED")
    assert [record.msg for record in caplog.records] == ["a mistake of GPTModel IS DEPRECATED"]
    if importlib.metadata.version("megatron-core") >= "0.19":
        sources = [
            Path(importlib.util.find_spec(name).origin or "").read_text()  # type: ignore[union-attr]
            for name in (
                "megatron.core.models.gpt.gpt_model",
                "megatron.core.distributed.distributed_data_parallel",
                "megatron.core.dist_checkpointing.strategies.torch",
            )
        ]
        begun = (
            "GPTModel IS DEPRECATED",
            "DistributedDataParallel: full_param_layout not",
            "MCore's async save",
        )
        assert all(f'"{text}' in source for text, source in zip(begun, sources, strict=True))
