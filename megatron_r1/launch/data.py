"""What a launch would draw: sources, epochs and steps, also before the datasets are there. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_r1.config import Config
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.open import open_data
from megatron_r1.records import Corpus

MANY_EPOCHS = 40
"""Passes over a source from which a repetition is called out by itself."""
REPEATED = 4
"""Passes beyond which a repeated source is listed."""


@dataclass(frozen=True)
class PhasePlan:
    name: str
    steps: int
    tokens: int
    learning_rate: float
    share: Mapping[str, float]
    """Source -> share of the phase's sequences."""
    epochs: Mapping[str, float]
    """Source -> passes over it in this phase."""
    weight_sum: float
    """What the weights summed to before they were normalised."""


@dataclass(frozen=True)
class DataPlan:
    corpora: tuple[Corpus, ...]
    absent: frozenset[str]
    """Sources whose size is the recipe's `tokens`, because the dataset is not there."""
    blend: BlendPlan
    phases: tuple[PhasePlan, ...]

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    def epochs(self) -> dict[str, float]:
        """Source -> passes over it in all phases."""
        return {c.name: sum(phase.epochs[c.name] for phase in self.phases) for c in self.corpora}


def plan_data(config: Config, also: Sequence[str] = ()) -> DataPlan:
    """Lay the data plan with real datasets where they are, with `data.sources.NAME.tokens` elsewhere.

    Raises ConfigError with every mistake: `also`, damaged datasets, and absent ones of unknown size.
    """
    data = open_data(config, use="plan", also=lambda _: also)
    blend = data.plan
    phases, samples = [], 0
    for name, phase in config.phases.items():
        steps, weights = config.phase_steps(name), config.phase_weights(name)
        end = samples + steps * config.train.global_batch
        before, after, total = blend.epochs(samples), blend.epochs(end), sum(weights.values())
        phases.append(
            PhasePlan(
                name,
                steps,
                steps * config.tokens_per_step(),
                phase.learning_rate,
                {source: weight / total for source, weight in weights.items()},
                {source: after[source] - before[source] for source in weights},
                1.0 if phase.weights == "uniform" else total,
            )
        )
        samples = end
    return DataPlan(tuple(data.corpora), data.absent, blend, tuple(phases))


def warnings(config: Config, data: DataPlan, gpus: int) -> list[str]:
    """What a reader should know before the launch; nothing here stops it."""
    out = [_mix(phase) for phase in data.phases]
    out += [_repetitions(data), _never_drawn(data), _gpus(config, gpus), _heads(config), _nodes(config, gpus)]
    if not config.data.cross_documents:
        out.append(
            "data.cross_documents=false: activations are counted for windows of one document; where a mask "
            "keeps documents apart (torch SDPA on a GPU) each layer keeps one of micro_batch x seq_length^2 "
            "bytes besides"
        )
    if config.train.keep_last is None and data.steps // config.train.checkpoint_every > 20:
        out.append(
            f"train.keep_last is not set: all {data.steps // config.train.checkpoint_every} checkpoints stay"
        )
    return [text for text in out if text]


def _mix(phase: PhasePlan) -> str:
    whole = 100.0 if phase.weight_sum > 10 else 1.0
    off = phase.weight_sum - whole
    if abs(off) < 1e-9 * whole:
        return ""
    return (
        f"the weights of phase {phase.name} sum to {phase.weight_sum:.6g}, not {whole:g}; normalised, "
        f"each share changes by {abs(off) / phase.weight_sum:.2%} of itself"
    )


def _repetitions(data: DataPlan) -> str:
    epochs = {name: n for name, n in data.epochs().items() if n > REPEATED}
    if not epochs:
        return ""
    most = ", ".join(f"{name} {n:.1f}" for name, n in sorted(epochs.items(), key=lambda item: -item[1]))
    many = [name for name, n in epochs.items() if n >= MANY_EPOCHS]
    text = f"sources read more than {REPEATED} times over all phases: {most} epochs"
    if many:
        text += f"; {', '.join(many)} {MANY_EPOCHS} times or more: phases.NAME.max_epochs caps it"
    return text


def _never_drawn(data: DataPlan) -> str:
    names = [name for name, n in data.epochs().items() if n == 0]
    return f"sources that no phase draws: {', '.join(names)}" if names else ""


def _gpus(config: Config, gpus: int) -> str:
    if gpus not in (128, 168):
        return ""
    data_parallel = gpus // config.parallel.model_ranks()
    each = config.train.global_batch / data_parallel
    return (
        f"the paper says 168 GPUs, 16 sequences each, and 500k steps for 2T tokens; those are "
        f"{16 * 168 * 2048 * 500_000 / 1e12:.2f}T on 168 GPUs and {16 * 128 * 2048 * 500_000 / 1e12:.2f}T on "
        f"128. This plan keeps the token budget: {gpus} GPUs, {each:g} sequences for each of {data_parallel} "
        f"data-parallel ranks, steps derived"
    )


def _heads(config: Config) -> str:
    model = config.model
    out = []
    if model.head_dim % 8 or model.head_dim > 256:
        out.append(
            f"model.head_dim={model.head_dim} has no flash attention (a multiple of 8, at most 256, does)"
        )
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        out.append(
            f"model.head_dim x num_attention_heads = {model.head_dim * model.num_attention_heads} is not "
            f"model.hidden_size={model.hidden_size}"
        )
    return "; ".join(out)


def _nodes(config: Config, gpus: int, per_node: int = 8) -> str:
    out = []
    if gpus > per_node and gpus % per_node:
        out.append(f"{gpus} GPUs do not fill nodes of {per_node}")
    if config.parallel.tensor > per_node or (gpus > per_node and per_node % config.parallel.tensor):
        out.append(f"parallel.tensor={config.parallel.tensor} crosses nodes of {per_node} GPUs")
    return "; ".join(out)
