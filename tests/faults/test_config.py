"""Configurations that say something else than what is run.

Each test states the right value; the mark goes when it holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1 import config, config_io
from megatron_r1.config_io import ConfigError
from megatron_r1.data.indexed import IndexedWriter
from megatron_r1.influence.store import COLUMNS
from megatron_r1.system import fields
from tests.faults import inputs
from tests.faults.inputs import Tools, line_of, pair, run_words


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


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("phases.one.steps=010", "phases.one.steps"),
        ("phases.one.steps=1:30", "phases.one.steps"),
        ("phases.one.steps=0x1F", "phases.one.steps"),
        ("phases.one.steps=08", "phases.one.steps"),
        ("phases.one.steps='5'", "phases.one.steps"),
        ("phases.one.steps=true", "phases.one.steps"),
        ("data.eod=no", "data.eod"),
        ("train.checkpoint_every=on", "train.checkpoint_every"),
        ("train.global_batch=~", "train.global_batch"),
        ("phases.one.weights={x: yes}", "phases.one.weights.x"),
        ("phases.one.weights={x: 1:30}", "phases.one.weights"),
        ("phases.one.max_epochs={x: on}", "phases.one.max_epochs.x"),
        ("mix={phase: one, capability_weight: {code: off}}", "mix.capability_weight.code"),
        ("influence={directions: {code: y}, steps: [1, yes]}", "influence.steps.1"),
        ("data.sources={no: {prefix: y}}", "data.sources"),
        ("data.sources={x: {prefix: y, prefix: z}}", "data.sources"),
    ],
)
@pytest.mark.parametrize("where", ["override", "file"])
def test_a_scalar_that_is_no_number_is_refused_where_one_is_meant(
    tmp_path: Path, override: str, names: str, where: str
) -> None:
    """In files with the line, on the command line with the whole argument."""
    key, value = override.split("=", 1)
    words = run_words(tmp_path / "run", tmp_path / "pair")
    if where == "override":
        words.append(override)
        expected = names
    else:
        *sections, field = key.split(".")
        lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
        path = tmp_path / "given.yaml"
        path.write_text("\n".join(["# comment", *lines, f"{'  ' * len(sections)}{field}: {value}\n"]))
        # The flow mapping of the words comes after all files.
        words = [word for word in words if not word.startswith(key.split(".")[0])] + [str(path)]
        expected = rf"given.yaml, line {len(sections) + 2}"
    with pytest.raises(ConfigError) as caught:
        config_io.load(words)
    line_of(str(caught.value), expected)


BAD_NAMES = [
    "code/py",
    "/abs",
    "..",
    ".hidden",
    "-x",
    "a b",
    "a\tb",
    "a:b",
    "a=b",
    "",
    "n" * 101,
    "\ud800",
    "a\n",
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize(
    "given",
    [
        {"data": {"sources": {"NAME": {"prefix": "p"}}}},
        {"data": {"probes": {"NAME": "p"}}},
        {"phases": {"NAME": {"steps": 3}}},
        {"influence": {"directions": {"NAME": "p"}}},
        {"mix": {"phase": "one", "runs": {"NAME": "r"}}},
    ],
)
def test_names_that_are_no_path_or_tag_are_refused_at_once(
    tmp_path: Path, name: str, given: dict[str, Any]
) -> None:
    text = json.dumps(given).replace('"NAME"', json.dumps(name))
    path = tmp_path / "named.yaml"
    path.write_text(text)
    if name == "\ud800":
        # No file can hold it, and no argument is it.
        assert fields.name_mistakes([name])
        return
    with pytest.raises(ConfigError) as caught:
        config_io.load([*run_words(tmp_path / "run", tmp_path / "pair"), str(path)])
    line_of(str(caught.value), rf"{next(iter(given))}\.")
    assert "a name has" in str(caught.value)


def test_every_name_is_told_beside_the_mistakes_of_fields(tmp_path: Path) -> None:
    path = tmp_path / "named.yaml"
    path.write_text("data:\n  sources:\n    a/b: {prefix: x}\n    c d: {prefix: y}\n    e: {prefx: z}\n")
    with pytest.raises(ConfigError) as caught:
        config_io.load([*run_words(tmp_path / "run", tmp_path / "pair")[:2], str(path)])
    for expected in (r"sources\.a/b: a name.*line 3", r"c d: a name.*line 4", r"e\.prefx: unknown.*line 5"):
        line_of(str(caught.value), expected)


def test_no_capability_has_the_name_of_a_column() -> None:
    assert tuple(COLUMNS) == config.RESERVED


def test_names_that_a_file_system_takes_for_one_are_refused() -> None:
    assert list(fields.name_mistakes(["a", "b", "A"])) == ["A"]
    assert list(fields.name_mistakes(["\u00e9", "e\u0301"])) == ["e\u0301"]
    assert list(fields.name_mistakes(["norm", "loss", "code"], config.RESERVED)) == ["norm", "loss"]
    assert not fields.name_mistakes(
        ["c4.en", "fineweb-edu", "a_b", "0", "\u00e9t\u00e9", "\u6587\u5b57", "n" * 100]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--capabilities", "math/algebra=a"], "--capabilities: name 'math/algebra': a name has"),
        (["--capabilities", "..=a"], "--capabilities: name '..': a name has"),
        (["--capabilities", "loss=a"], "--capabilities: name 'loss': the name of a column"),
        (["--capabilities", "Math=a", "math=b"], "--capabilities: name 'math': some file systems"),
        (["--capabilities", "math=a", "math=b"], "--capabilities 'math=b': math is given twice"),
        (["--capabilities", "math=a,a"], "source a is twice in math"),
        (["--capabilities", "math=zz"], "capability math: no source zz; known: a, b"),
        (["--sources", "a/b=PAIR", "--capabilities", "math=a/b"], "--sources: name 'a/b': a name has"),
    ],
)
def test_probes_are_refused_before_any_work(
    tools: Tools, tmp_path: Path, words: list[str], message: str
) -> None:
    # No dataset is opened: there is none.
    common = ["--output-dir", tmp_path / "out", "--tokens-per-source", 50]
    given = ["--sources", "a=PAIR", "b=PAIR", *common, *words]
    answer = tools("curate_probes", *given)
    assert answer.status == 2 and line_of(answer.text, "^error: ").startswith(f"error: {message}"), (
        answer.text
    )
    assert not (tmp_path / "out").exists()
