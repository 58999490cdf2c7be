"""Configurations of the two Hugging Face classes that compute what GPTModel computes.

llama4_text, MobileLLM-R1's own class, normalises each query and key head without a weight and turns
neighbouring pairs of a head; llama does not normalise, and turns a head's first half with its second.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.config import ModelConfig, RopeScaling
from megatron_r1.system.errors import require

Family = Literal["llama", "llama4_text"]
_CLASS = {"llama": "LlamaForCausalLM", "llama4_text": "Llama4ForCausalLM"}

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "attn_temperature_tuning": False,
    "quantization_config": None,
}
"""The one value that GPTModel has, where a class offers others."""

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "init_std",
}
"""Keys of both classes -> fields of ModelConfig with the same value."""

_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class HfModel:
    """The content of a config.json."""

    family: Family
    model: ModelConfig
    context: int
    """max_position_embeddings, tokens."""


def to_hf(model: ModelConfig, context: int, dtype: str, end_of_text: int | None = None) -> dict[str, Any]:
    """config.json of this model, in keys that transformers 4 and 5 both read.

    `context`: longest sequence, tokens. `dtype`: of the weights, as torch names it.
    Raises ValueError for a shape that the class refuses.
    """
    family: Family = "llama4_text" if model.qk_norm else "llama"
    if family == "llama" and model.hidden_size % model.num_attention_heads:
        raise ValueError(
            f"{_CLASS[family]} needs model.hidden_size={model.hidden_size} to be a multiple of "
            f"model.num_attention_heads={model.num_attention_heads}; with model.qk_norm it would not matter"
        )
    fixed = ("hidden_act", "attention_bias", "attention_dropout", "tie_word_embeddings")
    config = {
        "architectures": [_CLASS[family]],
        "model_type": family,
        **{key: getattr(model, field) for key, field in _FIELDS.items()},
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": context,
        "rope_theta": model.rotary_base,
        "rope_scaling": _rope_to_hf(model.rope_scaling),
        **{key: _ONLY[key] for key in fixed},
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }
    if family == "llama":
        return {**config, "mlp_bias": False}
    return {
        **config,
        "intermediate_size_mlp": model.ffn_hidden_size,
        "use_qk_norm": True,
        "attn_temperature_tuning": False,
        # 1: with rotary embedding.
        "no_rope_layers": [1] * model.num_layers,
        "layer_types": ["full_attention"] * model.num_layers,
        "attention_chunk_size": context,
        # Readers differ in which of these tells them that no layer has experts.
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }


def from_hf(config: dict[str, Any]) -> HfModel:
    """The model that a config.json describes.

    Raises ValueError naming every field whose value GPTModel cannot represent.
    """
    family = config.get("model_type")
    if family not in _CLASS:
        raise ValueError(f"model_type={family!r}: only {' and '.join(_CLASS)} can be read")
    has = {**_defaults(family), **config}
    ffn = "intermediate_size" if family == "llama" else "intermediate_size_mlp"
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", ffn)
    refused = [f"{key}: missing" for key in needed if key not in config]
    refused += [
        f"{key}={has[key]!r}: only {only!r} is supported"
        for key, only in _ONLY.items()
        if key in has and has[key] != only
    ]
    refused += _layer_refusals(has)
    theta, scaling = _rope_from_hf(has, refused)
    if refused:
        raise ValueError(
            "GPTModel cannot represent this model:\n" + "\n".join(f"  {line}" for line in refused)
        )
    heads = has["num_attention_heads"]
    has["num_key_value_heads"] = has["num_key_value_heads"] or heads
    has["head_dim"] = has["head_dim"] or has["hidden_size"] // heads
    model = ModelConfig(
        **{field: has[key] for key, field in _FIELDS.items()},
        ffn_hidden_size=has[ffn],
        rotary_base=float(theta),
        rope_scaling=scaling,
        qk_norm=has.get("use_qk_norm", False),
    )
    return HfModel(family, model, has["max_position_embeddings"])


def _defaults(family: Family) -> dict[str, Any]:
    """The values that the family's class takes for keys that a config.json lacks."""
    of_class = type(require("transformers", "reading a config.json").AutoConfig.for_model(family))
    fields = dataclasses.fields(of_class)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return {**defaults, "rope_theta": of_class.default_theta}


def _layer_refusals(has: dict[str, Any]) -> list[str]:
    """Messages about layers without rotary embedding, with experts, or that see less than the context."""
    layers, context = has["num_hidden_layers"], has["max_position_embeddings"]
    out = []
    window = has.get("sliding_window")
    if window is not None and window < context:
        out.append(f"sliding_window={window}: shorter than max_position_embeddings={context}")
    if has["model_type"] != "llama4_text":
        return out
    interval = has["no_rope_layer_interval"]
    rotary = has["no_rope_layers"] or [int((n + 1) % interval != 0) for n in range(layers)]
    if not all(rotary[:layers]):
        given = f"no_rope_layers={has['no_rope_layers']}, no_rope_layer_interval={interval}"
        out.append(f"{given}: every layer must have rotary embedding")
    step, experts = has["interleave_moe_layer_step"], has["moe_layers"]
    # Without a list, every `step`-th layer has experts.
    if experts or (experts is None and 0 < (step or 0) <= layers):
        out.append(f"moe_layers={experts}, interleave_moe_layer_step={step}: no layer may have experts")
    kinds = has["layer_types"] or ["chunked_attention"]
    others = sorted({*kinds} - {"full_attention", "chunked_attention"})
    out += [f"layer_types: {kind!r} is not supported" for kind in others]
    chunk = has["attention_chunk_size"]
    if "chunked_attention" in kinds and chunk is not None and chunk < context:
        out.append(f"attention_chunk_size={chunk}: shorter than max_position_embeddings={context}")
    return out


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    original = ["original_max_position_embeddings"] if scaling.rope_type == "llama3" else []
    return {key: getattr(scaling, key) for key in ("rope_type", *_ROPE_NEEDS[scaling.rope_type], *original)}


def _rope_from_hf(has: dict[str, Any], refused: list[str]) -> tuple[float, RopeScaling | None]:
    """Base and scaling. Adds a message to `refused` for each value that cannot be represented."""
    # transformers 5 writes one mapping, earlier ones rope_theta beside rope_scaling.
    field = "rope_scaling" if has.get("rope_scaling") else "rope_parameters"
    rope = has.get(field) or {}
    theta = rope.get("rope_theta", has["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", has.get("partial_rotary_factor", 1.0))
    if share != 1:
        refused.append(f"{field}.partial_rotary_factor={share}: the whole head is turned")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    refused += [f"{field}.{key}={rope[key]}: one rotary embedding serves all layers" for key in nested]
    if kind not in _ROPE_NEEDS:
        refused.append(f"{field}.rope_type={kind!r}: only {', '.join(_ROPE_NEEDS)} are supported")
        return theta, None
    missing = [key for key in _ROPE_NEEDS[kind] if key not in rope]
    refused += [f"{field}.{key}: missing, and rope_type={kind!r} needs it" for key in missing]
    if kind == "default" or missing:
        return theta, None
    scaling = {key: rope[key] for key in _ROPE_NEEDS[kind]}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", has["max_position_embeddings"])
        scaling["original_max_position_embeddings"] = has.get("original_max_position_embeddings", original)
    return theta, RopeScaling(kind, **scaling)
