"""Drawings and tables as PNG: what stands alone needs nothing from the page."""

import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_r1.report import load, page, png
from megatron_r1.report.figure import Figure
from megatron_r1.report.table import Cell, Table

SVG = "{http://www.w3.org/2000/svg}"


def test_every_drawing_and_table_stands_alone_under_its_title(whole: Path) -> None:
    seen = {}
    for figure in page.all_figures(load.read_all(whole)):
        for drawing in png.drawings(figure):
            assert "var(" not in drawing
            first = ElementTree.fromstring(drawing).find(f"{SVG}text")
            assert first is not None and first.text == figure.title
            seen[figure.anchor] = seen.get(figure.anchor, 0) + 1
    once = ("loss", "sources", "influence", "heat", "agreement", "mixture", "mixture-over-time", "epochs")
    assert seen == dict.fromkeys(once, 1) | {"heldout": 2, "measures": 1, "cost": 2}


def test_written_as_png_twice_the_size_of_the_page(whole: Path) -> None:
    reading = load.read_all(whole)
    drawn = {f.anchor: list(png.drawings(f)) for f in page.all_figures(reading)}
    written = png.write(reading)
    assert len({path.name for path in written}) == len(written) == sum(map(len, drawn.values()))
    for path in written:
        anchor, _, number = path.stem.partition("-2")
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        box = ElementTree.fromstring(drawn[anchor][1 if path.stem != anchor else 0]).attrib
        assert data.startswith(b"\x89PNG") and not number
        assert (width, height) == pytest.approx((2 * float(box["width"]), 2 * float(box["height"])), abs=1)


@pytest.fixture
def one(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """A report of this one figure."""
    figure = Figure("small", "A title", "What “it” shows.", tables=[Table(["a"], [[Cell("b")]])])
    monkeypatch.setattr(png, "all_figures", lambda reading: [figure])
    return figure


def test_the_file_carries_the_figures_sentences(whole: Path, one: Figure) -> None:
    image = pytest.importorskip("PIL.Image")
    (path,) = png.write(load.read_all(whole))
    with image.open(path) as opened:
        opened.load()
        assert (opened.text["Title"], opened.text["Description"]) == (one.title, one.lead)


def test_only_pictures_of_its_own_that_are_no_more_are_removed(whole: Path, one: Figure) -> None:
    (mine,) = png.write(load.read_all(whole))
    old, other = mine.with_name("no-such-figure.png"), mine.with_name("mine.png")
    old.write_bytes(mine.read_bytes())
    other.write_bytes(b"\x89PNG\r\n\x1a\n somebody else's")
    assert png.write(load.read_all(whole)) == [mine]
    assert sorted(path.name for path in mine.parent.iterdir()) == ["mine.png", "small.png"]


def test_a_table_says_the_same_in_the_page_and_in_its_drawing() -> None:
    row = [Cell("a<b", color="red"), Cell("+1", "± 2", shade=-0.5), Cell("25 %", bar=0.25)]
    table = Table(["name", "score", "share"], [row, [Cell("total"), Cell("3"), Cell("")]], total=True)
    page_says = list(ElementTree.fromstring(table.html()).itertext())
    drawing = ElementTree.fromstring(table.drawing())
    drawn = [said for column in zip(*[iter(drawing.iter("text"))] * 3, strict=True) for said in column]
    assert sorted("".join(t.itertext()) for t in drawn if "".join(t.itertext())) == sorted(
        ["name", "score", "share", "a<b", "+1± 2", "25 %", "total", "3"]
    )
    assert "".join(page_says) == "namescoresharea<b+1 ± 225 %total3"
    grounds = [r.get("style") for r in drawing.iter("rect")]
    assert grounds == ["fill:rgb(var(--negative));opacity:0.5", "fill:var(--grid)", "fill:var(--blue-0)"]
    bars = [float(r.get("width", 0)) for r in list(drawing.iter("rect"))[1:]]
    assert bars[1] == pytest.approx(bars[0] / 4, abs=0.1)


def test_without_the_renderer_the_extra_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron_r1\[png\]'"):
        png.write(load.read_all(whole))
