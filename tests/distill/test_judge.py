"""Teacher and student are judged by the same labels. The oracle is transformers, a document at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_r1.config import Config
from megatron_r1.data.open import OpenData
from megatron_r1.distill import judge as judged
from megatron_r1.distill.cache import write_part
from megatron_r1.distill.documents import choose
from megatron_r1.distill.judge import estimate, judge, label_nll, sample, student_of, text
from megatron_r1.distill.teacher import Teacher
from megatron_r1.distill.write import records
from tests.distill import corpus
from tests.distill.test_write import CONTEXT, header

TOKENS = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = corpus.written(tmp_path_factory.mktemp("corpus"))
    torch.manual_seed(5)
    config = LlamaConfig.from_pretrained(folder / "teacher")
    config.hidden_size, config.intermediate_size, config.initializer_range = 16, 32, 0.02
    config.head_dim, config.max_position_embeddings = 4, 40
    student: Any = LlamaForCausalLM(config)
    student.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "student")
    return folder


def nll(folder: Path, documents: list[np.ndarray], bos: int | None) -> list[float]:
    """Summed over all tokens but the first of each document, in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    out = []
    for tokens in documents:
        lead = [] if bos is None else [bos]
        ids = torch.tensor([[*lead, *tokens.tolist()]])
        with torch.no_grad():
            share = model(input_ids=ids).logits[0].log_softmax(-1)
        out.append(-sum(share[len(lead) + i - 1, int(t)].item() for i, t in enumerate(tokens) if i))
    return out


def opened(root: Path, *more: str) -> tuple[Config, OpenData]:
    return corpus.opened(root, f"train.init_weights='{root}/student'", *more)


def test_a_sample_is_of_every_source_seeded_and_cut(root: Path) -> None:
    documents = choose(*opened(root), "mid")
    found = sample(documents, TOKENS, 20, 1)
    assert int(found.length_D.max()) == 20
    for name, tokens in found.by_source().items():
        assert TOKENS <= tokens < TOKENS + 20, name
    whole = {
        row.tobytes(): tokens
        for row, tokens in zip(documents.hash_DH, documents.tokens(np.arange(len(documents))), strict=True)
    }
    for row, tokens in zip(found.hash_DH, found.tokens(np.arange(len(found))), strict=True):
        np.testing.assert_array_equal(tokens, whole[row.tobytes()][:20])
    same, other = (sample(documents, TOKENS, 20, seed).hash_DH.tobytes() for seed in (1, 2))
    assert same == found.hash_DH.tobytes() != other
    assert len(sample(documents, 10**9, 20, 1)) == len(documents)


def test_the_estimate_is_what_a_part_then_has(root: Path, tmp_path: Path) -> None:
    documents = choose(*opened(root), "mid")
    documents = documents.only(documents.length_D < CONTEXT)
    teacher = Teacher(str(root / "teacher"), "fp32")
    made = header(teacher)
    found = estimate(documents, teacher, made, 10**9, 0)
    tokens = documents.by_source()
    expected = sum(tokens[name] * found[name][0] for name in tokens)
    part = write_part(tmp_path, made, records(teacher, made, documents, np.arange(len(documents))))
    # Beginning and end of a file.
    assert 0 < part.stat().st_size - expected < 100
    assert all(seconds > 0 for _, seconds in found.values())
    (a,) = estimate(documents.only(documents.source_D == 0), teacher, made, 100, 0).values()
    assert a[0] == pytest.approx(found["a"][0], rel=0.1)
    # Documents of one token, which have no label, have a record.
    one = replace(documents, length_D=np.ones_like(documents.length_D))
    assert estimate(one, teacher, made, 5, 0).keys() == {"a", "b"}


def test_losses_costs_and_warnings(root: Path) -> None:
    config, data = opened(root)
    documents = choose(config, data, "mid")
    result = judge(config, "mid", documents, TOKENS, 3, 1e12)
    taken = sample(documents, TOKENS, corpus.SEQ, 3)
    plain = AutoTokenizer.from_pretrained(root / "teacher")
    for source, row in result["sources"].items():
        of = taken.only(np.array([data.corpora[k].name == source for k in taken.source_D]))
        tokens = of.tokens(np.arange(len(of)))
        labels = sum(len(one) - 1 for one in tokens)
        assert row["labels"] == labels
        with_bos, without = (sum(nll(root / "teacher", tokens, bos)) / labels for bos in (0, None))
        student = sum(nll(root / "student", tokens, None)) / labels
        assert row["with_bos"] == pytest.approx(with_bos, rel=1e-5)
        assert row["without_bos"] == pytest.approx(without, rel=1e-5)
        assert row["student"] == pytest.approx(student, rel=1e-5)
        # The end of a document has no text.
        in_bytes = sum(
            len(plain.decode(one[one > 3]).encode()) - len(plain.decode(one[:1]).encode()) for one in tokens
        )
        assert row["bytes"] == in_bytes
        assert row["teacher_bpb"] == pytest.approx(with_bos * labels / math.log(2) / in_bytes, rel=1e-5)
        assert row["student_bpb"] == pytest.approx(student * labels / math.log(2) / in_bytes, rel=1e-5)
        apart = abs(with_bos / without - 1) > 0.02
        assert apart == any(line.startswith(f"{source}: with BOS") for line in result["warnings"])
        # A teacher of large random weights is worse than a student that knows nothing.
        assert (
            student < with_bos
            and f"{source}: the teacher predicts it no better than the student" in result["warnings"]
        )
    assert result["student"] == f"{root}/student"
    tokens = 4 * 4 * corpus.SEQ
    each = Teacher(str(root / "teacher"), "fp32").flops_per_token(corpus.SEQ)
    assert result["phase"] == {"name": "mid", "tokens": tokens, "teacher_flop": tokens * each}
    assert result["hours"] == pytest.approx(tokens * each / 1e12 / 3600)
    assert result["times_student"] == pytest.approx(each / config.model.flops_per_token(corpus.SEQ))
    lines = text(json.loads(json.dumps(result))).splitlines()
    assert lines[0].split() == [
        "source",
        "labels",
        "with_bos",
        "without_bos",
        "student",
        "teacher_bpb",
        "student_bpb",
    ]
    assert lines[1].split()[:3] == [
        "a",
        f"{result['sources']['a']['labels']}",
        f"{result['sources']['a']['with_bos']:.4f}",
    ]


def test_bos_apart_is_warned_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = opened(root, "train.init_weights=null", "phases.mid.objective.bos=none")
    documents = choose(config, data, "mid")

    def losses(model: Teacher, chosen: Any) -> np.ndarray:
        return (chosen.length_D - 1) * np.where(chosen.source_D == (model.bos is None), 1.03, 1.0)

    monkeypatch.setattr(judged, "label_nll", losses)
    result = judge(config, "mid", documents, TOKENS, 3, None)
    assert result["warnings"] == [
        "a: with BOS the teacher's NLL is +3.0%; see objective.bos",
        "b: with BOS the teacher's NLL is -2.9%; see objective.bos",
    ]
    # What is configured is what counts.
    assert result["teacher"]["bos"] is None and result["student"] is None and result["timed"]
    assert [row["without_bos"] for row in result["sources"].values()] == [1.0, 1.03]
    assert "student: none, because the run begins with random weights" in text(result)


def test_the_student_is_the_runs_newest_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = opened(root)
    assert student_of(config) == f"{root}/student"
    run = root / "run" / "checkpoints"
    asked = []

    def checkpoints(folder: Path) -> list[Any]:
        asked.append(folder)
        return [type("Ref", (), {"path": run / f"step_{n}"}) for n in (2, 10)]

    monkeypatch.setattr(judged, "complete_checkpoints", checkpoints)
    assert student_of(config) == str(run / "step_10") and asked == [run]


def test_logits_that_are_not_finite_are_named(root: Path) -> None:
    documents = choose(*opened(root), "mid").only(np.array([0, 30]))
    damaged = Teacher(str(root / "teacher"), "fp32")
    first, second = documents.tokens(np.arange(2))
    with torch.no_grad():
        damaged.network.get_input_embeddings().weight[int(np.setdiff1d(second, first)[0])] = torch.nan
    with pytest.raises(ValueError, match=r"its logits of document 30 of source 'a' \(.*\) are not finite"):
        label_nll(damaged, documents)
