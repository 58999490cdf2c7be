"""Configuration files: merged, overridden, and every mistake named at once."""

from __future__ import annotations

import dataclasses
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.config_io import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "examples/models/tiny.yaml")
BASE = """
train: {run: runs/x, global_batch: 8, micro_batch: 4}
data: {seq_length: 64, sources: {a: {prefix: data/a}, b: {prefix: data/b}}}
phases: {one: {steps: 10}}
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def mistakes(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_io.load(arguments)
    return caught.value.mistakes


def test_files_merge_left_to_right_and_overrides_come_last(base: str, tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("train: {micro_batch: 2}\nphases: {two: {tokens: 1000, weights: {a: 3, b: 1}}}\n")
    config = config_io.load([TINY, base, "train.global_batch=16", str(later)])
    assert (config.train.global_batch, config.train.micro_batch) == (16, 2)
    assert list(config.phases) == ["one", "two"]
    assert config.phase_steps("two") == 1  # 1000 tokens are one step of 16 x 64
    assert config.phase_weights("two") == {"a": 3, "b": 1}


def test_dump_loads_back_equal(base: str, tmp_path: Path) -> None:
    config = config_io.load([TINY, base])
    again = tmp_path / "again.yaml"
    again.write_text(config_io.dump(config))
    assert config_io.load([str(again)]) == config


SECRET = "train.exp_manager={wandb_logger_kwargs: {api_key: SECRET, project: p}, x: ['https://u:SECRET@h']}"


def test_keys_of_loggers_are_given_on_and_shown_nowhere(base: str, tmp_path: Path) -> None:
    config = config_io.load([TINY, base, SECRET])
    assert config.train.exp_manager and config.train.exp_manager["wandb_logger_kwargs"]["api_key"] == "SECRET"
    text = config_io.dump(config)
    assert "SECRET" not in text and "project: p" in text
    (tmp_path / "again.yaml").write_text(text)
    again = config_io.load([str(tmp_path / "again.yaml")])
    assert config_io.dump(again) == text


def test_no_mistake_in_a_file_quotes_a_key(base: str, tmp_path: Path) -> None:
    """Nor the line below the name."""
    (tmp_path / "mine.yaml").write_text("train:\n  exp_manager:\n    api_key:\n      0123456\n")
    messages = mistakes(TINY, base, str(tmp_path / "mine.yaml"))
    assert "line 4" in str(messages) and "0123456" not in str(messages)


@pytest.mark.parametrize(
    "override",
    [
        "train.exp_manager='api_key: SECRET'",
        "train.exp_manager={api_key: SECRET",
        "train.exp_manager.a.api_key=0xSECRET: [",
        "train.exp_manager=[{api_key: SECRET}]",
        "train=[{exp_manager: {api_key: SECRET}}]",
        "train='{exp_manager: {api_key: SECRET}}'",
        "train.wandb_project={api_key: SECRET}",
        "train.exp_manager={api_key: 'SECRET'}: x",
        "train.run={url: 'https://u:SECRET@h'}",
        "train.exp_manager={uri: 'https://u:SECRET@h${now:}'}",
        "train.exp_manager={uri: 'https://u:SECRET@h', uri: 1}",
    ],
)
def test_no_mistake_quotes_a_key(base: str, override: str) -> None:
    messages = mistakes(TINY, base, override)
    assert messages and "SECRET" not in str(messages)


@pytest.mark.parametrize("value", ["{a: [{b: '${eval:1}'}]}", "{a: {_target_: os.system}}", "{'${now:}': 1}"])
def test_settings_of_loggers_are_data(base: str, value: str) -> None:
    (message,) = mistakes(TINY, base, f"train.exp_manager={value}")
    assert message.startswith("train.exp_manager=") and "would be evaluated; give the value itself" in message
    config_io.load([TINY, base, "train.exp_manager={a: {api_key: '${oc.env:WANDB_API_KEY}'}}"])


def _many(key: str, value: object = 1, count: int = 2000) -> str:
    return "{" + ", ".join(f"'{key}{n}': {value}" for n in range(count)) + "}"


@pytest.mark.parametrize(
    ("override", "most"),
    [
        ("data.sources={'" + "k" * 100_000 + "': {prefix: x}}", 600),
        ("data.sources={'" + "a\u0301\u0316" * 10_000 + "': {prefix: x}}", 600),
        ("train.seed='" + "x" * 200_000 + "'", 600),
        ("train.seed=" + "9" * 3900, 600),
        ("train.run={a: [" + "1," * 5000 + "]}", 600),
        (f"data={_many('k')}", 20_000),
        (f"data.sources={_many('s/', '{prefix: x}')}", 20_000),
        (f"phases.one.weights={_many('k')}", 20_000),
        (f"phases.one.max_epochs={_many('k', -1)}", 20_000),
        (f"model={_many('k', '[1]')}", 20_000),
        ("a." * 60_000 + "b=1", 1000),
        ("x" * 100_000, 600),
        ("train.seed=" + "[" * 100_000, 600),
    ],
    ids=lambda value: str(value)[:16],
)
def test_a_message_is_bounded_for_any_content(base: str, override: str, most: int) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        config_io.load([TINY, base, override])
    assert len(str(caught.value)) < most and time.process_time() - start < 5
    assert str(caught.value).count("\n") == min(51, len(caught.value.mistakes))


def test_names_with_control_characters_are_shown_escaped(base: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text('data: {sources: {"\\e[2J\\nb": {prefix: x}}}')
    (message,) = mistakes(TINY, base, str(tmp_path / "x.yaml"))
    assert message.startswith("data.sources.\\x1b[2J\\nb: a name has letters")


def test_every_mistake_is_in_one_message(base: str) -> None:
    messages = mistakes(
        TINY,
        base,
        "train.micro_bach=3",
        "model.num_layers=four",
        "parallel.tensor=2",
        "phases.one.weights={a: 1, c: 2}",
        "nowhere.yaml",
    )
    text = "\n".join(messages)
    assert "train.micro_bach: unknown key; did you mean micro_batch?" in text
    assert "model.num_layers='four'" in text
    assert "nowhere.yaml: no such file" in text
    assert "phases.one.weights.c: no such source in data.sources; known: a, b" in text
    assert len(messages) == 4  # the shape did not parse, so its parallel size cannot be judged yet


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.tensor=2",
            "parallel.tensor=2 does not divide model.num_attention_heads=3, model.num_q",
        ),
        ("parallel.pipeline=3", "parallel.pipeline=3 does not divide model.num_layers=4"),
        ("train.global_batch=6", "train.global_batch=6 is no multiple of train.micro_batch=4"),
        ("phases.one.tokens=5", "phases.one: give steps or tokens, one of the two"),
        (
            "phases.one.weights={a: -1, b: 2}",
            "phases.one.weights.a=-1.0 must be a finite number",
        ),
        ("phases.one.weights={a: 0, b: 0}", "phases.one.weights: all weights are 0"),
        (
            "phases.one.weights=[1, 2]",
            "phases.one.weights=[1, 2] must be a mapping, {name: value} or",
        ),
        ("phazes.one.steps=3", "phazes: unknown section; did you mean phases?"),
        ("data.seq_length=0", "data.seq_length=0 must be positive"),
        ("model.head_dim=31", "model.head_dim=31 must be even"),
        ("model.head_dim=0", "model.head_dim=0 must be positive"),
        ("model.num_attention_heads=0", "model.num_attention_heads=0 must be positive"),
        ("optimizer.adam_beta2=1.5", "optimizer.adam_beta2=1.5 must be at least 0 and below 1"),
        ("optimizer.adam_beta1=-0.1", "optimizer.adam_beta1=-0.1 must be at least 0 and below 1"),
        ("optimizer.adam_beta1=.nan", "optimizer.adam_beta1=nan must be at least 0 and below 1"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1 must be a finite number of at least 0"),
        ("optimizer.clip_grad=-1", "optimizer.clip_grad=-1.0 must be a finite number of at least 0"),
        ("optimizer.clip_grad=.nan", "optimizer.clip_grad=nan must be a finite number of at least 0"),
        ("optimizer.z_loss=.inf", "optimizer.z_loss=inf must be a finite number of at least 0"),
        ("optimizer.adam_eps=0", "optimizer.adam_eps=0.0 must be positive and finite"),
        ("phases.one.learning_rate=.inf", "phases.one.learning_rate=inf must be positive and finite"),
        ("phases.one.min_lr_ratio=-3", "phases.one.min_lr_ratio=-3.0 must be within 0 and 1"),
        ("influence={directions: {x: y}, examples: 0}", "influence.examples=0 must be positive"),
        ("influence={directions: {x: y}, probe_examples: 0}", "influence.probe_examples=0 must be positive"),
        ("influence={directions: {x: y}, seed: -1}", "influence.seed=-1 must be at least 0 and below 2^63"),
        ("train.keep_spaced=-1", "train.keep_spaced=-1 must be within 0 and 100,000"),
        ("train.seed=-1", "train.seed=-1 must be at least 0 and below 2^63"),
        ("health.max_skipped=0", "health.max_skipped=0 must be at least 1"),
        ("health.loss_spike=-1", "health.loss_spike=-1.0 must be at least 0"),
        ("phases.one.warmup_steps=11", "phases.one.warmup_steps=11 is not within the phase's 10 steps"),
        (
            "influence={directions: {x: y}, min_correlation: 5}",
            "influence.min_correlation=5.0 must be",
        ),
        ("data.eod=-5", "data.eod=-5 must not be negative"),
        ("train.seed=1e30", "train.seed=1e+30 must be an integer"),
        ("train.deterministic='true'", "train.deterministic='true' must be true or false"),
        ("influence.norms=1", "influence.norms=1 must be true or false"),
        ("train.run=", "train.run=null must be text"),
        ("train.run=' '", "train.run=' ' names nothing"),
        ("data.sources.a.domain=3", "data.sources.a.domain=3 must be text; quote it"),
        ("optimizer=[1]", "optimizer=[1] must be a mapping, {field: value}"),
        ("phases.one.max_epochs={a: 0}", "phases.one.max_epochs.a=0.0 must be above 0"),
        ("phases.one.weights={a: 1e308, b: 1e308}", "phases.one.weights: their sum is inf"),
        ("train.=3", "train.=3: 'train.' is no dotted key"),
        ("train.expect=", "train.expect= is no identity; give one, or leave the field out"),
        (
            "parallel={context: 3}",
            "data.seq_length=64 does not divide into 2 x parallel.context=3 parts",
        ),
        ("mix={phase: one, floor: 0.5, cap: 0.1}", "mix.floor=0.5 is above mix.cap=0.1"),
    ],
)
def test_a_mistake_names_the_value_and_the_way_out(base: str, override: str, message: str) -> None:
    assert any(m.startswith(message) for m in mistakes(TINY, base, override)), mistakes(TINY, base, override)


def test_a_value_beyond_its_limit_hides_no_mistake_between_fields(base: str) -> None:
    assert mistakes(TINY, base, "train.head_chunk=0", "train.micro_batch=3", "model.num_layers=7.5") == [
        "model.num_layers=7.5 must be an integer",
        "train.head_chunk=0 must be positive",
        "train.global_batch=8 is no multiple of train.micro_batch=3",
    ]


KD = "phases.one.objective={name: kd, teacher: runs/teacher}"


def test_an_objective_is_a_phases_own(base: str) -> None:
    config = config_io.load([TINY, base, KD, "phases.two.steps=1"])
    assert config.phases["two"].objective is None
    objective = config.phases["one"].objective
    assert objective and (objective.teacher, objective.cache) == ("runs/teacher", None)
    assert (objective.temperature, objective.weight, objective.bos) == (1.0, 1.0, "auto")
    assert config_io.load([TINY, base, KD, "phases.one.objective=null"]) == config_io.load([TINY, base])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("phases.one.objective.name=ce", "name='ce' must be 'kd'"),
        ("phases.one.objective.teacher=null", ": give teacher, or cache, or both"),
        ("phases.one.objective.teacher=''", "teacher='' names nothing"),
        (
            "phases.one.objective.cache=runs/cache",
            "cache: its records are of documents by themselves; set data.cross_documents=false",
        ),
        (
            "parallel.pipeline=2",
            ": the teacher is compared on one stage, and there are 2; set parallel.pipeline=1",
        ),
        ("optimizer.z_loss=0.1", ": optimizer.z_loss=0.1 is of cross-entropy alone; set it to 0"),
        ("phases.one.objective.weight=1.5", "weight=1.5 must be within 0 and 1"),
        ("phases.one.objective.temperature=0.0", "temperature=0.0 must be positive and finite"),
        ("phases.one.objective.bos=-1", "bos=-1 must not be negative"),
        ("phases.one.objective.bos=x", "bos='x' must be 'auto' or 'none' or an integer"),
        ("phases.one.objective.teachr=x", "teachr: unknown key; did you mean teacher?"),
    ],
)
def test_an_objectives_mistakes_are_one_each(base: str, override: str, expected: str) -> None:
    path = "phases.one.objective" + ("" if expected[0] == ":" else ".")
    assert mistakes(TINY, base, KD, override) == [path + expected]


def test_world_size_that_does_not_divide_is_refused(base: str) -> None:
    config = config_io.load([TINY, base])
    assert config_io.check_world(config, 2) == []
    assert config_io.check_world(config, 3) == [
        "train.global_batch=8 is no multiple of train.micro_batch=4 x 3 data-parallel ranks; "
        "make train.global_batch a multiple of 12"
    ]
    assert "use a train.micro_batch of [1, 2]" in config_io.check_world(config, 4)[0]


def test_an_override_longer_than_any_file_name_is_one(base: str) -> None:
    sources = ", ".join(f"source_{n}: {{prefix: data/{n}}}" for n in range(300))
    config = config_io.load([TINY, base, f"data.sources={{{sources}}}"])
    assert len(config.data.sources) == 302
    assert "x: no such file" in mistakes(TINY, base, "x" * 5000)[0]


@pytest.mark.parametrize("name", ["tiny", "140m", "360m", "950m"])
def test_every_model_file_resolves(name: str, base: str) -> None:
    config_io.load([str(ROOT / f"examples/models/{name}.yaml"), base])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.global_batch=0", ["train.global_batch=0 must be positive"]),
        (
            "parallel={pipeline: -1, virtual_pipeline: -1}",
            ["parallel.pipeline=-1 must be positive", "parallel.virtual_pipeline=-1 must be positive"],
        ),
        ("phases.one.steps=-3", ["phases.one.steps=-3 must be positive"]),
        ("model.num_query_groups=0", ["model.num_query_groups=0 must be positive"]),
    ],
)
def test_relations_are_judged_for_legal_values_alone(base: str, override: str, expected: list[str]) -> None:
    assert mistakes(TINY, base, override, "parallel.context=1") == expected


def test_what_does_not_divide_has_its_own_name(base: str) -> None:
    assert mistakes(str(ROOT / "examples/models/140m.yaml"), base, "parallel={tensor: 3, pipeline: 2}") == [
        "parallel.tensor=3 does not divide model.ffn_hidden_size=2048; use one of [1]",
        "parallel.pipeline=2 does not divide model.num_layers=15; use a parallel.pipeline of [1, 3, 5, 15]",
    ]
    assert mistakes(str(ROOT / "examples/models/360m.yaml"), base, "parallel.tensor=8") == [
        "parallel.tensor=8 does not divide model.num_query_groups=4; use one of [1, 2, 4]"
    ]


def _fields(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each field that holds no dataclass: its path and type, items of mappings and lists by themselves."""
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield from _fields(hint, f"{path}.{name}")
        return
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Annotated and inner[0] not in (int, float, str):
        yield from _fields(inner[0], path)
    elif typing.get_origin(kind) in (types.UnionType, typing.Union, dict, list):
        for one in inner[-1:] if typing.get_origin(kind) is dict else inner:
            yield from _fields(one, path)
    else:
        yield path, kind


def test_every_number_has_a_limit_and_takes_neither_text_nor_truth() -> None:
    seen = 0
    for path, kind in _fields(Config, ""):
        assert kind not in (int, float), f"{path} has no limit"
        if typing.get_origin(kind) is typing.Annotated and typing.get_args(kind)[0] in (int, float):
            adapter: Any = TypeAdapter(kind)
            whole = [1.5, 1 << 63] if typing.get_args(kind)[0] is int else []
            for value in [False, "1", None, [], float("nan"), *whole]:
                with pytest.raises(ValidationError):
                    adapter.validate_python(value)
            seen += 1
    assert seen > 50
