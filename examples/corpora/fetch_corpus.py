"""Stream a corpus of corpora.yaml from the Hugging Face hub into an indexed dataset (.bin, .idx).

python examples/corpora/fetch_corpus.py openwebmath --tokenizer-type TikTokenizer \\
    --tokenizer-model tokenizer.model --workers 16

Rows are streamed into data/text/NAME/part_N.jsonl.gz, then tools/preprocess_data.py writes
data/tokens/NAME_text_document. Both go on where they were cut off. --max-rows N takes the first N rows, for
a trial; --dataset DIR reads the rows from a local dataset instead.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.config import check_names
from megatron_r1.system.terminal import user_errors
from megatron_r1.system.yaml_io import format_yaml, read_yaml

TABLE = Path(__file__).with_name("corpora.yaml")
ROOT = TABLE.parents[2]


def corpora() -> dict[str, dict[str, Any]]:
    """The table: name -> its entry."""
    table = read_yaml(TABLE).tree
    check_names(f"{TABLE}: corpus", table)
    return table


def document(row: dict[str, Any], columns: list[str]) -> str:
    """The text of a row. ValueError where a column is not there."""
    return "\n\n".join(text for column in columns for text in texts(row, column))


def texts(row: Any, path: str) -> Iterator[str]:
    """What lies at a.b.0.* in a row; nothing where a list is shorter or a value is null."""
    if not path:
        if row is not None:
            yield str(row)
        return
    head, _, rest = path.partition(".")
    if isinstance(row, list):
        chosen = row if head == "*" else row[int(head) : int(head) + 1]
        for item in chosen:
            yield from texts(item, rest)
    elif isinstance(row, dict) and head in row:
        yield from texts(row[head], rest)
    else:
        held = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"no column '{head}' (of '{path}') in a row with {held}; correct `text` in {TABLE}")


def stream(entry: dict[str, Any], local: str | None, first: int) -> Iterator[dict[str, Any]]:
    """Rows from number `first` on, never all of them on the disk."""
    import datasets

    parts = []
    for configuration in [None] if local else entry.get("configurations", [None]):
        name = local or entry["dataset"]
        parts.append(datasets.load_dataset(name, configuration, split=entry["split"], streaming=True))
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return iter(rows.skip(first))


def write_parts(
    entry: dict[str, Any], folder: Path, local: str | None, rows_per_part: int, max_rows: int | None
) -> list[Path]:
    """The corpus as JSON lines, a part at a time; a part that exists is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    request = json.dumps(
        {"dataset": local or entry["dataset"], "rows_per_part": rows_per_part, "max_rows": max_rows}
    )
    asked = folder / "request.json"
    if asked.exists() and asked.read_text() != request:
        raise ValueError(
            f"{folder} was begun with {asked.read_text()}, now it is {request}; remove it or go on as begun"
        )
    asked.write_text(request)
    done = folder / "complete"
    number = len(list(folder.glob("part_*.jsonl.gz")))
    if not done.exists():
        rows = stream(entry, local, number * rows_per_part)
        while True:
            left = rows_per_part
            if max_rows is not None:
                left = min(left, max_rows - number * rows_per_part)
            taken = list(itertools.islice(rows, max(0, left)))
            if not taken:
                break
            path = folder / f"part_{number:05d}.jsonl.gz"
            temporary = path.with_suffix(".tmp")
            with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=1) as file:
                for row in taken:
                    json.dump({"text": document(row, entry["text"])}, file, ensure_ascii=False)
                    file.write("\n")
            os.replace(temporary, path)
            number += 1
            print(f"{path}: {len(taken):,} rows", flush=True)
            if len(taken) < rows_per_part:
                break
        done.touch()
    return sorted(folder.glob("part_*.jsonl.gz"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    with user_errors():
        table = corpora()
    add("corpus", choices=list(table), help="a name in corpora.yaml")
    add("--tokenizer-type", required=True, help="as for tools/preprocess_data.py")
    add("--tokenizer-model", required=True, help="as for tools/preprocess_data.py")
    add("--output-dir", type=Path, default=Path("data"), help="default: %(default)s")
    add("--workers", type=int, default=1, help="processes that tokenize (default: %(default)s)")
    add("--rows-per-part", type=int, default=100_000, help="held in memory (default: %(default)s)")
    add("--max-rows", type=int, help="stop after so many rows")
    add("--reject-limit", type=int, default=100, help="stop beyond so many rows without a text (default: "
        "%(default)s)")  # fmt: skip
    add("--dataset", help="read a local dataset (a folder of files) instead of the hub")
    add("--overwrite", action="store_true", help="replace tokens of other rows or of another tokenizer")
    add("--check", action="store_true", help="print what would be fetched, and exit")
    options = parser.parse_args()
    entry = table[options.corpus]
    if options.check:
        print(format_yaml({options.corpus: entry}).rstrip())
        return
    with user_errors():
        folder = options.output_dir / "text" / options.corpus
        if options.rows_per_part < 1 or (options.max_rows is not None and options.max_rows < 1):
            raise ValueError("--rows-per-part and --max-rows must be positive")
        parts = write_parts(entry, folder, options.dataset, options.rows_per_part, options.max_rows)
        if not parts:
            raise ValueError(f"{options.dataset or entry['dataset']} has no rows")
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", *map(str, parts)]
    command += ["--output-prefix", str(options.output_dir / "tokens" / options.corpus), "--append-eod"]
    command += ["--tokenizer-type", options.tokenizer_type, "--tokenizer-model", options.tokenizer_model]
    command += ["--workers", str(options.workers), "--reject-limit", str(options.reject_limit)]
    command += ["--overwrite"] * options.overwrite
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
