"""What a report is made from: the files of a run, of its control, and the influence scores."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.influence.store import Scored, read_scores, scored
from megatron_r1.records import ScoreTable
from megatron_r1.run import ledger
from megatron_r1.run.layout import RunDir
from megatron_r1.system.errors import suggest_path
from megatron_r1.train.metrics import read as read_metrics


@dataclass(frozen=True)
class Run:
    root: Path
    config: Config
    metrics: list[dict[str, Any]]
    """One line a step, in order; never empty."""
    stages: list[dict[str, Any]]
    """The ledger's lines, in order; of a report's own run also those of the stages that it stands on."""

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def sources(self) -> list[str]:
        return list(self.config.data.sources)

    @property
    def domains(self) -> dict[str, str]:
        """Source -> domain, sources of a domain side by side."""
        named = {name: s.domain or "other" for name, s in self.config.data.sources.items()}
        order = list(dict.fromkeys(named.values()))
        return dict(sorted(named.items(), key=lambda item: order.index(item[1])))

    @property
    def phases(self) -> list[str]:
        """Phases that have trained at least a step, in order."""
        return list(dict.fromkeys(line["phase"] for line in self.metrics))

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """(phase, tokens before its first step, tokens after its last), in order."""
        out, begin = [], float(self.metrics[0]["tokens"] - self.config.tokens_per_step())
        for phase in self.phases:
            out.append((phase, begin, float(self.last_of(phase)["tokens"])))
            begin = out[-1][2]
        return out

    def last_of(self, phase: str) -> dict[str, Any]:
        return next(line for line in reversed(self.metrics) if line["phase"] == phase)

    @property
    def end(self) -> dict[str, Any]:
        return self.metrics[-1]

    def points(self, name: str, of: str | None = None) -> list[tuple[float, float]]:
        """(tokens, value) of the steps at which a figure, of one source or capability where it has one for
        each, was measured and is a number."""
        found = []
        for line in self.metrics:
            value = line.get(name)
            value = value if of is None or value is None else value.get(of)
            if value is not None and math.isfinite(value):
                found.append((float(line["tokens"]), float(value)))
        return found

    @property
    def probed(self) -> list[dict[str, Any]]:
        """Lines that carry held-out losses."""
        return [line for line in self.metrics if line.get("probe_nll")]


@dataclass(frozen=True)
class Reading:
    """A run with everything that was measured about it."""

    run: Run
    control: Run | None = None
    scores: list[ScoreTable] = field(default_factory=list)
    scored: dict[str, list[Scored]] = field(default_factory=dict)
    """Source -> where its scores lie, checkpoint by checkpoint."""
    mix: dict[str, Any] | None = None
    """What tools/make_mix.py wrote beside the weights (RUN/mix.json)."""
    measured_impact: dict[str, dict[str, float]] = field(default_factory=dict)
    """Capability -> source -> how much higher its loss is without the source, nats (Eq. 1); from
    RUN/measured_impact.json, which whoever trains runs without sources writes."""
    tokenizer: Path | None = None
    """Model of the tokenizer that made the datasets; None: one that lies in the run, if any."""

    @property
    def arms(self) -> list[tuple[str, Run]]:
        """Name -> run: the last phases' names where those tell the arms apart."""
        if self.control is None:
            return [(self.run.phases[-1], self.run)]
        names = self.run.phases[-1], self.control.phases[-1]
        if names[0] == names[1]:
            names = self.run.name, self.control.name
        return [(names[0], self.run), (names[1], self.control)]


def read_run(root: Path) -> Run:
    """A run directory. Raises ValueError, with the way out, where there is nothing to report on."""
    files = RunDir(root)
    if not files.config.is_file():
        raise ValueError(
            f"{files.config}: no such file; name a run directory that tools/train.py has written"
            f"{suggest_path(root)}"
        )
    metrics = read_metrics(files.metrics)
    if not metrics:
        raise ValueError(f"{files.metrics}: no step recorded yet; train first: tools/train.py {files.config}")
    return Run(root, config_io.load([str(files.config)]), metrics, ledger.read(root))


def read_all(root: Path, control: Path | None = None, tokenizer: Path | None = None) -> Reading:
    """A run, its control (by default RUN/control, where that has begun) and its influence scores."""
    run = read_run(root)
    stages = sorted([*ledger.lineage(root), *run.stages], key=lambda line: str(line["finished"]))
    run = replace(run, stages=stages)
    if control is None and RunDir(root / "control").metrics.is_file():
        control = root / "control"
    mix = root / "mix.json"
    impact = root / "measured_impact.json"
    return Reading(
        run,
        read_run(control) if control else None,
        read_scores(root, run.sources),
        scored(root, run.sources),
        _mix(mix) if mix.is_file() else None,
        _measured_impact(impact) if impact.is_file() else {},
        tokenizer,
    )


def _mix(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make the mixture again, or move it away") from None
    return found


def _measured_impact(path: Path) -> dict[str, dict[str, float]]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return {c: {name: float(v) for name, v in of.items()} for c, of in read.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not {{capability: {{source: nats}}}} ({error}); write it so, or move it away"
        ) from None
