"""Checkpoints as an attacker would write them: sealed anew, so that every checksum is right."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_r1.checkpoint import files as checkpoint_files

Craft = Callable[[Path, "Payload"], None]


class Payload:
    """A pickle of this runs code: `trap` appears."""

    def __init__(self, trap: Path, value: str = "0"):
        self.trap, self.value = trap, value

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"(__import__('pathlib').Path({str(self.trap)!r}).touch(), {self.value})[1]",)


def copied(checkpoint: Path, to: Path, craft: Craft, trap: Path, **description: Any) -> Path:
    """A copy with something wrong about it. `description`: other fields of its description."""
    shutil.copytree(checkpoint, to)
    craft(to, Payload(trap))
    seal(to, **description)
    return to


def seal(path: Path, **description: Any) -> None:
    meta = json.loads((path / checkpoint_files.META).read_text())
    del meta["checksum"]
    regular = [p for p in path.iterdir() if p.is_file() and p.name != checkpoint_files.META]
    meta |= {"files": checkpoint_files.facts_of(regular)} | description
    meta["checksum"] = checkpoint_files._own_checksum(meta)
    (path / checkpoint_files.META).write_text(json.dumps(meta))


def archive(value: Any) -> bytes:
    torch.save(value, content := io.BytesIO())
    return content.getvalue()


def pickled(content: bytes | Callable[[Payload], bytes]) -> Craft:
    """`.metadata` is something else."""

    def craft(path: Path, payload: Payload) -> None:
        (path / ".metadata").write_bytes(content if isinstance(content, bytes) else content(payload))

    return craft


def changed(change: Callable[[Any, Path, Payload], Any]) -> Craft:
    """`.metadata` is a genuine object, changed."""

    def craft(path: Path, payload: Payload) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata, path, payload)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return craft


def place_of(metadata: Any, name: str) -> Any:
    return next(place for index, place in metadata.storage_data.items() if name in index.fqn)


def every_place(**fields: Any) -> Craft:
    """All tensors lie elsewhere."""

    def change(metadata: Any, path: Path, payload: Payload) -> None:
        for place in metadata.storage_data.values():
            for field, value in fields.items():
                setattr(place, field, value)

    return changed(change)


def replaced(name: str, value: Callable[[Payload], bytes]) -> Craft:
    """What `name` holds is another archive, in a file of its own."""

    def change(metadata: Any, path: Path, payload: Payload) -> None:
        place, content = place_of(metadata, name), value(payload)
        (path / "__9_9.distcp").write_bytes(content)
        place.relative_path, place.offset, place.length = "__9_9.distcp", 0, len(content)

    return changed(change)


def overlapping(metadata: Any, path: Path, payload: Payload) -> None:
    """Two pieces of [64] that have more than 64 numbers, and not the last."""
    name, index = "decoder.final_layernorm.weight", next(i for i in metadata.storage_data if "final" in i.fqn)
    content, offsets = archive(torch.ones(40)), (torch.Size([0]), torch.Size([20]))
    (path / "__9_9.distcp").write_bytes(content * 2)
    place = metadata.storage_data.pop(index)
    metadata.state_dict_metadata[name].chunks.clear()
    for n, offset in enumerate(offsets):
        chunk = ChunkStorageMetadata(offset, torch.Size([40]))
        metadata.state_dict_metadata[name].chunks.append(chunk)
        here = type(place)("__9_9.distcp", n * len(content), len(content))
        metadata.storage_data[MetadataIndex(name, offset)] = here


def file(name: str, content: bytes | Callable[[Payload], bytes]) -> Craft:
    def craft(path: Path, payload: Payload) -> None:
        (path / name).write_bytes(content if isinstance(content, bytes) else content(payload))

    return craft


def compressed(value: Any) -> bytes:
    """torch's archive, compressed: a small file that would be large in memory."""
    source, target = zipfile.ZipFile(io.BytesIO(archive(value))), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    return target.getvalue()


def linked(path: Path, payload: Payload) -> None:
    (path / "__0_0.distcp").rename(path.parent / "outside")
    (path / "__0_0.distcp").symlink_to(path.parent / "outside")


def _instead(path: Path) -> Path:
    """The name of common.pt, which is free."""
    (path / "common.pt").unlink()
    return path / "common.pt"


def named(module: str, name: str) -> bytes:
    """A pickle that calls module.name()."""
    text = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + text + b"\x93)R."


_NAMES = "torch.distributed.checkpoint.metadata"
_TUPLES = b"\x80\x04})q\x000" + b"h\x00h\x00\x86q\x000" * 200 + b"h\x00K\x01s."
"""The hash of its key takes 2^200 steps."""

CRAFTED: dict[str, Craft] = {
    "code in .metadata": pickled(lambda p: pickle.dumps(p)),
    "code in .metadata, and what it should be": lambda path, p: pickled(
        pickle.dumps(Payload(p.trap, f"__import__('pickle').loads({(path / '.metadata').read_bytes()!r})"))
    )(path, p),
    "code in .metadata, protocol 0": pickled(lambda p: pickle.dumps(p, protocol=0)),
    "code in .metadata, protocol 2": pickled(lambda p: pickle.dumps(p, protocol=2)),
    "code in a field of .metadata": changed(lambda m, path, p: setattr(m, "planner_data", p)),
    "a name within a name": pickled(named(_NAMES, "Metadata.__init__.__globals__")),
    "a name of the same module": pickled(named(_NAMES, "os.getcwd")),
    "a name of Python": pickled(named("os", "getcwd")),
    "a name of torch": pickled(named("torch", "load")),
    "a genuine name that is a function": pickled(named("torch.serialization", "_get_layout")),
    "a state for a class": pickled(b"\x80\x04c" + _NAMES.encode() + b"\nMetadata\n}b."),
    "a state for a list": pickled(b"\x80\x04]}b."),
    "a state of two parts": pickled(b"\x80\x04c" + _NAMES.encode() + b"\nMetadata\n)\x81}}\x86b."),
    "items for an object": pickled(b"\x80\x04c" + _NAMES.encode() + b"\nMetadata\n)\x81(K\x01K\x02u."),
    "an extension": pickled(b"\x80\x04\x82\x01)R."),
    "an instance": pickled(b"(ios\ngetcwd\n."),
    "an object": pickled(b"(cos\ngetcwd\no."),
    "a persistent name": pickled(b"\x80\x04\x8c\x01xQ."),
    "a persistent line": pickled(b"Px\n."),
    "a number of 2 GB": pickled(b"\x80\x04\x8b\xff\xff\xff\x7f1."),
    "bytes of 2^60": pickled(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x."),
    "a frame of 2^60": pickled(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N."),
    "a text of 4 GB": pickled(b"\x80\x04X\xff\xff\xff\xffx."),
    "a place of 2^31 in the memo": pickled(b"\x80\x04Nr\xff\xff\xff\x7f."),
    "a key that takes for ever": pickled(_TUPLES),
    "tuples within tuples": pickled(b"\x80\x04)" + b"\x85" * 500_000 + b"."),
    "lists within themselves": pickled(b"\x80\x04]\x94" + b"h\x00a" * 100 + b"."),
    "an end too early": pickled(b"\x80\x04]"),
    "nothing": pickled(b""),
    "nothing on the stack": pickled(b"."),
    "no pickle": pickled(b"\x80\x04" + b"\xff" * 100),
    "a plain value": pickled(pickle.dumps({"state_dict_metadata": {}})),
    "a file above": every_place(relative_path="../outside"),
    "a file below": every_place(relative_path="sub/__0_0.distcp"),
    "an absolute file": every_place(relative_path="/etc/passwd"),
    "the description as a file": every_place(relative_path=checkpoint_files.META),
    "a file that is not listed": every_place(relative_path="__7_7.distcp"),
    "a file that is no text": every_place(relative_path=["__0_0.distcp"]),
    "an offset behind the end": every_place(offset=1 << 40),
    "a length behind the end": every_place(length=1 << 61),
    "a negative offset": every_place(offset=-1),
    "a length that is true": every_place(length=True),
    "a length that is a fraction": every_place(length=0.5),
    "all in one place": every_place(offset=0, length=4000),
    "another length": every_place(length=100),
    "a transformation": every_place(transform_descriptors=["zstd"]),
    "code in a small object": replaced("_extra_state", lambda p: archive(p)),
    "code in a tensor": replaced("final_layernorm", lambda p: archive(p)),
    "code in a tensor, no archive": replaced("final_layernorm", lambda p: pickle.dumps(p)),
    "code in a tensor, the old form": replaced("final_layernorm", lambda p: _old(p)),
    "another shape in a tensor": replaced("final_layernorm", lambda p: archive(torch.zeros(8))),
    "other numbers in a tensor": replaced("final_layernorm", lambda p: archive(torch.zeros(64).double())),
    "one number for all": replaced("final_layernorm", lambda p: archive(torch.zeros(1).expand(64))),
    "a tensor of no numbers": replaced("final_layernorm", lambda p: archive(torch.empty(64, device="meta"))),
    "a compressed tensor": replaced("final_layernorm", lambda p: compressed(torch.zeros(64))),
    "a large object": replaced("_extra_state", lambda p: archive([None]) + bytes(20 << 20)),
    "a compressed object": replaced("_extra_state", lambda p: compressed([None] * 1_000_000)),
    "a tensor that is an object": changed(
        lambda m, path, p: m.state_dict_metadata.update(
            {"decoder.final_layernorm.weight": next(iter(m.state_dict_metadata.values()))}
        )
    ),
    "a tensor of another shape": changed(
        lambda m, path, p: setattr(
            m.state_dict_metadata["decoder.final_layernorm.weight"], "size", torch.Size([1 << 60])
        )
    ),
    "a tensor without its pieces": changed(
        lambda m, path, p: m.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()
    ),
    "pieces that overlap and leave a hole": changed(overlapping),
    "a tensor that is lost": changed(
        lambda m, path, p: m.state_dict_metadata.pop("decoder.final_layernorm.weight")
    ),
    "a tensor without numbers": changed(
        lambda m, path, p: setattr(
            m.state_dict_metadata["decoder.final_layernorm.weight"].properties, "dtype", torch.complex64
        )
    ),
    "code in common.pt": file("common.pt", lambda p: archive(p)),
    "code beside the settings of common.pt": file("common.pt", lambda p: archive({"optimizer": {}, "x": p})),
    "a set in common.pt": file("common.pt", lambda p: archive({"optimizer": {1, 2}})),
    "a list in common.pt": file("common.pt", lambda p: archive([1])),
    "no archive in common.pt": file("common.pt", b"PK"),
    "a compressed common.pt": file("common.pt", lambda p: compressed({"x": "0" * 10_000_000})),
    "no common.pt": lambda path, p: (path / "common.pt").unlink(),
    "no .metadata": lambda path, p: (path / ".metadata").unlink(),
    "no metadata.json": lambda path, p: (path / "metadata.json").unlink(),
    "another format": file("metadata.json", b'{"sharded_backend": "zarr", "sharded_backend_version": 1}'),
    "deep JSON": file("metadata.json", b"[" * 100_000),
    "a list as JSON": file("metadata.json", b"[]"),
    "a link to a file": linked,
    "common.pt as a link to a device": lambda path, p: _instead(path).symlink_to("/dev/zero"),
    "common.pt as a pipe": lambda path, p: os.mkfifo(_instead(path)),
    "a pipe of no use": lambda path, p: os.mkfifo(path / "x.distcp"),
    "a folder": lambda path, p: (path / "sub").mkdir(),
}


def _old(value: Any) -> bytes:
    torch.save(value, content := io.BytesIO(), _use_new_zipfile_serialization=False)
    return content.getvalue()
