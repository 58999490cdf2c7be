"""Write a run's influence scores as one Parquet table: a row for each source, checkpoint and example.

python tools/export_scores.py runs/quickstart --output scores.parquet
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1.cli import tool_parser, user_errors
from megatron_r1.influence.export import write_parquet


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory that has been scored")
    parser.add_argument("--output", type=Path, metavar="FILE.parquet", help="default: RUN/influence.parquet")
    options = parser.parse_args()
    with user_errors():
        output = options.output or options.run / "influence.parquet"
        print(f"wrote {output}, {write_parquet(options.run, output):,} rows")


if __name__ == "__main__":
    main()
