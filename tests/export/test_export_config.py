"""What a config.json says is read as transformers reads it, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_r1.config import ModelConfig, RopeScaling
from megatron_r1.export import config as hf_config

SHAPE = ModelConfig(4, 48, 80, 6, 2, 97, head_dim=16)
REQUIRED = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 8}
LLAMA = {**REQUIRED, "model_type": "llama", "intermediate_size": 8, "tie_word_embeddings": True}
LLAMA4 = {
    **REQUIRED,
    "model_type": "llama4_text",
    "intermediate_size_mlp": 8,
    "tie_word_embeddings": True,
    "moe_layers": [],
    "no_rope_layers": [1] * 4,
    "attn_temperature_tuning": False,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize("base", [LLAMA, LLAMA4], ids=["llama", "llama4_text"])
def test_what_a_file_lacks_is_as_transformers_takes_it(base: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(**base)
    ours = hf_config.from_hf(base)
    assert (ours.context, ours.model.rms_norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.model.rotary_base == theirs.rope_parameters["rope_theta"]
    assert (ours.model.num_query_groups, ours.model.head_dim, ours.model.init_std) == (
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.initializer_range,
    )


@pytest.mark.parametrize("qk_norm", [True, False], ids=["llama4_text", "llama"])
@pytest.mark.parametrize(
    "scaling", [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 0.5, 7.0, 512)]
)
def test_a_model_survives_the_way_through_transformers(
    tmp_path: Path, qk_norm: bool, scaling: RopeScaling | None
) -> None:
    model = dataclasses.replace(SHAPE, qk_norm=qk_norm, rope_scaling=scaling, rms_norm_eps=3e-6)
    config = hf_config.to_hf(model, 4096, "bfloat16", {"eos_token_id": 5})
    (tmp_path / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    rewritten = json.loads((tmp_path / "again" / "config.json").read_text())
    for tree in (config, rewritten):
        assert hf_config.from_hf(tree) == hf_config.HfModel(config["model_type"], model, 4096)
    assert rewritten["eos_token_id"] == 5


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (LLAMA, {"tie_word_embeddings": False}, "tie_word_embeddings=False: only True"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True: only False"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True: only False"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
        (LLAMA, {"attention_dropout": 0.1}, "attention_dropout=0.1: only 0.0"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}: only None"),
        (LLAMA, {"sliding_window": 512}, "sliding_window=512: shorter than max_position_embeddings=2048"),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            "rope_scaling.rope_type='yarn': only default,",
        ),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.low_freq_factor: missing"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention={}: one rotary"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA4, {"moe_layers": [1]}, "moe_layers=[1], interleave_moe_layer_step=1: no layer may have"),
        (LLAMA4, {"moe_layers": None}, "moe_layers=None, interleave_moe_layer_step=1: no layer may have"),
        (LLAMA4, {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers=[1, 1, 1, 0]"),
        (LLAMA4, {"no_rope_layers": []}, "no_rope_layers=[], no_rope_layer_interval=4: every layer must"),
        (LLAMA4, {"attn_temperature_tuning": True}, "attn_temperature_tuning=True: only False"),
        (LLAMA4, {"attention_chunk_size": 1024}, "attention_chunk_size=1024: shorter than"),
        (LLAMA4, {"layer_types": ["sliding_attention"] * 4}, "layer_types: 'sliding_attention' is not"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads=3: does not divide num_attention_heads=8"),
        (LLAMA, {"num_hidden_layers": "2"}, "num_hidden_layers='2': "),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers=True: "),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0: must be positive"),
        (LLAMA, {"vocab_size": -9}, "vocab_size=-9: must be positive"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads=0: must be positive"),
        (LLAMA, {"num_attention_heads": 3}, "hidden_size=16: no multiple of num_attention_heads=3"),
        (LLAMA, {"head_dim": 3}, "head_dim=3: must be even"),
        (LLAMA, {"head_dim": 0}, "head_dim=0: must be positive"),
        (LLAMA, {"max_position_embeddings": 0}, "max_position_embeddings=0: must be positive"),
        (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps=None: "),
        (LLAMA, {"rms_norm_eps": math.nan}, "rms_norm_eps=nan: "),
        (LLAMA, {"rms_norm_eps": math.inf}, "rms_norm_eps=inf: "),
        (LLAMA, {"initializer_range": 0.0}, "initializer_range=0.0: must be positive"),
        (LLAMA, {"attention_bias": 0}, "attention_bias=0: "),
        (LLAMA, {"eos_token_id": "2"}, "eos_token_id='2': "),
        (LLAMA, {"pad_token_id": 9}, "pad_token_id=9: no token of vocab_size=9"),
        (LLAMA, {"eos_token_id": [2, 12]}, "eos_token_id=[2, 12]: no token of vocab_size=9"),
        (LLAMA, {"rope_theta": None}, "rope_theta=None: "),
        (LLAMA, {"rope_theta": -1.0}, "rope_theta=-1.0: must be positive"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling='linear': must be a mapping"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2': "),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "rope_parameters.factor=0.5: must",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}},
            "low_freq_factor < high_freq_factor does not hold for 4.0, 1.0",
        ),
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "model_type=llama means LlamaForCausalLM"),
        (LLAMA, {"is_causal": False}, "is_causal=False: only True"),
        (LLAMA, {"transformers_weights": "b.safetensors"}, "transformers_weights='b.safetensors': only None"),
        (LLAMA, {"per_layer_config": {"0": {}}}, "per_layer_config={'0': {}}: only None"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 4}, "layer_types: 'sliding_attention' is not"),
        (LLAMA, {"layer_types": 4}, "layer_types=4: must be 4 names"),
        (LLAMA, {"attention_chunk_size": 512}, "attention_chunk_size=512: shorter than"),
        (LLAMA4, {"layer_types": ["full_attention"]}, "layer_types=['full_attention']: must be 4 names"),
        (LLAMA4, {"no_rope_layers": [1]}, "no_rope_layers=[1], no_rope_layer_interval=4: every layer must"),
        (LLAMA4, {"use_qk_norm": "false"}, "use_qk_norm='false': "),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    hf_config.from_hf(base)
    with pytest.raises(ValueError) as error:
        hf_config.from_hf({**base, **change})
    assert said in str(error.value)


HOSTILE = ["2", None, True, 0, -1, 3, 2.0, math.nan, 10**30, [], [1], [{}], {}, {"a": 1}]


@pytest.mark.parametrize("base", [LLAMA, LLAMA4], ids=["llama", "llama4_text"])
def test_no_value_is_taken_that_the_class_refuses(base: dict[str, Any]) -> None:
    keys = {*LLAMA, *LLAMA4, "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "layer_types"}
    taken = 0
    for key, value in itertools.product(keys | {"sliding_window"}, HOSTILE):
        try:
            hf_config.from_hf({**base, key: value})
        except ValueError:
            continue
        taken += 1
        AutoConfig.for_model(**copy.deepcopy({**base, key: value}))
    assert taken > 20


@torch.no_grad()
def test_keys_that_are_not_used_change_nothing_in_transformers() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    plain = {**LLAMA, "initializer_range": 0.5, "rope_scaling": scaling}
    others = {"use_qk_norm": True, "attn_temperature_tuning": True, "no_rope_layers": [0] * 4, "new": 3}
    others |= {"query_pre_attn_scalar": 7, "logit_scale": 2.0, "use_sliding_window": True, "moe_layers": [1]}
    strange = {**plain, **others, "rope_scaling": {**scaling, "attention_factor": 3.0}}
    read = hf_config.from_hf(strange)
    assert read.ignored == [*sorted(others), "rope_scaling.attention_factor"]
    assert read == hf_config.from_hf(plain)
    logits = []
    for tree in (plain, strange):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(tree))).eval()
        logits.append(model(torch.arange(8)[None]).logits)
    assert torch.equal(*logits)


def test_everything_is_refused_in_one_go() -> None:
    with pytest.raises(ValueError) as error:
        hf_config.from_hf({"model_type": "llama4_text", "vocab_size": 9, "num_hidden_layers": 4})
    fields = ("hidden_size", "intermediate_size_mlp", "tie_word_embeddings", "attn_temperature_tuning")
    assert all(f"{name}" in str(error.value) for name in (*fields, "no_rope_layers", "moe_layers"))
    with pytest.raises(ValueError, match="model_type='mistral': only llama and llama4_text can be read"):
        hf_config.from_hf({"model_type": "mistral"})


def test_a_shape_that_llama_refuses_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"to be a multiple of model\.num_attention_heads=5"):
        hf_config.to_hf(dataclasses.replace(SHAPE, num_attention_heads=5, qk_norm=False), 64, "float32")
