"""The one reader and writer of YAML. A value that readers of YAML do not agree on is refused, never guessed.

Plain scalars are null, true and false (also yes, no, on and off), decimal integers and numbers, and text:

    10  -3  2_000_000  0.1  4e-3  1.0e+3  .inf  .nan

`010`, `0x1F` and `1:30` are 8, 31 and 90 in YAML 1.1, and 10, 31 and text in YAML 1.2. They are refused.
A date is text. A key is text and stands in its mapping once. It needs quotes where YAML 1.1 reads something
else. The size of a text, and of what its aliases stand for, is limited before anything is made of it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from megatron_r1.system.errors import brief, hidden
from megatron_r1.system.files import regular

_WHOLE, _DIGITS = r"(?:0|[1-9][0-9]*(?:_[0-9]+)*)", r"[0-9]+(?:_[0-9]+)*"
_EXPONENT = r"(?:[eE][-+]?[0-9]+)"
_KINDS = {
    "null": "~|null|Null|NULL|",
    "bool": "|".join(f"{w}|{w.title()}|{w.upper()}" for w in ("true", "false", "yes", "no", "on", "off")),
    "int": f"[-+]?{_WHOLE}",
    "float": rf"[-+]?(?:{_WHOLE}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS}){_EXPONENT}?|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)",
    "unclear": rf"[-+]?(?:0[xXoObB][0-9a-fA-F_]+|[0-9][0-9_]*(?:\.[0-9_]*)?{_EXPONENT}?"
    r"|[0-9][0-9_]*(?::[0-9]+)+(?:\.[0-9_]*)?)",
    "timestamp": r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt \t].*)?",
    "merge": "<<",
}
"""Kind -> the plain scalars of it. The first that matches counts, and what matches none is text."""
_PLAIN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()))
_TAG = "tag:yaml.org,2002:"
MOST_BYTES = 256 << 10
"""Of a text. The largest configurations have some 20 kB; reading takes up to 15 s a MB."""
MOST_NODES, _NODE = 10_000, 100
"""Values and keys of a text, aliases followed. Text counts as another node for each `_NODE` characters."""
MOST_DEPTH, _LONGEST = 64, 4_000
"""Lists and mappings within one another; characters of a number. Python reads no integer of 4,301 digits."""


_SPLIT = "give it in several files, which are merged"


class YamlError(ValueError):
    """A mistake in a text of YAML, in one line with its file and line."""


@dataclass(frozen=True)
class Document:
    """The content of one text."""

    name: str
    tree: Any
    node: Node | None
    """Its root, which knows the lines."""

    def place(self, path: Sequence[str | int]) -> str | None:
        """`FILE, line N` of the key or item at the end of `path`; None where it leads out of the tree."""
        node, mark = self.node, None
        for part in path:
            if isinstance(node, MappingNode):
                # A key that was merged in stands before the mapping's own.
                pairs = [(key, value) for key, value in node.value if key.value == str(part)]
            elif isinstance(node, SequenceNode) and isinstance(part, int):
                pairs = [(item, item) for item in node.value[part : part + 1]]
            else:
                pairs = []
            if not pairs:
                return None
            mark, node = pairs[-1][0].start_mark, pairs[-1][1]
        return f"{self.name}, line {mark.line + 1}" if mark else self.name


def read_yaml(path: str | Path) -> Document:
    """The document in a file. Raises OSError, and YamlError for all that is wrong with its content."""
    try:
        with open(path, "rb", opener=regular) as file:
            content = file.read(MOST_BYTES + 1)
        # A file that is too long ends anywhere, and is refused for its length.
        text = content.decode("utf-8-sig", "strict" if len(content) <= MOST_BYTES else "replace")
    except UnicodeDecodeError as error:
        raise YamlError(f"{brief(str(path))}: not UTF-8 ({error.reason} at byte {error.start})") from None
    return parse_yaml(text, str(path), lines=True)


def parse_yaml(text: str, name: str, lines: bool = False) -> Document:
    """The document in a text. YamlError begins with `name`, and the line where `lines` is set."""
    name = brief(name)
    if len(text.encode(errors="replace")) > MOST_BYTES:
        raise YamlError(f"{name}: more than {MOST_BYTES:,} bytes of YAML; {_SPLIT}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Document(name, None if node is None else loader.construct_document(node), node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line if mark else 0, ", ".join(filter(None, (error.context, error.problem)))
    except ReaderError as error:
        line = text.count("\n", 0, error.position)
        problem = f"U+{error.character:04X} is no character of YAML"
    # A value may stand below its key.
    there = "\n".join(text.splitlines()[max(0, line - 3) : line + 1])
    if hidden(there) != there:
        way_out = "quote it (it looks like a secret)"
        problem = f"a value that is no YAML, or not the same to every reader; {way_out}"
    raise YamlError(f"{name}{f', line {line + 1}' if lines else ''}: {brief(problem, 400)}")


def format_yaml(tree: Any, **layout: Any) -> str:
    """Text that this module and readers of YAML 1.1 read back to an equal tree. `layout`: as of PyYAML."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, **layout)


def _kind(text: str) -> str:
    match = _PLAIN.fullmatch(text)
    return (match and match.lastgroup) or "str"


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str):
        super().__init__(text)
        self._nodes = self._level = 0
        """Nodes so far, aliases followed, and the level of the node that is read."""
        self._sizes: dict[Node, tuple[int, int]] = {}
        """Complete node -> its nodes and levels, aliases followed."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML, within the limits: nothing is constructed of a text that is beyond them."""
        event = self.peek_event()
        before = self._nodes
        self._level += 1
        if self._level > MOST_DEPTH:
            raise self._beyond(event)
        node: Any = super().compose_node(parent, index)
        if isinstance(event, AliasEvent):
            size, levels = self._sizes.get(node, (0, 0))
            if not levels:
                raise ConstructorError(None, None, "an alias stands in its own value", event.start_mark)  # type: ignore[arg-type]
            self._nodes += size
        else:
            parts = node.value if isinstance(node, SequenceNode) else ()
            parts = itertools.chain(*node.value) if isinstance(node, MappingNode) else parts
            levels = 1 + max((self._sizes[part][1] for part in parts), default=0)
            self._nodes += 1 + (len(node.value) // _NODE if isinstance(node, ScalarNode) else 0)
            self._sizes[node] = self._nodes - before, levels
        if self._nodes > MOST_NODES or self._level + levels > MOST_DEPTH + 1:
            raise self._beyond(event)
        self._level -= 1
        return node

    def _beyond(self, event: Any) -> ConstructorError:
        deep = f"nested too deep, more than {MOST_DEPTH} levels"
        large = f"more than {MOST_NODES:,} values and keys, aliases followed; {_SPLIT}"
        return ConstructorError(None, None, large if self._nodes > MOST_NODES else deep, event.start_mark)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode:
            return _TAG + (_kind(value) if implicit[0] else "str")
        return super().resolve(kind, value, implicit)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            problem, name = None, key.value
            if not isinstance(key, ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                problem = "a key is text"
                if isinstance(key, ScalarNode):
                    problem = f"the key {brief(name)} is not text to every reader of YAML; quote it"
            elif name in first:
                where = first[name]
                problem = f"the key {brief(name)} stands in line {where} already; a mapping has a key once"
            if problem:
                raise ConstructorError(None, None, problem, key.start_mark)
            first[name] = key.start_mark.line + 1
        return node

    def scalar(self, node: Any) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind in ("str", "timestamp", "merge"):
            return self.construct_scalar(node)
        text = brief(node.value) if isinstance(node, ScalarNode) else "a list or mapping"
        # A tag in the text itself may name another kind.
        if kind == "unclear" or not isinstance(node, ScalarNode) or kind != _kind(node.value):
            way_out = "write a decimal number without leading zeros, or quote it as text"
            problem = f"{text} is not the same number to every reader of YAML; {way_out}"
            raise ConstructorError(None, None, problem, node.start_mark)
        if len(node.value) > _LONGEST:
            problem = f"a number of more than {_LONGEST:,} characters"
            raise ConstructorError(None, None, problem, node.start_mark)
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


_Loader.yaml_constructors = {
    **{f"{_TAG}{kind}": _Loader.scalar for kind in (*_KINDS, "str")},
    **{f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"] for kind in ("seq", "map")},
    None: yaml.SafeLoader.yaml_constructors[None],
}


class _Dumper(yaml.SafeDumper):
    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """As a reader of YAML 1.1, and where that says text, as ours, so that both are kept from guessing."""
        theirs = super().resolve(kind, value, implicit)
        if kind is ScalarNode and implicit[0] and theirs == f"{_TAG}str":
            return _TAG + _kind(value)
        return theirs
