"""Examples of a probing set, against directions recomputed without them by plain autograd."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1 import backend
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.data.indexed import IndexedDataset, open_corpus
from megatron_r1.data.windows import choose
from megatron_r1.influence.curvature import adam_scale
from megatron_r1.influence.score import compute_influence
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from tests.distributed import on_ranks
from tests.influence.conftest import SEQ
from tests.influence.test_score import changed, copied, influence_mistakes, tables


def _by_autograd(config: Config, adam: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, C] of the first source with every window left out of the directions it lies in, and in
    which it lies."""
    influence = config.influence
    assert influence is not None
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(1)
        gpt: Any = build_model(config.model, ParallelConfig(), "fp32", SEQ, plain_layers=True)
        path = Path(config.train.run) / "checkpoints/step_00000004"
        load_checkpoint(path, gpt, None, config.model)
        scale = adam_scale(path, gpt) if adam else {name: torch.ones(1) for name, _ in gpt.named_parameters()}

        def gradients(name: str, prefix: str, most: int | None) -> dict[int, dict[str, torch.Tensor]]:
            stream, found = IndexedDataset(prefix).tokens, {}
            for w in choose(open_corpus(name, prefix), SEQ, most, influence.seed).tolist():
                window = torch.from_numpy(stream[w * SEQ : w * SEQ + SEQ + 1].astype(np.int64))[None]
                position = torch.arange(SEQ)[None]
                gpt.zero_grad()
                gpt(window[:, :-1], position, None, labels=window[:, 1:].contiguous()).mean().backward()
                found[w] = {n: p.grad.double() for n, p in gpt.named_parameters()}
            return found

        examples = gradients("a", config.data.sources["a"].prefix, influence.examples)
        out = np.zeros((len(examples), len(influence.directions)))
        shared = np.zeros(out.shape, bool)
        for c, (name, prefix) in enumerate(influence.directions.items()):
            probe = gradients(name, prefix, influence.probe_examples)
            for n, (w, g) in enumerate(examples.items()):
                shared[n, c] = prefix == config.data.sources["a"].prefix and w in probe
                others = [z for v, z in probe.items() if not (shared[n, c] and v == w)]
                for p in g:
                    v_c = torch.stack([z[p] for z in others]).mean(0) / scale[p].double()
                    out[n, c] += float((v_c * g[p]).sum())
        return out, shared


@pytest.mark.parametrize(
    ("curvature", "norms", "parallel"),
    [
        ("identity", True, ParallelConfig()),
        ("identity", False, ParallelConfig(context=2)),
        ("adam", False, ParallelConfig(tensor=2, sequence=True)),
    ],
    ids=str,
)
def test_scores_are_of_directions_without_the_example(
    trained: Config,
    tmp_path: Path,
    curvature: str,
    norms: bool,
    parallel: ParallelConfig,
) -> None:
    prefix = trained.data.sources["a"].prefix
    config = changed(
        copied(trained, tmp_path),
        influence={
            "directions": {"own": prefix, "math": trained.influence.directions["math"]},
            "exclude_self": True,
            "curvature": curvature,
            "norms": norms,
            "steps": [4],
            "examples": 30,
            "probe_examples": 40,
        },
    )

    on_ranks(2, compute_influence, dataclasses.replace(config, parallel=parallel))
    true, shared = on_ranks(1, _by_autograd, config, curvature == "adam")[0]
    assert 3 < shared[:, 0].sum() < 27 and not shared[:, 1].any()
    found = tables(config)[0].score_NCK[:, :, 0]
    np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-5 * np.abs(true).max())


def test_what_is_not_exact_is_refused_in_one_message(trained: Config) -> None:
    for wrong in (
        {"method": "projected"},
        {"method": "ghost", "per_token": True},
        {"unit": "document"},
        {"curvature": "datainf"},
    ):
        (said,) = influence_mistakes(changed(trained, influence={"exclude_self": True, **wrong}))
        assert "use these" in said and "method=wgrad-dot or ghost" in said
    (said, _) = influence_mistakes(changed(trained, influence={"exclude_self": True, "probe_examples": 1}))
    assert "one probing window of code" in said
