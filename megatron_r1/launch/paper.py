"""The MobileLLM-R1 pre-training figures of the paper (Tables 3 to 5, appendix D.3), and what differs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config import Config


@dataclass(frozen=True)
class Shape:
    """A row of Table 3."""

    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    hidden_size: int
    ffn_hidden_size: int
    parameters: float
    """As printed, in millions to one decimal."""


@dataclass(frozen=True)
class Source:
    """A row of Table 5."""

    rows: int
    tokens: float
    phase1: float
    """Per cent; 0 where the table has a dash."""
    phase2: float


SHAPES = {
    "140M": Shape(15, 9, 3, 576, 2048, 140.2e6),
    "360M": Shape(15, 16, 4, 1024, 4096, 359.4e6),
    "950M": Shape(22, 24, 6, 1536, 6144, 949.2e6),
}
VOCABULARY = 128_256
"""Of the Llama 3 tokenizer that section A.1 names."""
SOURCES = {
    "starcoder": Source(206_640_114, 263.8e9, 10.66, 0.52),
    "openwebmath": Source(6_117_786, 12.6e9, 6.93, 23.33),
    "fineweb-edu": Source(1_279_107_432, 1300e9, 63.75, 54.83),
    "wiki": Source(7_222_303, 3.7e9, 5.03, 0.14),
    "arxiv": Source(1_533_917, 28e9, 6.36, 1.32),
    "stackexchange": Source(29_249_120, 19.6e9, 5.03, 0.86),
    "algebraic-stack": Source(3_404_331, 12.6e9, 2.25, 1.26),
    "nemotron-science": Source(708_920, 2e9, 0, 0.03),
    "nemotron-code": Source(10_108_883, 16e9, 0, 0.72),
    "nemotron-math": Source(22_066_397, 15e9, 0, 3.01),
    "cosmopedia": Source(31_064_744, 25e9, 0, 2.70),
    "natural-reasoning": Source(1_145_824, 1.8e9, 0, 3.18),
    "finemath": Source(48_283_984, 34e9, 0, 8.01),
    "pes2o": Source(38_800_000, 50e9, 0, 0.08),
}
PHASE = {
    "tokens": 2_000_000_000_000,
    "steps": 500_000,
    "learning_rate": 4e-3,
    "warmup_steps": 2000,
    "decay": "linear",
    "gpus": 168,
    "sequences_per_gpu": 16,
    "seq_length": 2048,
}
"""A pre-training phase of Table 4; warm-up and decay are section A.2's."""
PRETRAINING_GPU_HOURS = 28_000
"""Appendix D.3. It does not name the model; the largest is meant here."""
INFLUENCE_GPU_HOURS = 5_100


def differences(config: Config, gpus: int) -> list[str]:
    """Every figure in which the configuration, launched on `gpus` GPUs, is not the paper's, one a line."""
    return [*_model(config), *_sources(config), *_phases(config, gpus)]


def _line(what: str, here: object, paper: object, where: str) -> str:
    return f"{what}: here {_format(here)}, paper {_format(paper)} ({where})"


def _format(value: object) -> str:
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
    )


def _model(config: Config) -> list[str]:
    model = config.model
    name = min(SHAPES, key=lambda name: abs(SHAPES[name].parameters - model.parameters()))
    shape, where = SHAPES[name], f"Table 3, {name}"
    out = [
        _line(f"model.{key}", getattr(model, key), getattr(shape, key), where)
        for key in ("num_layers", "num_attention_heads", "num_query_groups", "hidden_size", "ffn_hidden_size")
        if getattr(model, key) != getattr(shape, key)
    ]
    if round(model.parameters() / 1e6, 1) != round(shape.parameters / 1e6, 1):
        out.append(_line("parameters", model.parameters(), f"{shape.parameters / 1e6:.1f}M", where))
    if model.vocab_size != VOCABULARY:
        out.append(_line("model.vocab_size", model.vocab_size, VOCABULARY, "section A.1"))
    if not model.qk_norm:
        out.append(_line("model.qk_norm", False, True, "section A.1"))
    return out


def _sources(config: Config) -> list[str]:
    out = []
    for name, paper in SOURCES.items():
        source = config.data.sources.get(name)
        if source is None:
            out.append(_line(f"data.sources.{name}", "absent", f"{paper.tokens / 1e9:g}B tokens", "Table 5"))
        elif source.tokens is None:
            out.append(_line(f"data.sources.{name}.tokens", "not said", paper.tokens, "Table 5"))
        elif source.tokens != paper.tokens:
            out.append(_line(f"data.sources.{name}.tokens", source.tokens, paper.tokens, "Table 5"))
    extra = [name for name in config.data.sources if name not in SOURCES]
    return out + [_line(f"data.sources.{name}", "drawn from", "absent", "Table 5") for name in extra]


def _phases(config: Config, gpus: int) -> list[str]:
    figures: tuple[tuple[str, object, object], ...] = (
        ("data.seq_length", config.data.seq_length, PHASE["seq_length"]),
        ("GPUs", gpus, PHASE["gpus"]),
        ("sequences per GPU and step", config.train.global_batch / gpus, PHASE["sequences_per_gpu"]),
        ("phases", len(config.phases), 2),
    )
    out = [_line(what, here, paper, "Table 4") for what, here, paper in figures if here != paper]
    for number, name in enumerate(list(config.phases)[:2]):
        out += _phase(config, name, f"phase{number + 1}")
    return out


def _phase(config: Config, name: str, column: str) -> list[str]:
    phase, path = config.phases[name], f"phases.{name}"
    here = {
        "tokens": phase.tokens or config.phase_steps(name) * config.tokens_per_step(),
        "steps": config.phase_steps(name),
        "learning_rate": phase.learning_rate,
        "warmup_steps": phase.warmup_steps,
        "decay": phase.decay,
    }
    out = [
        _line(f"{path}.{key}", value, PHASE[key], "section A.2" if key[0] in "wd" else "Table 4")
        for key, value in here.items()
        if value != PHASE[key]
    ]
    weights = config.phase_weights(name)
    total = sum(weights.values())
    printed = {source: getattr(SOURCES[source], column) for source in SOURCES}
    for source in sorted({*weights, *SOURCES}, key=[*SOURCES, *weights].index):
        share, paper = 100 * weights.get(source, 0) / total, printed.get(source, 0.0)
        # Both to the table's two decimals.
        if round(share, 2) != paper:
            out.append(f"{path}.weights.{source}: here {share:.2f} %, paper {paper:.2f} % (Table 5)")
    if (column_sum := round(sum(printed.values()), 2)) != 100:
        out.append(f"{path}.weights: here normalised, the paper's sum to {column_sum:.2f} % (Table 5)")
    return out
