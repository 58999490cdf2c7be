"""Train a SentencePiece BPE tokenizer on documents.

python tools/train_tokenizer.py --input data/text/*.jsonl --vocab-size 8192 --output data/tokenizer.model
"""

from __future__ import annotations

import time
from pathlib import Path

from megatron_r1.preprocess.documents import MOST_BYTES, most_bytes, open_inputs
from megatron_r1.preprocess.train_tokenizer import record_tokenizer, train_sentencepiece
from megatron_r1.system.terminal import count, positive, tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="as for preprocess_data.py")
    add("--json-key", default="text", help="where the text is (default: %(default)s)")
    add("--vocab-size", type=count, default=8192, help="tokens (default: %(default)s)")
    add("--output", required=True, metavar="MODEL", help="model file to write")
    add("--max-megabytes", type=positive, default=30, help="text to learn from, an equal share of each input "
        "(default: %(default)s)")  # fmt: skip
    add("--max-document-megabytes", type=float, default=MOST_BYTES / 1e6, help="a longer line, or row of a "
        "table, is an error (default: %(default)g)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace another model of this name")
    add("--check", action="store_true", help="print what would be read, and exit")
    args = parser.parse_args()
    start = time.monotonic()
    with user_errors():
        longest = most_bytes(args.max_document_megabytes)
        inputs = open_inputs(args.input, longest)
        if args.check:
            share = min(args.max_megabytes, sum(i.size for i in inputs) / 1e6) / len(inputs)
            for source in inputs:
                source.check([args.json_key])
                print(f"input {source.name}: {source.size:,} bytes, of its text up to {share:.1f} MB")
            there = "is replaced" if args.overwrite else "is there; another needs --overwrite"
            there = there if Path(args.output).exists() else "is written"
            print(f"output {args.output}: {args.vocab_size:,} tokens, {there}")
            return
        most = int(args.max_megabytes * 1e6)
        seen = train_sentencepiece(
            args.input, args.output, args.vocab_size, args.json_key, most, args.overwrite, longest
        )
        tokenizer = record_tokenizer(inputs, args.output)
    print(
        f"wrote {args.output}: {tokenizer.vocab_size} tokens from {seen / 1e6:.1f} MB of text in "
        f"{time.monotonic() - start:.1f} s, fingerprint {tokenizer.fingerprint()[:12]}"
    )


if __name__ == "__main__":
    main()
