"""Convert a checkpoint to a Hugging Face folder, or such a folder to a checkpoint.

python tools/convert_checkpoint.py --to hf runs/x/checkpoints/step_00001000 runs/x/hf \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model
python tools/convert_checkpoint.py --to megatron downloads/MobileLLM-R1-950M imported

One process; docs/convert.md says what can be represented.
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1.system.errors import require
from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a step_N checkpoint, or a folder with config.json")
    add("target", type=Path, metavar="DST", help="folder to write; must not exist, or be empty")
    add("--to", required=True, choices=("hf", "megatron"))
    add("--precision", choices=("bf16", "fp32"), help="of the written weights (default: as they are stored)")
    add("--context", type=int, metavar="TOKENS", help="to hf: longest sequence (default: the run's)")
    add("--tokenizer-type", metavar="KIND", help="to hf: as for tools/preprocess_data.py")
    add("--tokenizer-model", metavar="MODEL", help="to hf: the tokenizer that the model was trained with")
    add("--expect", metavar="HASH", help="to hf: identity that SRC must have, sha256sum SRC/megatron_r1.json")
    add("--check", action="store_true", help="print what would be written, and exit")
    args = parser.parse_args()
    with user_errors():
        only_hf = ("context", "tokenizer_type", "tokenizer_model", "expect")
        if args.to == "megatron" and any(getattr(args, name) is not None for name in only_hf):
            raise ValueError("--context, --tokenizer-* and --expect concern --to hf")
        if bool(args.tokenizer_type) != bool(args.tokenizer_model):
            raise ValueError("give --tokenizer-type and --tokenizer-model together, or neither")
        module, user, install = "megatron_r1.export.convert", f"--to {args.to}", "-e '.[hf]'"
        done = "would write" if args.check else "wrote"
        if args.to == "megatron":
            convert = require(module, user, install)
            summary = convert.to_megatron(args.source, args.target, args.precision, args.check)
            print(f"{done} {args.target / 'step_00000000'}: {summary}")
            return
        # Before torch is loaded, which takes seconds.
        context = args.context
        if context is None:
            context = require("megatron_r1.export.origin", user, install).context_of(args.source)
        tokenizer = None
        if args.tokenizer_type:
            from megatron_r1.export.tokenizer import tokenizer_files

            tokenizer = tokenizer_files(args.tokenizer_type, args.tokenizer_model)
        convert = require(module, user, install)
        rest = (context, args.precision, tokenizer, args.check, args.expect)
        summary = convert.to_hf(args.source, args.target, *rest)
        print(f"{done} {args.target}: {summary}")


if __name__ == "__main__":
    main()
