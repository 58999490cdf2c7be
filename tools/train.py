"""Train a run, or what is left of it.

torchrun --nproc-per-node 2 tools/train.py examples/models/tiny.yaml MORE.yaml train.micro_batch=4
"""

from __future__ import annotations

import argparse
import os

from megatron_r1 import config_io
from megatron_r1.cli import keep_freed_memory, user_errors
from megatron_r1.data.sources import data_mistakes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+", metavar="FILE.yaml|key=value", help="merged left to right")
    parser.add_argument("--check", action="store_true", help="print what would be trained, and exit")
    options = parser.parse_intermixed_args()
    with user_errors():
        # torchrun says how many ranks there are; without it, one model copy is meant.
        ranks = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
        config = config_io.load(options.config, also=lambda config: data_mistakes(config, ranks))
        if options.check:
            from megatron_r1.recipes.plan import summary

            print(summary(config))
        else:
            keep_freed_memory()
            from megatron_r1.train.loop import train

            train(config)


if __name__ == "__main__":
    main()
