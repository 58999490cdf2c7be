"""Those files of a Hugging Face folder count that transformers reads, or the folder is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from megatron_r1.config import ModelConfig
from megatron_r1.export.folder import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    check_tensors,
    shapes,
    stored_tensors,
    unread_files,
)

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder: Path, **files: list[str]) -> None:
    for name, tensors in files.items():
        save_file({tensor: np.ones((2, 3), np.float32) for tensor in tensors}, folder / name)


def write_index(folder: Path, where: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def single(folder: Path) -> None:
    write(folder, **{SINGLE: ["a", "b"]})


def shards(folder: Path) -> None:
    write(folder, **{ONE: ["a"], TWO: ["b"]})
    write_index(folder, {"a": ONE, "b": TWO})


def single_with_its_index(folder: Path) -> None:
    single(folder)
    write_index(folder, {"a": SINGLE, "b": SINGLE})


@pytest.mark.parametrize("make", [single, shards, single_with_its_index])
def test_transformers_reads_the_same_files_whatever_lies_beside(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path)
    others = ["consolidated.safetensors", "model-00003-of-00003.safetensors", "model.fp16.safetensors"]
    write(tmp_path, **{name: ["a"] for name in others})
    (tmp_path / "pytorch_model.bin").write_bytes(b"of an earlier save")
    theirs, _ = _get_resolved_checkpoint_files(str(tmp_path), None, None, None, None, False)
    stored = stored_tensors(tmp_path)
    assert theirs is not None and stored.keys() == {"a", "b"}
    assert {str(one.file) for one in stored.values()} == set(theirs)
    assert unread_files(tmp_path, stored.values()) == ", ".join([*others, "pytorch_model.bin"])


def both(folder: Path) -> None:
    single(folder)
    shards(folder)


def shards_without_index(folder: Path) -> None:
    write(folder, **{ONE: ["a"], TWO: ["b"]})


def only(name: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, **{name: ["a"]})


def adapter(folder: Path) -> None:
    single(folder)
    (folder / "adapter_config.json").write_text("{}")


def indexed(where: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder, **{ONE: ["a"], TWO: ["b"]})
        write_index(folder, where)

    return make


def twice(folder: Path) -> None:
    write(folder, **{ONE: ["a", "b"], TWO: ["b"]})
    write_index(folder, {"a": ONE, "b": TWO})


def holding(content: bytes, name: str = SINGLE) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(folder: Path) -> None:
    single(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (both, f"both {SINGLE} and {INDEX}, which names {ONE}"),
        (shards_without_index, f"neither {SINGLE} nor {INDEX}, but {ONE}, {TWO}; "),
        (only("model.fp16.safetensors"), "but model.fp16.safetensors; "),
        (only("pytorch_model.bin"), "but pytorch_model.bin; other formats become one"),
        (lambda folder: None, " nor other weights; "),
        (adapter, "has adapter_config.json"),
        (indexed({"a": ONE, "b": ONE}), f"{INDEX} disagrees with its files: b is in no file"),
        (indexed({"a": TWO, "b": ONE}), f"a is in {ONE}, and the index says {TWO}"),
        (indexed({"a": ONE}) and (lambda f: (twice(f), write_index(f, {"a": ONE}))), "b is in"),
        (indexed({"a": ONE, "b": "gone.safetensors"}), "/gone.safetensors is missing"),
        (indexed({"a": ONE, "b": f"../{TWO}"}), f"b is said to be in '../{TWO}'"),
        (indexed({"a": ONE, "b": f"sub/{TWO}"}), "which is no .safetensors beside it"),
        (indexed({"a": ONE, "b": "model.bin"}), "'model.bin', which is no"),
        (indexed({"a": ONE, "b": None}), "b is said to be in None"),
        (indexed({"a": ONE, "b": "/dev/zero.safetensors"}), "which is no .safetensors beside it"),
        (indexed({"a": ONE, "b": "x\0.safetensors"}), "which is no .safetensors beside it"),
        (indexed({"a": ONE, "b": "\ud800.safetensors"}), r"in '\ud800.safetensors', which is no"),
        (indexed({"a": ONE, "b": "x" * 5000 + ".safetensors"}), "which is no .safetensors beside it"),
        (indexed({}), f"{INDEX} is damaged: it has no weight_map"),
        (indexed([]), f"{INDEX} is damaged: it has no weight_map"),
        (holding(b'{"weight_map": ', INDEX), f"{INDEX}: no JSON"),
        (holding(b"\xff\xfe", INDEX), f"{INDEX}: no JSON"),
        (twice, "both have b; which one is meant?"),
        (cut, f"/{SINGLE} is damaged"),
        (holding(b""), f"/{SINGLE} is damaged"),
        (holding(b"\xff" * 64), f"/{SINGLE} is damaged"),
        (holding(POINTER), "git lfs pull"),
        (lambda folder: (folder / SINGLE).symlink_to("gone"), f"/{SINGLE} is missing, though"),
    ],
)
def test_a_folder_that_is_damaged_or_means_two_things_is_refused_by_name(
    make: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError) as error:
        stored_tensors(tmp_path)
    assert said in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


SMALL = ModelConfig(1, 4, 6, 1, 1, 9, head_dim=4)


def fitting() -> dict[str, Any]:
    return {name: np.ones(shape, np.float32) for name, shape in shapes(SMALL, "llama")}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "float64", "complex64"])
def test_tensors_that_no_checkpoint_holds_exactly_are_refused_by_name(dtype: str, tmp_path: Path) -> None:
    norm = {"model.norm.weight": np.ones(4, dtype), EMBEDDING: np.ones((9, 4), np.float16)}
    save_file(fitting() | norm, tmp_path / SINGLE)
    said = rf"model\.norm\.weight: [A-Z0-9]+ in {SINGLE}; weights are F32, BF16, F16$"
    with pytest.raises(ValueError, match=said):
        check_tensors(tmp_path, stored_tensors(tmp_path), SMALL, "llama")


def test_an_output_layer_of_another_shape_is_told_before_numbers_are_read(tmp_path: Path) -> None:
    save_file(fitting() | {HEAD: np.ones((8, 4), "f4")}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=rf"{HEAD}: shape \[8, 4\], expected \[9, 4\]"):
        check_tensors(tmp_path, stored_tensors(tmp_path), SMALL, "llama")


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 10**12}, {"vocab_size": 1 << 62}, {"num_layers": 20, "hidden_size": 1, "head_dim": 1}],
)
def test_a_model_far_beyond_the_files_is_refused_at_once(change: dict[str, int], tmp_path: Path) -> None:
    save_file(fitting(), tmp_path / SINGLE)
    with pytest.raises(
        ValueError, match=r"config\.json means [\d,]+ parameters in [\d,]+ layers, and the files hold"
    ):
        check_tensors(tmp_path, stored_tensors(tmp_path), dataclasses.replace(SMALL, **change), "llama")


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "length of 2^60": (1 << 60).to_bytes(8, "little") + b"{}",
    "length of 2^64 - 1": b"\xff" * 8,
    "length beyond the file": (99).to_bytes(8, "little") + b"{}",
    "less than a length": b"\x02\0\0",
    "no JSON": (2).to_bytes(8, "little") + b"{]",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "deep": (9000).to_bytes(8, "little") + b"[" * 9000,
    "offsets beyond the end": header(a=tensor(offsets=(0, 80))) + bytes(8),
    "offsets backwards": header(a=tensor(offsets=(8, 0))) + bytes(8),
    "offsets that overlap": header(a=tensor(), b=tensor(offsets=(4, 12))) + bytes(12),
    "a hole": header(a=tensor(), b=tensor(offsets=(80, 88))) + bytes(88),
    "bytes that nothing names": header(a=tensor()) + bytes(800),
    "a product beyond counting": header(a=tensor(shape=(1 << 40, 1 << 40))) + bytes(8),
    "a negative size": header(a=tensor(shape=(-2,))) + bytes(8),
    "a size of text": header(a=tensor(shape=("2",))) + bytes(8),
    "NaN as a size": header(a=tensor(shape=(math.nan,))) + bytes(8),
    "a shape that the bytes deny": header(a=tensor(shape=(3,))) + bytes(8),
    "another type": header(a=tensor(dtype="F33")) + bytes(8),
    "no type": header(a={"shape": [2], "data_offsets": [0, 8]}) + bytes(8),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_header_that_denies_its_file_is_one_short_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{SINGLE} is damaged, or no safetensors") as error:
        stored_tensors(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", [INDEX, SINGLE])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "linked device"])
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/stdin")
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
        stored_tensors(tmp_path)


def test_files_that_are_links_to_another_folder_are_read(tmp_path: Path) -> None:
    """As in the hub's cache."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "folder").mkdir()
    shards(tmp_path / "blobs")
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "folder" / path.name).symlink_to(path)
    assert stored_tensors(tmp_path / "folder").keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["a" * 10**6, "a\nerror: b", "\x1b[2J", "\u202e"])
def test_names_of_others_are_shown_short_and_on_one_line(name: str, tmp_path: Path) -> None:
    save_file(fitting() | {name: np.ones(1, "f4"), "x": np.ones(1, "f4")}, tmp_path / SINGLE)
    stored = stored_tensors(tmp_path)
    messages = []
    with pytest.raises(ValueError, match="no place for it") as error:
        check_tensors(tmp_path, stored, SMALL, "llama")
    messages += str(error.value).splitlines()
    for where in ({"b": SINGLE}, {name: "../x"}, {"b": f"../{name}"}, {name: SINGLE}):
        write_index(tmp_path, where)
        with pytest.raises(ValueError) as error:
            stored_tensors(tmp_path)
        messages.append(str(error.value))
    assert max(map(len, messages)) < 600 and all(line.isprintable() for line in messages)


def test_of_many_other_files_the_first_are_named(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03d}.bin").touch()
    assert unread_files(tmp_path).endswith("015.bin and 84 more")
