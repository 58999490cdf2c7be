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
import re
import shutil
import stat
from collections.abc import Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_r1.config import ModelConfig
from megatron_r1.records import CheckpointRef, TrainState
from megatron_r1.system.errors import shown, some, suggest_path
from megatron_r1.system.files import json_bytes, naming, plain_name, sync
from megatron_r1.system.json_io import JsonError, parse_json

META = "megatron_r1.json"
_FORMAT = 2
_CHUNK = 4 << 20
_ROOM = ".room"
_OURS = re.compile(r"\.step_[0-9]{8,}\.(tmp|old)")
"""What becomes a checkpoint, and what was one."""
_STEP = re.compile(r"step_[0-9]{8,}")
_RESERVE = 8 << 20
"""Bytes kept free, while the shards are written, for what the first rank alone writes in the end."""

_KINDS = {"state": dict, "model": dict, "files": dict, "plan": str, "phase": str}

_MOST_SMALL, _MOST_META = 256 << 20, 64 << 20
"""Bytes of a file that is read as a whole, and of a description. `.metadata` has up to 0.5 kB for each piece
of a tensor, 1 MB in all of a model of 950 M parameters on 64 ranks. Read, it takes about 9 times its bytes,
and a crafted one at most 45 times (`pickles.py`)."""

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
    where the disk is full or not writable, or something else has the checkpoint's name, and leaves nothing
    then.
    """
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in new:
        sync(path.parent)
    final, temporary = step_path(directory, step), temporary_path(directory, step)
    if os.path.lexists(final) and not _is_directory(final):
        raise OSError(f"{final} is a link or a file; move it away")
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and _is_directory(path):
            shutil.rmtree(path, ignore_errors=True)
    release(directory)
    try:
        with naming(directory), open(directory / _ROOM, "xb") as room:
            os.posix_fallocate(room.fileno(), 0, _RESERVE)
        temporary.mkdir()
    except OSError:
        release(directory)
        raise
    return temporary


def _is_directory(path: Path) -> bool:
    """Whether it is one itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def release(directory: Path) -> None:
    """Give back the room that `begin` has kept."""
    (directory / _ROOM).unlink(missing_ok=True)


def publish(
    directory: Path, facts: FileFacts, state: TrainState, model: ModelConfig, phase: str, plan: str
) -> None:
    """Give a checkpoint whose `facts` files are on the disk, under `temporary_path`, its description and its
    name."""
    temporary, final = temporary_path(directory, state.step), step_path(directory, state.step)
    meta = {
        "format": _FORMAT,
        "phase": phase,
        # Without a teacher, as earlier versions read it.
        "state": {k: v for k, v in dataclasses.asdict(state).items() if k != "teacher" or v},
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
    return sorted(step for step, path in named(directory).items() if (path / META).is_file())


def complete_checkpoints(directory: Path) -> list[CheckpointRef]:
    """Complete checkpoints under `directory`, in training order.

    None is read. A checkpoint that was damaged since is refused when it is loaded.
    """
    return [CheckpointRef(step_path(directory, step), step) for step in saved_steps(directory)]


def named(directory: Path) -> dict[int, Path]:
    """Step -> directory, or link to one, that has the name of its checkpoint. A copy with another name is
    none."""
    steps = {int(path.name[5:]): path for path in _entries(directory) if _STEP.fullmatch(path.name)}
    return {n: path for n, path in sorted(steps.items()) if path == step_path(directory, n) and path.is_dir()}


def foreign(directory: Path) -> list[str]:
    """Names in `directory` that are not of a checkpoint or of our own making. They are left alone."""
    ours = {path.name for path in named(directory).values()} | {_ROOM}
    return sorted(
        path.name
        for path in _entries(directory)
        if path.name not in ours and not (_OURS.fullmatch(path.name) and _is_directory(path))
    )


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def damaged(directory: Path) -> list[Path]:
    """Checkpoints whose description is lost or can no longer be read. Costs a read of each."""
    out = []
    for path in named(directory).values():
        try:
            read_meta(path)
        except (OSError, ValueError):
            out.append(path)
    return out


def _described(path: Path) -> bytes:
    """The bytes of a checkpoint's description. Raises ValueError if it is missing."""
    try:
        if not stat.S_ISREG((path / META).lstat().st_mode):
            way_out = "restore the file"
            raise ValueError(f"{path / META} is no file itself but a link, a pipe or the like; {way_out}")
        with open(path / META, "rb") as file:
            return file.read(_MOST_META + 1)
    except (FileNotFoundError, NotADirectoryError):
        lost = "restore or remove it" if path.is_dir() else f"name a step_N directory{suggest_path(path)}"
        raise ValueError(f"{path} is no complete checkpoint ({META} is missing); {lost}") from None


def read_meta(path: Path, expect: str | None = None) -> dict[str, Any]:
    """The description of a checkpoint. Raises ValueError if it is missing or damaged, or if the `identity` of
    the checkpoint is not `expect`."""
    content = _described(path)
    if expect is not None and (is_ := hashlib.sha256(content).hexdigest()) != expect.lower():
        fault = f"{path} is not the checkpoint that was expected: {shown(expect)} was, it is {is_}"
        raise ValueError(f"{fault}; ask its maker for sha256sum STEP/megatron_r1.json")
    meta: Any = None
    with suppress(JsonError):
        meta = parse_json(content, META, _MOST_META)
    if isinstance(meta, dict) and meta.get("format") == 1:
        raise ValueError(f"{path} has no checksums: an earlier version wrote it; begin a new run")
    if not isinstance(meta, dict) or meta.pop("checksum", None) != _own_checksum(meta):
        raise_corrupt(path, [f"{META} is not as it was written"])
    if mistake := _mistake(meta):
        way_out = "do not use this checkpoint"
        raise ValueError(f"{path / META} is none that this program wrote: {mistake}; {way_out}")
    return meta


def _mistake(meta: dict[str, Any]) -> str:
    """What a description has that none of ours has, or nothing."""
    for key, kind in _KINDS.items():
        if not isinstance(meta.get(key), kind):
            return f"{key} is {shown(meta.get(key))}"
    if meta.get("format") != _FORMAT:
        return f"format is {shown(meta.get('format'))}"
    state, files = meta["state"], meta["files"]
    counts = [state.get(key) for key in ("step", "samples", "tokens")]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in counts) or any(counts[1:]) > bool(counts[0]):
        return f"its step, samples and tokens are {shown(counts)}"
    others = {key: state[key] for key in state.keys() & {"guard", "teacher"}}
    if state.keys() - others != {"step", "samples", "tokens"} or not all(
        isinstance(other, dict) for other in others.values()
    ):
        return f"state is {shown(state)}"
    for name, fact in files.items():
        if not plain_name(name) or not name.isascii() or name == META:
            return f"it lists {shown(name)}, which is no name of a file beside it"
        if not (isinstance(fact, list) and len(fact) == 2 and type(fact[0]) is int and fact[0] >= 0):
            return f"its facts of {shown(name)} are {shown(fact)}"
    return ""


def identity(path: Path) -> str:
    """Identity of a checkpoint: the SHA-256 of its description, which holds the checksums of all files.

    Raises ValueError if it is missing.
    """
    return hashlib.sha256(_described(path)).hexdigest()


NOT_WEIGHTS = ("rotary_base", "rope_scaling", "init_std")
"""Fields of a model that the same weights can be used with other values of."""


def check_model(
    path: Path, model: ModelConfig, but: Container[str] = (), expect: str | None = None
) -> dict[str, Any]:
    """`read_meta` of a checkpoint of this model, fields `but` aside. Raises ValueError when it holds
    another one."""
    meta = read_meta(path, expect)
    theirs = meta["model"]
    if changed := [
        f"{key} {shown(theirs.get(key))} there, {value!r} here"
        for key, value in dataclasses.asdict(model).items()
        if theirs.get(key) != value and key not in but
    ]:
        raise ValueError(f"{path} holds another model: {'; '.join(changed)}")
    return meta


def facts_of(paths: Iterable[Path]) -> FileFacts:
    """Size and checksum of files, read once."""
    return {path.name: [path.stat().st_size, _checksum(path)] for path in paths}


def corruptions(path: Path, files: FileFacts, rank: int = 0, ranks: int = 1) -> list[str]:
    """Damage to the files of a checkpoint, a line each. This rank reads its share of them."""
    there = [p.name for p in path.iterdir()] if rank == 0 else []
    out = [f"{shown(name)} is not listed by {META}" for name in there if name not in {*files, META}]
    for name, (size, checksum) in sorted(files.items(), key=lambda item: -item[1][0])[rank::ranks]:
        if error := difference(path / name, size):
            out.append(error)
        elif _checksum(path / name) != checksum:
            out.append(f"{name} is not as it was written (its checksum differs)")
    return out


def difference(file: Path, size: int) -> str:
    """Why `file` is no file of `size` bytes, or nothing."""
    try:
        found = file.lstat()
    except OSError:
        return f"{file.name} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{file.name} is a link, a pipe or the like"
    return f"{file.name} has {found.st_size} bytes where {size} were saved" if found.st_size != size else ""


def read_verified(path: Path, name: str, files: FileFacts) -> bytes:
    """The bytes of a small file of a checkpoint, as `files` describes them. Raises ValueError for others."""
    if name not in files:
        raise_corrupt(path, [f"{META} does not list {name}"])
    (size, checksum), content = files[name], b""
    error = difference(path / name, size)
    if not error and size > _MOST_SMALL:
        error = f"{name} has {size:,} bytes, more than {_MOST_SMALL:,}"
    if not error:
        with open(path / name, "rb") as file:
            content = file.read(size + 1)
        if xxhash.xxh3_128(content).hexdigest() != checksum:
            error = f"{name} is not as it was written (its checksum differs)"
    raise_corrupt(path, [error] if error else [])
    return content


def raise_corrupt(path: Path, corruptions: list[str]) -> None:
    """Raise ValueError that names the corruptions, if there are any."""
    if corruptions:
        way_out = "remove it: training continues from an earlier one, scoring leaves it out"
        raise ValueError(f"{path} is damaged: {some(corruptions, '; ', 8)}; {way_out}")


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
