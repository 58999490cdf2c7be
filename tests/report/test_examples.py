"""Examples as text with their place, and the agreement of checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1 import config_io
from megatron_r1.config import SourceConfig
from megatron_r1.data.indexed import IndexedWriter
from megatron_r1.preprocess.tokenizer import SentencePiece
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from megatron_r1.records import ScoreTable
from megatron_r1.report import agreement, examples, load, page

from .conftest import write_scores
from .test_page import words_of

LENGTH = 256


class Letters:
    """Every token is a letter, 27 a carriage control that XML forbids, 28 markup."""

    def decode(self, tokens: list[int]) -> str:
        return "".join({27: "\x0b", 28: "<&>"}.get(t) or chr(ord("a") + t % 26) for t in tokens)


@pytest.fixture
def reading(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> load.Reading:
    """Source one has documents of 100 tokens; window w is the letter w. Scores rise with the window."""
    tokens = np.repeat(np.arange(12), LENGTH)[: 12 * LENGTH].astype(np.uint16)
    tokens[0], tokens[1] = 27, 28
    with IndexedWriter(tmp_path / "one", np.dtype("uint16")) as writer:
        for begin in range(0, len(tokens), 100):
            writer.add_document(tokens[begin : begin + 100])
        writer.finalize()
    config = config_io.load([str(run / "config.yaml")])
    sources = {"one": SourceConfig(str(tmp_path / "one"), domain="code"), "gone": SourceConfig("nowhere")}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    score_NCK = np.arange(8.0)[:, None, None] * np.ones((1, 3, 2)) + 1
    write_scores(
        run,
        [
            ScoreTable(
                name, ("code", "math", "knowledge"), (50, 100), np.arange(8), np.full(8, LENGTH), values
            )
            for name, values in (("one", score_NCK), ("gone", score_NCK / 100))
        ],
    )
    monkeypatch.setattr(examples, "find_tokenizer", lambda reading: Letters())
    found = load.read_all(run)
    return dataclasses.replace(
        found,
        run=dataclasses.replace(found.run, config=config),
        scores=load.read_scores(run, list(sources)),
        scored=load.scored(run, list(sources)),
    )


def test_the_extremes_are_shown_with_their_text_and_place(reading: load.Reading) -> None:
    figure = examples.figure(reading)
    assert figure is not None
    # Window 7 is the best of all: tokens 1,792 to 2,048, in document 17 of 100 tokens each.
    assert "[tokens 1,792 to 2,048, document 17]" in figure.body and "h" * 250 in figure.body
    assert "the dataset is not there any more" in figure.body
    assert figure.lead.startswith("code: most helped by one, least by gone.")


def test_text_cannot_break_the_page(reading: load.Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    table = dataclasses.replace(reading.scores[0], score_NCK=-reading.scores[0].score_NCK)
    turned = dataclasses.replace(reading, scores=[table, reading.scores[1]])
    figure = examples.figure(turned)
    assert figure is not None and "\ufffd&lt;&amp;&gt;aaa" in figure.body
    words_of(f"<!DOCTYPE html><html><body>{page._figure(figure)}</body></html>")


def test_at_most_two_of_a_source_at_either_end(reading: load.Reading) -> None:
    best, worst = examples.extremes(examples.summary.influence(reading), 0)
    assert [(one.source, one.number) for one in best] == [("one", 7), ("one", 6), ("gone", 7), ("gone", 6)]
    assert [(one.source, one.number) for one in worst] == [("gone", 0), ("gone", 1), ("one", 0), ("one", 1)]


def test_the_tokenizer_is_the_one_that_the_sidecars_name(run: Path, tmp_path: Path) -> None:
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": f"word{i} and word{i * 7}"}) + "\n" for i in range(200)))
    models: list[Any] = []
    for size, path in ((280, run / "tokenizer.model"), (285, tmp_path / "other.model")):
        train_sentencepiece([lines], path, size)
        models.append(SentencePiece(path))
    prefix = config_io.load([str(run / "config.yaml")]).data.sources["gcide"].prefix
    reading = load.read_all(run)
    assert examples.find_tokenizer(reading) is None, f"{prefix} has no sidecar"
    source = SourceConfig(str(tmp_path / "pair"))
    (tmp_path / "pair.json").write_text(
        json.dumps({"tokenizer_type": models[0].kind, "tokenizer_fingerprint": models[0].fingerprint()})
    )
    config = dataclasses.replace(
        reading.run.config, data=dataclasses.replace(reading.run.config.data, sources={"pair": source})
    )
    reading = dataclasses.replace(reading, run=dataclasses.replace(reading.run, config=config))
    found = examples.find_tokenizer(reading)
    assert found is not None and found.fingerprint() == models[0].fingerprint()
    with pytest.raises(ValueError, match=r"other.model is not the one that made the datasets"):
        examples.find_tokenizer(dataclasses.replace(reading, tokenizer=tmp_path / "other.model"))


def test_agreement_is_one_for_the_same_order_and_says_so(reading: load.Reading) -> None:
    figure = agreement.figure(reading)
    assert figure is not None
    (table,) = figure.tables
    assert [[cell.said for cell in row] for row in table.rows] == [["50 → 100", *["+1.00"] * 6]]
    assert "correlates by 1.00 to 1.00" in figure.lead


def test_spearman_by_hand() -> None:
    assert agreement.spearman(np.array([1, 2, 3, 4]), np.array([10, 30, 20, 40])) == pytest.approx(0.8)
    # Ties share their mean rank: ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert agreement.spearman(np.array([5, 5, 9]), np.array([1, 2, 3])) == pytest.approx(np.sqrt(0.75))
    assert np.isnan(agreement.spearman(np.ones(3), np.arange(3)))
