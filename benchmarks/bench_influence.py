"""What scoring costs, as a multiple of forward and backward of the same batch on the same model.

python benchmarks/bench_influence.py [--repeats 15] [--capabilities 3] [--processor-time] [--memory]

The peer is an ordinary forward and backward pass of this megatron-core model, measured in turns with
scoring in this process; medians. Beside the default method: norms too, token scores, directions of low rank;
and the floor that any method needs (forward and the backward pass to every layer's output, no parameter
gradients). `--memory` compares the peak memory of scoring with that of a whole training step (gradients and
Adam), each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_r1 import backend
from megatron_r1.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_r1.data.loader import whole_batch
from megatron_r1.influence.engine import run_passes, weigh
from megatron_r1.influence.gradients import Scorer, score
from megatron_r1.influence.methods import Ghost, LowRank, Method, WgradDot
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from megatron_r1.records import Batch
from megatron_r1.system.yaml_io import read_yaml
from megatron_r1.train.optimizer import set_schedule
from megatron_r1.train.step import Shape, build_training, train_step

MODEL = Path(__file__).resolve().parent.parent / "examples/models/tiny.yaml"


class Floor(Scorer):
    """The same passes, nothing computed from them."""

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    _linear = _norm = _add_products = _nothing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE.yaml")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--capabilities", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="where others use the machine, too")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak-of", choices=("scoring", "training"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory and not options.peak_of:
        compare_memory()
        return
    model = ModelConfig(**read_yaml(options.model).tree["model"])
    with process_groups(ParallelConfig()):
        torch.set_num_threads(options.threads)
        if options.peak_of:
            print((train_steps if options.peak_of == "training" else score_once)(model, options))
            return
        report(measure(model, options), options, model)


def compare_memory() -> None:
    """The peak of each kind of work, in a process of its own, and their ratio."""
    peak = {}
    for kind in ("training", "scoring"):
        words = [sys.executable, *sys.argv, "--peak-of", kind]
        out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak[kind] = int(out.splitlines()[-1])
        print(f"{kind:10s} {peak[kind] / 2**30:.2f} GiB", flush=True)
    print(f"scoring / training {peak['scoring'] / peak['training']:.2f}x")


def score_once(model: ModelConfig, options: Any) -> int:
    """Peak bytes of three passes of the default method."""
    gpt, batch, directions = setting(model, options)
    for _ in range(3):
        with Scorer(gpt, WgradDot(directions, options.capabilities)) as scorer:
            score(gpt, scorer, iter([batch]), 1, options.micro_batch, options.seq_length)
    return backend.peak_memory()


def train_steps(model: ModelConfig, options: Any) -> int:
    """Peak bytes of three steps of the trainer on batches of the same size."""
    size, seq = options.micro_batch, options.seq_length
    train = TrainConfig(run="", global_batch=size, micro_batch=size, precision=options.precision)
    config = Config(model=model, data=DataConfig(sources={}, seq_length=seq), train=train, phases={})
    training = build_training(config)
    rows = example_rows(model, options)
    for _ in range(3):
        set_schedule(training.optimizer, 1e-3, 0.1)
        train_step(training, iter([rows]), 1, Shape(size, seq, 1))
    return backend.peak_memory()


def example_rows(model: ModelConfig, options: Any) -> Batch:
    size, seq = options.micro_batch, options.seq_length
    window = np.random.default_rng(0).integers(0, model.vocab_size, (size, seq + 1))
    return whole_batch(window, np.full(size, seq), np.zeros(size), None)


def setting(model: ModelConfig, options: Any) -> tuple[Any, Batch, dict[str, torch.Tensor]]:
    """The model, a batch and random directions."""
    backend.seed_model_parallel(1)
    gpt: Any = build_model(model, ParallelConfig(), options.precision, options.seq_length, plain_layers=True)
    if options.precision == "bf16":
        gpt = gpt.bfloat16()
    weight_B = np.full(options.micro_batch, 1 / options.seq_length)
    directions = {
        name: torch.randn(options.capabilities, *p.shape, device=p.device)
        for name, p in gpt.named_parameters()
    }
    return gpt, weigh(example_rows(model, options), weight_B), directions


def measure(model: ModelConfig, options: Any) -> dict[str, list[float]]:
    """Seconds of each repeat, by what was done."""
    gpt, batch, directions = setting(model, options)
    size, seq = options.micro_batch, options.seq_length

    def train_pass() -> None:
        run_passes(gpt, iter([batch]), 1, size, seq)
        for p in gpt.parameters():
            p.grad = None

    count = options.capabilities
    plain = WgradDot(directions, count)
    methods: dict[str, Method] = {
        "influence scores": plain,
        "and norms": WgradDot(directions, count, squares=True),
        "token scores": Ghost(directions, count, seq, per_token=True),
        "rank 16": LowRank(directions, count, 16),
        "rank 32": LowRank(directions, count, 32),
    }

    def score_pass(method: Method, kind: type[Scorer] = Scorer) -> None:
        with kind(gpt, method) as scorer:
            score(gpt, scorer, iter([batch]), 1, size, seq)

    ways: dict[str, Callable[[], None]] = {
        "forward and backward": train_pass,
        **{name: partial(score_pass, method) for name, method in methods.items()},
        "floor": partial(score_pass, plain, Floor),
    }
    clock = time.process_time if options.processor_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 2):
        for name, way in ways.items():
            _finish()
            start = clock()
            way()
            _finish()
            if repeat >= 2:
                seconds[name].append(clock() - start)
    return seconds


def _finish() -> None:
    """Wait for what was started on a device."""
    if backend.device().type != "cpu":
        torch.accelerator.synchronize()


def report(seconds: dict[str, list[float]], options: Any, model: ModelConfig) -> None:
    tokens = options.micro_batch * options.seq_length
    print(
        f"{model.parameters():,} parameters, {options.micro_batch} x {options.seq_length} tokens, "
        f"{options.capabilities} capabilities, {options.precision} | {backend.describe()}"
    )
    peer = statistics.median(seconds["forward and backward"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        ratios = sorted(v / p for v, p in zip(values, seconds["forward and backward"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"{name:22s} {1e3 * middle:9.1f} ms  {tokens / middle:9,.0f} tokens/s  "
            f"{middle / peer:.2f}x (quartiles {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
