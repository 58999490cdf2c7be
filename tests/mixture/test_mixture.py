"""A mixture from scores on disk: what the tool prints, what the trainer merges, what is refused."""

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

from megatron_r1 import config_io
from megatron_r1.config import Config, DataConfig, MixConfig, PhaseConfig, SourceConfig, TrainConfig
from megatron_r1.mixture.files import table, write
from megatron_r1.mixture.mixture import make_mixture
from tests import launch
from tests.influence import tiny
from tests.mixture.mixture_scores import write_scores

MIX = MixConfig(phase="two")


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
    # Capability x has twice the value, y none: their mean is the value.
    write_scores(
        Path(config.train.run), step, source, np.array([[2 * value, 0.0]] * 3), np.arange(3), np.full(3, 16),
        position=position, capabilities=["x", "y"], data={"hash": "d"},
    )  # fmt: skip


def test_a_mixture_from_scores_on_disk(config: Config) -> None:
    mixture, used = make_mixture(config)
    # a: (3 x 10 - 1 x 30) / 40 = 0, b: 1.
    assert mixture.rho_G.tolist() == pytest.approx([0.0, 1.0])
    assert mixture.weights == pytest.approx({"a": 0.0, "b": 1.0})
    assert mixture.epochs["a"] == 0 and mixture.epochs["b"] > 0
    assert [(s.step, s.manifest["source"]) for s in used] == [(10, "a"), (30, "a"), (10, "b"), (30, "b")]
    assert mixture.rho_GC.ravel().tolist() == pytest.approx([0, 0, 2, 0])
    uniform = dataclasses.replace(config, mix=dataclasses.replace(MIX, checkpoint_weight="uniform"))
    assert make_mixture(uniform)[0].weights == pytest.approx({"a": 0.5, "b": 0.5})


def test_the_trainer_reads_what_is_written(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, mix=dataclasses.replace(MIX, checkpoint_weight="uniform", floor=0.1))
    mixture, used = make_mixture(config)
    assert config.mix is not None
    (tmp_path / "config.yaml").write_text(config_io.dump(config))
    write(mixture, used, config, tmp_path / "mix.yaml")
    merged = config_io.load([f"{tmp_path}/config.yaml", f"{tmp_path}/mix.yaml"])
    assert merged.phase_weights("two") == pytest.approx(mixture.weights)
    assert merged.phase_weights("one") == config.phase_weights("one")
    behind = json.loads((tmp_path / "mix.json").read_text())
    assert behind["sources"]["b"]["rho_by_capability"] == pytest.approx({"x": 2.0, "y": 0.0})
    assert behind["scores"].keys() == {
        "step_00000010/a",
        "step_00000010/b",
        "step_00000030/a",
        "step_00000030/b",
    }
    text = table(mixture)
    assert text.splitlines()[2].split()[:2] == ["a", "50.0%"] and "two" in text.splitlines()[0]
    first = (tmp_path / "mix.yaml").read_bytes(), (tmp_path / "mix.json").read_bytes()
    write(*make_mixture(config), config, tmp_path / "mix.yaml")
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
    with pytest.raises(ValueError, match=r"step_00000040/b/scores.npy: scores of b are not finite, first"):
        make_mixture(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "scores",
            float("-inf"),
            r"step_00000010/a/scores.npy: scores of a are not finite, first",
        ),
        ("tokens", 0, r"/a/tokens.npy: no numbers of tokens"),
        ("tokens", -5, r"/a/tokens.npy: no numbers of tokens"),
        ("norms", float("nan"), r"step_00000010/a/norms.npy: norms of a are not finite, first"),
        ("manifest", None, r"step_00000010/a/manifest.json: direction_norms are not all finite"),
    ],
)
def test_a_damaged_file_of_scores_is_named(config: Config, name: str, value: Any, message: str) -> None:
    for directory in Path(config.train.run).glob("influence/step_*/*"):
        np.save(directory / "norms.npy", np.ones(3, np.float32))
        manifest = json.loads((directory / "manifest.json").read_text())
        norms = {"x": 1.0} if name == "manifest" else {"x": 1.0, "y": 1.0}
        (directory / "manifest.json").write_text(json.dumps({**manifest, "direction_norms": norms}))
        if name != "manifest":
            array = np.load(directory / f"{name}.npy")
            np.save(directory / f"{name}.npy", np.full_like(array, value))
    scale = "raw" if name in ("scores", "tokens") else "cosine"
    with pytest.raises(ValueError, match=message) as caught:
        make_mixture(dataclasses.replace(config, mix=dataclasses.replace(MIX, scale=scale)))
    assert "\n" not in str(caught.value)


def test_summed_losses_give_the_same_mixture_and_cosines_need_norms(config: Config, tmp_path: Path) -> None:
    """Of examples of 4 and 12 labels, scored by mean or summed loss; norms 2 and 3, directions of norm 5."""
    mean_NC, length_N = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([4, 12])
    found = {}
    for loss, factor_N in (("mean", np.ones(2)), ("sum", length_N)):
        run = tmp_path / loss
        for position, name in enumerate("ab"):
            write_scores(
                run, 10, name, mean_NC * factor_N[:, None] * (1 + position), np.arange(2), length_N,
                norm_N=np.array([2.0, 3.0]) * factor_N if loss == "mean" or name == "a" else None,
                position=position, capabilities=["x", "y"], data={"hash": "d"},
                influence={"loss": loss}, direction_norms={"x": 5.0, "y": 5.0},
            )  # fmt: skip
        at = dataclasses.replace(config, train=dataclasses.replace(config.train, run=str(run)))
        found[loss] = make_mixture(at)[0].rho_GC
        cosine = dataclasses.replace(at, mix=dataclasses.replace(MIX, scale="cosine"))
        if loss == "mean":
            expected = (4 * mean_NC[0] / 10 + 12 * mean_NC[1] / 15) / 16
            np.testing.assert_allclose(make_mixture(cosine)[0].rho_GC[0], expected)
        else:
            with pytest.raises(
                ValueError, match=r"cosine needs gradient norms, which .*influence.norms=true"
            ):
                make_mixture(cosine)
    np.testing.assert_allclose(found["sum"], found["mean"], rtol=1e-6)
    np.testing.assert_allclose(found["mean"][0], (4 * mean_NC[0] + 12 * mean_NC[1]) / 16)
