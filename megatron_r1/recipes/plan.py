"""What a configuration would train, told without torch: the `--check` of every tool."""

from __future__ import annotations

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.blend import Phase
from megatron_r1.data.sources import resolve_data
from megatron_r1.train.past import outlook


def summary(config: Config) -> str:
    """The resolved configuration, tokens per step, and per phase the weight and epochs of each source.

    Then where the run stands. Raises ConfigError with every mistake in the datasets, ValueError where the run
    cannot go on with this.
    """
    corpora, plan = resolve_data(config)
    lines = [
        config_io.dump(config).rstrip(),
        "",
        f"model: {config.model.parameters():,} parameters",
        f"step: {config.train.global_batch} sequences x {config.data.seq_length} = "
        f"{config.tokens_per_step():,} tokens",
    ]
    samples = 0
    for name, laid in zip(config.phases, plan.phases, strict=True):
        steps = config.phase_steps(name)
        end = samples + steps * config.train.global_batch
        before, after = plan.epochs(samples), plan.epochs(end)
        weights = config.phase_weights(name)
        total = sum(weights.values())
        lines.append(f"phase {name}: {steps:,} steps, {steps * config.tokens_per_step():,} tokens")
        for corpus in corpora:
            share = weights.get(corpus.name, 0) / total
            lines.append(
                f"  {corpus.name:24s} {share:7.2%}  {after[corpus.name] - before[corpus.name]:8.3f} epochs"
                f"  ({after[corpus.name]:.3f} in all, {corpus.tokens:,} tokens){_kept(corpus.name, laid)}"
            )
        samples = end
    return "\n".join([*lines, "", *outlook(config, plan)])


def _kept(source: str, phase: Phase) -> str:
    """What a keep mask leaves of a source, and what its coming leaves unseen of the epoch in progress."""
    mask, unseen = phase.keep.get(source), phase.unseen.get(source)
    kept = f"; {mask.bitmap.kept:,} of {mask.bitmap.windows:,} windows kept" if mask else ""
    return kept + (f"; a new mask: {unseen:,} windows of the epoch before stay unseen" if unseen else "")
