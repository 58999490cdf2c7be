"""Ranks that tests fork find imported what they import."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_r1.config import Config
from megatron_r1.train import loop
from tests.distributed import on_ranks
from tests.train import small


def _imported(config: Config) -> list[str]:
    before = set(sys.modules)
    loop.train(config)
    return sorted(set(sys.modules) - before)


def test_a_rank_that_trains_imports_next_to_nothing(tmp_path: Path) -> None:
    """torch._dynamo alone is 200 modules and a second of each rank of each launch."""
    [imported] = on_ranks(1, _imported, small.config(small.written(tmp_path), "run", 1))
    assert len(imported) < 20, f"add to tests/preloaded.py: {imported}"
