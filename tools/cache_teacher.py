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
from dataclasses import asdict
from pathlib import Path

from megatron_r1 import config_io
from megatron_r1.data.open import launched, open_data
from megatron_r1.distill.cache import Cache, Header
from megatron_r1.distill.describe import Described
from megatron_r1.distill.documents import Documents, choose, objective_of
from megatron_r1.distill.open import vocabulary_mistakes
from megatron_r1.distill.write import covered, expected, finish, header_of, require_space, write
from megatron_r1.preprocess.shards import parse_shard
from megatron_r1.system.files import write_json
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
    kind("--draws", type=number(int, 1, 256), default=50, help="tokens drawn for a record (default: 50)")
    kind(
        "--top-k",
        type=number(int, 1, 256),
        metavar="K",
        help="the K likeliest tokens in place of draws: biased, see docs",
    )
    add("--seed", type=number(int, 0, 2**63 - 1), default=1234, help="of the draws (default: 1234)")
    add("--context", type=count, metavar="TOKENS", help="a longer document is cut into pieces (default: the "
        "teacher's, at most 8192)")  # fmt: skip
    add("--shard", metavar="I/N", help="write the documents of one of N shards, from 0; env: as SLURM says")
    work = parser.add_mutually_exclusive_group().add_argument
    work("--merge", action="store_true", help="write one index over the parts of all shards, and exit")
    work("--check", action="store_true", help="print what would be written, and exit")
    work("--estimate", action="store_true", help="print disk and hours of each source, and exit")
    work("--judge", action="store_true", help="compare teacher and student on a sample, and exit")
    add("--sample", type=count, default=16384, metavar="TOKENS", help="of each source, for --judge and "
        "--estimate (default: %(default)s)")  # fmt: skip
    add("--tflops", type=positive, help="FLOP/s of a device, in 10^12, for hours; without it they are timed "
        "on this one")  # fmt: skip
    options = parser.parse_intermixed_args()
    with user_errors():
        run(options)


H100 = 0.4 * 989e12
"""FLOP/s, where neither --tflops nor the teacher is there: an H100 at 40 %."""


def run(options: argparse.Namespace) -> None:
    config, data = config_io.load_with(options.config, lambda config: open_data(config, launched(), "mix"))
    asked, model, folder = objective_of(config, options.phase)
    rank, ranks = launch_number("RANK", 0), launch_number("WORLD_SIZE", 1)
    # Under torchrun, RANK is a rank's place within its shard.
    others = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    shard = parse_shard(options.shard, others, folder / "shard") if options.shard else None
    alone = options.merge or options.estimate or options.judge
    if alone and (ranks > 1 or shard):
        raise ValueError(
            "--merge, --estimate and --judge are for one process and all shards; start it by itself"
        )
    documents = choose(config, data, options.phase, options.sources, options.planned)
    documents = documents.of_writer(*shard or (0, 1))
    if options.merge:
        finish(documents, model, folder, 0, 1, None)
        return
    draws = None if options.top_k else options.draws
    each, here = expected(draws, options.top_k), Path(model).exists()
    teacher = Described(model, asked.bos) if here or not (options.check or options.estimate) else None
    if teacher and (mistakes := vocabulary_mistakes(config, data, options.phase, teacher)):
        raise config_io.ConfigError(mistakes)
    header, missing = None, documents
    if teacher and rank == 0 and not options.judge:
        header = header_of(teacher, asked, draws, options.top_k, options.seed, options.context)
        if (folder / "header.json").exists():
            header.write(folder)
            missing = documents.only(~covered(Cache(folder), documents))
    if options.check:
        for name, tokens in documents.by_source().items():
            there = tokens - missing.by_source().get(name, 0)
            say(f"{name}: {tokens:,} tokens, {there:,} of them there", result=True)
        what = f"{missing.total:,} tokens of {len(missing):,} documents, {missing.total * each / 1e9:.3g} GB"
        by = "" if teacher else f", once {model} is here"
        say(f"{folder}: would write {what} at {each:.0f} bytes a token{by}", result=True)
        return
    with loading_torch(str(folder)):
        from megatron_r1.distill.judge import estimate, judge, text
        from megatron_r1.distill.teacher import Teacher
        from megatron_r1.parallel import meeting
    flops = options.tflops and options.tflops * 1e12
    if options.judge:
        result = judge(config, options.phase, documents, options.sample, options.seed, flops)
        write_json(folder / "judge.json", result)
        say(text(result), result=True)
        return
    if options.estimate:
        measured = {}
        if teacher and header:
            loaded = Teacher(model, config.train.precision, asked.bos)
            measured = estimate(documents, loaded, header, options.sample, options.seed)
        elif asked.parameters is None:
            raise ValueError(f"{model} is not here; say phases.{options.phase}.objective.parameters=N")
        flop = teacher.flops_per_token(config.data.seq_length) if teacher else 2.0 * (asked.parameters or 0)
        computed = flop / (flops or H100) if flops or not teacher else None
        size, hours = 0.0, 0.0
        for name, tokens in missing.by_source().items():
            bytes_each, seconds = measured.get(name, (each, 0.0))
            seconds = seconds if computed is None else computed
            size, hours = size + tokens * bytes_each, hours + tokens * seconds / 3600
            gb, needs = tokens * bytes_each / 1e9, tokens * seconds / 3600
            say(
                f"{name}: {tokens:,} tokens, {bytes_each:.1f} bytes each, {gb:.3g} GB, {needs:.3g} hours",
                result=True,
            )
        how = (
            "timed on this one" if computed is None else f"at {computed and flop / computed / 1e12:g} TFLOP/s"
        )
        here = "measured" if measured else f"not measured, because {model} is not here"
        say(f"{folder}: {size / 1e9:.3g} GB ({here}), {hours:.3g} hours of a device, {how}", result=True)
        return
    with meeting(folder / "writers" / "-".join(map(str, shard or (0, 1))), rank, ranks) as meet:
        if header:
            require_space(folder, missing.total, each)
            header.write(folder)
        header = Header(**meet(header and asdict(header)))
        writer, writers = shard or (0, 1)
        # Modulo `writers` it is the shard's number.
        mine = documents.of_writer(rank * writers + writer, ranks * writers)
        write(mine, Teacher(model, config.train.precision, asked.bos), header, folder, ranks, rank == 0)
        meet(None)
        if rank == 0:
            finish(documents, model, folder, missing.total, ranks, shard)
