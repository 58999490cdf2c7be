"""Find evaluation items, and probing documents, in text that is to be trained on; keep it out by a mask.

Writes to the output folder hits.parquet (a row a hit, with both texts), dropped.txt (hashes of the texts that
were hit), rejects.jsonl, manifest.json and, with --prefix, PAIR.npz: a mask over documents for a phase's
keep. The texts are read in parts. A part that is done stays done: the same command goes on after a kill, and
the result depends neither on --workers nor on shards. docs/curation.md has the rule and its measured errors.

python tools/decontaminate.py --input data/text/a.jsonl data/text/b.parquet --items mine=items.jsonl \\
    --gold gsm8k math500 --probes data/curated --output data/clean --workers 8 \\
    --prefix data/tokens/a_text_document --seq-length 2048

Across nodes, each takes a shard (--shard I/N, or --shard env under torchrun or SLURM). Afterwards, once, the
same command with --merge in place of --shard.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

from megatron_r1.curation.decontaminate import Items
from megatron_r1.curation.scan import Job, decontaminate, estimate, probing_parts
from megatron_r1.data.indexed import open_corpus
from megatron_r1.data.provenance import read_provenance
from megatron_r1.preprocess.documents import MOST_BYTES, most_bytes, open_inputs
from megatron_r1.preprocess.rows import check_keys
from megatron_r1.preprocess.shards import parse_shard
from megatron_r1.system.terminal import count, number, positive, say, tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="texts, as tools/preprocess_data.py reads them")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="texts of a row (default: text)")
    add("--items", nargs="+", default=[], metavar="NAME=FILE", help="evaluation items: JSON lines of "
        "question (or prompt, text) and answer (or gold); either may be absent")  # fmt: skip
    add("--gold", nargs="+", default=[], metavar="NAME", help="sets of data.gold: gsm8k, math500, ...")
    add("--probes", nargs="+", default=[], type=Path, metavar="DIR", help="curated folders, or files of "
        "documents with text, that training must not hold")  # fmt: skip
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the results")
    add("--prefix", nargs="+", default=[], help="pairs made of these texts: a keep mask is written for each")
    add("--seq-length", type=count, metavar="S", help="of the run that takes the masks; --prefix needs it")
    add("--workers", type=count, default=1, help="processes; the result does not depend on it (default: 1)")
    add("--shard", metavar="I/N", help="scan a share of the parts, from 0; env: as torchrun or SLURM says")
    add("--merge", action="store_true", help="write the results of parts that shards have scanned")
    add("--part-megabytes", type=positive, default=64.0, help="bytes of text in a part (default: 64)")
    add("--reject-limit", type=number(int, 0), default=100, help="stop beyond so many rejects (default: 100)")
    add("--max-document-megabytes", type=float, default=MOST_BYTES / 1e6, metavar="N", help="a longer line "
        "or row of a table is a reject (default: %(default)g)")  # fmt: skip
    add("--check", action="store_true", help="print what would be read and written, and exit")
    add("--estimate", action="store_true", help="print time and memory by a sample of the text, and exit")
    args = parser.parse_args()
    if bool(args.prefix) != bool(args.seq_length):
        parser.error("--prefix and --seq-length go together")
    if args.shard and (args.merge or args.prefix):
        parser.error("--shard only scans; give --merge and --prefix to the last command, without --shard")
    with user_errors():
        check_keys(args.json_keys)
        shard = None
        if args.shard:
            shard = parse_shard(args.shard, output_prefix=None if args.check else args.output / "shard")
            # Each shard is a run of its own: its mistakes are not for rank 0 to tell.
            os.environ.pop("RANK", None)
        named = [item.partition("=")[::2] for item in args.items]
        if wrong := [name for name, path in named if not name or not path]:
            raise ValueError(f"--items {wrong[0]}: write NAME=FILE")
        if len(dict(named)) < len(named):
            raise ValueError("--items: a name is given twice; each names one set")
        parts = Items.read(dict(named), args.gold).parts if named or args.gold else []
        items = Items([*parts, *(part for path in args.probes for part in probing_parts(path))])
        most = most_bytes(args.max_document_megabytes)
        sources = open_inputs(args.input, most)
        for source in sources:
            source.check(args.json_keys)
        size = sum(source.size for source in sources)
        # What is wrong with a pair is said before the scan, which may take hours.
        pairs = {name: (open_corpus(Path(name).name, name), read_provenance(name)) for name in args.prefix}
        masks = Counter(f"{corpus.name}.npz" for corpus, _ in pairs.values())
        if twice := [name for name, n in masks.items() if n > 1]:
            raise ValueError(f"--prefix: two masks would be {twice[0]}; give each pair another --output")
        job = Job([source.name for source in sources], args.json_keys, most, items, args.output,
                  max(1, math.ceil(size / args.part_megabytes / 1e6)))  # fmt: skip
        if args.check:
            probes = f"{len(items.parts) - len(parts)} probing documents"
            say(f"items: {len(parts)} questions and answers, {probes}", result=True)
            say(f"input: {len(sources)} files, {size:,} bytes in {job.parts} parts", result=True)
            say(f"output: {args.output}/hits.parquet, dropped.txt, rejects.jsonl, manifest.json", result=True)
            return
        if args.estimate:
            estimate(job, args.workers, size)
            return
        manifest = decontaminate(
            job,
            pairs,
            args.seq_length,
            shard=shard,
            merging=args.merge,
            workers=args.workers,
            reject_limit=args.reject_limit,
        )
        if manifest is not None:
            of = f"{manifest['texts']:,} texts of {manifest['documents']:,} documents were hit"
            say(f"{args.output}: {of}; {manifest['hits']}", result=True)


if __name__ == "__main__":
    main()
