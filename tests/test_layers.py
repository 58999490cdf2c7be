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
        0: ("system",),
        1: ("config", "records", "backend"),
        2: ("config_io", "parallel", "run", "model"),
        3: ("data", "checkpoint"),
        4: ("preprocess", "train", "influence"),
        5: ("mixture", "launch", "export"),
        6: ("curation", "distill"),
        7: ("report",),
    }.items()
    for room in rooms
}
TOP_LEVEL, IN_A_ROOM, LINES, SMALL, IMPORTS = 5, 12, 450, 5, 20
"""Most files at the top level and in a room, lines of a file, files below 60 lines, imports of one file."""
CODE = 16_725
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


def test_only_decontamination_reads_gold_answers() -> None:
    """Whatever trains, scores, mixes or samples never sees their text."""
    readers = {
        module(path) for path in files() for other in imports(path) if other == "megatron_r1.data.gold"
    }
    may = {"megatron_r1.curation.decontaminate", "megatron_r1.curation.request"}
    assert readers - may == set()
    assert (PACKAGE / "data" / "gold.py").exists()


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


READERS = {
    "json.load": {"system/json_io.py"},
    "orjson.loads": {"preprocess/rows.py"},
    "yaml.": {"system/yaml_io.py"},
    "marshal.load": {"backend/core_on_cpu.py"},
    "pickle.load": set(),
    "torch.load": set(),
    "numpy.load": set(),
    "numpy.lib.format.read_array": set(),
}
"""How the name of a function begins that reads content of others -> the files that may use it. A `torch.load`
with weights_only=True is none."""


def readers(text: str) -> set[str]:
    """Of `READERS`, those that a file uses, by whatever name it imports them."""
    names, found = {}, set()
    nodes = list(ast.walk(ast.parse(text)))
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            of = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                whole = of + alias.name
                names[alias.asname or alias.name.split(".")[0]] = (
                    whole if alias.asname or of else alias.name.split(".")[0]
                )
    safe = {
        node.func
        for node in nodes
        if isinstance(node, ast.Call)
        and any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
    }
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Name) and node not in safe:
            first, dot, rest = ast.unparse(node).partition(".")
            found |= {begin for begin in READERS if f"{names.get(first, '')}{dot}{rest}".startswith(begin)}
    return found


def test_files_of_others_have_one_reader_a_format() -> None:
    paths = [*files(), *(ROOT / "tools").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    used = {path: readers(path.read_text()) for path in paths}
    broken = [
        f"{path} uses {begin}"
        for path, begins in used.items()
        for begin in begins
        if not (path.is_relative_to(PACKAGE) and str(path.relative_to(PACKAGE)) in READERS[begin])
    ]
    assert broken == []


@pytest.mark.parametrize(
    "text",
    [
        "import json\njson.loads(x)",
        "import json as j\nj.load(x)",
        "from json import loads as l\nl(x)",
        "import numpy as np\nnp.load(x)",
        "import numpy.lib.format as f\nread = f.read_array",
        "import pickle\nlist(map(pickle.loads, x))",
        "import torch\ntorch.load(x, weights_only=False)",
        "from yaml import safe_load\nsafe_load(x)",
    ],
)
def test_a_second_reader_is_found(text: str) -> None:
    assert readers(text)
    assert not readers("import json, torch\njson.dumps(torch.load(x, weights_only=True))")


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
