"""JSON of any depth, size or kind: the value that json.loads gives, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.system.json_io import MOST_DEPTH, JsonError, mistake, parse_json, read_json, read_object

_LEAVES = st.none() | st.booleans() | st.integers() | st.text()
_TREES = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(_TREES)
def test_reads_what_json_reads(tree: object) -> None:
    assert parse_json(json.dumps(tree), "x") == tree


def _nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize("text", [_nested(MOST_DEPTH), '{"a":' * MOST_DEPTH + "1" + "}" * MOST_DEPTH])
def test_the_greatest_depth_is_read(text: str) -> None:
    assert parse_json(text, "x") == json.loads(text)


@pytest.mark.parametrize("depth", [MOST_DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize(
    ("opening", "inner", "closing"), [("[", "", "]"), ('{"a":', "1", "}"), ("[[],", "1", "]")]
)
def test_deeper_is_one_line(depth: int, opening: str, inner: str, closing: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(opening * depth + inner + closing * depth, "plan.json")
    assert str(caught.value) == f"plan.json: nested deeper than {MOST_DEPTH}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"a": 1}x', "no JSON"),
        (b"\xff", "no JSON"),
        (b"9" * 5000, "no JSON"),
        (b" " * 101, "more than 100 bytes"),
        (b"[1]", "no JSON mapping"),
    ],
)
def test_other_content_is_one_line_with_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(JsonError, match=message) as caught:
        read_object(path, most=100 if content.isspace() else 10_000)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_beyond_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(JsonError, match="more than 1,000 bytes"):
        read_json(path, most=1000)


def test_a_value_of_another_kind_is_named_with_its_place() -> None:
    kind = {"a": [int], "b?": {str: (None, float)}, "c?": ("x", "y"), "d?": {"e": str}}
    for value in (
        {"a": []},
        {"a": [1], "b": {"k": None, "j": 1, "i": 0.5}, "c": "y", "d": {"e": "", "f": 3}},
    ):
        assert mistake(value, kind) == ""
    for value, wrong in (
        ([], " is []"),
        ({}, " lacks a"),
        ({"a": {}}, ".a is {}"),
        ({"a": [1, True]}, ".a[1] is True"),
        ({"a": [2**63]}, f".a[0] is {2**63}"),
        ({"a": [], "b": {"k": "1"}}, ".b.k is '1'"),
        ({"a": [], "c": "z"}, ".c is 'z'"),
        ({"a": [], "d": {"e?": ""}}, ".d lacks e"),
        ({"a": [], "b": {"k" * 10**6: "x"}}, f".b.{'k' * 100} is 'x'"),
    ):
        assert mistake(value, kind) == wrong
