"""Tables and Hugging Face datasets give the documents that JSONL gives; what cannot be read says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.provenance import read_provenance
from megatron_r1.preprocess import documents, rows
from megatron_r1.preprocess.documents import cut, open_input
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = [f"Document {i}: {'words and  spaces ' * (i % 7)}\n\tline {i * i}" for i in range(300)]


@pytest.fixture(scope="module")
def hub():
    """The library, kept from any hub."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hub):
    """The same documents in every form."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    dataset = hub.Dataset.from_dict({"n": list(range(300)), "text": TEXTS})
    dataset.save_to_disk(folder / "saved", num_shards=2)
    hub.DatasetDict({"train": dataset, "test": dataset.select([1, 2])}).save_to_disk(folder / "splits")
    (folder / "files").mkdir()
    parquet.write_table(dataset.data.table, folder / "files" / "train.parquet", row_group_size=70)
    train_sentencepiece([folder / "in.jsonl"], folder / "sp.model", vocab_size=330)
    return folder


def pair(folder: Path, name: str, source: str, **options) -> list[bytes]:
    prefix = folder / name
    model = folder / "sp.model"
    preprocess([source], prefix, "SentencePieceTokenizer", model, log=lambda line: None, **options)
    return [Path(f"{prefix}_text_document{e}").read_bytes() for e in (".bin", ".idx", ".side/docs.npy")]


@pytest.mark.parametrize("form", ["saved", "hf:saved", "hf:splits:train", "files/train.parquet", "hf:files"])
def test_every_form_gives_the_same_pair(folder, form, monkeypatch, hub, tmp_path):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(documents, "_ROWS_AT_ONCE", 64)
    name = form.replace(":", "-").replace("/", "-")
    source = f"hf:{folder}/{form[3:]}" if form.startswith("hf:") else str(folder / form)
    assert pair(folder, name, source) == pair(folder, "jsonl", str(folder / "in.jsonl"))
    assert read_provenance(folder / f"{name}_text_document").inputs == [source]


def test_saved_dataset_is_known_by_its_files(folder, capsys):
    said: list[str] = []
    options = {"log": said.append, "workers": 1}
    arguments = [folder / "saved"], folder / "again", "SentencePieceTokenizer", folder / "sp.model"
    sidecar = preprocess(*arguments, **options)[f"{folder / 'again'}_text_document"]
    files = open_input(folder / "saved").files
    assert len(files) == 2
    assert sidecar["inputs"][0]["bytes"] == sum(path.stat().st_size for path in files)
    preprocess(*arguments, **options)
    assert said[-1].startswith("already done")


@pytest.mark.parametrize("name", ["in.jsonl", "saved", "files/train.parquet"])
@pytest.mark.parametrize("count", [1, 3, 11, 400])
def test_parts_join_to_the_whole(folder, name, count, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 16)
    monkeypatch.setattr(documents, "_ROWS_AT_ONCE", 64)
    source = open_input(folder / name)
    found = []
    for index in range(count):
        [(lo, hi)] = cut([source], (index, count))
        for piece in source.pieces(0, ["text"], lo, hi):
            found += [rows.parse(row)["text"] for row in piece.rows]
    assert found == TEXTS


def test_broken_utf8_in_a_table_costs_one_row(folder, tmp_path):
    column = (
        arrow.array([b"good", b"b\xffd", b"fine"], arrow.binary()).cast(arrow.binary()).view(arrow.string())
    )
    parquet.write_table(arrow.table({"text": column}), tmp_path / "in.parquet")
    (tmp_path / "sp.model").write_bytes((folder / "sp.model").read_bytes())
    pair(tmp_path, "out", str(tmp_path / "in.parquet"))
    [rejected] = [json.loads(line) for line in (tmp_path / "out_text_document.side/rejects.jsonl").open()]
    assert (rejected["line"], rejected["reason"]) == (
        2,
        "invalid UTF-8 at byte 1 of 'text': invalid start byte",
    )
    assert read_provenance(tmp_path / "out_text_document").lines.tolist() != [2]


def test_broken_utf8_in_a_saved_dataset_costs_one_row(tmp_path, hub):
    texts = arrow.array([b"good", b"b\xffd", b"fine"], arrow.binary())
    strings = arrow.Array.from_buffers(arrow.string(), 3, texts.buffers())
    hub.Dataset(arrow.table({"text": strings})).save_to_disk(tmp_path / "saved")
    source = open_input(tmp_path / "saved")
    [piece] = source.pieces(0, ["text"], 0, source.size)
    assert [row["text"] for row in piece.rows] == [b"good", b"b\xffd", b"fine"]


LINES = [
    b'{"text": "a\\u00e9\\n\\"", "n": 12345678901234567890123, "x": 1e999}',
    b'{"text": "\\ud83d\\ude42", "text": "last"}',
    b'{"text": "\\ud800"}',
    b'{"text": NaN}',
    b'{"text": "\xc3\xa9"} ',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "\x01"}',
    b"[" * 2000 + b"]" * 2000,
    b'{"text": "\xff"}',
]


def verdict(line: bytes) -> str:
    try:
        return repr(rows.text_of(rows.parse(line), "text"))
    except ValueError as error:
        return str(error)


# A line, with some of its bytes struck out or replaced.
@settings(max_examples=200, deadline=None)
@given(
    line=st.sampled_from(LINES),
    edits=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255), st.booleans()), max_size=3),
)
def test_fast_reader_of_json_changes_no_verdict(line, edits):
    pytest.importorskip("orjson")
    data = bytearray(line)
    for place, byte, strike in edits:
        if place < len(data):
            data[place : place + 1] = b"" if strike else bytes([byte])
    fast = verdict(bytes(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "orjson", None)
        assert fast == verdict(bytes(data))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("splits", r"has several splits; give one of .*splits/train, .*splits/test"),
        ("files", r"is a folder without state\.json.*write hf:"),
        ("none.jsonl", r"input .*none\.jsonl does not exist"),
        ("hf:", r"write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIGURATION:SPLIT"),
        ("hf:a:b:c:d", r"write hf:NAME"),
    ],
)
def test_mistakes_say_what_to_write(folder, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_input(name if name.startswith("hf:") else folder / name)


@pytest.mark.parametrize("name", ["saved", "files/train.parquet"])
def test_missing_column_is_named(folder, name):
    with pytest.raises(ValueError, match=r"has no column 'body'; it has n, text: see --json-keys"):
        next(open_input(folder / name).pieces(0, ["body"], 0, 10))


def test_unknown_split_is_said(folder, monkeypatch, hub, tmp_path):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"hf:.*files:tset cannot be had from datasets: Unknown split"):
        open_input(f"hf:{folder}/files:tset")


def test_a_folder_that_is_not_there_is_never_asked_of_the_hub(hub, monkeypatch):
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    for name in ("hf:data/tokeniser", "hf:org/name:train", "hf:squad"):
        with pytest.raises(FileNotFoundError, match=rf"input {name}: no dataset at .*ORG/NAME@COMMIT"):
            open_input(name)


def test_a_name_on_the_hub_is_asked_for_its_revision(hub, monkeypatch):
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        raise ConnectionError("no hub here")

    monkeypatch.setattr(hub, "load_dataset", load)
    with pytest.raises(ValueError, match="hf:org/name@5f0a:sample:train cannot be had"):
        open_input("hf:org/name@5f0a:sample:train")
    assert asked == [(("org/name", "sample"), {"split": "train", "revision": "5f0a"})]
