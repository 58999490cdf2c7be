"""Wordings that several rooms share: a value shown, suggestions for a mistyped name, a missing package."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any


class RunBusyError(RuntimeError):
    """Another launch holds the run directory."""


_FEW, _MANY, _LONG = 16, 10_000, 200
"""Names that are listed, and names and characters of a word that are compared."""
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


@contextmanager
def rewording(message: Callable[[Any], str], *kinds: type[BaseException]) -> Iterator[None]:
    """Within, an error of these kinds, by default ValueError, becomes a ValueError with `message` of it.

    BaseException is for libraries in Rust, whose panics are no Exception. Interrupts stay themselves.
    """
    caught = kinds or (ValueError,)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except caught as error:
        raise ValueError(message(error)) from None


_SECRET = re.compile(
    r"key|token(?!s\b|iz)|secret|pass|pwd|credential|auth(?!ors?\b|ored)|bearer|dsn|cookie|jwt|webhook|private"
    r"|signature|(?<![a-z])(?:pw|pat|sas|sig)(?![a-z])",
    re.I,
)
"""In names of settings that keep others out."""
_IN_TEXT = re.compile(
    r"(?P<url>://)(?:(?=[^\s@]{0,300}+@)\S{1,300}(?=@)|[^\s/?#]{256}\S*)"
    rf"|(?P<name>(?:{_SECRET.pattern})[\w-]{{0,40}}[\"']?\s*[=:]\s*|\bbearer\s+"
    rf"|(?<!\S)--[\w-]{{0,40}}?(?:{_SECRET.pattern})[\w-]{{0,40}}\s+)(?:(?:basic|bearer|token)\s+)?"
    r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&}]+)"
    # What begins as the keys of hubs and clouds do.
    r"|\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA|eyJ)[\w.-]{16,}",
    re.I,
)
_FROM_ENVIRONMENT = re.compile(r"\$\{oc\.env:\w+\}")
HIDDEN = "(hidden)"


def hidden(value: Any, secret: bool = False) -> Any:
    """Settings for a file or a message: HIDDEN where a name looks like that of a key, or text holds one.

    Names of environment variables stay. `secret`: a name above says so for all that is below.
    """
    if isinstance(value, dict):
        secret |= "value" in value and any(_looks_secret(value.get(name)) for name in ("name", "key"))
        return {k: hidden(v, secret or _looks_secret(k)) for k, v in value.items()}
    if isinstance(value, list):
        # What follows `--api-key`, or `api_key` in a pair.
        pair = len(value) == 2
        flags = [False, *((pair or str(v)[:1] == "-") and _looks_secret(v) for v in value)]
        return [hidden(v, secret or flag) for v, flag in zip(value, flags, strict=False)]
    if isinstance(value, str) and value and not _FROM_ENVIRONMENT.fullmatch(value):
        return HIDDEN if secret else _IN_TEXT.sub(lambda m: f"{m['url'] or m['name'] or ''}{HIDDEN}", value)
    return HIDDEN if secret and isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _looks_secret(name: Any) -> bool:
    return isinstance(name, str) and bool(_SECRET.search(name))


def unhidden(settings: Any) -> Any:
    """Settings that were read back from a file with HIDDEN in it, without these: the environment has them."""
    if isinstance(settings, dict):
        return {k: unhidden(v) for k, v in settings.items() if v != HIDDEN}
    if isinstance(settings, list):
        return [unhidden(v) for v in settings if v != HIDDEN]
    return settings.replace(f"{HIDDEN}@", "") if isinstance(settings, str) else settings


def printable(text: str, keep: str = "") -> str:
    """Text for a terminal: control characters and others that print nothing, but those in `keep`, as escapes.

    A name of others may hold characters that clear the screen, or turn what follows around.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def brief(text: str, most: int = _MOST_SHOWN) -> str:
    """Foreign text without quotes, for a message: on one line, with its middle left out where it is long."""
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]}"
    return printable(text)


def closest(word: str, known: Iterable[str], n: int = 1) -> list[str]:
    """The `n` names that resemble a word most. Long words, which cost their length squared, resemble none."""
    known = list(islice(known, _MANY + 1))
    return difflib.get_close_matches(word, known, n) if len(word) <= _LONG and len(known) <= _MANY else []


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean gcide?`, or the known names, where they are few and none resembles the word."""
    known = list(known)
    if matches := closest(word, known):
        return f"; did you mean {matches[0]}?"
    return f"; known: {brief(', '.join(known))}" if 0 < len(known) <= _FEW else ""


def some(texts: Sequence[str], between: str = ", ", most: int = 12) -> str:
    """The first dozen of many texts."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more


def suggest_path(path: Path) -> str:
    """`; did you mean PATH?` for a missing path. The first name in it that does not exist is replaced by one
    beside it."""
    missing = next((part for part in (*reversed(path.parents), path) if not os.path.lexists(part)), None)
    if missing is None:
        return ""
    beside = list[str]()
    with suppress(OSError), os.scandir(missing.parent) as entries:
        beside = [entry.name for entry in islice(entries, _MANY)]
    matches = [missing.parent / name for name in closest(missing.name, beside, 3)]
    # Of several that resemble it, one in which the rest is there.
    complete = [match / path.relative_to(missing) for match in matches]
    best = [candidate for candidate in complete if candidate.exists()] + matches
    return f"; did you mean {best[0]}?" if best else ""


_HUB = re.compile(r"((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)@([A-Za-z0-9][\w.-]*)", re.ASCII)


def hub_name(name: str, missing: str) -> tuple[str, str]:
    """(ORG/NAME, REVISION) of a name on the Hugging Face hub, which needs a revision.

    Raises FileNotFoundError, which begins with `missing`, for any other. A mistyped path is thus never asked
    of the hub, and what is fetched is what was meant.
    """
    if match := _HUB.fullmatch(name):
        return match[1], match[2]
    rule = "a name on the Hugging Face hub needs its commit: ORG/NAME@COMMIT"
    raise FileNotFoundError(f"{missing} {name[:200]}{suggest_path(Path(name))} ({rule})")


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
    why = "is not UTF-8, so no record could name it; rename it"
    with rewording(lambda _: f"{brief(ascii(name))} {why}", UnicodeEncodeError):
        name.encode()
