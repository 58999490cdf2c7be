"""A training run: the recipe's phases, one after the other, from wherever the last start came to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from megatron_r1 import backend, config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.files import Retention
from megatron_r1.checkpoint.load import load_checkpoint, load_weights
from megatron_r1.checkpoint.save import Saver
from megatron_r1.config import Config
from megatron_r1.data import plan_file
from megatron_r1.data.loader import BatchLoader
from megatron_r1.data.open import OpenData, launched, open_data
from megatron_r1.parallel import (
    DelayedAllReduce,
    ParallelContext,
    broadcast_object,
    gather_objects,
    holding,
    process_groups,
)
from megatron_r1.records import TrainState
from megatron_r1.run.layout import RunDir
from megatron_r1.run.ledger import process_start
from megatron_r1.run.stage import finish
from megatron_r1.system.files import write_text
from megatron_r1.system.process import StopRequest, exit_when_orphaned
from megatron_r1.system.terminal import Progress, is_first_rank, say
from megatron_r1.train import resume
from megatron_r1.train.batches import FaultTolerantBatches, micro_batches, rank_samples
from megatron_r1.train.evaluate import Evaluation
from megatron_r1.train.health import (
    StepGuard,
    TooManyBadStepsError,
    UnreadableDataError,
    Watchdog,
)
from megatron_r1.train.metrics import MetricsLog, RankLog, open_log, rank_line, shares, step_line
from megatron_r1.train.optimizer import forget_moments, set_schedule
from megatron_r1.train.schedule import PhaseSpan, phase_spans, retained_steps
from megatron_r1.train.step import Shape, StepResult, Training, build_training, train_step

_READ_AHEAD = 256
"""Windows that a rank asks for before they are needed."""
_LONG = 3600.0
"""Seconds more than a step that measuring, or the last write of a phase, may take."""


def train(config: Config, files: Mapping[str, str] | None = None, data: OpenData | None = None) -> None:
    """Train what is left of the run, or until SIGTERM, which any rank may get; every rank of the launch
    calls this.

    `files`: those that the configuration was read from -> their SHA-256, for the ledger. `data`: its
    datasets, where they are open already. Raises ConfigError or ValueError before anything is written when
    the configuration does not fit the launch, the datasets, or the past of the run.
    """
    data = data or open_data(config, launched())
    data.plan  # noqa: B018  (laid here, so that its mistakes come before the launch's groups)
    if resume.is_finished(config, data):
        if is_first_rank():
            print("\n".join(resume.describe_start(config, data)), flush=True)
        return
    exit_when_orphaned()
    run = RunDir(Path(config.train.run))
    with process_groups(config.parallel) as context, holding(run.root, context), StopRequest() as stop:
        Trainer(config, data, context, run, stop, files or {}).train()


class Trainer:
    """The state of a run on this rank, and its steps."""

    def __init__(
        self,
        config: Config,
        data: OpenData,
        context: ParallelContext,
        run: RunDir,
        stop: StopRequest,
        files: Mapping[str, str],
    ):
        self.config, self.plan, self.context, self.run, self.stop = config, data.plan, context, run, stop
        self.files = files
        self.sources = [corpus.name for corpus in data.corpora]
        # By one rank for all: of a pair without a sidecar it takes a read of the whole index.
        self.identities: dict[str, str] = broadcast_object(data.identities if context.rank == 0 else None)
        """Prefix -> identity of each dataset."""
        of_sources = {corpus.name: self.identities[str(corpus.prefix)] for corpus in data.corpora}
        self.plan_text = plan_file.to_json(self.plan, of_sources)
        self.loader = BatchLoader(
            self.plan,
            data.corpora,
            config.data.seq_length,
            data.eod,
            pin_memory=backend.HAS_CUDA,
            vocab_size=config.model.vocab_size,
        )
        self.training: Training = build_training(config)
        self.guard = StepGuard(config.health)
        self.origin: dict[str, str] = {}
        """Checkpoint that the next steps begin with -> its identity, asked while it is there."""
        self.state = self._resume(data)
        self.spans = phase_spans(config)
        self.kept = retained_steps(config)
        keep = config.train
        self.saver = Saver(run.checkpoints, Retention(keep.keep_last, keep.keep_every, frozenset(self.kept)))
        self.agreement = DelayedAllReduce(flags=2 + context.world_size)
        self.busy_R = [0.0] * context.world_size
        """Seconds that each rank was busy in the step before."""
        self.saving = 0.0
        """Seconds that checkpoints held this rank up since the step before."""
        self.stopping = False
        """All ranks have agreed to stop, because one was asked to."""
        self.shape = Shape(config.train.micro_batch, config.data.seq_length, len(self.sources))
        self.passes = config.train.global_batch // (config.train.micro_batch * context.data_size)
        self.evaluation = Evaluation(config, data, self.training, context)
        self.last_step = self.spans[-1].end
        self.asked = self.state.step
        """Steps whose windows the disk has been asked for."""
        self.log: MetricsLog | None = None
        self.rank_log = RankLog(run.rank_log(context.rank))
        self.began = process_start()

    def train(self) -> None:
        """To the end of the recipe, or until a rank is asked to stop. Before an error that all ranks know
        of (TooManyBadStepsError, UnreadableDataError) the run is saved."""
        if self.context.leads:
            for line in resume.edits(self.config, self.state.step):
                say(f"{self.run.root}: {line}")
            resume.record_killed_launches(self.config, self.state.step)
            write_text(self.run.config, config_io.dump(self.config))
            write_text(self.run.plan, self.plan_text)
            self.context.announce(
                f"{self.run.root}: step {self.state.step} of {self.last_step} | "
                f"{self.config.model.parameters():,} parameters | "
                f"{self.config.tokens_per_step():,} tokens a step | "
                f"{self.context.world_size} ranks | {backend.describe(not self.config.data.cross_documents)}"
            )
            self.log = open_log(self.run, self.state.step, self.config)
        with Watchdog(self.config.health.hang_seconds, self.run.rank_log(self.context.rank)) as self.watchdog:
            for span in self.spans:
                if self.state.step < span.end and not self.stopping:
                    self._train_phase(span)
        if self.log is not None:
            self.log.close()
        self.rank_log.close()

    def _train_phase(self, span: PhaseSpan) -> None:
        config, first = self.config, self.state.step
        target = shares(config.phase_weights(span.name), self.sources)
        if self.state.step == span.start:
            self._say_unseen(span)
            self.guard.forget()
            if span.config.reset_optimizer:
                forget_moments(self.training.optimizer)
        with Progress(
            f"train {span.name}",
            span.end - span.start,
            "steps",
            self.state.step - span.start,
            self.context.leads,
        ) as bar:
            while self.state.step < span.end and not self.stopping:
                start = time.perf_counter()
                lr = span.learning_rate(self.state.step)
                result = self._step(span, lr)
                seconds = time.perf_counter() - start
                self.watchdog.heard()
                line = step_line(
                    config,
                    self.state,
                    span,
                    result,
                    self.plan,
                    lr,
                    target,
                    seconds,
                    self.saving,
                    self.busy_R,
                    backend.peak_memory(),
                    backend.peak_flops(config.train.precision),
                )
                done = self.state.step
                if done % config.train.probe_every == 0 or done == span.end:
                    self.watchdog.heard(more=_LONG)
                    line |= self.evaluation.measure()
                bar.advance(note=f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s")
                if self.log is not None:
                    self.log.write(line)
                busy = self.training.busy.seconds
                self.rank_log.write(rank_line(line, busy, self.context.leads, bar.line()))
                self._between_steps(span.name)
                self.watchdog.heard()
        if self.context.leads:
            steps = self.state.step - first
            path = self.run.checkpoints / f"step_{self.state.step:08d}"
            written = [ref.path for ref in checkpoint_files.found(self.run.checkpoints) if ref.step > first]
            finish(
                self.run.root,
                f"train {span.name}",
                devices=self.context.world_size,
                tokens=steps * config.tokens_per_step(),
                seconds=time.time() - self.began,
                inputs={**self.files, **self.identities, **self.origin},
                outputs={str(saved): checkpoint_files.identity(saved) for saved in written},
                again=True,
            )
            self.origin = {str(path): checkpoint_files.identity(path)}
            stops = self.stopping and self.state.step < self.last_step
            end = "stops (SIGTERM; the same command goes on)" if stops else "ends"
            self.context.announce(
                f"{self.run.root}: phase {span.name} {end} at step {self.state.step}, "
                f"loss {line['loss']:.4f}; wrote {path}"
            )
        self.began = time.time()

    def _say_unseen(self, span: PhaseSpan) -> None:
        """Say which windows the coming of a phase's keep masks leaves undrawn in the epochs they close."""
        start = span.start * self.config.train.global_batch
        unseen = next(phase.unseen for phase in self.plan.phases if phase.start == start)
        for name, windows in unseen.items():
            self.context.announce(
                f"{self.run.root}: phase {span.name} brings another keep mask of {name}; "
                f"{windows:,} windows of its epoch stay unseen"
            )

    def _read_ahead(self) -> None:
        """Ask for this rank's windows of the coming steps, so that a cold page cache is no wall."""
        size = self.config.train.global_batch
        steps = -(-_READ_AHEAD * self.context.data_size // size)
        while self.asked < min(self.state.step + steps, self.last_step):
            first = self.state.samples + (self.asked - self.state.step) * size
            self.loader.read_ahead(rank_samples(first, size, self.config.train.micro_batch, self.context))
            self.asked += 1

    def _step(self, span: PhaseSpan, lr: float) -> StepResult:
        config = self.config
        self._read_ahead()
        set_schedule(self.training.optimizer, lr, config.optimizer.weight_decay)
        batches = micro_batches(
            self.loader, self.state.samples, config.train.global_batch, config.train.micro_batch, self.context
        )
        tolerant = FaultTolerantBatches(batches, self.passes, self.loader, self.shape.micro_batch)
        result = train_step(
            self.training,
            iter(tolerant),
            self.passes,
            self.shape,
            self.guard.refuses,
            discard=lambda: tolerant.error is not None,
        )
        if result.refused is not None:
            self._look_into(tolerant.error, result.refused, span)
        self.state.step += 1
        self.state.samples += config.train.global_batch
        self.state.tokens += config.tokens_per_step()
        self.state.guard = self.guard.history()
        return result

    def _look_into(self, error: Exception | None, reason: str, span: PhaseSpan) -> None:
        """A step was not taken, on any rank: was its data unreadable, or only its gradient bad?"""
        first = self.state.samples
        where = f"step {self.state.step + 1}, samples {first} to {first + self.config.train.global_batch - 1}"
        told = gather_objects(None if error is None else str(error))
        if any(told):
            self._save(span.name)
            self.saver.wait()
            if error is not None:
                raise error
            rank = next(rank for rank, message in enumerate(told) if message)
            raise UnreadableDataError(f"rank {rank} could not read its part of {where}: {told[rank]}")
        if self.context.leads:
            say(f"{self.run.root}: {where}: skipped, {reason}")
        try:
            self.guard.check()
        except TooManyBadStepsError:
            self._save(span.name)
            self.saver.wait()
            raise

    def _between_steps(self, phase: str) -> None:
        """Complete a save that is written, begin one that is due, and stop where a rank was asked to."""
        step = self.state.step
        stop, writing, *busy_us = self.agreement.result()
        self.busy_R = [us / 1e6 for us in busy_us]
        start = time.perf_counter()
        self.saver.poll(writing)
        self.stopping = bool(stop)
        last = self.stopping or any(step == span.end for span in self.spans)
        if last or step in self.kept or step % self.config.train.checkpoint_every == 0:
            self._save(phase)
        if last:
            self.watchdog.heard(more=_LONG)
            self.saver.wait()
        self.saving = time.perf_counter() - start
        mine = [0] * self.context.world_size
        mine[self.context.rank] = int(self.training.busy.seconds * 1e6)
        self.agreement.submit(self.stop.requested, self.saver.writing, *mine)

    def _save(self, phase: str) -> None:
        # First: a run that resumes at this checkpoint never writes these steps' lines again.
        if self.log is not None:
            self.log.flush()
        self.saver.save(
            self.training.gpt,
            self.training.optimizer,
            self.state,
            self.config.model,
            phase,
            self.plan_text,
        )

    def _resume(self, data: OpenData) -> TrainState:
        """Fill the model from the run's last checkpoint, else from where the configuration says."""
        saved = checkpoint_files.found(self.run.checkpoints)
        if saved:
            path = saved[-1].path
        elif self.config.train.init_from:
            path = Path(self.config.train.init_from)
        else:
            if weights := self.config.train.init_weights:
                training = self.training
                load_weights(Path(weights), training.gpt, training.optimizer, self.config.model)
                self.origin = {weights: checkpoint_files.identity(Path(weights))}
            return TrainState()
        resume.check_past(path, self.config, data, self.identities)
        state = load_checkpoint(path, self.training.gpt, self.training.optimizer, self.config.model)
        self.origin = {str(path): checkpoint_files.identity(path)}
        if state.guard:
            self.guard.load(state.guard)
        if self.context.leads:
            self.context.announce(f"{self.run.root}: continues from {path}")
            if damaged := checkpoint_files.damaged(self.run.checkpoints):
                names = ", ".join(path.name for path in damaged)
                say(
                    f"{self.run.root}: warning: {names} cannot be read (damaged, or another version's); the "
                    f"run goes on without"
                )
        return state
