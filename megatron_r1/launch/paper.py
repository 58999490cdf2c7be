"""Differences between a configuration and the paper's pre-training, whose figures are in paper.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.system.yaml_io import read_yaml
from megatron_r1.train.schedule import PhaseSpan, phase_spans

PAPER: dict[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml")).tree
SOURCES: dict[str, dict[str, float]] = PAPER["sources"]


def differences(config: Config, gpus: int) -> list[str]:
    """Every figure in which the configuration, launched on `gpus` GPUs, is not the paper's, one a line."""
    spans = phase_spans(config)
    out = [*_model(config), *_sources(config)]
    launch = {
        "data.seq_length": config.data.seq_length,
        "GPUs": gpus,
        "sequences per GPU and step": config.train.global_batch / gpus,
        "phases": len(spans),
    }
    for name, here in launch.items():
        out += _compare(name, here, PAPER["launch"][name], "Table 4")
    for number, span in enumerate(spans[:2], 1):
        out += _phase(config, span, f"phase{number}")
    return out


def _compare(name: str, here: object, paper: object, where: str) -> Iterator[str]:
    """A line if the two figures differ."""
    if here != paper:
        yield f"{name}: here {_format(here)}, paper {_format(paper)} ({where})"


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _model(config: Config) -> Iterator[str]:
    model, numel = config.model, config.model.parameters()
    shapes = PAPER["shapes"]
    nearest = min(shapes, key=lambda name: abs(shapes[name]["parameters"] - numel / 1e6))
    where = f"Table 3, {nearest}"
    for key, paper in shapes[nearest].items():
        if key != "parameters":
            yield from _compare(f"model.{key}", getattr(model, key), paper, where)
        elif round(numel / 1e6, 1) != paper:
            yield from _compare(key, numel, f"{paper}M", where)
    for key, paper in PAPER["model"].items():
        yield from _compare(f"model.{key}", getattr(model, key), paper, "section A.1")


def _sources(config: Config) -> Iterator[str]:
    ours = config.data.sources
    for name, paper in SOURCES.items():
        path = f"data.sources.{name}"
        if name in ours:
            here = "not said" if ours[name].tokens is None else ours[name].tokens
            yield from _compare(f"{path}.tokens", here, paper["tokens"], "Table 5")
        else:
            yield from _compare(path, "absent", f"{paper['tokens'] / 1e9:g}B tokens", "Table 5")
    for name in (name for name in ours if name not in SOURCES):
        yield from _compare(f"data.sources.{name}", "drawn from", "absent", "Table 5")


def _phase(config: Config, span: PhaseSpan, column: str) -> Iterator[str]:
    path = f"phases.{span.name}"
    here = {
        "tokens": span.config.tokens or span.steps * config.tokens_per_step(),
        "steps": span.steps,
        "learning_rate": span.config.learning_rate,
        "warmup_steps": span.config.warmup_steps,
        "decay": span.config.decay,
    }
    for where, figures in PAPER["phase"].items():
        for key, paper in figures.items():
            yield from _compare(f"{path}.{key}", here[key], paper, where)
    for name in dict.fromkeys([*SOURCES, *span.share]):
        # Both to the table's two decimals.
        share, paper = 100 * span.share.get(name, 0), SOURCES.get(name, {}).get(column, 0)
        yield from _compare(f"{path}.weights.{name}", f"{share:.2f} %", f"{paper:.2f} %", "Table 5")
    if (total := round(sum(row[column] for row in SOURCES.values()), 2)) != 100:
        yield f"{path}.weights: here normalised, the paper's sum to {total:.2f} % (Table 5)"
