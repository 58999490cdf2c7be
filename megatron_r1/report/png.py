"""The report's drawn figures as PNG files, for slides and papers. Tables stay in the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.report import palette
from megatron_r1.report.figure import Figure
from megatron_r1.report.load import Reading
from megatron_r1.report.page import STYLE, all_figures
from megatron_r1.run_dir import RunDir, replacing

_SCALE = 2
"""Pixels of a PNG for each of the page."""
_MARGIN = 16
_FONTS = "Arial, Helvetica, 'DejaVu Sans', 'Liberation Sans', 'Noto Sans', sans-serif"
"""The renderer knows no system font by another name."""


def write(reading: Reading) -> list[Path]:
    """Write RUN/reports/ANCHOR.png of each figure drawn, numbered where a figure has several drawings.

    Raises ValueError where the extra `png` is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError("PNG needs the resvg_py package: pip install 'megatron_r1[png]'") from None
    directory = RunDir(reading.run.root).reports
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, drawing in drawings(all_figures(reading)):
        path = directory / f"{name}.png"
        with replacing(path) as stream:
            stream.write(bytes(svg_to_bytes(svg_string=drawing, zoom=_SCALE)))
        written.append(path)
    return written


def drawings(figures: list[Figure]) -> Iterator[tuple[str, str]]:
    """(name, SVG that stands by itself, in the light colours) of every drawing."""
    variables = palette.variables(palette.LIGHT, palette.LIGHT_SHADES)
    colour = dict(re.findall(r"--([\w-]+):([^;]+);", variables)) | {"font": _FONTS}
    rules = STYLE[STYLE.index("svg text{") : STYLE.index("@media screen")]
    for figure in figures:
        found = re.findall(r"<svg.*?</svg>", figure.body, flags=re.DOTALL)
        for number, drawing in enumerate(found, 1):
            left, top, width, height = map(float, re.search(r'viewBox="([^"]*)"', drawing)[1].split())  # type: ignore[index]
            box = (left - _MARGIN, top - _MARGIN, width + 2 * _MARGIN, height + 2 * _MARGIN)
            ground = "".join(f'{k}="{v:g}" ' for k, v in zip(("x", "y", "width", "height"), box, strict=True))
            inside = drawing[drawing.index(">") + 1 :]
            alone = (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{box[2]:g}" height="{box[3]:g}" '
                f'viewBox="{" ".join(f"{v:g}" for v in box)}"><style>{rules}</style>'
                f'<rect {ground}fill="var(--card)"/>{inside}'
            )
            alone = re.sub(r"var\(--([\w-]+)\)", lambda m: colour[m[1]], alone)
            yield f"{figure.anchor}{number if len(found) > 1 else ''}", alone
