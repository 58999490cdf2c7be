"""YAML files -> Config, or another root: merge, dotted overrides, every mistake in one message, dump."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from megatron_r1.config import Config, DataConfig, ModelConfig, ParallelConfig, PhaseConfig
from megatron_r1.system.errors import HIDDEN, brief, hidden, shown, suggest, suggest_path
from megatron_r1.system.yaml_io import MOST_DEPTH, Document, YamlError, format_yaml, parse_yaml, read_yaml

R = TypeVar("R")
T = TypeVar("T")


_MOST, _LONGEST = 50, 1000
"""Mistakes of a message, and characters of one. Of a section's, twice as many are worded."""


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one mistake a line."""

    def __init__(self, mistakes: list[str]):
        self.mistakes = mistakes
        head = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        lines = [brief(mistake, _LONGEST) for mistake in mistakes[:_MOST]]
        lines += [f"and {len(mistakes) - _MOST} more"] if len(mistakes) > _MOST else []
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  {line}" for line in lines))


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
    return load_root(Config, arguments, _cross_check, opener)


def load_root(
    root: type[R],
    arguments: Iterable[str],
    check: Callable[[dict[str, Any], bool], list[str]],
    opener: Callable[[R], T],
) -> tuple[R, T]:
    """`load_with` for any frozen dataclass of dataclasses and values as the root of the files.

    `check`: mistakes between fields, of the fields that parsed by name, and whether no value is beyond its
    limit.
    """
    mistakes: list[str] = []
    given = _Given(arguments, mistakes)
    # What seems to be missing may be in a file that could not be read.
    sections, beyond = _sections(root, given, mistakes, whole=not mistakes)
    # A value beyond its limit has its mistake already, and the checks saw another in its place.
    mistakes += [m for m in check(sections, not beyond) if not any(path in m for path in beyond)]
    required = {f.name for f in dataclasses.fields(root) if _required(f)}  # type: ignore[arg-type]
    # A section that did not parse is not one that is missing.
    wanted = required | (given.tree.keys() & typing.get_type_hints(root).keys())
    config = root(**sections) if wanted <= sections.keys() and not beyond else None
    if config is not None:
        try:
            opened = opener(config)
        except ConfigError as error:
            mistakes += [m for m in error.mistakes if m not in mistakes]
    if mistakes or config is None:
        raise ConfigError(mistakes)
    return config, opened


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal Config, but for the keys and
    passwords that loggers' settings may hold."""
    tree = dataclasses.asdict(config)
    tree["train"]["exp_manager"] = hidden(tree["train"]["exp_manager"])
    return format_yaml(tree, allow_unicode=True, width=110)


def read_tree(path: Path, mistakes: list[str]) -> dict[str, Any]:
    """One file as YAML says it, not checked further; empty, with a mistake more, where it is no such file."""
    document = _read(path, mistakes)
    return document.tree if document else {}


def _read(path: Path, mistakes: list[str]) -> Document | None:
    try:
        # os.path's answers are no errors, however long the name.
        if not os.path.isfile(path):
            raise YamlError(f"{brief(str(path))}: no such file{suggest_path(path)}")
        document = read_yaml(path)
        if isinstance(document.tree, dict):
            return document
        kind = {type(None): "nothing", list: "a list"}.get(type(document.tree), "one value")
        raise YamlError(f"{document.name}: expected `section: ...`, found {kind}")
    except (YamlError, OSError) as error:
        mistakes.append(str(error))
        return None


_ABSENT: Any = object()


class _Given:
    """The files and overrides of a command line, merged."""

    def __init__(self, arguments: Iterable[str], mistakes: list[str]):
        files: list[str] = []
        overrides: list[str] = []
        for argument in arguments:
            (overrides if "=" in argument and not os.path.exists(argument) else files).append(argument)
        read = [_read(Path(name), mistakes) for name in files]
        self._files = [document for document in read if document]
        self._overrides: list[dict[str, Any]] = []
        for text in overrides:
            key, value = text.split("=", 1)
            public_text = f"{key}={HIDDEN}" if _may_be_secret(key.split(".")) else hidden(text)
            if not all(key.split(".")) or key.count(".") >= MOST_DEPTH:
                mistakes.append(f"{brief(public_text)}: {shown(key)} is no dotted key, as train.seed")
                continue
            try:
                leaf: Any = parse_yaml(value, public_text).tree
            except YamlError as error:
                why = f"{brief(public_text)}: its value is no YAML" if HIDDEN in public_text else str(error)
                mistakes.append(f"{why} (in a shell: {brief(key)}='\"...\"')")
                continue
            # A variable of a shell that is not set would pin nothing without a word.
            if key == "train.expect" and not value:
                mistakes.append("train.expect= is no identity; give one, or leave the field out")
            for part in reversed(key.split(".")):
                leaf = {part: leaf}
            self._overrides.append(leaf)
        trees = [*(document.tree for document in self._files), *self._overrides]
        self.tree: dict[str, Any] = reduce(_merge, trees, {})

    def at(self, loc: Iterable[str | int]) -> tuple[list[Any], Any]:
        """The path of YAML keys that a path of pydantic's goes, and the value there.

        pydantic's has the branches of unions, too.
        """
        path: list[Any] = []
        value: Any = self.tree
        for part in loc:
            known = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
            if part in known:
                path.append(part)
                value = value[part]
        return path, value

    def place(self, path: Sequence[str | int]) -> str:
        """` (FILE, line N)` where the last file has the value; empty where an override has it."""
        for tree in self._overrides:
            value: Any = tree
            for part in path:
                value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
            if value is not _ABSENT:
                return ""
        places = (document.place(path) for document in reversed(self._files))
        return next((f" ({place})" for place in places if place), "")


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in over.items()}}
    return over


def _sections(
    root: type[Any], given: _Given, mistakes: list[str], whole: bool
) -> tuple[dict[str, Any], set[str]]:
    """Each root section that parses, and the paths of values beyond their limits, which are in there.

    Sections are read apart so that one mistake hides no other. `whole`: a section that is not there is a
    mistake.
    """
    hints = typing.get_type_hints(root, include_extras=True)
    out = {}
    beyond: set[str] = set()
    for key in given.tree:
        if key not in hints:
            more = suggest(key, hints) + given.place([key]) if len(mistakes) < _MOST else ""
            mistakes.append(f"{brief(key)}: unknown section{more}")
    for spec in dataclasses.fields(root):
        name = spec.name
        if name not in given.tree:
            if _required(spec) and whole:
                mistakes.append(f"{name}: missing section; add a file that has it (see examples/)")
            continue
        adapter = TypeAdapter(hints[name])
        try:
            out[name] = adapter.validate_python(given.tree[name])
        except ValidationError as caught:
            errors = caught.errors(include_url=False)
            mistakes += _messages(root, name, given, errors[: 2 * _MOST])
            mistakes += [f"{name}: another mistake"] * (len(errors) - 2 * _MOST)
            # A value beyond its limit still takes part in the checks between fields.
            if all(error["type"] == "limit" for error in errors):
                out[name] = adapter.validate_python(given.tree[name], context="unlimited")
                beyond |= {".".join(map(str, given.at([name, *error["loc"]])[0])) for error in errors}
    return out, beyond


def _required(spec: dataclasses.Field[Any]) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


_WANTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping, {name: value}",
    "dataclass": "a mapping, {field: value}",
    "list": "a list, [value, value]",
}
"""First word of a type of pydantic's errors -> what a value must be."""


def _messages(root: type[Any], section: str, given: _Given, errors: Sequence[Any]) -> list[str]:
    """A message for each mistake. Branches of a union complain of one value, and make one message."""
    out: dict[tuple[str | int, ...], str] = {}
    wanted: dict[tuple[str | int, ...], list[str]] = {}
    for error in errors:
        path, _ = given.at([section, *error["loc"]])
        kind, name, about = error["type"], brief(".".join(map(str, path))), error.get("ctx", {})
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _field_names(typing.get_type_hints(root)[section], path[1:-1])
            out[*path] = f"{name}: unknown key{suggest(str(path[-1]), known)}{given.place(path)}"
        elif kind in ("missing", "missing_argument"):
            field = error["loc"][-1]
            out[*path, field] = f"{name}.{brief(str(field))}: missing{given.place(path)}"
        elif kind in ("limit", "text"):
            out[*path] = f"{name}={shown(hidden(about['value']))} {error['msg']}{given.place(path)}"
        elif kind == "name":
            path += [about["name"]] if "name" in about else []
            out[*path] = f"{name}{error['msg']}{given.place(path)}"
        else:
            words = wanted.setdefault(tuple(path), [])
            words.append(about.get("expected") or _WANTED.get(kind.split("_")[0], error["msg"]))
    for where, words in wanted.items():
        # A branch that went further into the value knows more.
        if not any(other[: len(where)] == where for other in (*out, *(w for w in wanted if w != where))):
            value, words = given.at(where)[1], list(dict.fromkeys(words))
            value_text, hint = shown(hidden(value, isinstance(value, str) and _may_be_secret(where))), ""
            if value is None or isinstance(value, bool):
                value_text = json.dumps(value)
                hint = "" if value is None else "; YAML reads yes, no, on and off as true and false"
            elif "text" in words and isinstance(value, (int, float)):
                hint = "; quote it"
            name = brief(".".join(map(str, where)))
            out[where] = f"{name}={value_text} must be {' or '.join(words)}{hint}{given.place(where)}"
    return list(out.values())


def _may_be_secret(path: Sequence[str | int]) -> bool:
    """Whether a value at `path` may hold loggers' settings, whose text no message shows."""
    return path[0] == "train" and (len(path) == 1 or path[1] == "exp_manager")


def _field_names(hint: Any, path: Sequence[str | int]) -> list[str]:
    """Names of the dataclass that `path` leads to, for a suggestion."""
    if typing.get_origin(hint) is dict:
        return _field_names(typing.get_args(hint)[1], path[1:])
    for inner in [a for a in typing.get_args(hint) if a is not type(None)] or [hint]:
        if dataclasses.is_dataclass(inner):
            sub = typing.get_type_hints(inner)
            inside = path and path[0] in sub
            return _field_names(sub[str(path[0])], path[1:]) if inside else list(sub)
    return []


def _cross_check(sections: dict[str, Any], legal: bool) -> list[str]:
    """Mistakes between fields, for whichever sections parsed. `legal`: no value is beyond its limit."""
    model, parallel = sections.get("model"), sections.get("parallel")
    data, train, phases = sections.get("data"), sections.get("train"), sections.get("phases")
    mix, out = sections.get("mix"), []
    if model:
        scaling, heads, groups = model.rope_scaling, model.num_attention_heads, model.num_query_groups
        if scaling and not (low := scaling.low_freq_factor) < (high := scaling.high_freq_factor):
            out.append(f"model.rope_scaling: low_freq_factor={low} is not below high_freq_factor={high}")
        if model.head_dim % 2:
            out.append(f"model.head_dim={model.head_dim} must be even: rotary embedding turns pairs")
        if heads % groups:
            out.append(f"model.num_attention_heads={heads} is no multiple of model.num_query_groups={groups}")
    if parallel:
        out += _check_layout(parallel, model, data)
    if data and not data.sources:
        out.append("data.sources: empty; name at least one dataset")
    if train:
        batch, micro = train.global_batch, train.micro_batch
        if batch % micro:
            out.append(f"train.global_batch={batch} is no multiple of train.micro_batch={micro}")
        undivided = data and all(source.documents is None for source in data.sources.values())
        if train.validation_windows > 0 and undivided:
            needs = "documents set aside: give data.sources.NAME.documents (tools/curate_probes.py does)"
            out.append(f"train.validation_windows={train.validation_windows} needs {needs}")
        if train.keep_every is not None and train.keep_last is None:
            out.append(f"train.keep_every={train.keep_every} deletes nothing alone; set train.keep_last, too")
        if train.init_from and train.init_weights:
            out.append("train.init_from and train.init_weights: give one, to go on from or to begin with")
        if train.expect is not None and not (train.init_from or train.init_weights):
            out.append("train.expect is of a checkpoint to begin with: give train.init_weights or init_from")
    if phases is not None:
        tokens_per_step = train.global_batch * data.seq_length if data and train and legal else None
        out += _check_phases(phases, list(data.sources) if data else None, tokens_per_step)
        out += [m for name, phase in phases.items() for m in _check_objective(name, phase, sections)]
    if mix and mix.floor > mix.cap:
        out.append(f"mix.floor={mix.floor} is above mix.cap={mix.cap}")
    return out


_MOST_NAMED = 4096
"""Largest legal value that a message proposes."""
_TENSOR = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
"""Sizes that the tensor-parallel ranks divide among them. Rows that fill the vocabulary up would take part in
the softmax, and be another model."""


def _check_layout(parallel: ParallelConfig, model: ModelConfig | None, data: DataConfig | None) -> list[str]:
    """Sizes that do not divide, each by its own name."""
    tensor, pipeline, context = parallel.tensor, parallel.pipeline, parallel.context
    virtual, out = parallel.virtual_pipeline, []
    if model:
        sizes = {name: getattr(model, name) for name in _TENSOR}
        if undivided := [f"model.{name}={size}" for name, size in sizes.items() if size % tensor]:
            most = range(1, min(model.num_query_groups, _MOST_NAMED) + 1)
            legal = [n for n in most if not any(size % n for size in sizes.values())]
            out.append(f"parallel.tensor={tensor} does not divide {', '.join(undivided)}; use one of {legal}")
        layers, chunks = model.num_layers, f" x parallel.virtual_pipeline={virtual}" if virtual > 1 else ""
        if layers % (pipeline * virtual):
            legal = [n for n in range(1, min(layers, _MOST_NAMED) + 1) if layers % (n * virtual) == 0]
            way = f"; use a parallel.pipeline of {legal}" if legal else ""
            out.append(f"parallel.pipeline={pipeline}{chunks} does not divide model.num_layers={layers}{way}")
    if virtual > 1 and pipeline == 1:
        out.append(f"parallel.virtual_pipeline={virtual} needs parallel.pipeline > 1")
    if parallel.sequence and tensor == 1:
        out.append("parallel.sequence=true needs parallel.tensor > 1")
    parts = {f"2 x parallel.context={context}": 2 * context} if context > 1 else {}
    parts |= {f"parallel.tensor={tensor} of parallel.sequence": tensor} if parallel.sequence else {}
    if data and data.seq_length % (product := math.prod(parts.values())):
        into = f"{' x '.join(parts)} parts; use a multiple of {product}"
        out.append(f"data.seq_length={data.seq_length} does not divide into {into}")
    return out


def _check_phases(
    phases: dict[str, PhaseConfig], sources: list[str] | None, tokens_per_step: int | None
) -> list[str]:
    """`sources`, `tokens_per_step`: None where they did not parse."""
    known = set(sources or ())
    out = [] if phases else ["phases: empty; name at least one phase"]
    for name, phase in phases.items():
        path = f"phases.{name}"
        if (phase.steps is None) == (phase.tokens is None):
            out.append(f"{path}: give steps or tokens, one of the two")
        if phase.decay_steps is not None and phase.decay != "wsd":
            out.append(f"{path}.decay_steps={phase.decay_steps} needs decay: wsd, not {phase.decay}")
        elif phase.decay_steps is not None and phase.decay_steps > (phase.steps or math.inf):
            out.append(f"{path}.decay_steps={phase.decay_steps} is not within {path}.steps={phase.steps}")
        for field in ("max_epochs", "keep", "weights"):
            given = getattr(phase, field)
            for key in given if isinstance(given, dict) and sources is not None else ():
                if key not in known:
                    meant = suggest(key, sources or ()) if len(out) < _MOST else ""
                    out.append(f"{path}.{field}.{brief(key)}: no such source in data.sources{meant}")
        total = 1.0 if phase.weights == "uniform" else sum(phase.weights.values())
        if not 0 < total < math.inf:
            wrong = "all weights are 0; at least one source must be drawn"
            out.append(f"{path}.weights: {f'their sum is {total}' if total else wrong}")
        if tokens_per_step is None:
            continue
        steps = phase.steps if phase.steps is not None else -(-(phase.tokens or 0) // tokens_per_step)
        decay = phase.wsd_steps(steps) if phase.decay == "wsd" else 0
        if steps * tokens_per_step >= 1 << 62:
            out.append(f"{path}: {steps} steps are beyond counting; a phase has less than 2^62 tokens")
        # Warm-up and decay share the phase.
        if phase.warmup_steps > steps - decay:
            within = f"the phase's {steps} steps" + (f" with a decay over {decay}" if decay else "")
            out.append(f"{path}.warmup_steps={phase.warmup_steps} is not within {within}")
    return out


def _check_objective(name: str, phase: PhaseConfig, sections: dict[str, Any]) -> Iterator[str]:
    objective, path = phase.objective, f"phases.{name}.objective"
    data, parallel, optimizer = map(sections.get, ("data", "parallel", "optimizer"))
    if objective and not (objective.teacher or objective.cache):
        yield f"{path}: give teacher, or cache, or both"
    if objective and objective.cache and data and data.cross_documents:
        yield f"{path}.cache: its records are of documents by themselves; set data.cross_documents=false"
    if objective and parallel and (stages := parallel.pipeline) > 1:
        yield f"{path}: the teacher is compared on one stage, and there are {stages}; set parallel.pipeline=1"
    if objective and optimizer and optimizer.z_loss:
        yield f"{path}: optimizer.z_loss={optimizer.z_loss:g} is of cross-entropy alone; set it to 0"


def check_world(config: Config, world_size: int) -> list[str]:
    """Mistakes of launching this configuration on `world_size` ranks."""
    parallel, train = config.parallel, config.train
    if train.global_batch % train.micro_batch:
        return []  # config_io.load reports this
    if mistakes := check_copies(parallel, world_size):
        return mistakes
    data_parallel, virtual = world_size // parallel.model_ranks(), parallel.virtual_pipeline
    passes, left = divmod(train.global_batch, train.micro_batch * data_parallel)
    if not left and virtual > 1 and passes % parallel.pipeline:
        return [
            f"parallel.virtual_pipeline={virtual} interleaves groups of parallel.pipeline="
            f"{parallel.pipeline} micro-batches, but a step has {passes} on each data-parallel rank; change "
            f"train.global_batch or train.micro_batch"
        ]
    if not left:
        return []
    share, rest = divmod(train.global_batch, data_parallel)
    if rest:
        way = f"make train.global_batch a multiple of {train.micro_batch * data_parallel}"
    else:
        most = min(share, _MOST_NAMED)
        way = f"use a train.micro_batch of {[m for m in range(1, most + 1) if share % m == 0]}"
    fault = f"train.global_batch={train.global_batch} is no multiple of train.micro_batch={train.micro_batch}"
    return [f"{fault} x {data_parallel} data-parallel ranks; {way}"]


def check_copies(parallel: ParallelConfig, ranks: int) -> list[str]:
    """Mistakes of dividing `ranks` ranks into copies of the model."""
    copy = parallel.model_ranks()
    if ranks % copy == 0:
        return []
    sizes = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tensor", "pipeline", "context")]
    copies = f"model copies of {' x '.join(sizes)} = {copy} ranks"
    return [f"{ranks} ranks do not divide into {copies}; launch a multiple of {copy}"]
