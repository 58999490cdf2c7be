"""Exact influence scores beside bergson's and dattri-llm's: same shape, same data, in turns, on one thread.

    python -m pip install --no-deps bergson==2.5.1 dattri-llm==0.1.0 accelerate docstring-parser jaxtyping \\
        ml_dtypes optree peft petname scipy simple-parsing wadler-lindig
    PYTHONPATH=. python benchmarks/bench_influence_peers.py [--model FILE.yaml] [--repeats 9]

in an environment of their own that sees this project's packages. Each arm, a process of its own, scores the
same windows for 3 fixed queries, each the gradient of one more window:

    ours       wgrad-dot, all parameters
    ours-mkl   the same with torch's own float32 products, as the peers have them (cpu_products.py)
    bergson    its scoring pass in memory, unprojected: linear layers below the head and nothing else
    dattri     its Grad-Dot over all layers; the tied embedding's two uses as if they were two weights

The peers run on transformers' Llama in the fastest way found. bergson: of the parameters only the last norm
requires a gradient; as its loader sets models up, autograd would form the tied head's, too. dattri-llm:
layers frozen, linear ones by its invasive hooks, captured as its cost rule says. Queries are dense and in
memory, as are scores. All arms have our launcher's allocator settings.

Processor time; a ratio is the median over neighbouring measurements, with quartiles. `error` is that of a
small model's scores, of the largest score, against autograd example by example: over what the arm covers,
and over all parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from influence_arms import QUERIES, Arm, bergson, dattri, megatron, ours, windows

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("ours", "ours-mkl", "bergson", "dattri")
TARGETS = {"bergson": 1.0, "dattri": 0.65}
"""At most this share of the peer's processor time."""
SMALL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 2}
SMALL |= {"num_query_groups": 1, "vocab_size": 128, "rotary_base": 10000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples/models/tiny.yaml", metavar="FILE.yaml")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        serve(options)
    elif all(importlib.util.find_spec(peer) for peer in ("bergson", "dattri_llm")):
        # The peers want folders, for which they find no use here.
        with tempfile.TemporaryDirectory() as place:
            measure(options, place)
    else:
        print("skipped: pip install --no-deps bergson==2.5.1 dattri-llm==0.1.0 and what --help names")


def measure(options: argparse.Namespace, place: str) -> None:
    from megatron_r1.system.process import allocator_environment

    environment = os.environ | allocator_environment()
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "TMPDIR": place}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [sys.executable, __file__, *sys.argv[1:], "--arm"]
    arms: dict[str, Any] = {n: subprocess.Popen([*words, n], env=environment, **pipes) for n in ARMS}

    def ask(name: str, word: str) -> Any:
        arms[name].stdin.write(word + "\n")
        arms[name].stdin.flush()
        if not (line := arms[name].stdout.readline()):
            raise RuntimeError(f"the arm {name} ended with status {arms[name].wait()}")
        return json.loads(line)

    print(
        f"{options.model.name}, {options.batches} batches of {options.micro_batch} x {options.seq_length} "
        f"tokens, {QUERIES} queries, fp32, processor time of one thread",
        flush=True,
    )
    wrong = {name: ask(name, "errors") for name in ARMS}
    turns = []
    # The first turn until each process has all the memory it will use.
    for _ in range(options.repeats + 1):
        turns.append({word: {name: ask(name, word) for name in ARMS} for word in ("plain", "score")})
    del turns[0]
    for name in ARMS:
        arms[name].communicate()
        plain, score = (statistics.median(t[word][name] for t in turns) for word in ("plain", "score"))
        own = spread([t["score"][name] / t["plain"][name] for t in turns])
        print(
            f"{name:9}{1e3 * score / options.batches:7.0f} ms a batch, {own} of its own forward and backward "
            f"({1e3 * plain / options.batches:.0f} ms); error {wrong[name][0]:.0e} of what it covers, "
            f"{wrong[name][1]:.0e} of all parameters"
        )
    for peer, target in TARGETS.items():
        for name in ("ours", "ours-mkl"):
            ratios = [t["score"][name] / t["score"][peer] for t in turns]
            met = "met" if statistics.median(ratios) <= target else "NOT met"
            print(f"{name} / {peer}: {spread(ratios)}, target {target} {met}")


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def serve(options: argparse.Namespace) -> None:
    """Be an arm: a line in, something done, a line out."""
    import torch

    from megatron_r1.system.yaml_io import read_yaml

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever else is printed is no answer.
    build = {"bergson": bergson, "dattri": dattri}.get(options.arm, ours)
    onednn = options.arm != "ours-mkl"
    with megatron(onednn) if build is ours else contextlib.nullcontext():
        shape = read_yaml(options.model).tree["model"]
        rows = options.batches * options.micro_batch
        arm = build(shape, options.micro_batch, windows(shape["vocab_size"], rows, options.seq_length))
        for line in sys.stdin:
            if (word := line.strip()) == "errors":
                answer: Any = errors(build)
            else:
                start = time.process_time()
                getattr(arm, word)()
                answer = time.process_time() - start
            print(json.dumps(answer), file=answers, flush=True)


def errors(build: Callable[..., Arm]) -> tuple[float, float]:
    import torch

    window = windows(SMALL["vocab_size"], 4, 32)
    arm = build(SMALL, 2, window)
    gradients, scores = arm.gradients(window), arm.score().double()

    def error(part: str) -> float:
        flat = [torch.cat([g.flatten() for name, g in v.items() if part in name]) for v in gradients]
        matrix = torch.stack(flat).double()
        truth = matrix[QUERIES:] @ matrix[:QUERIES].T
        return float((scores - truth).abs().max() / truth.abs().max())

    covered = error(arm.covered)
    for v in gradients:
        if "lm_head.weight" in v:
            v["model.embed_tokens.weight"] += v.pop("lm_head.weight")
    return covered, error("")


if __name__ == "__main__":
    main()
