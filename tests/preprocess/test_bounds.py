"""Inputs of others are read in bounded memory, or refused in one line. Their folders are left alone."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.preprocess import documents, journal
from megatron_r1.preprocess.documents import open_input
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from tests.faults.inputs import DOCUMENTS, jsonl, plain_tokenizer, read
from tests.launch import ROOT

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
KIND = "HuggingFaceTokenizer"
MB = 1_000_000
GOOD = b'{"text": "good"}\n'
LONG = "word " * (MB // 5)
"""A text of the limit's length."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return plain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(inputs: Iterable[Path], prefix: Path, model: Path, **options: Any) -> str:
    """What was logged."""
    said: list[str] = []
    preprocess(list(inputs), prefix, KIND, model, log=said.append, seed=None, encoder="reference", **options)
    return "\n".join(said)


# Memory


def gz(path: Path, parts: Iterable[bytes]) -> None:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.writelines(parts)


def zst(path: Path, parts: Iterable[bytes]) -> None:
    with arrow.CompressedOutputStream(str(path), "zstd") as stream:
        for part in parts:
            stream.write(part)


def lines(*parts: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(b"".join(parts))


def table(text: Any, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        column = text() if callable(text) else text
        parquet.write_table(arrow.table({"text": column}), path, compression="zstd", **options)

    return write


def once(rows: int, text: str = LONG) -> Any:
    """A dictionary of one text, which all rows have."""
    return arrow.DictionaryArray.from_arrays(arrow.array(np.zeros(rows, np.int32)), arrow.array([text]))


def sparse(path: Path) -> None:
    path.write_bytes(GOOD + b'{"text": "')
    os.truncate(path, 20 * 10**9)


def saved(column: Callable[[], Any], **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(path)
        rows = arrow.table({"text": column()})
        with (
            arrow.OSFile(str(next(path.glob("*.arrow"))), "wb") as file,
            arrow.ipc.new_stream(file, rows.schema, options=arrow.ipc.IpcWriteOptions(**options)) as stream,
        ):
            stream.write_table(rows)

    return write


TOO_LONG = "document too long: {:,} bytes, more than --max-document-megabytes 1"
PAGE = "takes too much in row group 0: a page of 1 values and, unpacked, 33,000,0"
LINE = [b'{"text": "', *[b"a" * MB] * 20, b'"}\n']
BOMBS: dict[str, tuple[Callable[[Path], object], object]] = {
    "line.jsonl": (lines(*LINE, GOOD), [1, TOO_LONG.format(20 * MB + 13)]),
    "line.jsonl.gz": (lambda path: gz(path, [*LINE, GOOD]), [1, TOO_LONG.format(20 * MB + 13)]),
    "line.jsonl.zst": (lambda path: zst(path, [*LINE, GOOD]), [1, TOO_LONG.format(20 * MB + 13)]),
    "endless.jsonl": (sparse, "takes too much after line 0: a line of more than 6"),
    "endless.gz": (
        lambda path: gz(path, LINE[:1] + LINE[1:2] * 70),
        "takes too much after line 0: a line of",
    ),
    "blank.gz": (lambda path: gz(path, [GOOD, *[b"\n" * MB] * 5]), "1,048,576 bytes of blank lines"),
    "members.gz": (lines(gzip.compress(b"") * 3000, gzip.compress(GOOD)), [1]),
    "window.zst": (lines(b"\x28\xb5\x2f\xfd\x00", bytes([21 << 3]), b"\x01\0\0"), "too much memory"),
    "once.parquet": (table(lambda: once(200)), [200]),
    "once as text.parquet": (table(lambda: once(200).cast(arrow.string())), [200]),
    "once as view.parquet": (table(lambda: arrow.array([LONG] * 80, arrow.string_view())), [80]),
    "once as bytes.parquet": (table(lambda: once(200).cast(arrow.large_binary())), [200]),
    "once as json.parquet": (
        table(lambda: arrow.ExtensionArray.from_storage(arrow.json_(), once(200).cast(arrow.string()))),
        [200],
    ),
    "once fixed.parquet": (table(lambda: arrow.array([b"a" * MB] * 200, arrow.binary(MB))), [200]),
    "once long.parquet": (
        table(lambda: once(12, "a" * 20 * MB)),
        [0, *[TOO_LONG.format(20 * MB)] * 12],
    ),
    "prefixes.parquet": (
        table([LONG] * 200, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}),
        [200],
    ),
    "group.parquet": (
        table(lambda: [f"{LONG[: MB // 60]} {n}" for n in range(4000)], use_dictionary=False),
        [4000],
    ),
    "page.parquet": (table(["a" * 33 * MB], use_dictionary=False), PAGE),
    "dictionary.parquet": (table(lambda: once(9, "a" * 33 * MB)), PAGE),
    "values.parquet": (
        table(
            lambda: once(3 * MB, "a"),
            row_group_size=3 * MB,
            data_page_size=1 << 30,
            max_rows_per_page=1 << 30,
        ),
        "takes too much in row group 0: a page of 3,000,000 values",
    ),
    "list.parquet": (
        table(lambda: arrow.ListArray.from_arrays([0, 10 * MB], arrow.array(np.zeros(10 * MB, np.int8)))),
        [1],
    ),
    "packed": (saved(lambda: arrow.array(["a" * 200 * MB]), compression="zstd"), "it is packed"),
    "once": (saved(lambda: once(200)), "it has a column of type dictionary"),
    "long": (saved(lambda: arrow.array([LONG] * 30)), [30]),
}
"""Name -> what writes it, and the documents and refusals in it, or the message."""

READ = """
import json, resource, sys
from megatron_r1.preprocess.documents import Parquet, open_input
from megatron_r1.preprocess.rows import Refused
import pyarrow.parquet, datasets
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
for name in sys.argv[1:]:
    before = peak()
    try:
        source = open_input(name, 1_000_000)
        source.check(["text"])
        found = [0]
        for piece in source.pieces(0, ["text"], 0, source.size):
            refused = [row.reason for row in piece.rows if isinstance(row, Refused)]
            found[0] += len(piece.rows) - len(refused)
            found += refused
    except ValueError as error:
        found = str(error)
    print(json.dumps([name, found, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[object, int]]:
    """What reading each bomb gives in a process of 4 GB, and by how many MB its peak has grown."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, (write, _) in BOMBS.items():
        write(folder / name)
    # The order of sizes, since a peak hides smaller ones behind it.
    command = [sys.executable, "-c", READ, *(str(folder / name) for name in BOMBS)]
    limited = ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "bash", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = map(json.loads, done.stdout.splitlines())
    return {Path(name).name: (answer, grown) for name, answer, grown in found}


@pytest.mark.parametrize("name", BOMBS)
def test_an_input_is_read_in_bounded_memory_or_refused(answers, name):
    (answer, grown), expected = answers[name], BOMBS[name][1]
    if isinstance(expected, str):
        assert expected in str(answer)
        assert len(str(answer).splitlines()) == 1 and len(str(answer)) < 600
    else:
        assert answer == expected
    assert grown < 100


def test_a_document_beyond_the_limit_is_one_reject_with_its_place(tmp_path, model):
    texts = ["short", "x" * 990, "y" * 2000, "short again"]
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "in.parquet")
    source = jsonl(tmp_path / "in.jsonl", texts)
    for n, (name, size) in enumerate(((source, 2013), (tmp_path / "in.parquet", 2000))):
        out = tmp_path / f"out{n}"
        run([name], out, model, max_document_bytes=1003)
        [rejected] = map(json.loads, Path(f"{out}_text_document.side/rejects.jsonl").read_text().splitlines())
        reason = f"document too long: {size:,} bytes, more than --max-document-megabytes 0.001003"
        assert (rejected["line"], rejected["reason"]) == (3, reason)
        assert "yyy" in rejected["excerpt"] and len(rejected["excerpt"]) == 200
        assert read(out)[0]["rejected"] == {"document too long": 1}


def test_the_limit_is_part_of_the_request(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", [*DOCUMENTS, "x" * 2000])
    run([source], tmp_path / "out", model, max_document_bytes=1000)
    assert "already done" in run([source], tmp_path / "out", model, max_document_bytes=1000)
    with pytest.raises(ValueError, match=r"max_document_bytes \(1000 there, nothing here\)"):
        run([source], tmp_path / "out", model)
    run([source], tmp_path / "out", model, overwrite=True)
    assert read(tmp_path / "out")[0]["documents"] == len(DOCUMENTS) + 1
    with pytest.raises(ValueError, match=r"max_document_bytes \(None there, 1000 here\)"):
        run([source], tmp_path / "out", model, max_document_bytes=1000)


def test_a_tokenizer_is_not_trained_on_a_document_beyond_the_limit(tmp_path):
    pytest.importorskip("sentencepiece")
    source = jsonl(tmp_path / "in.jsonl", ["a" * 2000])
    with pytest.raises(ValueError, match=r"in\.jsonl:1: .*document too long: 2,013 bytes"):
        train_sentencepiece([source], tmp_path / "model", 300, max_document_bytes=1000)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("value", [b"[]", b"{}", b"1", b'{"a":1}'])
def test_a_line_of_many_values_is_one_reject_and_commas_in_texts_are_none(tmp_path, value):
    count = (1 << 20) + 1
    many, text = b'{"x":[' + b",".join([value] * count) + b"]}\n", b'{"text":"' + b'[,\\"{' * count + b'"}\n'
    (tmp_path / "in.jsonl").write_bytes(many + text + GOOD)
    source = open_input(tmp_path / "in.jsonl")
    first, second, third = (row for piece in source.pieces(0, ["text"], 0, source.size) for row in piece.rows)
    assert first.reason.startswith("too many values: ")
    assert (second, third) == (text, GOOD)


def test_lines_of_any_length_are_cut_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    rows = [b"x" * size + b"\n" for size in (0, 1, 62, 63, 64, 65, 127, 128, 200, 0, 0, 5)] + [b"last"]
    gz(tmp_path / "in.gz", rows)
    (tmp_path / "in.jsonl").write_bytes(b"".join(rows))
    for name in ("in.gz", "in.jsonl"):
        source = open_input(tmp_path / name)
        assert [row for p in source.pieces(0, ["text"], 0, source.size) for row in p.rows] == rows
    source = open_input(tmp_path / "in.jsonl")
    for cut in range(source.size):
        parts = [source.pieces(0, ["text"], *span) for span in ((0, cut), (cut, source.size))]
        assert [row for part in parts for piece in part for row in piece.rows] == rows


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "", None, 3, "a/b"])
def test_a_saved_dataset_names_files_of_its_own_folder(tmp_path, name):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match=r"state\.json names .*, which is no name of a file"):
        open_input(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}', ""]
)
def test_a_state_of_others_is_one_line(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json") as raised:
        open_input(tmp_path)
    assert len(str(raised.value)) < 500


# Folders


def interrupted(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An input, and the prefix of a run over it that has left its journal."""
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 4)
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    source, out = jsonl(folder / "in.jsonl", [*DOCUMENTS, "", ""]), folder / "out"
    with pytest.raises(ValueError, match="more than 1 documents rejected"):
        run([source], out, model, reject_limit=1)
    return source, out


COMMITS: list[Any] = [
    "[" * 100_000,
    "7",
    "{}",
    "[]",
    "[1,2,3]",
    "[1,[0,0,0,0],0,{},[0,0,0]]",
    "[1,[-1,0,0,0],0,{},[0,0,0,0]]",
    "[1,[0,0,0,0],-1,{},[0,0,0,0]]",
    "[true,[0,0,0,0],0,{},[0,0,0,0]]",
    '[1,["0",0,0,0],0,{},[0,0,0,0]]',
    '[1,[0,0,0,0],0,{"a":"b"},[0,0,0,0]]',
    "[1e99,[0,0,0,0],0,{},[0,0,0,0]]",
    "[1,[0,0,0,0],0,[],[0,0,0,0]]",
    f"[{10**30},[0,0,0,0],0,{{}},[0,0,0,0]]",
    "[1,[4,0,0,0],0,{},[0,0,0,0]]",
]


@pytest.mark.parametrize("commit", COMMITS, ids=range(len(COMMITS)))
def test_a_journal_of_others_is_begun_anew(tmp_path, model, monkeypatch, commit):
    source, out = interrupted(tmp_path, model, monkeypatch)
    path = tmp_path / "out.partial" / "journal"
    head = path.read_bytes().split(b"\n")[0]
    path.write_bytes(head + b"\n" + commit.encode() + b"\n")
    assert "going on" not in run([source], out, model)
    assert read(out)[0]["documents"] == len(DOCUMENTS)


@pytest.mark.parametrize("head", ["[]", "3", "{}", '{"inputs": 3}', "[" * 100_000, "\0" * 9])
def test_a_journal_without_a_request_is_begun_anew(tmp_path, model, monkeypatch, head):
    source, out = interrupted(tmp_path, model, monkeypatch)
    (tmp_path / "out.partial" / "journal").write_text(head + "\n")
    assert "going on" not in run([source], out, model)


def test_files_of_a_journal_that_contradict_each_other_are_told(tmp_path, model, monkeypatch):
    source, out = interrupted(tmp_path, model, monkeypatch)
    monkeypatch.setattr(journal, "_holds", lambda *_: True)
    lengths = tmp_path / "out.partial" / "0.lengths"
    lengths.write_bytes(b"\xff" * lengths.stat().st_size)
    with pytest.raises(
        ValueError, match=r"out\.partial is damaged and is removed; the same command begins anew"
    ):
        run([source], out, model)
    assert "going on" not in run([source], out, model)


def test_what_is_no_journal_is_refused_and_stays(tmp_path, model):
    source, work = jsonl(tmp_path / "in.jsonl", DOCUMENTS), tmp_path / "out.partial"
    precious = tmp_path / "precious"
    precious.write_text("kept")

    def folder(*names: str) -> None:
        work.mkdir()
        for name in names:
            (work / name).write_text("kept")

    def link(name: str) -> None:
        work.mkdir()
        (work / name).symlink_to(precious)

    cases: list[Callable[[], object]] = [
        lambda: folder("notes.txt"),
        lambda: folder("journal", "notes.txt"),
        lambda: folder("0.tokens.bak"),
        lambda: link("0.tokens"),
        lambda: link("journal"),
        lambda: (work.mkdir(), os.mkfifo(work / "0.lengths")),
        lambda: (work.mkdir(), (work / "0.tokens").mkdir()),
        lambda: work.symlink_to(tmp_path / "elsewhere", target_is_directory=True),
        lambda: work.write_text("kept"),
    ]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "journal").write_text("kept")
    for n, make in enumerate(cases):
        make()
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        with pytest.raises(
            ValueError, match=r"out\.partial (holds|is no folder).*, so it is not this tool's"
        ):
            run([source], tmp_path / "out", model)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
        assert precious.read_text() == "kept"
        work.rename(tmp_path / f"case{n}")


@pytest.mark.parametrize("kind", ["text", "link", "folder", "pipe"])
def test_a_lock_of_others_is_refused_and_stays(tmp_path, model, kind):
    source, lock = jsonl(tmp_path / "in.jsonl", DOCUMENTS), tmp_path / "out.partial.lock"
    precious = tmp_path / "precious"
    precious.write_text("")
    make = {
        "text": lambda: lock.write_text("kept"),
        "link": lambda: lock.symlink_to(precious),
        "folder": lock.mkdir,
        "pipe": lambda: os.mkfifo(lock),
    }
    make[kind]()
    with pytest.raises(ValueError, match=r"out\.partial\.lock is no lock of this tool"):
        run([source], tmp_path / "out", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.partial.lock", "precious"]
    assert kind != "text" or lock.read_text() == "kept"


def test_a_users_file_with_a_former_name_of_ours_stays(tmp_path, model):
    source, mine = jsonl(tmp_path / "in.jsonl", DOCUMENTS), tmp_path / "out_text_rejects.jsonl"
    mine.write_text("kept")
    run([source], tmp_path / "out", model)
    assert mine.read_text() == "kept"


@pytest.mark.parametrize(
    "record",
    [
        '{"text": "a\\ud800"}',
        '{"\\ud800' + "k" * 10_000 + '": 1}',
        "{" + ",".join(f'"{n}": 0' for n in range(10_000)) + "}",
        '{"text": ' + "9" * 100_000 + "}",
        '{"text": {"\u001b[2J": "\\u0000"}}',
    ],
)
def test_a_reject_is_short_and_printable(tmp_path, model, record):
    (tmp_path / "in.jsonl").write_bytes(GOOD + record.encode() + b"\n")
    run([tmp_path / "in.jsonl"], tmp_path / "out", model)
    [line] = (tmp_path / "out_text_document.side" / "rejects.jsonl").read_bytes().splitlines()
    assert len(line) < 4000
    assert json.loads(line)["reason"].isprintable()
