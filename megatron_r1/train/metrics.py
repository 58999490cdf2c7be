"""Reports of a run: one JSON line a step, the same figures in TensorBoard, and a log of each rank."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.blend import BlendPlan
from megatron_r1.records import TrainState
from megatron_r1.run.layout import RunDir
from megatron_r1.run.ledger import is_number, read_jsonl
from megatron_r1.system.errors import some
from megatron_r1.system.files import make_folder, naming, ours, write_text
from megatron_r1.system.terminal import say
from megatron_r1.train.health import stragglers
from megatron_r1.train.loggers import Logger, build_loggers
from megatron_r1.train.loggers import require_packages as require_packages
from megatron_r1.train.schedule import PhaseSpan

if TYPE_CHECKING:
    from megatron_r1.train.step import StepResult


class MetricsLog:
    """`RUN/metrics.jsonl` and `RUN/tb`, cut back to `step` so that a resumed run writes no step twice."""

    def __init__(self, run: RunDir, step: int, others: Sequence[Logger] = ()):
        # Imported here: half a second that the other ranks need not spend.
        from torch.utils.tensorboard import SummaryWriter

        if run.metrics.exists():
            kept = [line for line in read(run.metrics) if line["step"] <= step]
            write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        make_folder(run.root)
        self._run = run
        self._file = open(run.metrics, "a", encoding="utf-8", opener=ours)  # noqa: SIM115  (open as long as the run)
        with naming(run.tensorboard):
            self.board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
        self._others = others

    def write(self, line: dict[str, Any]) -> None:
        """Nested groups become TensorBoard's `group/name`."""
        with naming(self._run.metrics):
            self._file.write(json.dumps(line) + "\n")
        self._show(_scalars(line), line["step"])
        self._last = line

    def _show(self, scalars: dict[str, float], step: int) -> None:
        with naming(self._run.tensorboard):
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        for other in self._others:
            other.log(scalars, step)

    def add_saving(self, seconds: float) -> None:
        """Add the wait for the launch's last checkpoint to the last line that was written."""
        self.flush()
        line, old = self._last, len(json.dumps(self._last)) + 1
        line["saving_seconds"] += seconds
        # One write, and no shorter than what it replaces.
        with naming(self._run.metrics), open(self._run.metrics, "r+b", 0, opener=ours) as file:
            file.seek(-old, os.SEEK_END)
            file.write(json.dumps(line).encode().ljust(old - 1) + b"\n")
        self._show({_GROUPS["saving_seconds"]: line["saving_seconds"]}, line["step"])

    def flush(self) -> None:
        with naming(self._run.metrics):
            self._file.flush()
        with naming(self._run.tensorboard):
            self.board.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        self.board.close()
        for other in self._others:
            other.close()


def open_log(run: RunDir, step: int, config: Config) -> MetricsLog:
    """The log of a run that stands at `step`, with its other loggers.

    TensorBoard also shows the configuration as text, and its scalars as hyper-parameters.
    """
    from torch.utils.tensorboard.summary import hparams

    log = MetricsLog(run, step, build_loggers(run, config.train))
    log.board.add_text("configuration", f"```yaml\n{config_io.dump(config)}```", step)
    for summary in hparams(_hyper_parameters(config), {}):
        log.board._get_file_writer().add_summary(summary, step)
    return log


class RankLog:
    """`RUN/logs/rank_N.log`: a line a step of what this rank did; the first rank's also says the loss."""

    def __init__(self, path: Path):
        make_folder(path.parent)
        self._path = path
        self._file = open(path, "a", 1, "utf-8", opener=ours)  # noqa: SIM115  (open as long as the run)

    def write(self, text: str) -> None:
        with naming(self._path):
            self._file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def close(self) -> None:
        self._file.close()


def step_line(
    config: Config, plan: BlendPlan, span: PhaseSpan, state: TrainState, result: StepResult
) -> dict[str, Any]:
    """Progress of the step that led to `state`; losses in nats a label."""
    drawn = {name: plan.count(name, state.samples) for name in span.share}
    before = span.start * config.train.global_batch
    in_phase = {name: n - plan.count(name, before) for name, n in drawn.items()}
    total = sum(in_phase.values())
    masks = next(phase.keep for phase in plan.phases if phase.start == before)
    loss_N, tokens_N = result.loss_N.tolist(), result.tokens_N.tolist()
    labels = zip(span.share, loss_N, tokens_N, strict=True)
    line = {
        "step": state.step,
        "phase": span.name,
        "samples": state.samples,
        "tokens": state.tokens,
        "loss": result.loss(),
        "loss_by_source": {name: loss / tokens for name, loss, tokens in labels if tokens},
        "tokens_by_source": {name: n * config.data.seq_length for name, n in drawn.items()},
        "epochs_by_source": plan.epochs(state.samples),
        "mix_target": span.share,
        "mix_actual": {name: n / total for name, n in in_phase.items()},
        "learning_rate": span.learning_rate(state.step - 1),
        "grad_norm": result.grad_norm,
        "skipped": int(result.left_out),
    }
    if result.figures:
        line["kd"] = result.figures
    if masks:
        line["kept_by_source"] = {name: m.bitmap.kept / m.bitmap.windows for name, m in masks.items()}
    return line


def cost_line(config: Config, seconds: float, saving: float, busy_R: list[float]) -> dict[str, Any]:
    """Cost of a step: it took `seconds`, and checkpoints held it up for `saving` seconds.

    `busy_R`: seconds that each rank was busy in the last step of which this is known. `mfu` counts the
    student's FLOP alone, where a teacher runs beside it.
    """
    # Imported here: it needs torch, and whoever reads a run's lines does not.
    from megatron_r1 import backend

    slowest, ratio = stragglers(busy_R)
    line = {
        "slowest_rank": slowest,
        "slowest_ratio": ratio,
        "memory_bytes": backend.peak_memory(),
        "ranks": len(busy_R),
        "seconds": seconds,
        "saving_seconds": saving,
        "tokens_per_second": config.tokens_per_step() / seconds,
    }
    if peak := backend.peak_flops(config.train.precision):
        flops = config.model.flops_per_token(config.data.seq_length) * config.tokens_per_step() / seconds
        line["mfu"] = flops / (peak * len(busy_R))
    return line


def rank_line(line: Mapping[str, Any], busy: float, leads: bool, progress: str) -> str:
    """A step in the log of one rank, which was busy for `busy` seconds. The first rank's has the figures."""
    mine = f"busy {busy:.3f} s of {line['seconds']:.3f}"
    if not leads:
        return f"step {line['step']} | {mine}"
    return (
        f"step {line['step']} | loss {line['loss']:.4f} | lr {line['learning_rate']:.3e} | grad norm "
        f"{line['grad_norm']:.3f} | {line['tokens_per_second']:,.0f} tokens/s | {mine} | slowest rank "
        f"{line['slowest_rank']} ({line['slowest_ratio']:.2f}x) | {progress}"
    )


def _hyper_parameters(config: Config) -> dict[str, bool | str | float]:
    """TensorBoard's table: every scalar field of the sections that decide a run, by its dotted name."""
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "optimizer", "train")}
    for name, phase in config.phases.items():
        sections[f"phases.{name}"] = dataclasses.asdict(phase)
    return {
        f"{section}.{key}": value
        for section, fields in sections.items()
        for key, value in fields.items()
        if isinstance(value, bool | str | int | float)
    }


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """`group/name` -> value of everything in a step's line that is a number."""
    out: dict[str, float] = {}
    for key, value in line.items():
        group = _GROUPS.get(key, key)
        if isinstance(value, dict):
            out |= {f"{group}/{name}": leaf for name, leaf in value.items()}
        elif isinstance(value, (int, float)) and key != "step":
            out[group] = value
    return out


_GROUPS = {
    "loss": "loss/train",
    "learning_rate": "schedule/learning_rate",
    "grad_norm": "health/grad_norm",
    "rank_me": "health/rank_me",
    "skipped": "health/skipped",
    "one_id_windows": "health/one_id_windows",
    "slowest_rank": "health/slowest_rank",
    "slowest_ratio": "health/slowest_ratio",
    "memory_bytes": "health/memory_bytes",
    "tokens_per_second": "throughput/tokens_per_second",
    "mfu": "throughput/mfu",
    "seconds": "throughput/seconds_per_step",
    "saving_seconds": "throughput/saving_seconds",
    "ranks": "progress/ranks",
    "samples": "progress/samples",
    "tokens": "progress/tokens",
    "mix_target": "mix/target",
    "mix_actual": "mix/actual",
}
_MAPS = ("_by_source", "_nll", "_bpb", "mix_target", "mix_actual", "kd")
"""Ends of the names of values by source, capability, set or figure. All others are single values."""
_COUNTS = ("step", "samples", "tokens", "ranks")


def lost_steps(steps: Iterable[int], first: int, last: int) -> list[tuple[int, int]]:
    """Stretches of the steps `first` to `last` that are not among `steps`: first and last step of each."""
    known = sorted({step for step in steps if first <= step <= last})
    ends = zip([first - 1, *known], [*known, last + 1], strict=True)
    return [(before + 1, after - 1) for before, after in ends if after - before > 1]


def describe_lost(path: Path, lost: Sequence[tuple[int, int]]) -> str:
    """`PATH has lost the lines of step 7, 9 to 12, 5 in all`. Names the first eight stretches."""
    named = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in lost]
    count = sum(b - a + 1 for a, b in lost)
    return f"{path} has lost the lines of step {some(named, most=8)}, {count:,} in all"


def read(path: Path) -> list[dict[str, Any]]:
    """The steps of a run, in order, each once."""
    lines, count = {}, 0
    for line in read_lines(path):
        lines[line["step"]], count = line, count + 1
    tell_repeated(path, count - len(lines))
    return [lines[step] for step in sorted(lines)]


def read_lines(path: Path, needed: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Lines of steps as they stand in a file, those that have all that is `needed`.

    Leaves out the lines that cannot be read, and says at the end how many.
    """
    damaged = 0
    for line in read_jsonl(path, lambda line: _is_step(line) and all(name in line for name in needed)):
        if line is None:
            damaged += 1
        else:
            yield line
    if damaged:
        say(f"{path}: {damaged} of its lines cannot be read; the steps they tell of are left out")


def tell_repeated(path: Path, count: int) -> None:
    """Say how many lines tell of a step that a later line tells of, too."""
    if count:
        say(f"{path}: {count} lines too many; of several lines of a step, the last one counts")


def _is_step(line: dict[str, Any]) -> bool:
    """Whether a line has the types that `step_line` and `cost_line` write."""
    for name, value in line.items():
        if name == "phase":
            good = isinstance(value, str)
        elif isinstance(value, dict):
            good = name.endswith(_MAPS) and all(map(is_number, value.values()))
        else:
            good = is_number(value) and not name.endswith(_MAPS)
            good = good and (name not in _COUNTS or (type(value) is int and value >= 0))
        if not good:
            return False
    return bool(line.get("step"))
