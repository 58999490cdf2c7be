"""Those files of a Hugging Face folder count that transformers reads, or the folder is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

from megatron_r1.export.folder import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    check_tensors,
    read_json,
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
        (lambda folder: None, "but no weights; "),
        (adapter, "has adapter_config.json"),
        (indexed({"a": ONE, "b": ONE}), f"{INDEX} disagrees with its files: b is in no file"),
        (indexed({"a": TWO, "b": ONE}), f"a is in {ONE}, and the index says {TWO}"),
        (indexed({"a": ONE}) and (lambda f: (twice(f), write_index(f, {"a": ONE}))), "b is in"),
        (indexed({"a": ONE, "b": "gone.safetensors"}), "/gone.safetensors is missing"),
        (indexed({"a": ONE, "b": f"../{TWO}"}), f"b is said to be in '../{TWO}'"),
        (indexed({"a": ONE, "b": f"sub/{TWO}"}), "which is no .safetensors beside it"),
        (indexed({"a": ONE, "b": "model.bin"}), "'model.bin', which is no"),
        (indexed({"a": ONE, "b": None}), "b is said to be in None"),
        (indexed({}), f"{INDEX} is damaged: it has no weight_map"),
        (indexed([]), f"{INDEX} is damaged: it has no weight_map"),
        (holding(b'{"weight_map": ', INDEX), f"{INDEX} is damaged, or no JSON"),
        (holding(b"\xff\xfe", INDEX), f"{INDEX} is damaged, or no JSON"),
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


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "float64", "complex64"])
def test_tensors_that_no_checkpoint_holds_exactly_are_refused_by_name(dtype: str, tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 3), dtype), "b": np.ones(2, np.float16)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=rf"a: [A-Z0-9]+ in {SINGLE}; weights are F32, BF16, F16"):
        check_tensors(tmp_path, stored_tensors(tmp_path), {"a": (2, 3), "b": (2,)})


def test_an_output_layer_of_another_shape_is_told_before_numbers_are_read(tmp_path: Path) -> None:
    save_file({EMBEDDING: np.ones((2, 3), "f4"), HEAD: np.ones((3, 3), "f4")}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=rf"{HEAD}: shape \[3, 3\], expected \[2, 3\]"):
        check_tensors(tmp_path, stored_tensors(tmp_path), {EMBEDDING: (2, 3)})


@pytest.mark.parametrize("text", ['{"a": ', "[1]", "", "\ufeff{}", "[" * 100_000])
def test_a_json_file_that_is_damaged_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json "):
        read_json(tmp_path / "config.json")
