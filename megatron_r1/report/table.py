"""A table as cells, from which both the page's HTML and a drawing for PNG are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape

from megatron_r1.report.svg import element, line, picture, rect, text, width_of

_ROW = 27.0
_GAP = 24.0
"""Between two columns of a drawing."""
_BAR = 150.0


@dataclass(frozen=True)
class Cell:
    """All of it is text. A row's first cell names the row."""

    said: str
    small: str = ""
    """Small print behind it."""
    color: str = ""
    """CSS colour of the words."""
    shade: float = 0.0
    """Opacity of the ground, in the colour of its sign: positive or negative."""
    bar: float | None = None
    """Share of a bar that is filled, drawn before the words."""
    kind: Literal["", "strong", "domain"] = ""
    """Bold, or muted and to the left."""

    @property
    def ground(self) -> str:
        return "positive" if self.shade >= 0 else "negative"

    def html(self, names: bool) -> str:
        aside = f" <small>{escape(self.small)}</small>" if self.small else ""
        style = f"color:{self.color}" if self.color else None
        if self.shade:
            style = f"background:rgb(var(--{self.ground}) / {abs(self.shade):.2f})"
        bar = ""
        if self.bar is not None:
            bar = f'<span class="bar"><i style="width:{100 * self.bar:.1f}%"></i></span>'
        return element(
            "th" if names else "td",
            f"{bar}{escape(self.said)}{aside}",
            scope="row" if names else None,
            class_="share" if bar else self.kind or None,
            style=style,
        )

    @property
    def width(self) -> float:
        return width_of(self.said) + width_of(self.small) + (0 if self.bar is None else _BAR + 10)

    def drawn(self, left: float, right: float, top: float, begins: bool) -> str:
        """In a drawing, between `left` and `right` with the room of half a gap on either side."""
        parts = []
        if self.shade:
            ground, wide = f"rgb(var(--{self.ground}))", right - left + _GAP - 3
            parts.append(rect(left - _GAP / 2, top + 1, wide, _ROW - 3, ground, opacity=abs(self.shade)))
        if self.bar is not None:
            parts.append(rect(left, top + 8, _BAR, 11, "var(--grid)"))
            parts.append(rect(left, top + 8, self.bar * _BAR, 11, "var(--blue-0)"))
        to_left = begins or self.kind == "domain"
        cls = self.kind or ("name" if begins else "label")
        style = f"fill:{self.color}" if self.color else None
        said = text(
            left if to_left else right, top + 18, self.said, cls, None if to_left else "end", style=style
        )
        if self.small:
            aside = element("tspan", escape(self.small), dx=6, class_="small")
            said = said.replace("</text>", f"{aside}</text>")
        return "".join([*parts, said])


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    cls: str = "numbers"
    """CSS class."""
    total: bool = False
    """The last row sums the others up."""

    def html(self) -> str:
        names = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.head)
        rows = []
        for number, row in enumerate(self.rows, 1):
            cells = "".join(cell.html(names=not column) for column, cell in enumerate(row))
            rows.append(
                element("tr", cells, class_="total" if self.total and number == len(self.rows) else None)
            )
        return (
            f'<div class="scroll"><table class="{self.cls}"><thead><tr>{names}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    def drawing(self) -> str:
        """SVG, as wide as the columns need."""
        columns = list(zip(*self.rows, strict=True))
        widths = [
            max(width_of(name), *(cell.width for cell in cells))
            for name, cells in zip(self.head, columns, strict=True)
        ]
        parts, left = [], 0.0
        bottom = _ROW * (1 + len(self.rows))
        for column, (name, cells, width) in enumerate(zip(self.head, columns, widths, strict=True)):
            right = left + width
            to_left = not column or cells[0].kind == "domain"
            parts.append(text(left if to_left else right, 18, name, "muted", None if to_left else "end"))
            parts += [c.drawn(left, right, _ROW * n, not column) for n, c in enumerate(cells, 1)]
            left = right + _GAP
        wide = left - _GAP
        strokes = [line(0, _ROW * n, wide, _ROW * n) for n in range(1, 1 + len(self.rows))]
        if self.total:
            strokes[-1] = line(0, bottom - _ROW, wide, bottom - _ROW, "axis")
        return picture(wide, bottom, [*strokes, *parts], "table")
