"""Scores as one Parquet file, for whatever reads tables. No torch; pyarrow is imported only to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.influence.store import scored
from megatron_r1.near import near_path
from megatron_r1.progress import Progress
from megatron_r1.run_dir import RunDir, replacing

COLUMNS = {
    "step": "int64",
    "source": "string",
    "example": "int64",
    "tokens": "int32",
    "loss": "float32",
    "norm": "float32",
}


def write_parquet(run: Path, output: Path, check: bool = False) -> int:
    """Write every complete score under `run`: a row for each (source, step, example). Returns how many.

    Columns: step, source, example (window or document number), tokens (labels), loss (nats), norm where any
    is stored (null elsewhere), and a float32 for each capability. A row group is one source at one step, and
    no more is in memory. check: only count. `output` is whole or not there. Raises ValueError where nothing
    is complete, where checkpoints were scored for different capabilities, or where pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow, which comes with datasets: pip install datasets") from None
    parts = [part for found in scored(run).values() for part in found]
    if not parts:
        raise ValueError(
            f"{RunDir(run).influence}: no complete influence scores; see tools/compute_influence.py"
            f"{near_path(run)}"
        )
    capabilities: list[str] = parts[0].manifest["capabilities"]
    for part in parts:
        if part.manifest["capabilities"] != capabilities:
            raise ValueError(
                f"{part.directory} holds scores for {part.manifest['capabilities']}, {parts[0].directory} "
                f"for {capabilities}; a table has one set of columns: remove one of the two and score again"
            )
    if check:
        return sum(len(part.array("examples")) for part in parts)
    with_norms = any((part.directory / "norms.npy").is_file() for part in parts)
    columns = {name: kind for name, kind in COLUMNS.items() if with_norms or name != "norm"}
    columns |= dict.fromkeys(capabilities, "float32")
    schema = pyarrow.schema(list(columns.items()))
    rows = 0
    with (
        replacing(output) as stream,
        pyarrow.parquet.ParquetWriter(stream, schema) as writer,
        Progress("export", len(parts), "row groups") as bar,
    ):
        for part in parts:
            example_N, score_NC = part.array("examples"), part.array("scores")
            norms = (part.directory / "norms.npy").is_file()
            values: dict[str, Any] = {
                "step": np.full(len(example_N), part.step),
                "source": [part.manifest["source"]] * len(example_N),
                "example": example_N,
                "tokens": part.array("tokens"),
                "loss": part.array("losses"),
                "norm": part.array("norms") if norms else [None] * len(example_N),
                **{name: score_NC[:, c] for c, name in enumerate(capabilities)},
            }
            writer.write_table(pyarrow.table({name: values[name] for name in columns}, schema))
            rows += len(example_N)
            bar.advance()
    return rows
