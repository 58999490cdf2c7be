"""Write indexed datasets of benchmarks' gold answers, whose bits per byte training measures (data.gold).

python tools/prepare_gold.py --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model \\
    --output-dir data/gold

The items are read from packages that `make gold-items` installs.
"""

from __future__ import annotations

from megatron_r1.data.gold import NAMES, prepare
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--sets", nargs="+", choices=NAMES, default=NAMES, metavar="SET", help=f"of {', '.join(NAMES)} "
        "(default: all)")  # fmt: skip
    add("--tokenizer-type", required=True, help="as for preprocess_data.py")
    add("--tokenizer-model", required=True, help="that of the training data")
    add("--output-dir", required=True, metavar="DIR", help="gets SET.bin, .idx and .json of each set")
    add("--overwrite", action="store_true", help="replace sets of another tokenizer or package")
    add("--check", action="store_true", help="print what would be written, and exit")
    args = parser.parse_args()
    with user_errors():
        tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
        about = {
            "tokenizer_type": tokenizer.kind,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        }
        names = list(dict.fromkeys(args.sets))
        prepare(names, args.output_dir, tokenizer.encode_batch, about, args.overwrite, args.check)


if __name__ == "__main__":
    main()
