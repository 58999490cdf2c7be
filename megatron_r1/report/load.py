"""A report's inputs: the files of a run, of its control, and the influence scores."""

from __future__ import annotations

import math
import os
from array import array
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megatron_r1 import config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config, MixConfig
from megatron_r1.influence.store import Scored, read_scores, scored
from megatron_r1.records import ScoreTable
from megatron_r1.run import ledger
from megatron_r1.run.layout import RunDir
from megatron_r1.system.errors import rewording, suggest_path
from megatron_r1.system.json_io import JsonError, mistake, read_json, read_object
from megatron_r1.system.terminal import say
from megatron_r1.train.metrics import describe_lost, lost_steps, read_lines, tell_repeated
from megatron_r1.train.resume import first_step

_GROUPS = ("loss_by_source", "tokens_by_source", "probe_nll", "validation_nll", "gold_bpb", "kd")
"""Of a step's line: values by source, capability or figure that become columns. The others are read at phase
ends."""
_NEEDED = ("phase", "tokens", "mix_target", "mix_actual", "epochs_by_source", "tokens_by_source")
"""Of a step's line: values that figures and tables rely on."""
_MOST_JSON = 16 << 20
"""Bytes of a file beside a run that people and tools write. Genuine ones have some kB."""
_EXAMPLES = [{"text": str, "score?": (float, None)}]
_STAGE = {"stage": str, "in": int, "kept": int, "threshold?": (float, None), "fallback?": bool}
_STAGE |= {"examples": {"kept": _EXAMPLES, "dropped": _EXAMPLES}}
_SOURCE = {"documents?": (float, None), "read": int, "stages": [_STAGE]}
_MOST_FUNNEL = 1 << 20
"""Letters of a funnel. That of 14 sources with all examples has 200,000."""
_UNLIKE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What reading JSON of another form ends in."""
Line = dict[str, Any]
"""Of metrics.jsonl, or of a ledger."""
Points = tuple[np.ndarray, np.ndarray]
"""Tokens, values."""


@dataclass(frozen=True)
class Run:
    root: Path
    config: Config
    columns: dict[str, np.ndarray]
    """Metric, or "metric/source" -> float64 [T], T recorded steps; NaN where it was not measured."""
    first: Line
    """The first step's line."""
    last: dict[str, Line]
    """Phase that has trained at least a step, in order -> its last step's line."""
    stages: list[Line]
    """The ledger's lines, in order; of a report's own run also those of the stages that it stands on."""
    lost: list[tuple[int, int]] = field(default_factory=list)
    """Stretches of steps, first and last, that were trained and whose lines are gone from metrics.jsonl."""

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def domains(self) -> dict[str, str]:
        """Source -> domain."""
        return {name: source.domain or "other" for name, source in self.config.data.sources.items()}

    @property
    def phases(self) -> list[str]:
        return list(self.last)

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """(phase, tokens before its first step, tokens after its last), in order."""
        ends = [float(line["tokens"]) for line in self.last.values()]
        begins = [float(self.first["tokens"] - self.config.tokens_per_step()), *ends]
        return list(zip(self.last, begins, ends, strict=False))

    @property
    def end(self) -> dict[str, Any]:
        return self.last[self.phases[-1]]

    @property
    def reach(self) -> float:
        """Tokens after the last step, whether its line is there or lost."""
        return max([float(self.end["tokens"]), *(self.config.tokens_per_step() * b for _, b in self.lost)])

    @property
    def skipped(self) -> np.ndarray:
        """Rows of the steps whose update was left out."""
        return np.flatnonzero(np.nan_to_num(self.columns.get("skipped", np.zeros(0))) > 0)

    def points(self, name: str) -> Points:
        """The steps at which a metric was measured and is a number."""
        tokens = self.columns["tokens"]
        values = self.columns.get(name, np.full(len(tokens), np.nan))
        # Sums of larger ones would not be numbers.
        are = np.abs(np.nan_to_num(values, nan=np.inf)) < 1e100
        return tokens[are], values[are]

    def measured(self, group: str) -> list[str]:
        """Sources or capabilities for which a metric was ever a number."""
        names = [name.partition("/")[2] for name in self.columns if name.startswith(f"{group}/")]
        return [name for name in names if len(self.points(f"{group}/{name}")[0])]


@dataclass(frozen=True)
class Reading:
    """A run with everything that was measured about it."""

    run: Run
    control: Run | None = None
    scores: list[ScoreTable] = field(default_factory=list)
    scored: dict[str, list[Scored]] = field(default_factory=dict)
    """Source -> where its scores lie, checkpoint by checkpoint."""
    mix: dict[str, Any] | None = None
    """RUN/mix.json, by tools/make_mix.py."""
    measured_impact: dict[str, dict[str, float]] = field(default_factory=dict)
    """Capability -> source -> how much higher its loss is without the source, nats (Eq. 1); from
    RUN/measured_impact.json, which whoever trains runs without sources writes."""
    funnel: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Source -> documents that the stages of curation read and kept, of the form `_SOURCE`."""
    tokenizer: Path | None = None
    """Model of the tokenizer that made the datasets; None: one that lies in the run, if any."""

    @property
    def arms(self) -> dict[str, Run]:
        """Name -> run: the last phases' names where those tell the arms apart."""
        both = [self.run, *([self.control] if self.control else [])]
        for names in ([run.phases[-1] for run in both], [run.name for run in both]):
            if len({*names}) == len(both):
                return dict(zip(names, both, strict=True))
        return {"run": self.run, "control": both[-1]}


def read_run(root: Path, branch: bool = False) -> Run:
    """A run directory. Raises ValueError, with the way out, where there is nothing to report on.

    `branch`: it may begin at any step, as a control does.
    """
    files = RunDir(root)
    if not files.config.is_file():
        way_out = f"name a run directory that tools/train.py has written{suggest_path(root)}"
        raise ValueError(f"{files.config}: no such file; {way_out}")
    config = config_io.load([str(files.config)])
    columns, first, last = _read_metrics(files.metrics, config)
    saved = checkpoint_files.saved_steps(files.checkpoints)
    if not last:
        first_train = f"no step recorded yet; train first: tools/train.py {files.config}"
        restore = f"has lost its lines, for step {saved[-1]:,} was saved; restore it" if saved else ""
        raise ValueError(f"{files.metrics}: {restore or first_train}")
    steps = columns["step"].astype(int).tolist()
    begin = min(steps) if branch else first_step(files, config, steps)
    if lost := lost_steps(steps, begin, max([*steps, *saved])):
        say(f"warning: {describe_lost(files.metrics, lost)}; the page marks them")
    if damage := ledger.describe_damage(root):
        say(damage)
    return Run(root, config, columns, first, last, ledger.read(root), lost)


def _read_metrics(path: Path, config: Config) -> tuple[dict[str, np.ndarray], Line, dict[str, Line]]:
    """Columns, first line, and last line by phase. Holds 8 bytes a number, for runs of millions of steps.

    Leaves out lines of phases that the configuration does not have, and names
    beyond those that a run of as many sources and probes writes.
    """
    columns: dict[str, array[float]] = {}
    first: dict[str, Any] = {}
    last: dict[str, dict[str, Any]] = {}
    most = 200 + 2 * len(_GROUPS) * (
        len(config.data.sources) + len(config.data.probes) + len(config.data.gold)
    )
    lines = (line for line in read_lines(path, _NEEDED) if line["phase"] in config.phases)
    for count, line in enumerate(lines):
        values = {k: v for k, v in line.items() if isinstance(v, (int, float))}
        for group in _GROUPS:
            values |= {f"{group}/{name}": v for name, v in line.get(group, {}).items()}
        for name in [name for name in values if name not in columns][: max(0, most - len(columns))]:
            columns[name] = array("d", [math.nan]) * count
        for name, column in columns.items():
            column.append(values.get(name, math.nan))
        step, phase = line["step"], line["phase"]
        first = line if not first or step <= first["step"] else first
        last[phase] = line if phase not in last or step >= last[phase]["step"] else last[phase]
    if not first:
        return {}, first, last
    # In the order of the steps. Of several lines of a step, the last.
    step_T = np.array(columns["step"])[::-1]
    row_T = len(step_T) - 1 - np.unique(step_T, return_index=True)[1]
    tell_repeated(path, len(step_T) - len(row_T))
    last = dict(sorted(last.items(), key=lambda item: item[1]["step"]))
    return {name: np.array(column)[row_T] for name, column in columns.items()}, first, last


def read_all(root: Path, control: Path | None = None, tokenizer: Path | None = None) -> Reading:
    """A run, its control (by default RUN/control, where that has begun) and its influence scores."""
    if control is not None and os.path.realpath(control) == os.path.realpath(root):
        raise ValueError(f"--control {control} is the run itself; name the run to compare it with")
    run = read_run(root)
    stages = sorted([*ledger.lineage(root), *run.stages], key=lambda line: str(line["finished"]))
    if control is None and RunDir(root / "control").metrics.is_file():
        control = root / "control"
    sources = run.config.data.sources
    return Reading(
        replace(run, stages=stages),
        read_run(control, branch=True) if control else None,
        read_scores(root, sources),
        scored(root, sources),
        _made_mix(root / "mix.json"),
        _measured_impact(root / "measured_impact.json"),
        _funnel(run.config),
        tokenizer,
    )


def _read_json(path: Path, way_out: str) -> Any:
    """None where the file is not there."""
    with rewording(lambda error: f"{error}; {way_out}", JsonError):
        return read_json(path, _MOST_JSON) if os.path.lexists(path) else None


def _made_mix(path: Path) -> dict[str, Any] | None:
    way_out = "make the mixture again, or move it away"
    made: dict[str, Any] | None = _read_json(path, way_out)
    if made is None:
        return None
    fault = f"{path} is damaged"
    with rewording(lambda error: f"{fault} ({' '.join(str(error).split())[:80]}); {way_out}", *_UNLIKE):
        shape = len(made["capabilities"]), len(set(made["steps"]))
        alpha_CK = np.array(made["alpha"], dtype=np.float64)
        mix_settings(made)
        if alpha_CK.shape != shape or 0 in shape or not (np.abs(alpha_CK) < 1e100).all():
            raise ValueError("its alpha")
    return made


def mix_settings(made: dict[str, Any]) -> MixConfig:
    """The settings of mix in a mix.json, without those that this program does not know."""
    known = {f.name for f in fields(MixConfig)}
    settings = {k: v for k, v in made.get("mix", {}).items() if k in known}
    return TypeAdapter(MixConfig).validate_python({"phase": "any"} | settings)


def _measured_impact(path: Path) -> dict[str, dict[str, float]]:
    way_out = "write it as {capability: {source: nats}}, or move it away"
    read = _read_json(path, way_out) or {}
    fault = f"{path}: not {{capability: {{source: nats}}}}"
    with rewording(lambda error: f"{fault} ({error!s:.80}); {way_out}", *_UNLIKE):
        return {c: {name: float(v) for name, v in of.items()} for c, of in read.items()}


def _funnel(config: Config) -> dict[str, dict[str, Any]]:
    """From the manifests beside the probing sets. They lie outside the run, and one of another form costs no
    more than the figure: a line names it."""
    found: dict[str, dict[str, Any]] = {}
    for folder in dict.fromkeys(Path(prefix).parent for prefix in config.data.probes.values()):
        path = folder / "manifest.json"
        try:
            # Sets that were cut from the ends of sources have no funnel.
            theirs = read_object(path, _MOST_JSON).get("funnel", {}) if os.path.lexists(path) else {}
            if wrong := mistake(theirs, {str: _SOURCE}) or " is too long" * (len(str(theirs)) > _MOST_FUNNEL):
                raise ValueError(f"{path}: funnel{wrong}")
            found |= theirs
        except (OSError, ValueError) as error:
            say(f"warning: {error}; the page shows no funnel of it")
    return found
