"""Every way into a checkpoint of others: convert, resume, begin with it, score it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config, DataConfig, InfluenceConfig, PhaseConfig, SourceConfig, TrainConfig
from megatron_r1.data.open import open_data
from megatron_r1.export import convert
from megatron_r1.influence.query import open_query, query_influence
from megatron_r1.influence.score import compute_influence
from megatron_r1.train.loop import train
from megatron_r1.train.resume import summary
from tests import launch
from tests.checkpoint.crafted import CRAFTED, Payload, copied, seal
from tests.influence import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with a checkpoint at step 2 and its projections."""
    root = tmp_path_factory.mktemp("doors")
    for name in ("a", "code"):
        launch.write_corpus(root / name, 16, seed=0)
    config = Config(
        model=tiny.MODEL,
        data=DataConfig(sources={"a": SourceConfig(f"{root}/a")}, seq_length=32),
        train=TrainConfig(run=f"{root}/run", global_batch=2, micro_batch=2, precision="fp32"),
        phases={"one": PhaseConfig(steps=2, learning_rate=1e-2)},
        influence=InfluenceConfig(
            directions={"code": f"{root}/code"}, examples=4, probe_examples=2, method="projected"
        ),
    )
    train(config)
    compute_influence(config)
    return config


def in_run(config: Config, root: Path, **more: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run=f"{root}/run", **more))


def run_copied(config: Config, root: Path, what: str, craft: str) -> Config:
    """A copy of the run, its scores too if they are asked, with a crafted checkpoint."""
    own = in_run(config, root)
    shutil.copytree(config.train.run, own.train.run)
    if what != "query":
        shutil.rmtree(f"{own.train.run}/influence")
    CRAFTED[craft](step := Path(own.train.run) / "checkpoints" / "step_00000002", Payload(root / "ran"))
    seal(step)
    return own


def longer(config: Config) -> Config:
    return dataclasses.replace(config, phases={"one": PhaseConfig(steps=4, learning_rate=1e-2)})


DOORS: dict[str, Callable[[Config, Path, Path], Any]] = {
    "convert": lambda config, step, root: convert.to_hf(step, root / "hf", 32),
    "convert --check": lambda config, step, root: convert.to_hf(step, root / "hf", 32, check=True),
    "resume": lambda config, step, root: train(longer(config)),
    "init_from": lambda config, step, root: train(longer(in_run(config, root / "new", init_from=str(step)))),
    "init_weights": lambda config, step, root: train(in_run(config, root / "new", init_weights=str(step))),
    "influence": lambda config, step, root: compute_influence(config),
    "query": lambda config, step, root: query_influence(open_query(config, root / "out"), root / "out"),
}


@pytest.mark.parametrize("craft", ["code in .metadata, and what it should be", "code in a small object"])
@pytest.mark.parametrize("door", DOORS)
def test_no_door_lets_a_crafted_checkpoint_in(door: str, craft: str, trained: Config, tmp_path: Path) -> None:
    config = run_copied(trained, tmp_path, door, craft)
    step = Path(config.train.run) / "checkpoints" / "step_00000002"
    with pytest.raises(ValueError) as error:
        DOORS[door](config, step, tmp_path)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "hf").exists()
    # A query of another checkpoint than was scored is told so before anything is read.
    assert "builtin" in str(error.value) or door == "query"


def test_check_verifies_before_it_reads(trained: Config, tmp_path: Path) -> None:
    """Not sealed anew: by its checksum alone."""
    path = tmp_path / "step_00000002"
    shutil.copytree(Path(trained.train.run) / "checkpoints" / path.name, path)
    CRAFTED["code in .metadata"](path, Payload(tmp_path / "ran"))
    for check in (True, False):
        with pytest.raises(ValueError, match=r"is damaged: \.metadata has \d+ bytes where \d+ were saved"):
            convert.to_hf(path, tmp_path / "hf", 32, check=check)
    assert not (tmp_path / "ran").exists()


def test_a_description_of_a_huge_model_is_not_laid_out(trained: Config, tmp_path: Path) -> None:
    path = Path(trained.train.run) / "checkpoints" / "step_00000002"
    model = dataclasses.asdict(trained.model) | {"hidden_size": 1 << 20, "ffn_hidden_size": 1 << 20}
    crafted = copied(path, tmp_path / path.name, lambda *_: None, tmp_path, model=model)
    with pytest.raises(ValueError, match=r"describes .* parameters, and its files have"):
        convert.to_hf(crafted, tmp_path / "hf", 32)


def test_a_folder_within_the_checkpoint_is_no_target(trained: Config) -> None:
    """It would be a file that the description does not list."""
    step = Path(trained.train.run) / "checkpoints" / "step_00000002"
    for target in (step / "hf", step / "new" / "hf"):
        with pytest.raises(ValueError, match=r"lies in the checkpoint .* name another folder"):
            convert.to_hf(step, target, 32, check=True)


def test_an_identity_pins_what_is_converted_and_begun_with(trained: Config, tmp_path: Path) -> None:
    step = Path(trained.train.run) / "checkpoints" / "step_00000002"
    right, wrong = checkpoint_files.identity(step), "0" * 64
    # An empty one is a variable that was not set, and a short one pins little.
    for other in ("", right[:12], f"{right} "):
        with pytest.raises(ValueError, match="is not the checkpoint that was expected"):
            convert.to_hf(step, tmp_path / "hf", 32, check=True, expect=other)
    assert convert.to_hf(step, tmp_path / "hf", 32, check=True, expect=right)
    with pytest.raises(ValueError, match="is not the checkpoint that was expected"):
        convert.to_hf(step, tmp_path / "hf", 32, check=True, expect=wrong)
    for field in ("init_from", "init_weights"):
        new = longer(in_run(trained, tmp_path / "new", **{field: str(step)}, expect=right))
        assert "begins with" in summary(new, open_data(new))
        new = longer(in_run(trained, tmp_path / "new", **{field: str(step)}, expect=wrong))
        for start in (lambda new=new: summary(new, open_data(new)), lambda new=new: train(new)):
            with pytest.raises(ValueError, match="is not the checkpoint that was expected"):
                start()
    assert not (tmp_path / "new").exists()
