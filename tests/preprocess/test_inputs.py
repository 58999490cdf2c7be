"""A bad value is one reject. A file that cannot be read is one line that names it, before work is lost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.preprocess import documents, journal, rows
from megatron_r1.preprocess.documents import InputError, open_input
from megatron_r1.preprocess.encoder import Encoder
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.workers import encode_piece
from tests.faults.inputs import DOCUMENTS, jsonl, plain_tokenizer, read

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
KIND = "HuggingFaceTokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return plain_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(inputs, prefix, model, **options):
    """What was logged."""
    said: list[str] = []
    options = {"seed": None, "encoder": "reference", **options}
    preprocess(inputs, prefix, KIND, model, log=said.append, **options)
    return "\n".join(said)


def verdicts(source: Path, model: Path) -> tuple[list[int], list[tuple[int, str]], dict[str, int]]:
    """Lines of the documents, lines and reasons of the rejects, and what is skipped."""

    class Ones(Encoder):
        def encode_batch(self, texts, utf8):
            return np.ones(len(texts), np.int64), np.ones(len(texts), np.int64)

    from megatron_r1.preprocess.tokenizer import build_tokenizer

    given = open_input(source)
    given.check(["text"])
    good, bad, skipped = [], [], {}
    for piece in given.pieces(0, ["text"], 0, given.size):
        [encoded] = encode_piece(Ones(build_tokenizer(KIND, model)), piece, ["text"], False)
        good += encoded.origins["line"].tolist()
        bad += [(r["line"], r["reason"]) for r in encoded.rejects]
        skipped = {k: skipped.get(k, 0) + n for k, n in encoded.skipped.items()}
    return good, bad, {k: n for k, n in skipped.items() if n}


# Values


def broken(kind=None):
    """Three texts as `kind`, the second of which is no UTF-8."""
    as_bytes = {arrow.large_string(): arrow.large_binary(), arrow.string_view(): arrow.binary_view()}
    kind = kind or arrow.string()
    texts = arrow.array([b"first", b"brok\xffn", b"third"], arrow.binary())
    texts = texts.cast(as_bytes.get(kind, arrow.binary()))
    return arrow.Array.from_buffers(kind, 3, texts.buffers())


def in_dictionary(texts):
    return arrow.DictionaryArray.from_arrays(arrow.array([0, 1, 2], arrow.int32()), texts)


TEXTS = {
    "string": broken,
    "large string": lambda: broken(arrow.large_string()),
    "string view": lambda: broken(arrow.string_view()),
    "binary": lambda: arrow.array([b"first", b"brok\xffn", b"third"]),
    "dictionary": lambda: in_dictionary(broken()),
    "dictionary of large strings": lambda: in_dictionary(broken(arrow.large_string())),
    "chunks": lambda: arrow.chunked_array([broken(), broken().slice(0, 0)]),
    "json": lambda: arrow.ExtensionArray.from_storage(arrow.json_(), broken()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_utf_8_is_one_reject_in_any_column(tmp_path, model, name):
    parquet.write_table(arrow.table({"text": TEXTS[name]()}), tmp_path / "in.parquet")
    reason = "invalid UTF-8 at byte 4 of 'text': invalid start byte"
    assert verdicts(tmp_path / "in.parquet", model) == ([1, 3], [(2, reason)], {})


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ([None, "a"], "non-string text: 'text' is NoneType"),
        ([None, None], "non-string text: 'text' is NoneType"),
        ([7, 8], "non-string text: 'text' is number"),
        ([["a"], ["b"]], "non-string text: 'text' is list"),
        ([{"a": "b"}, None], "non-string text: 'text' is dict"),
        (lambda: arrow.ListArray.from_arrays([0, 1, 3], broken()), "non-string text: 'text' is list"),
        (lambda: arrow.StructArray.from_arrays([broken()], ["a"]), "non-string text: 'text' is dict"),
        (lambda: arrow.array([2**62, 0], arrow.timestamp("us")), "non-string text: 'text' is TimestampType"),
    ],
)
def test_a_value_that_is_no_text_is_one_reject(tmp_path, model, column, reason):
    column = column() if callable(column) else column
    parquet.write_table(arrow.table({"text": column}), tmp_path / "in.parquet")
    _, bad, _ = verdicts(tmp_path / "in.parquet", model)
    assert bad[0] == (1, reason)


# Lines


def test_blank_lines_and_marks_within_a_file_are_skipped_and_counted(tmp_path, model):
    mark = b"\xef\xbb\xbf"
    texts = [json.dumps({"text": text}).encode() for text in DOCUMENTS[:4]]
    blank = [b"", b"\r", b" \t", mark, mark + b"\r"]
    lines = [
        mark + texts[0],
        *blank,
        mark + texts[1],
        mark + mark + texts[2] + b"\r",
        b"bad",
        texts[3],
        b"",
        b" ",
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    good, [(line, _)], skipped = verdicts(tmp_path / "in.jsonl", model)
    assert (good, line) == ([1, 7, 8, 10], 9)
    assert skipped == {"blank line": 7, "byte order mark": 4}
    said = run([tmp_path / "in.jsonl"], tmp_path / "out", model)
    assert "skipped: 7 blank lines, 4 byte order marks" in said
    sidecar, _ = read(tmp_path / "out")
    assert (sidecar["skipped"], sidecar["documents"]) == (skipped, 4)


def both(line: bytes) -> tuple[str, str]:
    """The verdicts of orjson with the standard library behind it, and of the latter alone."""
    out = []
    for parser in (rows.orjson, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "orjson", parser)
            try:
                record = rows.parse(line)
                out.append(str(record and rows.text_of(record, "text")))
            except ValueError as error:
                out.append(str(error))
    return out[0], out[1]


def nested(depth: int, opening: str = "[", closing: str = "]", text: str = '"a"') -> bytes:
    return f'{{"n": {opening * depth}1{closing * depth}, "text": {text}}}'.encode()


VALUES = [
    *(
        f'"{text}"'
        for text in ("a", "\\ud83d\\ude42", "\\ud800", "\\udc00\\ud800", "\\u00e9", "[[[", '\\\\\\"', "\x01")
    ),
    *(
        "null",
        "true",
        "[]",
        "{}",
        "[1]",
        '["a"]',
        "0",
        "-0",
        "01",
        "1.",
        ".5",
        "+1",
        "1e5",
        "1e400",
        "-1e400",
    ),
    *("NaN", "Infinity", "-Infinity", "nan", "18446744073709551616", "9" * 400, "9" * 5000, "1,", "", " "),
]
LINES = [
    *(f'{{"text": {value}}}' for value in VALUES),
    *(f'{{"x": {value}, "text": "a"}}' for value in VALUES),
    *(
        '{"text": "a", "text": "b"}',
        '{"text": "a", "text": null}',
        '{"text": "a",}',
        '{"text": "a"} {}',
        "[]",
        "7",
    ),
    *(
        "\ufeff",
        "\ufeff{}",
        '\ufeff{"text": "a"}',
        '{"text": "a"}\x00',
        '\x0c{"text": "a"}',
        '\xa0{"text": "a"}',
    ),
]


@pytest.mark.parametrize("line", [line.encode() for line in LINES], ids=range(len(LINES)))
def test_parsers_agree(line):
    pytest.importorskip("orjson")
    fast, slow = both(line)
    assert fast == slow


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('{"a":[', "]}")])
@pytest.mark.parametrize(
    ("levels", "taken"), [(10, True), (900, True), (990, True), (1022, True), (1024, False), (3000, False)]
)
def test_parsers_agree_on_depth(opening, closing, levels, taken):
    pytest.importorskip("orjson")
    depth = levels // 2 if "[" in opening and "{" in opening else levels
    fast, slow = both(nested(depth, opening, closing))
    assert fast == slow
    assert fast.startswith("('a'") == taken, fast


def test_brackets_within_strings_are_no_levels():
    text = json.dumps('[{"\\' * 2000)
    assert both(nested(3, text=text))[1].startswith("('[{")


STRUCTURE = b'"\\[]{},:\n\r \xef\xbb\xbf\xff\x000e-Nu'


@settings(max_examples=150, deadline=None)
@given(
    line=st.sampled_from(
        [*(line.encode() for line in LINES), nested(1023), nested(1100), b'{"text": "\xc3\xa9\xff"}']
    ),
    edits=st.lists(
        st.tuples(
            st.integers(0, 60), st.sampled_from(b'"\\[]{},:\n\r \xef\xbb\xbf\xff\x000e-Nu'), st.booleans()
        ),
        max_size=4,
    ),
)
def test_parsers_agree_on_mutated_lines(line, edits):
    pytest.importorskip("orjson")
    data = bytearray(line)
    for place, byte, strike in edits:
        if place < len(data):
            data[place : place + 1] = b"" if strike else bytes([byte])
    fast, slow = both(bytes(data))
    assert fast == slow


# Files

PLAIN = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.jsonl", PLAIN)
    return data.getvalue()


def table(columns=None, names=("text",), **options) -> bytes:
    data = io.BytesIO()
    columns = columns or [DOCUMENTS]
    parquet.write_table(arrow.table([arrow.array(c) for c in columns], names=list(names)), data, **options)
    return data.getvalue()


def zstd(data: bytes) -> bytes:
    return arrow.Codec("zstd").compress(data, asbytes=True)


FILES = {
    "lfs.jsonl": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "lfs.parquet": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "gz.jsonl": (lambda: gzip.compress(PLAIN), r"name it \.gz"),
    "zst.json": (lambda: zstd(PLAIN), r"name it \.zst"),
    "gz.zst": (lambda: gzip.compress(PLAIN), r"name it \.gz"),
    "twice.jsonl.gz": (lambda: gzip.compress(gzip.compress(PLAIN)), r"packed by gzip"),
    "parquet.jsonl": (table, r"name it \.parquet"),
    "parquet.gz": (lambda: gzip.compress(table()), r"name it \.parquet"),
    "arrow.jsonl": (lambda: b"ARROW1\0\0", "Dataset.save_to_disk"),
    "a.jsonl.bz2": (lambda: bz2.compress(PLAIN), r"unpack it"),
    "a.jsonl.xz": (lambda: lzma.compress(PLAIN), r"unpack it"),
    "a.zip": (zipped, r"unpack it"),
    "utf16.jsonl": (lambda: PLAIN.decode().encode("utf-16-le"), "no text in UTF-8"),
    "holes.jsonl": (lambda: bytes(5000), "no text in UTF-8"),
    "plain.jsonl.gz": (lambda: PLAIN, "damaged"),
    "plain.jsonl.zst": (lambda: PLAIN, "damaged"),
    "empty.gz": (lambda: b"", "damaged"),
    "empty.zst": (lambda: b"", "damaged"),
    "cut.gz": (lambda: gzip.compress(PLAIN)[:-9], "damaged"),
    "cut.zst": (lambda: zstd(PLAIN)[:-9], "damaged"),
    "crc.gz": (lambda: gzip.compress(PLAIN)[:-8] + bytes(8), "damaged after line"),
    "tail.gz": (lambda: gzip.compress(PLAIN) + b"garbage", "damaged"),
    "tail.zst": (lambda: zstd(PLAIN) + b"garbage", "damaged"),
    "empty.parquet": (lambda: b"", "damaged"),
    "cut.parquet": (lambda: table()[:-20], "damaged"),
    "jsonl.parquet": (lambda: PLAIN, "damaged"),
    "encrypted.parquet": (lambda: b"PARE" + bytes(30) + b"PARE", "encrypted"),
    "other.parquet": (lambda: table(names=["body"]), "has no column 'text'; it has body"),
    "double.parquet": (lambda: table([DOCUMENTS, DOCUMENTS], ["text", "text"]), "has 2 columns 'text'"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named_and_nothing_is_left(tmp_path, model, name):
    write, message = FILES[name]
    (tmp_path / name).write_bytes(write())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=rf"^.*/{name}.*{message}"):
        run([jsonl(tmp_path / "good.jsonl", DOCUMENTS), tmp_path / name], out / "x", model)
    assert list(out.iterdir()) == [] or "damaged" in message


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or a device"):
        open_input(tmp_path / "pipe")


def test_a_star_stands_for_files_in_the_order_of_their_names(tmp_path):
    for name in ("b_10", "b_02", "a_01"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    texts = [str(tmp_path / f"{name}.jsonl") for name in ("b_02", "b_10")]
    found = [one.name for one in documents.open_inputs([f"{tmp_path}/b_*.jsonl", tmp_path / "a_01.jsonl"])]
    assert found == [*texts, str(tmp_path / "a_01.jsonl")]
    with pytest.raises(FileNotFoundError, match=r"c_\*\.jsonl does not exist"):
        documents.open_inputs([tmp_path / "c_*.jsonl"])
    with pytest.raises(ValueError, match=r"b_02\.jsonl is given twice"):
        documents.open_inputs([f"{tmp_path}/*2.jsonl", *texts])


def test_a_name_that_is_no_utf_8_is_refused_at_once(tmp_path, model):
    name = os.fsdecode(b"caf\xe9")
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    for inputs, prefix in (([tmp_path / name], tmp_path / "out"), ([source], tmp_path / name)):
        with pytest.raises(ValueError, match=r"caf\\udce9.* is not UTF-8"):
            run(inputs, prefix, model)
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_name_with_a_line_end_stays_one_line_of_its_records(tmp_path, model):
    source = jsonl(tmp_path / "a\nb.jsonl", [*DOCUMENTS, ""])
    run([source], tmp_path / "o\nut", model)
    [reject] = [json.loads(line) for line in (tmp_path / "o\nut_text_document.side/rejects.jsonl").open()]
    assert reject["file"] == str(source)
    assert run([source], tmp_path / "o\nut", model).startswith("already done")


@pytest.mark.parametrize("keys", [["text", "text"], ["a/b"], [""], ["a\nb"], ["k" * 101], ["../text"]])
def test_keys_that_cannot_be_file_names_are_refused(tmp_path, model, keys):
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match=r"^--json-keys"):
        run([source], tmp_path / "out", model, json_keys=keys)
    assert sorted(tmp_path.iterdir()) == [source]


# What is kept


def damaged_page(path: Path) -> None:
    """Row group 10 of 20 loses its page."""
    parquet.write_table(
        arrow.table({"text": [f"document {i}" for i in range(400)]}),
        path,
        compression="snappy",
        row_group_size=20,
        use_dictionary=False,
    )
    column = parquet.ParquetFile(path).metadata.row_group(10).column(0)
    with open(path, "r+b") as stream:
        stream.seek(column.data_page_offset + column.total_compressed_size - 30)
        stream.write(b"\xff" * 30)


def test_work_before_a_damaged_input_is_kept_until_that_is_mended(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 4)
    first, last = (jsonl(tmp_path / f"{name}.jsonl", [*DOCUMENTS, ""]) for name in "ac")
    # The sample for the choice of the encoder reads the first rows.
    monkeypatch.setattr(documents, "_ROWS_AT_ONCE", 16)
    middle, out = tmp_path / "b.parquet", tmp_path / "out"
    damaged_page(middle)
    inputs = [first, middle, last]
    match = rf"b\.parquet is damaged in row group 10: .*; {out}\.partial keeps"
    for _ in range(2):
        with pytest.raises(InputError, match=match):
            run(inputs, out, model, workers=2)
    parquet.write_table(arrow.table({"text": DOCUMENTS[:5]}), middle)
    said = run(inputs, out, model)
    assert "going on after 4 pieces" in said
    run(inputs, tmp_path / "whole", model)
    for ending in ("bin", "idx", "side/docs.npy", "json"):
        assert (
            Path(f"{out}_text_document.{ending}").read_bytes()
            == Path(f"{tmp_path}/whole_text_document.{ending}").read_bytes()
        )


def test_work_before_a_damaged_input_is_kept_until_that_is_left_out(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 4)
    sources = [jsonl(tmp_path / f"{name}.jsonl", ["", *DOCUMENTS]) for name in "acd"]
    packed, out = tmp_path / "b.jsonl.gz", tmp_path / "out"
    # Its beginning can be read, and fills pieces of its own.
    monkeypatch.setattr(documents, "PIECE_BYTES", 400)
    packed.write_bytes(gzip.compress(PLAIN * 20)[:-9])
    with pytest.raises(InputError, match=r"b\.jsonl\.gz is damaged after line \d+: .*keeps"):
        run([sources[0], packed, *sources[1:]], out, model)
    assert "going on after" in run(sources, out, model)
    run(sources, tmp_path / "whole", model)
    assert (
        Path(f"{out}_text_document.bin").read_bytes()
        == Path(f"{tmp_path}/whole_text_document.bin").read_bytes()
    )
    assert read(out)[0]["rejected"] == {"empty document": 3}


def test_a_journal_goes_on_from_any_commit_that_its_files_hold(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 4)
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    source, out = jsonl(tmp_path / "in.jsonl", [*DOCUMENTS, "", ""]), tmp_path / "out"
    with pytest.raises(ValueError, match="more than 1 documents rejected"):
        run([source], out, model, reject_limit=1)
    os.truncate(
        tmp_path / "out.partial" / "0.tokens", (tmp_path / "out.partial" / "0.tokens").stat().st_size - 1
    )
    assert "going on after 2 pieces" in run([source], out, model)
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    run([source], tmp_path / "whole", model)
    assert read(out)[1] == read(tmp_path / "whole")[1]


def test_a_key_that_is_nowhere_leaves_nothing(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", [str(i) for i in range(200)])
    with pytest.raises(ValueError, match=r"more than 100 documents rejected for key 'txt'.*there is 'text'"):
        run([source], tmp_path / "out", model, json_keys=["txt"])
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_dataset_of_another_request_is_not_replaced(tmp_path, model):
    one, other = (jsonl(tmp_path / f"{name}.jsonl", DOCUMENTS[n:]) for n, name in enumerate(("one", "other")))
    run([one], tmp_path / "out", model)
    first = read(tmp_path / "out")
    for inputs, options, what in (
        ([other], {}, r"input .*one\.jsonl \(there\), input .*other\.jsonl \(here\)"),
        ([one, other], {}, r"input .*other\.jsonl \(here\)"),
        ([one], {"seed": 3}, r"seed \(None there, 3 here\)"),
        ([one], {"append_eod": True}, r"append_eod \(False there, True here\)"),
    ):
        for check in (False, True):
            with pytest.raises(ValueError, match=rf"{what}.*--overwrite"):
                run(inputs, tmp_path / "out", model, check=check, **options)
    assert read(tmp_path / "out") == first
    run([other], tmp_path / "out", model, overwrite=True)
    assert read(tmp_path / "out")[0]["documents"] == len(DOCUMENTS) - 1
    sidecar = tmp_path / "out_text_document.json"
    whole = sidecar.read_text()
    for damage in ("", "{}", '{"inputs": [3]}'):
        sidecar.write_text(damage)
        with pytest.raises(ValueError, match=r"out_text_document\.json is damaged.*--overwrite"):
            run([other], tmp_path / "out", model)
    sidecar.write_text(whole)
    # The same request brings its dataset up to date.
    jsonl(other, DOCUMENTS[3:])
    run([other], tmp_path / "out", model)
    assert read(tmp_path / "out")[0]["documents"] == len(DOCUMENTS) - 3
