"""Figure of agreement: whether checkpoints rank examples and sources alike."""

from __future__ import annotations

import numpy as np

from megatron_r1.report import summary, words
from megatron_r1.report.figure import Figure
from megatron_r1.report.load import Reading
from megatron_r1.report.table import Cell, Table


def figure(reading: Reading) -> Figure | None:
    """Spearman's rank correlation of successive checkpoints, and of the first with the last; None of one."""
    tables = [t for t in reading.scores if len(t.example_N)]
    if not tables:
        return None
    _, _, tables = summary.weighing(reading, tables)
    steps, capabilities = tables[0].steps, tables[0].capabilities
    if len(steps) < 2:
        return None
    score_NCK = np.concatenate([t.score_NCK for t in tables])
    mean_GCK = np.stack([np.einsum("n,nck->ck", t.length_N / t.length_N.sum(), t.score_NCK) for t in tables])
    pairs = [(k, k + 1) for k in range(len(steps) - 1)]
    pairs += [(0, len(steps) - 1)] if len(steps) > 2 else []
    rows, of_examples = [], []
    for a, b in pairs:
        cells = [Cell(f"{steps[a]:,} → {steps[b]:,}")]
        for array in (score_NCK, mean_GCK):
            found = [spearman(array[:, c, a], array[:, c, b]) for c in range(len(capabilities))]
            of_examples += [found] if array is score_NCK else []
            cells += [_cell(value) for value in found]
        rows.append(cells)
    head = ["steps", *(f"{c}, examples" for c in capabilities), *(f"{c}, sources" for c in capabilities)]
    successive = np.array(of_examples[: len(steps) - 1])
    note = (
        f"Spearman's rank correlation of the scores of {len(score_NCK):,} examples of all sources together, "
        f"and of the mean scores of {words.many(len(tables), 'source')}. 1: the same order; 0: nothing in "
        f"common."
    )
    return Figure(
        "agreement",
        "DelayedAllReduce between checkpoints",
        _lead(successive, steps, of_examples),
        note=note,
        tables=[Table(head, rows, "numbers heat")],
    )


def _lead(successive: np.ndarray, steps: tuple[int, ...], of_examples: list[list[float]]) -> str:
    low, high = float(np.nanmin(successive)), float(np.nanmax(successive))
    lead = f"From one checkpoint to the next the order of the examples correlates by {low:.2f} to {high:.2f}"
    if len(of_examples) > len(steps) - 1:
        first_last = float(np.nanmean(of_examples[-1]))
        lead += f", from the first to the last by {first_last:.2f} on average"
    return lead + (
        ". Near 1, a mixture made from these scores should hold for the next phase; where the numbers fall, "
        "what helps changes while the model learns, and it is worth scoring again."
    )


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; NaN where either side is all ties or there is one value."""
    ranks = [_ranks(np.asarray(v, dtype=np.float64)) for v in (x_N, y_N)]
    x, y = (r - r.mean() for r in ranks)
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: np.ndarray = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return mean_rank


def _cell(value: float) -> Cell:
    return Cell(words.signed(value, 2), shade=0.4 * value) if np.isfinite(value) else Cell("–")
