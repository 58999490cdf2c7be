"""Tokenizers that gave other tokens than they should, or ended in a traceback."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.vetted import published
from tests.faults.inputs import (
    DOCUMENTS,
    END,
    KIND,
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
        pytest.param("tokenizer.json", lambda: "", id="empty"),
        pytest.param("tokenizer.json", lambda: "[" * 9000, id="deep"),
        pytest.param("tokenizer_config.json", lambda: json.dumps({"eos_token": [END]}), id="list"),
        pytest.param("tokenizer_config.json", lambda: '{"eos_token": ', id="broken"),
        pytest.param("tokenizer_config.json", lambda: "[1]", id="no-settings"),
        pytest.param("special_tokens_map.json", lambda: '{"eos_token": {}}', id="no-content"),
        pytest.param("special_tokens_map.json", lambda: "{", id="broken-map"),
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


def test_a_tokenizer_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    folder = plain_tokenizer(tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(json.dumps(tokenizer()).encode("utf-16"))
    with pytest.raises(ValueError, match=r"model/tokenizer\.json does not work with tokenizers"):
        build_tokenizer(KIND, folder)


NAMES: dict[str, Any] = {"eos_token": END}


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, {}),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}, {}),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True, "add_bos_token": True}, {}),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {}),
        ({"tokenizer_class": "CLIPTokenizer", "do_lower_case": True}, {}),
        ({"pad_token": "[PAD]", "clean_up_tokenization_spaces": True}, {}),
        ({}, {"config.json": {"model_type": "qwen2"}}),
        ({}, {"added_tokens.json": {"<new>": 260}}),
        ({"model_specific_special_tokens": {"image_token": "<new>"}}, {}),
    ],
)
def test_tokens_are_autotokenizer_s(tmp_path: Path, settings: Any, more: Any) -> None:
    from transformers import AutoTokenizer

    folder = plain_tokenizer(tmp_path / "tokenizer")
    for name, content in {"tokenizer_config.json": NAMES | settings, **more}.items():
        (folder / name).write_text(json.dumps(content))
    ours, theirs = (
        build_tokenizer(KIND, folder),
        AutoTokenizer.from_pretrained(folder, split_special_tokens=True),
    )
    for text in ("de alpha 123 rock'del", "  two", f"x {END} y{END}", "É漢 ١٢\n", ""):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.eod, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"tokenizer_class": "ByT5Tokenizer"},
            "builds ByT5Tokenizer, which does not encode as tokenizers does",
        ),
        ({"tokenizer_class": "LayoutLMv3Tokenizer"}, "builds LayoutLMv3Tokenizer"),
        (
            {"auto_map": {"AutoTokenizer": ["x.Mine", None]}, "tokenizer_class": "Mine"},
            "cannot build the class Mine",
        ),
        (
            {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]},
            "tokenizer_config.json: fast_tokenizer_files=['tokenizer.4.0.0.json'] lets transformers read",
        ),
        ({"eos_token": 5}, "tokenizer_config.json: eos_token=5 is no token"),
        ({"eos_token": "de"}, "eos_token is 'de' by tokenizer_config.json and '<|endoftext|>' by special"),
    ],
)
def test_a_class_that_encodes_otherwise_is_refused(tmp_path: Path, settings: Any, reason: str) -> None:
    folder = plain_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(NAMES))
    with pytest.raises(ValueError) as raised:
        build_tokenizer(KIND, folder)
    assert reason in str(raised.value)


@pytest.mark.parametrize("letter", ["a", "Ġ"])
def test_an_end_token_that_texts_are_made_of_is_refused(tmp_path: Path, letter: str) -> None:
    """The texts would lose it: "Ġ" stands for a space."""
    folder = tokenizer_folder(tmp_path / "tokenizer", tokenizer(), end=letter)
    with pytest.raises(ValueError, match=f"eos_token='{letter}' is one character of the vocabulary"):
        build_tokenizer(KIND, folder)


def test_a_part_that_the_class_leaves_out_is_told(tools: Tools, tmp_path: Path) -> None:
    model = tokenizer()
    digits = {"type": "Digits", "individual_digits": True}
    model["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, model["pre_tokenizer"]]}
    folder = tokenizer_folder(tmp_path / "model", model)
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    for name in ("GPT2Tokenizer", "PreTrainedTokenizerFast"):
        (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | {"tokenizer_class": name}))
        answer = tools.preprocess(name, source, folder, "--check")
        assert answer.status == 0, answer.text
        assert ("tokens are those of" in answer.text) == (name == "GPT2Tokenizer")
        if name == "GPT2Tokenizer":
            line_of(answer.text, r"tokenizer: .* of GPT2Tokenizer of transformers .* model/tokenizer.*Digits")


def test_a_bare_tokenizer_with_two_usual_end_tokens_is_refused(tmp_path: Path) -> None:
    model = tokenizer()
    model["added_tokens"].append(added("</s>", 260))
    folder = tokenizer_folder(tmp_path / "tokenizer", model)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"no eos_token is named .* has <\|endoftext\|> and </s>"):
        build_tokenizer(KIND, folder)


def words_model(kind: str, unknown: str = "<unk>") -> dict[str, Any]:
    """A tokenizer.json whose vocabulary has "</s>" as an ordinary word."""
    model = tokenizer()
    words = ["</s>", "<unk>", "de", "<", "/", "s", ">", " "]
    model["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    model["added_tokens"] = [added("</s>", 0)]
    if kind == "Unigram":
        vocab: Any = [[word, -0.1 * len(word)] for word in words]
        model["model"] = {"type": kind, "vocab": vocab, "unk_id": 1}
    elif kind == "BPE":
        ids = {word: number for number, word in enumerate([*words, "d", "e", "</", "</s"])}
        merges = [["d", "e"], ["<", "/"], ["</", "s"], ["</s", ">"]]
        model["model"] |= {"vocab": ids, "merges": merges, "unk_token": "<unk>"}
    else:
        ids = {word: number for number, word in enumerate(words)}
        prefix = (
            {"continuing_subword_prefix": "", "max_input_chars_per_word": 99} if kind == "WordPiece" else {}
        )
        model["model"] = {"type": kind, "vocab": ids, "unk_token": unknown, **prefix}
    return model


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "Unigram", "BPE"])
def test_no_document_ends_itself_by_an_ordinary_word(tmp_path: Path, kind: str) -> None:
    """split_special_tokens alone does not help here: the vocabulary has the end token as a word."""
    ours = build_tokenizer(KIND, tokenizer_folder(tmp_path / "tokenizer", words_model(kind), end="</s>"))
    assert ours.eod == 0 and ours.decode([0]) == "</s>"
    assert ours.encode("de") == [2]
    assert 0 not in ours.encode("de </s> de</s>")
    assert ours.encode("de </s> de")[0] == ours.encode("de </s> de")[-1] == 2


def test_a_document_that_becomes_the_end_token_is_a_reject(tools: Tools, tmp_path: Path) -> None:
    """The end token stands for all unknown words, too."""
    folder = tokenizer_folder(tmp_path / "tokenizer", words_model("WordLevel", unknown="</s>"), end="</s>")
    answer = tools.preprocess("out", jsonl(tmp_path / "in.jsonl", ["de de", "de x"]), folder, "--append-eod")
    assert answer.status == 0, answer.text
    assert read(tmp_path / "out")[1] == [2, 2, 0]
    assert (
        "text that becomes the end token" in (tmp_path / "out_text_document.side/rejects.jsonl").read_text()
    )


def test_the_fingerprint_covers_all_that_changes_tokens(tmp_path: Path) -> None:
    made = {}

    def add(name: str, model: dict[str, Any], **settings: Any) -> None:
        folder = tokenizer_folder(tmp_path / name, model)
        (folder / "tokenizer_config.json").write_text(json.dumps(NAMES | settings))
        made[name] = build_tokenizer(KIND, folder).fingerprint()

    add("plain", tokenizer())
    add("settings", tokenizer(), tokenizer_class="GPT2Tokenizer", model_max_length=5)
    assert made["plain"] == made.pop("settings")
    # As before: data on disk has it.
    content = (tmp_path / "plain" / "tokenizer.json").read_bytes()
    old = hashlib.sha256(KIND.encode())
    for part in (content, b"0"):
        old.update(b"\0" + len(part).to_bytes(8, "little") + part)
    assert made["plain"] == old.hexdigest()

    add("end", tokenizer(), eos_token="de")
    add("prefix", tokenizer(), tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    add("class", tokenizer(), tokenizer_class="Qwen2Tokenizer")
    model = tokenizer()
    model["pre_tokenizer"]["use_regex"] = False
    add("regex", model)
    model = tokenizer()
    model["added_tokens"][0]["special"] = False
    add("special", model)
    for family in ("llama3", "qwen"):
        path = ranks(tmp_path / "some.tiktoken")
        made[family] = build_tokenizer(f"TikTokenizer:{family}", path).fingerprint()
    assert len(set(made.values())) == len(made) == 8


@pytest.mark.parametrize(
    ("family", "end", "size", "digits"),
    [("llama3", 1, 256, 1), ("cl100k", 1, 21, 1), ("o200k", 1, 21, 1), ("qwen", 0, 208, 3)],
)
def test_a_family_has_its_own_rules(tmp_path: Path, family: str, end: int, size: int, digits: int) -> None:
    path = ranks(tmp_path / "some.tiktoken", b"12", b"123")
    ours = build_tokenizer(f"TikTokenizer:{family}", path)
    assert (ours.kind, ours.eod, ours.vocab_size) == (f"TikTokenizer:{family}", 258 + end, 258 + size)
    assert len(ours.encode("123")) == digits
    assert ours.decode(ours.encode("don't\n\n É12345")) == "don't\n\n É12345"
    assert ours.eod not in ours.encode(ours.decode([ours.eod]))
    assert len(set(ours.specials())) == size


def test_a_published_file_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ranks(tmp_path / "some.tiktoken")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(published()["families"]["qwen"], "sha256", digest)
    ours = build_tokenizer("TikTokenizer", path)
    assert (ours.kind, ours.eod) == ("TikTokenizer", 256)
    with pytest.raises(ValueError, match="is the file of qwen, not of llama3"):
        build_tokenizer("TikTokenizer:llama3", path)


def _lines(*drop: int, more: str = "") -> str:
    tokens = ((i, base64.b64encode(bytes([i])).decode()) for i in range(256))
    return "".join(f"{token} {i}\n" for i, token in tokens if i not in drop) + more


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_lines(255), "has no rank for 1 of the 256 bytes, the first 0xff"),
        (_lines(3), "255 tokens, but their ranks are not 0 to 254"),
        (_lines(more="YWI= 257\n"), "257 tokens, but their ranks are not 0 to 256"),
        (_lines(more="YWI= 5\n"), "257 tokens, but their ranks are not 0 to 256"),
        (_lines(more="QQ== 256\n"), "line 257: the token b'A' is listed twice"),
        (_lines(more="Y!I= 256\n"), "line 257 is not 'base64 rank'"),
        (_lines(more="YWI= x\n"), "line 257 is not 'base64 rank'"),
        ("", "is empty"),
        (_POINTER, "is a pointer of git-lfs"),
    ],
)
def test_ranks_that_are_damaged_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "some.tiktoken").write_text(content)
    with pytest.raises(ValueError, match=r"some\.tiktoken") as raised:
        build_tokenizer("TikTokenizer:llama3", tmp_path / "some.tiktoken")
    assert reason in str(raised.value)


def test_a_sentencepiece_end_that_text_can_spell_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("some words and more of these words\n" * 9)
    options: dict[str, Any] = {"input": str(tmp_path / "text"), "vocab_size": 40, "model_type": "bpe"}
    options |= {"user_defined_symbols": ["</s>"], "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(model_prefix=str(tmp_path / "sp"), **options)
    with pytest.raises(ValueError, match=r"sp\.model defines no </s>, which ends a document"):
        build_tokenizer("SentencePieceTokenizer", tmp_path / "sp.model")
    for content, reason in (
        (b"", "is empty"),
        (_POINTER.encode(), "git-lfs"),
        (b"junk", "is not a Sentence"),
    ):
        (tmp_path / "sp.model").write_bytes(content)
        with pytest.raises(ValueError, match=rf"sp\.model {reason}|sp\.model is a pointer of {reason}"):
            build_tokenizer("SentencePieceTokenizer", tmp_path / "sp.model")
    with pytest.raises(ValueError, match="is a folder; give the tokenizer's file in it"):
        build_tokenizer("SentencePieceTokenizer", tmp_path)


def test_letters_are_those_of_the_library() -> None:
    """The inputs above rest on it."""
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(letters().values()) == sorted(ByteLevel.alphabet())
