"""Set documents aside before training: probing and held-out sets by capability, and the split to train on.

python tools/curate_probes.py --output-dir data/probes \\
    --sources stdlib=data/tokens/stdlib_text_document gcide=data/tokens/gcide_text_document \\
    --capabilities code=stdlib knowledge=gcide

Writes probe_CAPABILITY and heldout_CAPABILITY (.bin, .idx, .json), split.yaml (for tools/train.py) and
manifest.json.
"""

from __future__ import annotations

from megatron_r1.curation.probes import curate_probes
from megatron_r1.system.terminal import count, number, tool_parser, user_errors


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
    add("--sources", nargs="+", required=True, metavar="NAME=PREFIX", help="all that training draws from")
    add("--capabilities", nargs="+", required=True, metavar="CAPABILITY=NAME,NAME", help="sources of each; "
        "a source in none is split all the same")  # fmt: skip
    add("--output-dir", required=True, metavar="DIR")
    add("--tokens-per-source", type=count, default=32_768, help="of each set (default: %(default)s)")
    add("--fraction", type=number(float, 0, 0.5, above=True), default=0.1, help="of a source to set aside "
        "(default: %(default)s)")  # fmt: skip
    add("--max-document-tokens", type=count, default=2048, help="of one document (default: %(default)s)")
    add("--end-documents", action="store_true", help="end what is cut out of a document by the "
        "end-of-document token, for data.cross_documents=false")  # fmt: skip
    add("--overwrite", action="store_true", help="replace sets of other sources, capabilities or options")
    add("--check", action="store_true", help="print how each source would be split, and exit")
    args = parser.parse_args()
    with user_errors():
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
        split = manifest["sources"]
        if args.check:
            for name, of in split.items():
                print(
                    f"{name}: {of['set_aside_documents']:,} of {of['documents']:,} documents set aside "
                    f"({of['set_aside_tokens']:,} tokens), {of['training_tokens']:,} tokens left to training"
                )
            return
        left = sum(of["training_tokens"] for of in split.values())
        print(f"{args.output_dir}: {', '.join(manifest['files'])}; {left} tokens left to training")


if __name__ == "__main__":
    main()
