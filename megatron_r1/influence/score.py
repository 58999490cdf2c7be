"""Score the representative sets against every capability, at every checkpoint asked for (Eqs. 2, 3).

Work is done in chunks of rows that depend on the layout alone; each is on disk before the next begins.
The same command again continues at the first chunk that is missing, and gives the same bits as one that
was never cut off.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_r1 import backend, checkpoint, ledger
from megatron_r1.config import Config
from megatron_r1.data.loader import whole_batch
from megatron_r1.data.sources import document_end
from megatron_r1.influence.curvature import precondition
from megatron_r1.influence.gradients import Directions, Scorer, mean_gradient, score
from megatron_r1.influence.plan import Part, Work, lay_plan
from megatron_r1.influence.store import ScoreStore, check_inputs, fingerprint_of
from megatron_r1.influence.windows import Windows, choose
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import (
    ParallelContext,
    broadcast_object,
    holding,
    process_groups,
    sum_over_data,
)
from megatron_r1.progress import Progress
from megatron_r1.records import Batch, CheckpointRef, Corpus
from megatron_r1.run_dir import RunDir
from megatron_r1.run_lock import exit_when_orphaned

# isort: split
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

_PASSES = 8
"""Micro-batches of a chunk: what a kill can cost, and what a pipeline needs to be full."""


def compute_influence(config: Config) -> None:
    """Score what is left; every rank of the launch calls this.

    Raises ConfigError or ValueError before anything is written when the configuration does not fit the
    launch, the datasets or the checkpoints, or when scores of other inputs are there already.
    """
    work = lay_plan(config)
    run = RunDir(Path(config.train.run))
    refs = [ref for ref in checkpoint.found(run.checkpoints) if ref.step in work.steps]
    if len(refs) < len(work.steps):
        incomplete = sorted(set(work.steps) - {ref.step for ref in refs})
        raise ValueError(f"{run.checkpoints}: checkpoints {incomplete} are incomplete; leave them out")
    parts: dict[int, list[Part]] = {}
    for ref in refs:
        checkpoint.check_model(ref.path, config.model)
        weights = fingerprint_of([path for path in ref.path.iterdir() if path.is_file()])
        parts[ref.step] = work.parts(config, ref.step, weights)
        for part in parts[ref.step]:
            check_inputs(part.directory, part.inputs)
    if not any(part.left() for found in parts.values() for part in found):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{run.influence}: scored before, steps {work.steps}", flush=True)
        return
    exit_when_orphaned()
    with process_groups(config.parallel) as context, holding(run.influence, context):
        _Scoring(config, work, context, parts).run(refs)


class _Scoring:
    """The model on this rank, and the passes over it."""

    def __init__(self, config: Config, work: Work, context: ParallelContext, parts: dict[int, list[Part]]):
        self.config, self.work, self.context, self.parts = config, work, context, parts
        self.began = ledger.process_start()
        self.eod = document_end(config)
        backend.seed_model_parallel(config.train.seed)
        precision = config.train.precision
        # The scorer reaches into each layer, which Transformer Engine's fused ones do not allow.
        self.gpt = build_model(
            config.model, config.parallel, precision, config.data.seq_length, plain_layers=True
        )
        self.model: Any = self.gpt
        if precision == "bf16":
            self.model = Float16Module(get_model_config(self.gpt), self.gpt)
        self.chunk = _PASSES * work.influence.micro_batch * context.data_size

    @property
    def leads(self) -> bool:
        return self.context.rank == 0

    def run(self, refs: list[CheckpointRef]) -> None:
        left = {step: self._left(found) for step, found in self.parts.items()}
        total = self.work.examples(self.config) * len(refs)
        done = total - sum(left.values())
        if self.leads:
            print(
                f"{self.config.train.run}: {self.work.summary(self.config)} | {done:,} done before | "
                f"{self.context.world_size} ranks | {backend.describe()}",
                flush=True,
            )
        with Progress("score influence", total, "examples", done, self.leads) as bar:
            for ref in refs:
                if left[ref.step]:
                    self._score_checkpoint(ref, left[ref.step], bar)
        if self.leads:
            where = RunDir(Path(self.config.train.run)).influence
            print(f"{where}: scored, steps {self.work.steps}; next: tools/make_mix.py", flush=True)

    def _left(self, parts: list[Part]) -> int:
        """Rows to compute, as the first rank sees the disk."""
        left = broadcast_object(sum(part.left() for part in parts))
        assert isinstance(left, int)
        return left

    def _score_checkpoint(self, ref: CheckpointRef, examples: int, bar: Progress) -> None:
        checkpoint.load(ref.path, self.gpt, None, self.config.model)
        start = time.monotonic()
        directions = self._directions(ref)
        seconds = time.monotonic() - start
        probes = self.work.probe_windows(self.config)
        if self.leads:
            print(
                f"step {ref.step}: {len(self.work.probes)} directions from {probes} windows in "
                f"{seconds:.1f} s; {examples:,} examples, about {seconds / probes * examples:.0f} s",
                flush=True,
            )
        with Scorer(self.gpt, directions) as scorer:
            for part in self.parts[ref.step]:
                self._score_part(part, scorer, bar)
        if self.leads:
            ledger.append(
                Path(self.config.train.run),
                f"influence step {ref.step}",
                devices=self.context.world_size,
                tokens=(examples + probes) * self.config.data.seq_length,
                seconds=time.time() - self.began,
                outputs=[str(part.directory) for part in self.parts[ref.step]],
            )
        self.began = time.time()

    def _directions(self, ref: CheckpointRef) -> Directions:
        """v_c of every capability. Raises ValueError where one is zero or not finite."""
        gradients = []
        total = self.work.probe_windows(self.config)
        with Progress(f"directions of step {ref.step}", total, "windows", show=self.leads) as bar:
            for probe in self.work.probes:
                gradient = self._mean_gradient(probe, bar)
                square = sum(float(g.double().square().sum()) for g in gradient.values())
                if not 0 < square < float("inf"):
                    what = "zero" if square == 0 else "not finite"
                    raise ValueError(
                        f"the direction of {probe.name} at step {ref.step} is {what}; look at that "
                        f"checkpoint and at {probe.prefix}"
                    )
                gradients.append(gradient)
        directions = {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}
        precondition(self.work.influence.curvature, directions, ref.path, self.gpt)
        return directions

    def _mean_gradient(self, probe: Corpus, bar: Progress) -> dict[str, torch.Tensor]:
        """Of one probing set, on every rank its shard."""
        influence, seq_length = self.work.influence, self.config.data.seq_length
        chosen = choose(probe, seq_length, influence.probe_examples, influence.seed)
        rows = Windows(probe, chosen, seq_length, self.config.model.vocab_size)
        per_pass = influence.micro_batch * self.context.data_size

        def counted() -> Iterator[Batch]:
            for number, batch in enumerate(self._batches(rows, 0, len(rows))):
                bar.advance(min(per_pass, len(rows) - number * per_pass))
                yield batch

        passes = rows.passes(0, len(rows), per_pass)
        size, examples = influence.micro_batch, len(rows)
        return mean_gradient(
            self.model, self.gpt, counted(), passes, size, seq_length, examples, self.context
        )

    def _score_part(self, part: Part, scorer: Scorer, bar: Progress) -> None:
        rows = Windows(part.corpus, part.window_N, self.config.data.seq_length, self.config.model.vocab_size)
        store = None
        if self.leads:
            length_N = np.full(len(rows), self.config.data.seq_length)
            store = ScoreStore(part.directory, part.inputs, part.window_N, length_N)
        starts = range(0, len(rows), self.chunk)
        missing = [
            s for s in starts if store is not None and store.missing(s, min(s + self.chunk, len(rows)))
        ]
        todo = broadcast_object(missing)
        assert isinstance(todo, list)
        for first in todo:
            last = min(first + self.chunk, len(rows))
            before = part.left() if store is not None else 0
            score_NC, loss_N = self._score_rows(rows, first, last, scorer)
            bad = ~np.isfinite(score_NC).all(1)
            if bad.any():
                window = part.window_N[first + int(np.argmax(bad))]
                raise ValueError(
                    f"the score of window {window} of {part.corpus.name} at step {part.step} is not finite; "
                    f"nothing of its chunk was written"
                )
            if store is not None:
                store.write(first, score_NC.astype(np.float32), loss_N.astype(np.float32))
                bar.advance(before - part.left(), note=f"step {part.step} {part.corpus.name}")

    def _score_rows(
        self, rows: Windows, first: int, last: int, scorer: Scorer
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and losses of the rows [first, last), on every rank: float64 [rows, C] and [rows]."""
        size, context = self.work.influence.micro_batch, self.context
        passes = rows.passes(first, last, size * context.data_size)
        score_NC, loss_N = score(
            self.model,
            scorer,
            self._batches(rows, first, last),
            passes,
            size,
            self.config.data.seq_length,
        )
        # [passes, ranks, B, C + 1]: each rank fills in its own rows, the others' zeros change nothing.
        mine = torch.cat([score_NC, loss_N[:, None]], 1).view(passes, size, -1)
        all_rows = mine.new_zeros(passes, context.data_size, size, mine.shape[-1])
        all_rows[:, context.data_rank] = mine
        out = sum_over_data(all_rows).flatten(0, 2)[: last - first].cpu().numpy()
        return out[:, :-1], out[:, -1]

    def _batches(self, rows: Windows, first: int, last: int) -> Iterator[Batch]:
        size, context = self.work.influence.micro_batch, self.context
        for window_BS, real_B in rows.batches(first, last, size, context.data_rank, context.data_size):
            yield on_device(whole_batch(window_BS, real_B, np.zeros(size), self.eod))


def on_device(batch: Batch) -> Batch:
    fields = ((field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return dataclasses.replace(batch, **{name: t.to(backend.device()) for name, t in fields if t is not None})
