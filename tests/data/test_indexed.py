"""Pairs against megatron-core's own reader and builder, and every damage refused."""

from __future__ import annotations

import json
import re
import struct
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, best_dtype, open_corpus
from megatron_r1.system.files import replacing

DOCUMENTS = [np.array(d) for d in ([1, 2, 3], [4], list(range(500)), [], [65535, 0])]


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's module; importing it warns of what it does without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def write_megatron(megatron, prefix: Path, documents, dtype, lengths=None) -> Path:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for i, document in enumerate(documents):
        builder.add_document(document, lengths[i] if lengths else [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_writes_the_bytes_of_megatrons_builder(megatron, tmp_path, dtype):
    ours = write(tmp_path / "ours", dtype=dtype)
    theirs = write_megatron(megatron, tmp_path / "theirs", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(megatron, tmp_path, dtype):
    theirs = megatron.IndexedDataset(str(write(tmp_path / "pair", dtype=dtype)))
    assert len(theirs) == len(DOCUMENTS)
    for i, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(theirs[i], document)


def test_reads_what_megatron_writes_with_several_sequences_a_document(megatron, tmp_path):
    documents, lengths = [np.arange(10), np.arange(7)], [[4, 6], [7]]
    dataset = IndexedDataset(write_megatron(megatron, tmp_path / "pair", documents, np.int32, lengths))
    assert dataset.dtype == np.int32
    assert [list(dataset[i]) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9], list(range(7))]
    assert list(dataset.documents) == [0, 2, 3]
    assert [list(dataset.document(i)) for i in range(2)] == [list(range(10)), list(range(7))]
    assert [dataset.tokens_before(i) for i in range(3)] == [0, 10, 17]
    assert list(dataset.tokens) == [*range(10), *range(7)]


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=12), batch=st.booleans())
def test_round_trip(tmp_path_factory, documents, batch):
    prefix = tmp_path_factory.mktemp("pairs") / "pair"
    with IndexedWriter(prefix, np.uint16) as writer:
        if batch:
            flat = np.array([t for d in documents for t in d], dtype=np.int64)
            writer.add_documents(flat, np.array([len(d) for d in documents], dtype=np.int64))
        else:
            for document in documents:
                writer.add_document(np.array(document, dtype=np.int64))
    dataset = IndexedDataset(prefix)
    assert [list(dataset[i]) for i in range(len(dataset))] == documents
    assert list(dataset.tokens) == [t for d in documents for t in d]


def test_best_dtype_is_megatrons(megatron):
    for size in (1, 65499, 65500, 128256):
        assert best_dtype(size) == np.dtype(megatron.DType.optimal_dtype(size))


# With 5 documents the lengths start at 34, the pointers at 54, the document entries at 94, end 142.
def put(offset: int, layout: str, *values: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.idx")
        data = bytearray(path.read_bytes())
        struct.pack_into(layout, data, offset, *values)
        path.write_bytes(data)

    return damage


def resize(suffix: str, by: int) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}{suffix}")
        data = path.read_bytes()
        path.write_bytes(data[:by] if by < 0 else data + bytes(by))

    return damage


FAULTS = {
    "bin truncated": (
        resize(".bin", -2),
        r"pair\.bin is damaged at offset 1010: it is truncated: 1010 bytes",
    ),
    "bin cut within a token": (resize(".bin", -1), r"pair\.bin .* truncated: 1011 bytes"),
    "bin longer": (resize(".bin", 2), r"pair\.bin is damaged at offset 1012: it is longer"),
    "idx truncated": (resize(".idx", -8), r"pair\.idx is damaged at offset 134: .* 142 bytes and 134"),
    "idx longer": (resize(".idx", 1), r"pair\.idx is damaged at offset 142"),
    "idx with modes": (resize(".idx", 5), r"multimodal"),
    "idx without header": (resize(".idx", -120), r"pair\.idx is damaged at offset 22: the header needs 34"),
    "magic": (put(0, "<B", 0), r"pair\.idx is damaged at offset 0: it starts with"),
    "version": (put(9, "<Q", 2), r"offset 9: version 2"),
    "unknown type": (put(17, "<B", 99), r"offset 17: token type code 99"),
    "float type": (put(17, "<B", 7), r"offset 17: token type code 7"),
    "another type": (put(17, "<B", 4), r"pair\.idx is damaged at offset 62: sequence 1 starts at byte 6"),
    "more sequences": (put(18, "<Q", 6), r"offset 142: 6 sequences"),
    "no documents": (put(26, "<Q", 0), r"offset 26"),
    "length": (
        put(38, "<i", 2),
        r"pair\.idx is damaged at offset 70: sequence 2 starts at byte 8 .* end at byte 10",
    ),
    "last length": (put(50, "<i", 3), r"pair\.bin is damaged at offset 1012: it is truncated"),
    "negative length": (put(38, "<i", -1), r"offset 38: sequence 1 has length -1"),
    "first pointer": (put(54, "<q", 2), r"offset 54: sequence 0 starts at byte 2"),
    "pointer": (put(62, "<q", 4), r"offset 62: sequence 1 starts at byte 4 .* end at byte 6"),
    "first document": (put(94, "<q", 1), r"offset 94: documents span sequences 1 to 5, not 0 to 5"),
    "last document": (put(134, "<q", 4), r"documents span sequences 0 to 4"),
    "documents fall": (put(110, "<q", 0), r"offset 110: document entry 2 is below"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_with_file_and_offset(tmp_path, fault):
    damage, message = FAULTS[fault]
    prefix = write(tmp_path / "pair")
    damage(prefix)
    with pytest.raises(ValueError, match=message) as raised:
        IndexedDataset(prefix)
    assert "make the pair again" in str(raised.value)


@pytest.mark.parametrize("ranks", [2, 3, 168])
@pytest.mark.parametrize("fault", FAULTS)
def test_ranks_that_check_a_part_each_miss_no_damage(tmp_path, fault, ranks):
    prefix = write(tmp_path / "pair")
    for rank in range(ranks):
        assert len(IndexedDataset(prefix, (rank, ranks))) == 5
    damage, message = FAULTS[fault]
    damage(prefix)
    said = []
    for rank in range(ranks):
        try:
            IndexedDataset(prefix, (rank, ranks))
        except ValueError as error:
            said.append(str(error))
    assert any(re.search(message, line) for line in said), said


def test_a_rank_reads_its_part_of_the_index_alone(tmp_path):
    """Damage in another's part is not its to find."""
    prefix = write(tmp_path / "pair")
    put(62, "<q", 4)(prefix)
    IndexedDataset(prefix, (2, 3))
    with pytest.raises(ValueError, match="sequence 1"):
        IndexedDataset(prefix, (0, 2))


def test_every_index_longer_than_one_check_is_checked_on_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_r1.data.indexed._CHECKED_AT_ONCE", 2)
    prefix = write(tmp_path / "pair")
    assert len(IndexedDataset(prefix)) == 5
    put(54 + 8 * 4, "<q", 0)(prefix)
    with pytest.raises(ValueError, match=r"offset 86: sequence 4"):
        IndexedDataset(prefix)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.idx does not exist"):
        IndexedDataset(tmp_path / "nothing")


@pytest.mark.parametrize("wrong", ["wiki", "wkii_text_document", "wiki_text_document.bin"])
def test_pairs_beside_a_missing_one_are_suggested(wrong, tmp_path):
    write(tmp_path / "wiki_text_document")
    write(tmp_path / "other_text")
    with pytest.raises(FileNotFoundError, match=rf"; did you mean {tmp_path}/wiki_text_document\?$"):
        IndexedDataset(tmp_path / wrong)


def test_slice_outlives_its_dataset(tmp_path):
    tokens = IndexedDataset(write(tmp_path / "pair"))[2]
    np.testing.assert_array_equal(tokens, DOCUMENTS[2])


@pytest.mark.parametrize("token", [-1, 70000])
def test_token_beyond_the_dtype_is_refused_and_leaves_nothing(tmp_path, token):
    with pytest.raises(ValueError, match=f"token {token} in documents 1 to 1"):
        write(tmp_path / "pair", [np.array([1]), np.array([token])])
    assert list(tmp_path.iterdir()) == []


def test_document_longer_than_an_index_can_say_is_refused(tmp_path):
    """The array takes no memory; a length of 2^31 in an int32 would be -2^31."""
    with pytest.raises(ValueError, match=r"a document of 2147483648 tokens; an index holds up to 2147483647"):
        write(tmp_path / "pair", [np.broadcast_to(np.uint16(1), 2**31)])
    assert list(tmp_path.iterdir()) == []


def test_index_written_in_parts_is_that_of_megatrons_builder(megatron, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_r1.data.indexed._WRITTEN_AT_ONCE", 2)
    ours = write(tmp_path / "ours")
    theirs = write_megatron(megatron, tmp_path / "theirs", DOCUMENTS, np.uint16)
    assert Path(f"{ours}.idx").read_bytes() == Path(f"{theirs}.idx").read_bytes()


def test_empty_pair(megatron, tmp_path):
    ours = write(tmp_path / "ours", [])
    theirs = write_megatron(megatron, tmp_path / "theirs", [], np.uint16)
    assert Path(f"{ours}.idx").read_bytes() == Path(f"{theirs}.idx").read_bytes()
    assert len(IndexedDataset(ours)) == 0


def test_failed_writer_leaves_the_pair_that_was_there(tmp_path):
    prefix = write(tmp_path / "pair")
    with pytest.raises(RuntimeError), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.array([9]))
        raise RuntimeError
    np.testing.assert_array_equal(IndexedDataset(prefix)[0], DOCUMENTS[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pair.bin", "pair.idx", "pair.side"]


def test_replacing_keeps_the_old_file_on_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert (path.read_bytes(), len(list(tmp_path.iterdir()))) == (b"old", 1)


def test_two_writers_of_one_file_take_turns(tmp_path):
    path = tmp_path / "file"

    def write_slowly(text: bytes) -> None:
        with replacing(path) as stream:
            for _ in range(20):
                stream.write(text)
                stream.flush()
                time.sleep(0.002)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_slowly, [b"aaaa", b"bb", b"c"]))
    assert path.read_bytes() in (b"aaaa" * 20, b"bb" * 20, b"c" * 20)
    assert len(list(tmp_path.iterdir())) == 1


def test_corpus_of_the_leading_documents(tmp_path):
    prefix = write(tmp_path / "pair")
    assert open_corpus("s", prefix).tokens == 506
    corpus = open_corpus("s", prefix, documents=2)
    assert (corpus.documents, corpus.tokens, corpus.dtype, corpus.tokenizer_hash) == (2, 4, "uint16", None)
    with pytest.raises(ValueError, match=r"documents=6, but .* has 5"):
        open_corpus("s", prefix, documents=6)


def test_sidecar_gives_the_tokenizer_and_must_fit(tmp_path):
    prefix = write(tmp_path / "pair")
    sidecar = {"documents": 5, "tokens": 506, "dtype": "uint16", "tokenizer_fingerprint": "abc"}
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    assert open_corpus("s", prefix).tokenizer_hash == "abc"
    Path(f"{prefix}.json").write_text(json.dumps({**sidecar, "tokens": 507}))
    with pytest.raises(ValueError, match=r"pair\.json belongs to another pair: it says tokens 507"):
        open_corpus("s", prefix)
