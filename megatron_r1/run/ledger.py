"""The ledger: one JSON line per stage with its inputs, outputs and cost (appendix D.3).

A run's own stages are in RUN/ledger.jsonl. Stages that serve any run (tokenizers, tokens, probing sets) have
a ledger.jsonl beside their outputs, tokens in PREFIX.side. `lineage` finds the stages that a run depends on,
by the hashes of its inputs.
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
        # A line that a full disk or a crash has cut short stays a line of its own.
        file.write((b"" if whole else b"\n") + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()


def process_start() -> float:
    """When this process began, seconds since the epoch."""
    return float(psutil.Process(os.getpid()).create_time())


def damaged(run: Path) -> int:
    """Lines that cannot be read, one that a crash cut short at the end left out."""
    path = run / "ledger.jsonl"
    return read_jsonl(path)[1] if path.is_file() else 0


def read(run: Path) -> list[dict[str, Any]]:
    """Every line, in order, without lines that a crash cut short and lines that are no stage."""
    path = run / "ledger.jsonl"
    lines = read_jsonl(path)[0] if path.is_file() else []
    needed = {"stage", "finished", "seconds", "devices", "device_hours", "tokens"}
    return [line for line in lines if needed <= line.keys()]


def lineage(root: Path) -> list[dict[str, Any]]:
    """Lines of the stages that made the inputs of `root`'s stages, and so on back, the oldest first.

    The lines are searched in the ledgers beside the inputs.
    """
    ledgers: dict[Path, list[dict[str, Any]]] = {root.resolve(): []}
    made: list[dict[str, Any]] = []
    readers = read(root)
    while readers:
        inputs = [item for line in readers for item in _hashes(line, "inputs").items()]
        paths = [Path(path).resolve() for path, _ in inputs]
        beside = {path.parent for path in paths} | {path.with_name(path.name + ".side") for path in paths}
        for folder in beside - ledgers.keys():
            ledgers[folder] = read(folder)
        wanted = {value for _, value in inputs}
        candidates = [line for lines in ledgers.values() for line in lines if line not in made]
        readers = [line for line in candidates if wanted & {*_hashes(line, "outputs").values()}]
        made = readers + made
    return sorted(made, key=lambda line: str(line["finished"]))


def _hashes(line: dict[str, Any], side: str) -> dict[str, str]:
    """Path -> hash. Empty for a line that an earlier version wrote without hashes."""
    hashes = line.get(side)
    return hashes if isinstance(hashes, dict) else {}


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and the number of its other lines, a last one cut short left out."""
    out, damaged = [], 0
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                out.append(value)
            elif line.endswith(b"\n"):
                damaged += 1
    return out, damaged
