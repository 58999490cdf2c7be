"""Shards, written on many nodes, joined by name into the pair that one run would have written."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.indexed import IndexedDataset, open_corpus, with_suffix
from megatron_r1.data.integrity import say_unchecked
from megatron_r1.data.provenance import load_origins
from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.preprocess.documents import Input, digest, identity, open_input
from megatron_r1.preprocess.rows import check_keys
from megatron_r1.preprocess.store import (
    MEND,
    Stored,
    add_to_ledger,
    exclusive,
    pair_standing,
    refuse_empty,
    rejects_of,
    shard_counts,
    shard_prefix,
    write_pair,
)
from megatron_r1.run.stage import Standing
from megatron_r1.system.errors import rewording, shown
from megatron_r1.system.files import remove_if_empty
from megatron_r1.system.process import allow_open_files
from megatron_r1.system.terminal import say

_ARRAY = "SLURM_ARRAY_TASK_"
_ENVIRONMENT = ("RANK", "WORLD_SIZE"), (f"{_ARRAY}ID", f"{_ARRAY}COUNT"), ("SLURM_PROCID", "SLURM_NTASKS")
"""Variables with this task's number and the number of tasks: of torchrun, a SLURM job array, srun."""


def parse_shard(
    text: str, environment: Mapping[str, str] = os.environ, output_prefix: str | Path | None = None
) -> tuple[int, int]:
    """ "I/N", or "env": as torchrun or SLURM says. ValueError for anything else.

    The numbers of a job array may have any step, or none, as in --array=1,3,7. SLURM does not tell a task
    the numbers of the others. Tasks of an array without a step therefore take the next free shard, with a
    link beside `output_prefix` that holds the task's number.
    """
    if text == "env":
        for names in _ENVIRONMENT:
            if environment.keys() >= set(names):
                index, count = (_number(environment, name) for name in names)
                if names[0].startswith(_ARRAY):
                    index = _of_array(index, count, environment, output_prefix)
                if not 0 <= index < count:
                    way_out = "give --shard I/N"
                    raise ValueError(f"--shard env: {names[0]}={index} and {names[1]}={count}; {way_out}")
                return index, count
        known = "; ".join(", ".join(names) for names in _ENVIRONMENT)
        raise ValueError(f"--shard env: neither torchrun nor SLURM has set what it reads ({known})")
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard {text[:100]}: write I/N with I from 0 to N-1, or env")
    return int(match[1]), int(match[2])


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    value = environment.get(name, str(default))
    if not re.fullmatch(r"\d{1,18}", value, re.ASCII):
        raise ValueError(f"--shard env: {name}={shown(value)} is no number; give --shard I/N")
    return int(value)


def _of_array(task: int, count: int, environment: Mapping[str, str], output_prefix: str | Path | None) -> int:
    """The shard of a task of a job array: its place in it, or the one that it claims."""
    first, step = _number(environment, f"{_ARRAY}MIN"), _number(environment, f"{_ARRAY}STEP", 1)
    last = _number(environment, f"{_ARRAY}MAX", first + step * (count - 1))
    if last == first + step * (count - 1):
        place, off = divmod(task - first, step or 1)
        # An index beyond all is refused.
        return count if off else place
    if output_prefix is None:
        raise ValueError(
            f"--shard env: the {count} tasks from {first} to {last} have no common step, so they take their "
            f"shards as they run; give --shard I/N"
        )
    folder = with_suffix(output_prefix, f"{_CLAIMS}{environment.get('SLURM_ARRAY_JOB_ID', '0')}")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        # Of several tasks one makes the link, on any file system. It stays, so that this task finds it again.
        with contextlib.suppress(FileExistsError):
            os.symlink(str(task), folder / str(index))
        if os.readlink(folder / str(index)) == str(task):
            return index
    way_out = "remove it if they are of another array"
    raise ValueError(f"--shard env: {folder} holds {count} other tasks; {way_out}")


_CLAIMS = ".array-"


def merge(
    output_prefix: str | Path,
    *,
    json_keys: Sequence[str] = ("text",),
    reject_limit: int = 100,
    overwrite: bool = False,
    check: bool = False,
    log: Callable[[str], None] = say,
) -> dict[str, dict[str, Any]]:
    """Join the shards of a prefix, found by name, into the pair that one run without shards would write.

    The shards stay. overwrite: replace a pair of another request. check: only log what would be joined.
    Errors: FileNotFoundError for a missing shard, ValueError for shards of different inputs or options, for a
    damaged one, for more rejects in all than the limit, and for a pair of another request.
    """
    check_keys(json_keys)
    if reject_limit < 0 or not json_keys:
        raise ValueError(
            f"reject_limit={reject_limit}, {len(json_keys)} keys: take a key and no negative limit"
        )
    output, began = Path(output_prefix), time.monotonic()
    sidecars: dict[str, dict[str, Any]] = {}
    read: dict[str, str] = {}
    with contextlib.nullcontext() if check else exclusive(with_suffix(output, ".partial"), log):
        for key in json_keys:
            shards, prefix = shards_of(output, key), with_suffix(output, f"_{key}_document")
            about = _common(shards)
            count = sum(sum(sidecar["rejected"].values()) for _, sidecar in shards)
            if count > reject_limit:
                more = f"more than {reject_limit}: {MEND}"
                raise ValueError(f"the shards have {count} rejects for key {key!r}, {more}")
            if check:
                documents, tokens = (sum(s[what] for _, s in shards) for what in ("documents", "tokens"))
                log(f"output {prefix}.bin: {len(shards)} shards, {documents:,} documents, {tokens:,} tokens")
                continue
            read |= {str(shard): sidecar["bin_sha256"] for shard, sidecar in shards}
            sources = [_again(source) for source in about["inputs"]]
            decides = {k: v for k, v in about.items() if k not in ("inputs", "encoder", "skipped")}
            names = [entry["path"] for entry in about["inputs"]]
            here = [source for source in sources if source]
            standing, sidecar = pair_standing(prefix, decides, here, names, overwrite)
            if standing is Standing.DONE:
                log(f"already done: {prefix}.bin")
                sidecars[str(prefix)] = sidecar
                continue
            for entry, source in zip(about["inputs"], sources, strict=True):
                entry["sha256"] = None if source is None else digest(source)
            before, parts = np.zeros(len(sources), dtype=np.int64), []
            for shard, sidecar in shards:
                dataset, rejects = IndexedDataset(shard, share=None), rejects_of(shard)
                origins = load_origins(shard, dataset.num_documents)
                parts.append(Stored(dataset.tokens, dataset.lengths, origins, rejects, before.tolist()))
                before += sidecar["lines"]
            refuse_empty(parts, key, prefix, about["inputs"])
            sidecars[str(prefix)] = write_pair(parts, prefix, about, began, log)
        if not check:
            add_to_ledger(output, "merge", sidecars, read)
            for claims in map(Path, glob.glob(f"{glob.escape(str(output))}{_CLAIMS}*")):
                # Links alone are ours. A folder that holds something else is somebody's.
                for link in claims.glob("*") if claims.is_dir() and not claims.is_symlink() else ():
                    if link.is_symlink() and link.name.isdecimal():
                        link.unlink()
                remove_if_empty(claims)
    return sidecars


def shards_of(output_prefix: Path, key: str) -> list[tuple[Path, dict[str, Any]]]:
    """Prefix and sidecar of each shard, in order. Errors: FileNotFoundError, ValueError for one of others."""
    counts = shard_counts(output_prefix, key)
    if len(counts) != 1:
        kinds = f"shards of {' and of '.join(map(str, counts))}; remove one kind"
        fault = kinds if counts else "no shards there"
        raise FileNotFoundError(f"{output_prefix}_shard-*_{key}_document: {fault}")
    shards, opened, count = [], [], counts[0]
    # A shard's tokens, three parts of its index and its origins stay mapped, and a mapping holds a file.
    allow_open_files(5 * count, "mapped files of shards")
    for index in range(count):
        prefix = with_suffix(shard_prefix(output_prefix, index, count), f"_{key}_document")
        sidecar, again = read_sidecar(prefix, _NEEDED), f"run --shard {index}/{count} again"
        if sidecar is None:
            raise FileNotFoundError(f"{prefix} is missing or not finished; {again}")
        if sidecar["shard"] != [index, count] or len(sidecar["lines"]) != len(sidecar["inputs"]):
            raise ValueError(
                f"{prefix}.json is of another shard: it says shard {shown(sidecar['shard'])}, and lines of "
                f"{len(sidecar['lines'])} inputs; {again}"
            )
        rejects, rejected = rejects_of(prefix), sum(sidecar["rejected"].values())
        if rejected and not rejects.is_file():
            raise FileNotFoundError(f"{rejects} is missing, with {rejected} rejects; {again}")
        with rewording(lambda error: f"{error} ({again})"):  # noqa: B023
            opened.append(open_corpus(prefix.name, prefix))
        shards.append((prefix, sidecar))
    say_unchecked(opened)
    return shards


_COUNTS = ("rejected", "lines", "documents", "tokens")
_NEEDED = ("shard", "inputs", "encoder", *_COUNTS, "merged_seed", "bin_sha256")
"""Fields of a shard's sidecar that the merge reads."""


def _common(shards: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """The sidecar of the merged pair without its counts. ValueError where two shards differ in it."""
    own = {"tool", "shard", "lines", "merged_seed", "encoder"}
    own |= {"documents", "tokens", "rejected", "bin_sha256", "idx_sha256", "docs_sha256"}
    described = []
    for _, sidecar in shards:
        about = {k: v for k, v in sidecar.items() if k not in own} | {"seed": sidecar["merged_seed"]}
        # The same file copied to another node has a time of its own.
        inputs = [{**entry, "mtime_ns": 0} for entry in sidecar["inputs"]]
        described.append(about | {"inputs": inputs, "skipped": {}})
    (first, sidecar), common = shards[0], described[0]
    for (prefix, _), about in zip(shards, described, strict=True):
        for key, value in about.items():
            if value != (meant := common.get(key)):
                raise ValueError(f"{prefix} and {first} differ in {key}: {shown(value)} and {shown(meant)}")
    encoders = sorted({sidecar["encoder"] for _, sidecar in shards})
    inputs = [dict(entry) for entry in sidecar["inputs"]]
    skipped = sum((Counter(sidecar.get("skipped", {})) for _, sidecar in shards), Counter())
    counts = dict(sorted(skipped.items()))
    return common | {"inputs": inputs, "skipped": counts, "encoder": ", ".join(encoders)}


def _again(entry: dict[str, Any]) -> Input | None:
    """An input of the shards, if it is still there as it was. What a sidecar names is never fetched."""
    if str(entry["path"]).startswith("hf:"):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError):
        source = open_input(entry["path"])
        if identity(source)["bytes"] == entry["bytes"]:
            return source
    return None
