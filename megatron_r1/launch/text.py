"""A launch plan as text, each figure with the arithmetic that gives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_r1.launch.paper import PAPER
from megatron_r1.launch.plan import GIB, LaunchPlan
from megatron_r1.launch.warnings import warnings
from megatron_r1.train.schedule import epochs_by_phase

if TYPE_CHECKING:
    from megatron_r1.launch.memory import RankMemory

_SHOWN = 8
"""First samples that are listed."""


def text(plan: LaunchPlan) -> str:
    parts = [_sizes(plan), _data(plan), *(_memory(plan, held) for held in plan.memory)]
    parts += [_time(plan), _checkpoints(plan), _first(plan)]
    lines = [f"  - {line}" for line in warnings(plan)]
    parts.append(iter(["warnings", *lines] if lines else ["no warnings"]))
    return "\n\n".join(part for part in map("\n".join, parts) if part)


def _sizes(plan: LaunchPlan) -> Iterator[str]:
    config, parallel, gpus = plan.config, plan.config.parallel, plan.launch.gpus
    copy = parallel.model_ranks()
    copies = gpus // copy
    passes = config.train.global_batch // (config.train.micro_batch * copies)
    yield f"model     {config.model.parameters():,} parameters"
    parts = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}"
    yield f"ranks     {gpus} = {copies} data-parallel x {copy} ({parts}): every size divides"
    sequences = f"{copies} ranks x {passes} passes x {config.train.micro_batch}"
    tokens = f"{config.data.seq_length} = {config.tokens_per_step():,} tokens"
    yield f"step      {config.train.global_batch} sequences = {sequences}; x {tokens}"


def _data(plan: LaunchPlan) -> Iterator[str]:
    data, step = plan.data, plan.config.tokens_per_step()
    phases = list(epochs_by_phase(plan.config, data.plan))
    for span, _, _ in phases:
        tokens = f"{span.steps:,} steps x {step:,} = {span.steps * step:,} tokens"
        yield f"phase {span.name}: {tokens}, peak learning rate {span.config.learning_rate:g}"
    head = "".join(f"{span.name[:12]:>13s} {'epochs':>8s}" for span, _, _ in phases)
    yield f"  {'source':18s}{'tokens':>20s} {head}{'all epochs':>12s}"
    total = plan.epochs()
    for corpus in data.corpora:
        name = corpus.name
        cells = "".join(f"{span.share[name]:13.3%} {epochs[name]:8.3f}" for span, epochs, _ in phases)
        mark = " *" if name in data.absent else ""
        yield f"  {name:18s}{corpus.tokens:20,} {cells}{total[name]:12.3f}{mark}"
    if data.absent:
        yield "  * not there yet: tokens as the recipe says"


def _memory(plan: LaunchPlan, held: RankMemory) -> Iterator[str]:
    config, at, numel = plan.config, held.context, held.numel
    width, each = 2, "12 B (fp32 parameters, two moments)"
    if config.train.precision == "fp32":
        width, each = 4, "8 B (two moments; the parameters are in the buffers)"
    tokens = config.train.micro_batch * config.data.seq_length // at.context_size
    layers = config.model.num_layers // at.pipeline_size
    whole = plan.keeps_logits(at.context_size)
    activations = held.activations - (held.logits if whole else 0)
    shards = at.data_size * at.context_size

    def padded(size: int, width: int) -> str:
        return f"{numel:,} x {width} B + {size - numel * width:,} padding"

    each_layer = f"{activations / tokens / layers:,.0f} B a token and layer, at the fullest moment"
    kept = f"kept for backward passes: {tokens:,} tokens x {layers} layers x {each_layer}"
    sizes = [
        ("parameters", held.parameters, padded(held.parameters, width)),
        ("gradients", held.gradients, f"{padded(held.gradients, 4)}, summed in fp32"),
        ("optimizer", held.optimizer, f"{held.optimizer_numel:,} of a 1/{shards} share x {each}"),
        ("activations", activations, kept),
    ]
    if held.logits:
        chunk = "" if whole else ", one chunk"
        sizes.append(("logits", held.logits, f"{held.logits // width:,} x {width} B{chunk}"))
    if distilled := plan.distilled():
        teacher, gradient, chunks = distilled
        if teacher:
            sizes.append(("teacher", teacher, f"{teacher // width:,} x {width} B, whole on each rank"))
        kept = "gradient of hidden states, chunks of logits; in place of logits"
        sizes.append(("divergence", gradient + chunks, kept))
    yield (
        f"memory of rank {at.rank} (data {at.data_rank}/{at.data_size}, tensor "
        f"{at.tensor_rank}/{at.tensor_size}, pipeline {at.pipeline_rank}/{at.pipeline_size})"
    )
    for name, size, how in sizes:
        yield f"  {name:12s}{size / GIB:10.3f} GiB  {size:16,} B  {how}"
    more = "the teacher's activations, " if plan.teachers else ""
    yield (
        f"  {'fullest' if distilled else 'sum':12s}{plan.total(held) / GIB:10.3f} GiB  of "
        f"{plan.launch.gpu_memory / GIB:.0f}; {more}workspace, fragments and the communication library's "
        f"buffers come on top"
    )


def _time(plan: LaunchPlan) -> Iterator[str]:
    launch, hours, paper = plan.launch, plan.gpu_hours, PAPER["gpu_hours"]["pretraining"]
    yield f"time at an assumed MFU of {launch.mfu:.0%}, {launch.peak_flops / 1e12:g} TFLOP/s a GPU"
    each = plan.config.model.flops_per_token(plan.config.data.seq_length)
    yield f"  {each:.4g} FLOP a token x {plan.tokens:,} tokens = {plan.flops:.4g} FLOP"
    for phase, (_, each) in plan.teachers.items():
        flops = plan.teacher_flops(phase)
        tokens = f"{plan.config.phase_steps(phase) * plan.config.tokens_per_step():,} tokens"
        copies = f" x {context} ranks of whole rows" if (context := plan.config.parallel.context) > 1 else ""
        yield f"  teacher of phase {phase}: {each:.4g} FLOP a token x {tokens}{copies} = {flops:.4g} FLOP"
    yield (
        f"  {hours:,.0f} GPU hours, {hours / launch.gpus / 24:.2f} days on {launch.gpus} GPUs, "
        f"{plan.step_seconds:.3f} s a step, "
        f"{plan.config.tokens_per_step() / plan.step_seconds / launch.gpus:,.0f} tokens/s a GPU"
    )
    theirs = f"{paper:,} GPU hours of pre-training ({paper / 168 / 24:.1f} days on 168)"
    yield f"  the paper: {theirs}; this plan would take them at an MFU of {plan.mfu_of(paper):.1%}"


def _checkpoints(plan: LaunchPlan) -> Iterator[str]:
    saves, train, numel = plan.checkpoints, plan.config.train, plan.config.model.parameters()
    width = 2 if train.precision == "bf16" else 4
    pause = train.checkpoint_every * plan.step_seconds
    each = f"{saves.size / 1e9:.2f} GB each = {numel:,} x ({width} + 12) B"
    yield f"checkpoints: {each}, {saves.size / plan.launch.gpus / 1e6:.0f} MB a rank"
    rate = saves.size / pause / 1e6
    yield f"  every {train.checkpoint_every} steps, {pause / 60:.1f} min: {rate:,.1f} MB/s"
    yield f"  {saves.saved} written, {saves.kept} kept in the end, {saves.kept * saves.size / 1e12:.2f} TB"


def _first(plan: LaunchPlan) -> Iterator[str]:
    if plan.first_N is not None:
        yield f"first samples of rank {plan.launch.rank} ({len(plan.first_N)} a step)"
        for sample in plan.first_N[:_SHOWN].tolist():
            source, epoch, window = plan.data.plan.locate(sample)
            yield f"  {sample:8d}  {plan.data.corpora[source].name:18s} epoch {epoch} window {window}"
