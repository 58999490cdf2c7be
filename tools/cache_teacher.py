"""Write a teacher's cache for a phase of distillation, before the phase trains from it.

The configuration is the trainer's. The phase's objective names the teacher, and the folder of the cache.
Records are keyed by document and offset, so a cache serves any mixture, order, batch and layout. Documents
that are in the folder are passed over: the same command goes on after a kill, and a new mixture writes what
the cache lacks. docs/distillation.md has the format and measured sizes.

torchrun --nproc-per-node 8 tools/cache_teacher.py examples/models/950m.yaml examples/midtrain/kd.yaml \\
    --phase midtrain

Is the teacher worth it, and what will the cache take:

python tools/cache_teacher.py examples/models/950m.yaml examples/midtrain/kd.yaml --phase midtrain --judge
python tools/cache_teacher.py examples/models/950m.yaml examples/midtrain/kd.yaml --phase midtrain --estimate

Across nodes, each takes a shard (--shard I/N, or --shard env under SLURM). Afterwards, once, the same command
with --merge in place of --shard.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.open import OpenData, launched, open_data
from megatron_r1.preprocess.shards import parse_shard
from megatron_r1.system.process import launch_number
from megatron_r1.system.terminal import count, loading_torch, number, positive, say, tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("config", nargs="+", metavar="FILE.yaml|key=value", help="merged left to right")
    add("--phase", required=True, help="whose teacher, and whose documents")
    add("--sources", type=lambda text: text.split(","), metavar="A,B", help="of the phase's, these alone")
    add("--planned", action="store_true", help="only documents that the phase's data plan draws")
    kind = parser.add_mutually_exclusive_group().add_argument
    kind("--draws", type=number(int, 1, 127), default=50, help="tokens drawn for a record (default: 50)")
    kind("--top-k", type=count, metavar="K", help="the K likeliest tokens in place of draws: biased, see docs")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1234, help="of the draws (default: 1234)")
    add("--context", type=count, metavar="TOKENS", help="a longer document is cut into pieces (default: the "
        "teacher's, at most 8192)")  # fmt: skip
    add("--shard", metavar="I/N", help="write the documents of one of N shards, from 0; env: as SLURM says")
    add("--merge", action="store_true", help="write one index over the parts of all shards")
    add("--check", action="store_true", help="print what would be written, and exit")
    add("--estimate", action="store_true", help="print disk and hours of each source, and exit")
    add("--judge", action="store_true", help="compare teacher and student on a sample, and exit")
    add("--sample", type=count, default=16384, metavar="TOKENS", help="of each source, for --judge and "
        "--estimate (default: %(default)s)")  # fmt: skip
    add("--tflops", type=positive, help="FLOP/s of a device, in 10^12, for hours; without it they are timed "
        "on this one")  # fmt: skip
    options = parser.parse_intermixed_args()
    with user_errors():
        run(options)


def run(options: argparse.Namespace) -> None:
    config, data = config_io.load_with(options.config, lambda config: open_data(config, launched(), "mix"))
    asked = objective_of(config, options.phase)
    folder, here = Path(asked.cache), Path(asked.teacher).exists()
    shard = parse_shard(options.shard, _slurm(), folder / "shard") if options.shard else (0, 1)
    documents = choose(config, data, options.phase, options.sources, options.planned)
    if options.merge:
        finish(config, documents, folder)
        return
    described = Described(asked.teacher, asked.bos) if here or not (options.check or options.estimate) else None
    if described:
        require_same_vocabulary(...)
    ...
