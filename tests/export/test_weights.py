"""GPTModel and the released Hugging Face classes are one function, in both directions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_r1 import backend
from megatron_r1.config import ModelConfig, ParallelConfig, RopeScaling
from megatron_r1.export import config as hf_config
from megatron_r1.export import weights as hf
from megatron_r1.export.folder import check_tensors, shapes, stored_tensors
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ModelConfig(2, 48, 80, 6, 2, 97, head_dim=16)
STRETCHED = RopeScaling("llama3", 8.0, 0.7, 5.0, 32)


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(1)
        yield


def preset(name: str, layers: int) -> ModelConfig:
    """Its own widths, heads and vocabulary."""
    tree = yaml.safe_load((ROOT / f"examples/models/{name}.yaml").read_text())
    return dataclasses.replace(ModelConfig(**tree["model"]), num_layers=layers)


def empty(model: ModelConfig) -> Any:
    return build_model(model, ParallelConfig(), "fp32", 1, plain_layers=True, initialise=False).eval()


def filled(model: ModelConfig) -> Any:
    """Values at which attention is far from even and no two norm weights are alike."""
    gpt = empty(model)
    for name, param in gpt.named_parameters():
        spread = 3**0.5 * (0.02 if "embed" in name else param.shape[-1] ** -0.5)
        low, high = (0.5, 1.5) if "norm" in name else (-spread, spread)
        torch.nn.init.uniform_(param, low, high)
    return gpt


def family_of(model: ModelConfig) -> hf_config.Family:
    return "llama4_text" if model.qk_norm else "llama"


def hugging_face(config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """transformers' class on these very tensors."""
    described = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(described)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    # The only thing it has besides weights.
    model.model.rotary_emb = type(model.model.rotary_emb)(described)
    return model.eval()


@torch.no_grad()
def difference(gpt: Any, theirs: Any, length: int = 48) -> float:
    """Largest difference of logits as a share of the largest logit."""
    tokens = torch.randint(0, theirs.config.vocab_size, (1, length))
    ours = gpt(tokens, torch.arange(length)[None], None)
    logits = theirs(tokens, use_cache=False).logits
    return float((ours - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(preset("tiny", 4), id="tiny"),
        pytest.param(preset("140m", 2), id="140m"),
        pytest.param(preset("360m", 2), id="360m"),
        pytest.param(preset("950m", 2), id="950m"),
        pytest.param(SMALL, id="llama4_text"),
        pytest.param(dataclasses.replace(SMALL, qk_norm=False), id="llama"),
        pytest.param(dataclasses.replace(SMALL, rope_scaling=STRETCHED), id="llama4_text stretched"),
        pytest.param(dataclasses.replace(SMALL, qk_norm=False, rope_scaling=STRETCHED), id="llama stretched"),
        pytest.param(
            dataclasses.replace(SMALL, qk_norm=False, rope_scaling=RopeScaling("linear", 4.0)),
            id="llama linear",
        ),
    ],
)
def test_logits_are_those_of_the_released_class(model: ModelConfig) -> None:
    family = family_of(model)
    gpt = filled(model)
    exported = hf.views(gpt, model, family)
    named = {name: tuple(tensor.shape) for name, tensor in hf.tensors(exported).items()}
    assert named == dict(shapes(model, family))
    theirs = hugging_face(hf_config.to_hf(model, 128, "float32"), hf.tensors(exported))
    assert difference(gpt, theirs) < 1e-5

    # The other way: their weights, changed, into an empty model of ours.
    with torch.no_grad():
        for param in theirs.parameters():
            param.mul_(1.25)
    gpt = empty(model)
    for name, view in hf.views(gpt, model, family).items():
        view.copy_(theirs.state_dict()[name].view(view.shape))
    assert difference(gpt, theirs) < 1e-5


def test_llama4_without_its_norm_is_read_too() -> None:
    config = {**hf_config.to_hf(SMALL, 128, "float32"), "use_qk_norm": False}
    read = hf_config.from_hf(config)
    assert not read.model.qk_norm
    gpt = filled(read.model)
    state = hf.tensors(hf.views(gpt, read.model, "llama4_text"))
    assert difference(gpt, hugging_face(config, state)) < 1e-5


def test_the_other_class_s_rotation_is_another_function() -> None:
    gpt = filled(SMALL)
    state = hf.tensors(hf.views(gpt, SMALL, "llama"))
    state = {name.replace(".mlp.", ".feed_forward."): tensor for name, tensor in state.items()}
    assert difference(gpt, hugging_face(hf_config.to_hf(SMALL, 128, "float32"), state)) > 1e-2


@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 20_000], ids=["one file", "shards"])
def test_transformers_reads_what_is_saved_and_loading_it_gives_the_same_bits(
    tmp_path: Path, shard_bytes: int
) -> None:
    gpt = filled(SMALL)
    hf.save(hf.views(gpt, SMALL, "llama4_text"), tmp_path, shard_bytes)
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(SMALL, 128, "float32")))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert all(file.stat().st_size < shard_bytes + 2000 for file in shards)
    assert (len(shards) > 3) == (shard_bytes == 20_000)
    assert difference(gpt, AutoModelForCausalLM.from_pretrained(tmp_path).eval()) < 1e-5

    again = empty(SMALL)
    hf.load(hf.views(again, SMALL, "llama4_text"), stored_tensors(tmp_path))
    held, loaded = dict(gpt.named_parameters()), dict(again.named_parameters())
    assert [name for name in held if not torch.equal(held[name], loaded[name])] == []


def test_a_released_checkpoint_saved_by_transformers_is_read(tmp_path: Path) -> None:
    """Of the llama class, with its default names, layouts and config.json."""
    described = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_parameters={"rope_theta": 3e4, **dataclasses.asdict(STRETCHED)},
    )
    theirs = AutoModelForCausalLM.from_config(described).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    read = hf_config.from_hf(json.loads((tmp_path / "config.json").read_text()))
    gpt = empty(read.model)
    hf.load(hf.views(gpt, read.model, read.family), stored_tensors(tmp_path))
    assert difference(gpt, theirs) < 1e-5


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    gpt = filled(SMALL)
    views = hf.views(gpt, SMALL, "llama4_text")
    wrong = {name: view for name, view in views.items() if name != "model.norm.weight"}
    wrong["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(96)
    wrong["model.layers.0.input_layernorm.weight"] = torch.zeros(47)
    hf.save(wrong, tmp_path)
    with pytest.raises(ValueError) as error:
        check_tensors(tmp_path, stored_tensors(tmp_path), SMALL, "llama4_text")
    for mistake in (
        "model.norm.weight: missing",
        "model.layers.1.self_attn.q_proj.bias: GPTModel has no place for it",
        "model.layers.0.input_layernorm.weight: shape [47], expected [48]",
    ):
        assert mistake in str(error.value)


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_output_layer_must_be_the_embedding(tmp_path: Path, same: bool) -> None:
    views = hf.views(filled(SMALL), SMALL, "llama")
    head = views["model.embed_tokens.weight"].clone()
    head[3, 4] += 0 if same else 1
    hf.save({**views, "lm_head.weight": head}, tmp_path)
    if same:
        hf.load(views, stored_tensors(tmp_path))
    else:
        with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight"):
            hf.load(views, stored_tensors(tmp_path))
