"""Numbers and lists as a reader says them."""

from __future__ import annotations

import math
from collections.abc import Sequence

SPACE = "\u00a0"
"""Between a number and its unit: no line breaks there."""


def count(value: float) -> str:
    """717 k, 2.66 M, 1.2 T: three figures at most."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_three(value / limit)}{SPACE}{unit}"
    return _three(value)


def size(value: float) -> str:
    """Bytes in the greatest binary unit that leaves one before the point: 41 MiB, 1.2 GiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{_three(value / 1024**power)}{SPACE}{unit}"
    return f"{value:.0f}{SPACE}B"


def _three(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    said = f"{value:.{digits}f}"
    return said.rstrip("0").rstrip(".") if "." in said else said


def tick(value: float, step: float) -> str:
    """An axis number with just the digits that its neighbours' distance asks for; no `-0`."""
    if abs(value) < step / 2:
        return "0"
    if step and (abs(value) >= 1e5 or step < 1e-4):
        mantissa, power = f"{value:.1e}".split("e")
        return minus(f"{mantissa.removesuffix('.0')}e{int(power)}")
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 2
    return minus(f"{value:.{digits}f}")


def share(value: float) -> str:
    return percent(100 * value, 1)


def percent(value: float, digits: int = 0) -> str:
    return f"{value:.{digits}f}{SPACE}%"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours:,}{SPACE}h {minutes:02d}{SPACE}min"
    return f"{minutes}{SPACE}min {rest:02d}{SPACE}s" if minutes else f"{rest}{SPACE}s"


def hours(value: float) -> str:
    """Hours, to three figures, for a table."""
    return _three(value) if value >= 0.01 else "< 0.01"


def signed(value: float, digits: int = 3) -> str:
    """With a sign unless it rounds to 0."""
    said = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(said) == 0 else minus(said)


def compact(value: float) -> str:
    """A score of any size, with its sign: +12.3, −0.041, +3.1e-6."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        mantissa, power = f"{value:+.1e}".split("e")
        return minus(f"{mantissa}e{int(power)}")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return minus(f"{value:+.{digits}f}")


def power_of(most: float) -> int:
    """The power of ten to take out of numbers up to `most`; 0 where they read well as they are."""
    power = math.floor(math.log10(most)) if most > 0 and math.isfinite(most) else 0
    return 0 if -3 < power < 4 else power


def power(exponent: int) -> str:
    """×10⁻⁶"""
    return "×10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def digits_for(most: float) -> int:
    """Decimals that show three figures of the greatest number of a column."""
    return max(0, 2 - math.floor(math.log10(most))) if most > 0 and math.isfinite(most) else 2


def minus(said: str) -> str:
    """A true minus sign."""
    return said.replace("-", "−")


def many(number: int, noun: str) -> str:
    """1 step; 4,096 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def both(names: Sequence[str], last: str = "and") -> str:
    """a; a and b; a, b and c."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"
