"""Transformer Engine and Triton kernels, where they are: they compute what runs without; the log says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1 import backend
from tests.gpu import gpu

LAYERS = """
import sys
from pathlib import Path
import torch
from megatron_r1 import backend
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState

precision, folder = sys.argv[1], Path(sys.argv[2])
model, one_rank = ModelConfig(2, 128, 256, 4, 2, 512, head_dim=32), ParallelConfig()
token_BS = torch.randint(512, (2, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
position_BS = torch.arange(64, device="cuda").expand(2, 64)
backend.use_local_device(0, 1)
with process_groups(one_rank):
    backend.seed_model_parallel(1)
    outputs = {}
    for plain in (False, True):
        gpt = build_model(model, one_rank, precision, 64, plain_layers=plain)
        if plain:
            load_checkpoint(folder / "step_00000000", gpt, None, model)
        else:
            save_checkpoint(folder, gpt, None, TrainState(), model, "phase", plan="{}")
        logits = gpt(token_BS, position_BS, None).float()
        torch.logsumexp(logits, -1).sum().backward()
        embedding = gpt.embedding.word_embeddings.weight.grad.float()
        outputs[plain] = logits.detach(), embedding
for ours, theirs in zip(outputs[True], outputs[False], strict=True):
    print(float((ours - theirs).norm() / ours.norm()))
"""


@pytest.mark.skipif(not gpu.has("transformer_engine"), reason="needs a GPU and transformer_engine")
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("bf16", 3e-2)], ids=["fp32", "bf16"])
def test_transformer_engine_s_layers_compute_what_ours_do(
    precision: str, most: float, tmp_path: Path
) -> None:
    """Logits and gradients, from a checkpoint that the one wrote and the other read."""
    errors = [float(line) for line in gpu.python(LAYERS, precision, tmp_path).split()[-2:]]
    assert all(0 < error < most for error in errors), errors


KERNELS = """
import sys
import torch
from megatron_r1 import backend
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups

precision = sys.argv[1]
model, one_rank = ModelConfig(2, 576, 2048, 9, 3, 128256, head_dim=64), ParallelConfig()
token_BS = torch.randint(128256, (2, 257), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
position_BS = torch.arange(256, device="cuda").expand(2, 256)
backend.use_local_device(0, 1)
found = {}
with process_groups(one_rank):
    has_triton = backend.has_triton
    for kernels in (False, True):
        backend.has_triton = lambda: kernels and has_triton()
        backend.seed_model_parallel(1)
        gpt = build_model(model, one_rank, precision, 2048, plain_layers=True)
        loss_BS = gpt(token_BS[:, :-1], position_BS, None, labels=token_BS[:, 1:])
        loss_BS.sum().backward()
        found[kernels] = [loss_BS.detach(), *(p.grad for p in gpt.parameters())]
kinds = {type(module).__name__ for module in gpt.modules()}
pairs = [(ours.double(), plain.double()) for ours, plain in zip(found[True], found[False], strict=True)]
print({"FusedMlp", "FusedSelfAttention"} <= kinds and gpt.loss_kernels is not None)
print(*(float((ours - plain).norm() / plain.norm()) for ours, plain in pairs))
"""


@pytest.mark.skipif(not gpu.has("triton"), reason="needs a GPU and triton")
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("bf16", 3e-2)], ids=["fp32", "bf16"])
def test_kernels_compute_what_megatron_core_s_layers_do(precision: str, most: float) -> None:
    """Compiled, at the widths of a preset: loss and every gradient, and no kernel is left out."""
    used, errors = gpu.python(KERNELS, precision).splitlines()[-2:]
    assert used == "True"
    assert all(float(error) < most for error in errors.split()), errors


@pytest.mark.parametrize(
    ("there", "layers"),
    [
        ({"transformer_engine", "transformer_engine.pytorch"}, "Transformer Engine"),
        # Without its part for torch.
        ({"transformer_engine"}, "megatron-core with torch SDPA"),
    ],
    ids=["there", "half of it"],
)
def test_one_line_says_what_was_found(monkeypatch: pytest.MonkeyPatch, there: set[str], layers: str) -> None:
    monkeypatch.setattr(backend, "HAS_CUDA", True)
    monkeypatch.setattr(backend, "_importable", there.__contains__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    line = backend.describe()
    assert line.startswith("device a GPU |") and line.endswith(f"| layers {layers}")
    assert backend.describe(plain_layers=True).endswith("| layers megatron-core with torch SDPA")
    monkeypatch.setattr(backend, "HAS_CUDA", False)
    assert backend.describe().endswith("| layers megatron-core with torch SDPA")
