"""Train a run, or what is left of it.

torchrun --nproc-per-node 2 tools/train.py examples/models/tiny.yaml MORE.yaml train.micro_batch=4
"""

from __future__ import annotations

import os

from megatron_r1 import config_io
from megatron_r1.data.open import data_mistakes
from megatron_r1.system.files import sha256
from megatron_r1.system.process import keep_freed_memory
from megatron_r1.system.terminal import announce_torch, tool_parser, user_errors


def main() -> None:
    parser = tool_parser(
        __doc__, "75: no step for health.hang_seconds; the same command goes on from the last checkpoint."
    )
    parser.add_argument("config", nargs="+", metavar="FILE.yaml|key=value", help="merged left to right")
    parser.add_argument("--check", action="store_true", help="print what would be trained, and exit")
    options = parser.parse_intermixed_args()
    with user_errors():
        if not options.check:
            keep_freed_memory()
        # torchrun says how many ranks there are; without it, one model copy is meant.
        ranks = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
        config = config_io.load(options.config, also=lambda config: data_mistakes(config, ranks))
        if options.check:
            from megatron_r1.train.resume import summary

            print(summary(config))
        else:
            announce_torch(config.train.run)
            from megatron_r1.train.loop import train

            train(config, {word: sha256(word) for word in options.config if os.path.isfile(word)})


if __name__ == "__main__":
    main()
