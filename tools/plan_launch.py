"""Work out a launch on a laptop, before it costs a GPU hour: sizes, memory, time, data, checkpoints.

python tools/plan_launch.py examples/models/950m.yaml examples/pretrain/phase1.yaml \\
    examples/pretrain/phase2.yaml --gpus 168

Datasets need not be there where the recipe says their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.launch.paper import differences
from megatron_r1.launch.plan import GIB, Launch, plan_launch
from megatron_r1.launch.text import text
from megatron_r1.system.terminal import count, positive, tool_parser, user_errors


def sizes_of_teachers(config: Config) -> Mapping[str, tuple[int, float]]:
    if not any(phase.objective for phase in config.phases.values()):
        return {}
    from megatron_r1.distill.open import sizes

    return sizes(config)


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("config", nargs="+", metavar="FILE.yaml|key=value", help="merged left to right")
    add("--gpus", type=count, required=True, help="ranks of the launch")
    add("--rank", type=int, default=0, help="whose memory and first samples to tell (default: 0)")
    add("--mfu", type=float, default=0.4, help="share of the peak to assume (default: %(default)s)")
    add(
        "--peak-tflops",
        type=positive,
        default=989.0,
        help="of a GPU, dense bf16 (default: H100, %(default)s)",
    )
    add("--gpu-memory", type=positive, default=80.0, metavar="GIB", help="of a GPU (default: %(default)s)")
    add("--diff", choices=["paper"], help="list every difference from the paper's Tables 3, 4 and 5 instead")
    add("--check", action="store_true", help="leave out what builds the model: memory and first samples")
    options = parser.parse_intermixed_args()
    with user_errors():
        config = config_io.load(options.config)
        flops, memory = options.peak_tflops * 1e12, options.gpu_memory * GIB
        launch = Launch(options.gpus, options.rank, options.mfu, flops, memory)
        plan = plan_launch(config, launch, not (options.check or options.diff), sizes_of_teachers(config))
        if options.diff:
            print("\n".join(differences(config, options.gpus)) or "no difference from the paper")
        else:
            print(text(plan))


if __name__ == "__main__":
    main()
