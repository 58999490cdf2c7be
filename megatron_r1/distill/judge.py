"""Is this teacher worth it: its loss beside the student's on a sample of each source, and what it costs.

A teacher that predicts a source's text no better than the student has little to teach there. An instruction-tuned
one may predict raw text worse, and worse still where the token that its training put before each text is
missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_r1.checkpoint.files import complete_checkpoints
from megatron_r1.config import Config, ObjectiveConfig
from megatron_r1.distill.teacher import Teacher
from megatron_r1.distill.write import Documents
from megatron_r1.run.layout import RunDir
from megatron_r1.system.terminal import say

APART = 0.02
"""Share by which a teacher's NLL with and without BOS may differ."""


def sample(documents: Documents, tokens: int, longest: int, seed: int) -> Documents:
    """Random documents of each source, cut to `longest` tokens, so many that they have `tokens` together."""
    order = np.random.default_rng(seed).permutation(len(documents))
    length_D, chosen = np.minimum(documents.length_D, longest), []
    for k in np.unique(documents.source_D):
        # A document of one token has no label.
        of = order[(documents.source_D[order] == k) & (length_D[order] > 1)]
        chosen.append(of[: int(np.searchsorted(np.cumsum(length_D[of]), tokens)) + 1])
    return replace(documents, length_D=length_D).only(np.concatenate(chosen))


def label_nll(model: Teacher, documents: Documents) -> np.ndarray:
    """Sum over each document's labels, which are all tokens but the first one: nats, float64 [D].

    Raises ValueError for a model whose logits are not finite.
    """
    sequences, nll_D = list(documents.tokens(np.arange(len(documents)))), np.zeros(len(documents))
    for d, first, logits_NV in model.logits(sequences):
        label_N = torch.from_numpy(sequences[d][first + 1 : first + 1 + len(logits_NV)].astype(np.int64))
        row_NV = logits_NV[: len(label_N)].float()
        nll_D[d] += torch.nn.functional.cross_entropy(row_NV, label_N.to(row_NV.device), reduction="sum").item()
    if not np.isfinite(nll_D).all():
        bad = documents.name(int(np.argmin(np.isfinite(nll_D))))
        raise ValueError(f"{model.model}: logits of {bad} are not finite; its weights are damaged, or too large")
    return nll_D


def student_of(config: Config) -> str | None:
    """The checkpoint that a phase would go on from: the run's newest, else what it begins with."""
    newest = complete_checkpoints(RunDir(Path(config.train.run)).checkpoints)
    return str(newest[-1].path) if newest else config.train.init_weights or config.train.init_from


def judge(
    config: Config, phase: str, asked: ObjectiveConfig, documents: Documents, tokens: int, seed: int, flops: float | None
) -> dict[str, Any]:
    """The table of `text`. Teacher and student read the same documents, each by itself, up to data.seq_length
    tokens of it, and all labels but a document's first count.

    tokens: of the sample of each source. flops: FLOP/s of a device, for hours; None: timed on this one.
    """
    assert asked.teacher is not None
    teacher, name, seq_length = Teacher(asked.teacher, config.train.precision, asked.bos), student_of(config), config.data.seq_length
    student = _student(name, config.train.precision) if name else None
    longest = min(seq_length, teacher.longest - 1, student.longest if student else seq_length)
    documents = sample(documents, tokens, int(longest), seed)
    # What a configuration without BOS may have missed.
    lead = teacher.bos if teacher.bos is not None else teacher.tokenizer.bos_token_id
    own, nll = "without_bos" if teacher.bos is None else "with_bos", dict[str, np.ndarray]()
    for column, bos in (("with_bos", lead), ("without_bos", None)):
        if column == "without_bos" or lead is not None:
            teacher.bos, begun = bos, time.monotonic()
            nll[column], seconds = label_nll(teacher, documents), time.monotonic() - begun
    nll["teacher"] = nll[own]
    if student:
        nll["student"] = label_nll(student, documents)
    size_V = np.zeros(teacher.tokens, np.int64)
    for token, text in teacher.described.vocabulary.items():
        size_V[token] = len(text or b"")
    labels = documents.by_source(documents.length_D - 1)
    bytes_D = np.array([size_V[of[1:]].sum() for of in documents.tokens(np.arange(len(documents)))])
    size, sums = documents.by_source(bytes_D), {column: documents.by_source(of) for column, of in nll.items()}
    read = config.phase_steps(phase) * config.tokens_per_step()
    cost = read * teacher.flops_per_token(seq_length)
    hours = (cost / flops if flops else seconds * read / documents.total) / 3600
    rows = {
        source: {"labels": n, "bytes": size[source]}
        | {f"{column}_nll": of[source] / n for column, of in sums.items()}
        | {f"{column}_bpb": of[source] / np.log(2) / max(1, size[source]) for column, of in sums.items() if column in ("teacher", "student")}
        for source, n in labels.items()
    }
    return {
        "phase": phase,
        "teacher": {"name": asked.teacher, "identity": teacher.identity, "bos": lead if own == "with_bos" else None},
        "student": name if student else None,
        "sources": rows,
        "tokens": read,
        "teacher_flop": cost,
        "times_student": teacher.flops_per_token(seq_length) / config.model.flops_per_token(seq_length),
        "hours": hours,
        "timed": flops is None,
        "warnings": list(_warnings(rows)),
    }


def _student(name: str, precision: str) -> Teacher | None:
    try:
        return Teacher(name, precision, "none")
    except (ValueError, OSError) as error:
        say(f"the student is left out: {error}")
        return None


def _warnings(rows: dict[str, dict[str, float]]) -> Iterator[str]:
    for source, of in rows.items():
        beside, without = of.get("with_bos_nll", of["without_bos_nll"]), of["without_bos_nll"]
        if abs(beside - without) > APART * min(beside, without):
            yield f"{source}: NLL {beside:.3f} with BOS, {without:.3f} without; objective.bos must be as the teacher was trained"
        if of["teacher_nll"] >= of.get("student_nll", np.inf):
            yield f"{source}: the teacher predicts it no better than the student ({of['teacher_nll']:.3f}, {of['student_nll']:.3f} nats)"


def text(result: dict[str, Any]) -> str:
    """A row a source: nats a label, and bits per byte."""
    columns = ["with_bos_nll", "without_bos_nll", "student_nll", "teacher_bpb", "student_bpb"]
    lines = [f"{'source':18s}{'labels':>10s}" + "".join(f"{name.replace('_', ' '):>17s}" for name in columns)]
    for source, of in result["sources"].items():
        cells = (f"{of[name]:17.4f}" if name in of else f"{'-':>17s}" for name in columns)
        lines.append(f"{source:18s}{of['labels']:10,}{''.join(cells)}")
    how = "timed on this device" if result["timed"] else "at --tflops"
    lines.append(f"student: {result['student'] or 'none, because the run has no checkpoint and begins with random weights'}")
    lines.append(
        f"phase {result['phase']}: {result['tokens']:,} tokens, {result['teacher_flop']:.3g} FLOP of the teacher, "
        f"{result['times_student']:.2f} times the student's, {result['hours']:.3g} hours of a device, {how}"
    )
    return "\n".join([*lines, *(f"warning: {line}" for line in result["warnings"])])
