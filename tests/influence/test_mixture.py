"""Eqs. 4 and 5 by hand, their bounds and scales, and the file that the trainer merges."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1 import config_io
from megatron_r1.config import Config, DataConfig, MixConfig, PhaseConfig, SourceConfig, TrainConfig
from megatron_r1.influence.mixture import (
    checkpoint_weights,
    densities,
    make_mixture,
    source_weights,
    table,
    write,
)
from megatron_r1.influence.store import ScoreStore, directory_of
from megatron_r1.records import ScoreTable
from tests import launch
from tests.influence import tiny

MIX = MixConfig(phase="two")


def scores_of(source: str, length_N: list[int], score_NCK: Any) -> ScoreTable:
    score = np.array(score_NCK, dtype=np.float32)
    names = tuple("xyz"[: score.shape[1]])
    steps = tuple(10 * (k + 1) for k in range(score.shape[2]))
    return ScoreTable(source, names, steps, np.arange(len(length_N)), np.array(length_N), score)


def test_checkpoint_weights_follow_the_step() -> None:
    alpha = checkpoint_weights(MIX, ("x", "y"), (10, 30))
    np.testing.assert_allclose(alpha, [[0.125, 0.375], [0.125, 0.375]])
    uniform = dataclasses.replace(MIX, checkpoint_weight="uniform", capability_weight={"y": 2})
    np.testing.assert_allclose(checkpoint_weights(uniform, ("x", "y"), (10, 30)), [[0, 0], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"capability_weight: \['q'\] not scored; scored are \['x', 'y'\]"):
        checkpoint_weights(dataclasses.replace(MIX, capability_weight={"q": 1}), ("x", "y"), (1,))


def test_density_is_a_mean_over_tokens() -> None:
    """Eq. 5 by hand: (1 x 10 + 4 x 30) / 40."""
    found = densities([scores_of("a", [10, 30], [[[1.0]], [[4.0]]])], MIX)
    np.testing.assert_allclose(found, [[[130 / 40]]])


def test_zscore_centres_and_scales_each_capability() -> None:
    a = scores_of("a", [1, 1], [[[1.0], [100.0]], [[3.0], [300.0]]])
    b = scores_of("b", [2], [[[0.0], [0.0]]])
    found = densities([a, b], dataclasses.replace(MIX, scale="zscore"))[:, :, 0]
    # Over tokens: values 1, 3, 0, 0; mean 1, variance (0 + 4 + 1 + 1) / 4.
    np.testing.assert_allclose(found[:, 0], np.array([1, -1]) / np.sqrt(1.5))
    np.testing.assert_allclose(found[:, 1], found[:, 0])


def test_weights_are_shares_of_positive_density() -> None:
    found = source_weights({"a": 3.0, "b": -5.0, "c": 1.0})
    assert found.by_source == {"a": 0.75, "b": 0.0, "c": 0.25}


def test_floor_and_cap_by_hand() -> None:
    rho = {"a": 6.0, "b": 3.0, "c": 1.0, "d": -1.0}
    # a held at .5; d at the floor .05; b and c share .45 as 3 to 1.
    found = source_weights(rho, floor=0.05, cap=0.5).by_source
    np.testing.assert_allclose(list(found.values()), [0.5, 0.3375, 0.1125, 0.05])
    # The only sources that help are at the cap: the rest is shared equally.
    found = source_weights({"a": 1.0, "b": -1.0, "c": -2.0}, cap=0.4).by_source
    np.testing.assert_allclose(list(found.values()), [0.4, 0.3, 0.3])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=12).filter(lambda r: max(r) > 1e-6),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_weights_stay_within_their_bounds(rho: list[float], low: float, high: float) -> None:
    n = len(rho)
    floor, cap = low / n, 1 / n + high * (1 - 1 / n)
    found = np.array(
        list(source_weights({str(g): r for g, r in enumerate(rho)}, floor, cap).by_source.values())
    )
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert (found >= floor - 1e-9).all() and (found <= cap + 1e-9).all()
    gain = np.maximum(rho, 0)
    free = (found > floor + 1e-9) & (found < cap - 1e-9) & (gain > 1e-12 * gain.sum())
    ratio = found[free] / gain[free]
    assert ratio.size == 0 or np.allclose(ratio, ratio[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("rho", "floor", "cap", "message"),
    [
        ({"a": -1.0, "b": 0.0}, 0.0, 1.0, "no source has positive influence"),
        ({"a": float("nan"), "b": 1.0}, 0.0, 1.0, r"influence of \['a'\] is not finite"),
        ({"a": 1.0, "b": 1.0}, 0.6, 1.0, "fit no weights of 2 sources"),
        ({"a": 1.0, "b": 1.0}, 0.0, 0.4, "fit no weights of 2 sources"),
    ],
)
def test_what_gives_no_weights_is_one_error(
    rho: dict[str, float], floor: float, cap: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        source_weights(rho, floor, cap)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run with scores of two sources, made by hand: rho 3 and 1 at step 10, -1 and 1 at step 30."""
    for name in "ab":
        launch.write_corpus(tmp_path / name, 40, seed=1)
    config = Config(
        model=tiny.MODEL,
        data=DataConfig({name: SourceConfig(f"{tmp_path}/{name}") for name in "ab"}, seq_length=16),
        train=TrainConfig(run=f"{tmp_path}/run", global_batch=4, micro_batch=2),
        phases={"one": PhaseConfig(steps=5), "two": PhaseConfig(steps=10)},
        mix=MIX,
    )
    for position, (name, values) in enumerate({"a": (3.0, -1.0), "b": (1.0, 1.0)}.items()):
        for step, value in zip((10, 30), values, strict=True):
            score(config, name, position, step, value)
    return config


def score(config: Config, source: str, position: int, step: int, value: float) -> None:
    inputs = {
        "format": 1, "step": step, "source": source, "position": position,
        "capabilities": ["x", "y"], "weights": f"w{step}", "data": {"hash": "d"},
    }  # fmt: skip
    store = ScoreStore(
        directory_of(Path(config.train.run), step, source), inputs, np.arange(3), np.full(3, 16)
    )
    # Capability x has twice the value, y none: their mean is the value.
    store.write(0, np.array([[2 * value, 0.0]] * 3), np.ones(3))


def test_a_mixture_from_scores_on_disk(config: Config) -> None:
    mixture, used = make_mixture(config)
    # a: (3 x 10 - 1 x 30) / 40 = 0, b: 1.
    assert mixture.rho_G.tolist() == [0.0, 1.0]
    assert mixture.weights.by_source == {"a": 0.0, "b": 1.0}
    assert mixture.epochs["a"] == 0 and mixture.epochs["b"] > 0
    assert [(s.step, s.manifest["source"]) for s in used] == [(10, "a"), (30, "a"), (10, "b"), (30, "b")]
    assert mixture.rho_GC.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    uniform = dataclasses.replace(config, mix=dataclasses.replace(MIX, checkpoint_weight="uniform"))
    assert make_mixture(uniform)[0].weights.by_source == {"a": 0.5, "b": 0.5}


def test_the_trainer_reads_what_is_written(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, mix=dataclasses.replace(MIX, checkpoint_weight="uniform", floor=0.1))
    mixture, used = make_mixture(config)
    assert config.mix is not None
    (tmp_path / "config.yaml").write_text(config_io.dump(config))
    write(mixture, used, config.mix, tmp_path / "mix.yaml")
    merged = config_io.load([f"{tmp_path}/config.yaml", f"{tmp_path}/mix.yaml"])
    assert merged.phase_weights("two") == pytest.approx(mixture.weights.by_source)
    assert merged.phase_weights("one") == config.phase_weights("one")
    behind = json.loads((tmp_path / "mix.json").read_text())
    assert behind["sources"]["b"]["rho_by_capability"] == {"x": 1.0, "y": 0.0}
    assert behind["scores"].keys() == {
        "step_00000010/a",
        "step_00000010/b",
        "step_00000030/a",
        "step_00000030/b",
    }
    text = table(mixture)
    assert text.splitlines()[2].split()[:2] == ["a", "50.0%"] and "two" in text.splitlines()[0]
    first = (tmp_path / "mix.yaml").read_bytes(), (tmp_path / "mix.json").read_bytes()
    write(*make_mixture(config), config.mix, tmp_path / "mix.yaml")
    assert first == ((tmp_path / "mix.yaml").read_bytes(), (tmp_path / "mix.json").read_bytes())


def run_tool(config: Config, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "config.yaml").write_text(config_io.dump(config))
    command = [sys.executable, "tools/make_mix.py", f"{tmp_path}/config.yaml", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=launch.ROOT, timeout=60, check=False)


def test_the_tool_prints_and_writes(config: Config, tmp_path: Path) -> None:
    done = run_tool(config, tmp_path, "--output", f"{tmp_path}/out/mix.yaml", "mix.checkpoint_weight=uniform")
    assert done.returncode == 0, done.stderr
    assert "weight  epochs" in done.stdout and "wrote" in done.stdout
    tree = yaml.safe_load((tmp_path / "out/mix.yaml").read_text())
    assert tree == {"phases": {"two": {"weights": {"a": 0.5, "b": 0.5}}}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mix.phase=three"], "error: mix.phase=three: no such phase; phases has ['one', 'two']"),
        (["mix.capability_weight={y: 1}"], "error: no source has positive influence"),
        (["train.run=elsewhere"], "error: elsewhere: no complete influence scores; score them with"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    config: Config, tmp_path: Path, words: list[str], message: str
) -> None:
    done = run_tool(config, tmp_path, "--output", f"{tmp_path}/mix.yaml", *words)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("mix.*"))


def test_scores_that_are_missing_or_not_finite_are_refused(config: Config) -> None:
    more = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources={**config.data.sources, "c": SourceConfig("c")})
    )
    with pytest.raises(ValueError, match="no complete influence scores of c"):
        make_mixture(more)
    score(config, "a", 0, 40, 1.0)
    assert make_mixture(config)[0].steps == (10, 30), "b has no scores at step 40"
    score(config, "b", 0, 40, float("nan"))
    with pytest.raises(ValueError, match="scores of b are not finite"):
        make_mixture(config)
