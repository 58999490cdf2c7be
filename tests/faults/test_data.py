"""Inputs of preprocessing, curation and `--check` that end in wrong data, or in an unclear error.

Each test states the right value; the mark goes when it holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.faults.inputs import (
    DOCUMENTS,
    KIND,
    SPLIT,
    Tools,
    bin_bytes,
    jsonl,
    line_of,
    pair,
    plain_tokenizer,
    read,
    run_words,
)
from tests.launch import ROOT


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return plain_tokenizer(tmp_path / "tokenizer")


def test_verdicts_are_the_same_with_and_without_orjson(plain: Path, tmp_path: Path) -> None:
    depths = (10, 1005, 3000)
    source = jsonl(tmp_path / "deep.jsonl", ["flat"])
    with open(source, "a") as stream:
        stream.writelines(f'{{"text":"deep","n":{"[" * depth}{"]" * depth}}}\n' for depth in depths)

    def documents(name: str, prepare: str) -> int:
        # In processes of their own: what calls the tool takes part of Python's depth, too.
        code = f"{prepare}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
        words: list[Any] = [*SPLIT, tmp_path / name, "--tokenizer-type", KIND, "--tokenizer-model", plain]
        words += ["--encoder", "reference"]
        command: list[Any] = [
            sys.executable,
            "-c",
            code,
            "tools/preprocess_data.py",
            "--input",
            source,
            *words,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return read(tmp_path / name)[0]["documents"]

    found = documents("with", "import runpy, sys")
    assert found == documents("without", "import runpy, sys; sys.modules['orjson'] = None")


@pytest.mark.parametrize("value", [None, ["None"]])
def test_a_text_that_is_no_string_teaches_no_tokenizer(tools: Tools, tmp_path: Path, value: Any) -> None:
    import sentencepiece

    source = jsonl(tmp_path / "in.jsonl", [*DOCUMENTS, *[value] * 100])
    model = tmp_path / "sp.model"
    answer = tools("train_tokenizer", "--input", source, "--vocab-size", 300, "--output", model)
    if answer.status == 2:
        line_of(answer.text, r"^error: .*in\.jsonl")
        return
    assert answer.status == 0, answer.text
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("None", out_type=str)
    assert len(pieces) == 4


def _broken_text(dictionary: bool) -> Any:
    """Three rows, the second of which is no UTF-8."""
    import pyarrow

    texts = [b"first", b"brok\xffn", b"third"]
    starts = [0, 5, 11, 16]
    buffers = [pyarrow.array(starts, pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"".join(texts))]
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, *buffers])
    if dictionary:
        return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 2], pyarrow.int32()), strings)
    return strings


@pytest.mark.parametrize(
    "dictionary",
    [False, True],
)
def test_a_broken_text_of_a_parquet_column_is_one_reject(
    tools: Tools, plain: Path, tmp_path: Path, dictionary: bool
) -> None:
    import pyarrow
    from pyarrow import parquet

    source = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": _broken_text(dictionary)}), source)
    answer = tools.preprocess("out", [jsonl(tmp_path / "in.jsonl", DOCUMENTS), source], plain)
    assert answer.status == 0, answer.text
    assert read(tmp_path / "out")[0]["documents"] == len(DOCUMENTS) + 2
    [reject] = [json.loads(line) for line in (tmp_path / "out_text_document.side/rejects.jsonl").open()]
    assert (reject["file"], reject["line"]) == (str(source), 2)
    assert "invalid UTF-8" in reject["reason"]


def test_a_damaged_page_is_told_with_its_file(tools: Tools, plain: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    source = tmp_path / "pages.parquet"
    table = pyarrow.table({"text": [f"document {i}" for i in range(400)]})
    parquet.write_table(table, source, compression="snappy", row_group_size=20, use_dictionary=False)
    column = parquet.ParquetFile(source).metadata.row_group(10).column(0)
    with open(source, "r+b") as stream:
        # The page's content ends the chunk.
        stream.seek(column.data_page_offset + column.total_compressed_size - 30)
        stream.write(b"\xff" * 30)
    answer = tools.preprocess("out", [jsonl(tmp_path / "in.jsonl", DOCUMENTS), source], plain)
    assert answer.status == 2, answer.text
    line_of(answer.text, r"^error: pages\.parquet is damaged")


def test_an_input_whose_name_is_no_utf_8(tools: Tools, plain: Path, tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    try:
        jsonl(source, ["one"])
    except OSError:
        pytest.xfail("this file system takes no such name")
    answer = tools.preprocess("out", source, plain)
    if answer.status == 2:
        # At once: nothing was encoded.
        assert "caf" in line_of(answer.text, "^error: ") and "encoder:" not in answer.text
        return
    assert answer.status == 0, answer.text
    assert read(tmp_path / "out")[0]["documents"] == 1


def test_a_capability_whose_name_has_a_slash(tools: Tools, tmp_path: Path) -> None:
    sources = ["--sources", f"a={pair(tmp_path / 'pair')}", "--tokens-per-source", 50]
    output = tmp_path / "probes"
    answer = tools("curate_probes", *sources, "--capabilities", "math/algebra=a", "--output-dir", output)
    if answer.status == 2:
        line_of(answer.text, "^error: .*math/algebra")
        assert not [*output.rglob("*.bin")]
        return
    assert answer.status == 0, answer.text
    # Flattened: a file each for probing and held-out set.
    assert len([*output.glob("*.bin")]) == 2


def test_a_key_given_twice_is_refused(tools: Tools, plain: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    answer = tools.preprocess("out", source, plain, "--json-keys", "text", "text")
    assert answer.status == 2, answer.text
    line_of(answer.text, "^error: .*--json-keys")


def _with_blank_lines(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": f"doc {i}"}) + "\n\n" for i in range(120)))
    return path


def test_blank_lines_between_documents_are_skipped(tools: Tools, plain: Path, tmp_path: Path) -> None:
    answer = tools.preprocess("out", _with_blank_lines(tmp_path / "in.jsonl"), plain)
    assert answer.status == 0, answer.text
    assert read(tmp_path / "out")[0]["documents"] == 120
    assert not (tmp_path / "out_text_document.side/rejects.jsonl").exists()


def test_blank_lines_teach_no_tokenizer(tools: Tools, tmp_path: Path) -> None:
    source = _with_blank_lines(tmp_path / "in.jsonl")
    words = ["--vocab-size", 275, "--output", tmp_path / "sp.model"]
    answer = tools("train_tokenizer", "--input", source, *words)
    assert answer.status == 0, answer.text


@pytest.mark.parametrize(("first", "step"), [(0, 1), (5, 1), (0, 2)])
def test_tasks_of_an_array_are_its_shards(
    tools: Tools, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, step: int
) -> None:
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    tasks = [first + step * i for i in range(3)]
    # torchrun's would come first.
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    given = {"COUNT": 3, "MIN": first, "MAX": tasks[-1], "STEP": step}
    for task in tasks:
        for name, value in {**given, "ID": task}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        answer = tools.preprocess("out", source, plain, "--shard", "env")
        assert answer.status == 0, answer.text
    answer = tools("preprocess_data", "--merge", "--output-prefix", tmp_path / "out")
    assert answer.status == 0, answer.text
    assert tools.preprocess("whole", source, plain).status == 0
    assert bin_bytes(tmp_path / "out") == bin_bytes(tmp_path / "whole")


@pytest.fixture
def holed(tools: Tools, plain: Path, tmp_path: Path) -> tuple[list[Any], bytes]:
    """A preprocessing command whose .bin has lost 800 bytes since, and what the .bin was."""
    command: list[Any] = ["out", jsonl(tmp_path / "in.jsonl", DOCUMENTS), plain]
    assert tools.preprocess(*command).status == 0
    whole = bin_bytes(tmp_path / "out")
    with open(tmp_path / "out_text_document.bin", "r+b") as stream:
        stream.seek(200)
        stream.write(bytes(800))
    return command, whole


def test_training_data_with_a_hole_is_refused(
    tools: Tools, holed: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    answer = tools("train", "--check", *run_words(tmp_path / "run", tmp_path / "out_text_document"))
    assert answer.status == 2, answer.text
    line_of(answer.text, r"^error: .*out_text_document\.bin")


def test_every_byte_can_be_compared(tools: Tools, holed: tuple[list[Any], bytes], tmp_path: Path) -> None:
    verify = ["preprocess_data", "--verify", "--output-prefix"]
    answer = tools(*verify, tmp_path / "out")
    assert answer.status == 2, answer.text
    line_of(answer.text, r"^error: out_text_document\.bin is damaged at offset 0")
    (tmp_path / "out_text_document.bin").write_bytes(holed[1])
    for prefix in ("out", "out_text_document"):
        answer = tools(*verify, tmp_path / prefix)
        assert answer.status == 0, answer.text
        line_of(answer.text, r"^out_text_document\.bin: every byte is as it was written")
    answer = tools(*verify, tmp_path / "nothing")
    assert answer.status == 2 and "nothing_text_document.idx does not exist" in answer.text


def test_files_of_a_pair_of_another_order_are_told(tools: Tools, plain: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    for name, seed in (("out", 1), ("other", 2)):
        words = ["--input", source, "--output-prefix", tmp_path / name, "--seed", seed]
        answer = tools("preprocess_data", *words, "--tokenizer-type", KIND, "--tokenizer-model", plain)
        assert answer.status == 0, answer.text
    for name in (".idx", ".side/docs.npy"):
        path = Path(f"{tmp_path}/out_text_document{name}")
        whole = path.read_bytes()
        path.write_bytes(Path(f"{tmp_path}/other_text_document{name}").read_bytes())
        answer = tools("preprocess_data", "--verify", "--output-prefix", tmp_path / "out")
        assert answer.status == 2
        line_of(answer.text, rf"^error: out_text_document{name} is not the file that was written")
        path.write_bytes(whole)
    assert tools("preprocess_data", "--verify", "--output-prefix", tmp_path / "out").status == 0
    answer = tools("preprocess_data", "--merge", "--no-shuffle", "--output-prefix", tmp_path / "out")
    assert answer.status == 2 and "not --no-shuffle" in answer.text
    answer = tools("preprocess_data", "--verify", "--output-prefix", f"{tmp_path}/")
    assert answer.status == 2 and "is a folder" in answer.text


def test_an_input_named_twice_and_an_archive_are_refused(tools: Tools, plain: Path, tmp_path: Path) -> None:
    source, link = jsonl(tmp_path / "in.jsonl", DOCUMENTS), tmp_path / "link.jsonl"
    link.symlink_to(source)
    for again in (source, link):
        answer = tools.preprocess("out", [source, again], plain)
        assert answer.status == 2
        line_of(answer.text, rf"^error: input {again.name} is given twice")
    answer = tools("train_tokenizer", "--input", source, link, "--output", tmp_path / "sp.model")
    assert answer.status == 2 and "link.jsonl is given twice, first as in.jsonl" in answer.text
    with tarfile.open(tmp_path / "in.tar.gz", "w:gz") as archive:
        archive.add(source)
    answer = tools.preprocess("out", tmp_path / "in.tar.gz", plain)
    assert answer.status == 2 and "in.tar.gz is a tar archive" in answer.text


def test_a_tokenizer_is_not_replaced_by_another(tools: Tools, tmp_path: Path) -> None:
    source, model = jsonl(tmp_path / "in.jsonl", DOCUMENTS * 9), tmp_path / "sp.model"
    words = ["--input", source, "--output", model, "--vocab-size"]
    assert tools("train_tokenizer", *words, 290).status == 0
    first = model.read_bytes()
    assert tools("train_tokenizer", *words, 290).status == 0
    answer = tools("train_tokenizer", *words, 291)
    assert answer.status == 2 and model.read_bytes() == first
    line_of(answer.text, r"^error: sp\.model is there and holds something else.* --overwrite")
    assert tools("train_tokenizer", *words, 291, "--overwrite").status == 0
    assert model.read_bytes() != first
    answer = tools("train_tokenizer", *words, 290, "--max-megabytes", "inf")
    assert answer.status == 2 and "--max-megabytes: inf must be a number above 0" in answer.text


def test_a_dataset_with_a_hole_is_not_done(
    tools: Tools, holed: tuple[list[Any], bytes], tmp_path: Path
) -> None:
    command, whole = holed
    answer = tools.preprocess(*command)
    if answer.status == 2:
        line_of(answer.text, r"^error: .*out_text_document\.bin")
        return
    assert answer.status == 0, answer.text
    assert bin_bytes(tmp_path / "out") == whole
