"""A training run: the recipe's phases, one after the other, from the run's last checkpoint on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import NoReturn

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.load import load_checkpoint, load_weights
from megatron_r1.checkpoint.save import Saver
from megatron_r1.config import Config
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
from megatron_r1.system.process import StopRequest, exit_when_orphaned
from megatron_r1.system.terminal import Progress, is_first_rank, say
from megatron_r1.train import resume
from megatron_r1.train.batches import StepBatches
from megatron_r1.train.evaluate import Evaluation
from megatron_r1.train.health import StepGuard, TooManyBadStepsError, UnreadableDataError, Watchdog
from megatron_r1.train.metrics import (
    MetricsLog,
    RankLog,
    cost_line,
    open_log,
    rank_line,
    require_packages,
    step_line,
)
from megatron_r1.train.objective import Distillation, PhaseTeacher, next_token
from megatron_r1.train.optimizer import forget_moments, set_schedule
from megatron_r1.train.schedule import PhaseSpan, phase_spans, retention
from megatron_r1.train.step import Shape, StepResult, build_training, train_step

_LONG = 3600.0
"""Seconds more than a step that measuring, or the last write of a phase, may take."""


@dataclass(frozen=True)
class _Pending:
    """A step that was enqueued, whose result is not read yet, and what its line of metrics needs besides."""

    result: Callable[[], StepResult]
    before: TrainState
    after: TrainState
    saving: float
    one_id: int
    """Windows of one id throughout, which all ranks drew in the step before."""


def train(
    config: Config,
    files: Mapping[str, str] | None = None,
    data: OpenData | None = None,
    teachers: Mapping[str, PhaseTeacher] | None = None,
) -> None:
    """Train the rest of the run, or until a rank gets SIGTERM. Every rank of the launch calls this.

    `files`: configuration file -> SHA-256, for the ledger. `data`: the datasets, if they are open already.
    `teachers`: of each phase with an objective. Raises ConfigError or ValueError before anything is written
    if the configuration does not fit the launch, the datasets, the teachers, or the past of the run.
    """
    data = data or open_data(config, launched())
    data.plan  # noqa: B018  (laid here, so that its mistakes come before the launch's groups)
    if resume.is_finished(config):
        lines = resume.describe_start(config, data)
        if is_first_rank():
            resume.record_end(config)
            say("\n".join(lines), result=True)
        return
    resume.check_beginning(config, data)
    if is_first_rank():
        require_packages(config.train)
    if config.train.deterministic:
        backend.compute_deterministically()
    exit_when_orphaned()
    run = RunDir(Path(config.train.run))
    with process_groups(config.parallel) as context, holding(run.root, context), StopRequest() as stop:
        Trainer(config, data, context, run, stop, files or {}, teachers or {}).train()


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
        teachers: Mapping[str, PhaseTeacher],
    ):
        self.config, self.plan, self.context, self.run, self.stop = config, data.plan, context, run, stop
        # Asked by one rank for all: of a pair without a sidecar it takes a read of the whole index.
        asked = (data.identities, data.drawn_from) if context.leads else None
        identities, drawn_from = broadcast_object(asked)
        self.plan_text = resume.plan_text(data, drawn_from)
        self.batches = StepBatches(config, data, context)
        self.shape = Shape(config.train.micro_batch, config.data.seq_length, len(data.corpora))
        self.training = build_training(config)
        self.guard = StepGuard(config.health)
        self.origin: dict[str, str] = {}
        """Checkpoint that the next steps begin with -> its identity, asked while it is there."""
        self.spans = phase_spans(config)
        self.teachers = teachers
        self.state = self._resume(data, drawn_from)
        left = [span for span in self.spans if self.state.step < span.end]
        if missing := [s.name for s in left if s.config.objective and s.name not in teachers]:
            raise ValueError(f"phases.{missing[0]}.objective: train() got no teacher (distill.open.teachers)")
        # Here, so that the teacher's mistakes come before the run writes anything.
        for span in left[:1]:
            self._set_objective(span)
        self.inputs = {**files, **identities}
        """For the ledger: files and datasets -> their identities."""
        self.last_step = self.spans[-1].end
        self.retention = retention(config)
        self.saver = Saver(run.checkpoints, self.retention)
        self.agreement = DelayedAllReduce(flags=3 + context.world_size)
        self.busy = 0.0
        """Seconds that this rank was busy in the last step whose result it knows."""
        self.busy_R = [0.0] * context.world_size
        """The same of each rank, as of the agreement before."""
        self.writing = 0
        """Ranks that wrote a checkpoint at the agreement before."""
        self.saving = 0.0
        """Seconds that checkpoints held this rank up since the step before."""
        self.stopping = False
        """All ranks have agreed to stop, because one was asked to."""
        self.evaluation = Evaluation(config, data, self.training, context)
        self.watchdog = Watchdog(config.health.hang_seconds, run.rank_log(context.rank))
        self.log: MetricsLog | None = None
        self.rank_log = RankLog(run.rank_log(context.rank))
        self.began: float | None = None
        """When the phase began; None: with this process, so that imports count."""

    def _resume(self, data: OpenData, drawn_from: Mapping[str, str]) -> TrainState:
        """Fill the model from the run's last checkpoint, else from where the configuration says."""
        train, model = self.config.train, self.config.model
        _, last = resume.standing(self.config)
        if last is None and train.init_weights:
            path = Path(train.init_weights)
            load_weights(path, self.training.gpt, self.training.optimizer, model, train.expect)
            self.origin = {train.init_weights: checkpoint_files.identity(path)}
            return TrainState()
        begin = last.path if last else train.init_from
        if not begin:
            return TrainState()
        path = Path(begin)
        resume.check_past(path, self.config, data, drawn_from)
        expect = None if last else train.expect
        state = load_checkpoint(path, self.training.gpt, self.training.optimizer, model, expect=expect)
        self.origin = {str(path): checkpoint_files.identity(path)}
        if state.guard:
            self.guard.load(state.guard)
        self.context.announce(f"{self.run.root}: continues from {path}")
        return state

    def train(self) -> None:
        """Train to the end of the recipe, or until a rank is asked to stop.

        TooManyBadStepsError and unreadable data end all ranks. The run is saved before that.
        """
        if self.context.leads:
            resume.record_start(self.config, self.state.step, self.plan_text)
            self.context.announce(
                f"{self.run.root}: step {self.state.step} of {self.last_step} | "
                f"{self.config.model.parameters():,} parameters | "
                f"{self.config.tokens_per_step():,} tokens a step | "
                f"{self.context.world_size} ranks | {backend.describe(not self.config.data.cross_documents)}"
            )
            self.log = open_log(self.run, self.state.step, self.config)
        with self.watchdog:
            for span in self.spans:
                if self.state.step < span.end and not self.stopping:
                    self._train_phase(span)
        if self.log is not None:
            self.log.add_saving(self.saving)
            self.log.close()
        self.rank_log.close()

    def _set_objective(self, span: PhaseSpan) -> None:
        """Load a phase's teacher, once that of the phase before is let go."""
        self.training.objective, self.batches.records, self.objective_of = next_token, None, span.name
        identities: dict[str, str] = {}
        if span.config.objective:
            teacher, gpt = self.teachers[span.name], self.training.last
            # Asked by one rank for all: weights are read for it.
            identities = broadcast_object(teacher.identities if self.context.leads else None)
            for line in resume.check_teacher(self.state, span, identities):
                self.context.announce(f"{self.run.root}: {line}")
            targets = teacher.targets(self.context)
            self.training.objective = Distillation(gpt, targets, teacher.tokens, span.config.objective)
            self.batches.records = teacher.records
        self.state = replace(self.state, teacher=identities)

    def _train_phase(self, span: PhaseSpan) -> None:
        first, leads = self.state.step, self.context.leads
        self.watchdog.heard(more=_LONG)
        if span.name != self.objective_of:
            self._set_objective(span)
        if first == span.start:
            self._begin_phase(span)
        with Progress(f"train {span.name}", span.steps, "steps", first - span.start, leads) as bar:
            waiting: _Pending | None = None
            while self.state.step < span.end and not self.stopping:
                step = self._enqueue(span)
                # While the device takes this step: what came of the one before.
                if waiting is not None:
                    self._settle(waiting, span, bar)
                waiting = step
                if step.before.step == first or self._known_at_once(span):
                    loss, waiting = self._settle(step, span, bar), None
                self._between_steps(span)
                self.watchdog.heard()
        if leads:
            self._end_phase(span, first, loss)
        self.began = time.time()

    def _begin_phase(self, span: PhaseSpan) -> None:
        start = span.start * self.config.train.global_batch
        unseen = next(phase.unseen for phase in self.plan.phases if phase.start == start)
        for name, windows in unseen.items():
            self.context.announce(
                f"{self.run.root}: phase {span.name} brings another keep mask of {name}; "
                f"{windows:,} windows of its epoch stay unseen"
            )
        self.guard.forget()
        if span.config.reset_optimizer:
            forget_moments(self.training.optimizer)

    def _end_phase(self, span: PhaseSpan, first: int, loss: float) -> None:
        """Record this launch's part of a phase, from step `first` on. The first rank calls this."""
        step = self.state.step
        saved = checkpoint_files.complete_checkpoints(self.run.checkpoints)
        resume.record_phase(
            self.run,
            span.name,
            devices=self.context.world_size,
            tokens=(step - first) * self.config.tokens_per_step(),
            seconds=None if self.began is None else time.time() - self.began,
            inputs={**self.inputs, **resume.masks_of(span), **self.origin, **self.state.teacher},
            checkpoints=[ref.path for ref in saved if ref.step > first],
        )
        path = checkpoint_files.step_path(self.run.checkpoints, step)
        self.origin = {str(path): checkpoint_files.identity(path)}
        stops = self.stopping and step < self.last_step
        end = "stops (SIGTERM; the same command goes on)" if stops else "ends"
        self.context.announce(
            f"{self.run.root}: phase {span.name} {end} at step {step}, loss {loss:.4f}; wrote {path}"
        )

    def _enqueue(self, span: PhaseSpan) -> _Pending:
        """Begin a step, with which `state` advances. Reads what all ranks have submitted after the last."""
        config, before, saving = self.config, self.state, self.saving
        batches = self.batches.of_step(before.samples)
        set_schedule(self.training.optimizer, span.learning_rate(before.step), config.optimizer.weight_decay)
        result = train_step(
            self.training, batches, self.batches.passes, self.shape, lost=lambda: bool(self.batches.errors)
        )
        self.state = replace(
            before,
            step=before.step + 1,
            samples=before.samples + config.train.global_batch,
            tokens=before.tokens + config.tokens_per_step(),
        )
        stop, self.writing, one_id, *busy_us = self.agreement.result()
        self.stopping, self.busy_R = bool(stop), [us / 1e6 for us in busy_us]
        return _Pending(result, before, self.state, saving, one_id)

    def _known_at_once(self, span: PhaseSpan) -> bool:
        """Whether another step has to wait for the last one's result: a stop, a save or a measurement."""
        return self._saves(span) or self._measures(span, self.state.step) or self.guard.may_stop()

    def _measures(self, span: PhaseSpan, step: int) -> bool:
        return step % self.config.train.probe_every == 0 or step == span.end

    def _saves(self, span: PhaseSpan) -> bool:
        step = self.state.step
        last = self.stopping or step == span.end
        return last or step in self.retention.steps or step % self.config.train.checkpoint_every == 0

    def _settle(self, pending: _Pending, span: PhaseSpan, bar: Progress) -> float:
        """Wait for a step's result, judge it and report it. Returns its loss, nats a label."""
        result, state, leads = pending.result(), pending.after, self.context.leads
        self.watchdog.heard()
        first = pending.before.samples
        where = f"step {state.step}, samples {first} to {state.samples - 1}"
        if result.lost:
            self._end_unreadable(pending.before, where, span)
        refused = self.guard.refuses(result.loss(), result.grad_norm)
        assert (refused is not None) == result.left_out
        if refused and not isfinite(result.figures.get("teacher_entropy", 0.0)):
            where_from = f"phases.{span.name}.objective"
            refused = f"none of its labels counts or has a record ({where_from})"
            if result.tokens_N.any():
                refused = f"the teacher's logits are not finite ({where_from})"
                if pending.before.step == span.start:
                    raise ValueError(f"{self.run.root}: {where}: {refused}; nothing was trained with it")
        if leads and (refused or self.guard.spike):
            taken = f"{self.guard.spike}; taken (optimizer.clip_grad={self.config.optimizer.clip_grad:g})"
            say(f"{self.run.root}: {where}: {f'skipped, {refused}' if refused else taken}")
        self.busy = result.busy
        line = step_line(self.config, self.plan, span, state, result)
        line |= cost_line(self.config, result.seconds, pending.saving, self.busy_R)
        if self._measures(span, state.step):
            self.watchdog.heard(more=_LONG)
            line |= self.evaluation.measure()
        if pending.one_id:
            line["one_id_windows"] = pending.one_id
        bar.advance(note=f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s")
        if self.log is not None:
            self.log.write(line)
        self.rank_log.write(rank_line(line, result.busy, leads, bar.line()))
        self._check_health(state, span)
        return result.loss()

    def _end_unreadable(self, before: TrainState, where: str, span: PhaseSpan) -> NoReturn:
        """Save the run as it was before the step whose data a rank could not read, and end it.

        The weights are still those: this step was left out, and so was any that is enqueued behind it.
        """
        error = self.batches.errors.get(before.samples)
        errors = gather_objects(None if error is None else str(error))
        failed = next(rank for rank, message in enumerate(errors) if message is not None)
        self.state = before
        self._save(span)
        self.saver.wait()
        message = f"rank {failed} could not read its part of {where}: {errors[failed]}"
        raise error or UnreadableDataError(message)

    def _check_health(self, state: TrainState, span: PhaseSpan) -> None:
        """Save and stop where the guard says so. The error has the ways on."""
        try:
            self.guard.check(state.step)
        except TooManyBadStepsError as error:
            # `may_stop` foresaw it: no other step is under way.
            assert state is self.state
            state.guard = self.guard.history()
            self._save(span)
            self.saver.wait()
            way_on = resume.way_on(self.run, span, state.step, self.guard.best)
            raise TooManyBadStepsError(f"{self.run.root}: {error}; {way_on}") from None
        state.guard = self.guard.history()

    def _between_steps(self, span: PhaseSpan) -> None:
        """Complete a save that is written, and begin one that is due."""
        start = time.perf_counter()
        self.saver.poll(self.writing)
        if self._saves(span):
            self._save(span)
        if self.stopping or self.state.step == span.end:
            self.watchdog.heard(more=_LONG)
            self.saver.wait()
        self.saving = time.perf_counter() - start
        mine = [0] * self.context.world_size
        mine[self.context.rank] = int(self.busy * 1e6)
        one_id = self.batches.one_id_windows()
        self.agreement.submit(self.stop.requested, self.saver.writing, one_id, *mine)

    def _save(self, span: PhaseSpan) -> None:
        # First: a run that resumes at this checkpoint never writes these steps' lines again.
        if self.log is not None:
            self.log.flush()
        training, model = self.training, self.config.model
        self.saver.save(training.gpt, training.optimizer, self.state, model, span.name, self.plan_text)
