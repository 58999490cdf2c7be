"""A mistyped name is answered with the one that was meant, where it lies."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_r1.system.errors import (
    brief,
    closest,
    hidden,
    printable,
    shown,
    some,
    suggest,
    suggest_path,
    unhidden,
)


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


def test_text_for_a_terminal_holds_no_control_characters() -> None:
    assert printable("Größe 数据 'a\\b'\n", keep="\n") == "Größe 数据 'a\\b'\n"
    assert printable("\x1b[2J\r\n\u202eb\udcff") == "\\x1b[2J\\r\\n\\u202eb\\udcff"
    assert brief("short\nname") == "short\\nname" and len(brief("x" * 10**6)) <= 200


def test_suggestions_cost_little_for_any_word(tmp_path: Path) -> None:
    assert suggest("x" * 10**6, ["phase"]) == "; known: phase"
    assert suggest("phase", map(str, range(10**5))) == ""
    assert len(suggest("entirely", ["n" * 10**6])) < 300


SECRETS = {
    "wandb_logger_kwargs": {"api_key": "S1", "project": "monkey", "name": "key-run", "tags": ["key-x"]},
    "mlflow_logger_kwargs": {
        "tracking_uri": "https://user:S2@host:80/a?x=1&token=S3",
        "tags": {"auth": {"a": ["S4", 5512, None]}},
    },
    "headers": ["Authorization: Bearer S5", "Authorization: Basic S6", "--api-key", "S7"],
    "pairs": [{"name": "api_token", "value": "S8"}],
    "urls": ["postgresql://user:p@S9/w@h/db", '{"password": "S10"}'],
    "PGPASSWORD": "S11",
    "forms": [
        ["api_key", "S12"],
        {"key": "API_KEY", "value": "S13"},
        "x --api-key S14 -v",
        "password='S15 S16'",
    ],
    "pw": "S17",
    "texts": ["mail hf_S18" + "a" * 20, "https://u:" + "p" * 400 + "S19@h", "all"],
    "n_tokens": 7,
}


def test_secrets_are_hidden_wherever_they_stand() -> None:
    text = str(hidden(SECRETS))
    assert [n for n in range(1, 20) if f"S{n}" in text] == [] and "5512" not in text
    for kept in ("monkey", "key-run", "key-x", "@host:80/a?x=1", "@h/db", "'n_tokens': 7", "None"):
        assert kept in text
    from_environment = {"api_key": "${oc.env:WANDB_API_KEY}"}
    assert hidden(from_environment) == unhidden(from_environment) == from_environment
    assert hidden(hidden(SECRETS)) == hidden(SECRETS)


def test_hidden_settings_that_were_read_back_are_left_to_the_environment() -> None:
    given = unhidden(hidden(SECRETS))
    assert given["wandb_logger_kwargs"] == {"project": "monkey", "name": "key-run", "tags": ["key-x"]}
    assert given["urls"][0] == "postgresql://h/db" and "PGPASSWORD" not in given


@pytest.mark.parametrize(
    "text",
    ["://" * 20_000, "key" * 20_000, "key " * 20_000, "key" + " " * 60_000, "a-" * 30_000, "-" * 60_000],
)
def test_hiding_costs_no_more_than_the_text_is_long(text: str) -> None:
    start = time.process_time()
    hidden({"a": text})
    assert time.process_time() - start < 5


def test_long_names_cost_no_time_and_long_lists_are_cut() -> None:
    long = "a" * 10**6
    assert closest(long, [long + "b"] * 10**4) == [] and closest("phaes", ["phase"]) == ["phase"]
    assert some(["x"] * 14, "; ") == "; ".join("x" * 12) + " and 2 more"
