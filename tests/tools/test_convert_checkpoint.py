"""A checkpoint of any layout becomes a folder that transformers reads, and comes back bit for bit."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.config_io import read_tree
from megatron_r1.export import convert
from megatron_r1.export import weights as hf
from megatron_r1.export.folder import EMBEDDING, stored_tensors
from megatron_r1.export.tokenizer import TokenizerFiles
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from megatron_r1.run import ledger
from tests.distributed import on_ranks
from tests.faults import inputs
from tests.faults.inputs import hf_folder, weights
from tests.launch import ROOT, tensors

MODEL = ModelConfig(2, 48, 80, 6, 2, 98, head_dim=16)
SPLIT = ParallelConfig(tensor=2, pipeline=2)


def save(directory: Path, model: ModelConfig = MODEL, precision: str = "fp32") -> Path:
    """A checkpoint of new weights on one rank."""
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(1)
        gpt = build_model(model, ParallelConfig(), precision, 8)
        return save_checkpoint(directory, gpt, None, TrainState(), model, "phase", plan="{}").path


def save_again(source: Path, directory: Path, parallel: ParallelConfig) -> None:
    """The same weights from as many ranks as the layout has."""
    with process_groups(parallel):
        backend.seed_model_parallel(1)
        gpt = build_model(MODEL, parallel, "fp32", 8)
        load_checkpoint(source, gpt, None, MODEL)
        save_checkpoint(directory, gpt, None, TrainState(), MODEL, "phase", plan="{}")


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    a, b = tensors(one), tensors(other)
    # Of the embedding, the final norm, and six of the stacked layers.
    assert a.keys() == b.keys() and len(a) == 8
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "checkpoints")


def test_there_and_back_again_is_the_same_checkpoint(saved: Path, tmp_path: Path) -> None:
    convert.to_hf(saved, tmp_path / "hf", context=64)
    convert.to_megatron(tmp_path / "hf", tmp_path / "back")
    back = tmp_path / "back" / "step_00000000"
    assert TrainState(**checkpoint_files.check_model(back, MODEL)["state"]) == TrainState()
    assert_same_weights(saved, back)
    convert.to_hf(back, tmp_path / "hf again", context=64)
    assert contents(tmp_path / "hf again") == contents(tmp_path / "hf")


def test_any_layout_becomes_the_same_files(saved: Path, tmp_path: Path) -> None:
    on_ranks(4, save_again, saved, tmp_path / "split", SPLIT)
    convert.to_hf(saved, tmp_path / "one", context=64)
    convert.to_hf(tmp_path / "split" / saved.name, tmp_path / "four", context=64)
    assert contents(tmp_path / "four") == contents(tmp_path / "one")


@torch.no_grad()
def test_transformers_computes_what_the_checkpoint_computes(saved: Path, tmp_path: Path) -> None:
    # Here, so that the ranks of other tests do not import it.
    from transformers import AutoModelForCausalLM

    convert.to_hf(saved, tmp_path / "hf", context=64)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(60)[None]
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(2)
        gpt = build_model(MODEL, ParallelConfig(), "fp32", 60).eval()
        load_checkpoint(saved, gpt, None, MODEL)
        ours = gpt(tokens, tokens, None)
    logits = theirs(tokens).logits
    assert float((ours - logits).abs().max() / logits.abs().max()) < 1e-5


@pytest.mark.parametrize(("asked", "written"), [(None, "BF16"), ("fp32", "F32")])
def test_precision_is_that_of_the_checkpoint_unless_asked(tmp_path: Path, asked: Any, written: str) -> None:
    source = save(tmp_path / "checkpoints", precision="bf16")
    convert.to_hf(source, tmp_path / "hf", context=64, precision=asked)
    assert stored_tensors(tmp_path / "hf")[EMBEDDING].dtype == written
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == {"BF16": "bfloat16", "F32": "float32"}[written]
    # bf16 to fp32 and back loses nothing.
    convert.to_megatron(tmp_path / "hf", tmp_path / "back", "bf16")
    assert_same_weights(source, tmp_path / "back" / "step_00000000")


def test_a_failed_export_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(hf, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        convert.to_hf(saved, tmp_path / "hf", context=64)
    assert [*tmp_path.iterdir()] == []


def test_mistakes_are_said_before_anything_is_written(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    large = TokenizerFiles(99, 0, {})
    for call, said in (
        (lambda: convert.to_hf(saved, tmp_path / "kept", 64), "is not an empty folder"),
        (lambda: convert.to_hf(saved, tmp_path / "new"), "give --context TOKENS"),
        (lambda: convert.to_hf(saved, tmp_path / "new", 64, None, large), "has 99 tokens, the model .* 98"),
        (lambda: convert.to_hf(tmp_path, tmp_path / "new", 64), "is no complete checkpoint"),
        (lambda: convert.to_megatron(saved, tmp_path / "new"), "has no config.json"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


def test_the_tool_writes_what_the_run_says(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/convert_checkpoint.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
        tool.main()

    (saved.parent.parent / "config.yaml").write_text("data: {seq_length: 640}\n")
    call("--to", "hf", saved, tmp_path / "hf", "--check")
    assert f"would write {tmp_path / 'hf'}: {MODEL.parameters():,} parameters" in capsys.readouterr().out
    assert not (tmp_path / "hf").exists()
    call("--to", "hf", saved, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["architectures"]) == (640, ["Llama4ForCausalLM"])
    call("--to", "megatron", tmp_path / "hf", tmp_path / "back", "--check")
    assert not (tmp_path / "back").exists()
    call("--to", "megatron", tmp_path / "hf", tmp_path / "back")
    out, back = capsys.readouterr().out, tmp_path / "back" / "step_00000000"
    wrote = [line.split(": ")[0] for line in out.splitlines() if "write" in line or "wrote" in line]
    assert wrote == [f"wrote {tmp_path / 'hf'}", f"would write {back}", f"wrote {back}"]
    # The section for the user's configuration, in the end.
    (tmp_path / "model.yaml").write_text(out[out.rindex("model:") :])
    mistakes: list[str] = []
    section = read_tree(tmp_path / "model.yaml", mistakes)["model"]
    assert (TypeAdapter(ModelConfig).validate_python(section), mistakes) == (MODEL, [])
    # Where it came from: the run's ledger has the export, and the import names the very file.
    (imported,) = ledger.read(tmp_path / "back")
    assert [line["inputs"] for line in ledger.lineage(tmp_path / "back")] == [
        {str(saved): checkpoint_files.identity(saved)}
    ]
    assert imported["inputs"].keys() == {str(tmp_path / "hf")}
    with pytest.raises(ValueError, match="--context -5"):
        convert.to_hf(saved, tmp_path / "new", context=-5)
    with pytest.raises(SystemExit) as status:
        call("--to", "megatron", tmp_path / "hf", tmp_path / "back")
    assert status.value.code == 2 and "is not an empty folder" in capsys.readouterr().err


# Weights of the one layer of `hf_folder`, which these write themselves.
NORM, GATE = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"


def cast(**types: torch.dtype) -> dict[str, Any]:
    """`weights()` in the types of norms, embedding and matrices."""

    def kind(name: str) -> str:
        return "norms" if "norm" in name else "embedding" if "embed" in name else "matrices"

    return {name: tensor.to(types[kind(name)]) for name, tensor in weights().items()}


@pytest.mark.parametrize(
    ("norms", "embedding", "matrices", "written"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, "BF16"),
        (torch.float32, torch.bfloat16, torch.bfloat16, "BF16"),
        (torch.float32, torch.float32, torch.bfloat16, "F32"),
        (torch.bfloat16, torch.bfloat16, torch.float16, "F32"),
        (torch.float16, torch.float16, torch.float16, "F32"),
    ],
)
def test_no_number_is_rounded_on_the_way_in_and_out(
    norms: torch.dtype, embedding: torch.dtype, matrices: torch.dtype, written: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    given = cast(norms=norms, embedding=embedding, matrices=matrices)
    source = hf_folder(tmp_path / "hf", given, torch_dtype="bfloat16")
    convert.to_megatron(source, tmp_path / "in")
    convert.to_hf(tmp_path / "in" / "step_00000000", tmp_path / "out")
    assert stored_tensors(tmp_path / "out")[EMBEDDING].dtype == written
    # As transformers reads them where no type is asked for.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert [name for name in given if not torch.equal(theirs[name].float(), given[name].float())] == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [NORM, GATE, EMBEDDING])
def test_numbers_that_are_not_finite_do_not_come_in(name: str, value: float, tmp_path: Path) -> None:
    given = weights()
    given[name].view(-1)[5] = value
    source = hf_folder(tmp_path / "hf", given)
    with pytest.raises(ValueError, match=rf"model\.safetensors: 1 of the \d+ numbers of {name} are NaN"):
        convert.to_megatron(source, tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_numbers_that_are_not_finite_do_not_go_out(tmp_path: Path) -> None:
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(1)
        gpt = build_model(MODEL, ParallelConfig(), "fp32", 8)
        gpt.decoder.layers[1].mlp.linear_fc2.weight.data[3, 4] = math.nan
        bad = save_checkpoint(tmp_path / "run", gpt, None, TrainState(), MODEL, "phase", plan="{}").path
    with pytest.raises(ValueError, match=r"1 of the 3840 numbers of model\.layers\.1\.feed_forward"):
        convert.to_hf(bad, tmp_path / "hf", 64)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_checkpoint_has_no_place_for_survives_an_import(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    special = {"bos_token_id": 3, "eos_token_id": [1, 4], "pad_token_id": 0}
    source = hf_folder(tmp_path / "hf", **special, max_position_embeddings=77, not_of_llama=1)
    (source / "pytorch_model.bin").touch()
    convert.to_megatron(source, tmp_path / "in")
    convert.to_hf(tmp_path / "in" / "step_00000000", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() >= {**special, "max_position_embeddings": 77}.items()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()).items() >= special.items()
    lines = capsys.readouterr().err.splitlines()
    assert f"{source}/config.json: not used, as in transformers' llama: not_of_llama" in lines
    assert f"{source}: not read, as by transformers: pytorch_model.bin" in lines


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (NORM, lambda t: t[:-1], rf"{NORM}: shape \[15\], expected \[16\]"),
        (EMBEDDING, lambda t: t.repeat(2, 1), rf"{EMBEDDING}: shape \[64, 16\], expected \[32, 16\]"),
        (GATE, lambda t: t.to(torch.int8), rf"{GATE}: I8 in model\.safetensors; weights are"),
        (GATE, lambda t: t.to(torch.float8_e4m3fn), rf"{GATE}: F8_E4M3 in model\.safetensors; weights are"),
        (GATE, lambda t: t.double(), rf"{GATE}: F64 in model\.safetensors; weights are"),
        ("lm_head.weight", lambda _: torch.ones(32, 16), "lm_head.weight is not model.embed_tokens.weight"),
        ("score.weight", lambda _: torch.ones(2, 16), "score.weight: GPTModel has no place for it"),
    ],
)
def test_tensors_of_another_model_are_named(name: str, change: Any, said: str, tmp_path: Path) -> None:
    given = weights()
    given[name] = change(given.get(name))
    source = hf_folder(tmp_path / "hf", given)
    with pytest.raises(ValueError, match=said):
        convert.to_megatron(source, tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_narrower_copy_of_the_embedding_is_the_embedding(tmp_path: Path) -> None:
    given = cast(norms=torch.float32, embedding=torch.bfloat16, matrices=torch.float32)
    given["lm_head.weight"] = given[EMBEDDING].float()
    convert.to_megatron(hf_folder(tmp_path / "hf", given), tmp_path / "in")


def test_a_model_far_beyond_the_files_is_not_laid_out(tmp_path: Path) -> None:
    source = hf_folder(tmp_path / "hf", num_hidden_layers=10**9)
    with pytest.raises(
        ValueError, match=r"means 1,952,000,000,528 parameters in 1,000,000,000 layers, and the files"
    ):
        convert.to_megatron(source, tmp_path / "in")


def test_a_missing_context_is_told_before_torch_is_loaded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = shutil.copytree(saved, tmp_path / "alone" / "checkpoints" / saved.name)
    # An import of it fails.
    monkeypatch.setitem(sys.modules, "megatron_r1.export.convert", None)
    words = ["--to", "hf", alone, tmp_path / "hf"]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "none"]
    for more in ([], ["--check"], tokenizer):
        status, text = inputs.call("convert_checkpoint", *words, *more)
        assert (status, text) == (
            2,
            f"error: {alone} lies in no run that says its data.seq_length; give --context TOKENS\n",
        )
    status, text = inputs.call(
        "convert_checkpoint", "--to", "megatron", saved, tmp_path / "in", "--context", 0
    )
    assert status == 2 and "--context, --tokenizer-* and --expect concern --to hf" in text
