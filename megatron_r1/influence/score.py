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
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.config import Config
from megatron_r1.data.loader import example_batches
from megatron_r1.data.windows import Examples, Unit
from megatron_r1.influence import datainf, kfac
from megatron_r1.influence.curvature import precondition, resolve
from megatron_r1.influence.directions import DirectionCache, own_products, without_own
from megatron_r1.influence.gradients import Scorer, score
from megatron_r1.influence.kfac import DrawnPasses
from megatron_r1.influence.methods import Directions, Ghost, LowRank, Method, WgradDot, correlation
from megatron_r1.influence.parameters import select
from megatron_r1.influence.passes import mean_gradient, squared_norm, weigh
from megatron_r1.influence.plan import Part, Work, lay_plan, scores_of
from megatron_r1.influence.projection import Projected, build_projection, projected_directions
from megatron_r1.influence.store import ScoreStore, check_inputs, fingerprint_of
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import ParallelContext, broadcast_object, holding, process_groups, sum_over
from megatron_r1.records import Batch, CheckpointRef, Corpus
from megatron_r1.run import ledger
from megatron_r1.run.layout import RunDir
from megatron_r1.system.process import exit_when_orphaned
from megatron_r1.system.terminal import Progress

# isort: split
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

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
    for part in job.all_parts():
        check_inputs(part.directory, part.inputs)
    influence = RunDir(Path(config.train.run)).influence
    if not any(part.left() for part in job.all_parts()):
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
        return [part for found in self.parts.values() for part in found]


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
        weights = fingerprint_of([path for path in ref.path.iterdir() if path.is_file()])
        parts[ref.step] = work.parts(ref.step, weights, curvature)
    return Job(work, refs, curvature, parts)


class Scoring:
    """The model on this rank, and the passes over it."""

    def __init__(self, job: Job, context: ParallelContext):
        work, config = job.work, job.work.config
        self.config, self.work, self.context, self.parts = config, work, context, job.parts
        self.refs, self.curvature = job.refs, job.curvature
        self.passed, self.pass_seconds = 0, 0.0
        """Windows of probing sets passed at this checkpoint, none from the cache, and the time that took."""
        self.left: dict[int, int] = {}
        """Examples to score at each checkpoint when this launch began."""
        self.names = frozenset(select(work.influence.layers, config.model.num_layers))
        self.began = ledger.process_start()
        self.eod = work.data.eod
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

    def run(self) -> None:
        left = self.left = {step: self.left_of(found) for step, found in self.parts.items()}
        total = self.work.examples() * len(self.refs)
        done = total - sum(left.values())
        self.context.announce(
            f"{self.config.train.run}: {self.work.summary()} | {done:,} done before | "
            f"{self.context.world_size} ranks | {backend.describe(plain_layers=True, trains=False)}"
        )
        with Progress("score influence", total, "examples", done, self.context.leads) as bar:
            for ref in self.refs:
                if left[ref.step]:
                    self._score_checkpoint(ref, left[ref.step], bar)
        where = RunDir(Path(self.config.train.run)).influence
        self.context.announce(f"{where}: scored, steps {self.work.steps}; next: tools/make_mix.py")

    def left_of(self, parts: list[Part]) -> int:
        """Rows to compute, as the first rank sees the disk."""
        return broadcast_object(sum(part.left() for part in parts))

    def _score_checkpoint(self, ref: CheckpointRef, examples: int, bar: Progress) -> None:
        load_checkpoint(ref.path, self.gpt, None, self.config.model)
        self.passed, self.pass_seconds = 0, 0.0
        start = time.monotonic()
        directions, norm_C = self.directions(ref)
        seconds = time.monotonic() - start
        probes = self.work.probe_windows()
        later = sum(left for step, left in self.left.items() if step > ref.step)
        about = ""
        if self.passed:
            hours = self.pass_seconds / self.passed * (examples + later) / 3600
            about = f", about {hours:.3g} h on {self.context.world_size} devices"
        self.context.announce(
            f"step {ref.step}: {len(self.work.probes)} directions from {probes} windows in "
            f"{seconds:.1f} s; {examples:,} examples here, {later:,} at later checkpoints{about}"
        )
        method = self.method(directions)
        if isinstance(method, LowRank):
            self._compare(method, directions, ref)
        for part in self.parts[ref.step]:
            self._score_part(part, ref, method, norm_C, bar)
        if self.context.leads:
            tokens = (examples + probes) * self.config.data.seq_length
            self.finish(ref, "influence", tokens, self.began)
        self.began = time.time()

    def directions(self, ref: CheckpointRef) -> tuple[Directions, list[float]]:
        """v_c of every capability, and their norms. Raises ValueError where one is zero or not finite."""
        gradients = []
        cache = self.cache(ref)
        total = self.work.probe_windows()
        with Progress(f"directions of step {ref.step}", total, "windows", show=self.context.leads) as bar:
            for probe in self.work.probes:
                cached = cache.load(probe.name)
                gradient = self._mean_gradient(probe, bar) if cached is None else cached
                square = squared_norm(gradient, self.gpt)
                if not 0 < square < float("inf"):
                    what = "zero" if square == 0 else "not finite"
                    raise ValueError(
                        f"the direction of {probe.name} at step {ref.step} is {what}; look at that "
                        f"checkpoint and at {probe.prefix}"
                    )
                if cached is None:
                    cache.save(probe.name, gradient)
                gradients.append(gradient)
        directions = {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}
        if self.curvature == "datainf":
            self._apply_datainf(directions, ref)
        elif self.curvature in ("kfac", "ekfac"):
            self._apply_kfac(directions, ref)
        else:
            precondition(self.curvature, directions, ref.path, self.gpt)
        norm_C = [
            squared_norm({name: v[c] for name, v in directions.items()}, self.gpt) ** 0.5
            for c in range(len(gradients))
        ]
        return directions, norm_C

    def method(self, directions: Directions) -> Method:
        """What `influence.method` names. Every rank of a model copy calls this."""
        influence, capabilities = self.work.influence, len(self.work.probes)
        if influence.method == "ghost":
            return Ghost(directions, capabilities, self.config.data.seq_length, influence.per_token)
        if influence.method == "lowrank":
            return LowRank(directions, capabilities, influence.rank)
        if influence.method == "projected":
            names = select(influence.layers, self.config.model.num_layers)
            projection = build_projection(
                names, directions, influence.projection, influence.seed, self.context
            )
            projected_CP = projected_directions(projection, directions, capabilities, self.gpt)
            return Projected(projection, frozenset(directions), projected_CP)
        return WgradDot(directions, capabilities, influence.norms)

    def finish(self, ref: CheckpointRef, stage: str, tokens: int, began: float) -> None:
        """The first rank's: a line of what a checkpoint's scores have cost, and its directions may go."""
        self.cache(ref).clear()
        ledger.append(
            Path(self.config.train.run),
            f"{stage} step {ref.step}",
            devices=self.context.world_size,
            tokens=tokens,
            seconds=time.time() - began,
            inputs={str(ref.path): checkpoint_files.identity(ref.path)} | self.work.identities,
            outputs=scores_of(self.parts[ref.step]),
        )

    def cache(self, ref: CheckpointRef) -> DirectionCache:
        part, micro_batch = self.parts[ref.step][0], self.work.influence.micro_batch
        parallel, directory = self.config.parallel, part.directory.parent
        return DirectionCache(directory, part.inputs, micro_batch, parallel, self.context)

    def _measured(self, ref: CheckpointRef) -> list[Examples]:
        """Of all sources alike, the examples that H is measured on: so many, evenly spaced."""
        parts = self.parts[ref.step]
        share = -(-self.work.influence.curvature_examples // len(parts))
        out = []
        for part in parts:
            place = np.linspace(0, len(part.example_N) - 1, min(share, len(part.example_N))).astype(int)
            out.append(self._examples(part.corpus, part.example_N[place]))
        return out

    def _apply_kfac(self, directions: Directions, ref: CheckpointRef) -> None:
        influence, seq_length = self.work.influence, self.config.data.seq_length
        chosen, size = self._measured(ref), influence.micro_batch

        def sources() -> Iterator[tuple[Iterator[Batch], int]]:
            for examples in chosen:
                passes = examples.passes(0, len(examples), size * self.context.data_size)
                yield self._batches(examples, 0, len(examples)), passes

        count, seed = sum(map(len, chosen)), influence.seed
        passes = DrawnPasses(self.model, self.gpt, sources, count, size, seq_length, seed, self.context)
        kfac.apply_inverse(self.curvature, directions, passes)

    def _apply_datainf(self, directions: Directions, ref: CheckpointRef) -> None:
        """H from single examples."""
        chosen = self._measured(ref)

        def gradients() -> Iterator[dict[str, Tensor]]:
            for examples in chosen:
                batches = self._batches(examples, 0, len(examples), micro_batch=1)
                yield from datainf.example_gradients(
                    self.model, self.gpt, self.names, batches, self.config.data.seq_length
                )

        datainf.apply_inverse(directions, gradients, sum(map(len, chosen)), self.gpt, self.context)

    def _mean_gradient(self, probe: Corpus, bar: Progress) -> dict[str, Tensor]:
        """Of one probing set, on every rank its shard."""
        influence, seq_length = self.work.influence, self.config.data.seq_length
        rows = self._examples(probe, self.work.probing(probe))
        per_pass = influence.micro_batch * self.context.data_size

        def counted() -> Iterator[Batch]:
            for number, batch in enumerate(self._batches(rows, 0, len(rows))):
                bar.advance(min(per_pass, len(rows) - number * per_pass))
                yield batch

        passes = rows.passes(0, len(rows), per_pass)
        size, examples = influence.micro_batch, len(rows)
        start = time.monotonic()
        gradient = mean_gradient(
            self.model, self.gpt, counted(), passes, size, seq_length, examples, self.names
        )
        self.passed += examples
        self.pass_seconds += time.monotonic() - start
        return gradient

    def _compare(self, method: LowRank, directions: Directions, ref: CheckpointRef) -> None:
        """Raises ValueError where truncated directions do not order examples as the whole ones do."""
        parts = self.parts[ref.step]
        found: list[list[Tensor]] = [[], []]
        ways: tuple[Method, ...] = (method, WgradDot(directions, len(self.work.probes)))
        for scores, way in zip(found, ways, strict=True):
            for part in parts:
                examples = self._examples(part.corpus, part.example_N, self.work.influence.unit)
                last = min(-(-_COMPARED // len(parts)), len(examples))
                scores.append(torch.from_numpy(self._score_rows(examples, 0, last, way)[0]))
        low, exact = (torch.cat(scores)[:_COMPARED] for scores in found)
        least = correlation(low, exact).min().item()
        influence = self.work.influence
        said = f"correlation {least:.6f} with exact scores on {len(low)} examples, the worst capability's"
        self.context.announce(f"step {ref.step}: directions of rank {influence.rank}, {said}")
        if not least >= influence.min_correlation:
            raise ValueError(
                f"at step {ref.step}, scores by directions of rank {influence.rank} correlate {least:.6f} "
                f"with exact ones, below influence.min_correlation={influence.min_correlation}; raise "
                f"influence.rank, or use influence.method=wgrad-dot"
            )

    def _examples(self, corpus: Corpus, number_N: np.ndarray, unit: Unit = "window") -> Examples:
        return Examples([(corpus, number_N)], self.config.data.seq_length, unit)

    def _score_part(
        self, part: Part, ref: CheckpointRef, method: Method, norm_C: list[float], bar: Progress
    ) -> None:
        examples = self._examples(part.corpus, part.example_N, self.work.influence.unit)
        exclude = self.work.influence.exclude_self
        shared_NC = self.work.shared(part) if exclude else np.zeros((len(examples), 1), bool)
        store = None
        if self.context.leads:
            named = zip((probe.name for probe in self.work.probes), norm_C, strict=True)
            inputs = {**part.inputs, "direction_norms": dict(named)}
            zeros_NX = torch.zeros(1, method.width, dtype=torch.float64)
            shapes = {name: tuple(t.shape[1:]) for name, t in method.results(zeros_NX).items()}
            store = ScoreStore(
                part.directory, inputs, part.example_N, examples.length_N, {**shapes, "losses": ()}
            )
        missing = [c for c in examples.chunks(self.chunk) if store is not None and store.missing(*c)]
        for first, last in broadcast_object(missing):
            before = part.left() if store is not None else 0
            row_NX, loss_N = self._score_rows(examples, first, last, method)
            bad = ~np.isfinite(row_NX).all(1)
            if bad.any():
                number = part.example_N[first + int(np.argmax(bad))]
                raise ValueError(
                    f"the score of {self.work.influence.unit} {number} of {part.corpus.name} at step "
                    f"{part.step} is not finite; nothing of its chunk was written"
                )
            results = method.results(torch.from_numpy(row_NX))
            if shared_NC[first:last].any():
                self._leave_out(results, part, ref, first, shared_NC[first:last])
            if store is not None:
                found = {name: t.numpy().astype(np.float32) for name, t in results.items()}
                store.write(first, {**found, "losses": loss_N.astype(np.float32)})
                bar.advance(before - part.left(), note=f"step {part.step} {part.corpus.name}")

    def _leave_out(
        self, results: dict[str, Tensor], part: Part, ref: CheckpointRef, first: int, shared_NC: np.ndarray
    ) -> None:
        """Take the examples from `first` on out of the directions that hold them, in `results`."""
        shared_N = np.asarray(shared_NC.any(1))
        if "norms" in results and self.curvature == "identity":
            own_N = results["norms"].square()
        else:
            rows = self._examples(part.corpus, part.example_N[first : first + len(shared_N)][shared_N])
            own_N = torch.zeros(len(shared_N), dtype=torch.float64)
            own_N[torch.from_numpy(shared_N)] = self._own_products(rows, ref)
        size_C = torch.tensor([len(self.work.probing(probe)) for probe in self.work.probes])
        results["scores"] = without_own(results["scores"], own_N, torch.from_numpy(shared_NC), size_C)

    def _own_products(self, rows: Examples, ref: CheckpointRef) -> Tensor:
        """<H^-1 g, g> of each row, on every rank: float64 [N]. One pass of each by itself."""
        context, seq_length = self.context, self.config.data.seq_length
        batches = self._batches(rows, 0, len(rows), micro_batch=1)
        gradients = datainf.example_gradients(self.model, self.gpt, self.names, batches, seq_length)
        mine_P = own_products(self.curvature, ref.path, gradients, self.gpt)
        all_PR = torch.zeros(len(mine_P), context.data_size, dtype=torch.float64, device=backend.device())
        # Ranks that share a sequence have the same products.
        all_PR[:, context.data_rank] = mine_P.to(all_PR.device) / context.context_size
        return sum_over("tokens", all_PR).flatten()[: len(rows)].cpu()

    def _score_rows(
        self, examples: Examples, first: int, last: int, method: Method
    ) -> tuple[np.ndarray, np.ndarray]:
        """The method's rows and mean losses of the examples [first, last), on every rank: float64."""
        size, context = self.work.influence.micro_batch, self.context
        passes = examples.passes(first, last, size * context.data_size)
        batches = self._batches(examples, first, last)
        with Scorer(self.gpt, method) as scorer:
            row_NX, loss_N = score(self.model, scorer, batches, passes, size, self.config.data.seq_length)
        # [passes, ranks, B, X + 1]: each rank fills in its own rows, the others' zeros change nothing.
        mine = torch.cat([row_NX, loss_N[:, None]], 1).view(passes, size, -1)
        all_rows = mine.new_zeros(passes, context.data_size, size, mine.shape[-1])
        all_rows[:, context.data_rank] = mine
        rows_PX = sum_over("tokens", all_rows).flatten(0, 2)[: examples.pieces(first, last)].cpu().numpy()
        out = examples.join(first, last, rows_PX)
        if self.work.influence.loss == "sum":
            out[:, -1] /= examples.length_N[first:last]
        return out[:, :-1], out[:, -1]

    def _batches(
        self, examples: Examples, first: int, last: int, micro_batch: int | None = None
    ) -> Iterator[Batch]:
        size = micro_batch or self.work.influence.micro_batch
        for batch, length_B in example_batches(examples, (first, last), size, self.context, self.eod):
            yield weigh(batch, 1 / length_B if self.work.influence.loss == "mean" else np.ones(size))
