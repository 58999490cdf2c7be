"""Eqs. 4 and 5 by hand, their bounds and scales, and the worst-case weights against grids and duality."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.config import MixConfig
from megatron_r1.mixture.weights import (
    Bounds,
    best_gains,
    bounds,
    checkpoint_weights,
    densities,
    maximise,
    source_weights,
    worst_case_weights,
)
from megatron_r1.records import ScoreTable

MIX = MixConfig(phase="two")
FREE = np.inf


def scores_of(source: str, length_N: list[int], score_NCK: Any) -> ScoreTable:
    score = np.array(score_NCK, dtype=np.float32)
    names = tuple("xyz"[: score.shape[1]])
    steps = tuple(10 * (k + 1) for k in range(score.shape[2]))
    return ScoreTable(source, names, steps, np.arange(len(length_N)), np.array(length_N), score)


def between(count: int, floor: float = 0.0, cap: float = 1.0) -> Bounds:
    return bounds(dataclasses.replace(MIX, floor=floor, cap=cap), np.full(count, FREE))


def test_checkpoint_weights_follow_the_step() -> None:
    alpha = checkpoint_weights(MIX, ("x", "y"), (10, 30))
    np.testing.assert_allclose(alpha, [[0.125, 0.375], [0.125, 0.375]])
    uniform = dataclasses.replace(MIX, checkpoint_weight="uniform", capability_weight={"y": 2})
    np.testing.assert_allclose(checkpoint_weights(uniform, ("x", "y"), (10, 30)), [[0, 0], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"capability_weight: \['q'\] not scored; scored are \['x', 'y'\]"):
        checkpoint_weights(dataclasses.replace(MIX, capability_weight={"q": 1}), ("x", "y"), (1,))


def test_density_is_a_mean_over_tokens() -> None:
    """Eq. 5 by hand: (1 x 10 + 4 x 30) / 40."""
    found = densities([scores_of("a", [10, 30], [[[1.0]], [[4.0]]])], MIX)
    np.testing.assert_allclose(found, [[[130 / 40]]])


def test_zscore_centres_and_scales_each_capability() -> None:
    a = scores_of("a", [1, 1], [[[1.0], [100.0]], [[3.0], [300.0]]])
    b = scores_of("b", [2], [[[0.0], [0.0]]])
    found = densities([a, b], dataclasses.replace(MIX, scale="zscore"))[:, :, 0]
    # Over tokens: values 1, 3, 0, 0; mean 1, variance (0 + 4 + 1 + 1) / 4.
    np.testing.assert_allclose(found[:, 0], np.array([1, -1]) / np.sqrt(1.5))
    np.testing.assert_allclose(found[:, 1], found[:, 0])


def test_weights_are_shares_of_positive_density() -> None:
    assert source_weights(np.array([3.0, -5.0, 1.0]), between(3)).tolist() == [0.75, 0.0, 0.25]


def test_floor_and_cap_by_hand() -> None:
    # The first held at .5; the last at the floor .05; the others share .45 as 3 to 1.
    found = source_weights(np.array([6.0, 3.0, 1.0, -1.0]), between(4, 0.05, 0.5))
    np.testing.assert_allclose(found, [0.5, 0.3375, 0.1125, 0.05])
    # The only source that helps is at the cap: the rest is shared equally.
    found = source_weights(np.array([1.0, -1.0, -2.0]), between(3, cap=0.4))
    np.testing.assert_allclose(found, [0.4, 0.3, 0.3])


def test_an_epoch_cap_bounds_a_weight_and_beats_the_floor() -> None:
    within = bounds(dataclasses.replace(MIX, floor=0.1), np.array([0.2, 0.04, FREE, 0.0]))
    found = source_weights(np.array([5.0, 5.0, 1.0, 9.0]), within)
    np.testing.assert_allclose(found, [0.2, 0.04, 0.76, 0.0])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=12).filter(lambda r: max(r) > 1e-6),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_weights_stay_within_their_bounds(rho: list[float], low: float, high: float) -> None:
    n = len(rho)
    floor, cap = low / n, 1 / n + high * (1 - 1 / n)
    found = source_weights(np.array(rho), between(n, floor, cap))
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert (found >= floor - 1e-9).all() and (found <= cap + 1e-9).all()
    gain = np.maximum(rho, 0)
    free = (found > floor + 1e-9) & (found < cap - 1e-9) & (gain > 1e-12 * gain.sum())
    ratio = found[free] / gain[free]
    assert ratio.size == 0 or np.allclose(ratio, ratio[0], rtol=1e-6)


def test_what_gives_no_weights_is_one_error() -> None:
    with pytest.raises(ValueError, match="no source has positive influence"):
        source_weights(np.array([-1.0, 0.0]), between(2))
    with pytest.raises(ValueError, match="fit no weights of 2 sources"):
        between(2, floor=0.6)
    with pytest.raises(ValueError, match="fit no weights of 2 sources"):
        between(2, cap=0.4)
    with pytest.raises(ValueError, match=r"fill 70.0% of the phase; raise them"):
        bounds(MIX, np.array([0.3, 0.4]))
    with pytest.raises(ValueError, match="max_epochs lets no source be drawn"):
        bounds(MIX, np.zeros(2))
    with pytest.raises(ValueError, match="no mixture within the bounds helps y"):
        worst_case_weights(np.array([[1.0, -1.0], [2.0, -2.0]]), np.full(2, 0.5), between(2), ("x", "y"))


def least(rho_GC: np.ndarray, best_C: np.ndarray, weight_G: np.ndarray) -> float:
    return float((weight_G @ rho_GC / best_C).min())


MIXES = np.array([(i, j, 40 - i - j) for i, j in itertools.product(range(41), range(41)) if i + j <= 40]) / 40
"""Every mixture of three sources in steps of 1/40."""


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=9, max_size=9),
    st.floats(0, 0.3),
    st.floats(0.4, 1),
)
def test_worst_case_weights_beat_every_mixture_on_a_grid(rho: list[float], floor: float, cap: float) -> None:
    rho_GC, within = np.array(rho).reshape(3, 3), between(3, floor, cap)
    best_C = best_gains(rho_GC, within)
    if (best_C < 1e-3).any():
        return
    found = worst_case_weights(rho_GC, np.full(3, 1 / 3), within, "xyz")
    assert found.sum() == pytest.approx(1) and (found >= floor - 1e-9).all() and (found <= cap + 1e-9).all()
    legal = MIXES[(MIXES.min(1) >= floor) & (MIXES.max(1) <= cap)]
    t = least(rho_GC, best_C, found)
    assert all(t >= least(rho_GC, best_C, w) - 1e-6 for w in legal)
    # On the grid itself one is as good, but for what a step of 1/40 moves.
    if len(legal) and floor == 0 and cap == 1:
        steepest = np.abs(rho_GC / best_C).max()
        assert t <= max(least(rho_GC, best_C, w) for w in legal) + 2 * steepest / 40
    assert (legal @ rho_GC <= best_C + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_worst_case_weights_reach_the_bound_of_duality(sources: int, seed: int) -> None:
    """For two capabilities t = min over lambda of the best of lambda x + (1 - lambda) y: by bisection."""
    rho_GC = np.random.default_rng(seed).normal(0.3, 1, (sources, 2))
    within = between(sources, 0.1 / sources, min(1.0, 3 / sources))
    best_C = best_gains(rho_GC, within)
    if (best_C < 1e-2).any():
        return
    parts = rho_GC / best_C

    def dual(x: float) -> float:
        return float(best_gains(parts @ np.array([[x], [1 - x]]), within)[0])

    low, high = 0.0, 1.0
    for _ in range(100):
        third = (high - low) / 3
        if dual(low + third) < dual(high - third):
            high -= third
        else:
            low += third
    found = worst_case_weights(rho_GC, np.full(2, 0.5), within, "xy")
    assert least(rho_GC, best_C, found) == pytest.approx(dual(low), abs=1e-6)


def test_no_capability_starves_where_the_sum_lets_it() -> None:
    # Source a helps x a hundredfold; Eq. 5 leaves y with 1 of 102 parts of its best.
    rho_GC = np.array([[100.0, 0.0], [0.0, 1.0]])
    by_sum = source_weights(rho_GC @ [0.5, 0.5], between(2))
    np.testing.assert_allclose(by_sum, [100 / 101, 1 / 101])
    np.testing.assert_allclose(
        worst_case_weights(rho_GC, np.full(2, 0.5), between(2), "xy"), [0.5, 0.5], atol=1e-6
    )
    # y asks for twice the share of x.
    found = worst_case_weights(rho_GC, np.array([1 / 3, 2 / 3]), between(2), "xy")
    np.testing.assert_allclose(found, [1 / 3, 2 / 3], atol=1e-6)
    # Left out, it counts for nothing.
    found = worst_case_weights(rho_GC, np.array([1.0, 0.0]), between(2), "xy")
    np.testing.assert_allclose(found, [1, 0], atol=1e-6)


def test_a_capability_that_all_serve_leaves_the_rest_to_the_sum() -> None:
    # y gains 1 from any mixture, so x alone is at stake until it has its best, and then the sum.
    rho_GC = np.array([[1.0, 1.0], [1.0, 1.0], [0.5, 1.0]])
    found = worst_case_weights(rho_GC, np.full(2, 0.5), between(3), "xy")
    assert found[2] == pytest.approx(0, abs=1e-6)


def best_vertices(rho_GC: np.ndarray, within: Bounds) -> tuple[float, float]:
    """The greatest least gain, and the greatest sum of gains with it: over every corner of the program."""
    sources, count = rho_GC.shape
    unit = np.eye(sources + 1)
    # Unknowns w and t; each row times them is at most its limit.
    rows = np.vstack([np.hstack([-rho_GC.T, np.ones((count, 1))]), unit[:-1], -unit[:-1]])
    most = np.concatenate([np.zeros(count), within.upper_G, -within.lower_G])
    total = np.append(np.ones(sources), 0.0)
    corners = []
    for held in itertools.combinations(range(len(rows)), sources):
        a, b = np.vstack([total, rows[list(held)]]), np.append(1.0, most[list(held)])
        if abs(np.linalg.det(a)) > 1e-12:
            corner = np.linalg.solve(a, b)
            if (rows @ corner <= most + 1e-12).all():
                corners.append(corner)
    least = max(corner[-1] for corner in corners)
    return least, max((c[:-1] @ rho_GC).sum() for c in corners if c[-1] >= least - 1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_worst_case_weights_are_the_program_s_best_corner(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sources, count = int(draw.integers(2, 5)), int(draw.integers(1, 4))
    within = between(sources, 0.2 / sources, min(1.0, 2.5 / sources))
    rho_GC = draw.normal(0.5, 1, (sources, count))
    best_C = best_gains(rho_GC, within)
    if (best_C < 0.05).any():
        return
    # In shares of the best gain, which are the program's own numbers.
    share_GC = rho_GC / best_C
    gain_C = worst_case_weights(share_GC, np.full(count, 1 / count), within, "xyz"[:count]) @ share_GC
    least_gain, sum_of_gains = best_vertices(share_GC, within)
    # The sum may gain by what the least gain may lose.
    assert gain_C.min() == pytest.approx(least_gain, abs=1.01e-9 * max(1, least_gain - share_GC.min()))
    assert gain_C.sum() > sum_of_gains - 1e-10


def test_linear_programs_without_solution_or_bound_are_refused() -> None:
    with pytest.raises(ValueError, match="no solution"):
        maximise(np.ones(2), np.zeros((0, 2)), [(2.0, 3.0), (0.0, None)])
    with pytest.raises(ValueError, match="no bound"):
        maximise(np.ones(2), np.zeros((0, 2)), [(0.0, 1.0), (0.0, None)])
    # A row said twice is no harm.
    x = maximise(np.array([1.0, 2.0, 0.0]), np.array([[1.0, -1.0, 0.0]] * 2), [(0, 1), (0, 1), (0, 0)])
    np.testing.assert_allclose(x, [0, 1, 0])
