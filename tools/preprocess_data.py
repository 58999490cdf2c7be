"""Tokenize documents into Megatron's indexed datasets (PREFIX_KEY_document.bin and .idx).

python tools/preprocess_data.py --input data/text/gcide.jsonl --output-prefix data/tokens/gcide \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --append-eod --workers 2
"""

from __future__ import annotations

import argparse
import sys
import time

from megatron_r1.cli import user_errors
from megatron_r1.data.preprocess import preprocess


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSONL (also .gz, .zst) or .parquet")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="a dataset each (default: text)")
    add(
        "--tokenizer-type", required=True, help="SentencePieceTokenizer, HuggingFaceTokenizer or TikTokenizer"
    )
    add("--tokenizer-model", required=True, help="model file, folder with tokenizer.json, or hub name")
    add("--output-prefix", required=True, metavar="PREFIX", help="path of the outputs without suffix")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--workers", type=int, default=1, help="processes; the result does not depend on it (default: 1)")
    add("--seed", type=int, default=1234, help="of the document shuffle (default: %(default)s)")
    add("--no-shuffle", action="store_true", help="keep the input order: the bytes of Megatron's own tool")
    add("--reject-limit", type=int, default=100, help="stop beyond so many rejects (default: %(default)s)")
    args = parser.parse_args()
    start = time.monotonic()
    with user_errors():
        try:
            sidecars = preprocess(
                args.input,
                args.output_prefix,
                args.tokenizer_type,
                args.tokenizer_model,
                json_keys=args.json_keys,
                append_eod=args.append_eod,
                workers=args.workers,
                seed=None if args.no_shuffle else args.seed,
                reject_limit=args.reject_limit,
            )
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)
    tokens = ", ".join(f"{prefix}.bin {s['tokens']} tokens" for prefix, s in sidecars.items())
    print(f"{tokens}; {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
