"""The ledger: one JSON line per stage with its inputs, outputs and cost (appendix D.3).

A run's own stages are in RUN/ledger.jsonl. Stages that serve any run (tokenizers, tokens, probing sets) have
a ledger.jsonl beside their outputs, tokens in PREFIX.side. `lineage` finds the stages that a run depends on,
by the hashes of its inputs.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
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


def describe_damage(directory: Path) -> str:
    """How many lines of a ledger cannot be read, empty where all can."""
    damaged = sum(line is None for line in read_jsonl(directory / "ledger.jsonl", _is_stage))
    path = directory / "ledger.jsonl"
    return f"{path}: {damaged} of its lines cannot be read; what they cost is left out" if damaged else ""


def read(directory: Path) -> list[dict[str, Any]]:
    """Every line, in order, without lines that a crash cut short and lines that are no stage.

    Inputs and outputs are path -> hash. Lines of an earlier version have the paths alone, or nothing. Their
    hashes are empty.
    """
    lines = [line for line in read_jsonl(directory / "ledger.jsonl", _is_stage) if line]
    for line in lines:
        for side in ("inputs", "outputs"):
            files = line.get(side) or {}
            line[side] = files if isinstance(files, dict) else dict.fromkeys(files, "")
    return lines


def _is_stage(line: dict[str, Any]) -> bool:
    """Whether a line has what its readers rely on."""
    texts = [line.get("stage"), line.get("finished")]
    for files in (line.get("inputs") or {}, line.get("outputs") or {}):
        if not isinstance(files, (dict, list)):
            return False
        texts += [*files, *(files.values() if isinstance(files, dict) else ())]
    numbers: list[Any] = [line.get(name) for name in ("seconds", "device_hours", "tokens", "devices")]
    return (
        all(isinstance(text, str) and "\0" not in text for text in texts)
        and bool(line["stage"].strip())
        and all(is_number(value) and 0 <= value < math.inf for value in numbers)
        and isinstance(line["tokens"], int)
        and isinstance(line["devices"], int)
    )


def lineage(root: Path) -> list[dict[str, Any]]:
    """Lines of the stages that made the inputs of `root`'s stages, and so on back, the oldest first.

    The lines are searched in the ledgers beside the inputs.
    """
    ledgers: dict[Path, list[dict[str, Any]]] = {root.resolve(): []}
    made: list[dict[str, Any]] = []
    readers = read(root)
    while readers:
        inputs = [item for line in readers for item in line["inputs"].items()]
        paths = [Path(path).resolve() for path, _ in inputs]
        beside = {path.parent for path in paths} | {path.with_name(path.name + ".side") for path in paths}
        for folder in beside - ledgers.keys():
            ledgers[folder] = read(folder)
        wanted = {value for _, value in inputs if value}
        candidates = [line for lines in ledgers.values() for line in lines if line not in made]
        readers = [line for line in candidates if wanted & {*line["outputs"].values()}]
        made = readers + made
    return sorted(made, key=lambda line: str(line["finished"]))


def is_number(value: Any) -> bool:
    """Whether a value of a JSON line is a number that a float holds."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)


def read_jsonl(path: Path, holds: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON-lines file for which `holds`, and None for each other line.

    A last line that was cut short is left out. A file that is not there has no lines.
    """
    # os.path's answers are no errors, however long the name.
    with open(path if os.path.isfile(path) else os.devnull, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict) and holds(value):
                yield value
            elif line.endswith(b"\n"):
                yield None
