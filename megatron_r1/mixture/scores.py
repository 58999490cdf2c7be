"""Scores that a mixture is computed from: of one run or several, as gain per token or cosine. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_r1.config import Config, MixConfig
from megatron_r1.influence.store import Scored, read_scores, scored
from megatron_r1.records import ScoreTable

Selected = tuple[list[ScoreTable], list[Scored]]
"""Sources in order, and their checkpoints: all of the first source, all of the second, ..."""


def select(config: Config) -> Selected:
    """Scores of the configured checkpoints (default: all that are scored) and sources, in order.

    Of one run, or, where `mix.runs` says so, of each capability's own.
    """
    assert config.mix is not None
    if not config.mix.runs:
        return _of_run(Path(config.train.run), config)
    return _stack({name: _of_run(Path(run), config) for name, run in config.mix.runs.items()})


def _of_run(run: Path, config: Config) -> Selected:
    again = "score them with tools/compute_influence.py"
    tables = {table.source: table for table in read_scores(run, config.data.sources)}
    if not tables:
        raise ValueError(f"{run}: no complete influence scores; {again}")
    if absent := [name for name in config.data.sources if name not in tables]:
        raise ValueError(f"{run}: no complete influence scores of {', '.join(absent)}; {again}")
    have = next(iter(tables.values())).steps
    asked = tuple(sorted(set(config.influence.steps))) if config.influence else ()
    steps = asked or have
    if absent_steps := [s for s in steps if s not in have]:
        raise ValueError(f"{run}: no complete influence scores at steps {absent_steps}; {again}")
    assert config.mix is not None
    keep = [have.index(step) for step in steps]
    checkpoints = scored(run, config.data.sources)
    selected, used = [], []
    for name in config.data.sources:
        score_NCK = tables[name].score_NCK[:, :, keep]
        if not np.isfinite(score_NCK).all():
            raise ValueError(f"{run}: scores of {name} are not finite; remove them and {again}")
        of_steps = [s for s in checkpoints[name] if s.step in steps]
        table = dataclasses.replace(tables[name], steps=steps, score_NCK=score_NCK)
        selected.append(in_units(table, of_steps, config.mix))
        used += of_steps
    return selected, used


_SAME = ("format", "source", "step", "data", "seq_length", "eod", "precision", "influence")
"""Of manifests. Weights and directions are each run's own."""


def _stack(runs: Mapping[str, Selected]) -> Selected:
    """Scores of several runs as one table, each capability by the model trained for it (Eq. 3): the column of
    each capability from its run, in the order given.

        score_c(x; theta_t) = <v_c, grad l(x)>, both gradients at the checkpoints of c's own run

    Raises ValueError where a run was not scored for its capability, or where runs differ in sources,
    examples, steps or in how they were scored.
    """
    tables, used = next(iter(runs.values()))
    for capability, (others, theirs) in runs.items():
        if capability not in others[0].capabilities:
            raise ValueError(
                f"mix.runs.{capability}: {theirs[0].directory} has scores for {list(others[0].capabilities)} "
                f"only; score that run for {capability} with tools/compute_influence.py"
            )
        examples = zip(tables, others, strict=True)
        same = [np.array_equal(one.example_N, other.example_N) for one, other in examples]
        differ = [] if all(same) else ["examples"]
        if others[0].steps != tables[0].steps:
            differ.append(f"steps ({list(tables[0].steps)} and {list(others[0].steps)})")
        else:
            pairs = [(one.manifest, other.manifest) for one, other in zip(used, theirs, strict=True)]
            differ += [key for key in _SAME if any(one.get(key) != other.get(key) for one, other in pairs)]
        if differ:
            raise ValueError(
                f"mix.runs: {used[0].directory} and {theirs[0].directory} differ in {', '.join(differ)}; "
                f"score every run with the same data, influence section and steps"
            )
    stacked = []
    for g, table in enumerate(tables):
        columns = [
            others[g].score_NCK[:, others[g].capabilities.index(capability)]
            for capability, (others, _) in runs.items()
        ]
        stacked.append(
            dataclasses.replace(table, capabilities=tuple(runs), score_NCK=np.stack(columns, axis=1))
        )
    return stacked, [one for _, theirs in runs.values() for one in theirs]


def in_units(table: ScoreTable, checkpoints: Sequence[Scored], mix: MixConfig) -> ScoreTable:
    """A source's table with its scores as `mix.scale` takes them. `checkpoints`: of it, in order.

    Scores of summed losses are divided by the example's tokens, so that both losses give gains per token.
    cosine: <v_c, g(x)> / (|v_c| |g(x)|), 0 where a gradient is 0. ValueError where no norms were stored.
    """
    parts = []
    for k, one in enumerate(checkpoints):
        score_NC = table.score_NCK[:, :, k].astype(np.float64)
        if mix.scale == "cosine":
            score_NC = _cosine(score_NC, one)
        elif one.manifest.get("influence", {}).get("loss", "mean") == "sum":
            score_NC = score_NC / np.maximum(table.length_N, 1)[:, None]
        parts.append(score_NC)
    return dataclasses.replace(table, score_NCK=np.stack(parts, axis=2))


def _cosine(score_NC: np.ndarray, checkpoint: Scored) -> np.ndarray:
    named = checkpoint.manifest.get("direction_norms")
    if named is None or not (checkpoint.directory / "norms.npy").is_file():
        raise ValueError(
            f"mix.scale=cosine needs gradient norms, which {checkpoint.directory} lacks; score again with "
            f"influence.norms=true"
        )
    norm_C = np.array([named[c] for c in checkpoint.manifest["capabilities"]], dtype=np.float64)
    product_NC = checkpoint.array("norms").astype(np.float64)[:, None] * norm_C
    return np.divide(score_NC, product_NC, out=np.zeros_like(score_NC), where=product_NC > 0)
