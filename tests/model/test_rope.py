"""Scaled rotary frequencies are those of transformers, whose checkpoints they must serve."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_r1 import config_io
from megatron_r1.config import ModelConfig, ParallelConfig, RopeScaling
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from tests.launch import TINY_MODEL

LLAMA_3_1 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
SHAPE = ModelConfig(1, 64, 96, 1, 1, 128, head_dim=64, rotary_base=5e5)


@pytest.mark.parametrize(
    "scaling",
    [LLAMA_3_1, RopeScaling("llama3", 32.0, 0.5, 7.0, 2048), RopeScaling("linear", 4.0)],
    ids=["llama 3.1", "other constants", "linear"],
)
def test_a_model_turns_at_the_frequencies_of_transformers(scaling: RopeScaling) -> None:
    rope = {**dataclasses.asdict(scaling), "rope_theta": SHAPE.rotary_base}
    theirs, _ = ROPE_INIT_FUNCTIONS[scaling.rope_type](LlamaConfig(head_dim=64, rope_parameters=rope))
    with process_groups(ParallelConfig()):
        model = dataclasses.replace(SHAPE, rope_scaling=scaling)
        gpt = build_model(model, ParallelConfig(), "fp32", seq_length=8, initialise=False)
    torch.testing.assert_close(gpt.rotary_pos_emb.inv_freq.cpu(), theirs, rtol=1e-6, atol=0)


def test_a_configuration_says_what_is_wrong_with_its_scaling() -> None:
    wrong = "model.rope_scaling={rope_type: llama3, factor: 0.5, low_freq_factor: 4, orignal: 8}"
    with pytest.raises(config_io.ConfigError) as error:
        config_io.load([*TINY_MODEL, wrong])
    assert "model.rope_scaling.orignal: unknown key; known: rope_type, factor," in str(error.value)
    with pytest.raises(config_io.ConfigError) as error:
        config_io.load(
            [*TINY_MODEL, wrong.replace("orignal", "original_max_position_embeddings").replace("8}", "0}")]
        )
    for mistake in (
        "factor=0.5 must be a finite number of at least 1",
        "low_freq_factor=4.0 is not below high_freq_factor=4.0",
        "original_max_position_embeddings=0 must",
    ):
        assert mistake in str(error.value)
