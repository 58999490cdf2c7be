"""Warnings before a launch: what a reader should know of its data, sizes and memory. None stops it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_r1.config import Config
from megatron_r1.launch.paper import PAPER
from megatron_r1.launch.plan import GIB, LaunchPlan

MANY_EPOCHS = 40
"""Passes over a source from which a repetition is called out by itself."""
REPEATED = 4
"""Passes beyond which a repeated source is listed."""
LARGE = 4
"""Multiple of the paper's tokens a step beyond which a step is called out."""
PER_NODE = 8
"""GPUs of a node."""


def warnings(plan: LaunchPlan) -> list[str]:
    return [*_data(plan), *_sizes(plan.config, plan.launch.gpus), *_memory(plan)]


def _data(plan: LaunchPlan) -> Iterator[str]:
    for name, phase in plan.config.phases.items():
        total = sum(plan.config.phase_weights(name).values())
        whole = 100.0 if total > 10 else 1.0
        if phase.weights != "uniform" and abs(total - whole) >= 1e-9 * whole:
            change = f"each share changes by {abs(total - whole) / total:.2%} of itself"
            yield f"the weights of phase {name} sum to {total:.6g}, not {whole:g}; normalised, {change}"
    epochs = dict(sorted(plan.epochs().items(), key=lambda item: -item[1]))
    if repeated := [f"{name} {n:.1f}" for name, n in epochs.items() if n > REPEATED]:
        text = f"sources read more than {REPEATED} times over all phases: {', '.join(repeated)} epochs"
        if many := [name for name, n in epochs.items() if n >= MANY_EPOCHS]:
            text += f"; {', '.join(many)} {MANY_EPOCHS} times or more: phases.NAME.max_epochs caps it"
        yield text
    if never := [name for name, n in epochs.items() if n == 0]:
        yield f"sources that no phase draws: {', '.join(never)}"


def _sizes(config: Config, gpus: int) -> Iterator[str]:
    model, figures, tensor = config.model, PAPER["launch"], config.parallel.tensor
    if gpus in (128, 168):
        data_parallel = gpus // config.parallel.model_ranks()
        each = config.train.global_batch / data_parallel
        tokens = [f"{16 * ranks * 2048 * 500_000 / 1e12:.2f}T" for ranks in (168, 128)]
        yield (
            f"the paper says 168 GPUs, 16 sequences each, and 500k steps for 2T tokens; those are "
            f"{tokens[0]} on 168 GPUs and {tokens[1]} on 128. This plan keeps the token budget: {gpus} GPUs, "
            f"{each:g} sequences for each of {data_parallel} data-parallel ranks, steps derived"
        )
    paper = figures["GPUs"] * figures["sequences per GPU and step"] * figures["data.seq_length"]
    if (times := config.tokens_per_step() / paper) > LARGE:
        yield (
            f"train.global_batch={config.train.global_batch}: {config.tokens_per_step():,} tokens a step are "
            f"{times:.1f} times the paper's {paper:,}; its learning rates and steps are not meant for that"
        )
    if model.head_dim % 8 or model.head_dim > 256:
        yield f"model.head_dim={model.head_dim} has no flash attention (a multiple of 8, at most 256, does)"
    if (width := model.head_dim * model.num_attention_heads) != model.hidden_size:
        yield (f"model.head_dim x num_attention_heads = {width} is not model.hidden_size={model.hidden_size}")
    several = gpus > PER_NODE
    if several and gpus % PER_NODE:
        yield f"{gpus} GPUs do not fill nodes of {PER_NODE}"
    if tensor > PER_NODE or (several and PER_NODE % tensor):
        yield f"parallel.tensor={tensor} crosses nodes of {PER_NODE} GPUs"


def _memory(plan: LaunchPlan) -> Iterator[str]:
    config = plan.config
    if not config.data.cross_documents:
        yield (
            "data.cross_documents=false: activations are counted for windows of one document; where a mask "
            "keeps documents apart (on a GPU in fp32, or with parallel.context) each layer keeps one of "
            "micro_batch x seq_length^2 bytes besides"
        )
    if config.train.keep_last is None and (saves := plan.steps // config.train.checkpoint_every) > 20:
        yield f"train.keep_last is not set: all {saves} checkpoints stay"
    for held in plan.memory:
        if (total := plan.total(held)) > plan.launch.gpu_memory:
            way_out = "lower train.micro_batch, or set train.head_chunk or train.recompute"
            way_out += ", or write a cache of the teacher" if plan.teachers else ""
            sizes = f"at least {total / GIB:.1f} GiB, a GPU has {plan.launch.gpu_memory / GIB:.0f}"
            yield f"rank {held.context.rank} holds {sizes}: {way_out}"
