"""YAML files -> Config: merge, dotted overrides, every mistake in one message, dump."""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_r1.config import Config, ParallelConfig
from megatron_r1.system.errors import suggest, suggest_path

T = TypeVar("T")


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one mistake a line."""

    def __init__(self, mistakes: list[str]):
        self.mistakes = mistakes
        head = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  {m}" for m in mistakes))


def load(arguments: Iterable[str]) -> Config:
    """Config from FILE.yaml and `dotted.key=value` arguments, in the order given.

    Mappings merge, everything else replaces; overrides are applied after all files. Raises ConfigError with
    every mistake found.
    """
    return load_with(arguments, lambda config: None)[0]


def load_with(arguments: Iterable[str], opener: Callable[[Config], T]) -> tuple[Config, T]:
    """`load`, and what `opener` makes of the configuration: its open datasets, say.

    A ConfigError of the opener and the mistakes in the fields come in the same message.
    """
    mistakes: list[str] = []
    tree = _read_all(arguments, mistakes)
    # What seems to be missing may be in a file that could not be read.
    sections = _sections(tree, mistakes, whole=not mistakes)
    mistakes += _cross_check(sections)
    required = {f.name for f in dataclasses.fields(Config) if _required(f)}
    # A section that did not parse is not one that is missing.
    wanted = required | (tree.keys() & typing.get_type_hints(Config).keys())
    config = Config(**sections) if wanted <= sections.keys() else None
    if config is not None:
        try:
            opened = opener(config)
        except ConfigError as error:
            mistakes += [m for m in error.mistakes if m not in mistakes]
    if mistakes or config is None:
        raise ConfigError(mistakes)
    return config, opened


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal Config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=110)


def _read_all(arguments: Iterable[str], mistakes: list[str]) -> dict[str, Any]:
    files: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        (overrides if "=" in argument and not os.path.exists(argument) else files).append(argument)
    trees = [read_tree(Path(name), mistakes) for name in files]
    for text in overrides:
        key, value = text.split("=", 1)
        try:
            leaf: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            mistakes.append(f"{text}: the value is no YAML; quote it, for instance {key}='\"...\"'")
            continue
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        trees.append(leaf)
    return reduce(_merge, trees, {})


def read_tree(path: Path, mistakes: list[str]) -> dict[str, Any]:
    """One file as YAML says it, not checked further; empty, with a mistake more, where it is no such file."""
    # os.path's answers are no errors, however long the name.
    if not os.path.isfile(path):
        mistakes.append(f"{path}: no such file{suggest_path(path)}")
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mistakes.append(f"{path}: not YAML: {' '.join(str(error).split())}")
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        mistakes.append(f"{path}: expected `section: ...`, found {type(tree).__name__}")
        return {}
    return tree


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in over.items()}}
    return over


def _sections(tree: dict[str, Any], mistakes: list[str], whole: bool) -> dict[str, Any]:
    """Each root section that parses; sections are read apart so that one mistake hides no other.

    `whole`: a section that is not there is a mistake.
    """
    hints = typing.get_type_hints(Config)
    out = {}
    for key in tree:
        if key not in hints:
            mistakes.append(f"{key}: unknown section{suggest(key, hints)}")
    for spec in dataclasses.fields(Config):
        if spec.name not in tree:
            if _required(spec) and whole:
                mistakes.append(f"{spec.name}: missing section; add a file that has it (see examples/)")
            continue
        hint = hints[spec.name]
        adapter = TypeAdapter(hint)
        try:
            out[spec.name] = adapter.validate_python(tree[spec.name])
        except ValidationError as error:
            errors = error.errors(include_url=False)
            # The branches of a union each complain of the same value.
            mistakes += dict.fromkeys(_message(spec.name, hint, e) for e in errors)
            # A value beyond its limit still takes part in the checks between fields.
            if all(e["type"] == "limit" for e in errors):
                out[spec.name] = adapter.validate_python(tree[spec.name], context="unlimited")
    return out


def _required(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _message(section: str, hint: Any, error: Any) -> str:
    loc = [section, *(str(part) for part in error["loc"])]
    # pydantic puts the branch of a union into the path; a reader knows only YAML keys.
    path = ".".join(p for p in loc if "[" not in p and p not in ("float", "ModelConfig"))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _field_names(hint, [str(p) for p in error["loc"][:-1]])
        return f"{path}: unknown key{suggest(str(error['loc'][-1]), known)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{path}: missing"
    if error["type"] == "limit":
        return path + error["msg"]
    if loc[0] == "phases" and loc[2:3] == ["weights"]:
        where = ".".join(loc[:3])
        return f"{where}={error['input']!r}: weights name their sources, {{name: weight}}, or say uniform"
    return f"{path}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _field_names(hint: Any, path: list[str]) -> list[str]:
    """Names of the dataclass that `path` leads to, for a suggestion."""
    for inner in [a for a in typing.get_args(hint) if a is not type(None)] or [hint]:
        if dataclasses.is_dataclass(inner):
            sub = typing.get_type_hints(inner)
            return _field_names(sub[path[0]], path[1:]) if path and path[0] in sub else list(sub)
        if typing.get_origin(inner) is dict and path:
            return _field_names(typing.get_args(inner)[1], path[1:])
    return []


def _cross_check(sections: dict[str, Any]) -> list[str]:
    """Mistakes between fields, for whichever sections parsed."""
    model, parallel = sections.get("model"), sections.get("parallel")
    data, train, phases = sections.get("data"), sections.get("train"), sections.get("phases")
    out = []
    if model:
        scaling = model.rope_scaling
        if scaling and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
            out.append(
                f"model.rope_scaling: 0 < low_freq_factor < high_freq_factor does not hold for "
                f"{scaling.low_freq_factor}, {scaling.high_freq_factor}"
            )
        if model.head_dim % 2:
            out.append(f"model.head_dim={model.head_dim} must be even: rotary embedding turns pairs")
        if model.num_query_groups > 0 and model.num_attention_heads % model.num_query_groups:
            out.append(
                f"model.num_attention_heads={model.num_attention_heads} is no multiple of "
                f"model.num_query_groups={model.num_query_groups}"
            )
    if model and parallel:
        groups, tp = model.num_query_groups, parallel.tensor
        legal = [n for n in range(1, groups + 1) if groups % n == 0 and model.ffn_hidden_size % n == 0]
        if tp not in legal:
            out.append(
                f"parallel.tensor={tp} does not divide model.num_query_groups={groups}; use one of {legal}"
            )
        if tp > 0 and model.vocab_size % tp:
            # Rows that fill it up would take part in the softmax, and be another model.
            out.append(f"parallel.tensor={tp} does not divide model.vocab_size={model.vocab_size}")
        stages = parallel.pipeline * parallel.virtual_pipeline
        if parallel.pipeline < 1 or parallel.virtual_pipeline < 1 or model.num_layers % stages:
            by = " x virtual_pipeline" if parallel.virtual_pipeline != 1 else ""
            out.append(f"parallel.pipeline{by}={stages} does not divide model.num_layers={model.num_layers}")
    if parallel:
        if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
            out.append(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1")
        if parallel.sequence and parallel.tensor == 1:
            out.append("parallel.sequence=true needs parallel.tensor > 1")
    if data and not data.sources:
        out.append("data.sources: empty; name at least one dataset")
    if train and (train.global_batch < 1 or train.micro_batch < 1 or train.global_batch % train.micro_batch):
        out.append(
            f"train.global_batch={train.global_batch} is no multiple of train.micro_batch={train.micro_batch}"
        )
    if train:
        undivided = data and all(source.documents is None for source in data.sources.values())
        if train.validation_windows > 0 and undivided:
            out.append(
                f"train.validation_windows={train.validation_windows} needs documents set aside: give "
                f"data.sources.NAME.documents (tools/curate_probes.py does)"
            )
        if train.keep_every is not None and train.keep_last is None:
            out.append(f"train.keep_every={train.keep_every} deletes nothing alone; set train.keep_last, too")
        if train.init_from and train.init_weights:
            out.append("train.init_from and train.init_weights: give one, to go on from or to begin with")
    if phases is not None:
        out += _check_phases(phases, list(data.sources) if data else None)
        if data and train and train.global_batch > 0 and data.seq_length > 0:
            out += _check_lengths(phases, train.global_batch * data.seq_length)
    mix = sections.get("mix")
    if mix and not 0 <= mix.floor <= mix.cap <= 1:
        out.append(f"mix: 0 <= floor <= cap <= 1 does not hold for floor={mix.floor}, cap={mix.cap}")
    return out


def _check_lengths(phases: dict[str, Any], tokens_per_step: int) -> list[str]:
    """Warm-ups and decays that their phases are too short for."""
    out = []
    for name, phase in phases.items():
        steps = phase.steps if phase.steps is not None else -(-(phase.tokens or 0) // tokens_per_step)
        decay = phase.wsd_steps(steps) if phase.decay == "wsd" else 0
        if steps * tokens_per_step >= 1 << 62:
            out.append(f"phases.{name}: {steps} steps are beyond counting; a phase has less than 2^62 tokens")
        if not 0 <= phase.warmup_steps <= steps - decay:
            also = f" with a decay over {decay}" if decay else ""
            out.append(
                f"phases.{name}.warmup_steps={phase.warmup_steps} is not within the phase's {steps} steps"
                f"{also}"
            )
    return out


def _check_phases(phases: dict[str, Any], sources: list[str] | None) -> list[str]:
    out = []
    if not phases:
        out.append("phases: empty; name at least one phase")
    for name, phase in phases.items():
        path = f"phases.{name}"
        if (phase.steps is None) == (phase.tokens is None):
            out.append(f"{path}: give steps or tokens, one of the two")
        length = phase.steps if phase.steps is not None else phase.tokens
        if length is not None and length < 1:
            out.append(f"{path}: a length of {length} trains nothing")
        if phase.decay_steps is not None and phase.decay != "wsd":
            out.append(f"{path}.decay_steps={phase.decay_steps} needs decay: wsd, not {phase.decay}")
        elif phase.decay_steps is not None and not 1 <= phase.decay_steps <= (phase.steps or math.inf):
            out.append(f"{path}.decay_steps={phase.decay_steps} is not within 1 and the phase's length")
        if sources is None:
            continue
        for field in ("max_epochs", "keep", "weights"):
            given = getattr(phase, field)
            out += [
                f"{path}.{field}.{key}: no such source in data.sources{suggest(key, sources)}"
                for key in (given if isinstance(given, dict) else ())
                if key not in sources
            ]
        if phase.weights == "uniform":
            continue
        if any(not 0 <= w < float("inf") for w in phase.weights.values()):
            out.append(f"{path}.weights: every weight must be a finite number >= 0, got {phase.weights}")
        elif not sum(phase.weights.values()) > 0:
            out.append(f"{path}.weights: all weights are 0; at least one source must be drawn")
    return out


def check_world(config: Config, world_size: int) -> list[str]:
    """Mistakes of launching this configuration on `world_size` ranks."""
    ranks = config.parallel.model_ranks()
    if ranks < 1 or config.train.micro_batch < 1 or config.train.global_batch % config.train.micro_batch:
        return []  # config_io.load reports these
    if mistakes := check_copies(config.parallel, world_size):
        return mistakes
    data_parallel, train = world_size // ranks, config.train
    if train.global_batch % (train.micro_batch * data_parallel) == 0:
        passes = train.global_batch // (train.micro_batch * data_parallel)
        if config.parallel.virtual_pipeline > 1 and passes % config.parallel.pipeline:
            return [
                f"parallel.virtual_pipeline={config.parallel.virtual_pipeline} interleaves groups of "
                f"parallel.pipeline={config.parallel.pipeline} micro-batches, but a step has {passes} on "
                f"each data-parallel rank; change train.global_batch or train.micro_batch"
            ]
        return []
    share, rest = divmod(train.global_batch, data_parallel)
    if rest:
        way = f"make train.global_batch a multiple of {train.micro_batch * data_parallel}"
    else:
        way = f"use a train.micro_batch of {[m for m in range(1, share + 1) if share % m == 0]}"
    return [
        f"train.global_batch={train.global_batch} is no multiple of train.micro_batch={train.micro_batch} x "
        f"{data_parallel} data-parallel ranks; {way}"
    ]


def check_copies(parallel: ParallelConfig, ranks: int) -> list[str]:
    """Mistakes of dividing `ranks` ranks into copies of the model."""
    copy = parallel.model_ranks()
    if copy < 1 or ranks % copy == 0:
        return []
    return [
        f"{ranks} ranks do not divide into model copies of parallel.tensor x pipeline x context = {copy} "
        f"ranks; launch a multiple of {copy}"
    ]
