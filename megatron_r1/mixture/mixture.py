"""The next phase from a run's scores: source weights (Eqs. 4, 5), keep masks (Eq. 6), epoch caps. No torch.

scores.py reads the scores, weights.py computes source weights, masks.py keep masks. files.py writes both.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from megatron_r1.config import Config, MixConfig
from megatron_r1.data.keep import load_mask, require_made_for
from megatron_r1.data.open import build_plan, open_data
from megatron_r1.influence.store import Scored
from megatron_r1.mixture.masks import KeepMask, make_masks
from megatron_r1.mixture.scores import select
from megatron_r1.mixture.weights import (
    best_gains,
    bounds,
    checkpoint_weights,
    densities,
    source_weights,
    worst_case_weights,
)
from megatron_r1.records import Corpus
from megatron_r1.system.errors import rewording


@dataclass(frozen=True)
class Mixture:
    """A phase and the numbers behind it. Axis G: sources."""

    phase: str
    sources: tuple[str, ...]
    capabilities: tuple[str, ...]
    steps: tuple[int, ...]
    alpha_CK: np.ndarray
    rho_GC: np.ndarray
    """Eq. 5 for each capability alone, weighted over checkpoints: gain per token, as scaled."""
    rho_G: np.ndarray
    """Eq. 5: the capabilities' weighted mean of `rho_GC`."""
    weights: dict[str, float]
    """By source: nonnegative, summing to 1."""
    best_C: np.ndarray
    """Greatest gain for each capability alone, of any mixture within the same bounds."""
    rivals: dict[str, np.ndarray]
    """Other mixtures to compare with, [G]: "uniform", and "Eq. 5" if `mix.objective` is another."""
    epochs: dict[str, float]
    """Passes over each source that the phase will take."""
    max_epochs: dict[str, float]
    """Caps on passes over each source in the whole plan. Sources without a cap are left out."""
    masks: dict[str, KeepMask]
    """By source. Empty without `mix.keep`."""

    def gains(self, weight_G: np.ndarray) -> np.ndarray:
        """Predicted gain per token of a mixture for each capability, [C], to first order."""
        return np.asarray(weight_G @ self.rho_GC)

    def least_share(self, weight_G: np.ndarray) -> float:
        """Smallest share of its own best gain that a capability of positive weight gets from a mixture."""
        asked = (self.alpha_CK.sum(1) > 0) & (self.best_C > 0)
        return float((self.gains(weight_G)[asked] / self.best_C[asked]).min()) if asked.any() else math.nan


def make_mixture(config: Config) -> tuple[Mixture, list[Scored]]:
    """The phase `mix.phase` from the run's scores, and the scores used. Writes nothing.

    Raises ValueError for scores that are missing, not finite or favour no source, and for bounds that no
    weights fit.
    """
    mix = config.mix
    if mix is None:
        raise ValueError("mix: missing section; name the phase to weigh, for instance mix.phase=second")
    if mix.phase not in config.phases:
        raise ValueError(f"mix.phase={mix.phase}: no such phase; phases has {list(config.phases)}")
    tables, used = select(config)
    capabilities, steps = tables[0].capabilities, tables[0].steps
    alpha_CK = checkpoint_weights(mix, capabilities, steps)
    weight_C = alpha_CK.sum(1)
    rho_GC = np.einsum("gck,k->gc", densities(tables, mix), alpha_CK.sum(0))
    rho_G = rho_GC @ weight_C
    corpora = open_data(config, use="mix").corpora
    before = config.phases[mix.phase].keep
    masks = make_masks(tables, used, corpora, mix, config.data.seq_length, before) if mix.keep else {}
    draws = _Draws(config, mix, corpora, masks)
    within = bounds(mix, draws.room(config))
    if mix.objective == "worst":
        weight_G = worst_case_weights(rho_GC, weight_C, within, capabilities)
    else:
        weight_G = source_weights(rho_G, within)
    rivals = {"uniform": np.full(len(tables), 1 / len(tables))}
    if mix.objective != "sum" and (rho_G > 0).any():
        rivals["Eq. 5"] = source_weights(rho_G, within)
    weights = {t.source: float(w) for t, w in zip(tables, weight_G, strict=True)}
    mixture = Mixture(
        phase=mix.phase,
        sources=tuple(t.source for t in tables),
        capabilities=capabilities,
        steps=steps,
        alpha_CK=alpha_CK,
        rho_GC=rho_GC,
        rho_G=rho_G,
        weights=weights,
        best_C=best_gains(rho_GC, within),
        rivals=rivals,
        epochs=draws.epochs(weights),
        max_epochs=draws.caps,
        masks=masks,
    )
    return mixture, used


class _Draws:
    """Draws of the data plan in `mix.phase`. Only the phases before it affect them."""

    def __init__(self, config: Config, mix: MixConfig, corpora: list[Corpus], masks: dict[str, KeepMask]):
        names, batch = list(config.phases), config.train.global_batch
        earlier = {name: config.phases[name] for name in names[: names.index(mix.phase)]}
        self._keep, self._masks = config.phases[mix.phase].keep, masks
        self._start = sum(map(config.phase_steps, earlier)) * batch
        self._samples = config.phase_steps(mix.phase) * batch
        self._windows = {c.name: c.windows(config.data.seq_length) for c in corpora}
        self._plan = build_plan(dataclasses.replace(config, phases=earlier), corpora)
        self._used = self._plan.epochs(self._start)
        self.caps = _caps(mix, config.phases[mix.phase].max_epochs, list(config.data.sources))

    def room(self, config: Config) -> np.ndarray:
        """Share of the phase that each source can fill before its cap, [G]. 0 where nothing may be drawn."""
        room = []
        for name, windows in self._windows.items():
            if name in self._masks:
                kept = int(self._masks[name].windows.sum())
            elif name in self._keep:
                mask, source = load_mask(name, windows, self._keep[name]), config.data.sources[name]
                require_made_for(mask, source.prefix, config.data.seq_length)
                kept = mask.bitmap.kept
            else:
                kept = windows
            left = (self.caps.get(name, math.inf) - self._used[name]) * kept if kept else 0.0
            # Whole draws: the small term undoes the subtraction's rounding.
            room.append(max(0.0, np.floor(left + 1e-6)) / self._samples)
        return np.array(room)

    def epochs(self, weights: dict[str, float]) -> dict[str, float]:
        """Passes over each source that the phase takes with these weights. Adds the phase to the plan."""
        masks = {name: mask.windows for name, mask in self._masks.items() if mask.windows.any()}
        self._plan.add_phase(self._start, weights, self.caps or None, masks or self._keep)
        end = self._start + self._samples
        with rewording(lambda error: f"phases: {error}", IndexError):
            self._plan.locate(end - 1)
        after = self._plan.epochs(end)
        return {name: float(after[name] - self._used[name]) for name in self._windows}


def _caps(mix: MixConfig, phase: float | dict[str, float] | None, sources: list[str]) -> dict[str, float]:
    """Epoch cap by source, `mix.max_epochs` before the phase's own."""
    caps: dict[str, float] = {}
    for given in (phase, mix.max_epochs):
        if given is not None:
            caps |= given if isinstance(given, dict) else dict.fromkeys(sources, given)
    if unknown := [name for name in caps if name not in sources]:
        raise ValueError(f"mix.max_epochs: {unknown} not in data.sources, which has {sources}")
    return caps
