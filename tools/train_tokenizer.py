"""Train a SentencePiece BPE tokenizer on JSONL texts.

python tools/train_tokenizer.py --input data/text/*.jsonl --vocab-size 8192 --output data/tokenizer.model
"""

from __future__ import annotations

import time

from megatron_r1.cli import tool_parser, user_errors
from megatron_r1.data.tokenizer import SentencePiece, build_tokenizer, train_sentencepiece


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="JSONL", help="one document a line")
    parser.add_argument("--json-key", default="text", help="where the text is (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="MODEL", help="model file to write")
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=30,
        help="text to learn from, an equal share of each input (default: %(default)s)",
    )
    args = parser.parse_args()
    start = time.monotonic()
    with user_errors():
        seen = train_sentencepiece(
            args.input, args.output, args.vocab_size, args.json_key, int(args.max_megabytes * 1e6)
        )
        tokenizer = build_tokenizer(SentencePiece.kind, args.output)
    print(
        f"wrote {args.output}: {tokenizer.vocab_size} tokens from {seen / 1e6:.1f} MB of text in "
        f"{time.monotonic() - start:.1f} s, fingerprint {tokenizer.fingerprint()[:12]}"
    )


if __name__ == "__main__":
    main()
