"""Logs of a run, where the disk is full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megatron_r1.run_dir import RunDir
from megatron_r1.train.metrics import MetricsLog, RankLog


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    log = MetricsLog(RunDir(tmp_path), step=0)
    rank_log = RankLog(tmp_path / "rank.log")
    for each in (log, rank_log):
        each._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    for each, said, name in ((log, {"step": 1}, "metrics.jsonl"), (rank_log, "said", "rank.log")):
        with pytest.raises(OSError, match=f"{tmp_path}/{name}") as caught:
            each.write(said)  # type: ignore[attr-defined]
        assert caught.value.errno == errno.ENOSPC
