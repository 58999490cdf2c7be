"""tools/train.py with a teacher of Hugging Face beside the student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.distill.cache import write_part
from megatron_r1.distill.describe import Described
from megatron_r1.distill.draws import Header, draw, pack
from megatron_r1.preprocess.preprocess import preprocess
from tests import launch
from tests.curation.tiny import texts
from tests.distill.test_teacher import model
from tests.faults import inputs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    model(root / "teacher", begins=True)
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(60)))
    how: dict[str, Any] = {"append_eod": True, "log": lambda _: None}
    preprocess([root / "a.jsonl"], root / "a", "HuggingFaceTokenizer", root / "teacher", **how)
    return root


def words(root: Path, run: str, *more: str) -> list[str]:
    return [
        *launch.TINY_MODEL,
        f"model.vocab_size={(Described(str(root / 'teacher')).tokens + 8) // 2 * 2}",
        f"train={{run: '{root}/{run}', global_batch: 4, micro_batch: 2, precision: fp32}}",
        f"data.sources={{a: {{prefix: '{root}/a_text_document'}}}}",
        "data={seq_length: 64, cross_documents: false}",
        f"phases.one={{steps: 3, learning_rate: 1e-3, objective: {{name: kd, teacher: '{root}/teacher'}}}}",
        *more,
    ]


def train(root: Path, *given: str, ranks: int = 1) -> str:
    answer = inputs.train(root, *given, ranks=ranks)
    assert answer.status == 0, answer.text
    return answer.text


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensor_parallel_ranks_train_as_one_and_a_teacher_whose_phase_is_over_may_go(root: Path) -> None:
    (status, text) = inputs.call("train", *words(root, "one"), "--check")
    assert status == 0 and "phase one: KL at temperature 1 from" in text, text
    assert not (root / "one").exists()
    (status, text) = inputs.call("plan_launch", *words(root, "one"), "--gpus", 2, "--check")
    assert status == 0 and "teacher of phase one: " in text, text
    train(root, *words(root, "one"))
    train(root, *words(root, "two", "parallel={tensor: 2, sequence: true}"), ranks=2)
    for line, want in zip(lines(root / "two"), lines(root / "one"), strict=True):
        for name in ("loss", "kd"):
            assert line[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
    (ledger,) = [json.loads(line) for line in (root / "one/ledger.jsonl").read_text().splitlines()]
    identity = Described(str(root / "teacher")).identity
    assert ledger["inputs"][str(root / "teacher")] == identity
    new, later = words(root, "new"), words(root, "one", "phases.two.steps=1")
    shutil.move(root / "teacher", root / "elsewhere")
    try:
        status, text = inputs.call("train", *new, "--check")
        assert (
            status and "1 mistake in the configuration" in text and "phases.one.objective: no model" in text
        )
        train(root, *later)
    finally:
        shutil.move(root / "elsewhere", root / "teacher")
    assert ["kd" in line for line in lines(root / "one")] == [True] * 3 + [False]


def test_a_cache_trains_alike_on_any_ranks(root: Path) -> None:
    cached = f"phases.one.objective.cache='{root}/cache'"
    (status, text) = inputs.call("cache_teacher", *words(root, "cached", cached), "--phase", "one")
    assert status == 0, text
    (status, text) = inputs.call("train", *words(root, "cached", cached), "--check")
    assert status == 0 and "a: 100.0% of its tokens have a record" in text, text
    train(root, *words(root, "cached", cached))
    train(root, *words(root, "parts", cached, "parallel.context=2"), ranks=2)
    (ledger,) = [json.loads(line) for line in (root / "cached/ledger.jsonl").read_text().splitlines()]
    assert {str(root / "cache"), str(root / "teacher")} <= set(ledger["inputs"])
    for line, want in zip(lines(root / "parts"), lines(root / "cached"), strict=True):
        for name in ("loss", "kd"):
            assert line[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
    first, online = lines(root / "cached")[0], lines(root / "one")[0]
    # Of the same windows and weights. The cache's teacher has seen documents from their beginnings.
    assert first["kd"]["ce"] == online["kd"]["ce"]
    assert first["kd"]["teacher_entropy"] == pytest.approx(online["kd"]["teacher_entropy"], rel=0.02)
    assert first["kd"]["kl"] == pytest.approx(online["kd"]["kl"], rel=0.1)
    # The run stands within its phase when the cache grows.
    more, header = words(root, "cached", cached, "phases.one.steps=4"), Header.read(root / "cache")
    drawn = draw(torch.zeros(1, header.tokens), header, bytes(16), 0)
    write_part(root / "cache", header, [(bytes(16), 0, 1, pack(header, drawn))])
    assert "cache has other parts than at step 3, " in train(root, *more)
