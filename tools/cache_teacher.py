"""Write a teacher's cache for a phase of distillation, before the phase trains from it.

The configuration is the trainer's. The phase's objective names the teacher, and the folder of the cache.
Records are keyed by document and offset, so a cache serves any mixture, order, batch and layout. Documents
that are in the folder are passed over: the same command goes on after a kill, and a new mixture writes what
the cache lacks. docs/distillation.md has the format and measured sizes.

torchrun --nproc-per-node 8 tools/cache_teacher.py $FILES --phase midtrain1

where FILES is examples/models/950m.yaml examples/midtrain/kd.yaml examples/midtrain/kd_cached.yaml.

Is the teacher worth it, and what will the cache take:

python tools/cache_teacher.py $FILES --phase midtrain1 --judge
python tools/cache_teacher.py $FILES --phase midtrain1 --estimate

Across nodes, each takes a shard (--shard I/N, or --shard env under SLURM). Afterwards, once, the same command
with --merge in place of --shard.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_r1 import config_io
from megatron_r1.data.open import launched, open_data
from megatron_r1.distill.describe import Described
from megatron_r1.distill.documents import choose, objective_of
from megatron_r1.distill.draws import Header
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
    add("--draws", type=number(int, 1, 256), default=50, help="points of a record (default: 50)")
    add("--top-k", type=number(int, 1, 256), metavar="K", help="in place of draws: the K likeliest tokens; "
        "the others are one, which is biased")  # fmt: skip
    add("--seed", type=number(int, 0, 2**63 - 1), default=1234, help="of the draws (default: 1234)")
    add("--context", type=count, metavar="TOKENS", help="a longer document is cut into pieces (default: the "
        "teacher's, at most 8192)")  # fmt: skip
    add("--shard", metavar="I/N", help="write the documents of shard I of N, from 0; env: as SLURM says")
    work = parser.add_mutually_exclusive_group().add_argument
    work("--merge", action="store_true", help="write one index over the parts of all shards, and exit")
    work("--check", action="store_true", help="print what would be written, and exit")
    work("--estimate", action="store_true", help="print disk and hours of each source, and exit")
    work("--judge", action="store_true", help="compare teacher and student on a sample, and exit")
    add("--sample", type=count, default=16384, metavar="TOKENS", help="of each source, for --judge and "
        "--estimate (default: %(default)s)")  # fmt: skip
    add("--tflops", type=positive, help="10^12 FLOP/s of a device; without it, hours are by a timed sample")
    with user_errors():
        run(parser.parse_intermixed_args())


def run(options: argparse.Namespace) -> None:
    config, data = config_io.load_with(options.config, lambda config: open_data(config, launched(), "mix"))
    asked, model, cache = objective_of(config, options.phase)
    if cache is None and not options.judge:
        raise ValueError(f"phases.{options.phase}.objective names no cache, the folder that is written")
    folder = cache or Path()
    rank, ranks = launch_number("RANK", 0), launch_number("WORLD_SIZE", 1)
    # Under torchrun, RANK is a rank's place within its shard.
    others = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    shard = parse_shard(options.shard, others, folder / "shard") if options.shard else None
    if (options.merge or options.estimate or options.judge) and (ranks > 1 or shard):
        raise ValueError("--merge, --estimate and --judge take one process, and no --shard")
    place, shards = shard or (0, 1)
    documents = choose(config, data, options.phase, options.sources, options.planned)
    documents = documents.of_writer(place, shards)
    if options.merge:
        return finish(documents, model, folder, 0, 1, None)
    draws, here = None if options.top_k else options.draws, Path(model).exists()
    each = expected(draws, options.top_k)
    teacher = Described(model, asked.bos) if here or not (options.check or options.estimate) else None
    if teacher and (mistakes := vocabulary_mistakes(config, data, options.phase, teacher)):
        raise config_io.ConfigError(mistakes)
    header = None
    if teacher and rank == 0 and not options.judge:
        header = header_of(teacher, asked, draws, options.top_k, options.seed, options.context)
        if (folder / "header.json").exists():
            header.write(folder)
    missing = documents.only(~covered(folder, documents))
    lacking = missing.by_source()
    if options.check:
        for name, tokens in documents.by_source().items():
            say(f"{name}: {tokens:,} tokens, {tokens - lacking.get(name, 0):,} of them there", result=True)
        size = f"{missing.total * each / 1e9:.3g} GB at {each:g} bytes a token"
        return say(f"{folder}: {missing.total:,} tokens of {len(missing):,} documents, {size}", result=True)
    with loading_torch(str(folder)):
        from megatron_r1.distill.judge import estimate, judge, text
        from megatron_r1.distill.teacher import Teacher
        from megatron_r1.parallel import meeting
    flops = options.tflops and options.tflops * 1e12
    if options.judge:
        result = judge(config, options.phase, documents, options.sample, options.seed, flops)
        if cache:
            write_json(cache / "judge.json", result)
        return say(text(result), result=True)
    if options.estimate:
        if header is None and not (asked.parameters and flops):
            way_out = f"say phases.{options.phase}.objective.parameters=N and --tflops"
            raise ValueError(f"{model} is not here to be measured; {way_out}")
        flop, found = 2.0 * (asked.parameters or 0), dict.fromkeys(lacking, (each, 0.0))
        if teacher and header:
            flop = teacher.flops_per_token(config.data.seq_length)
            loaded = Teacher(model, config.train.precision, asked.bos)
            found = estimate(documents, loaded, header, options.sample, options.seed)
        rows, of_flop = dict[str, np.ndarray](), flop / flops if flops else None
        for name, n in lacking.items():
            rows[name] = n * np.array([1, found[name][0] / 1e9, (of_flop or found[name][1]) / 3600])
        for name, (tokens, gb, hours) in {**rows, "together": sum(rows.values(), np.zeros(3))}.items():
            say(f"{name}: {tokens:,.0f} tokens, {gb:.3g} GB, {hours:.3g} hours of a device", result=True)
        by = "by a sample" if header else f"at {each:g} a token"
        how = "at --tflops" if flops else "by a sample on this device"
        return say(f"bytes {by}; hours {how}", result=True)
    with meeting(folder / "writers" / f"{place}-of-{shards}", rank, ranks) as meet:
        if header:
            require_space(folder, missing.total, each)
            header.write(folder)
        header = Header(**meet(header and asdict(header)))
        loaded = Teacher(model, config.train.precision, asked.bos)
        # Modulo `shards` it is the shard's number.
        mine = documents.of_writer(rank * shards + place, ranks * shards)
        write(mine, loaded, header, folder, ranks, rank == 0)
        meet(None)
        if rank == 0:
            finish(documents, model, folder, missing.total, ranks, shard)
    return None


if __name__ == "__main__":
    main()
