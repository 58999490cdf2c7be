"""Files of a Hugging Face folder: which of them hold its weights, and what stands in them. Imports no torch.

transformers reads model.safetensors, else the shards that model.safetensors.index.json names. A folder where
other readers would take other files, or in which index and shards disagree, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOATS = ("F32", "BF16", "F16")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"}


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    """As safetensors names it: F32, BF16, I8."""
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, where an object is expected")
    return value


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Tensor name -> what the headers say of it, over the files that count.

    Raises ValueError that names the file: none or several sets of weights, an adapter, a damaged or missing
    file, an index that disagrees with its shards.
    """
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} has adapter_config.json, so its weights change those of another model; merge the "
            f"two and save the result"
        )
    index, where = directory / INDEX, _weight_map(directory / INDEX)
    shards = {*where.values()}
    if os.path.lexists(directory / SINGLE):
        if shards - {SINGLE}:
            raise ValueError(
                f"{directory} has both {SINGLE} and {INDEX}, which names {min(shards - {SINGLE})}; remove "
                f"the one that is left from another save"
            )
        shards = {SINGLE}
    if not shards:
        raise ValueError(
            f"{directory} has neither {SINGLE} nor {INDEX}, but {unread_files(directory) or 'no weights'}; "
            f"other formats become one by transformers' from_pretrained(...).save_pretrained(...)"
        )
    out: dict[str, Stored] = {}
    for file in sorted(shards):
        for name, stored in _header(directory / file).items():
            if name in out:
                raise ValueError(f"{stored.file} and {out[name].file} both have {name}; which one is meant?")
            out[name] = stored
    for name in sorted(where.keys() | out.keys()) if where else ():
        there = out[name].file.name if name in out else "no file that it names"
        if where.get(name) != there:
            says = f"says {where[name]}" if name in where else "does not name it"
            raise ValueError(f"{index} disagrees with its files: {name} is in {there}, and the index {says}")
    return out


def unread_files(directory: Path, read: Iterable[Stored] = ()) -> str:
    """Names of the other files of weights in the folder, in one line."""
    known = {one.file.name for one in read}
    names = sorted(path.name for path in directory.iterdir() if path.suffix in _WEIGHTS)
    return ", ".join(name for name in names if name not in known)


def check_tensors(
    directory: Path, stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare with the shapes by name that config.json means.

    Raises ValueError that names the tensors that are missing, left over, of another shape, or no floats that
    a checkpoint holds exactly.
    """
    wrong = [f"{name}: missing" for name in expected if name not in stored]
    for name, one in stored.items():
        if name not in expected and name != HEAD:
            # The frequencies follow from config.json; early releases stored them.
            if not name.endswith("rotary_emb.inv_freq"):
                wrong.append(f"{name}: GPTModel has no place for it")
        elif one.dtype not in _FLOATS:
            wrong.append(f"{name}: {one.dtype} in {one.file.name}; weights are {', '.join(_FLOATS)}")
        elif one.shape != (shape := expected[EMBEDDING if name == HEAD else name]):
            wrong.append(f"{name}: shape {[*one.shape]}, expected {[*shape]}")
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        lines = "\n  ".join(wrong[:10] + more)
        raise ValueError(f"{directory}: tensors do not fit config.json:\n  {lines}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Empty without an index."""
    if not os.path.lexists(index):
        return {}
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} is damaged: it has no weight_map")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {name} is said to be in {file!r}, which is no .safetensors beside it")
    return where


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            return {n: Stored(file, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, though {INDEX} or a link names it; download it") from None
    except (OSError, SafetensorError) as error:
        way = "download it again, by git lfs pull where it is a pointer of git-lfs"
        raise ValueError(f"{file} is damaged, or no safetensors ({error}); {way}") from None
