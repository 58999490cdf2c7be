"""What a checkpoint costs a step of training: the 140M shape on ranks that share this machine.

torchrun --nproc-per-node 2 benchmarks/bench_checkpoint.py [--precision fp32] [--saves 4] [--batch 1]

Prints for each save the time that `Saver.save` holds training up, how much longer the next steps take than
the median of steps without a save under way, and the sum of both in steps; and the processor seconds of this
rank's writing, which is what the steps lose at most where they compute on the same cores. Then the same state
through megatron-core's own save (which gathers the optimizer's state first), and what verifying costs a load.
"""

from __future__ import annotations

import argparse
import queue
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint import save
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import Saver
from megatron_r1.checkpoint.shards import METADATA
from megatron_r1.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_r1.parallel import DelayedAllReduce, broadcast_object, process_groups
from megatron_r1.records import Batch, TrainState
from megatron_r1.system.yaml_io import read_yaml
from megatron_r1.train.step import Shape, Training, build_training, train_step

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

ROOT = Path(__file__).resolve().parent.parent
SEQ = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples/models/140m.yaml")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go")
    options = parser.parse_args()
    model = ModelConfig(**read_yaml(options.model).tree["model"])
    config = Config(
        model=model,
        data=DataConfig(sources={}, seq_length=SEQ),
        train=TrainConfig(run="none", global_batch=2, micro_batch=1, precision=options.precision),
        phases={},
    )
    with process_groups(ParallelConfig()) as context:
        folder = Path(str(broadcast_object(tempfile.mkdtemp(dir=options.folder))))
        try:
            training = build_training(config)
            for group in training.optimizer.param_groups:
                group["lr"] = 1e-4
            measure(training, model, folder, options, context.rank == 0)
        finally:
            dist.barrier()
            if context.rank == 0:
                shutil.rmtree(folder)


def measure(training: Training, model: ModelConfig, folder: Path, options: Any, leads: bool) -> None:
    def say(text: str) -> None:
        if leads:
            print(text, flush=True)

    def step() -> float:
        return timed(lambda: train(training, model, options.batch))

    step()
    alone = [step() for _ in range(5)]
    usual = statistics.median(alone)
    say(f"{dist.get_world_size()} ranks, {options.precision}, {options.batch} x {SEQ} tokens a rank")
    say(f"step: {usual:.2f} s (of {len(alone)}: {min(alone):.2f} to {max(alone):.2f})")
    saver, agreement, stalls = Saver(folder), DelayedAllReduce(1), []
    write, spent = save._write, [0.0]

    def counted(flight: Any) -> None:
        start = time.thread_time()
        write(flight)
        spent[0] = time.thread_time() - start

    save._write = counted
    for number in range(1, options.saves + 1):
        state = TrainState(number)
        held = timed(lambda s=state: saver.save(training.gpt, training.optimizer, s, model, "one", ""))
        slower, steps, began = 0.0, 0, time.perf_counter()
        agreement.submit(int(saver.writing))
        done = False
        while not done:
            slower += step() - usual
            steps += 1
            (writing,) = agreement.result()
            done = not writing
            finish = timed(lambda w=writing: saver.poll(w))
            agreement.submit(int(saver.writing))
        seconds = time.perf_counter() - began
        stalls.append(held + finish + slower)
        say(
            f"save {number}: held up {held:.2f} s, {steps} steps under way {slower:+.2f} s in all, completed "
            f"in {finish:.2f} s: {stalls[-1] / usual:.2f} steps; on the disk after {seconds:.1f} s; the "
            f"writing took {spent[0]:.2f} processor seconds"
        )
    say(f"after the first: median {statistics.median(stalls[1:]) / usual:.2f} steps")
    last = checkpoint_files.complete_checkpoints(folder)[-1].path
    size = sum(p.stat().st_size for p in last.iterdir()) / 1e9
    files = checkpoint_files.read_meta(last)["files"]
    verify = timed(lambda: checkpoint_files.corruptions(last, files, dist.get_rank(), dist.get_world_size()))
    load = timed(lambda: load_checkpoint(last, training.gpt, training.optimizer, model))
    say(f"load of {size:.2f} GB: {load:.2f} s, of which verified in {verify:.2f} s")
    say(f"megatron-core, up to what it writes in the background: {gathering(training, folder):.2f} s")


def gathering(training: Training, folder: Path) -> float:
    """Seconds of megatron-core's own way to the same file, its second time."""
    for number in range(2):
        directory = folder / f"core{number}"
        directory.mkdir(exist_ok=True)

        def save(to: Path = directory) -> None:
            filesystem_async._results_queue = queue.Queue()
            model = training.gpt.sharded_state_dict()
            state = {
                "model": model,
                "optimizer": training.optimizer.sharded_state_dict(model, metadata=METADATA),
            }
            dist_checkpointing.save(state, str(to), content_metadata=dict(METADATA), **save._ASYNC)

        seconds = timed(save)
    return seconds


def timed(action: Callable[[], Any]) -> float:
    """Seconds until the last rank is through."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def train(training: Training, model: ModelConfig, rows: int) -> None:
    window = torch.randint(0, model.vocab_size, (rows, SEQ + 1))
    batch = Batch(
        tokens_BS=window[:, :-1].contiguous(),
        labels_BS=window[:, 1:].contiguous(),
        loss_mask_BS=torch.ones(rows, SEQ),
        position_BS=torch.arange(SEQ).expand(rows, SEQ).contiguous(),
        source_B=torch.zeros(rows, dtype=torch.int64),
    )
    train_step(training, iter([batch]), 1, Shape(rows, SEQ, 1))


if __name__ == "__main__":
    main()
