"""The drawing functions against what is plain to see."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.report import palette, svg, words

LEAST_CONTRAST = 2.9
"""Of a curve against its ground; the accessibility guidelines ask 3 of graphics, and curves carry names."""


@given(st.floats(-1e3, 1e3), st.floats(1e-12, 1e12), st.integers(2, 10))
def test_ticks_are_round_and_within(shift: float, span: float, most: int) -> None:
    low, high = shift * span, (shift + 1) * span
    found = svg.ticks(low, high, most)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * span <= v <= high + 1e-6 * span for v in found)
    if len(found) > 2:
        step = (found[-1] - found[0]) / (len(found) - 1)
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3


@given(st.lists(st.floats(0, 100), max_size=6))
def test_spread_keeps_labels_apart_and_in_order(positions: list[float]) -> None:
    placed = svg.spread(positions, 14.0, 0.0, 100.0)
    ordered = sorted(placed)
    assert all(b - a >= 14.0 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert all(-1e-9 <= p <= 100 + 1e-9 for p in placed)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    assert [placed[i] for i in order] == ordered


def test_thin_keeps_the_spike_and_both_ends() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7_331] = (7_331.0, 9.0)
    kept = svg.thin(points, 100)
    assert len(kept) <= 110
    assert points[7_331] in kept and kept[0] == points[0] and kept[-1] == points[-1]


def test_smooth_keeps_a_line_and_skips_what_is_no_number() -> None:
    assert np.allclose(svg.smooth(np.full(20, 3.0), 4), 3.0)
    line = np.arange(20.0)
    assert np.allclose(svg.smooth(line, 3)[3:-3], line[3:-3])
    assert np.isfinite(svg.smooth([1.0, math.nan, 1.0], 1)).all()


def test_histogram_counts_what_lies_outside_in_the_whole_but_in_no_bin() -> None:
    shares = svg.histogram(np.array([-9.0, 0.5, 0.6, 1.5]), np.array([0.0, 1.0, 2.0]))
    assert shares.tolist() == [0.5, 0.25]


def test_text_and_attributes_are_escaped() -> None:
    drawn = svg.text(1, 2, 'a < b & "c"', style='"<x>"')
    node = ElementTree.fromstring(drawn)
    assert node.text == 'a < b & "c"' and node.get("style") == '"<x>"' and node.get("class") == "label"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (716_800, "717 k"),
        (2_655_936, "2.66 M"),
        (3.997e12, "4 T"),
        (999_700, "1 M"),
        (12.34, "12.3"),
    ],
)
def test_counts_read_in_three_figures(value: float, said: str) -> None:
    assert words.count(value).replace(words.SPACE, " ") == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.26, "0.3 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (88, "1 min 28 s"), (3_599.6, "1 h 00 min")],
)
def test_durations_round_up_into_the_next_unit(seconds: float, said: str) -> None:
    assert words.duration(seconds).replace(words.SPACE, " ") == said


def test_scores_of_any_size_keep_their_figures() -> None:
    assert words.compact(-0.0412) == "−0.0412"
    assert words.compact(3.14e-6) == "+3.1e−6"
    assert (words.power_of(2.7e-6), words.power(-6)) == (-6, "×10⁻⁶")
    assert words.signed(-0.0004) == "0.000"


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize(
    ("base", "shades"), [(palette.LIGHT, palette.LIGHT_SHADES), (palette.DARK, palette.DARK_SHADES)]
)
def test_every_colour_stands_out_from_the_card(
    base: dict[str, str], shades: dict[str, tuple[str, ...]]
) -> None:
    ground = luminance(base["card"])
    for color in [base["ink"], base["muted"], base["control"], *(c for s in shades.values() for c in s)]:
        low, high = sorted((ground, luminance(color)))
        assert (high + 0.05) / (low + 0.05) >= LEAST_CONTRAST, color


def test_a_source_has_one_colour_of_its_domain_and_a_capability_the_same_family() -> None:
    domains = {"a": "math", "b": "code", "c": "math", "d": "none"}
    colors = palette.source_colors(domains)
    assert len(set(colors.values())) == 4
    assert colors["a"] == palette.capability_colors(["math"])["math"] == "var(--orange-0)"
    assert colors["c"] == "var(--orange-1)"
