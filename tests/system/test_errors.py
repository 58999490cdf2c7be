"""A mistyped name is answered with the one that was meant, where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.system.errors import shown, suggest, suggest_path


def test_near_names() -> None:
    assert suggest("phaes", ["phase", "floor"]) == "; did you mean phase?"
    assert suggest("entirely", ["phase", "floor"]) == "; known: phase, floor"
    assert suggest("entirely", map(str, range(17))) == suggest("entirely", []) == ""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/quickstrat", "runs/quickstart"),
        ("runs/quickstart/tokenizr.model", "runs/quickstart/tokenizer.model"),
        ("rns/quickstart/tokenizer.model", "runs/quickstart/tokenizer.model"),
        # Two folders are alike; in one of them there is such a file.
        ("runs/quickstrt/tokenizer.model", "runs/quickstart/tokenizer.model"),
    ],
)
def test_near_paths(tmp_path: Path, typed: str, meant: str) -> None:
    for name in ("quickstart", "quickstrr"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/quickstart/tokenizer.model").touch()
    assert suggest_path(tmp_path / typed) == f"; did you mean {tmp_path / meant}?"


def test_what_resembles_nothing_or_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert (
        suggest_path(tmp_path / "data")
        == suggest_path(tmp_path / "xyz")
        == suggest_path(tmp_path / "data/x")
        == ""
    )


def test_relative_paths_stay_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").touch()
    assert suggest_path(Path("modl.yaml")) == "; did you mean model.yaml?"


@pytest.mark.parametrize("value", ["a", 3, None, [1, "b"], {"b": 1}, ("x",), 0.1, True])
def test_a_short_value_is_shown_as_python_writes_it(value: object) -> None:
    assert shown(value) == repr(value)


def test_a_value_of_any_size_is_shown_in_200_characters_at_once() -> None:
    billion: object = "lol"
    for _ in range(12):
        billion = [billion] * 12
    for value in (
        "x" * 10**7,
        b"x" * 10**9,
        billion,
        {"a": billion},
        10**5000,
        list(range(10**6)),
        {str(n): n for n in range(10**5)},
    ):
        assert len(shown(value)) <= 200
