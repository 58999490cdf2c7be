"""Train a SentencePiece BPE tokenizer on JSONL texts."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_r1.preprocess.documents import digest, open_input
from megatron_r1.preprocess.tokenizer import SentencePiece, Tokenizer, build_tokenizer
from megatron_r1.run.stage import finish
from megatron_r1.system.errors import require
from megatron_r1.system.files import replacing


def train_tokenizer(
    inputs: Sequence[str], output: str, vocab_size: int, json_key: str = "text", max_bytes: int = 30_000_000
) -> tuple[Tokenizer, int]:
    """Call `train_sentencepiece` and add a ledger line. Returns the tokenizer and the bytes of text seen."""
    sources = [open_input(name) for name in inputs]
    seen = train_sentencepiece(inputs, output, vocab_size, json_key, max_bytes)
    tokenizer = build_tokenizer(SentencePiece.kind, output)
    digests, outputs = {source.name: digest(source) for source in sources}, {output: tokenizer.fingerprint()}
    finish(Path(output).parent, "train tokenizer", inputs=digests, outputs=outputs)
    return tokenizer, seen


def train_sentencepiece(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    json_key: str = "text",
    max_bytes: int = 30_000_000,
) -> int:
    """Train a BPE model on JSONL texts and write it; returns the bytes of text it has seen.

    Of each input an equal share of `max_bytes` is taken, lines picked by their hash, so that the same
    files give the same model. Text survives a round trip exactly (spaces, tabs, newlines, any Unicode,
    by byte fallback), U+2581 excepted, which SentencePiece uses for the space. Digits stand alone.
    Errors: FileNotFoundError, ValueError for a bad line or for a vocabulary the text cannot fill.
    """
    trainer = require("sentencepiece", SentencePiece.kind).SentencePieceTrainer
    model, seen = io.BytesIO(), 0
    mistakes: list[Exception] = []

    def pieces() -> Iterator[str]:
        nonlocal seen
        try:
            for path in inputs:
                for text, size in _sample(Path(path), json_key, max_bytes // len(inputs)):
                    seen += size
                    yield from _by_lines(text, 4000)
        except Exception as error:
            # The trainer would turn it into a RuntimeError of its own.
            mistakes.append(error)

    try:
        trainer.train(
            sentence_iterator=pieces(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Indentation as one token.
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,
            # Part of the model's bytes: fixed, so that they do not depend on the machine.
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].split("] ")[-1]
        mistakes.append(ValueError(f"vocab_size {vocab_size} does not fit {seen} bytes of text: {detail}"))
    if mistakes:
        raise mistakes[0]
    with replacing(output) as stream:
        stream.write(model.getvalue())
    return seen


def _sample(path: Path, json_key: str, max_bytes: int) -> Iterator[tuple[str, int]]:
    """Texts, and the bytes of each."""
    share = min(1.0, max_bytes / max(1, path.stat().st_size))
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little") >= share * 2**64:
                continue
            try:
                text = str(json.loads(line)[json_key])
                # JSON lets lone surrogates in, UTF-8 does not.
                yield text, len(text.encode())
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no text under {json_key!r} ({error!r})") from None


def _by_lines(text: str, limit: int) -> Iterable[str]:
    """Cut at line ends into pieces of about `limit` characters: the trainer holds a piece as one sentence."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= limit:
            yield piece
            piece = ""
    if piece:
        yield piece
