"""Where each stored document came from, and a hash that tells its text: `PREFIX.docs.npy`, beside the pair.

A NumPy array (format 1.0, memory-mapped), one record of 28 bytes a document, in stored order:

    hash    16 bytes    XXH3-128 of the document's text in UTF-8, in the canonical (big-endian) byte order
    file    uint32      number of the input, from 0, in the sidecar's "inputs"
    line    uint64      line (JSONL) or row (tables) of that input, from 1

The hash does not depend on the tokenizer: a list of texts to keep or to drop, made by any tool, can be
turned into a mask over the documents of every pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_r1.data.indexed import IndexedDataset, read_sidecar, with_suffix

ORIGIN = np.dtype([("hash", "u1", 16), ("file", "<u4"), ("line", "<u8")])
SUFFIX = ".docs.npy"


def text_hashes(texts: Iterable[bytes]) -> np.ndarray:
    """16 bytes that tell each text, in UTF-8: [texts, 16] uint8."""
    joined = b"".join(map(xxhash.xxh3_128_digest, texts))
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


@dataclass(frozen=True)
class Provenance:
    """Arrays over the documents of a pair, in stored order, memory-mapped."""

    hashes: np.ndarray
    """[documents, 16] uint8."""
    files: np.ndarray
    """[documents] uint32, numbers of `inputs`."""
    lines: np.ndarray
    """[documents] uint64, from 1."""
    inputs: list[str]

    def among(self, hashes: Iterable[bytes]) -> np.ndarray:
        """Whether each document's hash is one of these, [documents] bool: a mask by content."""
        # As strings, which NumPy can sort: of equal length, so that zeros at their end tell nothing apart.
        ours = np.ascontiguousarray(self.hashes).view("S16").ravel()
        return np.isin(ours, np.array(list(hashes), dtype="S16"))


def read_provenance(prefix: str | Path) -> Provenance:
    """Origins of a pair's documents. FileNotFoundError without the file, ValueError for another pair's."""
    path = with_suffix(prefix, SUFFIX)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; tools/preprocess_data.py writes it")
    try:
        records = np.load(path, mmap_mode="r" if path.stat().st_size > 256 else None)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); make the pair again") from None
    documents = IndexedDataset(prefix).num_documents
    if records.dtype != ORIGIN or records.shape != (documents,):
        raise ValueError(
            f"{path} belongs to another pair: {records.shape} records of {records.dtype}, where the pair has "
            f"{documents} documents; make the pair again"
        )
    inputs = [entry["path"] for entry in (read_sidecar(prefix) or {}).get("inputs", [])]
    return Provenance(records["hash"], records["file"], records["line"], inputs)
