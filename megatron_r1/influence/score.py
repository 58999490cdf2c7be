"""Score the representative sets against every capability, at every checkpoint asked for (Eqs. 2, 3).

A source is scored in chunks of rows that depend only on the layout. Each chunk is on disk before the next one
begins. The same command again continues at the first chunk that is missing, with the same bits as a launch
that was not killed.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.data.windows import Examples
from megatron_r1.influence.curvature import resolve
from megatron_r1.influence.directions import CheckpointDirections, Launch, launch_note, record_left
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.gradients import score_examples
from megatron_r1.influence.methods import METHODS, LowRank, Method, WgradDot, correlation
from megatron_r1.influence.parameters import Directions
from megatron_r1.influence.plan import Job, Part, Work, lay_plan
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
