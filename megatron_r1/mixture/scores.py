"""The scores of one run or several that a mixture uses, as gain per token or as cosine. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_r1.config import Config, MixConfig
from megatron_r1.influence.store import AGAIN, Scored, read_scores, scored
from megatron_r1.records import ScoreTable

Selected = tuple[list[ScoreTable], list[Scored]]
"""A table for each source, in order, and their checkpoints: all of the first source, then of the second."""


def select(config: Config) -> Selected:
    """Scores of the configured checkpoints (default: all that are scored) and sources, in order.

    They are of train.run, or with `mix.runs` of each capability's own run.
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
    steps = tuple(sorted(set(config.influence.steps if config.influence else ()))) or have
    if absent_steps := [s for s in steps if s not in have]:
        raise ValueError(f"{run}: no complete influence scores at steps {absent_steps}; {again}")
    assert config.mix is not None
    keep = [have.index(step) for step in steps]
    checkpoints = scored(run, config.data.sources)
    selected, used = [], []
    for name in config.data.sources:
        score_NCK = tables[name].score_NCK[:, :, keep]
        of_steps = [s for s in checkpoints[name] if s.step in steps]
        length_N = tables[name].length_N
        if not length_N.sum() > 0:
            raise ValueError(f"{of_steps[0].directory / 'tokens.npy'}: no numbers of tokens; {AGAIN}")
        table = dataclasses.replace(tables[name], steps=steps, score_NCK=score_NCK)
        selected.append(in_units(table, of_steps, config.mix))
        used += of_steps
    return selected, used


_SAME = ("format", "source", "step", "data", "seq_length", "eod", "precision", "influence")
"""Entries of manifests that runs share. Weights and directions are each run's own."""


def _stack(runs: Mapping[str, Selected]) -> Selected:
    """One table for each source, with each capability's column from the run trained for it (Eq. 3).

        score_c(x; theta_t) = <v_c, grad l(x)>, both gradients at the checkpoints of c's own run

    Raises ValueError where a run was not scored for its capability, and where runs differ in sources,
    examples, steps or the settings of scoring.
    """
    tables, used = next(iter(runs.values()))
    for capability, (others, theirs) in runs.items():
        if capability not in others[0].capabilities:
            fault = f"{theirs[0].directory} has scores for {list(others[0].capabilities)} only"
            way_out = f"score that run for {capability} with tools/compute_influence.py"
            raise ValueError(f"mix.runs.{capability}: {fault}; {way_out}")
        pairs = zip(tables, others, strict=True)
        same = all(np.array_equal(one.example_N, other.example_N) for one, other in pairs)
        differ = [] if same else ["examples"]
        if others[0].steps != tables[0].steps:
            differ.append(f"steps ({list(tables[0].steps)} and {list(others[0].steps)})")
        else:
            manifests = [(one.manifest, other.manifest) for one, other in zip(used, theirs, strict=True)]
            differ += [key for key in _SAME if any(a.get(key) != b.get(key) for a, b in manifests)]
        if differ:
            fault = f"mix.runs: {used[0].directory} and {theirs[0].directory} differ in {', '.join(differ)}"
            raise ValueError(f"{fault}; score every run with the same data, influence section and steps")
    stacked = []
    for g, table in enumerate(tables):
        own = {capability: others[g] for capability, (others, _) in runs.items()}
        score_NCK = np.stack([t.score_NCK[:, t.capabilities.index(c)] for c, t in own.items()], axis=1)
        stacked.append(dataclasses.replace(table, capabilities=tuple(runs), score_NCK=score_NCK))
    return stacked, [one for _, theirs in runs.values() for one in theirs]


def in_units(table: ScoreTable, checkpoints: Sequence[Scored], mix: MixConfig) -> ScoreTable:
    """A source's table with its scores in the unit that `mix.scale` needs. `checkpoints`: its own, in order.

    Scores of summed losses are divided by the example's tokens, so that both losses give gains per token.
    cosine divides by both norms, <v_c, g(x)> / (|v_c| |g(x)|), and gives 0 where a gradient is 0. Raises
    ValueError where no norms were stored.
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
        fault = f"mix.scale=cosine needs gradient norms, which {checkpoint.directory} lacks"
        raise ValueError(f"{fault}; score again with influence.norms=true")
    norm_C = np.array([named.get(c) for c in checkpoint.manifest["capabilities"]], dtype=np.float64)
    if not np.isfinite(norm_C).all():
        path = checkpoint.directory / "manifest.json"
        raise ValueError(f"{path}: direction_norms are not all finite numbers; {AGAIN}")
    product_NC = checkpoint.array("norms").astype(np.float64)[:, None] * norm_C
    return np.divide(score_NC, product_NC, out=np.zeros_like(score_NC), where=product_NC > 0)
