"""Score the representative sets against every capability, at every checkpoint asked for (Eqs. 2, 3).

A source is scored in chunks of rows that depend only on the layout. Each chunk is on disk before the next one
begins. The same command again continues at the first chunk that is missing, with the same bits as a launch
that was not killed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.data.loader import whole_batch
from megatron_r1.data.windows import Examples
from megatron_r1.influence.curvature import resolve
from megatron_r1.influence.directions import CheckpointDirections, Launch, launch_note, record_left
from megatron_r1.influence.engine import Engine, weigh
from megatron_r1.influence.gradients import Scorer, score, score_examples
from megatron_r1.influence.methods import METHODS, LowRank, Method, WgradDot, correlation
from megatron_r1.influence.parameters import Directions, named_parameters
from megatron_r1.influence.plan import Job, Part, Work, demand, lay_plan
from megatron_r1.influence.store import ScoreStore, check_inputs
from megatron_r1.parallel import ParallelContext, broadcast_object, holding, process_groups
from megatron_r1.records import CheckpointRef
from megatron_r1.run.layout import RunDir
from megatron_r1.run.ledger import process_start
from megatron_r1.run.stage import Standing
from megatron_r1.system.process import exit_when_orphaned
from megatron_r1.system.terminal import Progress, is_first_rank

_COMPARED = 64
"""Examples on which an approximation is compared with exact scores."""
_BUDGET, _REPEATS = 20.0, 6
"""Seconds that an estimate's passes take about, and most calls that it measures."""
_PASSES = 8
"""Micro-batches of a chunk. A kill can cost so many. A pipeline needs several to be full."""


def compute_influence(config: Config, work: Work | None = None) -> None:
    """Score the examples that are left. Every rank of the launch calls this.

    `work`: the result of `lay_plan`, if it was called. Raises ConfigError or ValueError before anything is
    written if the configuration does not fit the launch, the datasets or the checkpoints, or if scores of
    other inputs are there already.
    """
    job = open_job(config, work)
    standings = [check_inputs(part.directory, part.inputs) for part in job.all_parts()]
    influence = RunDir(Path(config.train.run)).influence
    killed = any(launch_note(job, ref).is_file() for ref in job.refs)
    if not killed and all(standing is Standing.DONE for standing in standings):
        if is_first_rank():
            print(f"{influence}: scored before, steps {job.work.steps}", flush=True)
        return
    exit_when_orphaned()
    with process_groups(job.work.config.parallel) as context, holding(influence, context):
        Scoring(job, context).run()


def open_job(config: Config, work: Work | None = None) -> Job:
    """Identify the checkpoints. Raises ConfigError or ValueError where they or the datasets do not fit."""
    # Interleaving only speeds up training. Its checkpoints load without.
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, virtual_pipeline=1))
    work = dataclasses.replace(work or lay_plan(config), config=config)
    directory = RunDir(Path(config.train.run)).checkpoints
    refs = [ref for ref in checkpoint_files.complete_checkpoints(directory) if ref.step in work.steps]
    if incomplete := sorted(set(work.steps) - {ref.step for ref in refs}):
        raise ValueError(f"{directory}: checkpoints {incomplete} are incomplete; leave them out")
    parts: dict[int, list[Part]] = {}
    curvature = resolve(work.influence.curvature, [ref.path for ref in refs])
    for ref in refs:
        parts[ref.step] = work.parts(ref.step, checkpoint_files.identity(ref.path), curvature)
    return Job(work, refs, curvature, parts)


def rows_left(parts: list[Part]) -> int:
    """Examples without scores, by the first rank's view of the disk."""
    return int(broadcast_object(sum(part.left() for part in parts)))


class Scoring:
    """The loop over checkpoints and sources that fills the store. Every rank runs it."""

    def __init__(self, job: Job, context: ParallelContext):
        self.job, self.work, self.context = job, job.work, context
        self.engine = Engine.build(job.work.config, job.work.data.eod, context)
        self.began = process_start()

    def run(self) -> None:
        for ref in self.job.refs if self.context.leads else ():
            record_left(self.job, ref)
        left = {step: rows_left(parts) for step, parts in self.job.parts.items()}
        total = self.work.examples() * len(self.job.refs)
        done = total - sum(left.values())
        run = self.work.config.train.run
        self.context.announce(
            f"{run}: {self.work.summary()} | {done:,} done before | "
            f"{self.context.world_size} ranks | {backend.describe(plain_layers=True)}"
        )
        with Progress("score influence", total, "examples", done, self.context.leads) as bar:
            for ref in self.job.refs:
                if left[ref.step]:
                    later = sum(rows for step, rows in left.items() if step > ref.step)
                    self._score_checkpoint(ref, left[ref.step], later, bar)
        where = RunDir(Path(run)).influence
        self.context.announce(f"{where}: scored, steps {self.work.steps}; next: tools/make_mix.py")

    def _score_checkpoint(self, ref: CheckpointRef, examples: int, later: int, bar: Progress) -> None:
        """`examples`: left at this checkpoint. `later`: left at those after it."""
        launch = Launch("influence", self.job, ref, self.context, self.began)
        at = CheckpointDirections(self.engine, self.job, ref, launch)
        about = ""
        if at.windows_passed:
            hours = at.pass_seconds / at.windows_passed * (examples + later) / 3600
            about = f", about {hours:.3g} h on {self.context.world_size} devices"
        self.context.announce(
            f"step {ref.step}: {len(at.norms)} directions from {self.work.probe_windows()} windows in "
            f"{at.seconds:.1f} s; {examples:,} examples here, {later:,} at later checkpoints{about}"
        )
        method = METHODS[self.work.influence.method](at.directions, self.engine)
        if isinstance(method, LowRank):
            self._compare(method, at.directions, ref.step)
        for part in self.job.parts[ref.step]:
            self._score_part(part, at, method, launch, bar)
        at.finish()
        self.began = time.time()

    def _compare(self, low_rank: LowRank, directions: Directions, step: int) -> None:
        """Raises ValueError where truncated directions do not order examples as the whole ones do."""
        influence, parts = self.work.influence, self.job.parts[step]
        each = -(-_COMPARED // len(parts))
        sets = [(part.corpus, part.example_N[:each]) for part in parts]
        examples = Examples(sets, self.engine.seq_length, influence.unit)
        methods = low_rank, WgradDot(directions, self.engine.capabilities)
        low_NC, exact_NC = (
            torch.from_numpy(score_examples(self.engine, method, examples)[0][:_COMPARED])
            for method in methods
        )
        least = correlation(low_NC, exact_NC).min().item()
        self.context.announce(
            f"step {step}: directions of rank {influence.rank}, correlation {least:.6f} with exact scores on "
            f"{len(low_NC)} examples, the worst capability's"
        )
        if not least >= influence.min_correlation:
            raise ValueError(
                f"at step {step}, scores by directions of rank {influence.rank} correlate {least:.6f} "
                f"with exact ones, below influence.min_correlation={influence.min_correlation}; raise "
                f"influence.rank, or use influence.method=wgrad-dot"
            )

    def _score_part(
        self, part: Part, at: CheckpointDirections, method: Method, launch: Launch, bar: Progress
    ) -> None:
        unit, shared_NC = self.work.influence.unit, self.work.shared(part)
        examples = self.engine.examples(part.corpus, part.example_N, unit)
        store = None
        if self.context.leads:
            inputs = {**part.inputs, "direction_norms": at.norms}
            zeros_NX = torch.zeros(1, method.width, dtype=torch.float64)
            shapes = {name: tuple(t.shape[1:]) for name, t in method.results(zeros_NX).items()}
            shapes["losses"] = ()
            store = ScoreStore(part.directory, inputs, part.example_N, examples.length_N, shapes)
        chunks = examples.chunks(_PASSES * self.engine.rows_per_pass)
        missing = [chunk for chunk in chunks if store is not None and store.missing(*chunk)]
        for first, last in broadcast_object(missing):
            row_NX, loss_N = score_examples(self.engine, method, examples, first, last)
            results = method.results(torch.from_numpy(row_NX))
            if shared_NC[first:last].any():
                at.leave_out(results, part, first, shared_NC[first:last])
            # As they are stored: float32 overflows where float64 does not.
            arrays = {name: t.float().numpy() for name, t in results.items()}
            arrays["losses"] = loss_N.astype(np.float32)
            for name, array in arrays.items():
                bad = ~np.isfinite(array).reshape(last - first, -1).all(1)
                if bad.any():
                    number = part.example_N[first + int(np.argmax(bad))]
                    raise ValueError(
                        f"{name} of {unit} {number} of {part.corpus.name} at step {part.step} are not "
                        f"finite; nothing of its chunk was written. Look at that checkpoint's weights, or "
                        f"leave the step out of influence.steps"
                    )
            if store is not None:
                new = store.write(first, arrays)
                launch.passed(new)
                bar.advance(new, note=f"step {part.step} {part.corpus.name}")


def measured_estimate(config: Config, ranks: int) -> str:
    """Time of scoring on the devices of this launch, from passes of the configured model, in one line.

    `ranks`: of the launch, each of which calls this. Weights and text are random. Loading, saving and the
    passes of a curvature are not counted. Raises ConfigError or ValueError as `demand` does.
    """
    work, parallel = demand(config, ranks), dataclasses.replace(config.parallel, virtual_pipeline=1)
    with process_groups(parallel) as context:
        engine = Engine.build(dataclasses.replace(config, parallel=parallel), None, context)
        size, seconds = 1, _pass_seconds(engine, 1)
        # Whole micro-batches are measured where the fewest calls, two of each kind, do not take too long.
        whole = engine.influence.micro_batch
        if whole > 1 and broadcast_object(sum(seconds) * whole * 2 < _BUDGET):
            size, seconds = whole, _pass_seconds(engine, whole)
        memory = backend.peak_memory() / 2**30
        each_pass = size * context.data_size
        counts = [work.checkpoints * -(-n // each_pass) for n in (work.rows, work.probes)]
        hours = sum(n * s for n, s in zip(counts, seconds, strict=True)) / 3600
        return (
            f"{work.rows:,} examples x {work.checkpoints} checkpoints, {work.most}{hours:.3g} h on {ranks} "
            f"devices: {counts[0]:,} passes of scores x {seconds[0]:.3g} s + {counts[1]:,} of directions x "
            f"{seconds[1]:.3g} s = {work.most}{hours * ranks:.3g} device-hours{work.without}; measured here, "
            f"{size} x {engine.seq_length} tokens a pass and rank, {memory:.2f} GiB at most"
        )


def _pass_seconds(engine: Engine, size: int) -> tuple[float, float]:
    """Seconds of a pass of `size` rows a data-parallel rank: of scores, and of a direction's gradient."""
    seq_length, count = engine.seq_length, engine.capabilities
    # Stages of a pipeline work at once only where several micro-batches pass.
    passes = _PASSES if engine.context.pipeline_size > 1 else 1
    random = torch.Generator(backend.device()).manual_seed(1)
    directions = {
        name: torch.randn(count, *p.shape, generator=random, device=p.device)
        for name, p in named_parameters(engine.gpt).items()
        if name in engine.names
    }
    method = METHODS[engine.influence.method](directions, engine)
    window = np.random.default_rng(1).integers(0, engine.gpt.vocab_size, (size, seq_length + 1))
    full = np.full(size, seq_length)
    batches = [weigh(whole_batch(window, full, 0 * full, None), 1 / full)] * passes

    def scores() -> float:
        with Scorer(engine.gpt, method) as scorer:
            return float(score(engine.model, scorer, iter(batches), passes, size, seq_length)[1].sum())

    def gradient() -> float:
        summed = engine.summed_gradient(iter(batches), passes, size)
        return sum(float(g.flatten()[0]) for g in summed.values())

    return _median_seconds(scores) / passes, _median_seconds(gradient) / passes


def _median_seconds(run: Callable[[], float]) -> float:
    """Of some calls, each of which ends when its devices have finished, after one that is not counted."""
    seconds: list[float] = []
    while len(seconds) < 2 or broadcast_object(len(seconds) < _REPEATS and sum(seconds[1:]) < _BUDGET / 4):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))
