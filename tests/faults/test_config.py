"""Configurations that say something else than what is run.

Each test states the right value; the mark goes when it holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.data.indexed import IndexedWriter
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


def test_zeros_in_data_without_hashes_are_named_while_they_are_drawn(tools: Tools, tmp_path: Path) -> None:
    prefix = pair(tmp_path / "pair")
    (tmp_path / "pair.side/hashes.npy").unlink()
    with open(tmp_path / "pair.bin", "r+b") as stream:
        stream.seek(300)
        stream.write(bytes(1200))
    words = run_words(tmp_path / "run", prefix, steps=8)
    line_of(tools("train", "--check", *words).text, r"^unchecked, .*pair\.bin \(no hashes beside it\)")
    answer = inputs.train(tmp_path, *words)
    assert answer.status == 0, answer.text
    line_of(answer.text, r"^warning: source x: window \d+ of pair\.bin is id 0 throughout")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line).get("one_id_windows", 0) for line in lines]
    assert sum(counts) > 2


@pytest.mark.parametrize("hashed", [True, False])
def test_tokens_of_the_same_lengths_are_other_data(tools: Tools, begun: list[str], hashed: bool) -> None:
    """The index alone would not tell them apart."""
    folder = Path(begun[1].partition("'")[2].partition("/run'")[0])
    answer = tools("train", "--check", *begun, "phases.one.steps=4")
    assert answer.status == 0, answer.text
    before = (folder / "pair.bin").read_bytes(), (folder / "pair.side/hashes.npy").read_bytes()
    tokens = np.frombuffer(before[0], np.uint16)[::-1].copy()
    with IndexedWriter(folder / "pair", np.uint16) as writer:
        writer.add_documents(tokens, np.full(6, 24))
    if not hashed:
        (folder / "pair.side/hashes.npy").unlink()
    try:
        answer = tools("train", "--check", *begun, "phases.one.steps=4")
    finally:
        (folder / "pair.bin").write_bytes(before[0])
        (folder / "pair.side/hashes.npy").write_bytes(before[1])
    assert answer.status == 2, answer.text
    line_of(answer.text, "^error: the datasets of x are not those that")
