"""Score examples of every source against capability directions at checkpoints of a run, or what is left.

torchrun --nproc-per-node 2 tools/compute_influence.py MODEL.yaml RUN.yaml INFLUENCE.yaml influence.examples=9
"""

from __future__ import annotations

import os

from megatron_r1 import config_io
from megatron_r1.influence.plan import estimate, examples_left, lay_plan
from megatron_r1.system.process import launch_number
from megatron_r1.system.terminal import is_first_rank, loading_torch, say, tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("config", nargs="+", metavar="FILE.yaml|key=value", help="merged left to right")
    parser.add_argument("--check", action="store_true", help="print what would be scored, and exit")
    parser.add_argument("--estimate", action="store_true", help="measure how long it takes here, and exit")
    parser.add_argument("--peak-tflops", type=float, help="estimate for other devices; H100, bf16: 989")
    parser.add_argument("--utilisation", type=float, help="share of the peak; default: 0.4")
    options = parser.parse_intermixed_args()
    with user_errors():
        if (options.peak_tflops, options.utilisation) != (None, None) and not options.estimate:
            raise ValueError("--peak-tflops and --utilisation are for --estimate; add it, or leave them out")
        if options.utilisation is not None and options.peak_tflops is None:
            raise ValueError("--utilisation is a share of --peak-tflops; add that, or measure without it")
        # torchrun says how many ranks there are; without it, one model copy is meant.
        ranks = launch_number("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else None
        if options.estimate:
            config = config_io.load(options.config)
            if options.peak_tflops is None:
                from megatron_r1.influence.score import measured_estimate

                line = measured_estimate(config, ranks or 1)
            else:
                devices = ranks or config.parallel.model_ranks()
                share = 0.4 if options.utilisation is None else options.utilisation
                line = estimate(config, devices, options.peak_tflops, share)
            if is_first_rank():
                print(line)
            return
        config, work = config_io.load_with(options.config, lambda config: lay_plan(config, ranks))
        if options.check:
            summary = f"steps {work.steps}: {work.summary()}; {examples_left(work):,} examples left"
            say(f"{config_io.dump(config)}\n{summary}", result=True)
        else:
            with loading_torch(config.train.run):
                from megatron_r1.influence.score import compute_influence
            compute_influence(config, work)


if __name__ == "__main__":
    main()
