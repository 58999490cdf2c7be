"""The past of a run: whether a recipe can go on from it, what `--check` prints, and the run's own records.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_r1 import config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.data import plan_file
from megatron_r1.data.blend import Phase
from megatron_r1.data.open import OpenData
from megatron_r1.records import CheckpointRef, TrainState
from megatron_r1.run import ledger
from megatron_r1.run.layout import RunDir
from megatron_r1.run.ledger import Hashes
from megatron_r1.run.stage import Standing, finish
from megatron_r1.system.errors import shown, some
from megatron_r1.system.files import sha256, write_text
from megatron_r1.system.process import RunLock
from megatron_r1.system.terminal import say
from megatron_r1.train.metrics import describe_lost, lost_steps, read
from megatron_r1.train.schedule import PhaseSpan, epochs_by_phase, late_edits, phase_spans


def standing(config: Config) -> tuple[Standing, CheckpointRef | None]:
    """Where the run stands by its newest complete checkpoint, and that checkpoint.

    `check_past` tells whether the checkpoint is this recipe's. Raises ValueError where the only checkpoints
    are damaged ones: a run that begins anew would write over what is known of the old one.
    """
    root = Path(config.train.run)
    there = next((path for path in (root, *root.absolute().parents) if os.path.lexists(path)), root)
    if not os.path.isdir(there):
        raise ValueError(f"train.run={root}: {there} is no directory; name another run directory")
    directory = RunDir(root).checkpoints
    saved = checkpoint_files.complete_checkpoints(directory)
    if not saved and (damaged := checkpoint_files.damaged(directory)):
        raise ValueError(
            f"{damaged[-1]} has lost its {checkpoint_files.META}, and the run has no other checkpoint to go "
            f"on from; restore the file, or remove {directory} to begin anew, or name another train.run"
        )
    if not saved:
        return Standing.NEW, None
    finished = saved[-1].step >= phase_spans(config)[-1].end
    return Standing.DONE if finished else Standing.GO_ON, saved[-1]


def is_finished(config: Config) -> bool:
    """Whether the run has come to its recipe's end."""
    return standing(config)[0] is Standing.DONE


def check_past(path: Path, config: Config, data: OpenData, drawn_from: Mapping[str, str]) -> None:
    """Raise ValueError if a checkpoint has seen other data than this recipe would have drawn.

    `drawn_from`: that of OpenData, as the first rank has it.
    """
    meta = checkpoint_files.read_meta(path)
    step, samples = meta["state"]["step"], meta["state"]["samples"]
    if samples != step * config.train.global_batch:
        raise ValueError(
            f"train.global_batch={config.train.global_batch}, but {path} has drawn {samples} samples in "
            f"{step} steps; phases are counted in steps, so keep train.global_batch={samples // step}, or "
            f"begin a new run"
        )
    # A step's tokens are its samples times their length, in checkpoints of every version.
    if samples and (before := meta["state"]["tokens"] // samples) != config.data.seq_length:
        raise ValueError(
            f"data.seq_length={config.data.seq_length}, but {path} has drawn windows of {before} tokens; the "
            f"same numbers would name other windows, so keep data.seq_length={before}, or begin a new run "
            f"(train.init_weights takes the weights alone)"
        )
    plan_file.check_extends(data.plan, plan_file.from_json(meta["plan"], samples), samples)
    seen = plan_file.datasets_of(meta["plan"])
    # Plans of earlier versions have no sample of the tokens.
    other = [
        name
        for name in seen
        if data.plan.count(name, samples)
        and seen[name] not in (drawn_from[name], drawn_from[name].partition("+")[0])
    ]
    if other:
        raise ValueError(
            f"the datasets of {', '.join(other)} are not those that {path} has drawn from: they were made "
            f"again, or replaced; restore them, or begin a new run"
        )


def check_teacher(state: TrainState, span: PhaseSpan, identities: Mapping[str, str]) -> None:
    """Raise ValueError if a run that stands within a phase has learnt from something else at the same path.

    `identities`: path -> identity of the phase's teacher or cache as it is now. What stands behind a "+" in
    one may change: a cache grows while a phase trains from it.
    """
    lasting = {name: was.partition("+")[0] for name, was in state.teacher.items()}
    changed = [name for name, was in lasting.items() if not identities.get(name, was).startswith(was)]
    if changed and state.step > span.start:
        raise ValueError(
            f"phases.{span.name}.objective: {some(changed, most=8)} is not what the steps to {state.step} "
            f"learnt from: it has changed since; restore it, or name another path to go on with that"
        )


def to_come(config: Config) -> Config:
    """The configuration without the objectives of phases that are over, whose teachers may be gone."""
    _, last = standing(config)
    phases = dict(config.phases)
    for span in phase_spans(config):
        if last and span.end <= last.step:
            phases[span.name] = replace(span.config, objective=None)
    return replace(config, phases=phases)


def plan_text(data: OpenData, drawn_from: Mapping[str, str]) -> str:
    """The data plan as JSON, for checkpoints and `RUN/plan.json`; `drawn_from` as of `check_past`."""
    return plan_file.to_json(data.plan, drawn_from)


def edits(config: Config, step: int) -> list[str]:
    """Changes since the run's configuration was last written, where they touch phases that have begun."""
    # The first launch finds no config.yaml, and a damaged one is no obstacle.
    return late_edits(config_io.read_tree(RunDir(Path(config.train.run)).config, []), config, step)


def describe_start(config: Config, data: OpenData) -> list[str]:
    """Lines that say where training would begin. Raises ValueError if the recipe does not fit the run."""
    run, end, (state, last) = config.train.run, phase_spans(config)[-1].end, standing(config)
    if last is None:
        check_beginning(config, data)
        begins = config.train.init_from or config.train.init_weights
        return [*_losses(config, 0), f"{run}: begins with {begins or 'random weights'}, {end:,} steps"]
    check_past(last.path, config, data, data.drawn_from)
    checkpoint_files.check_model(last.path, config.model)
    if state is Standing.DONE:
        return [*_losses(config, end), f"{run}: finished before, at {last.path}", *edits(config, end)]
    going = f"{run}: goes on from {last.path}, {end - last.step:,} steps to go"
    return [*_losses(config, last.step), going, *edits(config, last.step)]


def check_beginning(config: Config, data: OpenData) -> None:
    """Raise ValueError if a new run cannot begin with the checkpoint that the configuration names."""
    train, fresh = config.train, standing(config)[1] is None
    if fresh and train.init_weights:
        but = checkpoint_files.NOT_WEIGHTS
        checkpoint_files.check_model(Path(train.init_weights), config.model, but, train.expect)
    elif fresh and train.init_from:
        checkpoint_files.check_model(Path(train.init_from), config.model, expect=train.expect)
        check_past(Path(train.init_from), config, data, data.drawn_from)


def _losses(config: Config, step: int, lines: list[dict[str, Any]] | None = None) -> list[str]:
    """What the run directory has lost of the steps to `step`, and which steps after it are trained again.

    `lines`: those of metrics.jsonl, where they were read.
    """
    run = RunDir(Path(config.train.run))
    steps = [line["step"] for line in (read(run.metrics) if lines is None else lines)]
    out = []
    if damaged := checkpoint_files.damaged(run.checkpoints):
        out.append(
            f"{run.root}: warning: {', '.join(path.name for path in damaged)} cannot be read (damaged, or "
            f"another version's); the run goes on without"
        )
    if foreign := checkpoint_files.foreign(run.checkpoints):
        names = some([*map(shown, foreign)], most=8)
        out.append(f"{run.checkpoints}: {names}: no checkpoints of this run by their names, left alone")
    if damage := ledger.describe_damage(run.root):
        out.append(f"{run.root}: warning: {damage}")
    if lost := lost_steps(steps, first_step(run, config, steps), step):
        out.append(f"{run.root}: warning: {describe_lost(run.metrics, lost)}; the report marks them")
    if max(steps, default=0) > step:
        out.append(f"{run.root}: steps {step + 1:,} to {max(steps):,} were trained and are trained again")
    return out


def first_step(run: RunDir, config: Config, steps: Iterable[int]) -> int:
    """The first step of a run: 1, or that behind the checkpoint that it branched off.

    Where neither the configuration nor the ledger tells that, the first of `steps`, which were recorded.
    """
    if config.train.init_weights:
        return 1
    launches = [line["inputs"] for line in ledger.read(run.root) if line["stage"][:6] == "train "]
    for path in map(Path, [config.train.init_from or "", *(launches[0] if launches else ())]):
        number = path.name.removeprefix("step_")
        if path.parent.name == "checkpoints" and number.isdecimal():
            return int(number) + 1
    return min(steps, default=1) if config.train.init_from else 1


def way_on(run: RunDir, span: PhaseSpan, step: int, best: tuple[float, int] | None) -> str:
    """What a user may do about a run that the step guard has stopped at `step`.

    `best`: the lowest median loss of the phase and its step, None before the first median.
    """
    # The update of the best step itself may be the one that did the harm.
    earlier = [n for n in checkpoint_files.saved_steps(run.checkpoints) if best and n < best[1]]
    path_of = partial(checkpoint_files.step_path, run.checkpoints)
    back = f"move the checkpoints after {path_of(earlier[-1])} away" if earlier else "begin a new run"
    return (
        f"{path_of(step)} is saved. To go back, {back} and lower phases.{span.name}.learning_rate. To go on "
        f"from here, start the same command, which stops again if the loss stays; with health.loss_spike=0 "
        f"health.max_skipped={span.steps + 1} it does not"
    )


def record_start(config: Config, step: int, plan: str) -> None:
    """Bring the run directory up to date with a launch that begins at `step`.

    Says edits and losses, adds the ledger lines of killed launches, writes config.yaml and plan.json.
    """
    run = RunDir(Path(config.train.run))
    for line in edits(config, step):
        say(f"{run.root}: {line}")
    lines = read(run.metrics)
    for line in _losses(config, step, lines):
        say(line)
    record_killed_launches(config, step, lines)
    write_text(run.config, config_io.dump(config))
    write_text(run.plan, plan)


def record_end(config: Config) -> None:
    """Add the ledger line of a finished run whose last launch was killed before it could."""
    run, end = RunDir(Path(config.train.run)), phase_spans(config)[-1].end
    if _last_recorded(run) < end:
        lock = RunLock(run.root)
        lock.take()
        record_killed_launches(config, end)
        lock.release()


def masks_of(span: PhaseSpan) -> dict[str, str]:
    """Keep mask of the phase -> SHA-256 of its file, where that is there."""
    return {path: sha256(path) for path in span.config.keep.values() if Path(path).is_file()}


def record_phase(
    run: RunDir,
    name: str,
    devices: int,
    tokens: int,
    seconds: float | None,
    inputs: Hashes,
    checkpoints: Iterable[Path],
) -> None:
    """Add the ledger line of one launch's part of a phase, and the checkpoints that it wrote.

    `seconds` None: the age of this process.
    """
    finish(
        run.root,
        f"train {name}",
        devices=devices,
        tokens=tokens,
        seconds=seconds,
        inputs=inputs,
        outputs={str(path): checkpoint_files.identity(path) for path in checkpoints},
        again=True,
    )


def record_killed_launches(config: Config, step: int, lines: list[dict[str, Any]] | None = None) -> None:
    """Add ledger lines for launches that were killed.

    Counts their checkpoints and step times from metrics.jsonl, including steps after `step`, which will be
    trained again. Call this before metrics.jsonl is truncated to `step`. `lines`: its lines, where they were
    read.
    """
    run = RunDir(Path(config.train.run))
    last = _last_recorded(run)
    lines = [line for line in (read(run.metrics) if lines is None else lines) if line["step"] > last]
    saved = [ref for ref in checkpoint_files.complete_checkpoints(run.checkpoints) if last < ref.step <= step]
    for span in phase_spans(config):
        mine = [line for line in lines if line.get("phase") == span.name]
        if not mine:
            continue
        outputs = [ref.path for ref in saved if span.start < ref.step <= span.end]
        sources, seen, teacher = config.data.sources, {}, {}
        # A checkpoint that was damaged since is no obstacle.
        with suppress(ValueError, IndexError):
            meta = checkpoint_files.read_meta(outputs[-1])
            seen, teacher = plan_file.datasets_of(meta["plan"]), meta["state"].get("teacher", {})
        record_phase(
            run,
            span.name,
            devices=mine[-1].get("ranks", 1),
            tokens=sum(line["step"] <= step for line in mine) * config.tokens_per_step(),
            seconds=sum(line.get("seconds", 0.0) + line.get("saving_seconds", 0.0) for line in mine),
            inputs={sources[name].prefix: seen[name].partition("+")[0] for name in seen if name in sources}
            | masks_of(span)
            | teacher,
            checkpoints=outputs,
        )


def _last_recorded(run: RunDir) -> int:
    """Step of the newest checkpoint that the ledger names, 0 where it names none."""
    recorded = [Path(path) for line in ledger.read(run.root) for path in line["outputs"]]
    names = [path.name.removeprefix("step_") for path in recorded if path.parent.name == "checkpoints"]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def summary(config: Config, data: OpenData) -> str:
    """The resolved configuration, tokens per step, and per phase the weight and epochs of each source.

    Then where the run stands. Raises ConfigError where the data plan cannot be laid, ValueError where the run
    cannot go on with this.
    """
    tokens = config.tokens_per_step()
    lines = [
        config_io.dump(config).rstrip(),
        "",
        f"model: {config.model.parameters():,} parameters",
        f"step: {config.train.global_batch} sequences x {config.data.seq_length} = {tokens:,} tokens",
    ]
    phases = zip(epochs_by_phase(config, data.plan), data.plan.phases, strict=True)
    for (span, epochs, in_all), laid in phases:
        lines.append(f"phase {span.name}: {span.steps:,} steps, {span.steps * tokens:,} tokens")
        lines += [
            f"  {corpus.name:24s} {span.share[corpus.name]:7.2%}  {epochs[corpus.name]:8.3f} epochs"
            f"  ({in_all[corpus.name]:.3f} in all, {corpus.tokens:,} tokens){_kept(corpus.name, laid)}"
            for corpus in data.corpora
        ]
    return "\n".join([*lines, "", *describe_start(config, data)])


def _kept(source: str, phase: Phase) -> str:
    """Windows of a source that a keep mask leaves, and windows that the mask's coming leaves unseen."""
    mask, unseen = phase.keep.get(source), phase.unseen.get(source)
    kept = f"; {mask.bitmap.kept:,} of {mask.bitmap.windows:,} windows kept" if mask else ""
    return kept + (f"; a new mask: {unseen:,} windows of the epoch before stay unseen" if unseen else "")
