"""A launch plan as text, each figure with the arithmetic that gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_r1.launch.paper import PRETRAINING_GPU_HOURS
from megatron_r1.launch.plan import GIB, LaunchPlan

if TYPE_CHECKING:
    from megatron_r1.launch.memory import RankMemory

_SHOWN = 8
"""First samples that are listed."""


def text(plan: LaunchPlan) -> str:
    parts = [_sizes(plan), _data(plan), *(_memory(plan, held) for held in plan.memory)]
    parts += [_time(plan), _checkpoints(plan), _first(plan)]
    warnings = plan.warnings()
    parts.append(["warnings", *(f"  - {text}" for text in warnings)] if warnings else ["no warnings"])
    return "\n\n".join("\n".join(part) for part in parts if part)


def _sizes(plan: LaunchPlan) -> list[str]:
    config, gpus = plan.config, plan.launch.gpus
    copy = config.parallel.model_ranks()
    copies = gpus // copy
    passes = config.train.global_batch // (config.train.micro_batch * copies)
    return [
        f"model     {config.model.parameters():,} parameters",
        f"ranks     {gpus} = {copies} data-parallel x {copy} (tensor {config.parallel.tensor}, pipeline "
        f"{config.parallel.pipeline}, context {config.parallel.context}): every size divides",
        f"step      {config.train.global_batch} sequences = {copies} ranks x {passes} passes x "
        f"{config.train.micro_batch}; x {config.data.seq_length} = {config.tokens_per_step():,} tokens",
    ]


def _data(plan: LaunchPlan) -> list[str]:
    data = plan.data
    lines = []
    for phase in data.phases:
        lines.append(
            f"phase {phase.name}: {phase.steps:,} steps x {plan.config.tokens_per_step():,} = "
            f"{phase.tokens:,} tokens, peak learning rate {phase.learning_rate:g}"
        )
    head = "".join(f"{phase.name[:12]:>13s} {'epochs':>8s}" for phase in data.phases)
    lines.append(f"  {'source':18s}{'tokens':>20s} {head}{'all epochs':>12s}")
    epochs = data.epochs()
    for corpus in data.corpora:
        cells = "".join(
            f"{phase.share[corpus.name]:13.3%} {phase.epochs[corpus.name]:8.3f}" for phase in data.phases
        )
        mark = " *" if corpus.name in data.absent else ""
        lines.append(f"  {corpus.name:18s}{corpus.tokens:20,} {cells}{epochs[corpus.name]:12.3f}{mark}")
    if data.absent:
        lines.append("  * not there yet: tokens as the recipe says")
    return lines


def _memory(plan: LaunchPlan, held: RankMemory) -> list[str]:
    config, at, numel = plan.config, held.context, held.numel
    width, each = 2, "12 B (fp32 parameters, two moments)"
    if config.train.precision == "fp32":
        width, each = 4, "8 B (two moments; the parameters are in the buffers)"
    tokens = config.train.micro_batch * config.data.seq_length // at.context_size
    layers = config.model.num_layers // at.pipeline_size
    # The whole micro-batch's logits are kept for the backward pass, chunks of them are not.
    whole = tokens <= (config.train.head_chunk or tokens)
    activations = held.activations - (held.logits if whole else 0)
    sizes = {
        "parameters": (
            held.parameters,
            f"{numel:,} x {width} B + {held.parameters - numel * width:,} padding",
        ),
        "gradients": (
            held.gradients,
            f"{numel:,} x 4 B + {held.gradients - numel * 4:,} padding, summed in fp32",
        ),
        "optimizer": (held.optimizer, f"{held.optimizer_numel:,} of a 1/{_shards(plan)} share x {each}"),
        "activations": (
            activations,
            f"kept for backward passes: {tokens:,} tokens x {layers} layers x "
            f"{activations / tokens / layers:,.0f} B a token and layer, at the fullest moment",
        ),
    }
    if held.logits:
        sizes["logits"] = held.logits, f"{held.logits // width:,} x {width} B{'' if whole else ', one chunk'}"
    total = sum(size for size, _ in sizes.values())
    place = f"tensor {at.tensor_rank}/{at.tensor_size}, pipeline {at.pipeline_rank}/{at.pipeline_size}"
    return [
        f"memory of rank {at.rank} (data {at.data_rank}/{at.data_size}, {place})",
        *(f"  {name:12s}{n / GIB:10.3f} GiB  {n:16,} B  {how}" for name, (n, how) in sizes.items()),
        f"  {'sum':12s}{total / GIB:10.3f} GiB  of {plan.launch.gpu_memory / GIB:.0f}; workspace, fragments "
        f"and the communication library's buffers come on top",
    ]


def _shards(plan: LaunchPlan) -> int:
    parallel = plan.config.parallel
    return plan.launch.gpus // (parallel.tensor * parallel.pipeline)


def _time(plan: LaunchPlan) -> list[str]:
    launch = plan.launch
    hours = plan.gpu_hours
    return [
        f"time at an assumed MFU of {launch.mfu:.0%}, {launch.peak_flops / 1e12:g} TFLOP/s a GPU",
        f"  {plan.config.model.flops_per_token(plan.config.data.seq_length):.4g} FLOP a token x "
        f"{plan.data.tokens:,} tokens = {plan.flops:.4g} FLOP",
        f"  {hours:,.0f} GPU hours, {hours / launch.gpus / 24:.2f} days on {launch.gpus} GPUs, "
        f"{plan.step_seconds:.3f} s a step, "
        f"{plan.config.tokens_per_step() / plan.step_seconds / launch.gpus:,.0f} tokens/s a GPU",
        f"  the paper: {PRETRAINING_GPU_HOURS:,} GPU hours of pre-training ("
        f"{PRETRAINING_GPU_HOURS / 168 / 24:.1f} days on 168); this plan would take them at an MFU of "
        f"{plan.mfu_of(PRETRAINING_GPU_HOURS):.1%}",
    ]


def _checkpoints(plan: LaunchPlan) -> list[str]:
    saves, train, numel = plan.checkpoints, plan.config.train, plan.config.model.parameters()
    width = 2 if train.precision == "bf16" else 4
    pause = train.checkpoint_every * plan.step_seconds
    return [
        f"checkpoints: {saves.size / 1e9:.2f} GB each = {numel:,} x ({width} + 12) B, "
        f"{saves.size / plan.launch.gpus / 1e6:.0f} MB a rank",
        f"  every {train.checkpoint_every} steps, {pause / 60:.1f} min: {saves.size / pause / 1e6:,.1f} MB/s",
        f"  {saves.saved} written, {saves.kept} kept in the end, {saves.kept * saves.size / 1e12:.2f} TB",
    ]


def _first(plan: LaunchPlan) -> list[str]:
    first = plan.first
    if first is None:
        return []
    names = [corpus.name for corpus in plan.data.corpora]
    rows = zip(first.sample_N[:_SHOWN], first.source_N, first.epoch_N, first.window_N, strict=False)
    lines = [f"  {n:8d}  {names[s]:18s} epoch {e} window {w}" for n, s, e, w in rows]
    return [f"first samples of rank {plan.launch.rank} ({len(first.sample_N)} a step)", *lines]
