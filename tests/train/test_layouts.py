"""One checkpoint, any layout: the same losses and gradient norms for 20 steps, resharded on load."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config import Config
from megatron_r1.train import loop
from tests.distributed import on_ranks
from tests.train import small
from tests.train.small import figures

STEPS = 20
TWO_RANKS = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "tensor and sequence": ["parallel={tensor: 2, sequence: true}"],
    "pipeline": ["parallel.pipeline=2"],
    "interleaved": ["parallel={pipeline: 2, virtual_pipeline: 2}"],
    "context": ["parallel.context=2"],
    "documents apart, context": ["parallel.context=2", "data={cross_documents: false, eod: 7}"],
    "full recompute": ["train.recompute=full"],
    "selective recompute": ["train.recompute=selective"],
    "chunked head": ["train.head_chunk=16", "parallel={tensor: 2, sequence: true}"],
}
FOUR_RANKS = {
    "tensor x data": ["parallel={tensor: 2, sequence: true}"],
    "tensor x pipeline": ["parallel={tensor: 2, pipeline: 2, sequence: true}"],
    "tensor x context": ["parallel={tensor: 2, context: 2, sequence: true}"],
    "pipeline x data": ["parallel.pipeline=2"],
    "pipeline x context": ["parallel={pipeline: 2, context: 2}"],
    "interleaved x data": ["parallel={pipeline: 2, virtual_pipeline: 2}"],
    "interleaved x tensor": ["parallel={pipeline: 2, virtual_pipeline: 2, tensor: 2, sequence: true}"],
    "context x data": ["parallel.context=2"],
}
APART = ["data={cross_documents: false, eod: 7}"]


def config(root: Path, run: str, *more: str) -> Config:
    return small.config(root, run, STEPS, "train.checkpoint_every=10", *more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank's runs, the reference, attending across documents and within them."""
    root = small.written(tmp_path_factory.mktemp("layouts"), end=7)
    on_ranks(1, loop.train, config(root, "one", "phases.one.steps=1"))
    on_ranks(1, loop.train, config(root, "one"))
    on_ranks(1, loop.train, config(root, "apart", *APART, branch(root)))
    return root


def branch(root: Path) -> str:
    return f"train.init_from={root}/one/checkpoints/step_00000001"


def trains_as_one(root: Path, ranks: int, layout: str, words: list[str]) -> None:
    reference = figures(root / ("apart" if "apart" in layout else "one"))
    on_ranks(ranks, loop.train, config(root, layout, branch(root), *words))
    together = figures(root / layout)
    assert list(together) == list(range(2, STEPS + 1))
    for step, values in together.items():
        assert values == pytest.approx(reference[step], rel=1e-5), step


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_of_any_layout_train_as_one(root: Path, layout: str) -> None:
    trains_as_one(root, 2, layout, TWO_RANKS[layout])


@pytest.mark.soak
@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_of_any_layout_train_as_one(root: Path, layout: str) -> None:
    trains_as_one(root, 4, layout, FOUR_RANKS[layout])


def test_documents_apart_are_another_model(root: Path) -> None:
    across, apart = figures(root / "one"), figures(root / "apart")
    assert across[2][0] != pytest.approx(apart[2][0], rel=1e-4)


def test_an_interleaved_run_resumes_from_its_own_checkpoint(root: Path) -> None:
    words = [*TWO_RANKS["interleaved"], branch(root)]
    on_ranks(2, loop.train, config(root, "cut", *words, "phases.one.steps=4"))
    on_ranks(2, loop.train, config(root, "cut", *words))
    assert figures(root / "cut")[STEPS] == pytest.approx(figures(root / "one")[STEPS], rel=1e-5)


def test_bf16_with_fp32_main_parameters_follows_fp32(root: Path) -> None:
    on_ranks(2, loop.train, config(root, "bf16", branch(root), "train.precision=bf16"))
    for step, values in figures(root / "bf16").items():
        assert values[0] == pytest.approx(figures(root / "one")[step][0], rel=0.02)
