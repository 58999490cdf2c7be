"""Make a tokenizer: train a SentencePiece BPE on documents, or convert GPT-2's vocabulary and merges."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_r1.preprocess.auto_tokenizer import first_line, read_model
from megatron_r1.preprocess.documents import MOST_BYTES, Input, Lines, digest, open_inputs
from megatron_r1.preprocess.rows import Refused, Row, parse, text_of
from megatron_r1.preprocess.tokenizer import MOST_IDS, SentencePiece, Tokenizer, build_tokenizer
from megatron_r1.run.stage import finish
from megatron_r1.system.errors import require, require_utf8, rewording
from megatron_r1.system.files import regular, replacing, write_json, write_text

_END = "<|endoftext|>"


def record_tokenizer(sources: Sequence[Input], output: str) -> Tokenizer:
    """Add the ledger line of a model that `train_sentencepiece` has trained. Returns the tokenizer."""
    tokenizer = build_tokenizer(SentencePiece.kind, output)
    digests, outputs = {source.name: digest(source) for source in sources}, {output: tokenizer.fingerprint()}
    finish(Path(output).parent, "train tokenizer", inputs=digests, outputs=outputs)
    return tokenizer


def train_sentencepiece(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    json_key: str = "text",
    max_bytes: int = 30_000_000,
    overwrite: bool = False,
    max_document_bytes: int = MOST_BYTES,
) -> int:
    """Train a BPE model on texts and write it; returns the bytes of text it has seen.

    Inputs are those of preprocessing. Of each an equal share of `max_bytes` is taken, rows picked by their
    hash, so that the same files give the same model. Text survives a round trip exactly (spaces, tabs,
    newlines, any Unicode, by byte fallback), U+2581 excepted, which SentencePiece uses for the space. Digits
    stand alone. Errors: FileNotFoundError, InputError, ValueError for a row without text or for a vocabulary
    the text cannot fill, or of more than `max_document_bytes`; ValueError also for an `output` of another
    content, unless `overwrite` is set.
    """
    trainer = require("sentencepiece", SentencePiece.kind).SentencePieceTrainer
    model, seen = io.BytesIO(), 0
    mistakes: list[Exception] = []
    require_utf8(str(output))
    if Path(output).is_dir():
        raise ValueError(f"{output} is a folder; name the model's file")
    sources = open_inputs(inputs, max_document_bytes)
    for source in sources:
        source.check([json_key])

    def pieces() -> Iterator[str]:
        nonlocal seen
        try:
            for source in sources:
                for text, size in _sample(source, json_key, max_bytes // len(sources)):
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
    _refuse_other(Path(output), model.getvalue(), overwrite)
    with replacing(output) as stream:
        stream.write(model.getvalue())
    return seen


def _sample(source: Input, json_key: str, max_bytes: int) -> Iterator[tuple[str, int]]:
    """Texts, and the bytes of each."""
    # Only a plain file says how much text it holds.
    plain = isinstance(source, Lines) and not source.packed
    size = source.size if plain else sum(len(line) for _, line, _ in _rows(source, json_key))
    share = min(1.0, max_bytes / max(1, size))
    for number, line, row in _rows(source, json_key):
        if int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little") >= share * 2**64:
            continue
        try:
            if (record := parse(row)) is not None:
                text, data = text_of(record, json_key)
                yield text, len(data)
        except ValueError as error:
            raise ValueError(f"{source.name}:{number}: no text under {json_key!r}: {error}") from None


def _rows(source: Input, json_key: str) -> Iterator[tuple[int, bytes, Row]]:
    """Number of each row, its bytes, and the row."""
    for piece in source.pieces(0, [json_key], 0, source.size):
        for number, row in enumerate(piece.rows, piece.first):
            line = row.excerpt if isinstance(row, Refused) else row
            yield number, line if isinstance(line, bytes) else repr(line).encode("utf-8", "replace"), row


def _refuse_other(output: Path, content: bytes, overwrite: bool) -> None:
    """ValueError for a file of another content: datasets may have been made with it."""
    if overwrite or not output.exists():
        return
    with open(output, "rb", opener=regular) as file:
        same = file.read(len(content) + 1) == content
    if not same:
        way_out = "name another output, or replace it with --overwrite"
        raise ValueError(f"{output} is there and holds something else, which datasets may need; {way_out}")


def convert_gpt2(
    vocab_file: str | Path, merge_file: str | Path, folder: Path, overwrite: bool = False
) -> None:
    """Write tokenizer.json and tokenizer_config.json that give the tokens of Megatron's GPT2BPETokenizer.

    Errors: OSError, ValueError for files that it would read otherwise, or in which a byte has no token, and
    for a folder that holds another tokenizer, unless `overwrite` lets it be replaced.
    """
    library = require("tokenizers", "GPT2BPETokenizer")
    # Read here first, within bounds: the library waits for a pipe and reads a device without end.
    _, merges = read_model(Path(vocab_file)), read_model(Path(merge_file))
    if not merges.startswith(b"#version") or not merges.endswith(b"\n"):
        raise ValueError(
            f"{merge_file} is no merges.txt: it begins with #version, and its last line is whole"
        )
    no_files = f"{vocab_file}, {merge_file}: no vocab.json and merges.txt"
    with rewording(lambda error: f"{no_files} ({first_line(error)})", Exception):
        model = library.Tokenizer(library.models.BPE.from_file(str(vocab_file), str(merge_file)))
    vocab, bytes_ = model.get_vocab(), library.pre_tokenizers.ByteLevel.alphabet()
    if missing := [token for token in (_END, *bytes_) if token not in vocab]:
        raise ValueError(f"{vocab_file} lacks {len(missing)} of {_END} and 256 bytes, such as {missing[0]!r}")
    if (largest := max(vocab.values())) >= MOST_IDS:
        way_out = "number them from 0"
        raise ValueError(f"{vocab_file} has the id {largest}, and ids below {MOST_IDS:,} are read; {way_out}")
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    model.add_special_tokens([_END])
    _refuse_other(folder / "tokenizer.json", model.to_str().encode(), overwrite)
    write_text(folder / "tokenizer.json", model.to_str())
    write_json(folder / "tokenizer_config.json", {"eos_token": _END})


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
