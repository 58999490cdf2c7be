"""Write a run's report: one HTML page, readable offline, with every figure of the run and its control.

python tools/report.py runs/quickstart
python tools/report.py runs/quickstart --control runs/quickstart/control
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_r1.report import load, page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run directory; the page is RUN/reports/index.html"
    )
    parser.add_argument(
        "--control", type=Path, metavar="RUN", help="run to compare with (default: RUN/control)"
    )
    options = parser.parse_args()
    try:
        print(page.write(load.read_all(options.run, options.control)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
