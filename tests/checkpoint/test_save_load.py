"""What a checkpoint holds is what the trainer held."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint import save
from megatron_r1.checkpoint.files import Retention
from megatron_r1.checkpoint.load import contents_of, load_checkpoint
from megatron_r1.checkpoint.save import Saver, save_checkpoint
from megatron_r1.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_r1.parallel import process_groups
from megatron_r1.records import Batch, TrainState
from megatron_r1.train.step import Shape, Training, build_training, train_step
from tests import launch
from tests.checkpoint.crafted import archive, copied, replaced
from tests.distributed import RankFailedError, on_ranks
from tests.influence import tiny

# isort: split
from megatron.core.dist_checkpointing import load_plain_tensors

ROOT = Path(__file__).resolve().parent.parent.parent
# Heads that two tensor-parallel ranks can share.
TINY = dataclasses.replace(
    ModelConfig(**yaml.safe_load((ROOT / "examples/models/tiny.yaml").read_text())["model"]),
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=48,
)
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
        buckets = training.chunks[0].buffers[0].buckets
        assert any(b.grad_data.numel() > b.numel_unpadded for b in buckets[:-1]), "no padding inside"
        save_checkpoint(
            directory, training.gpt, training.optimizer, TrainState(2, 4, 64), TINY, "phase", plan="{}"
        )
        return checkpoint_files.complete_checkpoints(directory)[-1].path, moments(training)


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
        state = load_checkpoint(path, fresh.gpt, fresh.optimizer, TINY)
        assert state == TrainState(2, 4, 64)
        loaded = moments(fresh)
    assert [name for name in held if not torch.equal(held[name], loaded[name])] == []


LAYOUTS = {
    "data": ParallelConfig(),
    "tensor and sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
    "context": ParallelConfig(context=2),
}


def _saved_again(path: Path, directory: Path, layout: ParallelConfig) -> None:
    with process_groups(layout):
        training = build_training(dataclasses.replace(CONFIG, parallel=layout))
        state = load_checkpoint(path, training.gpt, training.optimizer, TINY)
        save_checkpoint(directory, training.gpt, training.optimizer, state, TINY, "phase", plan="{}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_loads_and_saves_the_same_tensors(
    name: str, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    on_ranks(2, _saved_again, saved[0], tmp_path, LAYOUTS[name])
    launch.assert_same_tensors(tmp_path / saved[0].name, saved[0])


def test_training_on_while_it_is_written_changes_nothing(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, trained_on = save._write, threading.Event()
    monkeypatch.setattr(save, "_write", lambda flight: (trained_on.wait(), write(flight)))
    with process_groups(ParallelConfig()):
        training = build_training(CONFIG)
        state = load_checkpoint(saved[0], training.gpt, training.optimizer, TINY)
        saver = Saver(tmp_path)
        saver.save(training.gpt, training.optimizer, state, TINY, "phase", plan="{}")
        state.step += 1
        with torch.no_grad():
            for buffer in training.chunks[0].buffers:
                buffer.param_data.zero_()
            for moments in training.optimizer.chained_optimizers[0].optimizer.state.values():
                moments["exp_avg"].zero_()
        saver.poll(writing=1)
        assert checkpoint_files.complete_checkpoints(tmp_path) == []
        trained_on.set()
        saver.wait()
    assert [ref.step for ref in checkpoint_files.complete_checkpoints(tmp_path)] == [2]
    launch.assert_same_tensors(tmp_path / saved[0].name, saved[0])


def test_damage_to_any_file_is_found_and_named(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """One bit, the end, all of it: of each file in turn."""
    copy = tmp_path / saved[0].name
    shutil.copytree(saved[0], copy)
    harms: dict[str, Callable[[bytes], bytes | None]] = {
        r"is not as it was written": lambda data: _flipped(data, len(data) // 2),
        r"(has \d+ bytes where \d+ were saved|is not as it was written)": lambda data: data[:-2],
        r"is (missing|no complete checkpoint)": lambda data: None,
    }
    assert {p.suffix for p in copy.iterdir()} >= {".distcp", ".json"} and len(list(copy.iterdir())) >= 4
    with process_groups(ParallelConfig()):
        for file in sorted(copy.iterdir()):
            whole = file.read_bytes()
            for message, harm in harms.items():
                damaged = harm(whole)
                file.unlink() if damaged is None else file.write_bytes(damaged)
                with pytest.raises(ValueError, match=f"{file.name} ?{message}|{message} .{file.name}"):
                    load_checkpoint(copy, None, None, TINY)
            file.write_bytes(whole)


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "no settings": lambda common: common.clear(),
    "no groups": lambda common: common["optimizer"]["optimizer"].clear(),
    "groups in words": lambda common: common["optimizer"]["optimizer"].update(param_groups="x"),
    "empty groups": lambda common: common["optimizer"]["optimizer"].update(param_groups=[]),
    "groups of lists": lambda common: common["optimizer"]["optimizer"].update(param_groups=[[1], [2]]),
    "another optimizer": lambda common: common["optimizer"].update(param_state_sharding_type=7),
    **{
        f"{key} {value}": lambda common, key=key, value=value: common["optimizer"]["optimizer"][
            "param_groups"
        ][0].update({key: value})
        for key, value in [
            *(("betas", "x"), ("betas", ("a", "b")), ("betas", (0.9,)), ("step", "3"), ("step", [3])),
            *(
                ("wd_mult", 7.0),
                ("wd_mult", {}),
                ("eps", True),
                ("lr", "0"),
                ("step", 1 << 2000),
                ("lr", float("nan")),
            ),
        ]
    },
}


def test_settings_of_another_kind_are_refused(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    with process_groups(ParallelConfig()):
        fresh = build_training(CONFIG)
        for number, (name, change) in enumerate(SETTINGS.items()):

            def craft(path: Path, payload: Any, change: Callable[[Any], Any] = change) -> None:
                common = contents_of(path).common
                change(common)
                if (path / "common.pt").exists():
                    torch.save(common, path / "common.pt")
                else:  # as megatron-core 0.19 keeps them
                    replaced("common_state", lambda _: archive([common]))(path, payload)

            path = copied(saved[0], tmp_path / str(number), craft, tmp_path)
            with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as error:
                load_checkpoint(path, fresh.gpt, fresh.optimizer, TINY)
                pytest.fail(f"{name} was loaded")
            assert len(str(error.value)) < 900, name
            shutil.rmtree(path)


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_no_altered_description_is_believed(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    copy = tmp_path / saved[0].name
    shutil.copytree(saved[0], copy)
    meta, file = checkpoint_files.read_meta(copy), copy / "megatron_r1.json"
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(_flipped(whole, place))
        try:
            assert checkpoint_files.read_meta(copy) == meta
        except ValueError as error:
            assert "megatron_r1.json is not as it was written" in str(error)


def _weights(directory: Path, step: int, retention: Retention | None = None) -> None:
    """Save weights that say their step."""
    gpt = tiny.build()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(step)
    saver = Saver(directory, retention)
    saver.save(gpt, None, TrainState(step), tiny.MODEL, "phase", plan="{}")
    saver.wait()


def _on_one_rank(body: Callable[..., None], *args: Any) -> None:
    with process_groups(ParallelConfig()):
        body(*args)


def test_surplus_goes_once_a_newer_one_is_complete(tmp_path: Path) -> None:
    with process_groups(ParallelConfig()):
        for step in range(1, 8):
            _weights(tmp_path, step, Retention(last=2, every=3, steps=frozenset({1})))
    assert [ref.step for ref in checkpoint_files.complete_checkpoints(tmp_path)] == [1, 3, 6, 7]


def _killed_at(directory: Path, call: str, number: int) -> None:
    """Save step 3 of a run that keeps one checkpoint; SIGKILL just before the `number`th `call` on a
    directory."""
    module, name = call.split(".")
    owner, left = getattr(checkpoint_files, module), [number]
    original = getattr(owner, name)

    def counted(*args: Any, **options: Any) -> Any:
        left[0] -= Path(args[0]).is_dir()
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, counted)  # this fork's own
    _on_one_rank(_weights, directory, 3, Retention(last=1))


@pytest.mark.parametrize(
    ("moment", "call", "number", "steps"),
    [
        ("before its name", "os.rename", 1, [2]),
        ("before the surplus loses its name", "os.rename", 2, [2, 3]),
        ("before the surplus is deleted", "shutil.rmtree", 1, [3]),
    ],
)
def test_a_kill_inside_a_save_leaves_whole_checkpoints(
    moment: str, call: str, number: int, steps: list[int], tmp_path: Path
) -> None:
    on_ranks(1, _on_one_rank, _weights, tmp_path, 2)
    with pytest.raises(RankFailedError, match="status -9"):
        on_ranks(1, _killed_at, tmp_path, call, number)
    assert [ref.step for ref in checkpoint_files.complete_checkpoints(tmp_path)] == steps
    with process_groups(ParallelConfig()):
        for ref in checkpoint_files.complete_checkpoints(tmp_path):
            gpt = tiny.build()
            load_checkpoint(ref.path, gpt, None, tiny.MODEL)
            assert all((p == ref.step).all() for p in gpt.parameters())
        _weights(tmp_path, 4, Retention(last=1))
    launch.wait_for(lambda: [p.name for p in tmp_path.iterdir()] == ["step_00000004"], "deletion")


def _without_room(directory: Path, limited_rank: int, reserve: int) -> str:
    """Save step 2, and step 3 where one rank's files may not grow beyond a MiB; the error."""
    limit = 1 << 20
    checkpoint_files._RESERVE = reserve  # this fork's own
    with process_groups(ParallelConfig()) as context:
        training = build_training(CONFIG)
        saver = Saver(directory)
        save = partial(saver.save, training.gpt, training.optimizer, model=TINY, phase="phase", plan="{}")
        save(state=TrainState(2))
        saver.wait()
        if context.rank == limited_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(state=TrainState(3))
            saver.wait()
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return ""


@pytest.mark.parametrize(
    ("limited_rank", "reserve"),
    [
        pytest.param(0, 8 << 20, id="before the first byte"),
        pytest.param(0, 4096, id="in the first rank"),
        pytest.param(1, 4096, id="in another rank"),
    ],
)
def test_a_full_disk_is_every_ranks_error_and_leaves_what_was_there(
    limited_rank: int, reserve: int, tmp_path: Path
) -> None:
    errors = on_ranks(2, _without_room, tmp_path, limited_rank, reserve)
    assert errors[0] == errors[1]
    assert "step_00000003 could not be saved" in errors[0] and "File too large" in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002"]
    meta = checkpoint_files.read_meta(tmp_path / "step_00000002")
    assert checkpoint_files.corruptions(tmp_path / "step_00000002", meta["files"]) == []
