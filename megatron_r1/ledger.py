"""One JSON line per stage of a run: what went in, what came out, and what it cost (appendix D.3)."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.run_dir import naming


def append(
    run: Path, stage: str, *, devices: int = 1, tokens: int = 0, seconds: float | None = None, **facts: Any
) -> None:
    """Add a line to `RUN/ledger.jsonl`.

    `seconds` is by default the age of this process, so that imports count as they should; device-hours
    are seconds x devices. A stage that ran again replaces nothing: the last line of a stage is the one
    that finished, earlier ones are what was spent besides.
    """
    if seconds is None:
        seconds = time.time() - process_start()
    line = {
        "stage": stage,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "devices": devices,
        "device_hours": seconds * devices / 3600,
        "tokens": tokens,
        **facts,
    }
    run.mkdir(parents=True, exist_ok=True)
    path = run / "ledger.jsonl"
    # One write of one line: a reader or a crash sees it whole or not at all.
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def process_start() -> float:
    """When this process began, seconds since the epoch."""
    return float(psutil.Process(os.getpid()).create_time())


def read(run: Path) -> list[dict[str, Any]]:
    """Every line, in order; a last line that a crash cut short is left out."""
    path = run / "ledger.jsonl"
    if not path.is_file():
        return []
    return list(read_jsonl(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSON-lines file up to the first incomplete one."""
    out = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                out.append(json.loads(line))
            except ValueError:
                break
    return out
