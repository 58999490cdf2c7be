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
from megatron_r1.report import examples, load, summary

from .conftest import write_scores

LENGTH = 256


class Letters:
    """Every token is a letter, 27 a carriage control that XML forbids, 28 markup."""

    def decode(self, tokens: list[int]) -> str:
        return "".join({27: "\x0b", 28: "<&>"}.get(t) or chr(ord("a") + t % 26) for t in tokens)


@pytest.fixture
def reading(run: Path, tmp_path: Path) -> load.Reading:
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
    found = load.read_all(run)
    return dataclasses.replace(
        found,
        run=dataclasses.replace(found.run, config=config),
        scores=load.read_scores(run, list(sources)),
        scored=load.scored(run, list(sources)),
    )


def shown(reading: load.Reading) -> list[examples.Extremes]:
    scores = summary.scores(reading)
    assert scores is not None
    return examples.extremes(reading, scores, Letters())  # type: ignore[arg-type]


def test_the_extremes_are_shown_with_their_text_and_place_at_most_two_of_a_source(
    reading: load.Reading,
) -> None:
    found = shown(reading)[0]
    assert [(one.source, one.number) for one in found.highest] == [
        ("one", 7),
        ("one", 6),
        ("gone", 7),
        ("gone", 6),
    ]
    assert [(one.source, one.number) for one in found.lowest] == [
        ("gone", 0),
        ("gone", 1),
        ("one", 0),
        ("one", 1),
    ]
    # Window 7 is tokens 1,792 to 2,048, in document 17 of 100 tokens each.
    assert found.highest[0].place == "tokens 1,792 to 2,048, document 17"
    assert found.highest[0].text == "h" * 256 and found.lowest[2].text[:6] == "\ufffd<&>aa"
    assert (
        found.lowest[0].place.endswith("the dataset is not there any more") and found.lowest[0].text is None
    )


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
