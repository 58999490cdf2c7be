"""A checkpoint is data: nothing of its files runs, and what is wrong with them is said in one line."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.load import contents_of, load_checkpoint
from megatron_r1.checkpoint.pickles import Span, read_archive, read_pickle
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ParallelConfig
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from tests.checkpoint.crafted import CRAFTED, archive, changed, copied
from tests.influence import tiny


@pytest.fixture(scope="module")
def gpt() -> Iterator[Any]:
    with process_groups(ParallelConfig()):
        yield tiny.build()


@pytest.fixture(scope="module")
def genuine(gpt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genuine")
    return save_checkpoint(folder, gpt, None, TrainState(3, 6, 24), tiny.MODEL, "one", plan="{}").path


def refused(path: Path, gpt: Any, trap: Path) -> str:
    """The one line that a checkpoint is refused with, at once."""
    began = time.process_time()
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, gpt, None, tiny.MODEL)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 900
    assert not trap.exists() and time.process_time() - began < 5
    return message


# megatron-core 0.19 writes no common.pt.
NAMES = [name for name in CRAFTED if "common.pt" not in name or version("megatron-core") < "0.19"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_crafted_checkpoint_runs(name: str, gpt: Any, genuine: Path, tmp_path: Path) -> None:
    path = copied(genuine, tmp_path / genuine.name, CRAFTED[name], trap := tmp_path / "ran")
    refused(path, gpt, trap)


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "no files": {"files": {}},
    "files above": {"files": {"../x": [1, "0"]}},
    "files elsewhere": {"files": {"/etc/passwd": [1, "0"]}},
    "files of no name": {"files": {"": [1, "0"], ".": [0, "0"]}},
    "files with odd names": {"files": {"\ud800": [1, "0"]}},
    "files without sizes": {"files": {"common.pt": "x"}},
    "negative sizes": {"files": {"common.pt": [-1, "0"]}},
    "sizes that are none": {"files": {"common.pt": [None, {}]}},
    "facts of three": {"files": {"common.pt": [1, "0", 2]}},
    "files as a list": {"files": [".metadata"]},
    "no state": {"state": None},
    "half a state": {"state": {"step": 3}},
    "more than a state": {"state": {"step": 3, "samples": 6, "tokens": 24, "x": 1}},
    "samples before steps": {"state": {"step": 0, "samples": 6, "tokens": 24}},
    "true steps": {"state": {"step": True, "samples": 6, "tokens": 24}},
    "endless steps": {"state": {"step": 1 << 4000, "samples": 6, "tokens": 24}},
    "steps in words": {"state": {"step": "3", "samples": 6, "tokens": 24}},
    "a guard that is none": {"state": {"step": 3, "samples": 6, "tokens": 24, "guard": [1]}},
    "no model": {"model": None},
    "an empty model": {"model": {}},
    "a long model": {"model": {"num_layers": "x" * 1_000_000}},
    "a plan that is none": {"plan": {}},
    "a phase that is none": {"phase": 1},
    "a later format": {"format": 3},
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_of_another_kind_is_refused(name: str, gpt: Any, genuine: Path, tmp_path: Path) -> None:
    path = copied(genuine, tmp_path / genuine.name, lambda *_: None, tmp_path, **DESCRIPTIONS[name])
    refused(path, gpt, tmp_path / "ran")


def test_a_flipped_byte_of_a_file_that_is_not_listed_is_no_way_in(
    gpt: Any, genuine: Path, tmp_path: Path
) -> None:
    def flip(path: Path, _: Any) -> None:
        content = bytearray((path / "__0_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (path / "__0_0.distcp").write_bytes(content)

    path = copied(genuine, tmp_path / genuine.name, flip, tmp_path, files={})
    assert "'__0_0.distcp' is not listed by megatron_r1.json" in refused(path, gpt, tmp_path / "ran")


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_description_that_is_no_file_is_refused(kind: str, gpt: Any, genuine: Path, tmp_path: Path) -> None:
    path = tmp_path / genuine.name
    shutil.copytree(genuine, path)
    description = path / checkpoint_files.META
    description.rename(tmp_path / "outside")
    if kind == "pipe":
        os.mkfifo(description)
    elif kind == "link":
        description.symlink_to(tmp_path / "outside")
    else:
        description.mkdir()
    refused(path, gpt, tmp_path / "ran")
    assert checkpoint_files.damaged(tmp_path) == [path]


def test_a_listed_file_that_is_a_pipe_is_not_opened(gpt: Any, genuine: Path, tmp_path: Path) -> None:
    shutil.copytree(genuine, path := tmp_path / genuine.name)
    if (path / "common.pt").exists():
        (path / "common.pt").unlink()
        os.mkfifo(path / "common.pt")
        assert "common.pt is a link, a pipe or the like" in refused(path, gpt, tmp_path / "ran")
    (path / "__0_0.distcp").unlink()
    os.mkfifo(path / "__0_0.distcp")
    with pytest.raises(ValueError, match="is a link, a pipe or the like"):
        contents_of(path)


def test_settings_among_the_tensors_are_read(gpt: Any, genuine: Path, tmp_path: Path) -> None:
    """As megatron-core 0.19 writes them."""

    def move(metadata: Any, path: Path, _: Any) -> None:
        (path / "common.pt").unlink(missing_ok=True)
        (path / "__9_9.distcp").write_bytes(content := archive([{"a": (1, 2.5, None, "x")}]))
        metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
        index = MetadataIndex("common_state/shard_0_1")
        metadata.storage_data[index] = _StorageInfo("__9_9.distcp", 0, len(content))

    path = copied(genuine, tmp_path / genuine.name, changed(move), tmp_path)
    assert contents_of(path).common == {"a": (1, 2.5, None, "x")}
    assert load_checkpoint(path, gpt, None, tiny.MODEL) == TrainState(3, 6, 24)


@pytest.mark.parametrize("byte", [b"]", b"}", b"N\x94", b")\x85", b"("], ids=repr)
def test_a_byte_stands_for_few_objects(byte: bytes) -> None:
    """Genuine pickles have 4 to 5 bytes an object. A list of one byte takes 64 in memory."""
    crafted = b"\x80\x04(" + byte * 100_000 + b"t."
    with pytest.raises(ValueError, match="more objects than one of its size"):
        read_pickle(crafted, ())
    content = b"\x80\x04](" + b"}" * 400 + b"e."
    assert read_pickle(content, ()) == [{}] * 400


def test_the_pickle_of_an_archive_is_short() -> None:
    content = archive("x" * (5 << 20))
    with pytest.raises(ValueError, match="its pickle is too long"):
        read_archive(io.BytesIO(content), Span("x", 0, len(content)), ())


def test_a_small_file_of_many_ranks_is_read_and_a_huge_one_is_not(tmp_path: Path) -> None:
    """17 MB are 0.5 kB for 34,000 pieces."""
    (tmp_path / ".metadata").write_bytes(bytes(17 << 20))
    facts = checkpoint_files.facts_of([tmp_path / ".metadata"])
    assert len(checkpoint_files.read_verified(tmp_path, ".metadata", facts)) == 17 << 20
    os.truncate(tmp_path / ".metadata", size := (256 << 20) + 1)
    with pytest.raises(ValueError, match="has 268,435,457 bytes, more than 268,435,456"):
        checkpoint_files.read_verified(tmp_path, ".metadata", {".metadata": [size, "0"]})
    (tmp_path / checkpoint_files.META).write_bytes(b"{" + b" " * (64 << 20) + b"}")
    with pytest.raises(ValueError, match="is not as it was written"):
        checkpoint_files.read_meta(tmp_path)


def test_a_genuine_one_that_is_sealed_anew_loads(gpt: Any, genuine: Path, tmp_path: Path) -> None:
    """So that what the others are refused for is what is wrong with them."""
    path = copied(genuine, tmp_path / genuine.name, lambda *_: None, tmp_path)
    assert load_checkpoint(path, gpt, None, tiny.MODEL) == TrainState(3, 6, 24)


def test_an_identity_pins_a_checkpoint(gpt: Any, genuine: Path, tmp_path: Path) -> None:
    expected = checkpoint_files.identity(genuine)
    load_checkpoint(genuine, gpt, None, tiny.MODEL, expect=expected.upper())
    path = copied(genuine, tmp_path / genuine.name, lambda *_: None, tmp_path, phase="two")
    with pytest.raises(ValueError, match=f"is not the checkpoint that was expected: '{expected}' was, it is"):
        load_checkpoint(path, gpt, None, tiny.MODEL, expect=expected)
    # As of a variable of the shell that is not set.
    with pytest.raises(ValueError, match="expected: '' was"):
        checkpoint_files.read_meta(genuine, "")
