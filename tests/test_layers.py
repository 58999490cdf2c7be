"""The house's rules: which room may import which, how large rooms and files may be (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_r1"
FLOOR = {
    room: floor
    for floor, rooms in {
        1: ("config", "records", "backend", "system"),
        2: ("config_io", "parallel", "run", "model"),
        3: ("data", "checkpoint"),
        4: ("preprocess", "train", "influence"),
        5: ("mixture", "curation", "launch", "export"),
        7: ("report",),
    }.items()
    for room in rooms
}
TOP_LEVEL, IN_A_ROOM, LINES, SMALL, IMPORTS = 5, 12, 450, 5, 20
"""Most files at the top level and in a room, lines of a file, files below 60 lines, imports of one file."""
CODE = 12_830
"""Lines of code proper; a commit that adds to the product raises this by what it adds."""


@cache
def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.stat().st_size)


def module(path: Path) -> str:
    return ".".join(("megatron_r1", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


@cache
def _modules() -> set[str]:
    return {module(path) for path in files()}


def imports(path: Path) -> Iterator[str]:
    """Modules of megatron_r1 that a file imports, wherever in the file and also for types alone."""
    modules = _modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron_r1":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules or inner == "megatron_r1._csrc" else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("megatron_r1."))


def room(name: str) -> str:
    return name.split(".")[1]


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment, docstring or import."""
    text = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            assert isinstance(node, ast.stmt)
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(1 for n, line in lines if line and not line.startswith("#") and n not in left_out)


def test_imports_go_strictly_downward() -> None:
    broken = [
        f"{module(path)} (floor {FLOOR[room(module(path))]}) imports {other}"
        for path in files()
        for other in imports(path)
        if other != "megatron_r1._csrc"
        and room(other) != room(module(path))
        and FLOOR[room(other)] >= FLOOR[room(module(path))]
    ]
    assert broken == []


def test_no_file_imports_itself_over_others() -> None:
    graph = {module(path): set(imports(path)) for path in files()}
    reached = {name: set(others) for name, others in graph.items()}
    changed = True
    while changed:
        changed = False
        for others in reached.values():
            more = set().union(*(reached.get(other, set()) for other in others)) - others
            changed |= bool(more)
            others |= more
    assert [name for name, others in reached.items() if name in others] == []


def test_rooms_and_files_are_small() -> None:
    top = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(top) <= TOP_LEVEL
    held = Counter(
        path.parent.name for path in files() if path.parent != PACKAGE and path.name != "__init__.py"
    )
    assert {name: n for name, n in held.items() if n > IN_A_ROOM} == {}
    length = {module(path): len(path.read_text().splitlines()) for path in files()}
    assert {name: n for name, n in length.items() if n > LINES} == {}
    small = [name for name, n in length.items() if n < 60 and name != "megatron_r1"]
    assert len(small) <= SMALL, small


def test_no_file_imports_too_many_others() -> None:
    wide = {module(path): len(set(imports(path))) for path in files()}
    assert {name: n for name, n in wide.items() if n > IMPORTS} == {}


def test_code_stays_small() -> None:
    assert sum(map(code_lines, files())) <= CODE


def test_only_backend_says_cuda() -> None:
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert {p.parent.name for p in paths if "cuda" in p.read_text()} == {"backend"}


@pytest.mark.parametrize(
    "name", ["config.py", "config_io.py", "records.py", "system", "data", "mixture", "run"]
)
def test_plans_need_no_torch(name: str) -> None:
    paths = [PACKAGE / name] if name.endswith(".py") else sorted((PACKAGE / name).rglob("*.py"))
    for path in paths:
        # What a GPU, or a launch, is needed for.
        if path.name == "loader.py":
            continue
        tree = ast.parse(path.read_text())
        guarded = {n for node in ast.walk(tree) if isinstance(node, ast.If) for n in ast.walk(node)}
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if node not in guarded:
                assert not any(re.match(r"(torch|megatron)\b(?!_)", n) for n in names), (
                    f"{path} imports {names}"
                )


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.relative_to(PACKAGE).parts[0] for path in files() if path.name != "__init__.py"}
    assert [room for room in sorted(rooms) if room not in text] == []
