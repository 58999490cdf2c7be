"""Tokenize documents into Megatron's indexed datasets (PREFIX_KEY_document.bin and .idx).

python tools/preprocess_data.py --input data/text/gcide.jsonl --output-prefix data/tokens/gcide \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --append-eod --workers 2

Across nodes, each writes a shard (--shard I/N, or --shard env under torchrun or SLURM); afterwards, once:

python tools/preprocess_data.py --merge --output-prefix data/tokens/gcide
"""

from __future__ import annotations

import os

from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.shards import merge, parse_shard
from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", metavar="INPUT", help="JSONL (also .gz, .zst), .parquet, a folder from "
        "save_to_disk, or hf:NAME[:SPLIT], hf:NAME:CONFIGURATION:SPLIT")  # fmt: skip
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="a dataset each (default: text)")
    add("--tokenizer-type", help="SentencePieceTokenizer, HuggingFaceTokenizer, TikTokenizer or "
        "TikTokenizer:FAMILY for ranks that are not a published file")  # fmt: skip
    add("--tokenizer-model", help="model file, folder with tokenizer.json, or hub name")
    add("--output-prefix", required=True, metavar="PREFIX", help="path of the outputs without suffix")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--workers", type=int, default=1, help="processes; the result does not depend on it (default: 1)")
    add("--seed", type=int, default=1234, help="of the document shuffle (default: %(default)s)")
    add("--no-shuffle", action="store_true", help="keep the input order: the bytes of Megatron's own tool")
    add("--reject-limit", type=int, default=100, help="stop beyond so many rejects (default: %(default)s)")
    add("--encoder", choices=["auto", "reference"], default="auto", help="auto: gigatoken for vetted forms "
        "of tokenizers (default); reference: never")  # fmt: skip
    add("--shard", metavar="I/N", help="encode part I of N, from 0; env: as torchrun or SLURM says")
    add("--merge", action="store_true", help="join the shards of this prefix; their options are known")
    add("--check", action="store_true", help="print what would be read and written, and exit")
    args = parser.parse_args()
    given = {"--input": args.input, "--tokenizer-type": args.tokenizer_type}
    given["--tokenizer-model"] = args.tokenizer_model
    if args.merge and (args.shard or any(given.values())):
        parser.error("--merge takes --output-prefix, --json-keys and --reject-limit only")
    missing = [name for name, value in given.items() if not value]
    if missing and not args.merge:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    # Each shard is a run of its own: its mistakes are not for rank 0 to tell.
    shard = None
    with user_errors():
        if args.shard:
            shard = parse_shard(args.shard)
            os.environ.pop("RANK", None)
        if args.merge:
            merge(
                args.output_prefix,
                json_keys=args.json_keys,
                reject_limit=args.reject_limit,
                check=args.check,
            )
        else:
            preprocess(
                args.input,
                args.output_prefix,
                args.tokenizer_type,
                args.tokenizer_model,
                json_keys=args.json_keys,
                append_eod=args.append_eod,
                workers=args.workers,
                seed=None if args.no_shuffle else args.seed,
                reject_limit=args.reject_limit,
                encoder=args.encoder,
                shard=shard,
                check=args.check,
            )


if __name__ == "__main__":
    main()
