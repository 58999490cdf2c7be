"""What a run reports: one JSON line a step, the same figures in TensorBoard, and a log of each rank."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1.run.layout import RunDir
from megatron_r1.run.ledger import read_jsonl
from megatron_r1.system.files import naming, write_text
from megatron_r1.system.terminal import say
from megatron_r1.train.loggers import Logger


class MetricsLog:
    """`RUN/metrics.jsonl` and `RUN/tb`, cut back to `step` so that a resumed run writes no step twice."""

    def __init__(self, run: RunDir, step: int, others: Sequence[Logger] = ()):
        # Imported here: half a second that the other ranks need not spend.
        from torch.utils.tensorboard import SummaryWriter

        if run.metrics.exists():
            kept = [line for line in read(run.metrics) if line["step"] <= step]
            write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        run.root.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
        self._others = others

    def write(self, line: dict[str, Any]) -> None:
        """Nested groups become TensorBoard's `group/name`."""
        with naming(self._run.metrics):
            self._file.write(json.dumps(line) + "\n")
        scalars = _scalars(line)
        for name, value in scalars.items():
            self._board.add_scalar(name, value, line["step"])
        for other in self._others:
            other.log(scalars, line["step"])

    def flush(self) -> None:
        with naming(self._run.metrics):
            self._file.flush()
        with naming(self._run.tensorboard):
            self._board.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        self._board.close()
        for other in self._others:
            other.close()


class RankLog:
    """`RUN/logs/rank_N.log`: a line a step of what this rank did; the first rank's also says the loss."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (open as long as the run)

    def write(self, text: str) -> None:
        with naming(self._path):
            self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def close(self) -> None:
        self._file.close()


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """`group/name` -> value of everything in a step's line that is a number."""
    out: dict[str, float] = {}
    for key, value in line.items():
        group = _GROUPS.get(key, key)
        if isinstance(value, dict):
            out |= {f"{group}/{name}": leaf for name, leaf in value.items()}
        elif isinstance(value, (int, float)) and key != "step":
            out[group] = value
    return out


_GROUPS = {
    "loss": "loss/train",
    "learning_rate": "schedule/learning_rate",
    "grad_norm": "health/grad_norm",
    "rank_me": "health/rank_me",
    "skipped": "health/skipped",
    "slowest_rank": "health/slowest_rank",
    "slowest_ratio": "health/slowest_ratio",
    "memory_bytes": "health/memory_bytes",
    "tokens_per_second": "throughput/tokens_per_second",
    "mfu": "throughput/mfu",
    "seconds": "throughput/seconds_per_step",
    "saving_seconds": "throughput/saving_seconds",
    "ranks": "progress/ranks",
    "samples": "progress/samples",
    "tokens": "progress/tokens",
    "mix_target": "mix/target",
    "mix_actual": "mix/actual",
}


def read(path: Path) -> list[dict[str, Any]]:
    """The steps of a run, in order; says what cannot be read, and leaves it out."""
    lines, damaged = read_jsonl(path) if path.exists() else ([], 0)
    if damaged:
        say(f"{path}: {damaged} of its lines cannot be read; the steps they tell of are left out")
    return lines
