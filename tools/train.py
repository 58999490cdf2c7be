"""Train a run, or what is left of it.

torchrun --nproc-per-node 2 tools/train.py examples/models/tiny.yaml MORE.yaml train.micro_batch=4
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.open import OpenData, launched, open_data
from megatron_r1.system.files import sha256
from megatron_r1.system.process import keep_freed_memory, launch_number
from megatron_r1.system.terminal import loading_torch, say, tool_parser, user_errors
from megatron_r1.train.resume import summary, to_come

if TYPE_CHECKING:
    from megatron_r1.train.objective import PhaseTeacher


def open_for_training(config: Config) -> tuple[OpenData, list[str]]:
    """The datasets, and lines about the teachers of phases that are not over."""
    # torchrun says how many ranks there are; without it, one model copy is meant.
    ranks = launch_number("WORLD_SIZE", config.parallel.model_ranks())
    data = open_data(config, launched(), also=lambda _: config_io.check_world(config, ranks))
    if not distills(config := to_come(config)):
        return data, []
    from megatron_r1.distill.open import check

    mistakes, lines = check(config, data)
    if mistakes:
        raise config_io.ConfigError(mistakes)
    return data, lines


def distills(config: Config) -> bool:
    return any(phase.objective for phase in config.phases.values())


def open_teachers(config: Config, data: OpenData) -> Mapping[str, PhaseTeacher]:
    if not distills(config := to_come(config)):
        return {}
    from megatron_r1.distill.open import teachers

    return teachers(config, data)


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
        config, (data, lines) = config_io.load_with(options.config, open_for_training)
        if options.check:
            say("\n".join([summary(config, data), *lines]), result=True)
        else:
            with loading_torch(config.train.run):
                from megatron_r1.train.loop import train
            files = {word: sha256(word) for word in options.config if os.path.isfile(word)}
            train(config, files, data, open_teachers(config, data))


if __name__ == "__main__":
    main()
