"""Numbers and lists as a reader says them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def count(value: float) -> str:
    """717 k, 2.66 M, 1.2 T: three figures at most."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_three(value / limit)} {unit}"
    return _three(value)


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
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


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


def minus(said: str) -> str:
    """A true minus sign."""
    return said.replace("-", "−")


def both(names: Sequence[str], last: str = "and") -> str:
    """a; a and b; a, b and c."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"
