"""What a user may have meant by a name that is not there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

_FEW = 16


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean gcide?`, or the known names, where they are few and none resembles the word."""
    known = list(known)
    found = difflib.get_close_matches(word, known, n=1)
    if found:
        return f"; did you mean {found[0]}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= _FEW else ""


def suggest_path(path: Path) -> str:
    """The same of a path that is not there: its first name that does not exist, replaced by one beside it."""
    for missing in (*reversed(path.parents), path):
        if not os.path.lexists(missing):
            break
    else:
        return ""
    try:
        beside = os.listdir(missing.parent)
    except OSError:
        return ""
    found = difflib.get_close_matches(missing.name, beside, n=3)
    rest = path.relative_to(missing)
    # Of several that resemble it, one in which the rest is there.
    whole = [missing.parent / name / rest for name in found]
    there = [candidate for candidate in whole if candidate.exists()]
    there += [missing.parent / name for name in found]
    return f"; did you mean {there[0]}?" if there else ""
