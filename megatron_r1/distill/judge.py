"""Is this teacher worth it: its loss beside the student's on a sample of each source, and what it costs.

A teacher that predicts a source's text no better than the student has little to teach there. A teacher that
is tuned to instructions may predict raw text worse, and worse still without the token that its training had
before each text.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_r1.checkpoint.files import complete_checkpoints
from megatron_r1.config import Config
from megatron_r1.distill.cache import PLACE
from megatron_r1.distill.documents import Documents, objective_of
from megatron_r1.distill.draws import Header
from megatron_r1.distill.teacher import Teacher
from megatron_r1.distill.write import records
from megatron_r1.run.layout import RunDir
from megatron_r1.system.terminal import say

APART = 0.02
"""Share by which a teacher's NLL with and without BOS may differ."""
_COLUMNS = ("with_bos", "without_bos", "student", "teacher_bpb", "student_bpb")


def sample(documents: Documents, tokens: int, longest: int, seed: int) -> Documents:
    """Random documents of each source, cut to `longest` tokens, so many that they have `tokens` together."""
    documents = replace(documents, length_D=np.minimum(documents.length_D, longest))
    order, chosen = np.random.default_rng(seed).permutation(len(documents)), []
    for k in np.unique(documents.source_D):
        of = order[documents.source_D[order] == k]
        chosen.append(of[: int(np.searchsorted(np.cumsum(documents.length_D[of]), tokens)) + 1])
    return documents.only(np.concatenate(chosen))


def estimate(
    documents: Documents, teacher: Teacher, header: Header, tokens: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Source -> bytes and seconds of a token's record, by a sample of so many tokens of each."""
    documents, out = sample(documents, tokens, header.context, seed), {}
    for k in np.unique(documents.source_D):
        of, begun = documents.only(documents.source_D == k), time.monotonic()
        blocks = list(records(teacher, header, of, np.arange(len(of))))
        # A block has a key and a place in the index besides.
        size = sum(len(body) + 20 + PLACE.itemsize for *_, body in blocks)
        out[of.corpora[k].name] = size / of.total, (time.monotonic() - begun) / of.total
    return out


def label_nll(model: Teacher, documents: Documents) -> np.ndarray:
    """Sum over each document's labels, which are all tokens but the first one: nats, float64 [D].

    Raises ValueError for a model whose logits are not finite.
    """
    rows, nll_D = documents.tokens(np.arange(len(documents))), np.zeros(len(documents))
    for d, first, logits_NV in model.logits(rows):
        label_N = torch.from_numpy(rows[d][first + 1 : first + 1 + len(logits_NV)].astype(np.int64))
        row_NV = logits_NV[: len(label_N)].float()
        loss = torch.nn.functional.cross_entropy(row_NV, label_N.to(row_NV.device), reduction="sum")
        nll_D[d] += loss.item()
    if not np.isfinite(nll_D).all():
        where = documents.name(int(np.argmin(np.isfinite(nll_D))))
        raise ValueError(f"{model.model}: its logits of {where} are not finite; its weights are damaged")
    return nll_D


def student_of(config: Config) -> str | None:
    """The checkpoint that the phase would go on from: the run's newest, else what the run begins with."""
    newest = complete_checkpoints(RunDir(Path(config.train.run)).checkpoints)
    return str(newest[-1].path) if newest else config.train.init_weights or config.train.init_from


def judge(
    config: Config, phase: str, documents: Documents, tokens: int, seed: int, flops: float | None
) -> dict[str, Any]:
    """Losses and costs, as `text` prints them. Warnings are among them.

    Teacher and student read the same documents, each apart, up to data.seq_length tokens. All labels but a
    document's first count. tokens: of the sample of each source. flops: FLOP/s of a device, for hours; None:
    timed on this one.
    """
    asked, model, _ = objective_of(config, phase)
    seq_length, precision, name = config.data.seq_length, config.train.precision, student_of(config)
    models = {"teacher": Teacher(model, precision, asked.bos)}
    if name:
        try:
            models["student"] = Teacher(name, precision, "none")
        except (OSError, ValueError) as error:
            say(f"the student is left out: {error}")
            name = None
    teacher = models["teacher"]
    # With a token before each.
    longest = int(min(seq_length, *(one.longest - 1 for one in models.values())))
    # A document of one token has no label.
    documents = sample(documents.only(documents.length_D > 1), tokens, longest, seed)
    own = "without_bos" if teacher.bos is None else "with_bos"
    # A tokenizer may have such a token and put it nowhere.
    lead = teacher.tokenizer.bos_token_id if teacher.bos is None else teacher.bos
    nll = {"student": label_nll(models["student"], documents)} if name else {}
    for column, teacher.bos in {"without_bos": None, **({} if lead is None else {"with_bos": lead})}.items():
        begun = time.monotonic()
        nll[column] = label_nll(teacher, documents)
        seconds = (time.monotonic() - begun) / documents.total
    size_V = np.zeros(teacher.tokens, np.int64)
    for token, word in teacher.described.vocabulary.items():
        size_V[token] = len(word or b"")
    size_D = np.array([size_V[of[1:]].sum() for of in documents.tokens(np.arange(len(documents)))])
    labels, size = documents.by_source(documents.length_D - 1), documents.by_source(size_D)
    rows: dict[str, dict[str, float]] = {of: {"labels": n, "bytes": size[of]} for of, n in labels.items()}
    warnings = []
    for source, row in rows.items():
        row |= {column: documents.by_source(nll_D)[source] / labels[source] for column, nll_D in nll.items()}
        for column, of in (("teacher_bpb", own), *([("student_bpb", "student")] if name else [])):
            row[column] = row[of] * labels[source] / np.log(2) / max(1, size[source])
        if abs(apart := row.get("with_bos", row[own]) / row["without_bos"] - 1) > APART:
            warnings.append(f"{source}: with BOS the teacher's NLL is {apart:+.1%}; see objective.bos")
        if row[own] >= row.get("student", np.inf):
            warnings.append(f"{source}: the teacher predicts it no better than the student")
    trained, each = config.phase_steps(phase) * config.tokens_per_step(), teacher.flops_per_token(seq_length)
    return {
        "teacher": {"model": model, "identity": teacher.identity, "bos": lead if own == "with_bos" else None},
        "student": name,
        "sources": rows,
        "phase": {"name": phase, "tokens": trained, "teacher_flop": trained * each},
        "times_student": each / config.model.flops_per_token(seq_length),
        "hours": trained * (each / flops if flops else seconds) / 3600,
        "timed": flops is None,
        "warnings": warnings,
    }


def text(result: dict[str, Any]) -> str:
    """A row for each source: nats a label, then bits per byte. Costs and warnings follow."""
    lines = ["".join([f"{'source':18s}{'labels':>10s}", *(f"{name:>13s}" for name in _COLUMNS)])]
    for source, row in result["sources"].items():
        cells = (f"{row[name]:13.4f}" if name in row else f"{'-':>13s}" for name in _COLUMNS)
        lines.append("".join([f"{source:18s}{row['labels']:10,}", *cells]))
    phase, how = result["phase"], "timed on this one" if result["timed"] else "at --tflops"
    lines.append(f"student: {result['student'] or 'none, because the run begins with random weights'}")
    times = f"{result['times_student']:.2f} times the student's"
    cost = f"{phase['teacher_flop']:.3g} FLOP of the teacher, {times}"
    hours = f"{result['hours']:.3g} hours of a device, {how}"
    lines.append(f"phase {phase['name']}: {phase['tokens']:,} tokens, {cost}, {hours}")
    return "\n".join([*lines, *(f"warning: {line}" for line in result["warnings"])])
