"""Configurations that say something else than what is run.

Each test states the right value; the mark goes when it holds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import inputs
from tests.faults.inputs import Tools, fault, line_of, pair, run_words


@fault("c09", "the first block is gone without a word")
def test_a_key_that_a_file_has_twice_is_refused(tools: Tools, tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text(
        "phases:\n  two: {steps: 6, learning_rate: 1e-3}\nphases:\n  three: {steps: 4, learning_rate: 1e-3}\n"
    )
    words = run_words(tmp_path / "run", pair(tmp_path / "pair"))
    answer = tools("train", "--check", *words, twice)
    assert answer.status == 2, answer.text
    line_of(answer.text, r"twice\.yaml")
    line_of(answer.text, r"phases.*\b3\b|\b3\b.*phases")


@pytest.mark.parametrize("eod", [0, 9999, -1, 7])
def test_documents_must_end_in_the_token_that_is_said_to_end_them(
    tools: Tools, tmp_path: Path, eod: int
) -> None:
    words = run_words(tmp_path / "run", pair(tmp_path / "pair"))
    answer = tools("train", "--check", *words, "data.cross_documents=false", f"data.eod={eod}")
    if eod == 0:
        assert answer.status == 0, answer.text
        return
    assert answer.status == 2, answer.text
    line_of(answer.text, rf"data\.eod\b.*{eod}")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a run that has taken its two steps. Its 144 tokens are 2 windows of 64, and 2 of 70."""
    folder = tmp_path_factory.mktemp("begun")
    words = run_words(folder / "run", pair(folder / "pair", documents=6, tokens=24), steps=2)
    answer = inputs.train(folder, *words)
    assert answer.status == 0, answer.text
    return words


@pytest.mark.parametrize("length", [128, 70])
def test_another_sequence_length_is_refused_on_the_way(tools: Tools, begun: list[str], length: int) -> None:
    answer = tools("train", "--check", *begun, "phases.one.steps=4", f"data.seq_length={length}")
    assert answer.status == 2, answer.text
    line_of(answer.text, "^error: ")
    line_of(answer.text, r"seq_length|window")
