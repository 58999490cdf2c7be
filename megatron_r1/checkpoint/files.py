"""Checkpoint files: complete ones, their descriptions, their checksums, and which of them stay.

CHECKPOINTS/step_00000120/ appears by a rename once all of it is on the disk and goes by one before any of
it is deleted, so that what has the name is whole. In it, beside megatron-core's files, `megatron_r1.json`
holds the training state and a checksum of every file, itself included.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from megatron_r1.system.files import json_bytes, naming, sync

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
    """The directory that becomes `step_path` by a rename."""
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
    """Rename a checkpoint out of sight, and return its path, for `shutil.rmtree`. A later `begin` deletes it
    too."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    sync(path.parent)
    return hidden


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return sorted(step for step, path in _named(directory).items() if (path / META).is_file())


def complete_checkpoints(directory: Path) -> list[CheckpointRef]:
    """Complete checkpoints under `directory`, in training order.

    None is read. A checkpoint that was damaged since is refused when it is loaded.
    """
    return [CheckpointRef(step_path(directory, step), step) for step in saved_steps(directory)]


def _named(directory: Path) -> dict[int, Path]:
    """Step -> what has the name of its checkpoint. A copy with another name is none."""
    steps = [int(path.name[5:]) for path in directory.glob("step_*") if path.name[5:].isdecimal()]
    return {step: path for step in steps if (path := step_path(directory, step)).exists()}


def damaged(directory: Path) -> list[Path]:
    """Checkpoints whose description is lost or can no longer be read. Costs a read of each."""
    out = []
    for _, path in sorted(_named(directory).items()):
        try:
            read_meta(path)
        except (OSError, ValueError):
            out.append(path)
    return out


def _described(path: Path) -> bytes:
    """The bytes of a checkpoint's description. Raises ValueError if it is missing."""
    try:
        return (path / META).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        lost = "restore or remove it" if path.is_dir() else f"name a step_N directory{suggest_path(path)}"
        raise ValueError(f"{path} is no complete checkpoint ({META} is missing); {lost}") from None


def read_meta(path: Path) -> dict[str, Any]:
    """The description of a checkpoint. Raises ValueError if it is missing or damaged."""
    content = _described(path)
    try:
        meta = json.loads(content)
    except ValueError:
        meta = None
    if isinstance(meta, dict) and meta.get("format") == 1:
        raise ValueError(f"{path} has no checksums: an earlier version wrote it; begin a new run")
    if not isinstance(meta, dict) or meta.pop("checksum", None) != _own_checksum(meta):
        raise_corrupt(path, [f"{META} is not as it was written"])
    return meta


def identity(path: Path) -> str:
    """Identity of a checkpoint: the SHA-256 of its description, which holds the checksums of all files.

    Raises ValueError if it is missing.
    """
    return hashlib.sha256(_described(path)).hexdigest()


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
    """Damage to the files of a checkpoint, a line each. This rank reads its share of them."""
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
    """XXH3 of 128 bits. It finds every fault of a disk or a copy, at the speed of memory. It does not
    protect against forgery."""
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
