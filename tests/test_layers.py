"""The house's rules about who may know whom (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = {
    **dict.fromkeys(("records", "config", "backend", "run_dir", "run_lock", "progress", "near"), 0),
    **dict.fromkeys(("config_io", "parallel", "cli"), 1),
    **dict.fromkeys(("launch_store", "stop_request", "cpu_products"), 0),
    **dict.fromkeys(("agreement", "checkpoint_files", "optimizer_shards", "retention"), 1),
    **dict.fromkeys(("data", "model", "optimizer", "checkpoint", "ledger"), 2),
    **dict.fromkeys(("train", "influence", "curation"), 3),
    **dict.fromkeys(("recipes", "report"), 4),
}


def imports(path: Path) -> Iterator[str]:
    """Rooms of megatron_r1 that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_r1":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_r1."):
            yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("megatron_r1."))


def test_imports_go_strictly_downward() -> None:
    broken = []
    for path in sorted((ROOT / "megatron_r1").rglob("*.py")):
        room = path.relative_to(ROOT / "megatron_r1").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for other in imports(path):
            if other not in ("_csrc", room) and FLOOR[other] >= FLOOR[room]:
                broken.append(f"{path.relative_to(ROOT)}: {room} (floor {FLOOR[room]}) imports {other}")
    assert broken == []


def test_only_backend_says_cuda() -> None:
    files = [*(ROOT / "megatron_r1").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    assert [p.name for p in files if "cuda" in p.read_text()] == ["backend.py"]


def test_config_and_data_plan_import_no_torch() -> None:
    for name in (
        "config.py",
        "config_io.py",
        "records.py",
        "data/blend.py",
        "data/indexed.py",
        "data/sources.py",
    ):
        tree = ast.parse((ROOT / "megatron_r1" / name).read_text())
        guarded = {n for node in ast.walk(tree) if isinstance(node, ast.If) for n in ast.walk(node)}
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if node not in guarded:
                assert not any(re.match(r"(torch|megatron)\b(?!_)", n) for n in names), (
                    f"{name} imports {names}"
                )


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [
        p.name for p in (ROOT / "megatron_r1").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    assert [room for room in rooms if room != "__init__.py" and room not in text] == []
