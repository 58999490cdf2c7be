"""train.deterministic: what it sets, and that no step calls what torch has no deterministic form of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.train import loop
from tests.distributed import on_ranks
from tests.train import small

EOD = 7
PATHS = {
    "plain": (),
    "the rest": (
        "train.precision=bf16",
        "train.head_chunk=16",
        "train.recompute=full",
        "optimizer.z_loss=1e-4",
        f"data.eod={EOD}",
        "data.cross_documents=false",
    ),
}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU as far as the environment and torch's switch go, both as they were afterwards."""
    for name in backend._SAME_BITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "HAS_CUDA", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_gpu_is_set_before_it_is_used(pretended: None) -> None:
    backend.compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_NVLS_ENABLE"] == os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


def test_variables_that_were_chosen_are_kept_or_refused_by_name(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    backend.compute_deterministically()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    for name in backend._SAME_BITS:
        with monkeypatch.context() as other:
            other.setenv(name, "1")
            with pytest.raises(
                ValueError, match=f"train.deterministic=true, but {name}=1 in the environment"
            ):
                backend.compute_deterministically()


def test_on_a_cpu_nothing_is_set() -> None:
    before = dict(os.environ)
    backend.compute_deterministically()
    assert dict(os.environ) == before and not torch.are_deterministic_algorithms_enabled()


def without_deterministic_form() -> set[str]:
    """Operators that raise on a GPU under the switch, by the list in torch's own documentation."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    section = text[text.index("operations will throw a") : text.index("In addition, several operations fill")]
    names = re.findall(r":(?:func|class):`~?torch\.(?:\w+\.)*(\w+)` ?", section)
    # Of quantized tensors alone.
    return {_plain(name) for name in names if name != "resize_"}


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def _trained(config: Config, strict: bool) -> set[str]:
    """Operators that a run calls; strict: under torch's switch."""
    torch.use_deterministic_algorithms(strict)
    with Called() as called:
        loop.train(config)
    return called.names


def _refused(config: Config) -> bool:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = "none"
    backend.HAS_CUDA = True
    try:
        loop.train(config)
    except ValueError as error:
        return "CUBLAS_WORKSPACE_CONFIG=none" in str(error)
    return False


def test_a_run_that_is_refused_has_written_nothing(tmp_path: Path) -> None:
    small.written(tmp_path)
    assert on_ranks(1, _refused, small.config(tmp_path, "run", 1, "train.deterministic=true")) == [True]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", PATHS)
def test_a_step_calls_nothing_without_a_deterministic_form(tmp_path: Path, path: str) -> None:
    """Also, the switch leaves a CPU's bits alone, and may be set for the rest of a run."""
    small.written(tmp_path, end=EOD)
    plain, strict = (
        small.config(tmp_path, name, 2, "model.num_layers=2", "train.probe_every=1", *PATHS[path], *more)
        for name, more in (("plain", ()), ("strict", ("train.deterministic=true",)))
    )
    on_ranks(1, _trained, plain, False)
    (names,) = on_ranks(1, _trained, strict, True)
    assert {"index_add_", "embedding", "_fused_adamw_"} <= names
    forbidden = without_deterministic_form()
    assert {"nllloss", "cumsum", "put", "bincount", "median"} <= forbidden
    assert not {name for name in names if _plain(name).startswith(tuple(forbidden))}
    assert small.figures(tmp_path / "plain") == small.figures(tmp_path / "strict")
    saved = [
        checkpoint_files.complete_checkpoints(tmp_path / run / "checkpoints") for run in ("plain", "strict")
    ]
    weights = [{p.name: p.read_bytes() for p in refs[-1].path.glob("*.distcp")} for refs in saved]
    assert weights[0] and weights[0] == weights[1]
