"""One JSON line per stage: what went in, what came out, and what it cost (appendix D.3).

A run's own stages are in RUN/ledger.jsonl. What is made for any run (tokenizers, tokens, probing sets) is
told in a ledger.jsonl beside it; there `lineage` finds the stages that a run stands on, by the hashes of
what it has read.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.system.files import naming

Hashes = Mapping[str, str]
"""Path as the stage was given it -> hash of what lay there."""


def append(
    directory: Path,
    stage: str,
    *,
    devices: int = 1,
    tokens: int = 0,
    seconds: float | None = None,
    inputs: Hashes | None = None,
    outputs: Hashes | None = None,
) -> None:
    """Add a line to `directory`/ledger.jsonl. Stages call `run.stage.finish`.

    `seconds` is by default the age of this process, so that imports count. Device-hours are seconds x
    devices. A stage that ran again replaces nothing: its last line is of the launch that finished, earlier
    lines are what was spent besides.
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
        "inputs": dict(inputs or {}),
        "outputs": dict(outputs or {}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "ledger.jsonl"
    with naming(path), open(path, "ab+") as file:
        # Shards on several nodes share a folder; where a file system has no locks, one write of one line.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size
        whole = not size or os.pread(file.fileno(), 1, size - 1) == b"\n"
        # What a full disk or a crash has cut short stays a line of its own.
        file.write(b"" if whole else b"\n")
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()


def process_start() -> float:
    """When this process began, seconds since the epoch."""
    return float(psutil.Process(os.getpid()).create_time())


def read(run: Path) -> list[dict[str, Any]]:
    """Every line, in order; what a crash cut short, and what is no stage, is left out."""
    path = run / "ledger.jsonl"
    lines = read_jsonl(path)[0] if path.is_file() else []
    needed = {"stage", "finished", "seconds", "devices", "device_hours", "tokens"}
    return [line for line in lines if needed <= line.keys()]


def lineage(root: Path) -> list[dict[str, Any]]:
    """Stages told beside what the stages of `root` have read, that made it, and so on; the oldest first."""
    told: dict[Path, list[dict[str, Any]]] = {root.resolve(): []}
    found: list[dict[str, Any]] = []
    readers = read(root)
    while readers:
        inputs = [item for line in readers for item in _hashes(line, "inputs")]
        for folder in {Path(path).resolve().parent for path, _ in inputs} - told.keys():
            told[folder] = read(folder)
        wanted = {value for _, value in inputs}
        candidates = [line for lines in told.values() for line in lines if line not in found]
        readers = [line for line in candidates if wanted & {value for _, value in _hashes(line, "outputs")}]
        found = readers + found
    return sorted(found, key=lambda line: str(line["finished"]))


def _hashes(line: dict[str, Any], side: str) -> list[tuple[str, str]]:
    """Nothing of a line that an earlier version wrote without hashes."""
    told = line.get(side)
    return list(told.items()) if isinstance(told, dict) else []


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many of its lines are none, but for a last one cut short."""
    out, damaged = [], 0
    with open(path, "rb") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if isinstance(found, dict):
                out.append(found)
            elif line.endswith(b"\n"):
                damaged += 1
    return out, damaged
