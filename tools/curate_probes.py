"""Set documents aside before training: representative sets R_g, probing and held-out sets by capability.

With FILE.yaml, documents are judged: a sample of each source goes through a quality classifier, a language
model that is asked about each document, evaluation items and duplicates (docs/curation.md). Without it, the
last documents of each source are set aside. Each writes probe_CAPABILITY and heldout_CAPABILITY (.bin, .idx,
.json), the trainer's configuration (curated.yaml or split.yaml) and manifest.json.

python tools/curate_probes.py examples/curation/small.yaml output=data/curated --workers 2
torchrun --nproc-per-node 8 tools/curate_probes.py examples/curation/table5.yaml

Shards of a stage, each started by itself, and after them, or before the first, the step between stages:

python tools/curate_probes.py examples/curation/table5.yaml --merge
python tools/curate_probes.py examples/curation/table5.yaml --shard 0/8

Without models:

python tools/curate_probes.py --output-dir data/probes \\
    --sources stdlib=data/tokens/stdlib_text_document gcide=data/tokens/gcide_text_document \\
    --capabilities code=stdlib knowledge=gcide
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from megatron_r1.curation.probes import curate_probes
from megatron_r1.curation.request import SLACK, CurationConfig, exact, load
from megatron_r1.data.provenance import read_provenance
from megatron_r1.preprocess.documents import open_inputs
from megatron_r1.preprocess.shards import parse_shard
from megatron_r1.system.terminal import count, number, positive, say, tool_parser, user_errors

_SPLIT = (
    "sources",
    "capabilities",
    "output_dir",
    "tokens_per_source",
    "fraction",
    "max_document_tokens",
    "end_documents",
)
_JUDGED = ("workers", "shard", "merge", "estimate", "tflops", "pass_rate")
"""Options without FILE.yaml, and with it alone."""
_PARAMETERS = {"quality": 109e6, "judge": 8e9, "embed": 22.7e6}
"""Of a model that is not here: FineWeb-Edu's classifier, Llama 3.1 8B, MiniLM."""
_BYTES = 3000
"""Of a document, about."""


def pairs(option: str, arguments: list[str]) -> dict[str, str]:
    """The pairs of NAME=VALUE arguments. ValueError for another form, and for a name given twice."""
    values: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} {argument!r}: not NAME=VALUE")
        if name in values:
            raise ValueError(f"{option} {argument!r}: {name} is given twice")
        values[name] = value
    return values


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("request", nargs="*", metavar="FILE.yaml", help="files and overrides, as documents=1000")
    add("--overwrite", action="store_true", help="replace results of another request")
    add("--check", action="store_true", help="print what would be read and written, and exit")
    add = parser.add_argument_group("with FILE.yaml").add_argument
    add("--workers", type=count, default=1, help="processes that read the sample (default: 1)")
    add("--shard", metavar="I/N", help="score part I of N of the stage that waits, from 0; env: as SLURM "
        "says")  # fmt: skip
    add("--merge", action="store_true", help="go on from the shards' scores to the next stage of a model")
    add("--estimate", action="store_true", help="print documents, FLOP and hours of each stage, and exit")
    add("--tflops", type=positive, default=0.4 * 989, help="FLOP/s of a device, in 10^12, for --estimate "
        "(default: %(default)g, an H100 at 40 %%)")  # fmt: skip
    add("--pass-rate", type=number(float, 0, 1, above=True), default=0.1, help="share of documents above the "
        "threshold of quality, for --estimate (default: %(default)g)")  # fmt: skip
    add = parser.add_argument_group("without FILE.yaml").add_argument
    add("--sources", nargs="+", metavar="NAME=PREFIX", help="all that training draws from")
    add("--capabilities", nargs="+", metavar="CAPABILITY=NAME,NAME", help="sources of each; "
        "a source in none is split all the same")  # fmt: skip
    add("--output-dir", metavar="DIR")
    add("--tokens-per-source", type=count, default=32_768, help="of each set (default: %(default)s)")
    add("--fraction", type=number(float, 0, 0.5, above=True), default=0.1, help="of a source to set aside "
        "(default: %(default)s)")  # fmt: skip
    add("--max-document-tokens", type=count, default=2048, help="of one document (default: %(default)s)")
    add("--end-documents", action="store_true", help="end what is cut out of a document by the "
        "end-of-document token, for data.cross_documents=false")  # fmt: skip
    args = parser.parse_intermixed_args()
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    others = sorted(given & set(_SPLIT if args.request else _JUDGED))
    if others:
        which = "without FILE.yaml" if args.request else "with FILE.yaml"
        parser.error(f"--{others[0].replace('_', '-')} is {which} alone; see --help")
    if args.request:
        with user_errors():
            judge(args)
        return
    missing = [
        f"--{n.replace('_', '-')}" for n in ("sources", "capabilities", "output_dir") if n not in given
    ]
    if missing:
        parser.error(f"name a FILE.yaml, or, without it, give {', '.join(missing)}")
    with user_errors():
        split(args)


def judge(args: argparse.Namespace) -> None:
    """The funnel of FILE.yaml."""
    if args.shard and args.merge:
        raise ValueError("--shard scores, and --merge goes on from all shards' scores; give one of them")
    config = load(args.request)
    if args.check:
        describe(config)
    elif args.estimate:
        estimate(config, args.tflops, args.pass_rate)
    else:
        from megatron_r1.curation.funnel import curate

        share = parse_shard(args.shard) if args.shard else None
        manifest = curate(
            config, workers=args.workers, share=share, merge=args.merge, overwrite=args.overwrite
        )
        if manifest:
            sets = ", ".join(f"{n} {sum(of.values()):,}" for n, of in manifest["sets"].items())
            say(f"{config.output}: documents of {sets}; README.md describes them", result=True)


def describe(config: CurationConfig) -> None:
    """Print what would be read, and which stages follow.

    Raises ValueError, OSError for inputs, pairs and evaluation items.
    """
    from megatron_r1.curation.funnel import read_items

    for name, source in config.sources.items():
        inputs = open_inputs(source.text)
        for one in inputs:
            one.check(source.keys())
        size = sum(one.size for one in inputs)
        domains = ", ".join(source.domains) or "no domain, so it has a representative set alone"
        documents = len(read_provenance(source.prefix).hashes)
        print(f"{name}: {len(inputs)} inputs, {size:,} bytes, a pair of {documents:,} documents; {domains}")
    for stage, line in stages(config).items():
        print(f"{stage}: {line}")
    if items := read_items(config):
        print(f"evaluation items: {len(items.parts):,} questions and answers")
    for domain, members in config.domains().items():
        print(f"{config.output}/probe_{domain}, heldout_{domain}: {', '.join(members)}")


def stages(config: CurationConfig) -> dict[str, str]:
    """What each stage does."""
    quality, judge, same, items = config.quality, config.judge, config.duplicates, config.decontamination
    near = f"Jaccard {same.near:g}" if same and same.near is not None else "equal documents alone"
    semantic = f"cosine {same.threshold or 'calibrated'} by {same.semantic}" if same and same.semantic else ""
    lines = {
        "quality": quality
        and f"above {quality.threshold:g} by {quality.labelled or quality.model}; of too few, "
        f"the best {config.needed():,}",
        "judge": judge and f"the best {judge.keep:.0%} by {judge.model}, {judge.tokens} tokens",
        "domain": judge and f"the best {judge.domain_keep:.0%} by the prompt of the domain",
        "items": items and ", ".join([*items.items, *items.gold]),
        "near": near,
        "semantic": semantic,
        "documents": f"at most {config.documents:,} of each source",
    }
    return {stage: line or "left out" for stage, line in lines.items()}


def question(config: CurationConfig, kind: str) -> int:
    """Tokens behind the document in the longest prompt, about: four characters are one."""
    prompts = (path.read_text() for path in config.prompts(kind).values())
    return max((len(prompt.partition("{document}")[2]) // 4 for prompt in prompts), default=0)


def estimate(config: CurationConfig, tflops: float, pass_rate: float) -> None:
    """Print documents, FLOP and hours of each stage of a model, disk and memory."""
    from megatron_r1.curation.funnel import load_model

    aim, n = config.needed(SLACK), len(config.sources)
    sample = min(config.most, max(config.pilot, round(aim / pass_rate)) if config.quality else aim)
    asked, domain = config.judge, sum(bool(s.domains) for s in config.sources.values())
    judged = max(round(sample * pass_rate), min(config.needed(), sample)) if config.quality else sample
    left = math.ceil(exact(asked.keep) * judged) if asked else judged
    work: dict[str, tuple[str, int, int]] = {}
    if config.quality and (own := sum(s.score is None for s in config.sources.values())):
        work["quality"] = "quality", own * sample, config.quality.tokens
    if asked:
        work |= {
            "judge": ("judge", n * judged, asked.tokens + question(config, "judge")),
            "domain": ("judge", domain * left, asked.tokens + question(config, "domain")),
        }
    if config.duplicates and config.duplicates.semantic:
        work["embed"] = "embed", n * left, config.duplicates.tokens
    size = f"{n * sample:,} documents, {sample:,} of each of {n} sources"
    names = {
        "quality": config.quality and config.quality.model,
        "judge": asked and asked.model,
        "embed": config.duplicates and config.duplicates.semantic,
    }
    print(f"sample: {size}, at a pass rate of {pass_rate:g}")
    total = 0.0
    for stage, (kind, documents, tokens) in work.items():
        # A model of the hub would be fetched for an estimate.
        here = Path(names[kind] or "").is_dir()
        each = load_model(config, kind).flops(tokens) if here else 2 * _PARAMETERS[kind] * tokens
        by = "by the model's own shape" if here else f"by {_PARAMETERS[kind]:.3g} parameters: it is not here"
        flop = each * documents
        total += flop
        hours = flop / tflops / 1e12 / 3600
        print(
            f"{stage}: {documents:,} documents of {tokens} tokens, {flop:.3g} FLOP ({by}), {hours:.2f} hours"
        )
    hours = total / tflops / 1e12 / 3600
    print(f"together: {total:.3g} FLOP, {hours:.1f} hours of a device of {tflops:g} TFLOP/s")
    disk, memory = 2 * n * sample * _BYTES, n * (sample * 64 + left * _BYTES * 2) + 4096 * _BYTES * 4
    print(f"disk: {disk / 1e9:.1f} GB, memory of the first rank without models: {memory / 1e9:.1f} GB, "
          f"at {_BYTES} bytes a document")  # fmt: skip


def split(args: argparse.Namespace) -> None:
    """The last documents of each source, set aside without a judgement."""
    manifest = curate_probes(
        pairs("--sources", args.sources),
        {name: of.split(",") for name, of in pairs("--capabilities", args.capabilities).items()},
        args.output_dir,
        tokens_per_source=args.tokens_per_source,
        fraction=args.fraction,
        max_document_tokens=args.max_document_tokens,
        end_documents=args.end_documents,
        overwrite=args.overwrite,
        check=args.check,
    )
    if args.check:
        for name, of in manifest["sources"].items():
            print(
                f"{name}: {of['set_aside_documents']:,} of {of['documents']:,} documents set aside "
                f"({of['set_aside_tokens']:,} tokens), {of['training_tokens']:,} tokens left to training"
            )
        return
    left = sum(of["training_tokens"] for of in manifest["sources"].values())
    print(f"{args.output_dir}: {', '.join(manifest['files'])}; {left} tokens left to training")


if __name__ == "__main__":
    main()
