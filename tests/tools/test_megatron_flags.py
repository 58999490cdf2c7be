"""Command lines of Megatron-LM's preprocess_data.py: taken where the bytes are the same, else refused."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_r1.preprocess.encoder import Encoder, choose
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.train_tokenizer import convert_gpt2, train_sentencepiece
from tests.faults.inputs import (
    DOCUMENTS,
    END,
    Tools,
    bin_bytes,
    jsonl,
    letters,
    line_of,
    plain_tokenizer,
    read,
)

MERGES = [
    "d e",
    "a l",
    "1 a",
    "\u0120 t",
    "\u0120t h",
    "\u0120th e",
    "h e",
    "1 2",
    "\u0120 \u0120",
    "\u00c3 \u00a9",
]
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


def gpt2(folder: Path, merges: list[str] = MERGES, words: list[str] | None = None) -> list[Path]:
    words = words or [*letters().values(), *("".join(merge.split()) for merge in merges), END]
    vocab, lines = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    lines.write_text("".join(f"{line}\n" for line in ("#version: 0.2", *merges)), encoding="utf-8")
    return [vocab, lines]


def oracle(text: str, vocab: Path, merges: Path) -> list[int]:
    """GPT-2's encoding, one merge after the other."""
    regex = pytest.importorskip("regex")
    numbers, out = json.loads(vocab.read_text()), []
    ranked = [tuple(line.split()) for line in merges.read_text("utf-8").splitlines()[1:]]
    for word in regex.findall(PATTERN, text):
        parts = [letters()[byte] for byte in word.encode()]
        while found := [pair for pair in ranked if pair in pairwise(parts)]:
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == found[0]:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        out += [numbers[part] for part in parts]
    return out


def test_gpt2_s_files_give_gpt2_s_tokens(tmp_path):
    files = gpt2(tmp_path)
    convert_gpt2(*files, tmp_path / "hf")
    # The same again, but not in place of another.
    convert_gpt2(*files, tmp_path / "hf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is there and holds something else"):
        convert_gpt2(*files, tmp_path / "mine")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path / "hf")
    assert tokenizer.eod == tokenizer.vocab_size - 1
    draw = random.Random(1)
    pieces = [
        "the",
        " the",
        "'s",
        "'S",
        "12",
        " 121a",
        "é",
        "\n",
        "\t",
        "   ",
        END,
        "\x1c",
        "\x85",
        "\u3000",
        "Ⅷ",
        "²",
        "ﬁ",
    ]
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=6))
        assert tokenizer.encode(text) == oracle(text, *files), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vocab, merges: merges.write_text("d e\n"), "begins with #version"),
        (lambda vocab, merges: merges.write_text("#version\nd e"), "begins with #version"),
        (lambda vocab, merges: merges.write_text("#version\nq q\n"), r"vocab\.json, .*merges\.txt"),
        (lambda vocab, merges: vocab.write_text("{"), r"vocab\.json, .*merges\.txt"),
        (lambda vocab, merges: gpt2(vocab.parent, words=[*letters().values()], merges=[]), "lacks 1 of"),
        (lambda vocab, merges: gpt2(vocab.parent, words=["de", END], merges=[]), "lacks 256 of"),
        (lambda vocab, merges: (vocab.unlink(), os.mkfifo(vocab)), r"vocab\.json is a pipe"),
        (lambda vocab, merges: (merges.unlink(), merges.symlink_to("/dev/zero")), r"merges\.txt is a pipe"),
        (
            lambda vocab, merges: vocab.write_text(f'{vocab.read_text()[:-1]}, "z": {2**32 - 2}}}'),
            r"vocab\.json has the id 4294967294",
        ),
        (lambda vocab, merges: merges.write_text(f"#version\n{'q' * 10_000} d\n"), r"^.{,800}$"),
    ],
)
def test_gpt2_s_files_that_are_damaged_are_named(tmp_path, change, message):
    files = gpt2(tmp_path)
    change(*files)
    with pytest.raises(ValueError, match=message):
        convert_gpt2(*files, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_under_the_name_of_a_tokenizer_is_named(tmp_path, kind):
    there = tmp_path / "hf/tokenizer.json"
    there.parent.mkdir()
    {"pipe": os.mkfifo, "folder": os.mkdir}.get(kind, lambda path: path.symlink_to("/dev/zero"))(there)
    with pytest.raises(OSError, match=r"tokenizer\.json is no regular file"):
        convert_gpt2(*gpt2(tmp_path), there.parent)


def test_a_token_of_a_huge_id_takes_no_memory_for_the_ids_before_it(tmp_path):
    convert_gpt2(*gpt2(tmp_path), tmp_path)
    path = tmp_path / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["vocab"]["z"] = 2**31 - 3
    path.write_text(json.dumps(record))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path)
    encoder, why = choose(tokenizer, [])
    assert type(encoder) is Encoder, why


def test_a_command_line_of_gpt2_is_taken(tools, tmp_path):
    vocab, merges = gpt2(tmp_path)
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    words = ["--input", source, "--output-prefix", tmp_path / "out", "--tokenizer-type", "GPT2BPETokenizer"]
    words += ["--vocab-file", vocab, "--merge-file", merges, "--append-eod", "--log-interval", 100]
    words += ["--workers", 1, "--partitions", 4, "--keep-sequential-samples", "--dataset-impl", "mmap"]
    words += ["--legacy-tokenizer", "--keep-newlines", "--lang", "english"]
    checked = tools("preprocess_data", *words, "--check")
    assert checked.status == 0, checked.text
    assert sorted(tmp_path.iterdir()) == sorted([source, vocab, merges])
    answer = tools("preprocess_data", *words)
    assert answer.status == 0, answer.text
    eod = json.loads(vocab.read_text())[END]
    assert read(tmp_path / "out")[1] == [n for text in DOCUMENTS for n in (*oracle(text, vocab, merges), eod)]
    # The folder that was written is the tokenizer of all other tools.
    assert tools.preprocess("again", source, tmp_path / "out.tokenizer", "--append-eod").status == 0
    assert bin_bytes(tmp_path / "again") == bin_bytes(tmp_path / "out")


def test_megatron_s_sentencepiece_for_gpt_is_ours(tools, tmp_path):
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    train_sentencepiece([source], tmp_path / "sp.model", vocab_size=300)
    for name, kind in (("a", "GPTSentencePieceTokenizer"), ("b", "SentencePieceTokenizer")):
        words = ["--input", source, "--output-prefix", tmp_path / name, "--tokenizer-type", kind]
        answer = tools("preprocess_data", *words, "--tokenizer-model", tmp_path / "sp.model", "--append-eod")
        assert answer.status == 0, answer.text
    assert bin_bytes(tmp_path / "a") == bin_bytes(tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--split-sentences", "sentence splitting is out of scope"),
        ("--vocab-file v.json", "--vocab-file and --merge-file are for GPT2BPETokenizer"),
        ("--partitions 4", "--partitions 4: .*--workers"),
        ("--legacy-tokenizer", "--legacy-tokenizer: .*leave the flag out"),
        ("--vocab-size 50257", "--vocab-size: leave it out"),
        ("--tiktoken-pattern v2", "--tiktoken-pattern: .*ranks"),
        ("--trust-remote-code", "no code of a tokenizer is run"),
        ("--find-optimal-num-workers --workers-to-check 1 2", "--workers"),
        ("--tokenizer-name-or-path gpt2", "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"),
        ("--tokenizer-type BertWordPieceLowerCase", "WordPiece is for BERT and out of scope"),
        ("--tokenizer-type Llama2Tokenizer", "write SentencePieceTokenizer"),
        ("--tokenizer-type NullTokenizer --vocab-size 10", "NullTokenizer: "),
        ("--tokenizer-type PretrainedFromHF", "--tokenizer-type HuggingFaceTokenizer"),
        ("--tokenizer-type GPT2BPETokenizer", "--tokenizer-model: leave it out"),
    ],
)
def test_other_flags_and_kinds_say_what_to_write(tools, tmp_path, words, message):
    source, model = jsonl(tmp_path / "in.jsonl", DOCUMENTS), plain_tokenizer(tmp_path / "tokenizer")
    answer = tools.preprocess("out", source, model, *words.split())
    assert answer.status == 2, answer.text
    line_of(answer.text, f"^error: .*{message}")
    assert sorted(tmp_path.iterdir()) == [source, model]
