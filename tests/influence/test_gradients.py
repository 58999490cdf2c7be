"""Scores against plain autograd, finite differences, and themselves in other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1 import backend
from megatron_r1.config import ParallelConfig
from megatron_r1.influence import methods
from megatron_r1.influence.gradients import Scorer
from megatron_r1.influence.methods import WgradDot, dot_with_directions
from megatron_r1.influence.parameters import parameter_names, select
from megatron_r1.parallel import process_groups
from tests.distributed import RankFailedError, on_ranks
from tests.influence import tiny
from tests.interpreter import needs_triton

LAYOUTS = {
    "data": ParallelConfig(),
    "tensor": ParallelConfig(tensor=2),
    "tensor and sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
    "context": ParallelConfig(context=2),
}


def error(found: np.ndarray, true: np.ndarray) -> float:
    """Relative to the root mean square of the true values."""
    return float(np.abs(found - true).max() / np.sqrt((true**2).mean()))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def alone(weights: Path) -> dict[str, Any]:
    """Everything on one rank, which the layouts must reproduce."""
    return on_ranks(1, tiny.layout, ParallelConfig(), "fp32", weights)[0]


def _by_autograd() -> dict[str, Any]:
    with process_groups(ParallelConfig()) as context:
        gpt = tiny.build()
        v = {
            name: torch.randn(3, *p.shape, generator=torch.Generator().manual_seed(number))
            for number, (name, p) in enumerate(gpt.named_parameters())
        }
        rows = tiny.windows()
        true = np.zeros((len(rows), 3))
        part = {name: np.zeros((len(rows), 3)) for name in v}
        true_squares = np.zeros(len(rows))
        for n, row in enumerate(rows):
            for name, gradient in tiny.row_gradient(gpt, row).items():
                part[name][n] = (gradient.double() * v[name].double()).flatten(1).sum(1).numpy()
                true[n] += part[name][n]
                true_squares[n] += gradient.double().square().sum().item()
        found, losses = tiny.scores(gpt, context, v, rows)
        # One parameter at a time: an error in a small one cannot hide behind the large ones.
        single = {}
        for name in v:
            only = {other: w if other == name else torch.zeros_like(w) for other, w in v.items()}
            single[name] = error(tiny.scores(gpt, context, only, rows)[0], part[name])
        # Parameters that are left out are not there at all.
        selected = {}
        for layers in ("linear", "embedding", ["*norm*", "*layers.1.mlp*"]):
            names = select(layers, tiny.MODEL.num_layers)
            only = {name: v[name] for name in names}
            selected[str(layers)] = error(
                tiny.scores(gpt, context, only, rows)[0], sum(part[n] for n in names)
            )
        squared = tiny.rows(gpt, context, WgradDot(v, 3, squares=True), rows)[0]
        true_losses = np.array([tiny.row_loss(gpt, row).item() for row in rows])
        return {
            "error": error(found, true),
            "single": single,
            "selected": selected,
            "scores beside norms": error(squared[:, :3], true),
            "norms": error(squared[:, 3] ** 0.5, true_squares**0.5),
            "losses": error(losses, true_losses),
            "trainable": all(p.requires_grad for p in gpt.parameters()),
            "names": sorted(v),
        }


def test_scores_equal_autograd_over_all_parameters() -> None:
    found = on_ranks(1, _by_autograd)[0]
    assert found["error"] < 1e-5
    assert found["losses"] < 1e-6
    assert {n: e for n, e in found["single"].items() if e > 1e-5} == {}
    assert max(found["selected"].values()) < 1e-5, found["selected"]
    assert found["scores beside norms"] < 1e-5 and found["norms"] < 1e-5
    assert found["names"] == sorted(parameter_names(tiny.MODEL.num_layers))
    assert "embedding.word_embeddings.weight" in found["names"] and len(found["names"]) == 2 * 6 + 2
    assert found["trainable"], "the model must be left as it was"


def _sum_over_examples() -> tuple[np.ndarray, np.ndarray]:
    with process_groups(ParallelConfig()) as context:
        gpt, rows = tiny.build(), tiny.windows()
        v = tiny.directions(gpt, context)
        found = tiny.scores(gpt, context, v, rows)[0]
        g = tiny.engine(gpt, context, 4).mean_gradient(tiny.Windows(rows))
        return found.sum(0), len(rows) * sum((g[n] * v[n]).flatten(1).sum(1) for n in g).numpy()


def test_scores_sum_to_the_batch_gradient() -> None:
    found, true = on_ranks(1, _sum_over_examples)[0]
    assert error(found, true) < 1e-5


def _by_finite_differences() -> tuple[np.ndarray, np.ndarray]:
    """[L_c(theta) - L_c(theta - eps g(x))] / eps with L_c the mean loss of the probing set."""
    epsilon = 2e-3
    with process_groups(ParallelConfig()) as context:
        gpt, rows = tiny.build(), tiny.windows()
        found = tiny.scores(gpt, context, tiny.directions(gpt, context), rows)[0]

        @torch.no_grad()
        def losses() -> np.ndarray:
            return np.array(
                [
                    np.mean([tiny.row_loss(gpt, row).item() for row in tiny.windows(size, seed=100 + c)])
                    for c, size in enumerate((5, 6, 7))
                ]
            )

        measured = []
        for row in rows:
            gradient = tiny.row_gradient(gpt, row)
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    for name, p in gpt.named_parameters():
                        p += sign * epsilon * gradient[name]
                sides.append(losses())
                with torch.no_grad():
                    for name, p in gpt.named_parameters():
                        p -= sign * epsilon * gradient[name]
            measured.append((sides[0] - sides[1]) / (2 * epsilon))
        return found, np.array(measured)


def test_a_positive_score_lowers_the_capabilitys_loss() -> None:
    found, measured = on_ranks(1, _by_finite_differences)[0]
    assert (measured > 0).any()
    assert error(found, measured) < 0.02
    clear = np.abs(measured) > 0.05 * np.abs(measured).max()
    assert (np.sign(found) == np.sign(measured))[clear].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_score_as_one(alone: dict[str, Any], weights: Path, layout: str) -> None:
    ranks = on_ranks(2, tiny.layout, LAYOUTS[layout], "fp32", weights)
    for found in ranks:
        assert error(found["scores"], alone["scores"]) < 1e-5
        assert error(found["losses"], alone["losses"]) < 1e-6
        assert found["direction"] == pytest.approx(alone["direction"], rel=1e-5)
        if layout != "context":
            assert error(found["norms"], alone["norms"]) < 1e-5
    # Names are those of the whole model, wherever a parameter is.
    assert {name for found in ranks for name in found["names"]} == set(alone["names"])


def _in_batches_of(sizes: tuple[int, ...]) -> list[np.ndarray]:
    with process_groups(ParallelConfig()) as context:
        gpt = tiny.build()
        v = tiny.directions(gpt, context)
        return [tiny.scores(gpt, context, v, tiny.windows(), size)[0] for size in sizes]


def test_batch_size_and_filling_up_change_nothing() -> None:
    first, *others = on_ranks(1, _in_batches_of, (1, 5, 12, 16))[0]
    for other in others:
        assert error(other, first) < 1e-6


def test_bf16_scores_follow_fp32(alone: dict[str, Any]) -> None:
    found = on_ranks(1, tiny.layout, ParallelConfig(), "bf16")[0]
    assert np.corrcoef(found["scores"].ravel(), alone["scores"].ravel())[0, 1] > 0.99
    np.testing.assert_allclose(found["norms"], alone["norms"], rtol=0.05)


def _unknown_layer() -> None:
    with process_groups(ParallelConfig()):
        gpt = tiny.build()
        gpt.decoder.extra = torch.nn.Linear(2, 2)
        with Scorer(gpt, WgradDot({n: torch.zeros(3, *p.shape) for n, p in gpt.named_parameters()}, 3)):
            pass


def test_a_layer_without_a_rule_is_refused() -> None:
    with pytest.raises(RankFailedError, match=r"no rule for the gradient of decoder\.extra\.bias"):
        on_ranks(1, _unknown_layer)


def test_blocks_of_a_large_layer_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    a, g, v = torch.randn(4, 3, 5), torch.randn(4, 3, 7), torch.randn(2, 7, 5)
    true = torch.einsum("sbi,sbo,coi->bc", a, g, v)
    for block in (1, 40, 10_000):
        monkeypatch.setattr("megatron_r1.influence.methods._CPU_BLOCK", block)
        torch.testing.assert_close(dot_with_directions(a, g, v).float(), true)


def _head_and_loss() -> tuple[np.ndarray, list[str]]:
    """Scores of the standard rows where each way to another loss, or to a batch's gradient, is noted."""
    found: list[str] = []
    with process_groups(ParallelConfig()) as context, pytest.MonkeyPatch.context() as patch:
        gpt = tiny.build()
        v = {name: torch.ones(3, *p.shape) for name, p in gpt.named_parameters()}
        patch.setattr("megatron_r1.model.loss.add_product", lambda *_: found.append("weight gradient"))
        patch.setattr(type(gpt), "compute_language_model_loss", lambda *_: found.append("other loss"))
        scores, _ = tiny.scores(gpt, context, v, tiny.windows())
        assert gpt.head_watcher is None and all(p.grad is None for p in gpt.parameters())
    return scores, found


def test_scoring_takes_our_loss_and_forms_no_gradient_of_a_batch() -> None:
    ((scores, found),) = on_ranks(1, _head_and_loss)
    assert found == [] and np.abs(scores).min() > 0


def _scores_by(kernels: bool, parallel: ParallelConfig) -> np.ndarray:
    """A rank's body: scores and squared norms of some rows, by batched products where kernels are on."""
    backend.has_triton = lambda: kernels
    if kernels:
        methods._add_one_by_one = methods._add_together
    with process_groups(parallel) as context:
        gpt = tiny.build(parallel)
        assert (gpt.loss_kernels is not None) == kernels
        gradient = tiny.engine(gpt, context).mean_gradient(tiny.Windows(tiny.windows(2, seed=1)))
        v = {name: g[None] for name, g in gradient.items()}
        found = tiny.rows(gpt, context, methods.WgradDot(v, 1, squares=True), tiny.windows(3))[0]
        assert methods._reductions.cache_info().currsize == kernels
    return found


@needs_triton
@pytest.mark.parametrize(
    "layout", ["data", "tensor and sequence", "pipeline"], ids=["data", "tensor-sequence", "pipeline"]
)
def test_scores_by_the_kernels_are_those_of_torch(layout: str) -> None:
    """A direction of the model's own gradient, too."""
    parallel = LAYOUTS[layout]
    ranks = parallel.model_ranks()
    plain, ours = (on_ranks(ranks, _scores_by, kernels, parallel)[0] for kernels in (False, True))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6 * np.abs(plain).max())
