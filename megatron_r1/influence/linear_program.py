"""A small linear program, solved exactly: the two-phase simplex method on a dense tableau."""

from __future__ import annotations

import numpy as np

_ZERO = 1e-9
"""Below this a coefficient is rounding; scale the program so that its numbers are around 1."""


def maximise(gain_N: np.ndarray, a_MN: np.ndarray, b_M: np.ndarray) -> np.ndarray:
    """x that maximises gain x subject to A x = b and x >= 0, float64 [N].

    The steepest column enters, by Bland's rule the first one where the last pivot moved nothing, so it
    cannot cycle. A pivot costs M (M + N) operations: made for some hundred variables.
    Raises ValueError where no x fits, or the gain has no bound.
    """
    rows, columns = a_MN.shape
    sign_M = np.where(b_M < 0, -1.0, 1.0)
    tableau = np.hstack([a_MN * sign_M[:, None], np.eye(rows), (b_M * sign_M)[:, None]])
    basis = np.arange(columns, columns + rows)
    # First phase: a slack for each row, all driven to 0.
    _climb(tableau, basis, np.concatenate([np.zeros(columns), -np.ones(rows)]), columns)
    if tableau[basis >= columns, -1].sum() > _ZERO * max(1.0, float(np.abs(b_M).max())):
        raise ValueError("the linear program has no solution")
    for row in np.flatnonzero(basis >= columns):
        candidates = np.flatnonzero(np.abs(tableau[row, :columns]) > _ZERO)
        # Without one the row says nothing that the others do not.
        if len(candidates):
            _pivot(tableau, basis, int(row), int(candidates[0]))
    _climb(tableau, basis, np.concatenate([gain_N, np.zeros(rows)]), columns)
    x = np.zeros(columns + rows)
    x[basis] = tableau[:, -1]
    return x[:columns]


def _climb(tableau: np.ndarray, basis: np.ndarray, gain: np.ndarray, columns: int) -> None:
    """Pivot until no column among the first `columns` raises the gain."""
    moved = True
    while True:
        reduced = gain[:columns] - gain[basis] @ tableau[:, :columns]
        entering = np.flatnonzero(reduced > _ZERO)
        if not len(entering):
            return
        # After a pivot that moved nothing the first column that helps, lest pivots go round in a circle.
        chosen = int(np.argmax(reduced)) if moved else int(entering[0])
        column = tableau[:, chosen]
        limits = np.flatnonzero(column > _ZERO)
        if not len(limits):
            raise ValueError("the linear program's gain has no bound")
        ratio = tableau[limits, -1] / column[limits]
        moved = bool(ratio.min() > 0)
        tied = limits[ratio <= ratio.min() + 1e-15]
        _pivot(tableau, basis, int(tied[np.argmin(basis[tied])]), chosen)


def _pivot(tableau: np.ndarray, basis: np.ndarray, row: int, column: int) -> None:
    tableau[row] /= tableau[row, column]
    others = np.arange(len(tableau)) != row
    tableau[others] -= np.outer(tableau[others, column], tableau[row])
    basis[row] = column
