"""Turn influence scores into a phase: its source weights, epoch caps and keep masks.

Prints a table and writes the YAML that tools/train.py merges.

python tools/make_mix.py MODEL.yaml RUN.yaml INFLUENCE.yaml mix.phase=second --output runs/x/mix.yaml
python tools/make_mix.py MODEL.yaml RUN.yaml INFLUENCE.yaml mix.phase=second mix.keep=true mix.max_epochs=4
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1 import config_io
from megatron_r1.mixture.files import table, write
from megatron_r1.mixture.mixture import make_mixture
from megatron_r1.system.terminal import tool_parser, user_errors


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("config", nargs="+", metavar="FILE.yaml|key=value", help="merged left to right")
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="default: RUN/mix.yaml")
    parser.add_argument("--check", action="store_true", help="print the table, write nothing")
    options = parser.parse_intermixed_args()
    with user_errors():
        config = config_io.load(options.config)
        mixture, used = make_mixture(config)
        print(table(mixture))
        if not options.check:
            output = options.output or Path(config.train.run) / "mix.yaml"
            write(mixture, used, config, output)
            masks = f" and its masks in {output.parent / 'keep'}" if mixture.masks else ""
            print(f"wrote {output}, {output.with_suffix('.json')}{masks}")


if __name__ == "__main__":
    main()
