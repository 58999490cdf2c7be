"""Stored projections answer for a capability as scoring it with the others did, without the examples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.config import Config, ParallelConfig
from megatron_r1.influence import score as score_module
from megatron_r1.influence.query import open_query, query_influence
from megatron_r1.influence.score import compute_influence
from megatron_r1.influence.store import fingerprint, read_scores, write_parquet
from tests.distributed import RankFailedError, on_ranks
from tests.influence.test_score import changed, copied, tables


@pytest.fixture(scope="module")
def projected(trained: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Scored for code and math at both checkpoints, by projections, on one rank."""
    few = {"method": "projected", "projection": 3, "examples": 5}
    config = changed(copied(trained, tmp_path_factory.mktemp("projected")), influence=few)
    on_ranks(1, compute_influence, config)
    return config


def _asked(config: Config, output: Path, capabilities: list[str]) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("an example passed through the model")

    score_module.score_examples = refused  # type: ignore[assignment]  # this fork's own
    query_influence(open_query(config, output, capabilities), output)


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2)], ids=str)
def test_a_capability_that_was_scored_gets_the_same_scores(
    projected: Config, tmp_path: Path, parallel: ParallelConfig
) -> None:
    config = dataclasses.replace(projected, parallel=parallel)
    output = tmp_path / "math"
    on_ranks(parallel.tensor, _asked, config, output, ["math"])
    for found, scored in zip(read_scores(output), tables(projected), strict=True):
        assert (found.source, found.steps, found.capabilities) == (scored.source, (2, 4), ("math",))
        assert np.array_equal(found.example_N, scored.example_N)
        true = scored.score_NCK[:, 1:]
        np.testing.assert_allclose(found.score_NCK, true, rtol=1e-5, atol=1e-6 * np.abs(true).max())
    there = Path(projected.train.run) / "influence/step_00000002/a"
    manifest = json.loads((output / "influence/step_00000002/a/manifest.json").read_text())
    assert manifest["projections"] == fingerprint(there / "projections.npy")
    assert manifest["projected_in"] == str(there) and manifest["directions"].keys() == {"math"}
    assert not list(output.rglob(".directions"))
    assert write_parquet(output, tmp_path / "math.parquet") == 2 * sum(
        len(t.example_N) for t in tables(projected)
    )


def test_answers_once_and_refuses_what_does_not_fit(
    projected: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "code"
    one = changed(projected, influence={"steps": [4]})
    for _ in range(2):
        on_ranks(1, _asked, one, output, ["code"])
    assert f"{output}: asked before, steps [4]" in capfd.readouterr().out
    with pytest.raises(RankFailedError, match=r"code/influence/step_00000004/a holds scores of other inputs"):
        on_ranks(1, _asked, one, output, ["math"])
    new = tmp_path / "new"
    for wrong, message in (
        (changed(one, influence={"seed": 5}), r"holds scores of other inputs: influence\.seed"),
        (changed(one, influence={"method": "ghost"}), r"method=ghost stores no projections"),
        (copied(one, tmp_path / "bare"), r"holds no complete projections; score with"),
    ):
        with pytest.raises(RankFailedError, match=message):
            on_ranks(1, _asked, wrong, new, ["code"])
    with pytest.raises(RankFailedError, match=r"--capabilities \['law'\]: not in influence\.directions"):
        on_ranks(1, _asked, one, new, ["law"])
    with pytest.raises(RankFailedError, match="is a training run"):
        on_ranks(1, _asked, one, Path(one.train.run), ["code"])
    assert not new.exists()
