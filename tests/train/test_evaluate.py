"""Held-out losses in metrics.jsonl are those that transformers computes of the exported checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.train import loop
from tests.distributed import on_ranks
from tests.faults.inputs import call
from tests.launch import write_corpus
from tests.train import small

LENGTH, WINDOWS = 32, 5
TRAINED = {"a": 40, "b": 59}
"""Documents that each source trains on, of 60: behind those of `b` less than WINDOWS windows remain."""


def _tokens(prefix: Path, documents: int) -> tuple[np.ndarray, int]:
    """All tokens of a dataset as `write_corpus` writes it, and how many its leading documents have."""
    raw = Path(f"{prefix}.idx").read_bytes()
    # After 34 bytes of header: int32 tokens of each document.
    lengths = np.frombuffer(raw, np.int32, count=documents, offset=34)
    return np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64), int(lengths.sum())


def _windows(prefix: Path, trained: int) -> np.ndarray:
    """The first windows of S + 1 tokens, on the grid of S, without a token that is trained on, [N, S + 1]."""
    tokens, before = _tokens(prefix, trained)
    starts = [at for at in range(0, len(tokens) - LENGTH, LENGTH) if at >= before]
    return np.stack([tokens[at : at + LENGTH + 1] for at in starts[:WINDOWS]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of two ranks; the third source has no documents set aside."""
    root = small.written(tmp_path_factory.mktemp("evaluate"))
    write_corpus(root / "c", 60, seed=2)
    words = [f"data.sources.{name}.documents={count}" for name, count in TRAINED.items()]
    words += [f"data.sources.c.prefix={root}/c", "train.probe_every=2"]
    on_ranks(2, loop.train, small.config(root, "run", 4, f"train.validation_windows={WINDOWS}", *words))
    return root / "run"


def test_the_loss_of_windows_behind_the_documents_that_are_trained_on(run: Path, tmp_path: Path) -> None:
    # Here, so that ranks do not import it.
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = run / "checkpoints" / "step_00000004"
    status, text = call("convert_checkpoint", "--to", "hf", checkpoint, tmp_path / "hf")
    assert status == 0, text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    expected = {}
    for name, trained in TRAINED.items():
        rows = torch.from_numpy(_windows(run.parent / name, trained))
        with torch.no_grad():
            logits = model(rows[:, :-1]).logits
        expected[name] = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_nll" in line] == [2, 4]
    assert lines[-1]["validation_nll"] == pytest.approx(expected, rel=1e-5)
    # Each value is of its own windows; of `b` there are fewer.
    assert abs(expected["a"] - expected["b"]) > 1e-3
    assert len(_windows(run.parent / "b", TRAINED["b"])) < WINDOWS
