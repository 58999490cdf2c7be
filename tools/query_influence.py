"""Score other capabilities by the projections that a run has stored, without its examples' passes.

torchrun --nproc-per-node 2 tools/query_influence.py MODEL.yaml RUN.yaml INFLUENCE.yaml \\
    influence.directions.law=data/probes/law --capabilities law --output runs/x/queries/law
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1 import config_io
from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("config", nargs="+", metavar="FILE.yaml|key=value", help="as for compute_influence")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="writes DIR/influence/")
    parser.add_argument("--capabilities", metavar="NAME,...", help="of influence.directions (default: all)")
    parser.add_argument("--check", action="store_true", help="print what would be asked, and exit")
    options = parser.parse_intermixed_args()
    with user_errors():
        config = config_io.load(options.config)
        from megatron_r1.influence.query import open_query, query_influence

        named: str | None = options.capabilities
        names = None if named is None else [name.strip() for name in named.split(",")]
        job = open_query(config, options.output, names)
        if options.check:
            asked, windows = ", ".join(job.work.influence.directions), job.work.probe_windows()
            examples = sum(len(part.example_N) for part in job.all_parts())
            print(
                f"{options.output}: {asked}, steps {job.work.steps}; {windows} probing windows pass at each, "
                f"{examples:,} stored projections are asked"
            )
        else:
            query_influence(job, options.output)


if __name__ == "__main__":
    main()
