"""What a checkpoint holds is what the trainer held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from megatron_r1 import checkpoint
from megatron_r1.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_r1.parallel import process_groups
from megatron_r1.records import Batch, TrainState
from megatron_r1.train.step import Shape, Training, build_training, train_step

# isort: split
from megatron.core.dist_checkpointing import load_plain_tensors

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig(**yaml.safe_load((ROOT / "examples/models/tiny.yaml").read_text())["model"])
CONFIG = Config(
    model=TINY,
    data=DataConfig(sources={}, seq_length=16),
    train=TrainConfig(run="unused", global_batch=2, micro_batch=2, precision="fp32"),
    phases={},
)


def trained() -> Training:
    """Two Adam steps, so that every moment is filled."""
    training = build_training(CONFIG)
    for group in training.optimizer.param_groups:
        group["lr"] = 1e-3
    for seed in range(2):
        window = torch.randint(0, TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
        batch = Batch(
            tokens_BS=window[:, :-1].contiguous(),
            labels_BS=window[:, 1:].contiguous(),
            loss_mask_BS=torch.ones(2, 16),
            position_BS=torch.arange(16).expand(2, 16).contiguous(),
            source_B=torch.zeros(2, dtype=torch.int64),
        )
        train_step(training, iter([batch]), 1, Shape(2, 16, 1))
    return training


def moments(training: Training) -> dict[str, torch.Tensor]:
    """exp_avg of every parameter, asked of the optimizer itself (one rank holds all of it)."""
    optimizer = training.optimizer.chained_optimizers[0]
    return {
        name: optimizer._get_main_param_and_optimizer_states(param)["exp_avg"].view(param.shape).clone()
        for name, param in training.gpt.named_parameters()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("checkpoints")
    with process_groups(ParallelConfig()):
        training = trained()
        buckets = training.model.buffers[0].buckets
        assert any(b.grad_data.numel() > b.numel_unpadded for b in buckets[:-1]), "no padding inside"
        checkpoint.save(
            directory, training.gpt, training.optimizer, TrainState(2, 4, 64), TINY, "phase", plan="{}"
        )
        return checkpoint.found(directory)[-1].path, moments(training)


def test_adam_moments_are_saved_at_their_parameters(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, held = saved
    with process_groups(ParallelConfig()):
        plain = load_plain_tensors(str(path))
    stored = {
        key.removeprefix("optimizer.state.exp_avg."): value
        for key, value in plain.items()
        if key.startswith("optimizer.state.exp_avg.")
    }
    final = torch.equal(stored["decoder.final_layernorm.weight"], held["decoder.final_layernorm.weight"])
    embedding = torch.equal(
        stored["embedding.word_embeddings.weight"], held["embedding.word_embeddings.weight"]
    )
    assert final and embedding
    # Layers are stacked in the file.
    key = "decoder.layers.mlp.linear_fc2.weight"
    ours = torch.stack([held[key.replace("layers.", f"layers.{n}.")] for n in range(TINY.num_layers)])
    assert torch.equal(stored[key], ours)


def test_loading_gives_every_moment_back(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, held = saved
    with process_groups(ParallelConfig()):
        fresh = build_training(CONFIG)
        state = checkpoint.load(path, fresh.gpt, fresh.optimizer, TINY)
        assert state == TrainState(2, 4, 64)
        loaded = moments(fresh)
    assert [name for name in held if not torch.equal(held[name], loaded[name])] == []


def test_a_short_file_is_refused_by_name(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "step_00000002"
    shutil.copytree(saved[0], copy)
    victim = max(copy.glob("*.distcp"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{victim.name} has \d+ bytes where \d+ were saved"):
        checkpoint.read_meta(copy)
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        checkpoint.read_meta(tmp_path)
