"""gigatoken is taken only where its tokens are the reference's, and never gives others unnoticed."""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.preprocess import encoder as module
from megatron_r1.preprocess.documents import Piece
from megatron_r1.preprocess.encoder import HARD, Encoder, Gigatoken, choose
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.workers import encode_piece

pytest.importorskip("gigatoken")
CODE = [Path(module.__file__).read_text(), Path(__file__).read_text(), *HARD]


@pytest.fixture(scope="module")
def tiktoken(tmp_path_factory):
    """Ranks that no sequence of merges could have made: "abcd" has no two halves with a rank."""
    merged = [
        b"  ",
        b"    ",
        b"de",
        b"def",
        b"in",
        b"th",
        b"the",
        b" the",
        b"\n\n",
        b"ing",
        b"abcd",
        b"\xe6\xbc",
    ]
    tokens = [bytes([i]) for i in range(256)] + merged
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return build_tokenizer("TikTokenizer:llama3", path)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|eos|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CODE, trainer)
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(params=["tiktoken", "huggingface"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_taken_where_tokens_are_equal(tokenizer):
    encoder, why = choose(tokenizer, CODE)
    assert isinstance(encoder, Gigatoken)
    assert f"whose tokens equal {tokenizer.library}'s on " in why
    flat, lengths = encoder.encode_batch(CODE, [text.encode() for text in CODE])
    expected = [tokenizer.encode(text) for text in CODE]
    assert lengths.tolist() == [len(tokens) for tokens in expected]
    assert flat.tolist() == [token for tokens in expected for token in tokens]


@pytest.fixture(scope="module")
def pairs(tiktoken, huggingface):
    return [
        (tokenizer, Gigatoken(tokenizer, tokenizer.fast_model())) for tokenizer in (tiktoken, huggingface)
    ]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_equal_on_any_text(pairs, text):
    for tokenizer, fast in pairs:
        assert fast.encode_batch([text], [text.encode()])[0].tolist() == tokenizer.encode(text)


def test_long_runs_are_cut_where_the_reference_cuts(pairs):
    texts = ["a", "x" + " " * 90_000 + "y" * 60_000, "", "def the"]
    tiktoken, fast = pairs[0]
    flat, lengths = fast.encode_batch(texts, [text.encode() for text in texts])
    expected = [tiktoken.encode(text) for text in texts]
    assert lengths.tolist() == [len(tokens) for tokens in expected]
    assert flat.tolist() == [token for tokens in expected for token in tokens]


def test_not_taken_where_a_token_differs(tiktoken, monkeypatch):
    other = json.loads(tiktoken.fast_model())
    vocab = other["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    monkeypatch.setattr(type(tiktoken), "fast_model", lambda self: json.dumps(other))
    encoder, why = choose(tiktoken, CODE)
    assert type(encoder) is Encoder
    assert why.startswith("tiktoken, since gigatoken ")
    assert "gives other tokens for" in why


@pytest.mark.parametrize(
    ("model", "reason"), [("{}", "cannot load this tokenizer"), (None, "is not used for TikTokenizer")]
)
def test_not_taken_where_it_cannot_load(tiktoken, monkeypatch, model, reason):
    monkeypatch.setattr(type(tiktoken), "fast_model", lambda self: model)
    encoder, why = choose(tiktoken, CODE)
    assert type(encoder) is Encoder
    assert reason in why


def test_not_taken_where_missing_or_unwanted(tiktoken, monkeypatch):
    assert choose(tiktoken, [], "reference")[1] == "tiktoken, as asked for"
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert choose(tiktoken, [])[1] == "tiktoken; pip install gigatoken for a faster one"


def test_difference_during_the_run_stops_it(tiktoken, monkeypatch):
    monkeypatch.setattr("megatron_r1.preprocess.workers.COMPARED", 1)
    fast = Gigatoken(tiktoken, tiktoken.fast_model())
    piece = Piece("in.jsonl", 0, 7, [b'{"text": "def the thing"}'], 1)
    encode_piece(fast, piece, ["text"], True)
    wrong = np.array([1], dtype=np.uint32), np.array([0, 1])
    monkeypatch.setattr(Gigatoken, "_rows", lambda self, utf8: wrong)
    with pytest.raises(ValueError, match=r"in\.jsonl:7: gigatoken .* and tiktoken give other tokens"):
        encode_piece(fast, piece, ["text"], True)


def test_memory_is_given_back(tiktoken, monkeypatch):
    """gigatoken remembers every word it has seen: of 40 MB of words no two alike it would keep hundreds."""
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 30 << 20)
    fast = Gigatoken(tiktoken, tiktoken.fast_model())
    before, letters, draw = module._memory(), "abcdefghijklmnopqrstuvwxyz", random.Random(0)
    if not before:
        return
    for _ in range(20):
        text = " ".join(["".join(draw.choices(letters, k=10)) for _ in range(40_000)])
        fast.encode_batch([text], [text.encode()])
        assert module._memory() - before < 200 << 20


def test_bytes_do_not_depend_on_the_encoder_or_workers(tiktoken, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(CODE * 3)))
    ranks = tmp_path / "tokenizer.model"
    ranks.write_bytes(tiktoken.model_bytes)
    found = {}
    for name, options in {"fast": {}, "two": {"workers": 2}, "slow": {"encoder": "reference"}}.items():
        said: list[str] = []
        options = {"append_eod": True, "log": said.append, **options}
        sidecars = preprocess([source], tmp_path / name, "TikTokenizer:llama3", ranks, **options)
        assert said[0].startswith("encoder: tiktoken" if name == "slow" else "encoder: gigatoken 0")
        assert sidecars[f"{tmp_path / name}_text_document"]["encoder"] == said[0].split(",")[0][9:]
        endings = (".bin", ".idx", ".side/docs.npy")
        found[name] = [Path(f"{tmp_path / name}_text_document{e}").read_bytes() for e in endings]
    assert found["fast"] == found["two"] == found["slow"]
