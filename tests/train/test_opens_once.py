"""How often a training run opens its datasets, and what it measures on documents set aside."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.config import Config
from megatron_r1.data.indexed import IndexedDataset, IndexedWriter
from megatron_r1.train.loop import train
from tests.distributed import on_ranks
from tests.train import small

SEQ = 32


def _counted(config: Config) -> dict[str, int]:
    """Train; pair -> how often it was opened."""
    opened: Counter[str] = Counter()
    open_pair = IndexedDataset.__init__

    def counting(self: Any, prefix: Any, *share: Any, **keywords: Any) -> None:
        opened[Path(prefix).name] += 1
        open_pair(self, prefix, *share, **keywords)

    IndexedDataset.__init__ = counting  # type: ignore[method-assign]  # this fork's own
    train(config)
    return dict(opened)


def test_documents_set_aside_are_measured_and_each_pair_is_opened_once(tmp_path: Path) -> None:
    """A probing set of the very windows behind the documents that are trained on must have the same loss."""
    small.written(tmp_path)
    dataset = IndexedDataset(tmp_path / "a")
    first = -(-dataset.tokens_before(50) // SEQ)
    with IndexedWriter(tmp_path / "same", np.uint16) as writer:
        writer.add_document(dataset.tokens[first * SEQ : (first + 3) * SEQ + 1])
    with IndexedWriter(tmp_path / "same_b", np.uint16) as writer:
        writer.add_document(dataset.tokens[: 5 * SEQ])
    config = small.config(
        tmp_path,
        "run",
        2,
        "train.validation_windows=3",
        "data.sources.a.documents=50",
        f"data.probes={{a: '{tmp_path}/same', b: '{tmp_path}/same_b'}}",
    )
    (opened,) = on_ranks(1, _counted, config)
    line = json.loads((Path(config.train.run) / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["validation_nll"] == {"a": pytest.approx(line["probe_nll"]["a"], rel=1e-6)}
    assert opened == {"a": 1, "b": 1, "same": 1, "same_b": 1}
