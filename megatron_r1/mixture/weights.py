"""Source weights from scores: Eqs. 4 and 5 within bounds, and the weights whose worst capability gains most.

    I(x)   = sum_c sum_t alpha_{c,t} score_c(x; theta_t)             Eq. 4, sum of alpha = 1
    rho_g  = sum_{x in R_g} I(x) s(x) / sum_{x in R_g} s(x)          Eq. 5, s(x) tokens of x
    w_g    = max(rho_g, 0) / sum_h max(rho_h, 0)

A score is a gain per token of training on x (`scores.in_units`). The factor s(x) makes rho a mean over
tokens, not over windows. alpha is a product of a weight per capability and one per checkpoint, each summing
to 1. Thus rho is the capabilities' weighted mean of rho_gc, a source's density for one capability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from megatron_r1.config import MixConfig
from megatron_r1.records import ScoreTable

_NOTHING = 1e-12
"""Shares below this are rounding errors and count as 0."""
_ROUNDING = 1e-9
"""Tolerance of a sum of shares."""


def checkpoint_weights(mix: MixConfig, capabilities: tuple[str, ...], steps: tuple[int, ...]) -> np.ndarray:
    """alpha of Eq. 4, [C, K], summing to 1. Raises ValueError for weights of unknown capabilities."""
    by_step = mix.checkpoint_weight == "step" and any(steps)
    time_K = np.array(steps, dtype=np.float64) if by_step else np.ones(len(steps))
    given = mix.capability_weight
    if unknown := [name for name in given if name not in capabilities]:
        raise ValueError(f"mix.capability_weight: {unknown} not scored; scored are {list(capabilities)}")
    weight_C = np.array([given.get(c, 0.0) if given else 1.0 for c in capabilities])
    if not (np.isfinite(weight_C).all() and (weight_C >= 0).all() and weight_C.sum() > 0):
        raise ValueError(f"mix.capability_weight={given}: give finite weights >= 0 with a positive sum")
    return np.outer(weight_C / weight_C.sum(), time_K / time_K.sum())


def scale_of(tables: Sequence[ScoreTable], mix: MixConfig) -> tuple[np.ndarray, np.ndarray]:
    """Offset and divisor of a capability's scores at a checkpoint under `mix.scale`: [C, K] each.

    zscore takes their mean and standard deviation over the tokens of all sources. No capability then
    outweighs another by its scale, and 0 is the average token instead of no effect.
    """
    shape = tables[0].score_NCK.shape[1:]
    if mix.scale != "zscore":
        return np.zeros(shape), np.ones(shape)
    tokens = sum(float(t.length_N.sum()) for t in tables)
    mean_CK = sum(np.einsum("n,nck->ck", t.length_N / tokens, t.score_NCK) for t in tables)
    square_CK = sum(np.einsum("n,nck->ck", t.length_N / tokens, (t.score_NCK - mean_CK) ** 2) for t in tables)
    spread_CK = np.sqrt(square_CK)
    if not (spread_CK > 0).all():
        raise ValueError("mix.scale=zscore: all scores of a capability are equal; use mix.scale=raw")
    return np.asarray(mean_CK), spread_CK


def densities(tables: Sequence[ScoreTable], mix: MixConfig) -> np.ndarray:
    """rho of Eq. 5 for each source, capability and checkpoint alone, scaled: float64 [G, C, K]."""
    share = [t.length_N / t.length_N.sum() for t in tables]
    rho_GCK = np.stack([np.einsum("n,nck->ck", s, t.score_NCK) for s, t in zip(share, tables, strict=True)])
    offset_CK, scale_CK = scale_of(tables, mix)
    return np.asarray((rho_GCK - offset_CK) / scale_CK)


@dataclass(frozen=True)
class Bounds:
    """Least and greatest weight of every source, each [G]. At least one mixture lies within."""

    lower_G: np.ndarray
    upper_G: np.ndarray


def bounds(mix: MixConfig, room_G: np.ndarray) -> Bounds:
    """`mix.floor` and `mix.cap`, both lowered to `room_G` where that is less.

    `room_G`: share of the phase's sequences that a source can fill before its epoch cap. It is 0 where
    nothing of the source may be drawn, and infinite without a cap. Raises ValueError where no weights fit.
    """
    upper_G = np.minimum(mix.cap, room_G)
    lower_G = np.minimum(mix.floor, upper_G)
    count = int((room_G > 0).sum())
    if not count:
        way_out = "raise mix.max_epochs or the phase's"
        raise ValueError(f"max_epochs lets no source be drawn in the phase; {way_out}")
    if lower_G.sum() > 1 + _ROUNDING or mix.cap * count < 1 - _ROUNDING:
        fault = f"mix.floor={mix.floor} and mix.cap={mix.cap} fit no weights of {count} sources"
        raise ValueError(f"{fault}; floor x {count} must be at most 1 and cap x {count} at least 1")
    if upper_G.sum() < 1 - _ROUNDING:
        fault = f"max_epochs and mix.cap={mix.cap} let the sources fill {upper_G.sum():.1%} of the phase"
        raise ValueError(f"{fault}; raise them, or shorten the phase")
    return Bounds(lower_G, upper_G)


def source_weights(rho_G: np.ndarray, within: Bounds) -> np.ndarray:
    """w of Eq. 5 within bounds: [G], summing to 1.

    Weights stay proportional to max(rho, 0) wherever neither bound holds them. If the sources that help
    are all at their upper bounds, the others share the rest equally. Raises ValueError where no source helps.
    """
    gain_G = np.where(within.upper_G > 0, np.maximum(rho_G, 0.0), 0.0)
    if not gain_G.sum() > 0:
        other = "use mix.scale=zscore, which weighs sources against their average"
        way_out = f"look at the per-capability scores, or {other}"
        raise ValueError(f"no source has positive influence, so Eq. 5 gives no weights; {way_out}")
    share_G = gain_G / gain_G.sum()
    share_G = np.where(share_G > _NOTHING, share_G, 0.0)
    share_G /= share_G.sum()
    low_G, high_G = within.lower_G, within.upper_G
    if (low_G <= share_G).all() and (share_G <= high_G).all():
        return share_G
    helps = share_G > 0
    rest = 1 - low_G[~helps].sum()
    if high_G[helps].sum() >= rest:
        weight_G = low_G.copy()
        weight_G[helps] = _clipped(share_G[helps], low_G[helps], high_G[helps], rest)
    else:
        weight_G = high_G.copy()
        equal = np.ones(np.count_nonzero(~helps))
        weight_G[~helps] = _clipped(equal, low_G[~helps], high_G[~helps], 1 - high_G[helps].sum())
    return weight_G


def _clipped(share: np.ndarray, low: np.ndarray, high: np.ndarray, total: float) -> np.ndarray:
    """clip(t share, low, high), with t such that the sum is `total`.

    Between the points where a weight leaves its lower bound or reaches its upper one, the sum is linear in t.
    """
    knots = np.unique(np.concatenate([[0.0], low / share, high / share]))
    sums = np.array([np.clip(t * share, low, high).sum() for t in knots])
    return np.clip(np.interp(total, sums, knots) * share, low, high)


def best_gains(rho_GC: np.ndarray, within: Bounds) -> np.ndarray:
    """Greatest gain of a mixture within bounds for each capability alone, [C]. Best sources fill first."""
    best = []
    for rho_G in rho_GC.T:
        order = np.argsort(-rho_G, kind="stable")
        room_G = (within.upper_G - within.lower_G)[order]
        taken = np.clip(1 - within.lower_G.sum() - (np.cumsum(room_G) - room_G), 0, room_G)
        best.append(within.lower_G @ rho_G + taken @ rho_G[order])
    return np.array(best)


def worst_case_weights(
    rho_GC: np.ndarray, weight_C: np.ndarray, within: Bounds, capabilities: Sequence[str]
) -> np.ndarray:
    """Weights, [G], that maximise the worst capability's gain: a linear program, beyond the paper.

        maximise t  subject to  sum_g w_g rho_gc >= t scale_c for all c,  sum w = 1,  lower <= w <= upper

    scale_c is the greatest gain for c of any mixture within the bounds (`best_gains`). Thus t is the least
    share of its own best that a capability gets. `weight_C` asks for more or less than an equal share.
    Capabilities of weight 0 do not count. Of several solutions the one of greatest weighted gain is taken.
    Raises ValueError where a capability gains nothing from any mixture.
    """
    asked = weight_C > 0
    best_C = best_gains(rho_GC, within)
    if hopeless := [c for c, best, a in zip(capabilities, best_C, asked, strict=True) if a and not best > 0]:
        fault = f"mix.objective=worst: no mixture within the bounds helps {', '.join(hopeless)}"
        raise ValueError(f"{fault}; use mix.capability_weight to leave it out, or mix.objective=sum")
    scale_C = best_C * weight_C / weight_C.max()
    part_GC = rho_GC[:, asked] / scale_C[asked]
    # Unknowns: w and t. Both are around 1.
    minus_gain = np.hstack([-part_GC.T, np.ones((part_GC.shape[1], 1))])
    limits = [*zip(within.lower_G, within.upper_G, strict=True), (None, None)]
    least = maximise(np.append(np.zeros(len(rho_GC)), 1.0), minus_gain, limits)[-1]
    # Now t is fixed, less rounding, and the sum counts.
    limits[-1] = (least - 1e-9 * max(1.0, least - float(part_GC.min())), None)
    joint_G = rho_GC @ weight_C
    joint_G = joint_G / max(float(np.abs(joint_G).max()), 1e-300)
    weight_G = maximise(np.append(joint_G, 0.0), minus_gain, limits)[:-1]
    weight_G = np.clip(weight_G, within.lower_G, within.upper_G)
    return np.asarray(weight_G / weight_G.sum())


Limits = Sequence[tuple[float | None, float | None]]


def maximise(gain_N: np.ndarray, a_MN: np.ndarray, limits: Limits) -> np.ndarray:
    """x that maximises gain x, float64 [N], within its limits (None: without a limit).

    A x <= 0 holds, and all of x but the last sum to 1. Raises ValueError where no x fits or the gain has no
    bound.
    """
    # HiGHS's own tolerance is 1e-7; this is its least.
    exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    sum_N = np.append(np.ones(len(gain_N) - 1), 0.0)[None]
    answer = linprog(-gain_N, a_MN, np.zeros(len(a_MN)), sum_N, [1.0], limits, "highs", options=exact)
    if answer.status:
        reasons = {2: " has no solution", 3: "'s gain has no bound"}
        raise ValueError(f"the linear program{reasons.get(answer.status, answer.message)}")
    return np.asarray(answer.x)
