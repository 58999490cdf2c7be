"""Write a run's report: one HTML page, readable offline, with the figures of the run and its control.

python tools/report.py runs/quickstart
python tools/report.py runs/quickstart --control runs/quickstart/control
python tools/report.py runs/quickstart --png
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1.report import load, page, png
from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; writes RUN/reports/index.html")
    parser.add_argument(
        "--control",
        type=Path,
        metavar="CONTROL_RUN",
        help="run to compare with (default: RUN/control, if any)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="MODEL",
        help="tokenizer that made the datasets, to show examples as text (default: RUN/tokenizer.*)",
    )
    parser.add_argument("--png", action="store_true", help="write figures as RUN/reports/*.png, too")
    parser.add_argument("--check", action="store_true", help="print the figures' first sentences, and exit")
    options = parser.parse_args()
    with user_errors():
        reading = load.read_all(options.run, options.control, options.tokenizer)
        if options.check:
            for figure in page.all_figures(reading):
                print(f"{figure.title}: {figure.lead}")
            return
        print(page.write(reading))
        for path in png.write(reading) if options.png else []:
            print(path)


if __name__ == "__main__":
    main()
