"""A launch worked out before it costs anything: sizes, memory per rank, tokens, epochs, time, checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1 import config_io
from megatron_r1.checkpoint.files import Retention
from megatron_r1.config import Config
from megatron_r1.launch import paper
from megatron_r1.launch.data import DataPlan, plan_data, warnings
from megatron_r1.train.schedule import retained_steps

if TYPE_CHECKING:
    from megatron_r1.launch.memory import RankMemory

GIB = 2**30


@dataclass(frozen=True)
class Launch:
    """What the plan assumes of the machines."""

    gpus: int
    rank: int = 0
    """The rank whose memory and samples are printed."""
    mfu: float = 0.4
    """Share of the peak that a run is assumed to reach."""
    peak_flops: float = 989e12
    """Of one GPU, dense bf16 (H100 SXM)."""
    gpu_memory: int = 80 * GIB
    """Bytes of one GPU."""

    def mistakes(self, config: Config) -> list[str]:
        out = []
        if self.gpus < 1:
            return [f"--gpus {self.gpus}: a launch needs at least one"]
        if not 0 <= self.rank < self.gpus:
            out.append(f"--rank {self.rank}: {self.gpus} GPUs are ranks 0 to {self.gpus - 1}")
        if not 0 < self.mfu <= 1:
            out.append(f"--mfu {self.mfu}: a share of the peak, above 0 and at most 1")
        if not 0 < self.peak_flops < math.inf or not self.gpu_memory > 0:
            out.append("--peak-tflops and --gpu-memory must be positive and finite")
        if self.gpus % max(1, config.parallel.model_ranks()) == 0:
            tokens = config.data.seq_length
            parts = 2 * config.parallel.context if config.parallel.context > 1 else 1
            if config.parallel.sequence:
                parts *= config.parallel.tensor
            if parts and tokens % parts:
                out.append(
                    f"data.seq_length={tokens} does not divide into {parts} parts for parallel.context and "
                    f"parallel.sequence; use a multiple of {parts}"
                )
        return out + config_io.check_world(config, self.gpus)


@dataclass(frozen=True)
class Checkpoints:
    size: int
    """Bytes of one: weights in the training type, fp32 main parameters and two moments."""
    saved: int
    """How many the run writes."""
    kept: int
    """How many are there in the end."""


@dataclass(frozen=True)
class FirstSamples:
    """What a rank reads first, one row a sample."""

    sample_N: np.ndarray
    source_N: np.ndarray
    epoch_N: np.ndarray
    window_N: np.ndarray


@dataclass(frozen=True)
class LaunchPlan:
    config: Config
    launch: Launch
    data: DataPlan
    checkpoints: Checkpoints
    memory: list[RankMemory] = field(default_factory=list)
    """Of the asked rank first, then of one rank of every other pipeline stage."""
    first: FirstSamples | None = None

    @property
    def flops(self) -> float:
        """Of all phases; activation recompute not counted, as in MFU."""
        return self.config.model.flops_per_token(self.config.data.seq_length) * self.data.tokens

    @property
    def gpu_hours(self) -> float:
        return self.flops / (self.launch.peak_flops * self.launch.mfu) / 3600

    @property
    def step_seconds(self) -> float:
        return self.gpu_hours * 3600 / self.launch.gpus / self.data.steps

    def mfu_of(self, gpu_hours: float) -> float:
        """The MFU at which the plan would take so many GPU hours."""
        return self.flops / (gpu_hours * 3600 * self.launch.peak_flops)

    def differences(self) -> list[str]:
        return paper.differences(self.config, self.launch.gpus)

    def warnings(self) -> list[str]:
        out = warnings(self.config, self.data, self.launch.gpus)
        for held in self.memory:
            if held.total > self.launch.gpu_memory:
                out.append(
                    f"rank {held.context.rank} holds at least {held.total / GIB:.1f} GiB, a GPU has "
                    f"{self.launch.gpu_memory / GIB:.0f}: lower train.micro_batch, or set train.head_chunk "
                    f"or train.recompute"
                )
        return out


def plan_launch(config: Config, launch: Launch, build: bool = True) -> LaunchPlan:
    """Work out the launch. `build` False leaves out what needs torch: memory and first samples.

    Raises ConfigError with every mistake: sizes that do not divide, datasets that are damaged, or absent
    and of unknown size.
    """
    data = plan_data(config, launch.mistakes(config))
    checkpoints = plan_checkpoints(config)
    if not build:
        return LaunchPlan(config, launch, data, checkpoints)
    from megatron_r1.launch.memory import rank_memory
    from megatron_r1.train.batches import rank_samples

    memory = [rank_memory(config, launch.gpus, launch.rank)]
    per_stage = launch.gpus // config.parallel.pipeline
    memory += [
        rank_memory(config, launch.gpus, stage * per_stage)
        for stage in range(config.parallel.pipeline)
        if stage != memory[0].context.pipeline_rank
    ]
    train = config.train
    sample_N = rank_samples(0, train.global_batch, train.micro_batch, memory[0].context)
    first = FirstSamples(sample_N, *data.blend.locate_many(sample_N))
    return LaunchPlan(config, launch, data, checkpoints, memory, first)


def plan_checkpoints(config: Config) -> Checkpoints:
    numel = config.model.parameters()
    size = numel * ((2 if config.train.precision == "bf16" else 4) + 12)
    last = sum(config.phase_steps(name) for name in config.phases)
    pinned = {step for step in retained_steps(config) if step <= last}
    saved = sorted(pinned | set(range(config.train.checkpoint_every, last, config.train.checkpoint_every)))
    retention = Retention(config.train.keep_last, config.train.keep_every, frozenset(pinned))
    return Checkpoints(size, len(saved), len(saved) - len(retention.surplus(saved)))
