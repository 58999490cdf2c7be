"""Tokenizers that gave other tokens than they should, or ended in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inputs import (
    DOCUMENTS,
    END,
    SPLIT,
    Tools,
    added,
    bin_bytes,
    jsonl,
    letters,
    line_of,
    plain_tokenizer,
    ranks,
    read,
    tokenizer,
    tokenizer_folder,
)


def test_a_rule_that_a_fast_encoder_ignores_changes_no_token(tools: Tools, tmp_path: Path) -> None:
    model = tokenizer()
    model["pre_tokenizer"]["use_regex"] = False
    folder = tokenizer_folder(tmp_path / "tokenizer", model)
    # Rows that are sampled to compare encoders are the plain ones.
    texts = [f"plain alpha {i}" if i % 25 == 0 else f"rock'del {i}'de so 'de" for i in range(200)]
    source = jsonl(tmp_path / "in.jsonl", texts)
    for encoder in ("auto", "reference"):
        answer = tools.preprocess(encoder, source, folder, "--encoder", encoder)
        assert answer.status == 0, answer.text
    assert bin_bytes(tmp_path / "auto") == bin_bytes(tmp_path / "reference")


@pytest.mark.parametrize("special", [True, False])
def test_no_document_ends_itself(tools: Tools, tmp_path: Path, special: bool) -> None:
    model = tokenizer()
    model["added_tokens"] = [added(END, 0, special)]
    folder = tokenizer_folder(tmp_path / "tokenizer", model)
    source = jsonl(tmp_path / "in.jsonl", [f"one {END} two </s> three"])
    answer = tools.preprocess("out", source, folder, "--append-eod")
    assert answer.status == 0, answer.text
    assert read(tmp_path / "out")[1].count(0) == 1


def test_dropout_is_off_while_encoding(tools: Tools, tmp_path: Path) -> None:
    model = tokenizer()
    model["model"]["dropout"] = 0.5
    folder = tokenizer_folder(tmp_path / "model", model)
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    answer = tools.preprocess("out", source, folder)
    if answer.status == 2:
        assert "dropout" in line_of(answer.text, r"^error: .*model/tokenizer\.json")
        return
    assert answer.status == 0, answer.text
    assert tools.preprocess("plain", source, plain_tokenizer(tmp_path / "tokenizer")).status == 0
    assert bin_bytes(tmp_path / "out") == bin_bytes(tmp_path / "plain")


def test_an_end_token_that_the_vocabulary_lacks_is_refused(tools: Tools, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", tokenizer(), end="<|im_end|>")
    answer = tools.preprocess("out", jsonl(tmp_path / "in.jsonl", DOCUMENTS), folder, "--append-eod")
    assert answer.status == 2, answer.text
    assert "<|im_end|>" in line_of(answer.text, "^error: .*tokenizer")


@pytest.mark.parametrize("number", [260, 5000, 70000])
def test_the_vocabulary_reaches_to_the_end_token(tools: Tools, tmp_path: Path, number: int) -> None:
    model = tokenizer()
    model["added_tokens"].append(added("<|im_end|>", number))
    model["model"]["vocab"]["<|im_end|>"] = number
    folder = tokenizer_folder(tmp_path / "tokenizer", model, end="<|im_end|>")
    answer = tools.preprocess("out", jsonl(tmp_path / "in.jsonl", DOCUMENTS), folder, "--append-eod")
    _refused_or_vocabulary_of(number + 1, answer, tmp_path)
    if answer.status == 0:
        sidecar, tokens = read(tmp_path / "out")
        assert sidecar["eod"] == tokens[-1] == number and tokens.count(number) == len(DOCUMENTS)


@pytest.mark.parametrize("number", [257, 3000])
def test_the_vocabulary_reaches_to_every_token(tools: Tools, tmp_path: Path, number: int) -> None:
    model = tokenizer()
    model["model"]["vocab"]["de"] = number
    folder = tokenizer_folder(tmp_path / "tokenizer", model)
    answer = tools.preprocess("out", jsonl(tmp_path / "in.jsonl", DOCUMENTS), folder)
    _refused_or_vocabulary_of(max(260, number + 1), answer, tmp_path)
    if answer.status == 0:
        assert read(tmp_path / "out")[1].count(number) == sum(text.count("de") for text in DOCUMENTS)


def _refused_or_vocabulary_of(size: int, answer: Any, folder: Path) -> None:
    if answer.status == 2:
        line_of(answer.text, r"^error: .*tokenizer")
    else:
        assert answer.status == 0, answer.text
        assert read(folder / "out")[0]["vocab_size"] == size


def test_ranks_do_not_pass_for_llama_3_s_unsaid(tools: Tools, tmp_path: Path) -> None:
    """Ranks say neither how digits are split nor which special token comes first."""
    model = ranks(tmp_path / "one_digit.tiktoken", b"12", b"123")
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    words = ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", model, "--append-eod"]
    answer = tools("preprocess_data", *SPLIT, tmp_path / "out", "--input", source, *words)
    assert answer.status in (0, 2), answer.text
    line_of(answer.text, "Llama 3")


def _newer() -> str:
    model = tokenizer()
    model["model"]["merges"].append(["a", "b", "c"])
    return json.dumps(model)


def _word_level() -> str:
    """Words that it does not have are unknown, and it has no token for them."""
    model = tokenizer()
    model["pre_tokenizer"] = {"type": "Whitespace"}
    model["model"] = {"type": "WordLevel", "vocab": {END: 0, "alpha": 1}, "unk_token": "<unk>"}
    return json.dumps(model)


_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'1f' * 32}\nsize 17209530\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param("tokenizer.json", _newer, id="newer"),
        pytest.param("tokenizer.json", lambda: json.dumps(tokenizer())[:-300], id="cut"),
        pytest.param("tokenizer.json", lambda: _POINTER, id="pointer"),
        pytest.param("tokenizer.json", _word_level, id="unknown"),
        pytest.param("tokenizer_config.json", lambda: json.dumps({"eos_token": [END]}), id="list"),
        pytest.param("tokenizer_config.json", lambda: '{"eos_token": ', id="broken"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(
    tools: Tools, tmp_path: Path, file: str, content: Any
) -> None:
    folder = plain_tokenizer(tmp_path / "model")
    (folder / file).write_text(content())
    answer = tools.preprocess("out", jsonl(tmp_path / "in.jsonl", DOCUMENTS), folder)
    assert answer.status == 2, answer.text
    error = line_of(answer.text, rf"^error: .*model/{file}")
    if content is _newer:
        import tokenizers

        assert tokenizers.__version__ in error


def test_letters_are_those_of_the_library() -> None:
    """The inputs above rest on it."""
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(letters().values()) == sorted(ByteLevel.alphabet())
