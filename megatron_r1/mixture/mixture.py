"""The next phase from a run's scores: source weights (Eqs. 4, 5), keep masks (Eq. 6), epoch caps. No torch.

The weights themselves are in weights.py, the masks in keep_masks.py, table and files in mix_file.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_r1.config import Config, MixConfig
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.keep import load_mask
from megatron_r1.data.open import build_plan, open_data
from megatron_r1.influence.store import Scored, read_scores, scored
from megatron_r1.mixture.masks import KeepMask, make_masks
from megatron_r1.mixture.scores import in_units
from megatron_r1.mixture.weights import (
    best_gains,
    bounds,
    checkpoint_weights,
    densities,
    source_weights,
    worst_case_weights,
)
from megatron_r1.records import Corpus, ScoreTable

Selected = tuple[list[ScoreTable], list[Scored]]
"""Sources in order, and their checkpoints: all of the first source, all of the second, ..."""


@dataclass(frozen=True)
class Mixture:
    """A phase, and what it was computed from. Axis G: sources."""

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
    """The most that any mixture within the same bounds gains for each capability alone."""
    rivals: dict[str, np.ndarray]
    """Other mixtures to compare with, [G]: "uniform", and "Eq. 5" where another objective was asked for."""
    epochs: dict[str, float]
    """Passes over each source that the phase will take."""
    max_epochs: dict[str, float]
    """Caps on passes over the whole plan, of the sources that have one."""
    masks: dict[str, KeepMask]
    """By source; empty where no masks were asked for."""

    def gains(self, weight_G: np.ndarray) -> np.ndarray:
        """Predicted gain per token of a mixture for each capability, [C], to first order."""
        return np.asarray(weight_G @ self.rho_GC)

    def least_share(self, weight_G: np.ndarray) -> float:
        """Of a mixture: the smallest share that an asked-for capability gets of its own best gain."""
        asked = (self.alpha_CK.sum(1) > 0) & (self.best_C > 0)
        return float((self.gains(weight_G)[asked] / self.best_C[asked]).min()) if asked.any() else math.nan


def make_mixture(config: Config) -> tuple[Mixture, list[Scored]]:
    """The phase `mix.phase` from the run's scores, and the scores used. Writes nothing.

    Raises ValueError where the scores are missing, not finite, or favour no source, and where no weights
    fit the bounds.
    """
    mix = config.mix
    if mix is None:
        raise ValueError("mix: missing section; name the phase to weigh, for instance mix.phase=second")
    if mix.phase not in config.phases:
        raise ValueError(f"mix.phase={mix.phase}: no such phase; phases has {list(config.phases)}")
    tables, used = _select(config)
    capabilities, steps = tables[0].capabilities, tables[0].steps
    alpha_CK = checkpoint_weights(mix, capabilities, steps)
    weight_C = alpha_CK.sum(1)
    rho_GC = np.einsum("gck,k->gc", densities(tables, mix), alpha_CK.sum(0))
    rho_G = rho_GC @ weight_C
    corpora = open_data(config, use="mix").corpora
    before = config.phases[mix.phase].keep
    masks = make_masks(tables, used, corpora, mix, config.data.seq_length, before) if mix.keep else {}
    draws = _Draws(config, corpora, masks)
    within = bounds(mix, draws.room())
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


def _select(config: Config) -> Selected:
    """Scores of the configured checkpoints (default: all that are scored) and sources, in order.

    Of one run, or, where `mix.runs` says so, of each capability's own.
    """
    assert config.mix is not None
    if not config.mix.runs:
        return _of_run(Path(config.train.run), config)
    return _stack({name: _of_run(Path(run), config) for name, run in config.mix.runs.items()})


def _of_run(run: Path, config: Config) -> Selected:
    again = "score them with tools/compute_influence.py"
    tables = {table.source: table for table in read_scores(run, config.data.sources)}
    if not tables:
        raise ValueError(f"{run}: no complete influence scores; {again}")
    if absent := [name for name in config.data.sources if name not in tables]:
        raise ValueError(f"{run}: no complete influence scores of {', '.join(absent)}; {again}")
    have = next(iter(tables.values())).steps
    asked = tuple(sorted(set(config.influence.steps))) if config.influence else ()
    steps = asked or have
    if absent_steps := [s for s in steps if s not in have]:
        raise ValueError(f"{run}: no complete influence scores at steps {absent_steps}; {again}")
    assert config.mix is not None
    keep = [have.index(step) for step in steps]
    found = scored(run, config.data.sources)
    selected, used = [], []
    for name in config.data.sources:
        score_NCK = tables[name].score_NCK[:, :, keep]
        if not np.isfinite(score_NCK).all():
            raise ValueError(f"{run}: scores of {name} are not finite; remove them and {again}")
        of_steps = [s for s in found[name] if s.step in steps]
        table = dataclasses.replace(tables[name], steps=steps, score_NCK=score_NCK)
        selected.append(in_units(table, of_steps, config.mix))
        used += of_steps
    return selected, used


_SAME = ("source", "step", "data", "seq_length", "eod", "precision", "influence")
"""Of manifests. Weights and directions are each run's own."""


def _stack(runs: Mapping[str, Selected]) -> Selected:
    """Scores of several runs as one table, each capability by the model trained for it (Eq. 3): the column of
    each capability from its run, in the order given.

        score_c(x; theta_t) = <v_c, grad l(x)>, both gradients at the checkpoints of c's own run

    Raises ValueError where a run was not scored for its capability, or where runs differ in sources,
    examples, steps or in how they were scored.
    """
    tables, used = next(iter(runs.values()))
    for capability, (others, theirs) in runs.items():
        if capability not in others[0].capabilities:
            raise ValueError(
                f"mix.runs.{capability}: {theirs[0].directory} has scores for {list(others[0].capabilities)} "
                f"only; score that run for {capability} with tools/compute_influence.py"
            )
        examples = zip(tables, others, strict=True)
        same = [np.array_equal(one.example_N, other.example_N) for one, other in examples]
        differ = [] if all(same) else ["examples"]
        if others[0].steps != tables[0].steps:
            differ.append(f"steps ({list(tables[0].steps)} and {list(others[0].steps)})")
        else:
            pairs = [(one.manifest, other.manifest) for one, other in zip(used, theirs, strict=True)]
            differ += [key for key in _SAME if any(one.get(key) != other.get(key) for one, other in pairs)]
        if differ:
            raise ValueError(
                f"mix.runs: {used[0].directory} and {theirs[0].directory} differ in {', '.join(differ)}; "
                f"score every run with the same data, influence section and steps"
            )
    stacked = []
    for g, table in enumerate(tables):
        columns = [
            others[g].score_NCK[:, others[g].capabilities.index(capability)]
            for capability, (others, _) in runs.items()
        ]
        stacked.append(
            dataclasses.replace(table, capabilities=tuple(runs), score_NCK=np.stack(columns, axis=1))
        )
    return stacked, [one for _, theirs in runs.values() for one in theirs]


class _Draws:
    """What the data plan will draw in `mix.phase`. Phases after it change nothing there."""

    def __init__(self, config: Config, corpora: list[Corpus], masks: dict[str, KeepMask]) -> None:
        assert config.mix is not None
        names = list(config.phases)
        earlier = names[: names.index(config.mix.phase)]
        self._phase = config.phases[config.mix.phase]
        self._batch = config.train.global_batch
        self._start = sum(config.phase_steps(name) for name in earlier) * self._batch
        self._samples = config.phase_steps(config.mix.phase) * self._batch
        self._corpora, self._masks = corpora, masks
        self._config = dataclasses.replace(config, phases={name: config.phases[name] for name in earlier})
        self._windows = {c.name: c.windows(config.data.seq_length) for c in corpora}
        self.caps = _caps(config.mix, self._phase.max_epochs, list(config.data.sources))

    def room(self) -> np.ndarray:
        """Share of the phase that each source can fill before its cap, [G]; 0 where nothing may be drawn."""
        used = self._plan().epochs(self._start)
        room = []
        for name, windows in self._windows.items():
            if name in self._masks:
                kept = int(self._masks[name].windows.sum())
            elif name in self._phase.keep:
                kept = load_mask(name, windows, self._phase.keep[name]).bitmap.kept
            else:
                kept = windows
            left = (self.caps.get(name, math.inf) - used[name]) * kept if kept else 0.0
            # A draw is whole; what the subtraction rounds away is not.
            room.append(max(0.0, math.floor(left + 1e-6) if math.isfinite(left) else left) / self._samples)
        return np.array(room)

    def epochs(self, weights: dict[str, float]) -> dict[str, float]:
        """Passes over each source that the phase takes with these weights."""
        plan = self._plan()
        masks = {name: mask.windows for name, mask in self._masks.items() if mask.windows.any()}
        plan.add_phase(self._start, weights, self.caps or None, masks or self._phase.keep)
        last = self._start + self._samples
        try:
            plan.locate(last - 1)
        except IndexError as error:
            raise ValueError(f"phases: {error}") from None
        before, after = plan.epochs(self._start), plan.epochs(last)
        return {name: float(after[name] - before[name]) for name in self._windows}

    def _plan(self) -> BlendPlan:
        return build_plan(self._config, self._corpora)


def _caps(mix: MixConfig, phase: float | dict[str, float] | None, sources: list[str]) -> dict[str, float]:
    """Epoch cap by source, `mix.max_epochs` before the phase's own."""
    caps: dict[str, float] = {}
    for given in (phase, mix.max_epochs):
        if given is not None:
            caps |= given if isinstance(given, dict) else dict.fromkeys(sources, given)
    if unknown := [name for name in caps if name not in sources]:
        raise ValueError(f"mix.max_epochs: {unknown} not in data.sources, which has {sources}")
    return caps
