"""Damage to a `.bin` is found at opening: by the hashes that were stored with it, and by holes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_r1.data import integrity
from megatron_r1.data.indexed import IndexedWriter, open_corpus
from megatron_r1.data.integrity import BinHashes, DamagedBinError, check_bin, side_file
from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.preprocess.store import verify
from megatron_r1.system import process

STRETCH = 4096


def written(prefix: Path, stretches: float = 12, zeros: slice = slice(0, 0)) -> Path:
    """A pair of random tokens, of so many stretches; `zeros`: tokens that are 0."""
    tokens = np.random.default_rng(0).integers(1, 60_000, int(stretches * STRETCH / 2)).astype(np.uint16)
    tokens[zeros] = 0
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(tokens, np.array([len(tokens)]))
    return prefix


def overwrite(prefix: Path, offset: int, data: bytes) -> None:
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def dig(prefix: Path, lo: int, hi: int) -> None:
    """Make a hole, as a copy leaves it that was interrupted. Skips where the file system has none."""
    path, data = Path(f"{prefix}.bin"), Path(f"{prefix}.bin").read_bytes()
    with open(path, "wb") as stream:
        stream.write(data[:lo])
        stream.seek(hi)
        stream.write(data[hi:])
        stream.truncate(len(data))
    with open(path, "rb") as stream:
        assert integrity._holes(stream.fileno(), len(data)) == [(lo, hi)]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every .bin counts as a large one, of which three stretches are compared."""
    monkeypatch.setattr(integrity, "_WHOLE", 0)
    monkeypatch.setattr(integrity, "_SAMPLE", 3)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 20_000])
def test_hashes_do_not_depend_on_the_pieces_that_are_written(size: int) -> None:
    data = np.random.default_rng(1).bytes(size)
    want = [xxhash.xxh3_64_intdigest(data[at : at + STRETCH]) for at in range(0, size, STRETCH)]
    for piece in (1, 1000, 4096, 5000, 30_000):
        hashes = BinHashes()
        for at in range(0, size, piece):
            hashes.update(data[at : at + piece])
        words = hashes.words()
        assert words[4:].tolist() == want
        assert integrity.whole_hash(words) == hashes.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("offset", [0, 200, 4096 * 5 + 17, 4096 * 12 - 1, 4096 * 12 + 30])
def test_a_changed_byte_is_found_with_its_place(offset: int, tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", 12.01)
    assert open_corpus("a", prefix).doubt == ""
    byte = Path(f"{prefix}.bin").read_bytes()[offset]
    overwrite(prefix, offset, bytes([byte ^ 1]))
    with pytest.raises(DamagedBinError, match=rf"a\.bin is damaged at offset {offset // 4096 * 4096}: "):
        open_corpus("a", prefix)


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", 12)
    overwrite(prefix, 5 * STRETCH, bytes(10))
    found = []
    for rank in range(6):
        try:
            open_corpus("a", prefix, share=(rank, 6))
        except DamagedBinError:
            found.append(rank)
    assert found == [2]


def test_a_large_file_is_sampled(tmp_path: Path, sampled: None) -> None:
    prefix = written(tmp_path / "a", 11)
    overwrite(prefix, 3 * STRETCH, bytes(STRETCH))
    assert open_corpus("a", prefix).doubt == ""
    with pytest.raises(DamagedBinError, match="offset 12288"):
        verify(prefix, ["text"], print)
    for stretch in (0, 5, 10):
        written(tmp_path / "b", 11)
        overwrite(tmp_path / "b", stretch * STRETCH + 100, b"\0\0\0\0")
        with pytest.raises(DamagedBinError, match=f"offset {stretch * STRETCH}: these 4 KiB"):
            open_corpus("b", tmp_path / "b")


def test_a_hole_is_found_wherever_it_is(tmp_path: Path, sampled: None) -> None:
    prefix = written(tmp_path / "a", 11)
    dig(prefix, 7 * STRETCH, 8 * STRETCH)
    with pytest.raises(DamagedBinError, match="offset 28672: bytes 28672 to 32767 are a hole"):
        open_corpus("a", prefix)


def test_a_hole_where_zeros_were_written_is_right(tmp_path: Path, sampled: None) -> None:
    """A file system that compresses makes such holes."""
    prefix = written(tmp_path / "a", 11, zeros=slice(7 * 2048, 9 * 2048))
    dig(prefix, 7 * STRETCH, 8 * STRETCH)
    assert open_corpus("a", prefix).doubt == ""


def test_pairs_without_hashes_are_said_to_be_unchecked(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", 11)
    side_file(prefix, "hashes.npy").unlink()
    assert open_corpus("a", prefix).doubt == "no hashes beside it"
    dig(prefix, 7 * STRETCH, 9 * STRETCH)
    doubt = open_corpus("a", prefix).doubt
    assert doubt == "no hashes beside it; bytes 28672 to 36863 are a hole, which reads as zeros"
    with pytest.raises(ValueError, match=r"a\.bin cannot be verified: no hashes"):
        verify(prefix, ["text"], print)


def test_file_systems_that_cannot_tell_holes_are_said(
    tmp_path: Path, sampled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = written(tmp_path / "a", 11)

    def unsupported(*_: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", unsupported)
    assert open_corpus("a", prefix).doubt == "its file system cannot tell holes"


def test_a_sidecar_of_an_earlier_version_has_a_hash_of_the_whole(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a")
    digest = hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    side_file(prefix, "hashes.npy").unlink()
    assert check_bin(prefix, {"bin_sha256": digest}) == ""
    overwrite(prefix, 200, bytes(800))
    with pytest.raises(DamagedBinError, match=r"SHA-256 is not that of a\.json"):
        check_bin(prefix, {"bin_sha256": digest})


@pytest.mark.parametrize("how", ["short", "another", "no array"])
def test_hashes_of_another_pair_are_refused(how: str, tmp_path: Path) -> None:
    prefix, other = written(tmp_path / "a"), written(tmp_path / "b", 12 if how == "another" else 13)
    if how == "no array":
        side_file(other, "hashes.npy").write_bytes(b"\0" * 200)
    os.replace(side_file(other, "hashes.npy"), side_file(prefix, "hashes.npy"))
    with pytest.raises(ValueError, match=r"a\.side/hashes\.npy is damaged, or of another pair"):
        check_bin(prefix, {"bin_sha256": "0" * 64})


def test_a_pair_written_again_has_its_own_hashes(tmp_path: Path) -> None:
    written(tmp_path / "a", 12)
    assert open_corpus("a", written(tmp_path / "a", 7)).doubt == ""


SIDECAR = {"documents": 1, "vocab_size": 300, "eod": None, "append_eod": False, "inputs": [{"path": "x"}]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", None),
        ("vocab_size", True),
        ("vocab_size", -1),
        ("vocab_size", "300"),
        ("documents", 1.5),
        ("eod", "0"),
        ("append_eod", 1),
        ("dtype", None),
        ("tokenizer_fingerprint", 3),
        ("bin_sha256", "abc"),
        ("inputs", [3]),
        ("inputs", None),
        ("rejected", [1]),
        ("lines", 3),
        ("seed", "x"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named_with_its_file(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SIDECAR))
    assert read_sidecar(tmp_path / "a") == SIDECAR
    path.write_text(json.dumps({**SIDECAR, field: value}))
    with pytest.raises(ValueError, match=rf"{path} is not the sidecar .*: {field} is ") as caught:
        read_sidecar(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_a_field_that_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SIDECAR))
    with pytest.raises(ValueError, match=r"a\.json is not the sidecar .*: no lines;"):
        read_sidecar(tmp_path / "a", ("documents", "lines"))
    for content in ("3", "[]", "{", "[" * 100_000):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json is not"):
            read_sidecar(tmp_path / "a")


def test_too_few_file_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, raised = [200, 5000], []
    monkeypatch.setattr(process.resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(process.resource, "setrlimit", lambda which, pair: raised.append(pair))
    process.allow_open_files(14, "datasets")
    assert raised == []
    process.allow_open_files(300, "datasets")
    assert raised == [(450, 5000)]
    limits[1] = 200
    with pytest.raises(
        ValueError, match="300 datasets need a limit of 450 open files, and the hard limit is 200"
    ):
        process.allow_open_files(300, "datasets")


def test_a_changed_document_of_our_own_index_is_found(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(9):
            writer.add_document(np.arange(5))
    sidecar = {"documents": 9, "tokens": 45, "dtype": "uint16"}
    (tmp_path / "a.json").write_text(json.dumps(sidecar))
    assert open_corpus("a", prefix).documents == 9
    place = 34 + 12 * 9 + 8 * 4
    with open(tmp_path / "a.idx", "r+b") as stream:
        stream.seek(place)
        stream.write(np.int64(5).tobytes())
    with pytest.raises(ValueError, match=rf"a\.idx is damaged at offset {place}: document entry 4 is 5"):
        open_corpus("a", prefix)
