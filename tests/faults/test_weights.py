"""Weights and tokenizers that a conversion takes for others, or ends on in a traceback.

Each test states the right value; the mark goes when it holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults import inputs
from tests.faults.inputs import (
    DOCUMENTS,
    KIND,
    LLAMA,
    Answer,
    Tools,
    add_shards,
    hf_folder,
    jsonl,
    line_of,
    plain_tokenizer,
    run_words,
    tensors_of,
    tokenizer,
    tokenizer_folder,
    weights,
)

EMBEDDING = "model.embed_tokens.weight"


def imported(tools: Tools, folder: Path) -> Answer:
    return tools("convert_checkpoint", "--to", "megatron", folder, tools.folder / "imported")


def exported(tools: Tools, *more: object) -> Path:
    """The folder that comes back from what was imported."""
    back = tools.folder / "back"
    checkpoint = tools.folder / "imported" / "step_00000000"
    answer = tools("convert_checkpoint", "--to", "hf", "--context", 64, checkpoint, back, *more)
    assert answer.status == 0, answer.text
    return back


def changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, int]:
    """Tensor -> numbers of it that differ."""
    assert one.keys() == other.keys()
    differ = {name: int((one[name].float() != other[name].float()).sum()) for name in one}
    return {name: count for name, count in differ.items() if count}


@pytest.mark.parametrize("stale", [False, True])
def test_the_single_file_is_read_and_no_index_left_behind(tools: Tools, tmp_path: Path, stale: bool) -> None:
    folder = hf_folder(tmp_path / "hf")
    if stale:
        add_shards(folder, weights(seed=1))
    answer = imported(tools, folder)
    if answer.status == 2:
        assert stale
        line_of(answer.text, r"hf/?.*model\.safetensors")
        return
    assert answer.status == 0, answer.text
    assert changed(tensors_of(folder), tensors_of(exported(tools))) == {}


@pytest.mark.parametrize("others", ["bfloat16", "float32"])
def test_no_stored_number_is_rounded(tools: Tools, tmp_path: Path, others: str) -> None:
    import torch

    tensors = {
        name: tensor.to(torch.bfloat16 if name == EMBEDDING else getattr(torch, others))
        for name, tensor in weights().items()
    }
    folder = hf_folder(tmp_path / "hf", tensors)
    answer = imported(tools, folder)
    assert answer.status == 0, answer.text
    assert changed(tensors, tensors_of(exported(tools))) == {}


@pytest.mark.parametrize("beside", [True, False])
def test_the_tokenizer_that_is_named_is_exported(tools: Tools, tmp_path: Path, beside: bool) -> None:
    other = tokenizer()
    other["model"]["merges"] = []
    folder = tokenizer_folder(tmp_path / "tokenizer", other)
    mine = folder / "mine.json"
    mine.write_text(json.dumps(tokenizer()))
    if not beside:
        (folder / "tokenizer.json").unlink()
    assert imported(tools, hf_folder(tmp_path / "hf", weights(vocabulary=264), vocab_size=264)).status == 0
    back = exported(tools, "--tokenizer-type", KIND, "--tokenizer-model", mine)
    merges = json.loads((back / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == tokenizer()["model"]["merges"]


@pytest.mark.parametrize(
    "key",
    [
        "unknown_to_all",
        "use_qk_norm",
    ],
)
def test_a_key_of_another_class_changes_no_model(tools: Tools, tmp_path: Path, key: str) -> None:
    folder = hf_folder(tmp_path / "hf", **{key: True})
    answer = imported(tools, folder)
    if answer.status == 2:
        line_of(answer.text, key)
        return
    assert answer.status == 0, answer.text
    back = exported(tools)
    assert json.loads((back / "config.json").read_text())["model_type"] == "llama"
    assert changed(tensors_of(folder), tensors_of(back)) == {}


def test_a_file_cut_short_is_named(tools: Tools, tmp_path: Path) -> None:
    file = hf_folder(tmp_path / "hf") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    answer = imported(tools, file.parent)
    assert answer.status == 2, answer.text
    line_of(answer.text, r"^error: .*hf/model\.safetensors")


@pytest.mark.parametrize("misplaced", [None, EMBEDDING])
def test_an_index_that_names_another_shard_is_told(
    tools: Tools, tmp_path: Path, misplaced: str | None
) -> None:
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    add_shards(folder, weights(), misplaced)
    answer = imported(tools, folder)
    if misplaced is None:
        assert answer.status == 0, answer.text
        assert changed(weights(), tensors_of(exported(tools))) == {}
        return
    assert answer.status == 2, answer.text
    line_of(answer.text, r"^error: .*hf")
    line_of(answer.text, r"model-00002-of-00002\.safetensors|model\.safetensors\.index\.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("num_key_value_heads", 3, id="groups"),
        pytest.param("num_hidden_layers", "2", id="text"),
        pytest.param("rms_norm_eps", None, id="null"),
        pytest.param("attention_bias", True, id="control"),
    ],
)
def test_a_value_that_makes_no_model_is_refused_by_its_field(
    tools: Tools, tmp_path: Path, field: str, value: object
) -> None:
    heads: dict[str, object] = {"num_attention_heads": 4} if field == "num_key_value_heads" else {}
    folder = hf_folder(tmp_path / "hf", **{**heads, field: value})
    assert field in LLAMA
    answer = imported(tools, folder)
    assert answer.status == 2, answer.text
    line_of(answer.text, r"^error: .*hf/config\.json")
    line_of(answer.text, field)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("file", [".metadata", "__0_1.distcp"])
def test_a_damaged_checkpoint_is_named_by_a_check_too(
    tools: Tools, tmp_path: Path, file: str, check: bool
) -> None:
    assert imported(tools, hf_folder(tmp_path / "hf")).status == 0
    checkpoint = tmp_path / "imported" / "step_00000000"
    (checkpoint / file).unlink()
    words = ["--check"] if check else []
    answer = tools("convert_checkpoint", "--to", "hf", checkpoint, tmp_path / "back", *words)
    assert answer.status == 2, answer.text
    line_of(answer.text, rf"^error: imported/step_00000000 is damaged: {file} is missing")
    assert not (tmp_path / "back").exists()


def test_a_link_to_an_empty_folder_is_filled(tools: Tools, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "imported").symlink_to("real")
    assert imported(tools, hf_folder(tmp_path / "hf")).status == 0
    assert (tmp_path / "real" / "step_00000000").is_dir() and (tmp_path / "imported").is_symlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on data of `plain_tokenizer`, which lies in "mine"."""
    folder = tmp_path_factory.mktemp("trained")
    tools = Tools(folder)
    answer = tools.preprocess("data", jsonl(folder / "in.jsonl", DOCUMENTS), plain_tokenizer(folder / "mine"))
    assert answer.status == 0, answer.text
    answer = inputs.train(folder, *run_words(folder / "run", folder / "data_text_document", steps=1))
    assert answer.status == 0, answer.text
    return folder


@pytest.mark.parametrize("own", [True, False])
def test_a_run_is_exported_with_the_tokenizer_of_its_data(
    tools: Tools, tmp_path: Path, trained: Path, own: bool
) -> None:
    model = tokenizer()
    model["pre_tokenizer"]["use_regex"] = False
    other = tokenizer_folder(tmp_path / "other", model)
    checkpoint = trained / "run" / "checkpoints" / "step_00000001"
    words = ["--tokenizer-type", KIND, "--tokenizer-model", trained / "mine" if own else other]
    answer = tools("convert_checkpoint", "--to", "hf", checkpoint, tmp_path / "hf", *words)
    if own:
        assert answer.status == 0, answer.text
        return
    assert answer.status == 2, answer.text
    line_of(answer.text, "^error: .*tokenizer")
    assert not (tmp_path / "hf").exists()
