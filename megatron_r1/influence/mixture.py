"""From scores to the source weights of a phase (Eqs. 4, 5), as the YAML that the trainer merges. No torch.

    I(x)  = sum_c sum_t alpha_{c,t} score_c(x; theta_t)              Eq. 4, sum of alpha = 1
    rho_g = sum_{x in R_g} I(x) s(x) / sum_{x in R_g} s(x)           Eq. 5, s(x) tokens of x
    w_g   = max(rho_g, 0) / sum_h max(rho_h, 0)

A score is a gain per token of training on x; the factor s(x) makes rho a mean over tokens, not windows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_r1.config import Config, MixConfig
from megatron_r1.data.sources import build_plan, check_plan, open_sources
from megatron_r1.influence.store import Scored, read_scores, scored
from megatron_r1.records import MixWeights, ScoreTable
from megatron_r1.run_dir import write_text

_NOTHING = 1e-12
"""Shares below are rounding, and count 0."""


@dataclass(frozen=True)
class Mixture:
    """The weights of a phase, and what they were computed from."""

    phase: str
    sources: tuple[str, ...]
    capabilities: tuple[str, ...]
    steps: tuple[int, ...]
    alpha_CK: np.ndarray
    rho_GC: np.ndarray
    """rho of each source for each capability alone: weighted over checkpoints, before capabilities sum."""
    rho_G: np.ndarray
    weights: MixWeights
    epochs: dict[str, float]
    """Passes over each source that the phase will take."""


def make_mixture(config: Config) -> tuple[Mixture, list[Scored]]:
    """Weights of `mix.phase` from the run's scores, and the scores used.

    Raises ValueError where the scores are missing, not finite, or favour no source.
    """
    mix = config.mix
    if mix is None:
        raise ValueError("mix: missing section; name the phase to weigh, for instance mix.phase=second")
    if mix.phase not in config.phases:
        raise ValueError(f"mix.phase={mix.phase}: no such phase; phases has {list(config.phases)}")
    tables, used = _select(config)
    capabilities, steps = tables[0].capabilities, tables[0].steps
    alpha_CK = checkpoint_weights(mix, capabilities, steps)
    rho_GCK = densities(tables, mix)
    rho_GC = np.einsum("gck,ck->gc", rho_GCK, alpha_CK)
    rho_G = rho_GC.sum(1)
    weights = source_weights({t.source: r for t, r in zip(tables, rho_G, strict=True)}, mix.floor, mix.cap)
    mixture = Mixture(
        phase=mix.phase,
        sources=tuple(t.source for t in tables),
        capabilities=capabilities,
        steps=steps,
        alpha_CK=alpha_CK,
        rho_GC=rho_GC,
        rho_G=rho_G,
        weights=weights,
        epochs=_epochs(config, weights),
    )
    return mixture, used


def _select(config: Config) -> tuple[list[ScoreTable], list[Scored]]:
    """Scores of the configured checkpoints (default: all that are scored) and sources, in order."""
    run = Path(config.train.run)
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
    keep = [have.index(step) for step in steps]
    selected = [
        dataclasses.replace(tables[name], steps=steps, score_NCK=tables[name].score_NCK[:, :, keep])
        for name in config.data.sources
    ]
    for table in selected:
        if not np.isfinite(table.score_NCK).all():
            raise ValueError(f"{run}: scores of {table.source} are not finite; remove them and {again}")
    found = scored(run, config.data.sources)
    used = [s for name in config.data.sources for s in found[name] if s.step in steps]
    return selected, used


def checkpoint_weights(mix: MixConfig, capabilities: tuple[str, ...], steps: tuple[int, ...]) -> np.ndarray:
    """alpha of Eq. 4, [C, K], summing to 1. Raises ValueError for weights of unknown capabilities."""
    time_K = np.array(steps, dtype=np.float64) if mix.checkpoint_weight == "step" else np.ones(len(steps))
    if time_K.sum() == 0:
        time_K = np.ones(len(steps))
    given = mix.capability_weight
    if unknown := [name for name in given if name not in capabilities]:
        raise ValueError(f"mix.capability_weight: {unknown} not scored; scored are {list(capabilities)}")
    weight_C = np.array([given.get(c, 0.0) if given else 1.0 for c in capabilities])
    if not (np.isfinite(weight_C).all() and (weight_C >= 0).all() and weight_C.sum() > 0):
        raise ValueError(f"mix.capability_weight={given}: give finite weights >= 0 with a positive sum")
    alpha_CK: np.ndarray = np.outer(weight_C / weight_C.sum(), time_K / time_K.sum())
    return alpha_CK


def densities(tables: list[ScoreTable], mix: MixConfig) -> np.ndarray:
    """rho of Eq. 5 for each source, capability and checkpoint alone: float64 [G, C, K].

    Under `scale: zscore` the scores of a capability at a checkpoint are first centred and divided by
    their standard deviation over the tokens of all sources: no capability's scale swallows another's,
    and 0 is the average token instead of no effect.
    """
    sums = [t.length_N @ t.score_NCK.astype(np.float64).reshape(len(t.length_N), -1) for t in tables]
    tokens_G = np.array([t.length_N.sum() for t in tables], dtype=np.float64)
    rho_GCK = np.stack([s / n for s, n in zip(sums, tokens_G, strict=True)])
    rho_GCK = rho_GCK.reshape(len(tables), *tables[0].score_NCK.shape[1:])
    if mix.scale == "raw":
        return rho_GCK
    share_G = tokens_G / tokens_G.sum()
    mean_CK = np.einsum("g,gck->ck", share_G, rho_GCK)
    square_CK = sum(
        np.einsum("n,nck->ck", t.length_N / tokens_G.sum(), (t.score_NCK - mean_CK) ** 2) for t in tables
    )
    spread_CK = np.sqrt(square_CK)
    if not (spread_CK > 0).all():
        raise ValueError("mix.scale=zscore: all scores of a capability are equal; use mix.scale=raw")
    scaled: np.ndarray = (rho_GCK - mean_CK) / spread_CK
    return scaled


def source_weights(rho: dict[str, float], floor: float = 0.0, cap: float = 1.0) -> MixWeights:
    """w of Eq. 5, each within [floor, cap].

    Weights stay proportional to max(rho, 0) wherever neither bound holds them. If the sources that help
    are all at the cap, the others share the rest equally. Raises ValueError where no source helps, or
    no weights fit the bounds.
    """
    names, n = list(rho), len(rho)
    gain = np.array([max(rho[name], 0.0) for name in names])
    if not np.isfinite(gain).all():
        raise ValueError(f"influence of {[k for k in names if not np.isfinite(rho[k])]} is not finite")
    if not gain.sum() > 0:
        raise ValueError(
            "no source has positive influence, so Eq. 5 gives no weights; look at the per-capability scores, "
            "or use mix.scale=zscore, which weighs sources against their average"
        )
    if floor * n > 1 or cap * n < 1:
        raise ValueError(
            f"mix.floor={floor} and mix.cap={cap} fit no weights of {n} sources; floor x {n} must be at most "
            f"1 and cap x {n} at least 1"
        )
    weight = _within(gain / gain.sum(), floor, cap)
    return MixWeights(dict(zip(names, weight.tolist(), strict=True)))


def _within(share: np.ndarray, floor: float, cap: float) -> np.ndarray:
    """clip(t share, floor, cap) with t such that the sum is 1.

    The sum is linear in t between the points where a weight leaves the floor or reaches the cap.
    """
    share = np.where(share > _NOTHING, share, 0.0)
    if floor <= share.min() and share.max() <= cap:
        return share / share.sum()
    positive = share[share > 0]
    knots = np.unique(np.concatenate([[0.0], floor / positive, cap / positive]))
    sums = np.array([np.clip(t * share, floor, cap).sum() for t in knots])
    if sums[-1] < 1:
        weight = np.where(share > 0, cap, 0.0)
        weight[share == 0] = (1 - weight.sum()) / np.count_nonzero(share == 0)
        return weight
    return np.clip(np.interp(1.0, sums, knots) * share, floor, cap)


def _epochs(config: Config, weights: MixWeights) -> dict[str, float]:
    """Passes over each source in `mix.phase`, by the data plan that training will follow."""
    assert config.mix is not None
    phase = config.mix.phase
    weighed = dataclasses.replace(config.phases[phase], weights=weights.by_source)
    config = dataclasses.replace(config, phases={**config.phases, phase: weighed})
    corpora, mistakes = open_sources(config)
    if mistakes:
        raise ValueError("; ".join(mistakes))
    plan = build_plan(config, corpora)
    if mistakes := check_plan(config, plan):
        raise ValueError("; ".join(mistakes))
    names = list(config.phases)
    steps = [config.phase_steps(name) for name in names]
    first = sum(steps[: names.index(phase)]) * config.train.global_batch
    last = first + config.phase_steps(phase) * config.train.global_batch
    before, after = plan.epochs(first), plan.epochs(last)
    return {name: float(after[name] - before[name]) for name in config.data.sources}


def table(mixture: Mixture) -> str:
    """Sources by weight, with the epochs they will take and rho per capability, as text."""
    width = max(len(name) for name in (*mixture.sources, "source"))
    columns = [f"{c[:11]:>11s}" for c in mixture.capabilities]
    lines = [
        f"phase {mixture.phase}, from influence at steps {list(mixture.steps)} (rho per capability, Eq. 5)",
        f"{'source':{width}s}  weight  epochs  {'  '.join(columns)}  {'sum':>11s}",
    ]
    order = sorted(range(len(mixture.sources)), key=lambda g: (-mixture.rho_G[g], g))
    for g in order:
        name = mixture.sources[g]
        values = [f"{value:11.4g}" for value in (*mixture.rho_GC[g], mixture.rho_G[g])]
        weight, epochs = mixture.weights.by_source[name], mixture.epochs[name]
        lines.append(f"{name:{width}s}  {weight:6.1%}  {epochs:6.2f}  {'  '.join(values)}")
    return "\n".join(lines)


def write(mixture: Mixture, used: list[Scored], mix: MixConfig, output: Path) -> None:
    """`output` for the trainer, and `output` with suffix .json with everything behind it."""
    weights = {name: round(weight, 9) for name, weight in mixture.weights.by_source.items()}
    head = f"# From influence at steps {list(mixture.steps)}; {_json(output).name} says what is behind it.\n"
    tree = {"phases": {mixture.phase: {"weights": weights}}}
    report: dict[str, Any] = {
        "phase": mixture.phase,
        "mix": dataclasses.asdict(mix),
        "steps": list(mixture.steps),
        "capabilities": list(mixture.capabilities),
        "alpha": mixture.alpha_CK.tolist(),
        "sources": {
            name: {
                "weight": mixture.weights.by_source[name],
                "rho": float(mixture.rho_G[g]),
                "rho_by_capability": dict(zip(mixture.capabilities, mixture.rho_GC[g].tolist(), strict=True)),
                "epochs": mixture.epochs[name],
            }
            for g, name in enumerate(mixture.sources)
        },
        "scores": {f"{s.directory.parent.name}/{s.directory.name}": _hash(s) for s in used},
    }
    write_text(_json(output), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(output, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _json(output: Path) -> Path:
    return output.with_suffix(".json")


def _hash(found: Scored) -> dict[str, Any]:
    scores = hashlib.sha256((found.directory / "scores.npy").read_bytes()).hexdigest()
    return {"scores_sha256": scores, "weights": found.manifest["weights"], "data": found.manifest["data"]}
