"""Examples as text with their place, and the agreement of checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_r1.data.indexed import IndexedWriter
from megatron_r1.preprocess.tokenizer import SentencePiece
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from megatron_r1.records import CAPABILITIES, ScoreTable
from megatron_r1.report import examples, load, summary

from .conftest import write_scores

LENGTH = 256


class Letters:
    """Every token is a letter, 27 a carriage control that XML forbids, 28 markup."""

    def decode(self, tokens: list[int]) -> str:
        return "".join({27: "\x0b", 28: "<&>"}.get(t) or chr(ord("a") + t % 26) for t in tokens)


def read_with(run: Path, prefixes: dict[str, Any]) -> load.Reading:
    """The run with these sources instead of its own."""
    given = yaml.safe_load((run / "config.yaml").read_text())
    given["data"]["sources"] = {s: {"prefix": str(p), "domain": "code"} for s, p in prefixes.items()}
    given["phases"]["influence"]["weights"] = "uniform"
    (run / "config.yaml").write_text(yaml.safe_dump(given))
    return load.read_all(run)


@pytest.fixture
def reading(run: Path, tmp_path: Path) -> load.Reading:
    """Source one has documents of 100 tokens; window w is the letter w. Scores rise with the window."""
    tokens = np.repeat(np.arange(12), LENGTH)[: 12 * LENGTH].astype(np.uint16)
    tokens[0], tokens[1] = 27, 28
    with IndexedWriter(tmp_path / "one", np.dtype("uint16")) as writer:
        for begin in range(0, len(tokens), 100):
            writer.add_document(tokens[begin : begin + 100])
        writer.finalize()
    score_NCK = np.arange(8.0)[:, None, None] * np.ones((1, 3, 2)) + 1
    fixed = (CAPABILITIES, (50, 100), np.arange(8), np.full(8, LENGTH))
    write_scores(run, [ScoreTable("one", *fixed, score_NCK), ScoreTable("gone", *fixed, score_NCK / 100)])
    return read_with(run, {"one": tmp_path / "one", "gone": "nowhere"})


def test_extremes_have_their_text_and_place_and_at_most_two_are_of_a_source(reading: load.Reading) -> None:
    scores = summary.scores(reading)
    assert scores is not None
    found = examples.extremes(reading, scores, Letters())[0]  # type: ignore[arg-type]
    ends = [" ".join(f"{x.source} {x.number}" for x in end) for end in (found.highest, found.lowest)]
    assert ends == ["one 7 one 6 gone 7 gone 6", "gone 0 gone 1 one 0 one 1"]
    # Window 7 is tokens 1,792 to 2,048, in document 17 of 100 tokens each.
    assert found.highest[0].place == "tokens 1,792 to 2,048, document 17"
    assert found.highest[0].text == "h" * 256 and found.lowest[2].text[:6] == "\ufffd<&>aa"
    gone = found.lowest[0]
    assert gone.place.endswith("the dataset is not there any more") and gone.text is None


def test_the_tokenizer_is_the_one_that_the_sidecars_name(run: Path, tmp_path: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": f"word{i} and word{i * 7}"}) + "\n" for i in range(200)))
    models: list[Any] = []
    for size, path in ((280, run / "tokenizer.model"), (285, tmp_path / "other.model")):
        train_sentencepiece([lines], path, size)
        models.append(SentencePiece(path))
    assert examples.find_tokenizer(load.read_all(run)) is None, "no source has a sidecar"
    sidecar = {"tokenizer_type": models[0].kind, "tokenizer_fingerprint": models[0].fingerprint()}
    (tmp_path / "pair.json").write_text(json.dumps(sidecar))
    reading = read_with(run, {"pair": tmp_path / "pair"})
    found = examples.find_tokenizer(reading)
    assert found is not None and found.fingerprint() == models[0].fingerprint()
    with pytest.raises(ValueError, match=r"other.model is not the one that made the datasets"):
        examples.find_tokenizer(dataclasses.replace(reading, tokenizer=tmp_path / "other.model"))
