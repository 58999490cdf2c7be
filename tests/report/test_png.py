"""Figures as PNG: what stands alone needs nothing from the page."""

import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_r1.report import load, page, png


def test_every_drawing_stands_alone(whole: Path) -> None:
    drawn = dict(png.drawings(page.all_figures(load.read_all(whole))))
    assert {"loss", "sources", "influence", "mixture", "heldout", "epochs"} <= set(drawn)
    for drawing in drawn.values():
        assert "var(" not in drawing
        ElementTree.fromstring(drawing)


def test_written_as_png_twice_the_size_of_the_page(whole: Path) -> None:
    reading = load.read_all(whole)
    drawn = dict(png.drawings(page.all_figures(reading)))
    written = png.write(reading)
    assert {path.stem for path in written} == set(drawn)
    for path in written:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        box = ElementTree.fromstring(drawn[path.stem]).attrib
        assert data.startswith(b"\x89PNG")
        assert (width, height) == pytest.approx((2 * float(box["width"]), 2 * float(box["height"])), abs=1)


def test_without_the_renderer_the_extra_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron_r1\[png\]'"):
        png.write(load.read_all(whole))
