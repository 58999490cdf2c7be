"""Real launches for tests: torchrun as a user types it, and what a checkpoint holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_r1.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = [
    str(ROOT / "examples/models/tiny.yaml"),
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.head_dim=16",
    "model.vocab_size=128",
]


def command(*words: object, ranks: int = 2, options: tuple[str, ...] = ()) -> list[str]:
    """Without options a launch that no other machine can reach, else torchrun's own."""
    plain = [str(ROOT / "examples/launch/one_machine.sh")]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options] if options else plain
    return [*launcher, "--nproc-per-node", str(ranks), *map(str, words)]


def listeners(process: psutil.Process) -> set[str]:
    """Addresses at which a process accepts connections."""
    with suppress(psutil.Error):
        return {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return set()


def family(pid: int) -> list[psutil.Process]:
    """A process and all that descends from it."""
    with suppress(psutil.Error):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def start(words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A launch in a process group of its own, its output in `log`."""
    with open(log, "ab") as stream:
        return subprocess.Popen(
            words,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment},
        )


def finish(words: list[str], log: Path, expect: int | None = 0, **environment: str) -> str:
    """Run to the end; its output. `expect` None: any failure will do."""
    process = start(words, log, **environment)
    status = process.wait(timeout=560)
    text = log.read_text(errors="replace")
    ok = status == expect if expect is not None else status != 0
    assert ok, f"status {status}:\n{text[-6000:]}"
    return text


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def write_corpus(prefix: Path, documents: int, seed: int, vocab: int = 128, end: int | None = None) -> None:
    """A dataset of short documents whose tokens follow a walk, so that there is something to learn.

    end: the last token of each document.
    """
    rng = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for _ in range(documents):
            steps = rng.integers(0, 4, size=int(rng.integers(40, 200)))
            tokens = ((np.cumsum(steps) + seed * 17) % (vocab - 1) + 1).astype(np.uint16)
            writer.add_document(tokens if end is None else np.append(tokens[:-1], np.uint16(end)))
        writer.finalize()


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint by name: weights and optimizer state."""
    from megatron_r1 import backend  # noqa: F401  (before megatron.core)
    from megatron_r1.config import ParallelConfig
    from megatron_r1.parallel import process_groups

    with process_groups(ParallelConfig()):
        from megatron.core.dist_checkpointing import load_plain_tensors

        return dict(_flat("", load_plain_tensors(str(checkpoint))))


def _flat(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(f"{path}/{key}", value)
    elif hasattr(node, "shape"):
        yield path, node


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit for bit."""
    import torch

    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() and len(a) > 10
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def seconds_in(text: str) -> float:
    """What the pipeline says it took."""
    return float(text.rpartition("stages done, ")[2].split(" s ")[0])
