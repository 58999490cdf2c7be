"""What a run reports: one JSON line a step, and the same figures in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1.ledger import read_jsonl
from megatron_r1.run_dir import RunDir, write_text


class MetricsLog:
    """`RUN/metrics.jsonl` and `RUN/tb`, cut back to `step` so that a resumed run writes no step twice."""

    def __init__(self, run: RunDir, step: int):
        # Imported here: half a second that the other ranks need not spend.
        from torch.utils.tensorboard import SummaryWriter

        if run.metrics.exists():
            kept = [line for line in read_jsonl(run.metrics) if line["step"] <= step]
            write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        run.root.mkdir(parents=True, exist_ok=True)
        self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Nested groups become TensorBoard's `group/name`."""
        self._file.write(json.dumps(line) + "\n")
        step = line["step"]
        for key, value in line.items():
            group = _GROUPS.get(key, key)
            if isinstance(value, dict):
                for name, leaf in value.items():
                    self._board.add_scalar(f"{group}/{name}", leaf, step)
            elif isinstance(value, (int, float)) and key != "step":
                self._board.add_scalar(group, value, step)

    def flush(self) -> None:
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


_GROUPS = {
    "loss": "loss/train",
    "learning_rate": "schedule/learning_rate",
    "grad_norm": "health/grad_norm",
    "tokens_per_second": "throughput/tokens_per_second",
    "mfu": "throughput/mfu",
    "seconds": "throughput/seconds_per_step",
    "samples": "progress/samples",
    "tokens": "progress/tokens",
    "mix_target": "mix/target",
    "mix_actual": "mix/actual",
}


def read(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []
