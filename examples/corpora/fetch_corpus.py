"""Stream a corpus of corpora.yaml from the Hugging Face hub into an indexed dataset (.bin, .idx).

python examples/corpora/fetch_corpus.py openwebmath --tokenizer-type TikTokenizer \\
    --tokenizer-model tokenizer.model --workers 16

Rows are streamed into data/text/NAME/part_N.jsonl.gz, then tools/preprocess_data.py writes
data/tokens/NAME_text_document. Both go on where they were cut off. All parts are of one commit of the
dataset, which request.json beside them names. --max-rows N takes the first N rows, for a trial; --dataset DIR
reads the rows from a local dataset instead.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_r1.preprocess.auto_tokenizer import first_line
from megatron_r1.system.errors import hub_name, shown, suggest_path
from megatron_r1.system.fields import check_names
from megatron_r1.system.files import replacing, write_json, write_text
from megatron_r1.system.json_io import read_object
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


def pinned(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the commit that its revision stands for now. Asks the hub, unless it is a commit."""
    name, revision = hub_name(entry["dataset"], f"{TABLE}: no dataset")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        import huggingface_hub

        with _asking(f"the commit of {entry['dataset']}"):
            revision = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    return {**entry, "dataset": f"{name}@{revision}"}


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """An error of the hub, of whatever type, as one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be had from the hub: {first_line(error)}") from None


def stream(entry: dict[str, Any], local: str | None, first: int) -> Iterator[dict[str, Any]]:
    """Rows from number `first` on, never all of them on the disk."""
    import datasets

    parts = []
    name, revision = (local, None) if local else hub_name(entry["dataset"], "no dataset")
    with _asking(local or entry["dataset"]):
        for configuration in [None] if local else entry.get("configurations", [None]):
            given = {"split": entry["split"], "revision": revision, "streaming": True}
            parts.append(datasets.load_dataset(name, configuration, **given))
        rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        yield from rows.skip(first)


def write_parts(
    entry: dict[str, Any], folder: Path, local: str | None, rows_per_part: int, max_rows: int | None
) -> list[Path]:
    """The corpus as JSON lines, a part at a time. A part that exists is whole and on the disk.

    The first call notes the commit of the dataset, and later ones read that commit.
    """
    if local and not Path(local).is_dir():
        raise FileNotFoundError(f"--dataset {local}: no folder there{suggest_path(Path(local))}")
    request = {"dataset": local or entry["dataset"], "rows_per_part": rows_per_part, "max_rows": max_rows}
    asked, done = folder / "request.json", folder / "complete"
    begun = read_object(asked) if asked.exists() else None
    if begun is None:
        begun = {**request, "commit": local or pinned(entry)["dataset"]}
        write_json(asked, begun)
    if {**request, "commit": begun.get("commit")} != begun:
        raise ValueError(
            f"{folder} was begun with {shown(begun)}, now it is {shown(request)}; remove it or go on as begun"
        )
    entry = {**entry, "dataset": str(begun["commit"])}
    found = sorted(folder.glob("part_*.jsonl.gz"))
    if found != (parts := [folder / f"part_{number:05d}.jsonl.gz" for number in range(len(found))]):
        raise ValueError(f"{folder} lacks a part before {found[-1].name}; remove {folder} and fetch again")
    if not done.exists():
        rows, full = stream(entry, local, len(parts) * rows_per_part), True
        while full:
            left, path = rows_per_part, folder / f"part_{len(parts):05d}.jsonl.gz"
            if max_rows is not None:
                left = min(left, max_rows - len(parts) * rows_per_part)
            if left <= 0 or (row := next(rows, None)) is None:
                break
            part = itertools.chain([row], itertools.islice(rows, left - 1))
            written = _write_part(path, part, entry["text"])
            parts.append(path)
            print(f"{path}: {written:,} rows", flush=True)
            full = written == rows_per_part
        write_text(done, "")
    return parts


def _write_part(path: Path, rows: Iterator[dict[str, Any]], columns: list[str]) -> int:
    """Write rows as packed JSON lines; how many."""
    written = 0
    with replacing(path) as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
        for row in rows:
            line = json.dumps({"text": document(row, columns)}, ensure_ascii=False) + "\n"
            packed.write(line.encode("utf-8", "surrogatepass"))
            written += 1
    return written


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
    add("--rows-per-part", type=int, default=100_000, help="in a file (default: %(default)s)")
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
