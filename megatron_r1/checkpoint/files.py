"""Checkpoints as files: which are complete, what they say of themselves, whether they are as written.

CHECKPOINTS/step_00000120/ appears by a rename once all of it is on the disk and goes by one before any of
it is deleted, so that what has the name is whole. In it, beside megatron-core's files, `megatron_r1.json`
holds the training state and a checksum of every file, itself included.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_r1.config import ModelConfig
from megatron_r1.records import CheckpointRef, TrainState
from megatron_r1.system.errors import suggest_path
from megatron_r1.system.files import json_bytes, naming, sha256, sync

META = "megatron_r1.json"
_FORMAT = 2
_CHUNK = 4 << 20
_ROOM = ".room"
_RESERVE = 8 << 20
"""Bytes kept free, while the shards are written, for what the first rank alone writes in the end."""

FileFacts = dict[str, list[Any]]
"""Name -> [bytes, checksum]."""


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def temporary_path(directory: Path, step: int) -> Path:
    """Where `step_path` is written, on the same file system."""
    return directory / f".step_{step:08d}.tmp"


def begin(directory: Path, step: int) -> Path:
    """An empty directory to write a checkpoint to, out of sight, and room for what comes last.

    One process at a time: what earlier ones left, discarded or half written, is deleted. Raises OSError
    where the disk is full or not writable, and leaves nothing then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with naming(directory), open(directory / _ROOM, "wb") as room:
            os.posix_fallocate(room.fileno(), 0, _RESERVE)
        temporary = temporary_path(directory, step)
        temporary.mkdir()
    except OSError:
        release(directory)
        raise
    return temporary


def release(directory: Path) -> None:
    """Give back the room that `begin` has kept."""
    (directory / _ROOM).unlink(missing_ok=True)


def publish(
    temporary: Path,
    final: Path,
    facts: FileFacts,
    state: TrainState,
    model: ModelConfig,
    phase: str,
    plan: str,
) -> None:
    """Give a checkpoint whose `facts` files are on the disk its description and its name."""
    meta = {
        "format": _FORMAT,
        "phase": phase,
        "state": dataclasses.asdict(state),
        "model": dataclasses.asdict(model),
        "plan": plan,
        "files": dict(sorted(facts.items())),
    }
    path = temporary / META
    with naming(path):
        path.write_bytes(json_bytes({**meta, "checksum": _own_checksum(meta)}))
    sync(path)
    sync(temporary)
    if final.exists():
        discard(final)
    os.rename(temporary, final)
    sync(final.parent)


def discard(path: Path) -> Path:
    """Take a checkpoint's name away. Where it is now, for `shutil.rmtree`; a later `begin` deletes it too."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    sync(path.parent)
    return hidden


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(int(p.parent.name.removeprefix("step_")) for p in directory.glob(f"step_*/{META}"))


def found(directory: Path) -> list[CheckpointRef]:
    """Complete checkpoints under `directory`, in training order.

    None is read: one that has been damaged since is refused by whoever reads it, and in nobody else's way.
    """
    return [CheckpointRef(step_path(directory, step), step) for step in saved_steps(directory)]


def damaged(directory: Path) -> list[Path]:
    """Complete checkpoints whose description can no longer be read. Costs that read of each."""
    out = []
    for ref in found(directory):
        try:
            read_meta(ref.path)
        except (OSError, ValueError):
            out.append(ref.path)
    return out


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises ValueError where there is none, or it is damaged."""
    try:
        meta = json.loads((path / META).read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is no complete checkpoint ({META} is missing); name a step_N directory"
            f"{suggest_path(path)}"
        ) from None
    except ValueError:
        meta = None
    if isinstance(meta, dict) and meta.get("format") == 1:
        raise ValueError(f"{path} has no checksums: an earlier version wrote it; begin a new run")
    if not isinstance(meta, dict) or meta.pop("checksum", None) != _own_checksum(meta):
        raise_corrupt(path, [f"{META} is not as it was written"])
    return meta


def identity(path: Path) -> str:
    """What tells a checkpoint from any other: the SHA-256 of its description, which has all checksums."""
    return sha256(path / META)


NOT_WEIGHTS = ("rotary_base", "rope_scaling", "init_std")
"""Fields of a model that the same weights can be used with other values of."""


def check_model(path: Path, model: ModelConfig, but: Container[str] = ()) -> dict[str, Any]:
    """`read_meta` of a checkpoint of this model, fields `but` aside. Raises ValueError when it holds
    another one."""
    meta = read_meta(path)
    theirs = meta["model"]
    changed = [
        f"{key} {theirs.get(key)} there, {value} here"
        for key, value in dataclasses.asdict(model).items()
        if theirs.get(key) != value and key not in but
    ]
    if changed:
        raise ValueError(f"{path} holds another model: {'; '.join(changed)}")
    return meta


def facts_of(paths: Iterable[Path]) -> FileFacts:
    """Size and checksum of files, read once."""
    return {path.name: [path.stat().st_size, _checksum(path)] for path in paths}


def corruptions(path: Path, files: FileFacts, rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint, of which this rank reads its share."""
    out = []
    for name, (size, checksum) in sorted(files.items(), key=lambda item: -item[1][0])[rank::ranks]:
        file = path / name
        if not file.is_file():
            out.append(f"{name} is missing")
        elif file.stat().st_size != size:
            out.append(f"{name} has {file.stat().st_size} bytes where {size} were saved")
        elif _checksum(file) != checksum:
            out.append(f"{name} is not as it was written (its checksum differs)")
    return out


def raise_corrupt(path: Path, corruptions: list[str]) -> None:
    """Raise ValueError that names the corruptions, if there are any."""
    if corruptions:
        raise ValueError(
            f"{path} is damaged: {'; '.join(corruptions)}; remove it: training continues from an earlier "
            f"one, scoring leaves it out"
        )


def _own_checksum(meta: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode()).hexdigest())


def _checksum(path: Path) -> str:
    """XXH3 of 128 bits: finds every fault of a disk or a copy, faster than memory is read; no seal
    against whoever means to deceive, who could as well write a checkpoint of his own."""
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return str(state.hexdigest())


@dataclass(frozen=True)
class Retention:
    last: int | None = None
    """Newest checkpoints that stay; None: all."""
    every: int | None = None
    """Steps whose multiples stay."""
    steps: frozenset[int] = frozenset()
    """Steps that stay: ends of phases, and what influence is to score."""

    def surplus(self, saved: list[int]) -> list[int]:
        """Steps among `saved` that may go, oldest first."""
        if self.last is None:
            return []
        older = sorted(saved)[: -self.last]
        return [s for s in older if s not in self.steps and not (self.every and s % self.every == 0)]


def evenly_spaced(start: int, end: int, count: int) -> list[int]:
    """`count` steps that divide (start, end] evenly, the last of them `end`; fewer where there are fewer.

    The checkpoints at which the paper measures influence (Eq. 4, T = 10).
    """
    return sorted({start + -(-(end - start) * k // count) for k in range(1, count + 1)})
