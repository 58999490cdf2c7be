"""A launch worked out before it costs anything: sizes, memory per rank, tokens, epochs, time, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.open import OpenData, open_data
from megatron_r1.train.schedule import phase_spans, retention

if TYPE_CHECKING:
    from megatron_r1.launch.memory import RankMemory

GIB = 2**30
DIVERGENCE = 1 << 30
"""Bytes of both models' logits, a chunk at a time, and of their temporaries (model/divergence.py)."""
_MOST_GPUS = 100_000


@dataclass(frozen=True)
class Launch:
    """Assumptions about the machines."""

    gpus: int
    rank: int = 0
    """The rank whose memory and samples are printed."""
    mfu: float = 0.4
    """Share of the peak that a run is assumed to reach."""
    peak_flops: float = 989e12
    """Of one GPU, dense bf16 (H100 SXM)."""
    gpu_memory: float = 80 * GIB
    """Bytes of one GPU."""

    def mistakes(self, config: Config) -> list[str]:
        if not 1 <= self.gpus <= _MOST_GPUS:
            most = f"a launch needs at least one, and {_MOST_GPUS:,} at most are planned"
            return [f"--gpus {self.gpus}: {most}"]
        sizes = [
            ("train.global_batch", config.train.global_batch, 1 << 24),
            ("data.seq_length", config.data.seq_length, 1 << 24),
            ("model.num_layers", config.model.num_layers, 4096),
            ("model.parameters", config.model.parameters(), 1 << 50),
            ("checkpoints", phase_spans(config)[-1].end // config.train.checkpoint_every, 1 << 20),
        ]
        out = [f"{name}: {n:,} is more than is planned, {most:,}" for name, n, most in sizes if n > most]
        if not 0 <= self.rank < self.gpus:
            out.append(f"--rank {self.rank}: {self.gpus} GPUs are ranks 0 to {self.gpus - 1}")
        if not 0 < self.mfu <= 1:
            out.append(f"--mfu {self.mfu}: a share of the peak, above 0 and at most 1")
        if not 0 < self.peak_flops < math.inf or not 0 < self.gpu_memory < math.inf:
            out.append("--peak-tflops and --gpu-memory must be positive and finite")
        return out + config_io.check_world(config, self.gpus)


@dataclass(frozen=True)
class Checkpoints:
    size: int
    """Bytes of one: weights in the training type, fp32 main parameters and two moments."""
    saved: int
    """Number that the run writes."""
    kept: int
    """Number that is there in the end."""


@dataclass(frozen=True)
class LaunchPlan:
    config: Config
    launch: Launch
    data: OpenData
    """Datasets that are there are themselves, others as large as the recipe says."""
    checkpoints: Checkpoints
    memory: list[RankMemory] = field(default_factory=list)
    """Of the asked rank first, then of one rank of every other pipeline stage."""
    first_N: np.ndarray | None = None
    """Samples of the asked rank in the first step."""
    teachers: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Phase -> parameters and FLOP a token of the teacher that runs beside the student."""

    @property
    def steps(self) -> int:
        return phase_spans(self.config)[-1].end

    @property
    def tokens(self) -> int:
        return self.steps * self.config.tokens_per_step()

    def epochs(self) -> dict[str, float]:
        """Source -> passes over it in all phases."""
        return self.data.plan.epochs(self.steps * self.config.train.global_batch)

    @property
    def flops(self) -> float:
        """The student's, of all phases; activation recompute not counted, as in MFU."""
        return self.config.model.flops_per_token(self.config.data.seq_length) * self.tokens

    def teacher_flops(self, phase: str) -> float:
        """The ranks of a context-parallel group run whole rows each."""
        steps, (_, each) = self.config.phase_steps(phase), self.teachers[phase]
        return each * steps * self.config.tokens_per_step() * self.config.parallel.context

    @property
    def gpu_hours(self) -> float:
        flops = self.flops + sum(map(self.teacher_flops, self.teachers))
        return flops / (self.launch.peak_flops * self.launch.mfu) / 3600

    def distilled(self) -> tuple[int, int, int] | None:
        """Bytes that a phase with a teacher takes in place of kept logits: the largest teacher's weights, the
        gradient of the hidden states until the backward pass, the chunks. None: no such phase."""
        config, train = self.config, self.config.train
        if not any(phase.objective for phase in config.phases.values()):
            return None
        width = 2 if train.precision == "bf16" else 4
        teacher = max((parameters * width for parameters, _ in self.teachers.values()), default=0)
        tokens = train.micro_batch * config.data.seq_length // config.parallel.context
        return teacher, tokens * width * config.model.hidden_size, DIVERGENCE

    def total(self, held: RankMemory) -> int:
        """Bytes of a rank in its fullest phase."""
        kept = held.logits if self.keeps_logits(held.context.context_size) else 0
        return held.total - kept + max(held.logits, sum(self.distilled() or ()))

    def keeps_logits(self, context: int) -> bool:
        """Whether a micro-batch's logits stay for the backward pass of cross-entropy; chunks do not."""
        tokens = self.config.train.micro_batch * self.config.data.seq_length // context
        return tokens <= (self.config.train.head_chunk or tokens)

    @property
    def step_seconds(self) -> float:
        return self.gpu_hours * 3600 / self.launch.gpus / self.steps

    def mfu_of(self, gpu_hours: float) -> float:
        """The MFU at which the plan would take so many GPU hours."""
        return self.flops / (gpu_hours * 3600 * self.launch.peak_flops)


def plan_launch(
    config: Config,
    launch: Launch,
    build: bool = True,
    teachers: Mapping[str, tuple[int, float]] | None = None,
) -> LaunchPlan:
    """Work out the launch. `build` False leaves out memory and first samples, which need torch.

    `teachers`: phase -> parameters and FLOP a token of its teacher, of which those that a cache stands for
    take no part. Raises ConfigError with every mistake: sizes that do not divide, datasets that are damaged,
    or absent and of unknown size.
    """
    data = open_data(config, use="plan", also=lambda _: launch.mistakes(config))
    # Laid here, so that its mistakes come before the model is built.
    data.plan  # noqa: B018
    checkpoints = plan_checkpoints(config)
    objectives = {name: phase.objective for name, phase in config.phases.items() if phase.objective}
    beside = {name: (teachers or {})[name] for name, how in objectives.items() if not how.cache}
    if not build:
        return LaunchPlan(config, launch, data, checkpoints, teachers=beside)
    from megatron_r1.launch.memory import rank_memory
    from megatron_r1.train.batches import rank_samples

    memory = [rank_memory(config, launch.gpus, launch.rank)]
    per_stage = launch.gpus // config.parallel.pipeline
    memory += [
        rank_memory(config, launch.gpus, stage * per_stage)
        for stage in range(config.parallel.pipeline)
        if stage != memory[0].context.pipeline_rank
    ]
    first_N = rank_samples(0, config.train.global_batch, config.train.micro_batch, memory[0].context)
    return LaunchPlan(config, launch, data, checkpoints, memory, first_N, beside)


def plan_checkpoints(config: Config) -> Checkpoints:
    train, stays, last = config.train, retention(config), phase_spans(config)[-1].end
    size = config.model.parameters() * ((2 if train.precision == "bf16" else 4) + 12)
    saved = {step for step in stays.steps if step <= last}
    saved |= set(range(train.checkpoint_every, last, train.checkpoint_every))
    return Checkpoints(size, len(saved), len(saved) - len(stays.surplus(list(saved))))
