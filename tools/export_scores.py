"""Write a run's influence scores as one Parquet table: a row for each source, checkpoint and example.

python tools/export_scores.py runs/quickstart --output scores.parquet
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1.influence.store import write_parquet
from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory that has been scored")
    parser.add_argument("--output", type=Path, metavar="FILE.parquet", help="default: RUN/influence.parquet")
    parser.add_argument("--check", action="store_true", help="print how many rows there are, and exit")
    options = parser.parse_args()
    with user_errors():
        output = options.output or options.run / "influence.parquet"
        rows = write_parquet(options.run, output, options.check)
        print(f"{'would write' if options.check else 'wrote'} {output}, {rows:,} rows")


if __name__ == "__main__":
    main()
