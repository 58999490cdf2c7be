"""Tokenize documents into Megatron's indexed datasets (PREFIX_KEY_document.bin and .idx).

python tools/preprocess_data.py --input data/text/gcide.jsonl --output-prefix data/tokens/gcide \\
    --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --append-eod --workers 2

Across nodes, each writes a shard (--shard I/N, or --shard env under torchrun or SLURM); afterwards, once:

python tools/preprocess_data.py --merge --output-prefix data/tokens/gcide
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from megatron_r1.preprocess.documents import MOST_BYTES, most_bytes
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.shards import merge, parse_shard
from megatron_r1.preprocess.store import verify
from megatron_r1.preprocess.train_tokenizer import convert_gpt2
from megatron_r1.system.terminal import count, number, say, tool_parser, user_errors

GPT2 = "GPT2BPETokenizer"
_VERIFY = ("output_prefix", "json_keys")
_MERGE = (*_VERIFY, "reject_limit", "overwrite", "check", "workers", "log_interval")
"""Arguments beside these flags."""
_SENTENCES = "sentence splitting is out of scope; split the documents before, or leave the flag out"
_WORKERS = "leave it out, and time --workers yourself; the result does not depend on it"
_VOCABULARY = "leave it out; the tokenizer has its size and its special tokens"
_RANKS = "leave it out; TikTokenizer reads ranks, one a line, and no list in JSON"
_FOLDER = "write --tokenizer-type HuggingFaceTokenizer --tokenizer-model, with a folder or ORG/NAME@COMMIT"
_WORDPIECE = "WordPiece is for BERT and out of scope"
REFUSED = {
    "BertWordPieceLowerCase": _WORDPIECE,
    "BertWordPieceCase": _WORDPIECE,
    "Llama2Tokenizer": "write SentencePieceTokenizer for the same tokens without the <s> that some versions "
    "of Megatron put before each document",
    "NullTokenizer": "documents are text; data.indexed.IndexedWriter writes tokens that are there already",
    "NullMultimodalTokenizer": "images are out of scope",
    "MultimodalTokenizer": f"images are out of scope; for text {_FOLDER}",
    "SFTTokenizer": f"conversations are out of scope; for text {_FOLDER}",
    "PretrainedFromHF": _FOLDER,
    "HFTokenizer": _FOLDER,
    "--split-sentences": _SENTENCES,
    "--find-optimal-num-workers": _WORKERS,
    "--workers-to-check": _WORKERS,
    "--max-documents": _WORKERS,
    "--performance-dir": _WORKERS,
    "--vocab-size": _VOCABULARY,
    "--padded-vocab-size": _VOCABULARY,
    "--make-vocab-size-divisible-by": _VOCABULARY,
    "--vocab-extra-ids": _VOCABULARY,
    "--special-tokens": _VOCABULARY,
    "--tokenizer-special-tokens": _VOCABULARY,
    "--tiktoken-pattern": _RANKS,
    "--tiktoken-num-special-tokens": _RANKS,
    "--tiktoken-special-tokens": _RANKS,
    "--tokenizer-sentencepiece-legacy": "leave it out; special tokens within a text are text",
    "--tokenizer-hf-include-special-tokens": "leave it out; only --append-eod adds a token",
    "--tokenizer-hf-use-fast": "leave it out; tokenizer.json is always read",
    "--tokenizer-hf-no-use-fast": "leave it out; tokenizer.json is always read",
    "--trust-remote-code": "leave it out; no code of a tokenizer is run",
    "--tokenizer-metadata": _VOCABULARY,
    "--metadata-path": _VOCABULARY,
    "--tokenizer-name-or-path": _FOLDER,
}
"""Kinds of Megatron's tokenizers and flags of its tool that are not taken -> what to write instead."""


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", metavar="INPUT", help="JSONL (also .gz, .zst), .parquet, a folder from "
        "save_to_disk, or hf:NAME[:SPLIT], hf:NAME:CONFIGURATION:SPLIT")  # fmt: skip
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="a dataset each (default: text)")
    add("--tokenizer-type", help="SentencePieceTokenizer, HuggingFaceTokenizer, TikTokenizer or "
        "TikTokenizer:FAMILY for ranks that are not a published file")  # fmt: skip
    add("--tokenizer-model", help="model file, folder with tokenizer.json, or hub name as ORG/NAME@COMMIT")
    add("--output-prefix", required=True, metavar="PREFIX", help="path of the outputs without suffix")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--workers", type=count, default=1, help="processes; the result does not depend on it (default: 1)")
    add("--seed", type=int, default=1234, help="of the document shuffle (default: %(default)s)")
    add("--no-shuffle", action="store_true", help="keep the input order: the bytes of Megatron's own tool")
    add("--reject-limit", type=number(int, 0), default=100, help="stop beyond so many rejects (default: 100)")
    add("--max-document-megabytes", type=float, default=MOST_BYTES / 1e6, metavar="N", help="a longer line "
        "or row of a table is a reject (default: %(default)g)")  # fmt: skip
    add("--encoder", choices=["auto", "reference"], default="auto", help="auto: gigatoken for vetted forms "
        "of tokenizers (default); reference: never")  # fmt: skip
    add("--shard", metavar="I/N", help="encode part I of N, from 0; env: as torchrun or SLURM says")
    add("--merge", action="store_true", help="join the shards of this prefix; their options are known")
    add("--verify", action="store_true", help="compare every byte of the pairs of this prefix, or of the "
        "pair of this name, with what was written, and exit")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a dataset of another input, tokenizer or option")
    add("--check", action="store_true", help="print what would be read and written, and exit")
    add = parser.add_argument_group("taken from command lines of Megatron's tool").add_argument
    add("--vocab-file", metavar="JSON", help=f"vocab.json of {GPT2}; its tokenizer.json is written beside")
    add("--merge-file", metavar="TXT", help=f"merges.txt of {GPT2}")
    add("--keep-sequential-samples", action="store_true", help="as --no-shuffle")
    add("--partitions", type=count, default=1, metavar="N", help="1, or any with --keep-sequential-samples")
    add("--legacy-tokenizer", action="store_true", help=f"with {GPT2} or GPTSentencePieceTokenizer")
    add("--dataset-impl", choices=["mmap"], help="the only one")
    add("--log-interval", metavar="N", help="without effect: lines of progress come every 10 seconds")
    add("--lang", help="without effect, as there without --split-sentences")
    add("--keep-newlines", action="store_true", help="without effect, as there without --split-sentences")
    for name in filter(lambda name: name.startswith("--"), REFUSED):
        add(name, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with user_errors():
        refuse(args)
        if os.path.basename(args.output_prefix) in ("", ".", ".."):
            raise ValueError(
                f"--output-prefix {args.output_prefix!r} is a folder; add the beginning of a name"
            )
    gpt2 = args.tokenizer_type == GPT2
    given = {"--input": args.input, "--tokenizer-type": args.tokenizer_type}
    if gpt2:
        given |= {"--vocab-file": args.vocab_file, "--merge-file": args.merge_file}
    else:
        given["--tokenizer-model"] = args.tokenizer_model
    # The others would be without effect, though people mean one by them.
    decides = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for flag, also in (("merge", _MERGE), ("verify", _VERIFY)):
        if getattr(args, flag) and (others := [n for n in decides if n not in (flag, *also)]):
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in also)
            parser.error(f"--{flag} takes {takes} only, not --{others[0].replace('_', '-')}")
    missing = [name for name, value in given.items() if not value]
    if missing and not (args.merge or args.verify):
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    # Each shard is a run of its own: its mistakes are not for rank 0 to tell.
    shard = None
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        model = args.tokenizer_model
        if gpt2:
            model = scratch if args.check else f"{args.output_prefix}.tokenizer"
        if args.shard:
            shard = parse_shard(args.shard, output_prefix=None if args.check else args.output_prefix)
            os.environ.pop("RANK", None)
        if args.verify:
            verify(args.output_prefix, args.json_keys, say)
        elif args.merge:
            merge(
                args.output_prefix,
                json_keys=args.json_keys,
                reject_limit=args.reject_limit,
                overwrite=args.overwrite,
                check=args.check,
            )
        else:
            if gpt2:
                convert_gpt2(args.vocab_file, args.merge_file, Path(model), args.overwrite)
            preprocess(
                args.input,
                args.output_prefix,
                "HuggingFaceTokenizer" if gpt2 else args.tokenizer_type,
                model,
                json_keys=args.json_keys,
                append_eod=args.append_eod,
                workers=args.workers,
                seed=None if args.no_shuffle or args.keep_sequential_samples else args.seed,
                reject_limit=args.reject_limit,
                max_document_bytes=most_bytes(args.max_document_megabytes),
                encoder=args.encoder,
                shard=shard,
                overwrite=args.overwrite,
                check=args.check,
            )


def refuse(args: argparse.Namespace) -> None:
    """Raise ValueError where Megatron's tool would give other bytes: say what to write instead."""
    kind = args.tokenizer_type
    for name, advice in REFUSED.items():
        if kind == name or getattr(args, name[2:].replace("-", "_"), None) is not None:
            raise ValueError(f"{name}: {advice}")
    if kind != GPT2 and (args.vocab_file or args.merge_file):
        raise ValueError(f"--vocab-file and --merge-file are for {GPT2}; {kind} reads --tokenizer-model")
    if kind == GPT2 and args.tokenizer_model:
        raise ValueError(f"--tokenizer-model: leave it out; {GPT2} reads --vocab-file and --merge-file")
    if args.partitions != 1 and not args.keep_sequential_samples:
        raise ValueError(
            f"--partitions {args.partitions}: Megatron's tool deals lines out to partitions, which changes "
            f"their order; write --workers alone, or --keep-sequential-samples too"
        )
    if args.legacy_tokenizer and kind not in (GPT2, "GPTSentencePieceTokenizer"):
        raise ValueError(
            f"--legacy-tokenizer: Megatron's old {kind} adds tokens, as <EOD> to end a document or <s> to "
            f"begin it; leave the flag out, or write GPTSentencePieceTokenizer to end with </s>"
        )


if __name__ == "__main__":
    main()
