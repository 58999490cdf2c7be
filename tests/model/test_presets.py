"""The presets have the exact sizes of the paper's Table 3, counted on the real GPTModel."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_r1 import backend
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = {"tiny": 2_655_936, "140m": 140_248_512, "360m": 359_431_168, "950m": 949_685_760}


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_the_exact_parameter_count(name: str) -> None:
    text = (ROOT / f"examples/models/{name}.yaml").read_text()
    model = ModelConfig(**yaml.safe_load(text)["model"])
    assert model.parameters() == SIZES[name]
    # Fake tensors: megatron-core builds every module, no weight takes memory.
    with process_groups(ParallelConfig()), FakeTensorMode(allow_non_fake_inputs=True):
        backend.seed_model_parallel(1)
        gpt = build_model(model, ParallelConfig(), "bf16", seq_length=2048)
        assert sum(p.numel() for p in gpt.parameters()) == SIZES[name]
    assert text.startswith(f"# {SIZES[name]:,} parameters")
