"""Scores of several runs as one table: each capability by the model trained for it (Eq. 3). No torch.

score_c(x; theta_t) = <v_c, grad l(x)>, both gradients at the checkpoints of c's own run
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from megatron_r1.influence.store import Scored
from megatron_r1.records import ScoreTable

Selected = tuple[list[ScoreTable], list[Scored]]
"""Sources in order, and their checkpoints: all of the first source, all of the second, ..."""

_SAME = ("source", "step", "data", "seq_length", "eod", "precision", "influence")
"""Of manifests. Weights and directions are each run's own."""


def stack(runs: Mapping[str, Selected]) -> Selected:
    """Capability -> its run's scores; the column of each capability from its run, in the order given.

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
