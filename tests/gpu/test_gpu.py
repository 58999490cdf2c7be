"""The trainer and influence scores on a GPU, against the same on the CPU of the same machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import launch
from tests.gpu import gpu

pytestmark = pytest.mark.skipif(not gpu.has(), reason="needs a GPU")
STEPS = "phases.one={steps: 20, learning_rate: 0.003, decay: constant}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate("abp"):
        launch.write_corpus(root / name, 60, seed=number)
    return root


def words(data: Path, run: Path, *more: str, tool: str = "train") -> list[str]:
    return launch.command(
        f"tools/{tool}.py",
        *launch.TINY_MODEL,
        f"train={{run: '{run}', global_batch: 8, micro_batch: 2, precision: fp32, checkpoint_every: 10}}",
        f"data={{seq_length: 32, sources: {{a: {{prefix: '{data}/a'}}, b: {{prefix: '{data}/b'}}}}}}",
        STEPS,
        *more,
        ranks=1,
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("cpu") / "run"
    launch.finish(words(data, run), run.parent / "log", **gpu.environment(False))
    return run


def assert_follows(run: Path, other: Path) -> None:
    """Losses and gradient norms of a GPU differ from a CPU's by the order of its sums alone."""
    ours, theirs = lines(run), lines(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for key, most in (("loss", 2e-5), ("grad_norm", 2e-3)):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=most), key


def test_training_follows_the_cpu(data: Path, cpu: Path, tmp_path: Path) -> None:
    text = launch.finish(words(data, tmp_path / "run"), tmp_path / "log", **gpu.environment())
    assert "device CPU" not in text and "collectives nccl" in text
    assert_follows(tmp_path / "run", cpu)


def test_a_stopped_run_goes_on(data: Path, cpu: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of a longer run, then the reference's length by the same command."""
    run, log = tmp_path / "run", tmp_path / "log"
    longer = words(data, run, "phases.one.steps=100000", "train.checkpoint_every=5")
    process = launch.start(longer, log, **gpu.environment())
    launch.wait_for((run / "checkpoints/step_00000005").exists, "the first checkpoint", 300)
    process.terminate()
    process.wait(timeout=120)
    stopped = re.search(r"stops \(SIGTERM.* at step (\d+), .* wrote (\S+)", log.read_text())
    assert stopped and Path(stopped[2]).exists()
    count = int(stopped[1]) + 5
    text = launch.finish(words(data, run, f"phases.one.steps={count}"), log, **gpu.environment())
    assert f"continues from {stopped[2]}" in text
    assert [line["step"] for line in lines(run)] == list(range(1, count + 1))
    first = [line["loss"] for line in lines(run)[:20]]
    assert first == pytest.approx([line["loss"] for line in lines(cpu)[: len(first)]], rel=2e-5)


def test_scores_follow_the_cpu(data: Path, cpu: Path, tmp_path: Path) -> None:
    """The tool's scores of one checkpoint, on both devices; the largest error against the largest score."""
    scores = {}
    for name, visible in (("cpu", False), ("gpu", True)):
        run = tmp_path / name
        run.mkdir()
        (run / "checkpoints").symlink_to(cpu / "checkpoints")
        (run / "config.yaml").write_bytes((cpu / "config.yaml").read_bytes())
        options = f"influence={{examples: 32, steps: [20], micro_batch: 4, directions: {{p: '{data}/p'}}}}"
        command = words(data, run, options, tool="compute_influence")
        launch.finish(command, tmp_path / "log", **gpu.environment(visible))
        scores[name] = np.load(run / "influence/step_00000020/a/scores.npy")
    assert scores["cpu"].size >= 32
    assert np.abs(scores["gpu"] - scores["cpu"]).max() < 1e-4 * np.abs(scores["cpu"]).max()


EXACT = """
import sys
import numpy as np
import torch
from megatron_r1 import backend
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.data.loader import whole_batch
from megatron_r1.influence.engine import run_passes, weigh
from megatron_r1.influence.gradients import Scorer, score
from megatron_r1.influence.methods import WgradDot
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups

vocabulary, seq, size = int(sys.argv[1]), 256, 4
model = ModelConfig(2, 64, 128, 4, 2, vocabulary, head_dim=16)
with process_groups(ParallelConfig()):
    backend.seed_model_parallel(1)
    gpt = build_model(model, ParallelConfig(), "fp32", seq, plain_layers=True)
    window = np.random.default_rng(0).integers(0, vocabulary, (size, seq + 1))

    def batch(rows):
        n = len(rows)
        return weigh(whole_batch(window[rows], np.full(n, seq), np.zeros(n), None), np.full(n, 1 / seq))

    v = {name: torch.randn(3, *p.shape, device=p.device) for name, p in gpt.named_parameters()}
    with Scorer(gpt, WgradDot(v, 3, squares=True)) as scorer:
        row_BX, _ = score(gpt, scorer, iter([batch([0, 1, 2, 3])]), 1, size, seq)
    for row in range(size):
        run_passes(gpt, iter([batch([row])]), 1, 1, seq)
        g = {name: p.grad.double() for name, p in gpt.named_parameters()}
        norm = sum(t.square().sum() for t in g.values())
        dot_C = sum((v[name].double() * t).flatten(1).sum(1) for name, t in g.items())
        size_C = sum(t.double().square().flatten(1).sum(1) for t in v.values()).sqrt() * norm.sqrt()
        error_C = (row_BX[row, :3].to(dot_C) - dot_C).abs() / size_C
        print(float(error_C.max()), abs(float(row_BX[row, 3] / norm) - 1))
        for p in gpt.parameters():
            p.grad = None
"""


@pytest.mark.parametrize("vocabulary", [8192, 128256])
def test_scores_and_norms_are_exact(vocabulary: int) -> None:
    """Against float64 sums over each example's gradient by autograd.

    Scores in units of |direction| |gradient|: a score near 0 keeps the error of its gradient, fp32's.
    """
    rows = [tuple(map(float, line.split())) for line in gpu.python(EXACT, vocabulary).splitlines()[-4:]]
    assert max(score for score, _ in rows) < 1e-7 and max(square for _, square in rows) < 2e-6, rows


DIGITS = """
from megatron_r1 import backend
from megatron_r1.influence.methods import dot_with_directions
from tests.influence.test_exactness import KINDS, SHAPES, error, exact, layer

for shape in SHAPES:
    for kind in KINDS:
        a, g, v = layer(shape, kind)
        true_BC, true_B = exact(a, g, v)
        out = dot_with_directions(*(x.to(backend.device()) for x in (a, g, v)), squares=True).cpu()
        worst = max(error(out[:, :2], true_BC), float(((out[:, 2].sqrt() - true_B).abs() / true_B).max()))
        print(worst / (1e-6 if "vocabulary" in shape else 4e-7), kind, shape)
"""


def test_products_have_the_digits_of_float32() -> None:
    """Errors as shares of what they may be, of all shapes and kinds of numbers that the CPU's test has."""
    lines = gpu.python(DIGITS).splitlines()
    assert len(lines) == 15 and all(float(line.split()[0]) < 1 for line in lines), lines


DOCUMENTS = """
import torch
from megatron_r1 import backend
from tests.model.test_attention import attention

s, b, heads, groups, d = 300, 3, 6, 2, 64
assert backend.document_attention() is not None
torch.manual_seed(0)
x = [torch.randn(s, b, n, d, device="cuda").bfloat16() for n in (heads, groups, groups)]
grad = torch.randn(s, b, heads * d, device="cuda").bfloat16()
number = torch.zeros(b, s, dtype=torch.int32)
number[0, 100:], number[1, 1:], number[1, 299:] = 1, 1, 2


def run(documents, dtype):
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in x]
    out = attention()(*leaves, documents.cuda())
    out.backward(grad.to(dtype))
    return [t.double() for t in (out.detach(), *(leaf.grad for leaf in leaves))]


exact = run(number, torch.float64)
masked = run(number, torch.bfloat16)
got = run(backend.document_starts(number), torch.bfloat16)
for one, other, true in zip(got, masked, exact, strict=True):
    print(float((one - true).norm() / true.norm()), float((other - true).norm() / true.norm()))
"""


def test_documents_end_to_end_are_those_behind_a_mask() -> None:
    """Output and gradients of torch's kernel, within twice the error of the masked form against float64."""
    rows = [tuple(map(float, line.split())) for line in gpu.python(DOCUMENTS).splitlines()[-4:]]
    assert len(rows) == 4 and all(got < 2 * masked < 0.02 for got, masked in rows), rows
