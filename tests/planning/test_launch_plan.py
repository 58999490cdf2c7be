"""What a launch plan says of data, time and checkpoints, and of the paper."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.config_io import ConfigError
from megatron_r1.launch.paper import SOURCES, differences
from megatron_r1.launch.plan import Launch, plan_launch
from megatron_r1.launch.text import text
from megatron_r1.launch.warnings import warnings
from tests.launch import TINY_MODEL, write_corpus

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = [
    str(ROOT / "examples" / name)
    for name in ("models/950m.yaml", "pretrain/phase1.yaml", "pretrain/phase2.yaml")
]


def pretrain(*more: str) -> Config:
    return config_io.load([*PRETRAIN, *more])


def test_epochs_of_the_recipe_are_the_papers_tokens_over_its_datasets() -> None:
    plan = plan_launch(pretrain(), Launch(168), build=False)
    for name, epochs in plan.epochs().items():
        paper = SOURCES[name]
        drawn = 2e12 * (paper["phase1"] / 100.01 + paper["phase2"] / 99.99)
        assert epochs == pytest.approx(drawn / paper["tokens"], rel=1e-4), name
    assert plan.data.absent == set(SOURCES)


def test_time_is_flops_over_what_the_gpus_do() -> None:
    plan = plan_launch(pretrain(), Launch(168, mfu=0.5, peak_flops=1e15), build=False)
    attention = 6 * 22 * 2048 * 1536
    seconds = (6 * 949_685_760 + attention) * plan.tokens / 0.5e15
    assert plan.gpu_hours == pytest.approx(seconds / 3600)
    assert plan.step_seconds == pytest.approx(seconds / 168 / plan.steps)
    assert plan.mfu_of(plan.gpu_hours) == pytest.approx(0.5)


TEACHER = 8_030_261_248, 2 * 8.03e9
KD = "phases.phase2.objective={name: kd, teacher: large"


def test_a_teacher_takes_time_in_its_phase_and_a_cache_none() -> None:
    teachers = {"phase2": TEACHER}
    plain = plan_launch(pretrain(), Launch(168), build=False)
    online = plan_launch(pretrain(KD + "}"), Launch(168), build=False, teachers=teachers)
    apart = ", cache: records}", "data={cross_documents: false, eod: 2}"
    cached = plan_launch(pretrain(KD + apart[0], apart[1]), Launch(168), build=False, teachers=teachers)
    steps = online.config.phase_steps("phase2")
    seconds = TEACHER[1] * steps * online.config.tokens_per_step() / (0.4 * 989e12)
    assert online.gpu_hours - plain.gpu_hours == pytest.approx(seconds / 3600, rel=1e-9)
    assert online.flops == plain.flops == cached.flops and cached.gpu_hours == plain.gpu_hours
    assert "teacher of phase phase2: 1.606e+10 FLOP a token x" in text(online)
    assert "teacher" not in text(cached) + text(plain)
    # Each context-parallel rank runs the teacher on whole rows.
    rows = plan_launch(pretrain(KD + "}", "parallel.context=2"), Launch(336), build=False, teachers=teachers)
    assert rows.teacher_flops("phase2") == pytest.approx(2 * online.teacher_flops("phase2"), rel=1e-9)


def test_every_size_that_does_not_divide_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_launch(pretrain("data.sources.wiki.tokens=null"), Launch(100, rank=100, mfu=2), build=False)
    message = str(caught.value)
    for part in ("--rank 100", "--mfu 2", "make train.global_batch a multiple of 1200", "sources.wiki"):
        assert part in message


def test_warnings_name_what_is_odd() -> None:
    odd = "phases.odd={steps: 100000, weights: {starcoder: 0.5, wiki: 0.4}}"
    config = config_io.load([*PRETRAIN[:2], odd, "model.head_dim=62"])
    output = "\n".join(warnings(plan_launch(config, Launch(168), build=False)))
    for part in (
        "phase1 sum to 100.01, not 100",
        "odd sum to 0.9, not 1",
        "no phase draws: nemotron-science",
        "2.75T on 168 GPUs and 2.10T on 128",
        "model.head_dim=62 has no flash attention",
    ):
        assert part in output, output


def test_a_batch_ten_times_the_papers_is_called_out() -> None:
    config = config_io.load([*PRETRAIN[:2], "train={global_batch: 26880, micro_batch: 16}"])
    output = "\n".join(warnings(plan_launch(config, Launch(168), build=False)))
    assert "train.global_batch=26880: 55,050,240 tokens a step are 10.0 times the paper's 5,505,024" in output


def test_assumptions_that_are_no_numbers_are_refused() -> None:
    for launch in (Launch(168, gpu_memory=float("nan")), Launch(168, peak_flops=float("inf"))):
        with pytest.raises(ConfigError, match="--peak-tflops and --gpu-memory must be positive and finite"):
            plan_launch(pretrain(), launch, build=False)


def test_a_launch_without_oddities_has_no_warnings() -> None:
    weights = "phases.phase1.weights={fineweb-edu: 0.75, starcoder: 0.25}"
    config = config_io.load([*PRETRAIN[:2], weights])
    only = {name: config.data.sources[name] for name in ("fineweb-edu", "starcoder")}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=only))
    assert warnings(plan_launch(config, Launch(56), build=False)) == []


def test_datasets_that_are_there_are_counted_themselves(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 60, seed=1)
    config = config_io.load(
        [
            *TINY_MODEL,
            "train={run: none, global_batch: 8, micro_batch: 2, precision: fp32}",
            f"data={{seq_length: 32, sources: {{a: {{prefix: '{tmp_path}/a', tokens: 5}}}}}}",
            "phases.one={steps: 3}",
        ]
    )
    plan = plan_launch(config, Launch(4, rank=3))
    assert not plan.data.absent and plan.data.corpora[0].tokens > 1000
    assert plan.first_N is not None
    # Four ranks with two sequences each.
    assert plan.first_N.tolist() == [6, 7]
    printed = text(plan)
    assert f"6  a                  epoch 0 window {plan.data.plan.locate(6)[2]}" in printed
    assert "first samples of rank 3" in printed and "memory of rank 3" in printed


def test_the_recipe_differs_from_the_paper_only_where_the_rulings_say() -> None:
    output = "\n".join(differences(pretrain(), 168))
    expected = [
        "parameters: here 949,685,760, paper 949.2M",
        "sequences per GPU and step: here 12, paper 16",
        "phases.phase1.steps: here 484,407, paper 500,000",
        "phases.phase1.weights.fineweb-edu: here 63.74 %, paper 63.75 %",
        "phases.phase1.weights: here normalised, the paper's sum to 100.01 %",
        "phases.phase2.steps: here 484,407, paper 500,000",
        "phases.phase2.warmup_steps: here 0, paper 2,000",
        "phases.phase2.weights.fineweb-edu: here 54.84 %, paper 54.83 %",
        "phases.phase2.weights: here normalised, the paper's sum to 99.99 %",
    ]
    lines = [line.rpartition(" (")[0] for line in output.splitlines()]
    assert lines == expected


@pytest.mark.parametrize(
    "change, line",
    [
        ("model.num_layers=21", "model.num_layers: here 21, paper 22"),
        ("data.seq_length=4096", "data.seq_length: here 4,096, paper 2,048"),
        ("phases.phase1.learning_rate=0.002", "phases.phase1.learning_rate: here 0.002, paper 0.004"),
        ("phases.phase2.decay=cosine", "phases.phase2.decay: here cosine, paper linear"),
        ("data.sources.wiki.tokens=1000000000", "data.sources.wiki.tokens: here 1,000,000,000"),
        ("phases.phase2.weights.wiki=1.14", "phases.phase2.weights.wiki: here 1.13 %, paper 0.14 %"),
    ],
)
def test_a_change_of_the_recipe_is_a_difference_from_the_paper(change: str, line: str) -> None:
    assert line in "\n".join(differences(pretrain(change), 168))


def test_the_tool_answers_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv[0] = 'tools/plan_launch.py'\n"
        "runpy.run_path('tools/plan_launch.py', run_name='__main__')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *PRETRAIN, "--gpus", "168", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "484,407 steps x 4,128,768 = 2,000,004,120,576 tokens" in done.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("phases.one.steps=1000000000000000", "checkpoints: 1,000,000,000,000 is more than is planned"),
        ("train.global_batch=67108864", "train.global_batch: 67,108,864 is more than is planned"),
        ("data.seq_length=67108864", "data.seq_length: 67,108,864 is more"),
        ("model.num_layers=1000000000000", "model.num_layers: 1,000,000,000,000 is more"),
        ("model.vocab_size=1000000000000000", "is more than is planned, 1,125,899,906,842,624"),
        ("train.keep_spaced=1000000000000", "train.keep_spaced=1000000000000 must be within 0 and 100,000"),
        ("parallel.pipeline=3 model.num_layers=4611686018427387904", "does not divide model.num_layers"),
    ],
)
def test_numbers_beyond_planning_are_refused_at_once(change: str, said: str) -> None:
    model = (
        "{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_query_groups: 1,"
    )
    words = [f"model={model} head_dim: 16, vocab_size: 400}}", "phases.one={steps: 3, learning_rate: 1e-3}"]
    words += ["train={run: r, global_batch: 2, micro_batch: 1, precision: fp32}"]
    words += ["data={seq_length: 64, sources: {x: {prefix: nowhere, tokens: 1000000000000000000}}}"]
    plan_launch(config_io.load(words), Launch(2), build=False)
    with pytest.raises(ConfigError) as error:
        plan_launch(config_io.load([*words, *change.split()]), Launch(2), build=False)
    assert said in str(error.value) and max(map(len, str(error.value).splitlines())) < 400
    with pytest.raises(
        ConfigError, match="--gpus 1000000000: a launch needs at least one, and 100,000 at most"
    ):
        plan_launch(config_io.load(words), Launch(10**9), build=False)
