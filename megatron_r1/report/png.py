"""The report's drawings and tables as PNG files, for slides and papers. Texts stay in the page."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.report import palette
from megatron_r1.report.figure import Figure
from megatron_r1.report.load import Reading
from megatron_r1.report.page import STYLE, all_figures
from megatron_r1.report.svg import element, rect, text
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import replacing

_SCALE = 2
"""Pixels of a PNG for each of the page."""
_MARGIN = 20
_TITLE = 38
"""Room above a drawing for its figure's title."""
_TITLE_CHARACTER = 10.2
"""Width of an average character of the title."""
_FONTS = "Arial, Helvetica, 'DejaVu Sans', 'Liberation Sans', 'Noto Sans', sans-serif"
"""The renderer knows no system font by another name."""
_SIGNATURE = 8
_HEADER = _SIGNATURE + 25
"""Where the second chunk of a PNG file begins."""
_MAKER = b"iTXtSoftware\0\0\0\0\0megatron_r1 report"


def write(reading: Reading) -> list[Path]:
    """Write RUN/reports/ANCHOR.png of each figure: ANCHOR-2.png, and so on, where it has more drawings or
    tables. Its sentences are in the file's description. What earlier calls wrote and this one did not goes.

    Raises ValueError where the extra `png` is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError("PNG needs the resvg_py package: pip install 'megatron_r1[png]'") from None
    directory = RunDir(reading.run.root).reports
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in all_figures(reading):
        for number, drawing in enumerate(drawings(figure), 1):
            path = directory / f"{figure.anchor}{f'-{number}' if number > 1 else ''}.png"
            drawn = bytes(svg_to_bytes(svg_string=drawing, zoom=_SCALE))
            said = _MAKER, _words("Title", figure.title), _words("Description", figure.lead)
            with replacing(path) as stream:
                stream.write(drawn[:_HEADER] + b"".join(map(_chunk, said)) + drawn[_HEADER:])
            written.append(path)
    for path in set(directory.glob("*.png")) - set(written):
        with open(path, "rb") as stream:
            ours = _MAKER in stream.read(_HEADER + len(_MAKER) + 8)
        if ours:
            path.unlink()
    return written


def _words(keyword: str, said: str) -> bytes:
    return b"iTXt" + keyword.encode() + b"\0\0\0\0\0" + said.encode()


def _chunk(content: bytes) -> bytes:
    """Of a PNG file: length, type and data, checksum."""
    return (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")


def drawings(figure: Figure) -> Iterator[str]:
    """SVG that stands by itself, in the light colours, of each drawing and then each table of a figure."""
    variables = palette.variables(palette.LIGHT, palette.LIGHT_SHADES)
    colour = dict(re.findall(r"--([\w-]+):([^;]+);", variables)) | {"font": _FONTS}
    rules = STYLE[STYLE.index("svg text{") : STYLE.index("@media screen")] + "svg .title{font-size:18px}"
    drawn = re.findall(r"<svg.*?</svg>", figure.body, flags=re.DOTALL)
    for drawing in [*drawn, *(table.drawing() for table in figure.tables)]:
        width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', drawing)[0])
        width = max(width, _TITLE_CHARACTER * len(figure.title)) + 2 * _MARGIN
        height += _TITLE + 2 * _MARGIN
        left, top = -_MARGIN, -_TITLE - _MARGIN
        inside = drawing[drawing.index(">") + 1 : -len("</svg>")]
        alone = element(
            "svg",
            element("style", rules)
            + rect(left, top, width, height, "var(--card)")
            + text(0, 18 - _TITLE, figure.title, "panel title")
            + inside,
            xmlns="http://www.w3.org/2000/svg",
            width=width,
            height=height,
            viewBox=f"{left} {top} {width:g} {height:g}",
        )
        yield re.sub(r"var\(--([\w-]+)\)", lambda m: colour[m[1]], alone)
