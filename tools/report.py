"""Write a run's report: one HTML page, readable offline, with the figures of the run and its control.

python tools/report.py runs/quickstart
python tools/report.py runs/quickstart --control runs/quickstart/control
python tools/report.py runs/quickstart --png --svg
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory; writes RUN/reports/index.html")
    add(
        "--control",
        type=Path,
        metavar="CONTROL_RUN",
        help="run to compare with (default: RUN/control, if any)",
    )
    add("--tokenizer", type=Path, metavar="MODEL", help="tokenizer that made the datasets, to show examples "
        "as text (default: RUN/tokenizer.*)")  # fmt: skip
    add("--png", action="store_true", help="write figures as RUN/reports/*.png, too")
    add("--svg", action="store_true", help="write figures as RUN/reports/*.svg, too")
    add("--check", action="store_true", help="print the figures' captions, and exit")
    options = parser.parse_args()
    with user_errors():
        try:
            from megatron_r1.report import load, page
        except ModuleNotFoundError as error:
            raise ValueError(f"a report needs {error.name}: pip install -e '.[report]'") from None
        report = page.Report(load.read_all(options.run, options.control, options.tokenizer))
        if options.check:
            for figure in report.figures:
                print(f"{figure.title}: {figure.caption}")
            return
        print(report.write())
        for kind in ("png", "svg"):
            for path in report.write_pictures(kind) if getattr(options, kind) else []:
                print(path)


if __name__ == "__main__":
    main()
