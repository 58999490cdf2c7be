"""What is written for transformers tokenizes as the tokenizer that the data was made with."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2 as protocol
from transformers import AutoTokenizer

from megatron_r1.export.tokenizer import tokenizer_files
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from megatron_r1.preprocess.vetted import published
from tests.faults.inputs import added, tokenizer, tokenizer_folder
from tests.preprocess.test_tokenizer import CODE, HARD

TEXTS = [Path(__file__).read_text(), *HARD]
SPECIALS = ("<s>", "</s>", "<unk>", "<0x41>", "<|end_of_text|>", "<|reserved_special_token_3|>")


def drawn_texts(count: int) -> list[str]:
    """Random strings: code, repeated letters, spaces, digits, any Unicode, names of special tokens."""
    draw = random.Random(0)
    letters = [
        "ab",
        " \n",
        "\t \r\n",
        "0123456789.,-",
        "<>s/unk|_",
        "aßé한漢字🙂\u200d\u2028\u00a0\x00",
        CODE,
    ]

    def one() -> str:
        some = "".join(draw.choices(draw.choice(letters), k=draw.randrange(40)))
        start = draw.randrange(len(TEXTS[0]))
        code = TEXTS[0][start : start + draw.randrange(80)]
        any_letters = "".join(chr(draw.randrange(0xD800)) for _ in range(draw.randrange(8)))
        repeated = some[:4] * draw.randrange(20)
        return draw.choice(["{0}{1}", "{1}{4}{1}", "{2}", "{3}", "{4}{0}", "{3}{2}{4}"]).format(
            some, code, any_letters, repeated, draw.choice(SPECIALS)
        )

    return [one() for _ in range(count)]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = [CODE + f"# {n} {n * n} item <{n}>\n" for n in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    train_sentencepiece([folder / "text.jsonl"], folder / "sp.model", vocab_size=370)
    # "s>" as a token: after "<" the two are the characters of <s>, and must not become it.
    proto = protocol.ModelProto.FromString((folder / "sp.model").read_bytes())  # type: ignore[attr-defined]
    last = max(i for i, piece in enumerate(proto.pieces) if len(piece.piece) == 2)
    proto.pieces[last].piece = "s>"
    (folder / "sp.model").write_bytes(proto.SerializeToString())
    return folder / "sp.model"


@pytest.fixture(scope="module")
def tiktoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = [bytes([i]) for i in range(256)] + [b"de", b"  ", b"def", b"    ", b"te", b"text", b"12", b"123"]
    tokens += [b"1234", b"\n\n", b" \n"]
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return path


@pytest.mark.parametrize(
    "kind", ["SentencePieceTokenizer", *(f"TikTokenizer:{name}" for name in published()["families"])]
)
def test_transformers_gives_the_same_tokens(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue("sentencepiece" if kind[0] == "S" else "tiktoken")
    ours, written = build_tokenizer(kind, model), tokenizer_files(kind, model)
    for name, content in written.files.items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    # Ours takes a special token's name in a document as text, as this option does.
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    drawn = drawn_texts(2000)
    assert theirs(drawn, **plain)["input_ids"] == ours.encode_batch(drawn)
    assert [theirs.encode(text, **plain) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert [theirs.decode(ours.encode(text)) for text in TEXTS] == list(
        map(ours.decode, map(ours.encode, TEXTS))
    )
    assert (theirs.eos_token_id, len(theirs)) == (ours.eod, ours.vocab_size)
    assert (written.end_of_text, written.vocab_size) == (ours.eod, ours.vocab_size)

    special = {f"{name}_token_id": getattr(theirs, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    assert written.special == special
    assert (special["bos_token_id"] is not None) == (kind[:4] == "Sent" or kind.endswith("llama3"))
    assert written.fingerprint == ours.fingerprint()

    # And once more through this project's own reader of what was written.
    again = tokenizer_files("HuggingFaceTokenizer", tmp_path)
    assert again.files == written.files and again.end_of_text == ours.eod


def test_nemo_s_hugging_face_tokenizer_gives_the_same_tokens(sentencepiece: Path, tmp_path: Path) -> None:
    """From the folder that an export has; special tokens' names in a text are the one difference."""
    library = pytest.importorskip("nemo.collections.common.tokenizers.huggingface.auto_tokenizer")
    ours = build_tokenizer("SentencePieceTokenizer", sentencepiece)
    for name, content in tokenizer_files("SentencePieceTokenizer", sentencepiece).files.items():
        (tmp_path / name).write_bytes(content)
    theirs = library.AutoTokenizer(pretrained_model_name=str(tmp_path), use_fast=True)
    texts = [text for text in TEXTS if "</s>" not in text]
    assert len(texts) > 5
    assert [theirs.text_to_ids(text) for text in texts] == [ours.encode(text) for text in texts]
    assert (theirs.eos_id, theirs.vocab_size) == (ours.eod, ours.vocab_size)


def test_a_normalising_sentencepiece_model_is_refused(sentencepiece: Path, tmp_path: Path) -> None:
    proto = protocol.ModelProto.FromString(sentencepiece.read_bytes())  # type: ignore[attr-defined]
    proto.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "sp.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="without normalisation"):
        tokenizer_files("SentencePieceTokenizer", tmp_path / "sp.model")


PAD = {"content": "<pad>", "special": True}
LEGACY: dict[str, Any] = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": PAD}
NAMES: dict[str, Any] = {**LEGACY, "pad_token": {"__type": "AddedToken", **PAD}}


def named(folder: Path, **settings: object) -> Path:
    """The tokenizer of `plain_tokenizer` with tokens for the start of a text and for padding."""
    model = tokenizer()
    model["added_tokens"] += [added("<s>", 260), added("<pad>", 261)]
    plain = tokenizer_folder(folder, model)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    return plain


@pytest.mark.parametrize(
    ("settings", "legacy", "expected"),
    [
        (NAMES, {}, (260, 0, 261)),
        ({**NAMES, "tokenizer_class": "GPT2TokenizerFast"}, {}, (260, 0, 261)),
        # Named by the older file alone.
        ({}, LEGACY, (260, 0, 261)),
        ({"eos_token": "<|endoftext|>"}, {}, (None, 0, None)),
        # A bare file: this project knows the end token by its name.
        ({}, {}, (None, 0, None)),
    ],
)
def test_special_tokens_and_template_survive(
    settings: dict[str, Any], legacy: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    folder = named(tmp_path / "mine", **settings)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if legacy:
        (folder / "special_tokens_map.json").write_text(json.dumps(legacy))
    written = tokenizer_files("HuggingFaceTokenizer", folder)
    assert tuple(written.special.values()) == expected
    assert written.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    for name, content in {**written.files, "config.json": b'{"model_type": "llama4_text"}'}.items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == expected
    assert theirs.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    "settings",
    [
        # A class that splits texts in its own way.
        {**NAMES, "tokenizer_class": "BertTokenizerFast"},
        {**NAMES, "tokenizer_class": "T5Tokenizer"},
    ],
)
def test_a_tokenizer_that_transformers_would_read_as_another_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        tokenizer_files("HuggingFaceTokenizer", named(tmp_path / "mine", **settings))


def test_a_class_that_only_config_json_names_is_not_lost(tmp_path: Path) -> None:
    """The class splits as the file does on the usual texts, and otherwise on others."""
    folder = named(tmp_path / "mine", **NAMES)
    model = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    model["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, model["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(model))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="would read the exported tokenizer with other tokens"):
        tokenizer_files("HuggingFaceTokenizer", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({**NAMES, "tokenizer_class": "Qwen2Tokenizer"}))
    assert tokenizer_files("HuggingFaceTokenizer", folder).special["eos_token_id"] == 0


def test_a_token_that_the_file_lacks_counts_or_is_refused(tmp_path: Path) -> None:
    folder = named(tmp_path / "mine", **{**NAMES, "pad_token": "<not there>"})
    try:
        written = tokenizer_files("HuggingFaceTokenizer", folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return
    # transformers adds it.
    assert written.special["pad_token_id"] == 262 < written.vocab_size
