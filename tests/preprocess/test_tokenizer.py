"""Round trips, Megatron's names, and mistakes that say what to do."""

from __future__ import annotations

import base64
import gzip
import json
import os
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.preprocess import auto_tokenizer
from megatron_r1.preprocess.tokenizer import TikToken, build_tokenizer
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from tests.faults.inputs import plain_tokenizer
from tests.launch import ROOT

CODE = (
    'def f(x: int) -> str:\n\treturn  f"{x!r:>10}"   \n\n\nclass A:\n    """Doc."""\n\n    y = 1234567890\n'
)
HARD = [
    CODE,
    "",
    " ",
    "  two before, two after  ",
    "\n\n\n",
    "\t \t\r\n",
    " " * 3000,
    "é漢字🙂\u200d\u2028\ufeff",
    "nul \x00 and bell \x07",
    "</s><s><unk><|end_of_text|><|endoftext|>",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    texts = [CODE + f"# {word} {i} {word[::-1]}\n" for i, word in enumerate(sorted(sys.stdlib_module_names))]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def sentencepiece(corpus):
    model = corpus.with_name("sp.model")
    train_sentencepiece([corpus], model, vocab_size=500)
    return build_tokenizer("SentencePieceTokenizer", model)


@pytest.fixture(scope="module")
def huggingface(corpus):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|pad|>", "<|eos|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.read_text().splitlines(), trainer)
    folder = corpus.with_name("hf")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eos|>"}}))
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(scope="module")
def tiktoken(corpus):
    pytest.importorskip("tiktoken")
    tokens = [bytes([i]) for i in range(256)] + [b"de", b"  ", b"def", b"    "]
    path = corpus.with_name("tokenizer.model")
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return build_tokenizer("TikTokenizer:llama3", path)


@pytest.fixture(params=["sentencepiece", "huggingface", "tiktoken"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", HARD)
def test_text_survives_exactly(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.eod not in tokens


# U+2581 is SentencePiece's own sign for a space; surrogates are not text.
@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_survives_sentencepiece(sentencepiece, text):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate .* at character 1"):
        tokenizer.encode("a\ud800")


def test_end_of_document_token(sentencepiece, huggingface, tiktoken):
    assert sentencepiece.eod == 2
    assert huggingface.eod == 1
    assert (tiktoken.eod, tiktoken.vocab_size) == (260 + 1, 260 + 256)


def test_digits_stand_alone(sentencepiece):
    assert len(sentencepiece.encode("1234567890")) == 10


def test_training_twice_gives_the_same_model(sentencepiece, corpus, tmp_path):
    train_sentencepiece([corpus], tmp_path / "again.model", vocab_size=500)
    again = build_tokenizer("SentencePieceTokenizer", tmp_path / "again.model")
    assert again.fingerprint() == sentencepiece.fingerprint()


def test_training_takes_a_sample_of_bounded_size(corpus, tmp_path):
    size = corpus.stat().st_size
    seen = train_sentencepiece([corpus], tmp_path / "some.model", vocab_size=400, max_bytes=size // 4)
    assert size // 8 < seen < size // 2


def test_vocabulary_larger_than_the_text_gives_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="vocab_size 99999 does not fit"):
        train_sentencepiece([corpus], tmp_path / "no.model", vocab_size=99999)
    assert not (tmp_path / "no.model").exists()


def test_training_names_the_line_without_text(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"body": "bad"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: no text under 'text'"):
        train_sentencepiece([path], tmp_path / "no.model", vocab_size=300)


def test_training_reads_what_preprocessing_reads(corpus, tmp_path):
    """Packed files, tables, blank lines and byte order marks; the same texts give the same model."""
    lines = corpus.read_bytes().splitlines()
    spread = b"\n\n \n".join(lines[:100]) + b"\r\n\xef\xbb\xbf" + b"\n".join(lines[100:]) + b"\n\n"
    (tmp_path / "spread.jsonl").write_bytes(spread)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    models = []
    for source in (corpus, tmp_path / "spread.jsonl", tmp_path / "packed.jsonl.gz"):
        train_sentencepiece([source], tmp_path / "sp.model", vocab_size=400)
        models.append((tmp_path / "sp.model").read_bytes())
    assert models[1:] == models[:1] * 2
    size = corpus.stat().st_size
    seen = train_sentencepiece(
        [tmp_path / "packed.jsonl.gz"], tmp_path / "some.model", 400, max_bytes=size // 4
    )
    assert size // 8 < seen < size // 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": null}', r"in\.jsonl:2: no text under 'text': non-string text: 'text' is NoneType"),
        (b'{"text": ["a"]}', r"in\.jsonl:2: .*is list"),
        (b'{"text": 7}', r"in\.jsonl:2: .*is number"),
        (b'{"text": "\\ud800"}', r"in\.jsonl:2: .*lone surrogate"),
        (b'{"text": "\xff"}', r"in\.jsonl:2: .*invalid UTF-8"),
        (b"[" * 2000, r"in\.jsonl:2: .*nested too deep"),
    ],
)
def test_training_refuses_what_preprocessing_rejects(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        train_sentencepiece([tmp_path / "in.jsonl"], tmp_path / "sp.model", vocab_size=300)
    assert not (tmp_path / "sp.model").exists()


def test_training_names_a_file_that_is_packed_otherwise(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(gzip.compress(b'{"text": "good"}'))
    with pytest.raises(ValueError, match=r"in\.jsonl is packed by gzip; name it \.gz$"):
        train_sentencepiece([tmp_path / "in.jsonl"], tmp_path / "sp.model", vocab_size=300)


def test_tiktoken_long_runs(tiktoken):
    """A million spaces stop tiktoken itself; runs are cut after every 25,000 characters."""
    text = "x" + " " * 1_000_000 + "y" * 60_000
    assert tiktoken.decode(tiktoken.encode(text)) == text
    run = " " * 25_000
    assert tiktoken.encode(run * 2) == 2 * tiktoken.encode(run)


def test_fingerprint_tells_kinds_and_models_apart(sentencepiece, huggingface, tiktoken, tmp_path):
    prints = {t.fingerprint() for t in (sentencepiece, huggingface, tiktoken)}
    other = tmp_path / "other.model"
    other.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    prints.add(build_tokenizer("TikTokenizer:llama3", other).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("TiktokenTokenizer", "did you mean TikTokenizer?"),
        ("Llama2Tokenizer", "did you mean"),
        ("zzz", "known: SentencePieceTokenizer, HuggingFaceTokenizer, TikTokenizer"),
    ],
)
def test_unknown_kind_suggests_a_near_one(kind, hint):
    with pytest.raises(ValueError, match="unknown tokenizer kind") as raised:
        build_tokenizer(kind, "model")
    assert hint in str(raised.value)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_missing_model_is_named(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{kind}: no tokenizer model at .*nothing"):
        build_tokenizer(kind, tmp_path / "nothing")


@pytest.mark.parametrize(
    "name", ["data/tokeniser", "./tokenizer", "org/model", "model", "org/model@", "a/b/c@main", "x/y@../../z"]
)
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(name, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer model at .*ORG/NAME@COMMIT") as raised:
        build_tokenizer("HuggingFaceTokenizer", name)
    assert "did you mean data/tokenizer?" in str(raised.value) or name != "data/tokeniser"


def test_a_name_on_the_hub_is_asked_for_its_revision(monkeypatch, tmp_path):
    hub, folder, asked = pytest.importorskip("huggingface_hub"), plain_tokenizer(tmp_path / "mine"), []

    def download(repository, name, revision):
        asked.append((repository, revision))
        if (folder / name).is_file():
            return folder / name
        raise hub.errors.EntryNotFoundError(name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    theirs = build_tokenizer("HuggingFaceTokenizer", "org/model@5f0a1c")
    assert set(asked) == {("org/model", "5f0a1c")}
    assert theirs.fingerprint() == build_tokenizer("HuggingFaceTokenizer", folder).fingerprint()


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_a_pipe_and_a_file_too_large_are_refused(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(auto_tokenizer, "MOST_BYTES", 1000)
    model = tmp_path / "tokenizer.json"
    model.write_bytes(b"{" + b" " * 1000)
    with pytest.raises(ValueError, match=r"tokenizer.json has more than 1,000 bytes"):
        build_tokenizer(kind, model)
    model.unlink()
    os.mkfifo(model)
    with pytest.raises((ValueError, FileNotFoundError), match=r"is a pipe or a device|has no tokenizer.json"):
        build_tokenizer(kind, model)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100 + b"1" + b"}" * 100, b"\xff", b"{", b"5", b'{"eos_token": "\\udc80"}'],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_json_of_any_kind_is_one_short_line(content, name, tmp_path):
    folder = plain_tokenizer(tmp_path / "mine")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}") as raised:
        build_tokenizer("HuggingFaceTokenizer", folder)
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


def test_a_value_in_a_message_is_short(tmp_path):
    folder = plain_tokenizer(tmp_path / "mine")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<" + "x" * 10**6}))
    with pytest.raises(ValueError, match="lacks '<xxx") as raised:
        build_tokenizer("HuggingFaceTokenizer", folder)
    assert len(str(raised.value)) < 700


def test_model_of_another_kind_is_refused(tiktoken, corpus, tmp_path):
    ranks = corpus.with_name("tokenizer.model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", ranks)
    with pytest.raises(ValueError, match="line 1 is not 'base64 rank'"):
        build_tokenizer("TikTokenizer", corpus)
    cut = tmp_path / "cut.model"
    cut.write_text("".join(ranks.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="259 tokens, but their ranks are not 0 to 258"):
        build_tokenizer("TikTokenizer", cut)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)


def test_missing_library_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"TikTokenizer needs the package tiktoken .*pip install tiktoken"):
        TikToken(tmp_path / "model")


def test_tokens_are_those_of_megatrons_sentencepiece_tokenizer(sentencepiece, corpus):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers.text.libraries import SentencePieceTokenizer
    theirs = SentencePieceTokenizer(str(corpus.with_name("sp.model")))
    assert [theirs.text_to_ids(text) for text in HARD] == sentencepiece.encode_batch(HARD)
    assert (theirs.vocab_size, theirs.eod) == (sentencepiece.vocab_size, sentencepiece.eod)


def test_nemo_s_tokenizers_give_the_same_tokens(sentencepiece, corpus):
    """A model that NeMo reads is given as it is; there is no kind of its own for it."""
    library = pytest.importorskip("nemo.collections.common.tokenizers.sentencepiece_tokenizer")
    theirs = library.SentencePieceTokenizer(model_path=str(corpus.with_name("sp.model")))
    assert (theirs.vocab_size, theirs.eos_id) == (sentencepiece.vocab_size, sentencepiece.eod)
    for text in (CODE, "  two before", "</s> stays text", "naïve 漢字"):
        assert theirs.text_to_ids(text) == sentencepiece.encode(text)


def test_the_example_of_the_docs_holds(tmp_path):
    """docs/data.md shows how special tokens differ from transformers' default."""
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.split("## Special tokens")[1].split("## ")[0]
    code = "".join(line[4:] or "\n" for line in section.splitlines(keepends=True) if line.startswith("    "))
    assert code.count("assert") == 3
    exec(code, {"folder": plain_tokenizer(tmp_path / "tokenizer")})
