"""Does the step guard leave healthy runs alone, and does it stop lost ones?

make study-guard, or: OMP_NUM_THREADS=1 python benchmarks/step_guard.py [--output DIR] [--size full]

The quickstart's text, tokenizer and probing sets are made first. Then each arm trains the tiny preset on
them with the default `health`, on one rank and one thread, once for each seed. A seed decides the initial
weights and the order of the data.

    quickstart        the quickstart's first phase: 100 steps at 4e-3
    three times       the same at three times its learning rate, which falls linearly
    bad update        `quickstart` from step 60 on, whose first step has 30 times the learning rate
    shuffled labels   `quickstart` from step 60 on, the labels of a micro-batch permuted among themselves
    rate x 100        `quickstart` from step 60 on, at 100 times the learning rate
    zeroed shard      `quickstart` from step 60 on for 10 steps, the tokens of a source overwritten by zeros

The first three are runs that are to reach their end. Each is also trained without the guard for the first
seed, and for every seed for which the guard acted. A guard that did not act has changed no bit, so the other
runs stand for both. The last three set in a fault. They are to be stopped within 100 steps, and the shard is
to be named within 10.

Each run is a process of its own: the threads of a training in process stay when it ends.

Printed are the budget, then two tables: means over seeds with 95 % intervals of Student's t. Run again, the
study goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from megatron_r1 import config_io
from megatron_r1.checkpoint.files import step_path
from megatron_r1.config import Config, HealthConfig
from megatron_r1.records import Batch
from megatron_r1.run import pipeline
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import write_json
from megatron_r1.system.terminal import Progress, user_errors
from megatron_r1.train import loop
from megatron_r1.train.health import StepGuard, TooManyBadStepsError
from megatron_r1.train.schedule import phase_spans

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
import run as quickstart  # noqa: E402

ONSET, SOON, PATIENCE = 60, 10, 100
"""Steps before a fault, and after it until a shard is to be named and a run is to be stopped."""
SHARD = "gcide"
SIZES = {
    "full": (),
    "quarter": ("train.global_batch=8", "data.seq_length=128"),
    "small": quickstart.SIZES["small"].overrides[:-4],
}
"""The quickstart's batch is 16 windows of 256 tokens. small: another model, for a test of this file."""
FLOPS = 2e10
"""A second, of a thread, for the budget."""
OFF = ["health.loss_spike=0", "health.max_skipped=1000000"]
HEALTHY = {
    "quickstart": [f"train.checkpoint_every={ONSET}"],
    "three times": ["phases.uniform.learning_rate=1.2e-2", "phases.uniform.decay=linear"],
    "bad update": [],
}
FAULTS = {
    "shuffled labels": [f"phases.uniform.steps={ONSET + PATIENCE}"],
    "rate x 100": [f"phases.uniform.steps={ONSET + PATIENCE}", "phases.uniform.learning_rate=0.4"],
    "zeroed shard": [f"phases.uniform.steps={ONSET + SOON}"],
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of an arm."""

    arm: str
    seed: int
    guarded: bool = True

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.seed}{'' if self.guarded else '-off'}"

    @property
    def first(self) -> int:
        return 0 if self.arm in ("quickstart", "three times") else ONSET

    def config(self, output: Path, size: str) -> Config:
        made, run = output / "quickstart", output / "runs" / self.name
        words = {**HEALTHY, **FAULTS}[self.arm] + ([] if self.guarded else OFF)
        if self.first:
            of = step_path(RunDir(output / "runs" / Trial("quickstart", self.seed).name).checkpoints, ONSET)
            words = [*words, f"train.init_from={of}"]
        return config_io.load(
            [
                str(ROOT / "examples/models/tiny.yaml"),
                str(ROOT / "examples/quickstart/train.yaml"),
                str(made / "probes" / "split.yaml"),
                *SIZES[size],
                "train.probe_every=1000",
                f"train.run={run}",
                f"train.seed={self.seed}",
                f"data.seed={self.seed}",
                *words,
            ]
        )


def trials(seeds: int) -> list[Trial]:
    """Healthy runs first: the others branch off them."""
    of = [Trial(arm, seed) for arm in (*HEALTHY, *FAULTS) for seed in range(1, seeds + 1)]
    return [*of, *(Trial(arm, 1, guarded=False) for arm in HEALTHY)]


def shuffled(batch: Batch) -> Batch:
    labels = batch.labels_BS.flatten()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(int(labels.sum())))
    return dataclasses.replace(batch, labels_BS=labels[order].view_as(batch.labels_BS))


@contextlib.contextmanager
def fault(trial: Trial, config: Config) -> Iterator[Config]:
    """Within, training meets the arm's fault."""
    took, scheduled = loop.train_step, loop.set_schedule
    if trial.arm == "shuffled labels":

        def spoiled(training: Any, batches: Iterator[Batch], *rest: Any, **more: Any) -> Any:
            return took(training, map(shuffled, batches), *rest, **more)

        loop.train_step = spoiled
    elif trial.arm == "bad update":

        def once(optimizer: Any, lr: float, weight_decay: float) -> None:
            loop.set_schedule = scheduled
            scheduled(optimizer, 30 * lr, weight_decay)

        loop.set_schedule = once
    elif trial.arm == "zeroed shard":
        source = config.data.sources[SHARD]
        copy = Path(config.train.run) / "data" / Path(source.prefix).name
        copy.parent.mkdir(parents=True, exist_ok=True)
        for path in Path(source.prefix).parent.glob(f"{copy.name}*"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, copy.parent / path.name)
        sources = {**config.data.sources, SHARD: dataclasses.replace(source, prefix=str(copy))}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))

        def after_zeros(*rest: Any, **more: Any) -> Any:
            binary = Path(f"{copy}.bin")
            with open(binary, "r+b") as file:
                file.write(bytes(binary.stat().st_size))
            return took(*rest, **more)

        loop.train_step = after_zeros
    try:
        yield config
    finally:
        loop.train_step, loop.set_schedule = took, scheduled


class Ear(io.TextIOBase):
    """Standard error, with what was written to it."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def write(self, text: str) -> int:
        self.heard.append(text)
        return sys.__stderr__.write(text)  # type: ignore[union-attr]

    def flush(self) -> None:
        sys.__stderr__.flush()  # type: ignore[union-attr]


def measure(trial: Trial, output: Path, size: str) -> dict[str, Any]:
    """Train in a process of its own, and what became of it; from the disk where it was measured before."""
    path = output / "trials" / f"{trial.name}.json"
    if not path.exists():
        child = multiprocessing.get_context("spawn").Process(target=train_alone, args=(trial, output, size))
        child.start()
        child.join()
        if child.exitcode:
            raise ValueError(f"{trial.name} ended with status {child.exitcode}; its message stands above")
    return dict(json.loads(path.read_text()))


@user_errors()
def train_alone(trial: Trial, output: Path, size: str) -> None:
    """Train, and write what became of it. The process of a run calls this."""
    torch.set_num_threads(1)
    path = output / "trials" / f"{trial.name}.json"
    shutil.rmtree(output / "runs" / trial.name, ignore_errors=True)
    stopped, ear = "", Ear()
    with fault(trial, trial.config(output, size)) as config, contextlib.redirect_stderr(ear):
        try:
            loop.train(config)
        except (TooManyBadStepsError, OSError, ValueError) as error:
            stopped = str(error)
    metrics = RunDir(Path(config.train.run)).metrics
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if not lines:
        raise ValueError(f"{trial.name}: {stopped}")
    told = [line for line in "".join(ear.heard).splitlines() if "gradient norm" in line]
    result = {
        "steps": lines[-1]["step"],
        "stopped": stopped,
        "skipped": sum(line["skipped"] for line in lines),
        "told": len(told),
        "named": any(f"{SHARD}_text" in text for text in ("".join(ear.heard), stopped)),
        "loss": [line["loss"] for line in lines],
        "held_out": float(np.mean(list(lines[-1]["probe_nll"].values())))
        if "probe_nll" in lines[-1]
        else None,
    }
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    if trial.arm != "quickstart":
        shutil.rmtree(RunDir(Path(config.train.run)).checkpoints, ignore_errors=True)


def rise(losses: list[float]) -> float:
    """Nats by which the median loss of 32 accepted steps rose at most above the best before it."""
    guard, most = StepGuard(HealthConfig()), 0.0
    for step, loss in enumerate(losses, 1):
        if guard.refuses(loss, 1.0) is None:
            most = max(most, guard.rise(step))
    return most


def of_seeds(values: list[float], digits: int = 3) -> str:
    """Mean with its 95 % interval."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:.{digits}f}"
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def report(results: dict[Trial, dict[str, Any]], seeds: int) -> str:
    rows = [
        "| arm | stopped | skipped steps | spikes told | largest rise of the median, nats | held-out loss | "
        "without the guard |",
        "|---|---|---|---|---|---|---|",
    ]
    seeds_of = range(1, seeds + 1)
    for arm in HEALTHY:
        of = [results[Trial(arm, seed)] for seed in seeds_of]
        off = [results.get(Trial(arm, seed, False), on) for seed, on in enumerate(of, 1)]
        for on, without in zip(of, off, strict=True):
            assert acted(on) or on["loss"] == without["loss"], f"{arm}: a guard that did not act changed bits"
        counts = [sum(bool(one["stopped"]) for one in of)]
        counts += [sum(one[name] for one in of) for name in ("skipped", "told")]
        before = [results[Trial("quickstart", seed)]["loss"][: Trial(arm, seed).first] for seed in seeds_of]
        rises = [rise([*first, *one["loss"]]) for first, one in zip(before, of, strict=True)]
        held = [of_seeds([one["held_out"] or np.nan for one in side]) for side in (of, off)]
        cells = [arm, *map(str, counts), f"{of_seeds(rises)}, at most {max(rises):.3f}", *held]
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| fault from step 60 on | stopped or named | after steps |", "|---|---|---|"]
    for arm in FAULTS:
        of = [results[Trial(arm, seed)] for seed in seeds_of]
        done = [one for one in of if (one["named"] if arm == "zeroed shard" else one["stopped"])]
        after = [one["steps"] - ONSET for one in done]
        steps = f"{of_seeds(after, 0)}, at most {max(after)}" if after else "-"
        rows.append(f"| {arm} | {len(done)} of {seeds} | {steps} |")
    return "\n".join(rows)


def acted(result: dict[str, Any]) -> bool:
    return bool(result["stopped"] or result["skipped"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/step-guard-SIZE")
    parser.add_argument("--size", choices=SIZES, default="quarter")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with user_errors():
        output = (options.output or Path(f"runs/step-guard-{options.size}")).resolve()
        os.chdir(ROOT)
        made = output / "quickstart"
        stages = quickstart.stages(made, quickstart.SIZES["full"])
        ready = itertools.takewhile(lambda stage: not stage.name.startswith("train the"), stages)
        pipeline.run(made, list(ready))
        wanted = trials(options.seeds)
        configs = [trial.config(output, options.size) for trial in wanted]
        steps = [phase_spans(c)[-1].end - t.first for t, c in zip(wanted, configs, strict=True)]
        work = sum(n * c.tokens_per_step() * c.model.flops_per_token(c.data.seq_length)
                   for n, c in zip(steps, configs, strict=True))  # fmt: skip
        print(f"budget: {len(wanted)} runs, at most {sum(steps):,} steps, {work:.2g} operations, about "
              f"{work / FLOPS / 60:.0f} minutes of one thread", flush=True)  # fmt: skip
        results: dict[Trial, dict[str, Any]] = {}
        with Progress("study", len(wanted), "runs") as bar:
            for trial in wanted:
                results[trial] = measure(trial, output, options.size)
                bar.advance(note=trial.name)
                if trial.arm in HEALTHY and trial.guarded and trial.seed > 1 and acted(results[trial]):
                    off = dataclasses.replace(trial, guarded=False)
                    results[off] = measure(off, output, options.size)
        write_json(output / "results.json", {trial.name: one for trial, one in results.items()})
        print(report(results, options.seeds))


if __name__ == "__main__":
    main()
