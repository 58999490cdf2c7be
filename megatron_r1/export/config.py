"""Configurations of the two Hugging Face classes that compute what GPTModel computes.

llama4_text, MobileLLM-R1's own class, normalises each query and key head without a weight and turns
neighbouring pairs of a head; llama does not normalise, and turns a head's first half with its second.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError

from megatron_r1.config import ModelConfig, RopeScaling
from megatron_r1.system.errors import require, shown, some
from megatron_r1.system.json_io import parse_json

Family = Literal["llama", "llama4_text"]
_CLASS = {"llama": "LlamaForCausalLM", "llama4_text": "Llama4ForCausalLM"}

_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "attn_temperature_tuning": False,
}
"""The one value that GPTModel has, where a class offers others."""

_ABSENT = ("quantization_config", "transformers_weights", "per_layer_config", "kv_sharing_modes")
_ANY_CLASS = {"is_causal": True, **dict.fromkeys(_ABSENT)}
"""The same for keys that transformers reads for each class, whatever fields it has."""

_READ_TOO = {"model_type", "architectures", "torch_dtype", "transformers_version", "partial_rotary_factor"}
_READ_TOO |= {"rope_theta", "rope_scaling", "original_max_position_embeddings"}
_READ_TOO |= {"sliding_window", "layer_types", "attention_chunk_size"}
"""Keys beside a class's fields that count, or that change no model."""

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

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
_ROPE_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


@dataclass(frozen=True)
class HfModel:
    """The content of a config.json."""

    family: Family
    model: ModelConfig
    context: int
    """max_position_embeddings, tokens."""
    special: dict[str, Any] = field(default_factory=dict, compare=False)
    """Ids of the special tokens, by their keys."""
    ignored: list[str] = field(default_factory=list, compare=False)
    """Keys that nothing reads: unknown ones, and those of other classes."""


def to_hf(
    model: ModelConfig, context: int, dtype: str, special: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of this model, in keys that transformers 4 and 5 both read.

    `context`: longest sequence, tokens. `dtype`: of the weights, as torch names it. `special`: ids of the
    special tokens, by their keys; others are null, because the class's own would be of another vocabulary.
    Raises ValueError for a shape that the class refuses.
    """
    family: Family = "llama4_text" if model.qk_norm else "llama"
    if family == "llama" and model.hidden_size % model.num_attention_heads:
        rule = f"needs model.hidden_size={model.hidden_size} to be a multiple of"
        heads = f"model.num_attention_heads={model.num_attention_heads}"
        raise ValueError(f"{_CLASS[family]} {rule} {heads}; with model.qk_norm it would not matter")
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
        **dict.fromkeys(SPECIAL),
        **(special or {}),
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

    Raises ValueError naming every field whose value is of a wrong kind, or that GPTModel cannot represent.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _CLASS:
        raise ValueError(f"model_type={shown(family)}: only {' and '.join(_CLASS)} can be read")
    theirs = require("transformers", "reading a config.json").AutoConfig.for_model(family)
    fields = {field.name: field.default for field in dataclasses.fields(theirs)}
    read = {*fields, *_READ_TOO, *_ANY_CLASS}
    known = {key: value for key, value in config.items() if key in read}
    has = {"rope_theta": theirs.default_theta, **fields, **known}
    ffn = "intermediate_size" if family == "llama" else "intermediate_size_mlp"
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", ffn)
    refused = [f"{key}: missing" for key in needed if key not in config]
    refused += [
        f"{key}={shown(has[key])}: only {only!r} is supported"
        for key, only in {**_ONLY, **_ANY_CLASS}.items()
        if key in has and (has[key] != only or isinstance(has[key], bool) != isinstance(only, bool))
    ]
    if (named := has.get("architectures")) and named != [_CLASS[family]]:
        refused.append(f"architectures={shown(named)}: model_type={family} means {_CLASS[family]}")
    wrong, ignored, model = _wrong_types(theirs, known), sorted(config.keys() - read), None
    if not wrong:
        # transformers 5 writes one mapping, earlier ones rope_theta beside rope_scaling.
        rope = "rope_scaling" if has.get("rope_scaling") else "rope_parameters"
        has["rope_theta"], has[rope] = _rope_from_hf(has, rope, refused, ignored)
        divided = family == "llama" or has["head_dim"] is None
        if has["head_dim"] is None:
            has["head_dim"] = has["hidden_size"] // (has["num_attention_heads"] or 1)
        if has["num_key_value_heads"] is None:
            has["num_key_value_heads"] = has["num_attention_heads"]
        keys = {**_FIELDS, ffn: "ffn_hidden_size", "rope_theta": "rotary_base", rope: "rope_scaling"}
        shape = {ours: has[key] for key, ours in keys.items()} | {"qk_norm": has.get("use_qk_norm", False)}
        names = {ours: key for key, ours in keys.items()}
        try:
            model = TypeAdapter(ModelConfig).validate_json(json.dumps(shape), strict=True)
            refused += _shape_refusals(model, divided)
            refused += _layer_refusals(has)
            for key in (key for key in SPECIAL if key in config):
                ids = config[key] if isinstance(config[key], list) else [config[key]]
                if any((number or 0) >= model.vocab_size for number in ids):
                    refused.append(f"{key}={shown(config[key])}: no token of vocab_size={model.vocab_size}")
        except ValidationError as error:
            for e in error.errors():
                key = ".".join(names.get(str(part), str(part)) for part in e["loc"])
                given = functools.reduce(lambda at, part: at[part], e["loc"], cast(Any, shape))
                wrong.append(f"{key}={shown(given)}: {e.get('ctx', {}).get('message', e['msg'])}")
    if (mistakes := refused + wrong) or model is None:
        raise ValueError("GPTModel cannot represent this model:\n  " + some(mistakes, "\n  ", 40))
    special = {key: has[key] for key in SPECIAL}
    return HfModel(cast(Family, family), model, has["max_position_embeddings"], special, ignored)


def _wrong_types(theirs: Any, config: dict[str, Any]) -> list[str]:
    """Messages about values that the class does not take. `theirs`: a configuration of it, to try them."""
    out = []
    for key, value in config.items():
        try:
            copy = parse_json(json.dumps(value, allow_nan=False), key)
            if key in type(theirs).__dataclass_fields__:
                setattr(theirs, key, copy)
        # The validators raise several classes.
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            out.append(f"{key}={shown(value)}: {why:.200}")
    return out


def _shape_refusals(model: ModelConfig, divided: bool) -> list[str]:
    """Messages about sizes that do not go together. `divided`: the heads share the hidden size."""
    heads, groups, scaling = model.num_attention_heads, model.num_query_groups, model.rope_scaling
    out = []
    if heads % groups:
        out.append(f"num_key_value_heads={groups}: does not divide num_attention_heads={heads}")
    if divided and model.hidden_size % heads:
        out.append(f"hidden_size={model.hidden_size}: no multiple of num_attention_heads={heads}")
    elif model.head_dim % 2:
        out.append(f"head_dim={model.head_dim}: must be even, because rotary embedding turns pairs")
    if scaling and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        out.append(f"0 < low_freq_factor < high_freq_factor does not hold for {low}, {high}")
    return out


def _layer_refusals(has: dict[str, Any]) -> list[str]:
    """Messages about layers without rotary embedding, with experts, or that see less than the context."""
    layers, context = has["num_hidden_layers"], has["max_position_embeddings"]
    given, out = has.get("layer_types"), list[str]()
    kinds = given if isinstance(given, list) else [] if given is None else [given]
    if not 0 < context < 1 << 63:
        out.append(f"max_position_embeddings={shown(context)}: must be positive, and have at most 63 bits")
    others = [kind for kind in kinds if kind not in ("full_attention", "chunked_attention")]
    out += dict.fromkeys(f"layer_types: {shown(kind)} is not supported" for kind in others)
    if given is not None and len(kinds) != layers:
        out.append(f"layer_types={shown(given)}: must be {layers} names, as num_hidden_layers says")
    limits = {"sliding_window": True, "attention_chunk_size": given is None or "chunked_attention" in kinds}
    for key in (key for key, counts in limits.items() if counts and has.get(key) is not None):
        if not isinstance(has[key], int) or has[key] < context:
            out.append(f"{key}={shown(has[key])}: shorter than max_position_embeddings={shown(context)}")
    if has["model_type"] != "llama4_text":
        return out
    rotary, interval = has["no_rope_layers"], has["no_rope_layer_interval"]
    # Without a list, every `interval`-th layer has none.
    if not interval or ((len(rotary) != layers or not all(rotary)) if rotary else interval <= layers):
        given = f"no_rope_layers={shown(rotary)}, no_rope_layer_interval={shown(interval)}"
        out.append(f"{given}: every layer must have rotary embedding")
    step, experts = has["interleave_moe_layer_step"], has["moe_layers"]
    # Without a list, every `step`-th layer has experts.
    if experts or (experts is None and step <= layers):
        given = f"moe_layers={shown(experts)}, interleave_moe_layer_step={shown(step)}"
        out.append(f"{given}: no layer may have experts")
    return out


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    original = ["original_max_position_embeddings"] if scaling.rope_type == "llama3" else []
    return {key: getattr(scaling, key) for key in ("rope_type", *_ROPE_NEEDS[scaling.rope_type], *original)}


def _rope_from_hf(
    has: dict[str, Any], field: str, refused: list[str], ignored: list[str]
) -> tuple[Any, dict[str, Any] | None]:
    """Base and scaling, not yet checked. Adds to `refused` a message for each value that cannot be
    represented, and to `ignored` the keys that this kind of scaling does not read."""
    rope = has.get(field) or {}
    if not isinstance(rope, dict):
        refused.append(f"{field}={shown(rope)}: must be a mapping")
        return 1, None
    theta = rope.get("rope_theta", has["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor", has.get("partial_rotary_factor"))
    if share not in (None, 1):
        refused.append(f"{field}.partial_rotary_factor={shown(share)}: the whole head is turned")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    one = "one rotary embedding serves all layers"
    refused += [f"{field}.{shown(key)[1:-1]}={shown(rope[key])}: {one}" for key in nested]
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        refused.append(f"{field}.rope_type={shown(kind)}: only {', '.join(_ROPE_NEEDS)} are supported")
        return theta, None
    missing = [key for key in _ROPE_NEEDS[kind] if key not in rope]
    refused += [f"{field}.{key}: missing, and rope_type={kind} needs it" for key in missing]
    scaling = {key: rope[key] for key in _ROPE_NEEDS[kind] if key in rope}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", has["max_position_embeddings"])
        scaling["original_max_position_embeddings"] = has.get("original_max_position_embeddings", original)
    ignored += [f"{field}.{key}" for key in rope if key not in {*scaling, *_ROPE_KEYS, *nested}]
    return theta, None if kind == "default" or missing else {"rope_type": kind, **scaling}
