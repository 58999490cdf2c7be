"""Cost of a step of distillation on a CPU, against what its parts cost.

python benchmarks/bench_distill.py [--size tiny 140m] [--precision bf16] [--teacher DIR] [--steps 7]
                                   [--arms eager online cached] [--profile]

Each arm is a whole training step of this project, but for `forward`:

    ce        cross-entropy of the next token
    forward   the teacher's forward pass by transformers, whole logits
    eager     KL of whole logits in float32 by torch's operators, teacher by transformers
    online    `objective: {name: kd, teacher: DIR}`
    cached    `objective: {name: kd, cache: DIR}` with records of 50 draws, read from a file each step

The teacher has SmolLM2-135M's shape and random weights, or is the folder of --teacher. The distributions of
random weights are nearly uniform, so that a record has 50 distinct tokens: the most there can be. All arms
share one process of one thread, bound to one processor, and take turns. A ratio is the median over turns, in
seconds and, because others may use the machine, in processor seconds. The floor of `online` is `ce` +
`forward` + one exponential for each of the teacher's logits, that of `cached` is `ce`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOKENS = 49152
STUDENTS = {
    "tiny": dict(
        num_layers=4, hidden_size=192, ffn_hidden_size=640, num_attention_heads=3, num_query_groups=1
    ),
    "140m": dict(
        num_layers=15, hidden_size=576, ffn_hidden_size=2048, num_attention_heads=9, num_query_groups=3
    ),
}
TARGETS = {"tiny": 1.15, "140m": 1.10}
"""Of a step over cross-entropy's and the teacher's forward pass."""
CACHED = 1.10
"""Of a step from the cache over cross-entropy's."""
DRAWS = 50

Step = Callable[[], Any]
_STAY = contextlib.ExitStack()
"""Process groups, for as long as the process lives."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", default="4x512", metavar="ROWSxSEQUENCE")
    parser.add_argument("--teacher", help="a folder as save_pretrained writes it, of 49152 tokens")
    parser.add_argument("--arms", nargs="+", default=["eager", "online", "cached"])
    parser.add_argument("--steps", type=int, default=7, help="timed turns")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, by operator")
    options = parser.parse_args()
    for size in options.size:
        # A process each: what one size leaves in memory is not the other's.
        if len(options.size) > 1:
            words = [word for word in sys.argv[1:] if word not in STUDENTS and word != "--size"]
            os.spawnv(os.P_WAIT, sys.executable, [sys.executable, __file__, "--size", size, *words])
        else:
            use_one_thread()
            report(size, options)


def use_one_thread() -> None:
    """Start this process again with the launcher's settings of the allocator, on one processor."""
    from megatron_r1.system.process import allocator_environment

    settings = {"OMP_NUM_THREADS": "1", **allocator_environment()}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    # The last one: others start at the first.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def report(size: str, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        teacher = options.teacher or make_teacher(Path(folder))
        steps = make_steps(size, teacher, options)
    names = [name for name in steps if name in ("ce", "forward", "exp", *options.arms)]
    for name in names:
        steps[name]()
    turns: list[dict[str, tuple[float, float]]] = []
    for _ in range(options.steps):
        turns.append({})
        for name in names:
            wall, processor = time.perf_counter(), time.process_time()
            steps[name]()
            turns[-1][name] = time.perf_counter() - wall, time.process_time() - processor
    print(f"\n{size}, {options.precision}, micro-batch {options.batch}, {len(turns)} turns", flush=True)
    for name in names:
        seconds, processor = (statistics.median(turn[name][k] for turn in turns) for k in (0, 1))
        line = f"  {name:8}{seconds * 1e3:7.0f} ms, {processor * 1e3:7.0f} ms of a processor"
        if name in options.arms:
            parts = ("ce",) if name == "cached" else ("ce", "forward")
            ratios = [
                statistics.median(turn[name][k] / sum(turn[p][k] for p in parts) for turn in turns)
                for k in (0, 1)
            ]
            line += f" | {ratios[0]:.3f} of {' + '.join(parts)}, by processor time {ratios[1]:.3f}"
        if name == "online":
            floor = statistics.median(
                1 + turn["exp"][1] / (turn["ce"][1] + turn["forward"][1]) for turn in turns
            )
            line += f" | floor {floor:.3f}" + verdict(ratios[1], TARGETS[size])
        if name == "cached":
            line += verdict(ratios[1], CACHED)
        print(line, flush=True)
    for name in names if options.profile else ():
        print(f"\n{name}\n{profile(steps[name])}")
    _STAY.close()


def verdict(ratio: float, target: float) -> str:
    return f" | target {target:.2f} {'met' if ratio <= target else 'NOT met'}"


def make_teacher(folder: Path) -> str:
    """SmolLM2-135M's shape with random weights, and a tokenizer of as many tokens."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(TOKENS)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return str(folder)


def make_steps(size: str, model: str, options: argparse.Namespace) -> dict[str, Step]:
    import numpy as np
    import torch
    from torch import Tensor
    from torch.nn import functional

    from megatron_r1.backend import cpu_divergence
    from megatron_r1.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
    from megatron_r1.distill.cache import BLOCK, Cache, write_part
    from megatron_r1.distill.draws import Header, draw, pack
    from megatron_r1.distill.teacher import Teacher
    from megatron_r1.model.divergence import SparseTarget
    from megatron_r1.parallel import on_device, process_groups
    from megatron_r1.records import Batch, TeacherRecords
    from megatron_r1.train.objective import Distillation, next_token
    from megatron_r1.train.optimizer import set_schedule
    from megatron_r1.train.step import Shape, build_training, train_step

    torch.set_num_threads(1)
    rows, seq = map(int, options.batch.split("x"))
    config = Config(
        model=ModelConfig(**STUDENTS[size], vocab_size=TOKENS, head_dim=64),
        data=DataConfig(sources={}, seq_length=seq),
        train=TrainConfig(run="", global_batch=rows, micro_batch=rows, precision=options.precision),
        phases={},
    )
    _STAY.enter_context(process_groups(config.parallel))
    training = build_training(config)
    window = torch.randint(TOKENS, (rows, seq + 1), generator=torch.Generator().manual_seed(1))
    plain = Batch(
        tokens_BS=window[:, :-1].contiguous(),
        labels_BS=window[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(rows, seq),
        position_BS=torch.arange(seq).repeat(rows, 1),
        source_B=torch.zeros(rows, dtype=torch.long),
    )
    teacher = Teacher(model, options.precision, "none")
    tokens_BS = plain.tokens_BS

    def forward() -> Tensor:
        with torch.no_grad():
            logits: Tensor = teacher.network(input_ids=tokens_BS, use_cache=False).logits
            return logits

    def eager(gpt: Any, batch: Batch) -> Tensor:
        own = gpt(batch.tokens_BS, batch.position_BS, batch.documents)
        logits = [forward().float(), own.float()]
        its, own = (functional.log_softmax(z, -1) for z in logits)
        return functional.kl_div(own, its, reduction="none", log_target=True).sum(-1)

    hash_BH = np.random.default_rng(1).integers(0, 256, (rows, 16), np.uint8)
    header = Header("-", "-", TOKENS, 1.0, DRAWS, None, 1, None, seq)

    def write() -> Cache:
        """Each row as a document."""
        folder = Path(_STAY.enter_context(tempfile.TemporaryDirectory()))
        header.write(folder)
        blocks = [
            (name, at, seq, pack(header, draw(logits_SV[at : at + BLOCK], header, name, at)))
            for name, logits_SV in zip(map(bytes, hash_BH), forward(), strict=True)
            for at in range(0, seq, BLOCK)
        ]
        write_part(folder, header, blocks)
        return Cache(folder)

    cache = write()

    def read() -> Batch:
        tokens_B = np.full(rows, seq)
        ids, share, entropy, known = map(
            torch.from_numpy, cache.gather(hash_BH, 0 * tokens_B, tokens_B, tokens_B)
        )
        assert known.all()
        records = TeacherRecords(ids.view(rows, seq, -1), share.view(rows, seq, -1), entropy.view(rows, seq))
        return dataclasses.replace(plain, teacher=records)

    def from_cache(batch: Batch) -> SparseTarget:
        assert batch.teacher is not None
        fields = batch.teacher.ids_BSK, batch.teacher.share_BSK, batch.teacher.entropy_BS
        return SparseTarget(*(x.transpose(0, 1).flatten(0, 1) for x in fields), tail=False)

    def step(objective: Any, batch: Callable[[], Batch] = lambda: plain) -> Step:
        def train() -> None:
            training.objective = objective
            set_schedule(training.optimizer, 1e-4, 0.1)
            # Of whole logits autograd forms the head's gradient; the look-up's must then come the same way.
            whole = mock.patch("megatron_r1.model.vocabulary.main_gradient", lambda weight: None)
            with whole if objective is eager else contextlib.nullcontext():
                train_step(training, iter([on_device(batch())]), 1, Shape(rows, seq, 1))()

        return train

    kd = ObjectiveConfig("kd")
    online = Distillation(training.last, teacher.targets(None, TOKENS), TOKENS, kd)
    cached = Distillation(training.last, from_cache, TOKENS, kd)
    logits_NV = forward().flatten(0, 1)
    return {
        "ce": step(next_token),
        "forward": forward,
        "exp": lambda: cpu_divergence.statistics(logits_NV, None, 1.0),
        "eager": step(eager),
        "online": step(online),
        "cached": step(cached, read),
    }


def profile(step: Step) -> str:
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
