"""ModelConfig -> megatron-core GPTModel of the MobileLLM-R1 form (paper, Table 3)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.config import ModelConfig, ParallelConfig, RopeScaling
from megatron_r1.model.attention import RMSNorm, SdpaAttention
from megatron_r1.model.vocabulary import VocabularyGpt

# isort: split
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: str, fused: bool, recompute: str = "none"
) -> TransformerConfig:
    """megatron-core's configuration of this shape; `fused` where Transformer Engine's layers are used."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_l2_norm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        # Interleaved, megatron-core sends one by one; in batches it would be silently wrong on gloo.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # The same weights from the same seed whatever the layout and the device.
        use_cpu_initialization=True,
        # Loss and gradients are sums over tokens, divided once by the global count.
        calculate_per_token_loss=True,
        bias_activation_fusion=fused,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=fused,
        recompute_granularity=None if recompute == "none" else recompute,  # type: ignore[arg-type]
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        # Attention keeps nothing of size S^2; the feed-forward keeps most of what a layer does.
        recompute_modules=["mlp"] if recompute == "selective" else None,
    )


def _layer_spec(config: TransformerConfig, fused: bool, chunk: int | None) -> Any:
    if fused:
        return get_gpt_layer_with_transformer_engine_spec(qk_l2_norm=config.qk_l2_norm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_l2_norm=config.qk_l2_norm)
    layer = spec.submodules
    layer.self_attention.submodules.core_attention = SdpaAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
    seq_length: int,
    plain_layers: bool = False,
    initialise: bool = True,
    recompute: str = "none",
    chunk: int | None = None,
) -> VocabularyGpt:
    """This rank's part of the model on its device, initialised from the current seeds.

    Needs megatron-core's process groups and seeded generators. `plain_layers`: megatron-core's own
    layers even where Transformer Engine is installed; checkpoints of the one load into the other.
    `initialise` False: memory without values, and no kernels of Triton, for a caller that fills every
    weight and trains none. `recompute`: see TrainConfig. `chunk`: which of the rank's parts, where the
    pipeline is interleaved. Every rank calls this.
    """
    fused = backend.has_transformer_engine() and not plain_layers
    config = transformer_config(model, parallel, precision, fused, recompute)
    config.perform_initialization = initialise
    interleaved = parallel.virtual_pipeline > 1
    gpt = VocabularyGpt(
        config,
        _layer_spec(config, fused, chunk),
        vocab_size=model.vocab_size,
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=not interleaved, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=not interleaved, vp_stage=chunk),
        position_embedding_type="rope",
        rotary_base=model.rotary_base,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=True,
        vp_stage=chunk,
    )
    if model.rope_scaling is not None:
        # megatron-core's own `rope_scaling` has Llama 3.1's other constants built in.
        rotary = gpt.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, model.rope_scaling)
    gpt = backend.place(gpt)
    # A part's making waits for other ranks' parts: none may wait for a trial of kernels in between.
    if initialise and chunk is None:
        use_kernels(gpt, plain_layers)
    return gpt


def use_kernels(gpt: VocabularyGpt, plain_layers: bool) -> None:
    """Kernels of Triton where there are any. Of an interleaved rank, call this once all parts are made."""
    if backend.has_triton():
        from megatron_r1.model import fused as kernels

        kernels.install(gpt, layers=plain_layers or not backend.has_transformer_engine())


class Chunks(torch.nn.ModuleList):
    """The parts of an interleaved pipeline rank as one module to save and to load."""

    def sharded_state_dict(self) -> dict[str, Any]:
        """megatron-core names each shard by its place in the whole model, so that any layout loads it."""
        parts = ((number, chunk.sharded_state_dict()) for number, chunk in enumerate(self))  # type: ignore[operator]
        return {f"{number}.{name}": shard for number, part in parts for name, shard in part.items()}


def scaled_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies [head_dim / 2], radians a token, slowed as `scaling` says.

    linear: f / factor. llama3: f (s + (1 - s) / factor), where s rises from 0 to 1 with the number of
    turns over the original context, L f / 2 pi, between low_freq_factor and high_freq_factor.
    """
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * inv_freq / scaling.factor + share * inv_freq
