"""The Parquet table says what the stored arrays say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from megatron_r1.influence import store as export
from tests import launch
from tests.mixture.mixture_scores import write_scores


def _scores(run: Path, capabilities: tuple[str, ...] = ("code", "math")) -> dict[tuple[str, int], np.ndarray]:
    """Two sources at two steps; only b has norms."""
    found = {}
    for position, (source, n) in enumerate({"b": 3, "a": 5}.items()):
        for step in (10, 30):
            score_NC = np.random.default_rng(step + n).normal(size=(n, len(capabilities))).astype(np.float32)
            norm_N = np.arange(n) + 0.5 if source == "b" else None
            write_scores(
                run, step, source, score_NC, 7 * np.arange(n), np.arange(n) + 20, norm_N,
                position=position, capabilities=list(capabilities),
            )  # fmt: skip
            found[source, step] = score_NC
    return found


def test_every_row_is_an_examples_scores(tmp_path: Path) -> None:
    stored = _scores(tmp_path)
    assert export.write_parquet(tmp_path, tmp_path / "x.parquet", check=True) == 16
    assert not (tmp_path / "x.parquet").exists()
    command = [sys.executable, "tools/export_scores.py", str(tmp_path), "--output", f"{tmp_path}/x.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=launch.ROOT, timeout=60, check=True)
    assert done.stdout == f"wrote {tmp_path}/x.parquet, 16 rows\n"
    file = pyarrow.parquet.ParquetFile(tmp_path / "x.parquet")
    assert file.num_row_groups == 4
    table = file.read()
    assert {f.name: str(f.type) for f in table.schema} == {
        "step": "int64", "source": "string", "example": "int64", "tokens": "int32", "loss": "float",
        "norm": "float", "code": "float", "math": "float",
    }  # fmt: skip
    rows = table.to_pylist()
    assert [(r["source"], r["step"], r["example"]) for r in rows] == [
        (source, step, 7 * i) for source, step in stored for i in range(len(stored[source, step]))
    ]
    for row in rows:
        i = row["example"] // 7
        assert [row["code"], row["math"]] == stored[row["source"], row["step"]][i].tolist()
        assert (row["tokens"], row["loss"]) == (20 + i, 1.0)
        assert row["norm"] == (i + 0.5 if row["source"] == "b" else None)


def test_what_makes_no_table_is_refused_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x.parquet"
    with pytest.raises(ValueError, match="no complete influence scores"):
        export.write_parquet(tmp_path, output)
    _scores(tmp_path)
    write_scores(
        tmp_path, 30, "a", np.ones((5, 1)), np.arange(5), np.full(5, 9), position=1, capabilities=["code"]
    )
    with pytest.raises(ValueError, match=r"step_00000030/a holds scores for \['code'\]"):
        export.write_parquet(tmp_path, output)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        export.write_parquet(tmp_path, output)
    assert not list(tmp_path.glob("*.parquet*"))


@pytest.mark.parametrize("wrong", [[0, 0], [1, 0], [-1, 0]])
def test_examples_that_do_not_ascend_are_refused(tmp_path: Path, wrong: list[int]) -> None:
    write_scores(
        tmp_path, 4, "a", np.ones((2, 1)), np.array(wrong), np.full(2, 4), capabilities=["c"], position=0
    )
    with pytest.raises(ValueError, match=r"examples\.npy is damaged \(numbers do not ascend\)"):
        export.read_scores(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"influence": [1]}, {"influence": None}, {"data": [1]}, {"weights": 3}, {"direction_norms": [1]}],
)
def test_a_manifest_with_a_key_of_another_type_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    told = {"capabilities": ["c"], "position": 0, **wrong}
    write_scores(tmp_path, 4, "a", np.ones((1, 1)), np.array([0]), np.array([4]), **told)
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \({next(iter(wrong))} is "):
        export.read_scores(tmp_path)
