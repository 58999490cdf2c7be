"""tools/decontaminate.py: what is hit is found at its place, whatever the workers, shards and kills."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_r1.data.indexed import IndexedDataset, document_starts, open_corpus
from megatron_r1.data.keep import load_mask
from megatron_r1.data.provenance import text_hashes
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from megatron_r1.run import ledger
from tests.launch import ROOT

RESULTS = ("hits.parquet", "rejects.jsonl", "dropped.txt", "manifest.json")
QUESTIONS = (
    "Farmer Ada stores nine sacks of rye in a barn near Turku and sells two a week. When is it empty?",
    "How many tiles does Ben need for a floor in Graz twelve feet long, if a tile covers half a foot?",
    "Cleo walks uphill from Leeds for three hours, rests, and returns in one. What was her average speed?",
)
ITEMS = [{"id": f"i{n}", "question": question} for n, question in enumerate(QUESTIONS)]
LONG = " ".join(f"probe{n * n % 101} word{n}" for n in range(100))


TINY = "Four words of text"


def host(n: int) -> str:
    return f"Document {n} tells " + " ".join(
        f"{word}{(n * k) % 97}" for k, word in enumerate(["of", "as", "by"] * 20)
    )


def text(n: int) -> str:
    """Each 13th of the documents has an item, the 40th a probing document; the 7th is a short one."""
    if n == 7:
        return TINY
    planted = {0: ITEMS[n % 3]["question"].upper().replace(" ", "\n")}.get(n % 13, LONG if n == 40 else "")
    return f"{host(n)}\n{planted}\n{host(n + 1)}"


DOCUMENTS = 120
HIT = [n for n in range(DOCUMENTS) if n % 13 == 0 or n == 40]


def call(*words: object) -> str:
    """What the tool prints, in this process. SystemExit for a mistake."""
    said, arguments = io.StringIO(), sys.argv
    sys.argv = ["tools/decontaminate.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / "tools" / "decontaminate.py"), run_name="__main__")
    except SystemExit as end:
        raise SystemExit(f"{end.code}: {said.getvalue()}") from None
    finally:
        sys.argv = arguments
    return said.getvalue()


def mistake(*words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert str(caught.value).startswith("2: ")
    return str(caught.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as lines, with a blank and a broken one, packed, and as a table; items; probes."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text(n), "n": n}) for n in range(DOCUMENTS)]
    lines[30:30] = ["", '{"text": 7}']
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes(), mtime=0))
    pq.write_table(
        pa.table({"text": [text(n) for n in range(DOCUMENTS)]}), folder / "b.parquet", row_group_size=16
    )
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS))
    (folder / "curated" / "documents").mkdir(parents=True)
    probes = pa.table({"text": [LONG, TINY], "id": ["x", "y"], "metadata": [{"a": 1}] * 2})
    pq.write_table(probes, folder / "curated" / "documents" / "web.parquet")
    return folder


def request(data: Path, name: str, output: Path, *more: object) -> list[object]:
    items = ("--items", f"mine={data / 'items.jsonl'}", "--probes", data / "curated")
    return ["--input", data / name, *items, "--output", output, "--part-megabytes", 0.01, *more]


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results for the lines, by one process."""
    output = tmp_path_factory.mktemp("results") / "lines"
    call(*request(data, "a.jsonl", output))
    return output


def same(a: Path, b: Path) -> None:
    for name in RESULTS:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_every_hit_has_its_place_and_both_texts(data: Path, done: Path) -> None:
    lines = (data / "a.jsonl").read_text().split("\n")
    rows = pq.read_table(done / "hits.parquet").to_pylist()
    assert [json.loads(lines[row["line"] - 1])["n"] for row in rows] == HIT
    for row in rows:
        record = json.loads(lines[row["line"] - 1])
        assert row["document_text"] in record["text"] and row["file"] == str(data / "a.jsonl")
        assert row["hash"] == text_hashes([record["text"].encode()]).tobytes().hex()
        if record["n"] == 40:
            assert (row["set"], row["part"], row["item_text"]) == ("probes/web", "text", LONG[:1000])
        else:
            item = ITEMS[record["n"] % 3]
            assert (row["set"], row["item"], row["part"]) == ("mine", item["id"], "question")
            assert row["item_text"] == item["question"] and row["score"] == 1
    assert (done / "dropped.txt").read_text().split() == sorted(row["hash"] for row in rows)
    manifest = json.loads((done / "manifest.json").read_text())
    assert (manifest["documents"], manifest["texts"], manifest["rejects"]) == (DOCUMENTS, len(HIT), 1)
    assert manifest["request"]["parts"] > 5
    (rejected,) = (json.loads(line) for line in (done / "rejects.jsonl").read_text().splitlines())
    assert rejected["line"] == 32 and "non-string text" in rejected["reason"]
    (line,) = ledger.read(done)
    assert line["stage"] == "decontaminate" and list(line["inputs"]) == [str(data / "a.jsonl")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.parquet"])
def test_other_kinds_of_input_give_the_same_hits(data: Path, done: Path, tmp_path: Path, name: str) -> None:
    call(*request(data, name, tmp_path / "out", "--part-megabytes", 0.001))
    table = pq.read_metadata(tmp_path / "out" / "hits.parquet")
    assert min(table.row_group(n).num_rows for n in range(table.num_row_groups)) > 0
    ours, theirs = (pq.read_table(of / "hits.parquet").to_pylist() for of in (tmp_path / "out", done))
    for of in (ours, theirs):
        for row in of:
            row.pop("file"), row.pop("line")
    assert ours == theirs


def test_shards_give_what_one_process_gives(data: Path, done: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = request(data, "a.jsonl", output)
    call(*words, "--shard", "2/3")
    assert not (output / "manifest.json").exists()
    assert "parts are not scanned" in mistake(*words, "--merge")
    for shard in ("0/3", "1/3"):
        call(*words, "--shard", shard)
    call(*words, "--merge")
    same(output, done)


def test_a_killed_command_goes_on(data: Path, done: Path, tmp_path: Path) -> None:
    """Killed by -9 after its first parts, with two workers, and started again with one."""
    output = tmp_path / "out"
    words = list(map(str, request(data, "a.jsonl", output, "--workers", 2)))
    command = [sys.executable, "tools/decontaminate.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not list(output.glob("parts/*.json")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in output.glob("parts/*.json")}
    assert first
    call(*words[:-2])
    assert {path: path.stat().st_mtime_ns for path in first} == first
    same(output, done)


def test_a_damaged_part_is_named(data: Path, done: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(done, output)
    (output / "manifest.json").unlink()
    part = output / "parts" / "000003.json"
    for content, fault in (("{}", "lacks documents"), ("[1", "no JSON")):
        part.write_text(content)
        message = mistake(*request(data, "a.jsonl", output))
        assert str(part) in message and fault in message and "remove it and run again" in message
    part.unlink()
    call(*request(data, "a.jsonl", output))
    same(output, done)


def test_the_mask_drops_what_was_hit(data: Path, done: Path, tmp_path: Path) -> None:
    model = tmp_path / "t.model"
    train_sentencepiece([data / "b.parquet"], model, 400)
    prefix = tmp_path / "a"
    preprocess([data / "a.jsonl"], prefix, "SentencePieceTokenizer", model, append_eod=True)
    pair, output = f"{prefix}_text_document", tmp_path / "out"
    shutil.copytree(done, output)
    said = call(*request(data, "a.jsonl", output, "--prefix", pair, "--seq-length", 64))
    assert f"keeps {DOCUMENTS - len(HIT) - 1} of {DOCUMENTS} documents" in said
    corpus = open_corpus("a_text_document", pair)
    mask = load_mask(corpus.name, corpus.windows(64), output / "a_text_document.npz")
    start_D, origins = document_starts(corpus), np.load(f"{pair}.side/docs.npy")
    kept = {(int(a), int(b)) for a, b in mask.stretch_N2}
    covered = np.zeros(len(IndexedDataset(pair).tokens), bool)
    for begin, end in kept:
        covered[begin:end] = True
    lines = (data / "a.jsonl").read_text().split("\n")
    for document, origin in enumerate(origins):
        hit = json.loads(lines[int(origin["line"]) - 1])["n"] in (*HIT, 7)
        assert covered[start_D[document] : start_D[document + 1]].all() == (not hit)
        assert covered[start_D[document] : start_D[document + 1]].any() == (not hit)
    assert any(path.endswith("a_text_document.npz") for path in ledger.read(output)[-1]["outputs"])
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": host(7777)}) + "\n")
    preprocess([tmp_path / "other.jsonl"], tmp_path / "o", "SentencePieceTokenizer", model)
    other = f"{tmp_path / 'o'}_text_document"
    message = mistake(*request(data, "a.jsonl", output, "--prefix", other, "--seq-length", 64))
    assert "none of" in message and "name the pair that was made of --input" in message
    (tmp_path / "again").symlink_to(tmp_path)
    again = tmp_path / "again" / "a_text_document"
    message = mistake(*request(data, "a.jsonl", output, "--prefix", pair, again, "--seq-length", 64))
    assert "two masks would be a_text_document.npz" in message


def test_check_and_estimate_write_nothing(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    said = call(*request(data, "a.jsonl", output, "--check"))
    assert "3 questions and answers, 2 probing documents" in said
    said = call(*request(data, "a.jsonl", output, "--estimate"))
    assert "us a 2 kB" in said and "memory: about" in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--items", "mine"], "--items mine: write NAME=FILE"),
        (["--items", "a={items}", "a={items}"], "a name is given twice"),
        (["--items", "a={missing}"], "does not exist"),
        (["--probes", "{empty}"], "no documents/*.parquet"),
        (["--json-keys", "body"], "no column 'body'"),
        (["--shard", "3/3"], "write I/N"),
        (["--seq-length", "8"], "go together"),
        (["--seq-length", "8", "--prefix", "{missing}"], "missing.idx does not exist"),
        (["--reject-limit", "-1"], "must be an integer at least 0"),
    ],
)
def test_mistakes_are_one_message(data: Path, tmp_path: Path, more: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    names = {"items": data / "items.jsonl", "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    words = [word.format(**names) for word in more]
    assert message in mistake(*request(data, "b.parquet", tmp_path / "out", *words))


def test_rejects_stop_the_scan(data: Path, tmp_path: Path) -> None:
    assert "1 rejects, more than 0" in mistake(
        *request(data, "a.jsonl", tmp_path / "out", "--reject-limit", 0)
    )


def test_inputs_without_a_document_are_a_mistake(data: Path, tmp_path: Path) -> None:
    """One of several may be empty, and so may a shard."""
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": 7}\n\n{"text": ""}\n')
    more = ["--items", f"mine={data / 'items.jsonl'}", "--output"]
    for name, why in (("none.jsonl", "; "), ("bad.jsonl", "/bad.jsonl:1: ")):
        words = ["--input", tmp_path / name, *more, tmp_path / f"of {name}"]
        call(*words, "--shard", "0/2")
        call(*words, "--shard", "1/2")
        for last in ((), ("--merge",)):
            message = mistake(*words, *last)
            assert f"no document in {tmp_path / name}{'; ' * (why != '; ')}" in message and why in message
            assert message.rstrip().endswith("; name other inputs or --json-keys")
        assert not (tmp_path / f"of {name}" / "manifest.json").exists()
    inputs = [tmp_path / "none.jsonl", data / "a.jsonl"]
    assert f"of {DOCUMENTS} documents were hit" in call("--input", *inputs, *more, tmp_path / "out")


def test_another_request_is_refused(data: Path, done: Path) -> None:
    message = mistake(*request(data, "b.parquet", done))
    assert re.search(r"is of another request: .*inputs", message) and "name another --output" in message
