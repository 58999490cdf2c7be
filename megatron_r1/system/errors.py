"""Wordings that several rooms share: a value shown, suggestions for a mistyped name, a missing package."""

from __future__ import annotations

import difflib
import importlib
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_FEW = 16
_MOST_SHOWN = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _MOST_SHOWN
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 16
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as Python writes it, for a message: at most some 200 characters, whatever the value.

    The cost is bounded, too: a small text of YAML may stand for a value of gigabytes.
    """
    try:
        text = _SHORT.repr(value[:_MOST_SHOWN] if isinstance(value, bytes) else value)
    except ValueError:  # Python writes no number of more than 4,300 digits.
        text = f"a {type(value).__name__} too long to write"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean gcide?`, or the known names, where they are few and none resembles the word."""
    known = list(known)
    if matches := difflib.get_close_matches(word, known, n=1):
        return f"; did you mean {matches[0]}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= _FEW else ""


def suggest_path(path: Path) -> str:
    """`; did you mean PATH?` for a missing path. The first name in it that does not exist is replaced by one
    beside it."""
    for missing in (*reversed(path.parents), path):
        if not os.path.lexists(missing):
            break
    else:
        return ""
    try:
        beside = os.listdir(missing.parent)
    except OSError:
        return ""
    matches = [missing.parent / name for name in difflib.get_close_matches(missing.name, beside, n=3)]
    # Of several that resemble it, one in which the rest is there.
    complete = [match / path.relative_to(missing) for match in matches]
    best = [candidate for candidate in complete if candidate.exists()] + matches
    return f"; did you mean {best[0]}?" if best else ""


def require(module: str, user: str, install: str = "") -> ModuleType:
    """Import `module` of an optional package, which `user` needs. ValueError: what to install.

    `install`: the argument of `pip install`, if it is not the package itself.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0]
        message = f"{user} needs the package {package} ({error}): pip install {install or package}"
        raise ValueError(message) from None


def require_utf8(name: str) -> None:
    """Raise ValueError for a name that is not UTF-8: sidecars, ledgers and manifests could not hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!a} is not UTF-8, so no record could name it; rename it") from None
