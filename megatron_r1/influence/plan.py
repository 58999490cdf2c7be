"""The work of scoring: checkpoints x sources, the identities of their inputs, and progress. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.checkpoint.files import check_model, identity, named, step_path
from megatron_r1.config import Config, InfluenceConfig
from megatron_r1.config_io import ConfigError, check_copies
from megatron_r1.data.indexed import document_starts, with_suffix
from megatron_r1.data.open import OpenData, launched, open_data
from megatron_r1.data.windows import Examples, choose
from megatron_r1.influence import store
from megatron_r1.influence.parameters import select
from megatron_r1.records import CheckpointRef, Corpus
from megatron_r1.run.layout import RunDir

_DECIDING = ("examples", "probe_examples", "seed", "unit", "loss", "norms", "method")
"""Fields of InfluenceConfig that decide the stored results."""
FIELDS = {
    "ghost": ("per_token",),
    "lowrank": ("rank",),
    "projected": ("projection",),
    **dict.fromkeys(("datainf", "kfac", "ekfac"), ("curvature_examples",)),
}
"""Further fields, by method or curvature. They stand here because the classes need torch."""


def measured_on_examples(curvature: str) -> bool:
    """Whether H is measured on examples of the sources."""
    return "curvature_examples" in FIELDS.get(curvature, ())


@dataclass(frozen=True)
class Part:
    """One source at one checkpoint."""

    step: int
    corpus: Corpus
    example_N: np.ndarray
    directory: Path
    inputs: dict[str, Any]
    """The manifest."""

    def left(self) -> int:
        return len(self.example_N) - store.rows_written(self.directory, len(self.example_N))


@dataclass(frozen=True)
class Work:
    config: Config
    influence: InfluenceConfig
    data: OpenData
    """Sources (`corpora`) and probing sets (`directions`)."""
    steps: list[int]

    def examples(self) -> int:
        """Examples to score at each checkpoint."""
        return sum(len(self.chosen(corpus)) for corpus in self.data.corpora)

    def rows(self) -> int:
        """Rows of `seq_length` tokens that these examples are."""
        if self.influence.unit == "window":
            return self.examples()
        lengths = (np.diff(document_starts(c))[self.chosen(c)] - 1 for c in self.data.corpora)
        return sum(int((-(-length_N // self.config.data.seq_length)).sum()) for length_N in lengths)

    def chosen(self, corpus: Corpus) -> np.ndarray:
        """The representative set of a source: numbers of its examples."""
        influence = self.influence
        return choose(corpus, self.config.data.seq_length, influence.examples, influence.seed, influence.unit)

    def probing(self, probe: Corpus) -> np.ndarray:
        """Numbers of a probing set's windows."""
        return choose(probe, self.config.data.seq_length, self.influence.probe_examples, self.influence.seed)

    def shared(self, part: Part) -> np.ndarray:
        """Examples to leave out of directions, bool [N, C]: the same window of the same pair of files."""
        shared_NC = np.zeros((len(part.example_N), len(self.data.directions)), bool)
        for c, probe in enumerate(self.data.directions if self.influence.exclude_self else ()):
            data, direction = part.inputs["data"], part.inputs["directions"][probe.name]
            if (direction["hash"], direction["bytes"]) == (data["hash"], data["bytes"]):
                shared_NC[:, c] = np.isin(part.example_N, self.probing(probe))
        return shared_NC

    def probe_windows(self) -> int:
        return sum(len(self.probing(probe)) for probe in self.data.directions)

    def summary(self) -> str:
        """One line: how much there is, in examples and tokens."""
        examples, probes = self.examples(), self.probe_windows()
        k, seq = len(self.steps), self.config.data.seq_length
        unit = "examples" if self.influence.unit == "window" else "documents"
        return (
            f"{len(self.data.corpora)} sources x up to {self.influence.examples} {unit} x {k} checkpoints = "
            f"{examples * k:,} examples, {self.rows() * k * seq:,} tokens; "
            f"{len(self.data.directions)} directions from {probes} probing windows each checkpoint, "
            f"{probes * k * seq:,} tokens"
        )

    @cached_property
    def tokens(self) -> dict[Path, dict[str, str]]:
        """Prefix -> identity of each dataset, and a fingerprint of its .bin as it is now.

        An identity comes from the sidecar or the index, and does not see a .bin that was changed under it.
        """
        return {
            c.prefix: {
                "hash": self.data.identities[str(c.prefix)],
                "bytes": store.fingerprint(with_suffix(c.prefix, ".bin")),
            }
            for c in (*self.data.corpora, *self.data.directions)
        }

    def parts(self, step: int, weights: str, curvature: str) -> list[Part]:
        """Every source at one checkpoint. `weights`: the checkpoint's identity."""
        influence, data = self.influence, self.data
        identities, layers = data.identities, influence.layers
        fields = (*_DECIDING, *FIELDS.get(influence.method, ()), *FIELDS.get(curvature, ()))
        fields += ("exclude_self",) if influence.exclude_self else ()
        deciding = {name: getattr(influence, name) for name in fields} | {"curvature": curvature}
        # H is measured on all sources, in their order: another set of them is another H.
        if measured_on_examples(curvature):
            every = [f"{c.name} {identities[str(c.prefix)][:16]} {c.documents}" for c in data.corpora]
            deciding["curvature_sources"] = ", ".join(every)
        deciding["layers"] = layers if isinstance(layers, str) else " ".join(layers)
        out = []
        for position, corpus in enumerate(data.corpora):
            inputs = {
                "format": store.FORMAT,
                "step": step,
                "source": corpus.name,
                "position": position,
                "capabilities": [c.name for c in data.directions],
                "weights": weights,
                "data": {**self.tokens[corpus.prefix], "documents": corpus.documents},
                "directions": {c.name: self.tokens[c.prefix] for c in data.directions},
                "influence": deciding,
                "seq_length": self.config.data.seq_length,
                "eod": data.eod,
                "precision": self.config.train.precision,
            }
            directory = store.directory_of(Path(self.config.train.run), step, corpus.name)
            out.append(Part(step, corpus, self.chosen(corpus), directory, inputs))
        return out


@dataclass(frozen=True)
class Job:
    """Work whose checkpoints were identified."""

    work: Work
    refs: list[CheckpointRef]
    curvature: str
    parts: dict[int, list[Part]]
    """By step."""

    def all_parts(self) -> list[Part]:
        return [part for parts in self.parts.values() for part in parts]


def lay_plan(config: Config, ranks: int | None = None) -> Work:
    """Open every dataset and find the checkpoints. Raises ConfigError with every mistake.

    `ranks`: ranks of the launch. None: those of one model copy.
    """
    influence = config.influence
    if influence is None:
        raise ConfigError(["influence: missing section; add a file that has it (see examples/quickstart)"])
    available = _available_steps(Path(config.train.run))

    def also(data: OpenData) -> list[str]:
        return [
            *_check_settings(influence, config, data.directions),
            *_check_places(influence, config, available),
            *check_copies(config.parallel, config.parallel.model_ranks() if ranks is None else ranks),
        ]

    data = open_data(config, launched(), "score", also)
    work = Work(config, influence, data, sorted(set(influence.steps)) or available)
    for step in work.steps:
        check_model(step_path(RunDir(Path(config.train.run)).checkpoints, step), config.model)
    empty = [corpus for corpus in data.corpora if not len(work.chosen(corpus))]
    mistakes = [
        f"data.sources.{c.name}: no document of {c.prefix} has two tokens, and so none has a label; use "
        f"influence.unit=window, or leave the source out"
        for c in empty
    ]
    if mistakes := mistakes or _unknown_ids(work):
        raise ConfigError(mistakes)
    return work


def _unknown_ids(work: Work) -> list[str]:
    """Tokens that the model has no row for, in examples of datasets without a sidecar.

    Each rank checks its part of the examples.
    """
    (rank, ranks), config = launched(), work.config
    seq_length, vocab_size = config.data.seq_length, config.model.vocab_size
    sets = [(corpus, work.chosen(corpus), work.influence.unit) for corpus in work.data.corpora]
    sets += [(probe, work.probing(probe), "window") for probe in work.data.directions]
    mistakes = [
        Examples([(corpus, number_N[rank::ranks])], seq_length, unit).unknown_id(vocab_size)
        for corpus, number_N, unit in sets
        if corpus.tokenizer_hash is None
    ]
    return [mistake for mistake in mistakes if mistake]


def examples_left(work: Work) -> int:
    """Examples that have no scores yet. Raises ValueError where scores of other inputs are there.

    "auto" depends on the checkpoints. Here it stands for the curvature of the scores that are there.
    """
    run, left = RunDir(Path(work.config.train.run)), 0
    for step in work.steps:
        path = step_path(run.checkpoints, step)
        curvature: str = work.influence.curvature
        manifest = next(iter(store.manifests(run.influence / path.name).values()), None)
        if curvature == "auto" and manifest:
            curvature = manifest.get("influence", {}).get("curvature", curvature)
        for part in work.parts(step, identity(path), curvature):
            store.check_inputs(part.directory, part.inputs)
            left += part.left()
    return left


def _check_settings(influence: InfluenceConfig, config: Config, probes: Sequence[Corpus]) -> list[str]:
    out = []
    if not influence.directions:
        out.append("influence.directions: empty; name a probing set for at least one capability")
    try:
        select(influence.layers, config.model.num_layers)
    except ValueError as error:
        out.append(str(error))
    if influence.norms and influence.method != "wgrad-dot":
        out.append(f"influence.norms: method={influence.method} forms no gradients; use method=wgrad-dot")
    if influence.per_token and influence.method != "ghost":
        out.append(f"influence.per_token: method={influence.method} knows no tokens; use method=ghost")
    if measured_on_examples(influence.curvature) and influence.unit == "document":
        kind = influence.curvature
        out.append(f"influence.curvature={kind}: not of documents, which pass in pieces; use unit=window")
    if influence.exclude_self and not (
        influence.method in ("wgrad-dot", "ghost")
        and influence.unit == "window"
        and influence.curvature in ("auto", "identity", "adam")
        and not influence.per_token
    ):
        out.append(
            "influence.exclude_self: an example's own part is exact of windows (unit=window), by "
            "method=wgrad-dot or ghost without per_token, under curvature=identity or adam; use these"
        )
    for name in ("norms", "per_token"):
        if getattr(influence, name) and influence.unit == "document":
            out.append(f"influence.{name}: not kept of documents, which pass in pieces; use unit=window")
        if getattr(influence, name) and config.parallel.context > 1:
            out.append(
                f"parallel.context={config.parallel.context}: influence.{name} needs whole sequences; set "
                f"parallel.context=1, any layout reads the run's checkpoints"
            )
    for probe in probes if influence.exclude_self else ():
        if min(probe.windows(config.data.seq_length), influence.probe_examples or 2) < 2:
            out.append(
                f"influence.exclude_self: nothing is left of the one probing window of {probe.name} without "
                f"it; raise influence.probe_examples, or set more documents aside"
            )
    return out


def _check_places(influence: InfluenceConfig, config: Config, available: Sequence[int]) -> list[str]:
    """Checkpoints that are not there."""
    if not available:
        return [f"{config.train.run}: no checkpoint to score yet; train first (tools/train.py)"]
    if absent := sorted(set(influence.steps) - set(available)):
        return [f"influence.steps={absent}: no such checkpoints; {config.train.run} has {available}"]
    return []


def _available_steps(run: Path) -> list[int]:
    """Checkpoints by their directories' names. `open_job` raises for incomplete ones."""
    return list(named(RunDir(run).checkpoints))


PASS = 1.15
"""Cost of exact scores of three capabilities, in training passes over the same tokens (docs/influence.md)."""


@dataclass(frozen=True)
class Demand:
    """What scoring passes through the model. Datasets or checkpoints that are not there count in full: every
    source has all its examples, and a probing set without `influence.probe_examples` is as large as all
    representative sets together."""

    rows: int
    """Of the examples, at each checkpoint."""
    probes: int
    """Windows of all probing sets, at each checkpoint."""
    checkpoints: int
    most: str
    """"at most " where something is not there, else empty."""
    without: str
    """What an estimate leaves out, or empty."""


def demand(config: Config, ranks: int | None = None) -> Demand:
    """Raises ConfigError if `ranks` ranks, which are to measure, do not fit the layout, and ValueError where
    neither steps nor checkpoints give a number of checkpoints."""
    influence = config.influence
    if influence is None:
        raise ConfigError(["influence: missing section; add a file that has it (see examples/influence)"])
    if mistakes := check_copies(config.parallel, ranks) if ranks else []:
        raise ConfigError([f"{mistakes[0]}, or give --peak-tflops for devices that are not here"])
    try:
        work = lay_plan(config)
        rows, probes, checkpoints, most = work.rows(), work.probe_windows(), len(work.steps), ""
    except ConfigError:
        rows = len(config.data.sources) * influence.examples
        probes = len(influence.directions) * (influence.probe_examples or rows)
        checkpoints, most = len(set(influence.steps)), "at most "
    if checkpoints == 0:
        raise ValueError(f"influence.steps is empty, and {config.train.run} has no checkpoints; give steps")
    measured = measured_on_examples(influence.curvature)
    without = "; without the passes of curvature" if measured else ""
    return Demand(rows, probes, checkpoints, most, without)


def estimate(config: Config, devices: int, peak_tflops: float, utilisation: float) -> str:
    """Device-hours of scoring on devices that are not here, and their arithmetic, in one line.

    `peak_tflops`: of one device. `utilisation`: share of it that the model's own operations get. Raises
    ValueError where these are not positive.
    """
    work = demand(config)
    if not (0 < peak_tflops < math.inf and 0 < utilisation <= 1 and devices > 0):
        raise ValueError(
            f"--peak-tflops {peak_tflops} must be positive and finite, "
            f"--utilisation {utilisation} above 0 and at most 1"
        )
    seq_length = config.data.seq_length
    per_token = config.model.flops_per_token(seq_length)
    # A direction takes an ordinary forward and backward pass over its probing set.
    tokens = [n * work.checkpoints * seq_length for n in (work.rows, work.probes)]
    hours = per_token * (PASS * tokens[0] + tokens[1]) / (1e12 * peak_tflops * utilisation) / 3600
    method = config.influence.method if config.influence else ""
    without = ("" if method == "wgrad-dot" else f"; {PASS} is of wgrad-dot") + work.without
    return (
        f"{work.rows:,} examples x {work.checkpoints} checkpoints, {work.most}{hours / devices:.3g} h on "
        f"{devices} devices: ({PASS} x {tokens[0]:.3g} tokens scored + {tokens[1]:.3g} for directions) x "
        f"{per_token:.3g} operations / ({peak_tflops:g} TFLOP/s x {utilisation:g}) = "
        f"{work.most}{hours:.3g} device-hours{without}"
    )
