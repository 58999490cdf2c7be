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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_r1.system.files import naming, ours
from megatron_r1.system.json_io import parse_json

Hashes = Mapping[str, str]
"""Path as the stage was given it -> hash of what lay there."""
MOST_LINE, MOST_LEDGER = 32 << 20, 64 << 20
"""Bytes of a line, and of a ledger. A line with 100,000 inputs has about 20 MB."""
MOST_DEVICES = 1 << 20


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
    seconds = time.time() - process_start() if seconds is None else seconds
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
    with naming(path), open(path, "ab+", opener=ours) as file:
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
    path = directory / "ledger.jsonl"
    damaged = sum(line is None for line in read_jsonl(path, _is_stage, MOST_LEDGER))
    return f"{path}: {damaged} of its lines cannot be read; what they cost is left out" if damaged else ""


def read(directory: Path) -> list[dict[str, Any]]:
    """Every line, in order, without lines that a crash cut short and lines that are no stage.

    Inputs and outputs are path -> hash. Lines of an earlier version have the paths alone, or nothing. Their
    hashes are empty.
    """
    lines = [line for line in read_jsonl(directory / "ledger.jsonl", _is_stage, MOST_LEDGER) if line]
    for line in lines:
        for side in ("inputs", "outputs"):
            files = line.get(side) or {}
            line[side] = files if isinstance(files, dict) else dict.fromkeys(files, "")
    return lines


def _is_stage(line: dict[str, Any]) -> bool:
    """Whether a line has what its readers rely on."""
    texts: list[Any] = [line.get("stage"), line.get("finished")]
    for files in (line.get("inputs") or {}, line.get("outputs") or {}):
        if not isinstance(files, (dict, list)):
            return False
        texts += [*files, *(files.values() if isinstance(files, dict) else ())]
    try:
        named = "\n".join(texts).encode()
    except (TypeError, UnicodeEncodeError):  # No text, or half a character.
        return False
    numbers: list[Any] = [line.get(name) for name in ("seconds", "device_hours", "tokens", "devices")]
    # Sums of them stay numbers.
    if not all(is_number(value) and 0 <= value < 1 << 63 for value in numbers):
        return False
    whole = type(line["tokens"]) is type(line["devices"]) is int and line["devices"] <= MOST_DEVICES
    return whole and b"\0" not in named and bool(line["stage"].strip())


def lineage(root: Path) -> list[dict[str, Any]]:
    """Lines of the stages that made the inputs of `root`'s stages, and so on back, the oldest first.

    The lines are searched in the ledgers beside the inputs, of which at most `MOST_LEDGER` bytes are read.
    """
    looked, ledgers, left = set[str](), {_file(str(root))[:2]}, MOST_LEDGER
    makers: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    """Hash -> the lines of the stages that made it, each with its number among all."""
    made, seen, count = list[dict[str, Any]](), set[str](), 0
    readers = read(root)
    while readers:
        for folder in _beside(path for line in readers for path in line["inputs"]):
            if folder in looked:
                continue
            looked.add(folder)
            device, number, size = _file(folder)
            if (device, number) in ledgers or size > left:
                continue
            ledgers.add((device, number))
            left -= size
            for line in read(Path(folder)):
                count += 1
                for value in {*line["outputs"].values()}:
                    makers.setdefault(value, []).append((count, line))
        wanted = dict.fromkeys(value for line in readers for value in line["inputs"].values() if value)
        found = dict(one for value in wanted for one in makers.pop(value, ()))
        keys = {json.dumps(line, sort_keys=True): line for _, line in sorted(found.items())}
        readers = [line for key, line in keys.items() if key not in seen]
        seen |= keys.keys()
        made = readers + made
    return sorted(made, key=lambda line: str(line["finished"]))


def _beside(paths: Iterable[str]) -> Iterator[str]:
    """Folders whose ledgers may have the lines of the stages that made these files and datasets."""
    for path in dict.fromkeys(paths):
        # A folder that is not there costs no more than this.
        if os.path.isdir(os.path.dirname(os.path.abspath(path))):
            real = os.path.realpath(path)
            yield from (os.path.dirname(real), f"{real}.side")


def _file(folder: str) -> tuple[int, int, int]:
    """Device, number and bytes of the folder's ledger; zeros where there is none."""
    with suppress(OSError, ValueError):
        status = os.stat(os.path.join(folder, "ledger.jsonl"))
        return status.st_dev, status.st_ino, status.st_size
    return 0, 0, 0


def is_number(value: Any) -> bool:
    """Whether a value of a JSON line is a number that a float holds."""
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64)


def read_jsonl(
    path: Path, holds: Callable[[dict[str, Any]], bool], most: int | None = None
) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON-lines file for which `holds`, and None for each other line.

    A last line that was cut short is left out. A file that is not there, or no regular one, has no lines. A
    line of more than `MOST_LINE` bytes is one that does not hold, and so is all that follows `most` bytes.
    """
    # os.path's answers are no errors, however long the name.
    with open(path if os.path.isfile(path) else os.devnull, "rb") as file:
        while line := file.readline(MOST_LINE):
            value = None
            if most is not None and file.tell() > most:
                yield None
                return
            with suppress(ValueError):
                value = parse_json(line, "")
            if isinstance(value, dict) and holds(value):
                yield value
            elif line.endswith(b"\n") or len(line) == MOST_LINE:
                yield None
                # The rest of a line that is too long.
                while line and not line.endswith(b"\n"):
                    line = file.readline(MOST_LINE)
