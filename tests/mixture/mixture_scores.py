"""Scores as tools/compute_influence.py leaves them, written by hand as the documented files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.influence.store import FORMAT, directory_of


def write_scores(
    run: Path,
    step: int,
    source: str,
    score_NC: np.ndarray,
    example_N: np.ndarray,
    length_N: np.ndarray,
    norm_N: np.ndarray | None = None,
    **manifest: Any,
) -> None:
    """One complete directory; `manifest` says what else it holds, such as capabilities and data."""
    directory = directory_of(run, step, source)
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {
        "scores": np.asarray(score_NC, np.float32),
        "losses": np.ones(len(example_N), np.float32),
        "tokens": np.asarray(length_N, np.int32),
        "examples": np.asarray(example_N, np.int64),
        "written": np.ones(len(example_N), bool),
    }
    if norm_N is not None:
        arrays["norms"] = np.asarray(norm_N, np.float32)
    for name, array in arrays.items():
        np.save(directory / f"{name}.npy", array)
    said = {"format": FORMAT, "step": step, "source": source, "weights": f"w{step}", **manifest}
    (directory / "manifest.json").write_text(json.dumps(said))
