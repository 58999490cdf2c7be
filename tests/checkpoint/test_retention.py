"""Which checkpoints stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.checkpoint.files import Retention, evenly_spaced


def test_by_default_all_stay() -> None:
    assert Retention(every=2, steps=frozenset({1})).surplus([1, 2, 3, 4, 5]) == []


@given(
    saved=st.lists(st.integers(1, 60), unique=True),
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 10),
    steps=st.frozensets(st.integers(1, 60), max_size=5),
)
def test_what_goes_is_old_and_nobody_named_it(
    saved: list[int], last: int, every: int | None, steps: frozenset[int]
) -> None:
    gone = Retention(last, every, steps).surplus(saved)
    for step in saved:
        newer = len([s for s in saved if s > step])
        named = step in steps or (every is not None and step % every == 0)
        assert (step in gone) == (newer >= last and not named)


def test_spaced_steps_divide_the_phase() -> None:
    assert evenly_spaced(100, 200, 10) == list(range(110, 201, 10))
    assert evenly_spaced(0, 7, 3) == [3, 5, 7]
    assert evenly_spaced(0, 2, 10) == [1, 2]
    assert evenly_spaced(0, 100, 0) == []
