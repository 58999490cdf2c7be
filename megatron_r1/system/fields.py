"""Types of configuration fields with their limits, and what a name is. Read by pydantic."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Strict, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

T = TypeVar("T")
_NAME, _NAME_BYTES = re.compile(r"(?![.-])[\w.-]+"), 100


def name_mistakes(names: Iterable[str], reserved: Iterable[str] = ()) -> dict[str, str]:
    """Name -> why it cannot be a name, for those that cannot. All names that become paths or tags obey this.

    A name is one part of a path and the tag of a logger. Its characters are those that TensorBoard keeps.
    Names that a file system may take for one another are one name, as A and a, or two forms of an umlaut.
    """
    out: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        # Of a long text the other form takes a time that grows with its square.
        same = unicodedata.normalize("NFKC", name[:_NAME_BYTES]).casefold()
        if not _NAME.fullmatch(name):
            out[name] = "a name has letters, digits, '_', '-' and '.', and begins with no '-' and no '.'"
        elif len(name.encode()) > _NAME_BYTES:
            out[name] = f"a name has at most {_NAME_BYTES} bytes, this one {len(name.encode())}"
        elif name in reserved:
            out[name] = "the name of a column of exported scores; use another"
        elif same in seen:
            out[name] = f"some file systems take it for {seen[same]}, which is there, too; rename one"
        seen.setdefault(same, name)
    return out


def check_names(what: str, names: Iterable[str], reserved: Iterable[str] = ()) -> None:
    """Raise ValueError, which begins with `what` and the name, for the first that cannot be a name."""
    for name, why in name_mistakes(names, reserved).items():
        raise ValueError(f"{what} {name[:_NAME_BYTES]!r}: {why}")


def is_name(*reserved: str) -> AfterValidator:
    """A key that is a name. One that cannot be is an error of type "name"."""

    def check(name: str) -> str:
        for why in name_mistakes([name], reserved).values():
            raise PydanticCustomError("name", ": {why}", {"why": why})
        return name

    return AfterValidator(check)


def apart(mapping: dict[str, T]) -> dict[str, T]:
    """A mapping whose keys are names that every file system keeps apart."""
    for name, why in name_mistakes(mapping).items():
        raise PydanticCustomError("name", ".{name}: {why}", {"name": name, "why": why})
    return mapping


ByName = Annotated[dict[Annotated[str, is_name()], T], AfterValidator(apart)]


def limit(holds: Callable[[float], bool], message: str) -> WrapValidator:
    """A number's limit. A value beyond it is an error of type "limit", and 1 in the context "unlimited".

    Text and truth values are no numbers, though Python reads numbers from them.
    """

    def check(value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        number = read(value if type(value) in (int, float) else None)
        long = isinstance(number, int) and number.bit_length() > 63
        if not long and holds(number):
            return number
        if info.context == "unlimited":
            return 1
        why = "has more than 63 bits" if long else message
        raise PydanticCustomError("limit", "{message}", {"value": number, "message": why})

    return WrapValidator(check)


def _filled(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise PydanticCustomError("text", "{message}", {"value": text, "message": "names nothing"})
    return text


_EVALUATED = re.compile(r"\$\{(?!oc\.env:\w+\})[^}\"]{0,100}|_target_")


def plain_data(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that are data: nothing in them is evaluated, and no class or function is named."""
    if match := _EVALUATED.search(json.dumps(settings)):
        why = "would be evaluated; give the value itself, or ${oc.env:NAME} to take it from there"
        raise PydanticCustomError("text", "{message}", {"value": match[0], "message": why})
    return settings


PositiveInt = Annotated[int, limit(lambda v: v > 0, "must be positive")]
PositiveFloat = Annotated[float, limit(lambda v: 0 < v < math.inf, "must be positive and finite")]
Finite = Annotated[float, limit(math.isfinite, "must be finite")]
Share = Annotated[float, limit(lambda v: 0 <= v <= 1, "must be within 0 and 1")]
NaturalInt = Annotated[int, limit(lambda v: v >= 0, "must not be negative")]
Seed = Annotated[int, limit(lambda v: 0 <= v < 1 << 63, "must be at least 0 and below 2^63")]
AdamBeta = Annotated[float, limit(lambda v: 0 <= v < 1, "must be at least 0 and below 1")]
Coefficient = Annotated[float, limit(lambda v: 0 <= v < math.inf, "must be a finite number of at least 0")]
AT_LEAST_0 = limit(lambda v: v >= 0, "must be at least 0")
Epochs = Annotated[float, limit(lambda v: v > 0, "must be above 0")]
Truth = Annotated[bool, Strict()]
"""Not what pydantic reads as one besides: "true", "off", 0."""
Text = Annotated[str, AfterValidator(_filled)]
AT_LEAST_1 = limit(lambda v: v >= 1, "must be at least 1")


class Section:
    # Read by pydantic: a key that no field has is a mistake, never ignored.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (annotated, it would look like a field)
