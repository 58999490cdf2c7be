"""Training steps of the 140M shape against Hugging Face transformers' Llama of the same shape, on a CPU.

python benchmarks/bench_train_step.py [--precision bf16 fp32] [--size 1x512 4x512 1x2048] [--profile]

Arms, each a process of its own:

    fast      this project, `train.head_chunk` off
    chunked   this project, the vocabulary projection and the loss in chunks of tokens
    tuned     transformers, SDPA attention, torch's fused AdamW, the allocator settings of our launcher
    default   transformers as it comes: no allocator settings, torch's default AdamW

Both sides start from random weights, clip the gradient at 1, and train on the same random tokens. Ours
has QK norm, which transformers' Llama has not. bf16 means bf16 parameters and fp32 main parameters with
us, fp32 parameters under autocast with them: each the usual form there, and both with fp32 gradients'
sums and Adam state.

Two arms run at a time, step by step in turns: a ratio is the median over neighbouring steps, in seconds
and, because others may use the machine, in processor seconds. Peak memory is the kernel's count (VmHWM).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/models/140m.yaml"
_STAY = contextlib.ExitStack()
"""Process groups, for as long as the arm lives."""
OURS = ("fast", "chunked")
CHUNK = 512
"""Tokens a chunk of the chunked arm."""
PAIRS = (("fast", "tuned"), ("chunked", "tuned"), ("fast", "default"))
SPEED, SPEED_DEFAULT, MEMORY, MEMORY_FROM = 1.1, 1.5, 0.7, 2048
"""Targets: tokens/s over tuned and over default, peak memory from so many tokens a step."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--size", nargs="+", default=["1x512", "4x512"], metavar="BATCHxSEQUENCE")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each arm in each pair")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="FILE.yaml")
    parser.add_argument(
        "--pairs", nargs="+", type=int, default=[0, 1, 2], help="of fast/tuned, chunked/tuned, fast/default"
    )
    parser.add_argument("--profile", action="store_true", help="where the time of one step goes, by operator")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        serve(options)
        return
    for precision in options.precision:
        for size in options.size:
            report(precision, size, options)


class Arm:
    """A process that trains one step whenever it is told to."""

    def __init__(self, arm: str, precision: str, size: str, options: argparse.Namespace):
        environment = {name: v for name, v in os.environ.items() if name != "GLIBC_TUNABLES"}
        environment["OMP_NUM_THREADS"] = str(options.threads)
        environment["PYTHONPATH"] = str(ROOT)
        if arm != "default":
            from megatron_r1.system.process import allocator_environment

            environment |= allocator_environment()
        words = [sys.executable, __file__, "--arm", arm, "--precision", precision, "--size", size]
        words += ["--threads", str(options.threads), "--model", str(options.model)]
        words += ["--profile"] if options.profile else []
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout

    def ready(self) -> None:
        self._answer()

    def ask(self, word: str) -> dict[str, Any]:
        self.input.write(word + "\n")
        self.input.flush()
        return self._answer()

    def end(self) -> None:
        self.input.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self.output.readline()
        if not line:
            raise RuntimeError(f"an arm ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def report(precision: str, size: str, options: argparse.Namespace) -> None:
    batch, seq = map(int, size.split("x"))
    tokens = batch * seq
    print(f"\n{precision}, batch {batch}, sequence {seq}, {options.threads} threads", flush=True)
    peak: dict[str, float] = {}
    for pair in (PAIRS[number] for number in options.pairs):
        arms = [Arm(name, precision, size, options) for name in pair]
        for arm in arms:
            arm.ready()
        # Two steps until each process has all the memory it will use.
        for arm in (*arms, *arms):
            arm.ask("step")
        steps = [[arm.ask("step") for arm in arms] for _ in range(options.steps)]
        last = [arm.ask("profile" if options.profile else "memory") for arm in arms]
        for arm in arms:
            arm.end()
        for name, answer in zip(pair, last, strict=True):
            peak[name] = answer["gib"]
            if options.profile:
                print(f"\n{name}\n{answer['profile']}\n")
        seconds = [statistics.median(step[i]["seconds"] for step in steps) for i in (0, 1)]
        ratio, processor = (
            statistics.median(theirs[key] / ours[key] for ours, theirs in steps)
            for key in ("seconds", "processor")
        )
        target = SPEED_DEFAULT if pair[1] == "default" else SPEED
        memory = peak[pair[0]] / peak[pair[1]]
        line = (
            f"  {pair[0]:8}{tokens / seconds[0]:7.0f} tokens/s {peak[pair[0]]:6.2f} GiB | "
            f"{pair[1]:8}{tokens / seconds[1]:7.0f} tokens/s {peak[pair[1]]:6.2f} GiB | "
            f"speed {ratio:.2f}x (by processor time {processor:.2f}x)"
        )
        if pair[0] == "fast":
            line += f" target {target}x {'met' if ratio >= target else 'NOT met'}"
        line += f" | memory {memory:.2f}x"
        if pair == ("chunked", "tuned") and tokens >= MEMORY_FROM:
            line += f" target {MEMORY}x {'met' if memory <= MEMORY else 'NOT met'}"
        print(line, flush=True)


def serve(options: argparse.Namespace) -> None:
    """Be an arm: a line in, a step done, a line out."""
    import torch

    torch.set_num_threads(options.threads)
    precision = options.precision[0]
    batch, seq = map(int, options.size[0].split("x"))
    build = ours if options.arm in OURS else transformers_llama
    # Whatever else is printed is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = build(options, precision, batch, seq)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    say()
    for line in sys.stdin:
        word = line.strip()
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if word == "step":
            wall, processor = time.perf_counter(), time.process_time()
            step()
            say(seconds=time.perf_counter() - wall, processor=time.process_time() - processor)
        elif word == "memory":
            say(gib=gib)
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step()
            table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
            say(gib=gib, profile=table)
    _STAY.close()


def ours(options: argparse.Namespace, precision: str, batch: int, seq: int) -> Callable[[], None]:
    import torch

    from megatron_r1.config import Config, DataConfig, TrainConfig
    from megatron_r1.parallel import process_groups
    from megatron_r1.records import Batch
    from megatron_r1.train.optimizer import set_schedule
    from megatron_r1.train.step import Shape, build_training, train_step

    config = Config(
        model=model_config(options),
        data=DataConfig(sources={}, seq_length=seq),
        train=TrainConfig(
            run="",
            global_batch=batch,
            micro_batch=batch,
            precision=precision,  # type: ignore[arg-type]
            head_chunk=CHUNK if options.arm == "chunked" else None,
        ),
        phases={},
    )
    _STAY.enter_context(process_groups(config.parallel))
    training = build_training(config)
    window = tokens(config.model.vocab_size, batch, seq + 1)
    made = Batch(
        tokens_BS=window[:, :-1].contiguous(),
        labels_BS=window[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(batch, seq),
        position_BS=torch.arange(seq).repeat(batch, 1),
        source_B=torch.zeros(batch, dtype=torch.long),
    )

    def step() -> None:
        set_schedule(training.optimizer, 1e-3, 0.1)
        train_step(training, iter([made]), 1, Shape(batch, seq, 1))

    return step


def transformers_llama(
    options: argparse.Namespace, precision: str, batch: int, seq: int
) -> Callable[[], None]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model_config(options)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_dim,
        max_position_embeddings=seq,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    fused = {"fused": True} if options.arm == "tuned" else {}
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **fused)
    window = tokens(shape.vocab_size, batch, seq)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def model_config(options: argparse.Namespace) -> Any:
    from megatron_r1.config import ModelConfig
    from megatron_r1.system.yaml_io import read_yaml

    return ModelConfig(**read_yaml(options.model).tree["model"])


def tokens(vocabulary: int, rows: int, columns: int) -> Any:
    import torch

    return torch.randint(vocabulary, (rows, columns), generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    main()
