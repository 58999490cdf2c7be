"""Where each stored document came from, and a hash that tells its text: `PREFIX.side/docs.npy`.

A NumPy array (format 1.0, memory-mapped), one record of 28 bytes a document, in stored order:

    hash    16 bytes    XXH3-128 of the document's text in UTF-8, in the canonical (big-endian) byte order
    file    uint32      number of the input, from 0, in the sidecar's "inputs"
    line    uint64      line (JSONL) or row (tables) of that input, from 1

The hash does not depend on the tokenizer: a list of texts to keep or to drop, made by any tool, can be
turned into a mask over the documents of every pair.

Earlier versions wrote `PREFIX.docs.npy`, which is read too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_r1.data.indexed import IndexedDataset, with_suffix
from megatron_r1.data.integrity import side_file
from megatron_r1.data.npy import read_array
from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.system.errors import rewording

ORIGIN = np.dtype([("hash", "u1", 16), ("file", "<u4"), ("line", "<u8")])
FORMER = ".docs.npy"
"""Suffix of the file of earlier versions."""


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


def origins_of(prefix: str | Path) -> Path:
    """The file of a pair's origins: that of an earlier version where only it is there."""
    path, former = side_file(prefix, "docs.npy"), with_suffix(prefix, FORMER)
    return former if former.is_file() and not path.is_file() else path


def load_origins(prefix: str | Path, documents: int) -> np.ndarray:
    """[documents] of ORIGIN, memory-mapped. FileNotFoundError without the file.

    ValueError where the file is damaged, or of another pair.
    """
    path = origins_of(prefix)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; tools/preprocess_data.py writes it")
    with rewording(lambda error: f"{path} is damaged ({error}); make the pair again"):
        records = read_array(path, ORIGIN, (None,), "r")
    if len(records) != documents:
        fault = f"it has {len(records)} records, where the pair has {documents} documents"
        raise ValueError(f"{path} belongs to another pair: {fault}; make the pair again")
    # Lines count from 1. A sample of 65,536 records finds zeros in place of a part of the file.
    line_N = records["line"][:: max(1, documents >> 16)]
    if not line_N.all():
        document = int(np.argmin(line_N)) * max(1, documents >> 16)
        raise ValueError(f"{path} is damaged: document {document} has line 0; make the pair again")
    return records


def read_provenance(prefix: str | Path) -> Provenance:
    """Origins of a pair's documents, and its inputs by the sidecar. Errors as of `load_origins`."""
    records = load_origins(prefix, IndexedDataset(prefix).num_documents)
    inputs = [entry["path"] for entry in (read_sidecar(prefix) or {}).get("inputs", [])]
    if len(records) and inputs and int(records["file"].max()) >= len(inputs):
        fault = f"{origins_of(prefix)} is damaged: it names more inputs than {prefix}.json"
        raise ValueError(f"{fault}; make the pair again")
    return Provenance(records["hash"], records["file"], records["line"], inputs)
