"""What a run's folder says of a checkpoint, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_r1.export.origin import CONTEXT, IMPORTED, compare_tokenizer, context_of, imported
from tests.tools.test_convert_checkpoint import save


def run(folder: Path, **sidecars: dict[str, str] | None) -> Path:
    """The path of a checkpoint in a run on these datasets, of which only the sidecars are there."""
    sources = {}
    for name, sidecar in sidecars.items():
        sources[name] = {"prefix": str(folder / name)}
        (folder / name).with_suffix(".idx").write_bytes(name.encode())
        if sidecar is not None:
            (folder / f"{name}.json").write_text(json.dumps(sidecar))
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"data": {"sources": sources}}))
    return folder / "run" / "checkpoints" / "step_00000001"


OURS, OTHER = {"tokenizer_fingerprint": "f1", "bin_sha256": "1" * 64}, {"tokenizer_fingerprint": "f2"}


@pytest.mark.parametrize(
    ("sidecars", "trained_on", "said"),
    [
        ({"a": OURS}, {"a": "1" * 64}, ""),
        ({"a": OURS}, {}, ""),
        ({"a": None, "b": OURS}, {"b": "1" * 64}, ""),
        ({"a": OTHER}, {}, "the tokenizer f1 is not the run's: by "),
        ({"a": None, "b": OTHER}, {}, "b.json its data was made with"),
        # Another dataset lies where the run's was.
        ({"a": {**OTHER, "bin_sha256": "2" * 64}}, {"a": "1" * 64}, "the tokenizer is not compared"),
        ({"a": {**OTHER, "bin_sha256": "2" * 64}, "b": OURS}, {"a": "1" * 64, "b": "1" * 64}, ""),
        ({"a": None}, {}, "the tokenizer is not compared"),
        ({}, {}, "the tokenizer is not compared"),
    ],
)
def test_a_tokenizer_is_compared_with_the_data_that_was_trained_on(
    sidecars: dict[str, dict[str, str] | None],
    trained_on: dict[str, str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = ""
    try:
        compare_tokenizer(run(tmp_path, **sidecars), json.dumps({"data": trained_on}), "f1")
        text = capsys.readouterr().err
    except ValueError as error:
        text = str(error)
    assert said in text if said else text == ""


@pytest.mark.parametrize("text", ["data: 3", "data: {seq_length: '9'}", "data: {seq_length: 0}"])
def test_a_context_that_a_run_does_not_say_is_asked_for(text: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="give --context"):
        context_of(checkpoint)
    (tmp_path / "run" / "config.yaml").write_text("data: [")
    with pytest.raises(ValueError, match=r"config\.yaml, line 1: .*; it is the run's configuration"):
        context_of(checkpoint)


def test_relative_datasets_of_a_run_are_found_from_anywhere(tmp_path: Path) -> None:
    """Where the run began, not where the conversion runs."""
    checkpoint = run(tmp_path, a=OTHER)
    tree = {"train": {"run": "run"}, "data": {"sources": {"a": {"prefix": "a"}}}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="the tokenizer f1 is not the run's"):
        compare_tokenizer(checkpoint, "{}", "f1")


@pytest.mark.parametrize("value", ["x", [[1]], {"a": 1}, 1.5, True, 1 << 63, ["x" * 10**6]])
def test_what_an_import_never_wrote_is_refused_in_a_line(value: object, tmp_path: Path) -> None:
    (tmp_path / IMPORTED).write_text(json.dumps({CONTEXT: 64, "eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"{IMPORTED}: 'eos_token_id' is .*; import again") as error:
        imported(tmp_path / "step_00000000")
    assert len(str(error.value)) < 500
    (tmp_path / IMPORTED).write_text(json.dumps({CONTEXT: 64, "eos_token_id": [1, 2], "pad_token_id": -1}))
    assert imported(tmp_path / "step_00000000")["pad_token_id"] == -1


@pytest.mark.parametrize("sources", ["[1]", "{a: 3}", "{a: {prefix: [1]}}", "{a: {prefix: '/'}}", "x"])
def test_sources_of_another_kind_are_not_compared(
    sources: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(f"data: {{sources: {sources}}}\ntrain: {{run: [1]}}")
    compare_tokenizer(checkpoint, "{}", "f1")
    assert "the tokenizer is not compared" in capsys.readouterr().err
