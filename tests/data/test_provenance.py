"""Every stored document can be traced to its line, and found by its text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_r1.data.indexed import IndexedDataset
from megatron_r1.data.provenance import read_provenance
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece

KIND = "SentencePieceTokenizer"
TEXTS = [f"Document {i}: {'words and  spaces ' * (i % 7)}\n\tline {i * i}" for i in range(200)]


def jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    inputs = [jsonl(folder / "a.jsonl", TEXTS[:70]), jsonl(folder / "b.jsonl", ["", *TEXTS[70:]])]
    model = folder / "sp.model"
    train_sentencepiece(inputs[:1], model, vocab_size=330)
    preprocess(inputs, folder / "out", KIND, model, append_eod=True, log=lambda line: None)
    return folder / "out_text_document", inputs, build_tokenizer(KIND, model)


def test_each_document_is_that_of_its_line(made):
    prefix, inputs, tokenizer = made
    origins, dataset = read_provenance(prefix), IndexedDataset(prefix)
    assert origins.inputs == [str(path) for path in inputs]
    lines = [path.read_text().splitlines() for path in inputs]
    for i in range(dataset.num_documents):
        text = json.loads(lines[origins.files[i]][int(origins.lines[i]) - 1])["text"]
        assert dataset.document(i).tolist() == [*tokenizer.encode(text), tokenizer.eod]
        assert origins.hashes[i].tobytes() == xxhash.xxh3_128_digest(text.encode())


def test_mask_by_content(made):
    origins = read_provenance(made[0])
    chosen = set(TEXTS[5:50:3])
    wanted = {xxhash.xxh3_128_digest(text.encode()) for text in chosen}
    mask = origins.among([*wanted, b"\0" * 16])
    assert mask.sum() == len(chosen)
    assert {h.tobytes() for h in origins.hashes[mask]} == wanted
    assert not origins.among([]).any()


def test_megatrons_merging_tool_takes_the_folder(made):
    """It passes over folders, and wants an .idx or a .bin for the stem of each file."""
    files = sorted(path.name for path in made[0].parent.glob("out*") if path.is_file())
    assert files == [f"out_text_document.{kind}" for kind in ("bin", "idx", "json")]
    beside = sorted(path.name for path in Path(f"{made[0]}.side").iterdir())
    assert beside == ["docs.npy", "hashes.npy", "ledger.jsonl", "rejects.jsonl"]


def test_costs_28_bytes_a_document(made):
    assert Path(f"{made[0]}.side/docs.npy").stat().st_size == 192 + 28 * len(TEXTS)


def test_file_of_another_pair_is_refused(made, tmp_path):
    prefix = tmp_path / "pair"
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").write_bytes(Path(f"{made[0]}{suffix}").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"pair\.side/docs\.npy does not exist"):
        read_provenance(prefix)
    records = np.load(f"{made[0]}.side/docs.npy")
    Path(f"{prefix}.side").mkdir()
    np.save(f"{prefix}.side/docs.npy", records[:-1])
    with pytest.raises(ValueError, match="belongs to another pair"):
        read_provenance(prefix)
    np.save(f"{prefix}.side/docs.npy", records)
    Path(f"{prefix}.side/docs.npy").write_bytes(Path(f"{prefix}.side/docs.npy").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"docs\.npy is damaged"):
        read_provenance(prefix)
    records["line"][3:] = 0
    np.save(f"{prefix}.side/docs.npy", records)
    with pytest.raises(ValueError, match=r"docs\.npy is damaged: document 3 has line 0"):
        read_provenance(prefix)


def test_origins_beside_the_pair_are_read_too(made, tmp_path):
    """Earlier versions wrote them there."""
    prefix = tmp_path / "pair"
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").write_bytes(Path(f"{made[0]}{suffix}").read_bytes())
    Path(f"{prefix}.docs.npy").write_bytes(Path(f"{made[0]}.side/docs.npy").read_bytes())
    np.testing.assert_array_equal(read_provenance(prefix).hashes, read_provenance(made[0]).hashes)
