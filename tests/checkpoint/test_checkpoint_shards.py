"""Runs of elements as rectangles."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.checkpoint.shards import rectangles


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rectangles_hold_the_run_in_order(shape: tuple[int, ...], cut: tuple[float, float]) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    start, end = sorted(round(c * numbers.size) for c in cut)
    covered = []
    for offset, size in rectangles(shape, start, end):
        covered += numbers[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].ravel().tolist()
    assert covered == list(range(start, end))
    assert len(list(rectangles(shape, start, end))) <= 2 * len(shape) - 1
