"""A mixture from several runs: each capability's scores are of its own (Eq. 3 with a model per domain)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.config import Config, DataConfig, MixConfig, PhaseConfig, SourceConfig, TrainConfig
from megatron_r1.mixture.files import write
from megatron_r1.mixture.mixture import make_mixture
from tests import launch
from tests.influence import tiny
from tests.mixture.mixture_scores import write_scores

STEPS = (10, 30)
OWN = {"x": {"a": 1.0, "b": 4.0}, "y": {"a": 3.0, "b": 0.0}}
"""Score of each source's examples, by the capability's own run."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Runs x and y, of which y was scored for x, too, with other scores."""
    for name in "ab":
        launch.write_corpus(tmp_path / name, 40, seed=1)
    for source in "ab":
        score(tmp_path / "x", source, {"x": OWN["x"][source]})
        score(tmp_path / "y", source, {"x": -100.0, "y": OWN["y"][source]})
    return Config(
        model=tiny.MODEL,
        data=DataConfig({name: SourceConfig(f"{tmp_path}/{name}") for name in "ab"}, seq_length=16),
        train=TrainConfig(run=f"{tmp_path}/run", global_batch=4, micro_batch=2),
        phases={"one": PhaseConfig(steps=5), "two": PhaseConfig(steps=10)},
        mix=MixConfig("two", runs={"y": f"{tmp_path}/y", "x": f"{tmp_path}/x"}),
    )


def score(
    run: Path, source: str, values: dict[str, float], steps: tuple[int, ...] = STEPS, **other: Any
) -> None:
    """Three examples of a source at each step, with the same score for a capability."""
    example_N = other.pop("example_N", np.arange(3))
    said = {"influence": {"curvature": "adam"}, "data": {"hash": source}, "seq_length": 16, **other}
    for step in steps:
        write_scores(
            run, step, source, np.array([list(values.values())] * len(example_N)), example_N,
            np.full(len(example_N), 16), position="ab".index(source), capabilities=list(values), **said,
        )  # fmt: skip


def test_each_capability_is_its_own_runs(config: Config, tmp_path: Path) -> None:
    mixture, used = make_mixture(config)
    assert mixture.capabilities == ("y", "x") and mixture.steps == STEPS
    true_GC = [[OWN[c][source] for c in "yx"] for source in "ab"]
    np.testing.assert_allclose(mixture.rho_GC, true_GC)
    assert mixture.weights == pytest.approx({"a": 0.5, "b": 0.5})
    assert config.mix is not None
    write(mixture, used, config, tmp_path / "mix.yaml")
    behind = json.loads((tmp_path / "mix.json").read_text())["scores"]
    runs = [
        f"{tmp_path}/{run}/influence/step_000000{step}/{g}" for run in "yx" for g in "ab" for step in STEPS
    ]
    assert list(behind) == runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"example_N": np.array([0, 1, 7])}, "differ in examples;"),
        ({"steps": (10, 40)}, r"differ in steps \(\[10, 30\] and \[10, 40\]\);"),
        ({"influence": {"curvature": "identity"}}, "differ in influence;"),
        ({"data": {"hash": "new"}, "seq_length": 32}, "differ in data, seq_length;"),
        ({"values": {"z": 1.0}}, r"mix\.runs\.x: .* has scores for \['z'\] only"),
    ],
)
def test_runs_that_do_not_fit_are_refused(
    config: Config, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert config.mix is not None
    runs = {"y": f"{tmp_path}/y", "x": f"{tmp_path}/other"}
    for source in "ab":
        score(tmp_path / "other", source, **({"values": {"x": 1.0}} | change))
    with pytest.raises(ValueError, match=message):
        make_mixture(dataclasses.replace(config, mix=dataclasses.replace(config.mix, runs=runs)))


def test_a_run_without_scores_is_named(config: Config, tmp_path: Path) -> None:
    assert config.mix is not None
    mix = dataclasses.replace(config.mix, runs={**config.mix.runs, "z": f"{tmp_path}/z"})
    with pytest.raises(ValueError, match="/z: no complete influence scores"):
        make_mixture(dataclasses.replace(config, mix=mix))
