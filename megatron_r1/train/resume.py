"""Whether a recipe can go on from what a run has done, and what `--check` prints of it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatron_r1 import config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.data import plan_file
from megatron_r1.data.blend import Phase
from megatron_r1.data.open import OpenData
from megatron_r1.records import CheckpointRef
from megatron_r1.run import ledger
from megatron_r1.run.layout import RunDir
from megatron_r1.run.stage import finish
from megatron_r1.train.metrics import read
from megatron_r1.train.schedule import late_edits, phase_spans


def last_checkpoint(config: Config) -> CheckpointRef | None:
    """The run's newest complete checkpoint."""
    saved = checkpoint_files.found(RunDir(Path(config.train.run)).checkpoints)
    return saved[-1] if saved else None


def is_finished(config: Config, data: OpenData) -> bool:
    """Whether the last checkpoint is the recipe's end. Raises ValueError where it is another recipe's."""
    last = last_checkpoint(config)
    if last is None or last.step < phase_spans(config)[-1].end:
        return False
    check_past(last.path, config, data, data.identities)
    checkpoint_files.check_model(last.path, config.model)
    return True


def check_past(path: Path, config: Config, data: OpenData, identities: Mapping[str, str]) -> None:
    """Raise ValueError where the data that a checkpoint has seen is not what this recipe would have drawn.

    `identities`: prefix -> identity of each dataset as it is now.
    """
    meta = checkpoint_files.read_meta(path)
    step, samples = meta["state"]["step"], meta["state"]["samples"]
    if samples != step * config.train.global_batch:
        raise ValueError(
            f"train.global_batch={config.train.global_batch}, but {path} has drawn {samples} samples in "
            f"{step} steps; phases are counted in steps, so keep train.global_batch={samples // step}, or "
            f"begin a new run"
        )
    plan_file.check_extends(data.plan, plan_file.from_json(meta["plan"], samples), samples)
    seen = plan_file.datasets_of(meta["plan"])
    now = {corpus.name: identities[str(corpus.prefix)] for corpus in data.corpora}
    other = [name for name in seen if data.plan.count(name, samples) and seen[name] != now[name]]
    if other:
        raise ValueError(
            f"the datasets of {', '.join(other)} are not those that {path} has drawn from: they were made "
            f"again, or replaced; restore them, or begin a new run"
        )


def edits(config: Config, step: int) -> list[str]:
    """What was changed since the run's configuration was last written, where `step` lies in it or behind."""
    # Of the first launch there is none; a damaged one is no obstacle.
    return late_edits(config_io.read_tree(RunDir(Path(config.train.run)).config, []), config, step)


def describe_start(config: Config, data: OpenData) -> list[str]:
    """What the trainer would begin with, in lines. Raises ValueError where it would refuse to go on."""
    run, last, end = config.train.run, last_checkpoint(config), phase_spans(config)[-1].end
    if is_finished(config, data):
        assert last is not None
        return [f"{run}: finished before, at {last.path}", *edits(config, end)]
    if last is not None:
        check_past(last.path, config, data, data.identities)
        checkpoint_files.check_model(last.path, config.model)
        return [
            f"{run}: goes on from {last.path}, {end - last.step:,} steps to go",
            *edits(config, last.step),
        ]
    begins = config.train.init_from or config.train.init_weights
    return [f"{run}: begins with {begins or 'random weights'}, {end:,} steps"]


def record_killed_launches(config: Config, step: int) -> None:
    """Tell the ledger of launches that ended before they could: killed, or by an error.

    Their checkpoints, and the time of their steps as far as metrics.jsonl has them, also of those that come
    again because they lie behind the checkpoint at `step`, which the run goes on from and to which that file
    is cut back afterwards.
    """
    run = RunDir(Path(config.train.run))
    told = [Path(path) for line in ledger.read(run.root) for path in line.get("outputs") or ()]
    names = [path.name.removeprefix("step_") for path in told if path.parent.name == "checkpoints"]
    last_told = max((int(name) for name in names if name.isdecimal()), default=0)
    lines = [line for line in read(run.metrics) if line["step"] > last_told]
    saved = [ref for ref in checkpoint_files.found(run.checkpoints) if last_told < ref.step <= step]
    for span in phase_spans(config):
        mine = [line for line in lines if line["phase"] == span.name]
        if not mine:
            continue
        outputs = [ref.path for ref in saved if span.start < ref.step <= span.end]
        sources, seen = config.data.sources, {}
        # One that was damaged since stands in nobody's way.
        with suppress(ValueError, IndexError):
            seen = plan_file.datasets_of(checkpoint_files.read_meta(outputs[-1])["plan"])
        finish(
            run.root,
            f"train {span.name}",
            devices=mine[-1].get("ranks", 1),
            tokens=sum(line["step"] <= step for line in mine) * config.tokens_per_step(),
            seconds=sum(line["seconds"] + line.get("saving_seconds", 0.0) for line in mine),
            inputs={sources[name].prefix: found for name, found in seen.items() if name in sources},
            outputs={str(path): checkpoint_files.identity(path) for path in outputs},
            again=True,
        )


def summary(config: Config, data: OpenData) -> str:
    """The resolved configuration, tokens per step, and per phase the weight and epochs of each source.

    Then where the run stands. Raises ConfigError where the data plan cannot be laid, ValueError where the run
    cannot go on with this.
    """
    plan = data.plan
    lines = [
        config_io.dump(config).rstrip(),
        "",
        f"model: {config.model.parameters():,} parameters",
        f"step: {config.train.global_batch} sequences x {config.data.seq_length} = "
        f"{config.tokens_per_step():,} tokens",
    ]
    samples = 0
    for name, laid in zip(config.phases, plan.phases, strict=True):
        steps = config.phase_steps(name)
        end = samples + steps * config.train.global_batch
        before, after = plan.epochs(samples), plan.epochs(end)
        weights = config.phase_weights(name)
        total = sum(weights.values())
        lines.append(f"phase {name}: {steps:,} steps, {steps * config.tokens_per_step():,} tokens")
        for corpus in data.corpora:
            share = weights.get(corpus.name, 0) / total
            lines.append(
                f"  {corpus.name:24s} {share:7.2%}  {after[corpus.name] - before[corpus.name]:8.3f} epochs"
                f"  ({after[corpus.name]:.3f} in all, {corpus.tokens:,} tokens){_kept(corpus.name, laid)}"
            )
        samples = end
    return "\n".join([*lines, "", *describe_start(config, data)])


def _kept(source: str, phase: Phase) -> str:
    """What a keep mask leaves of a source, and what its coming leaves unseen of the epoch in progress."""
    mask, unseen = phase.keep.get(source), phase.unseen.get(source)
    kept = f"; {mask.bitmap.kept:,} of {mask.bitmap.windows:,} windows kept" if mask else ""
    return kept + (f"; a new mask: {unseen:,} windows of the epoch before stay unseen" if unseen else "")
