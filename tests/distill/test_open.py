"""Mistakes of teachers are told before anything is loaded, each as one line with a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.open import open_data
from megatron_r1.distill.describe import Described
from megatron_r1.distill.open import check, sizes
from megatron_r1.preprocess.preprocess import preprocess
from tests import launch
from tests.curation.tiny import texts
from tests.distill.test_teacher import model

SEQ = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, two pairs made with its tokenizer, one with another of the same size, and one with the same
    vocabulary, whose special token has another name."""
    root = tmp_path_factory.mktemp("open")
    model(root / "teacher", begins=True)
    model(root / "other", begins=True)
    path = root / "other" / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    path.write_text(json.dumps(spec))
    model(root / "renamed", begins=True)
    path = root / "renamed" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_begin|>"))
    made = {"a": "teacher", "b": "teacher", "c": "other", "d": "renamed"}
    for seed, (name, made_by) in enumerate(made.items()):
        lines = [json.dumps({"text": text}) + "\n" for text in texts(40, seed)]
        (root / f"{name}.jsonl").write_text("".join(lines))
        how = {"append_eod": True, "log": lambda _: None}
        preprocess([root / f"{name}.jsonl"], root / name, "HuggingFaceTokenizer", root / made_by, **how)
    return root


def config(root: Path, objective: str, *more: str, sources: str = "ab") -> Config:
    named = ", ".join(f"{name}: {{prefix: '{root}/{name}_text_document'}}" for name in sources)
    size = Described(str(root / "teacher")).tokens + 5
    return config_io.load(
        [
            *launch.TINY_MODEL,
            f"model.vocab_size={size}",
            f"train={{run: '{root}/run', global_batch: 4, micro_batch: 2, precision: fp32}}",
            f"data={{seq_length: {SEQ}, cross_documents: false, sources: {{{named}}}}}",
            "phases.plain={steps: 2}",
            "phases.one={steps: 2}",
            f"phases.one.objective={{name: kd, {objective}}}",
            *more,
        ]
    )


def found(config: Config) -> tuple[list[str], list[str]]:
    return check(config, open_data(config))


def test_a_teacher_that_fits_is_described(root: Path) -> None:
    asked = config(root, f"teacher: '{root}/teacher', temperature: 2, weight: 0.75")
    mistakes, lines = found(asked)
    said, own = Described(str(root / "teacher")), asked.model.flops_per_token(SEQ)
    flops = said.flops_per_token(SEQ)
    assert mistakes == []
    assert lines == [
        f"phase one: 0.25 cross-entropy + 0.75 KL at temperature 2 from {root}/teacher, token 0 before each "
        "document",
        f"  {said.parameters:,} parameters, {4 * said.parameters:,} B (fp32) on each rank",
        f"  {flops:.4g} FLOP a token: a step takes {1 + flops / own:.1f} times the student's own",
    ]
    assert sizes(asked) == {"one": (said.parameters, flops)}


@pytest.mark.parametrize(
    ("objective", "more", "sources", "message"),
    [
        ("teacher: '{root}/none'", [], "ab", "no model at {root}/none"),
        ("teacher: '{root}/teacher', bos: 9999", [], "ab", "objective.bos=9999: the tokenizer of "),
        (
            "teacher: '{root}/teacher'",
            [],
            "c",
            "data.sources.c has the ids of another vocabulary than the teacher; take a teacher of its",
        ),
        (
            "teacher: '{root}/teacher'",
            ["data.seq_length=2048", "data.sources.a.documents=null"],
            "ab",
            "the context of {root}/teacher is 2,048 tokens, and it would read data.seq_length=2,048 behind "
            "one before each text; lower it to 2,047, or take another teacher",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_mistake(
    root: Path, objective: str, more: list[str], sources: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(root, objective.format(root=root), *more, sources=sources)
    # Windows of 2,048 tokens need no data here.
    data = open_data(config(root, objective.format(root=root), sources=sources))
    mistakes, _ = check(asked, data)
    assert len(mistakes) == 1
    assert mistakes[0].startswith("phases.one.objective: " + message.format(root=root))


def test_a_pair_of_the_same_vocabulary_fits(root: Path) -> None:
    asked = config(root, f"teacher: '{root}/teacher'", sources="d")
    (pair,) = open_data(asked).corpora
    assert pair.tokenizer_hash != Described(str(root / "teacher")).tokenizer.fingerprint()
    assert found(asked)[0] == []


def test_a_vocabulary_of_fewer_rows_is_a_mistake(root: Path) -> None:
    tokens = Described(str(root / "teacher")).tokens
    asked = config(root, f"teacher: '{root}/teacher'", f"model.vocab_size={tokens - 1}")
    data = open_data(config(root, f"teacher: '{root}/teacher'"))
    (mistake,), _ = check(asked, data)
    assert mistake.endswith(f"model.vocab_size={tokens - 1:,} fewer; set model.vocab_size={tokens} or more")


def test_a_plan_takes_a_teacher_that_is_not_here(root: Path) -> None:
    assert sizes(config(root, "teacher: 'ORG/NAME@abc', parameters: 8000")) == {"one": (8000, 16000.0)}
    with pytest.raises(FileNotFoundError, match="no model at none"):
        sizes(config(root, "teacher: none"))
