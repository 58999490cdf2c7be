"""YAML is read as it is written, or refused."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.system.yaml_io import (
    MOST_BYTES,
    MOST_DEPTH,
    MOST_NODES,
    YamlError,
    format_yaml,
    parse_yaml,
    read_yaml,
)

ROOT = Path(__file__).resolve().parents[2]
LITERALS = [
    "010",
    "1e3",
    "no",
    "08",
    "2026-11-28",
    "1:30",
    "1:75",
    "<<",
    "=",
    "0x1f",
    "1_",
    "~",
    "",
    "y",
    ".5",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("-3", -3),
        ("0", 0),
        ("2_000_000", 2_000_000),
        ("4e-3", 0.004),
        ("1E3", 1000.0),
        ("1.0e+3", 1000.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("off", False),
        ("True", True),
        ("~", None),
        ("n", "n"),
        ("2026-11-28", "2026-11-28"),
        ("0.16.1", "0.16.1"),
        ("inf", "inf"),
        ("'010'", "010"),
        ("!!str 010", "010"),
    ],
)
def test_plain_scalars_are_decimal_numbers_or_text(text: str, value: object) -> None:
    read = parse_yaml(text, "x").tree
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *["010", "-010", "08", "00", "0_1", "007.5", "0x1F", "0o17", "0b11", "1:30", "1:30:00", "1:20.15"],
        *["1__0", "1_"],
        "!!int '010'",
        "!!float 1:30",
    ],
)
@pytest.mark.parametrize("form", ["{}", "a: [1, {}]", "a: {{b: {}}}", "- {}"])
def test_numbers_that_readers_take_for_different_ones_are_refused(text: str, form: str) -> None:
    with pytest.raises(YamlError, match=r"^x, line 2: .* is not the same number to every reader of YAML"):
        parse_yaml("# comment\n" + form.format(text), "x", lines=True)


@pytest.mark.parametrize(
    "key", ["no", "On", "true", "1", "010", "1.5", "1e3", "2026-11-28", "~", "1:30", "null", ""]
)
def test_a_key_is_text_to_every_reader(key: str) -> None:
    with pytest.raises(YamlError, match=r"^x, line 3: the key .* is not text"):
        parse_yaml(f"a:\n  b: 1\n  {key or '?'}{': 2' if key else ''}\n", "x", lines=True)
    assert parse_yaml(f"'{key}': 2", "x").tree == {key: 2}


@pytest.mark.parametrize(
    "text",
    ["a: 1\nb: 2\na: 3", "x:\n  a: 1\n  a: 3", "- {b: 1}\n- b: 1\n  'b': 2", "<<: {a: 1}\nb: 2\n<<: {c: 1}"],
)
def test_a_key_that_stands_twice_is_refused_at_any_depth(text: str) -> None:
    with pytest.raises(YamlError, match=r"^x, line 3: the key \S+ stands in line [12] already"):
        parse_yaml(text, "x", lines=True)


def test_a_merged_key_may_be_replaced() -> None:
    text = "a: &a {k: 1, m: 2}\nb:\n  <<: *a\n  k: 3\nc:\n  <<: *a\n"
    assert parse_yaml(text, "x").tree["b"] == {"k": 3, "m": 2}
    assert parse_yaml(text, "x", lines=True).place(["b", "k"]) == "x, line 4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\n---\nb: 2\n", "x.yaml, line 2: .*another document"),
        (b"a: 1\n\tb: 2\n", "x.yaml, line 2: .*cannot start"),
        (b"a: [1\n", "x.yaml, line 2: .*expected ',' or ']'"),
        (b"a: \xff\n", "x.yaml: not UTF-8"),
        (b"a: 1\nb: \x00\n", r"x.yaml, line 2: U\+0000 is no character"),
        (b"a: *b\n", "x.yaml, line 1: found undefined alias"),
        (b"a: " + b"[" * 1000, "x.yaml, line 1: nested too deep"),
        (b"a: " + b"9" * 5000, "x.yaml, line 1: a number of more than 4,000"),
        (b"a: !!binary aGk=\n", "x.yaml, line 1: could not determine"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(YamlError) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert re.match(message, str(caught.value).removeprefix(f"{tmp_path}/"))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(tmp_path / "x.yaml").tree == {"a": 1, "b": 2}


TEXTS = st.sampled_from(LITERALS) | st.text(
    st.characters(codec="utf-8", exclude_categories=("C",)), max_size=8
)
LEAVES = TEXTS | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(TEXTS, t, max_size=3), max_leaves=6
    )
)
def test_what_is_written_reads_back_here_and_elsewhere(tree: Any) -> None:
    text = format_yaml({"k": tree}, allow_unicode=True, width=110)
    assert parse_yaml(text, "x").tree == {"k": tree} == yaml.safe_load(text)


def test_nothing_else_reads_yaml() -> None:
    readers = [
        str(path.relative_to(ROOT))
        for folder in ("megatron_r1", "tools", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\byaml\.\w*(load|dump)", path.read_text())
    ]
    assert readers == ["megatron_r1/system/yaml_io.py"]


def test_every_file_of_the_repository_is_read() -> None:
    paths = [path for folder in ("megatron_r1", "examples") for path in (ROOT / folder).rglob("*.yaml")]
    assert len(paths) > 15
    for path in paths:
        assert isinstance(read_yaml(path).tree, dict)


_MANY = "more than 10,000 values and keys"


def _laughs(levels: int) -> str:
    """Each level has the one before nine times."""
    lines = ["l0: &l0 [lol]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def _merges(levels: int) -> str:
    lines = ["m0: &m0 {k: 1}"]
    lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


def _chain(levels: int) -> str:
    return "\n".join(["c0: &c0 [1]", *(f"c{n}: &c{n} [*c{n - 1}]" for n in range(1, levels))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_laughs(10), _MANY),
        (_laughs(3000), _MANY),
        (_merges(10), _MANY),
        ("a: &a [" + "x, " * 100 + "]\nb: [" + "*a, " * 100 + "]", _MANY),
        (
            f"a: &a {'x' * 100_000}\nb: [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]",
            "more than 10,000 values and keys",
        ),
        ("[" + "1," * (MOST_NODES + 1) + "]", _MANY),
        (_chain(MOST_DEPTH + 2), "nested too deep"),
        ("a: " + "[" * 200_000, "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("a: &a [*a]", "an alias stands in its own value"),
        ("a: &a {b: [1, {c: *a}]}", "an alias stands in its own value"),
        ("a: " + "x" * MOST_BYTES, "more than 262,144 bytes"),
        ("a: " + "1" * 200_000, "a number of more than 4,000"),
        ("a: 0" + "_" * 200_000, "is not the same number"),
        ("a: !" + "x" * 200_000 + " b", "could not determine"),
        ("a: *" + "x" * 200_000, "undefined alias"),
        ("? !!str [a]\n: b", "a key is text"),
        ("a: !!int [1]", "is not the same number"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_text_is_one_short_line_at_once(text: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(text, "x", lines=True)
    assert time.process_time() - start < 10
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_anchors_within_the_limits_are_read() -> None:
    tree = parse_yaml(_laughs(4) + "\n" + _merges(4) + "\n" + _chain(MOST_DEPTH - 2), "x").tree
    assert tree["l3"] == [[[["lol"]] * 9] * 9] * 9 and tree["m3"] == {"k": 1}


def test_a_line_that_may_hold_a_secret_is_not_quoted() -> None:
    for text in ("a: 1\napi_key: 0x1F", "password: 010", "token: *abc", "a: {secret: !abc d}"):
        with pytest.raises(YamlError, match="no YAML, or not the same to every reader") as caught:
            parse_yaml(text, "x", lines=True)
        assert not re.search("0x1F|010|abc", str(caught.value))


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(OSError, match="no regular file"):
        read_yaml(tmp_path / "x.yaml")
