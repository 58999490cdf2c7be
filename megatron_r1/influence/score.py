"""Score the representative sets against every capability, at every checkpoint asked for (Eqs. 2, 3).

A source is scored in chunks of rows that depend on the layout alone. Each chunk is on disk before the next
one begins. The same command again continues at the first chunk that is missing, with the same bits as a
launch that was not killed.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.config import Config
from megatron_r1.influence.curvature import resolve
from megatron_r1.influence.directions import CheckpointDirections
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.gradients import score_examples
from megatron_r1.influence.methods import METHODS, LowRank, Method, WgradDot, correlation
from megatron_r1.influence.parameters import Directions
from megatron_r1.influence.plan import Part, Work, lay_plan, scores_of
from megatron_r1.influence.store import ScoreStore, check_inputs
from megatron_r1.parallel import ParallelContext, broadcast_object, holding, process_groups
from megatron_r1.records import CheckpointRef
from megatron_r1.run.layout import RunDir
from megatron_r1.run.ledger import process_start
from megatron_r1.run.stage import Standing, finish
from megatron_r1.system.process import exit_when_orphaned
from megatron_r1.system.terminal import Progress

_COMPARED = 64
"""Examples on which an approximation is held against exact scores."""
_PASSES = 8
"""Micro-batches of a chunk: what a kill can cost, and what a pipeline needs to be full."""


def compute_influence(config: Config, work: Work | None = None) -> None:
    """Score what is left; every rank of the launch calls this. `work`: of `lay_plan`, where it was called.

    Raises ConfigError or ValueError before anything is written when the configuration does not fit the
    launch, the datasets or the checkpoints, or when scores of other inputs are there already.
    """
    job = open_job(config, work)
    standings = [check_inputs(part.directory, part.inputs) for part in job.all_parts()]
    influence = RunDir(Path(config.train.run)).influence
    if all(standing is Standing.DONE for standing in standings):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{influence}: scored before, steps {job.work.steps}", flush=True)
        return
    exit_when_orphaned()
    with process_groups(job.work.config.parallel) as context, holding(influence, context):
        Scoring(job, context).run()


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be scored, with its checkpoints read as far as their hashes."""

    work: Work
    refs: list[CheckpointRef]
    curvature: str
    parts: dict[int, list[Part]]
    """By step."""

    def all_parts(self) -> list[Part]:
        return [part for parts in self.parts.values() for part in parts]


def open_job(config: Config, work: Work | None = None) -> Job:
    """Raises ConfigError or ValueError where datasets or checkpoints do not fit the configuration."""
    # An interleaved pipeline is a matter of training's speed; its checkpoints load without.
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, virtual_pipeline=1))
    work = dataclasses.replace(work or lay_plan(config), config=config)
    run = RunDir(Path(config.train.run))
    refs = [ref for ref in checkpoint_files.found(run.checkpoints) if ref.step in work.steps]
    if len(refs) < len(work.steps):
        incomplete = sorted(set(work.steps) - {ref.step for ref in refs})
        raise ValueError(f"{run.checkpoints}: checkpoints {incomplete} are incomplete; leave them out")
    parts: dict[int, list[Part]] = {}
    curvature = resolve(work.influence.curvature, [ref.path for ref in refs])
    for ref in refs:
        checkpoint_files.check_model(ref.path, config.model)
        parts[ref.step] = work.parts(ref.step, checkpoint_files.identity(ref.path), curvature)
    return Job(work, refs, curvature, parts)


def rows_left(parts: list[Part]) -> int:
    """Examples to compute, as the first rank sees the disk."""
    return int(broadcast_object(sum(part.left() for part in parts)))


def record_scored(
    job: Job, at: CheckpointDirections, stage: str, tokens: int, began: float, context: ParallelContext
) -> None:
    """Called by the first rank: add a ledger line for a checkpoint's scores, and remove its directions."""
    at.cache.clear()
    finish(
        Path(job.work.config.train.run),
        f"{stage} step {at.ref.step}",
        devices=context.world_size,
        tokens=tokens,
        seconds=time.time() - began,
        inputs={str(at.ref.path): checkpoint_files.identity(at.ref.path)} | job.work.identities,
        outputs=scores_of(job.parts[at.ref.step]),
        again=True,
    )


class Scoring:
    """The loop over checkpoints and sources that fills the store; every rank runs it."""

    def __init__(self, job: Job, context: ParallelContext):
        self.job, self.work, self.context = job, job.work, context
        self.engine = Engine.build(job.work.config, job.work.data.eod, context)
        self.began = process_start()

    def run(self) -> None:
        left = {step: rows_left(parts) for step, parts in self.job.parts.items()}
        total = self.work.examples() * len(self.job.refs)
        done = total - sum(left.values())
        run = self.work.config.train.run
        self.context.announce(
            f"{run}: {self.work.summary()} | {done:,} done before | "
            f"{self.context.world_size} ranks | {backend.describe(plain_layers=True, trains=False)}"
        )
        with Progress("score influence", total, "examples", done, self.context.leads) as bar:
            for ref in self.job.refs:
                if left[ref.step]:
                    later = sum(rows for step, rows in left.items() if step > ref.step)
                    self._score_checkpoint(ref, left[ref.step], later, bar)
        where = RunDir(Path(run)).influence
        self.context.announce(f"{where}: scored, steps {self.work.steps}; next: tools/make_mix.py")

    def _score_checkpoint(self, ref: CheckpointRef, examples: int, later: int, bar: Progress) -> None:
        """`examples` are left here, and `later` at the checkpoints after this one."""
        load_checkpoint(ref.path, self.engine.gpt, None, self.work.config.model)
        start = time.monotonic()
        at = CheckpointDirections(self.engine, self.work, self.job.curvature, ref, self.job.parts[ref.step])
        directions, norm_C = at.build()
        seconds = time.monotonic() - start
        probes = self.work.probe_windows()
        about = ""
        if at.windows_passed:
            hours = at.pass_seconds / at.windows_passed * (examples + later) / 3600
            about = f", about {hours:.3g} h on {self.context.world_size} devices"
        self.context.announce(
            f"step {ref.step}: {len(self.work.probes)} directions from {probes} windows in "
            f"{seconds:.1f} s; {examples:,} examples here, {later:,} at later checkpoints{about}"
        )
        method = METHODS[self.work.influence.method].build(directions, self.engine)
        if isinstance(method, LowRank):
            self._compare(method, directions, ref.step)
        for part in self.job.parts[ref.step]:
            self._score_part(part, at, method, norm_C, bar)
        if self.context.leads:
            tokens = (examples + probes) * self.engine.seq_length
            record_scored(self.job, at, "influence", tokens, self.began, self.context)
        self.began = time.time()

    def _compare(self, low_rank: LowRank, directions: Directions, step: int) -> None:
        """Raises ValueError where truncated directions do not order examples as the whole ones do."""
        influence, parts = self.work.influence, self.job.parts[step]

        def scores(method: Method) -> Tensor:
            score_NC = []
            for part in parts:
                examples = self.engine.examples(part.corpus, part.example_N, influence.unit)
                last = min(-(-_COMPARED // len(parts)), len(examples))
                score_NC.append(score_examples(self.engine, method, examples, 0, last)[0])
            return torch.from_numpy(np.concatenate(score_NC)[:_COMPARED])

        low_NC, exact_NC = scores(low_rank), scores(WgradDot(directions, len(self.work.probes)))
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
        self, part: Part, at: CheckpointDirections, method: Method, norm_C: list[float], bar: Progress
    ) -> None:
        influence = self.work.influence
        examples = self.engine.examples(part.corpus, part.example_N, influence.unit)
        none_N1 = np.zeros((len(examples), 1), bool)
        shared_NC = self.work.shared(part) if influence.exclude_self else none_N1
        store = None
        if self.context.leads:
            named = zip((probe.name for probe in self.work.probes), norm_C, strict=True)
            inputs = {**part.inputs, "direction_norms": dict(named)}
            zeros_NX = torch.zeros(1, method.width, dtype=torch.float64)
            shapes = {name: tuple(t.shape[1:]) for name, t in method.results(zeros_NX).items()}
            store = ScoreStore(
                part.directory, inputs, part.example_N, examples.length_N, {**shapes, "losses": ()}
            )
        chunks = examples.chunks(_PASSES * self.engine.rows_per_pass)
        missing = [chunk for chunk in chunks if store is not None and store.missing(*chunk)]
        for first, last in broadcast_object(missing):
            before = part.left() if store is not None else 0
            row_NX, loss_N = score_examples(self.engine, method, examples, first, last)
            bad = ~np.isfinite(row_NX).all(1)
            if bad.any():
                number = part.example_N[first + int(np.argmax(bad))]
                raise ValueError(
                    f"the score of {influence.unit} {number} of {part.corpus.name} at step "
                    f"{part.step} is not finite; nothing of its chunk was written"
                )
            results = method.results(torch.from_numpy(row_NX))
            if shared_NC[first:last].any():
                at.leave_out(results, part, first, shared_NC[first:last])
            if store is not None:
                arrays = {name: t.numpy().astype(np.float32) for name, t in results.items()}
                store.write(first, {**arrays, "losses": loss_N.astype(np.float32)})
                bar.advance(before - part.left(), note=f"step {part.step} {part.corpus.name}")
