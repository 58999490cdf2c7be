"""Vocabularies are compared by the bytes of each id: any form of one is the same, and size says nothing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from megatron_r1.distill.vocabulary import identity, vocabulary_of, vocabulary_of_pair
from megatron_r1.export.tokenizer import tokenizer_files
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.tokenizer import HuggingFace, build_tokenizer
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from tests.curation.tiny import byte_pairs, texts, word_pieces


def ranks(folder: Path, more: list[bytes]) -> Path:
    path = folder / "tokenizer.model"
    tokens = [bytes([i]) for i in range(256)] + more
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return path


def sentencepiece(folder: Path) -> Path:
    lines = [json.dumps({"text": f"def one(x): # {n} \u6f22 <{n}>\n\treturn x"}) + "\n" for n in range(300)]
    (folder / "text.jsonl").write_text("".join(lines))
    train_sentencepiece([folder / "text.jsonl"], folder / "sp.model", vocab_size=300)
    return folder / "sp.model"


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "TikTokenizer:llama3", "TikTokenizer:qwen"])
def test_a_tokenizer_and_its_tokenizer_json_have_one_vocabulary(kind: str, tmp_path: Path) -> None:
    more = [b"de", b"  ", b"def", "\u6f22".encode(), b"\xff\xfe"]
    model = sentencepiece(tmp_path) if kind[0] == "S" else ranks(tmp_path, more)
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, content in tokenizer_files(kind, model).files.items():
        (folder / name).write_bytes(content)
    ours, theirs = build_tokenizer(kind, model), build_tokenizer("HuggingFaceTokenizer", folder)
    assert ours.fingerprint() != theirs.fingerprint()
    assert vocabulary_of(ours) == vocabulary_of(theirs)
    assert len(vocabulary_of(ours)) == ours.vocab_size


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "TikTokenizer:llama3", "HuggingFaceTokenizer"])
def test_bytes_are_those_of_the_text(kind: str, tmp_path: Path) -> None:
    text = "def one(x): \u6f22\U0001f642\n\treturn  a cat's 12\x00"
    if kind[0] == "H":
        byte_pairs(tmp_path)
    model = {"S": sentencepiece, "T": lambda folder: ranks(folder, [b"de"]), "H": lambda f: f}[kind[0]](
        tmp_path
    )
    tokenizer = build_tokenizer(kind, model)
    vocabulary = vocabulary_of(tokenizer)
    parts = [vocabulary[i] for i in tokenizer.encode(text)]
    assert b"".join(part for part in parts if part is not None) == text.encode()
    assert None not in parts and vocabulary[tokenizer.eod] is None


def changed(folder: Path, change: Any) -> str:
    """Identity of the byte pairs with a change of tokenizer.json."""
    byte_pairs(folder)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))
    return identity(vocabulary_of(HuggingFace(folder)))


def test_vocabularies_of_one_size_differ(tmp_path: Path) -> None:
    """Two ids that change places, and a special token of another name, which is the same."""

    def swap(spec: Any) -> None:
        vocab = spec["model"]["vocab"]
        vocab["x"], vocab["y"] = vocab["y"], vocab["x"]

    def rename(spec: Any) -> None:
        (token,) = (token for token in spec["added_tokens"] if token["content"] == "<|im_start|>")
        spec["model"]["vocab"]["<|other|>"] = spec["model"]["vocab"].pop(token["content"])
        token["content"] = "<|other|>"

    plain = changed(tmp_path / "plain", lambda spec: None)
    assert changed(tmp_path / "swap", swap) != plain
    assert changed(tmp_path / "rename", rename) == plain
    word_pieces(tmp_path / "words")
    assert identity({0: b"a", 1: None}) not in {identity({0: b"a", 2: None}), identity({0: b"a", 1: b""})}


def test_a_run_of_spaces_as_an_added_token_is_its_bytes(tmp_path: Path) -> None:
    byte_pairs(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = vocabulary_of(HuggingFace(tmp_path))
    assert vocabulary[tokenizer.token_to_id("    ") or 0] == b"    "
    assert vocabulary[tokenizer.token_to_id("<tool>") or 0] is None


def test_a_pair_s_tokenizer_is_the_one_that_its_ledger_names(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(9)))
    ranks(tmp_path, [b"the", b" the"])
    model, pair = tmp_path / "tokenizer.model", tmp_path / "data_text_document"
    preprocess([tmp_path / "text.jsonl"], tmp_path / "data", "TikTokenizer:llama3", model)
    assert vocabulary_of_pair(pair) == vocabulary_of(build_tokenizer("TikTokenizer:llama3", model))
    ranks(tmp_path, [b"the", b" that"])
    with pytest.raises(ValueError, match=r"cannot be compared .* another one now; preprocess it with"):
        vocabulary_of_pair(pair)
    model.unlink()
    with pytest.raises(ValueError, match=r"tokenizer of .*data_text_document cannot be compared"):
        vocabulary_of_pair(pair)
    (tmp_path / "data_text_document.side" / "ledger.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no sidecar and ledger name it; preprocess it with the teacher's"):
        vocabulary_of_pair(pair)
