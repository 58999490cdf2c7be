"""Scores in the unit that mixtures take: gain per token of training on an example, or cosine. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_r1.config import MixConfig
from megatron_r1.influence.store import Scored
from megatron_r1.records import ScoreTable


def in_units(table: ScoreTable, found: Sequence[Scored], mix: MixConfig) -> ScoreTable:
    """A source's table with its scores as `mix.scale` takes them. `found`: its checkpoints, in order.

    Scores of summed losses are divided by the example's tokens, so that both losses give gains per token.
    cosine: <v_c, g(x)> / (|v_c| |g(x)|), 0 where a gradient is 0. ValueError where no norms were stored.
    """
    parts = []
    for k, one in enumerate(found):
        score_NC = table.score_NCK[:, :, k].astype(np.float64)
        if mix.scale == "cosine":
            score_NC = _cosine(score_NC, one)
        elif one.manifest.get("influence", {}).get("loss", "mean") == "sum":
            score_NC = score_NC / np.maximum(table.length_N, 1)[:, None]
        parts.append(score_NC)
    return dataclasses.replace(table, score_NCK=np.stack(parts, axis=2))


def _cosine(score_NC: np.ndarray, found: Scored) -> np.ndarray:
    named = found.manifest.get("direction_norms")
    if named is None or not (found.directory / "norms.npy").is_file():
        raise ValueError(
            f"mix.scale=cosine needs gradient norms, which {found.directory} lacks; score again with "
            f"influence.norms=true"
        )
    norm_C = np.array([named[c] for c in found.manifest["capabilities"]], dtype=np.float64)
    product_NC = found.array("norms").astype(np.float64)[:, None] * norm_C
    return np.divide(score_NC, product_NC, out=np.zeros_like(score_NC), where=product_NC > 0)
