"""Preprocessing against a loop too simple to be wrong, and against everything that goes wrong."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_r1.data import indexed
from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, open_corpus
from megatron_r1.preprocess import documents, journal, store
from megatron_r1.preprocess.documents import Piece
from megatron_r1.preprocess.encoder import Encoder
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.store import document_order
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from megatron_r1.preprocess.workers import encode_piece
from megatron_r1.system import files as run_dir

ROOT = Path(__file__).parents[2]
KIND = "SentencePieceTokenizer"
TEXTS = [f"Document {i}: {'words and  spaces ' * (i % 7)}\n\tline {i * i}" for i in range(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    jsonl(folder / "text.jsonl", TEXTS)
    train_sentencepiece([folder / "text.jsonl"], folder / "sp.model", vocab_size=330)
    return folder / "sp.model"


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 16)


def jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


def run(inputs, prefix, model, **options):
    """The sidecar of key "text", and what was logged."""
    said: list[str] = []
    inputs = inputs if isinstance(inputs, list) else [inputs]
    sidecars = preprocess(inputs, prefix, KIND, model, append_eod=True, log=said.append, **options)
    return sidecars.get(f"{prefix}_text_document"), "\n".join(said)


def pair(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}_{key}_document{s}").read_bytes() for s in (".bin", ".idx"))  # type: ignore


def oracle(prefix: Path, texts, model) -> tuple[bytes, bytes]:
    tokenizer = build_tokenizer(KIND, model)
    with IndexedWriter(f"{prefix}_text_document", np.uint16) as writer:
        for text in texts:
            writer.add_document(np.array([*tokenizer.encode(text), tokenizer.eod]))
    return pair(prefix)


@pytest.mark.usefixtures("small_pieces")
def test_unshuffled_equals_a_plain_loop(tmp_path, model):
    sidecar, _ = run(jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out", model, seed=None)
    assert pair(tmp_path / "out") == oracle(tmp_path / "oracle", TEXTS, model)
    assert sidecar["bin_sha256"] == hashlib.sha256(pair(tmp_path / "out")[0]).hexdigest()


@pytest.mark.usefixtures("small_pieces")
def test_shuffled_is_the_same_documents_in_the_order_of_the_seed(tmp_path, model, monkeypatch):
    monkeypatch.setattr(store, "COPY_TOKENS", 1000)
    run(jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out", model, seed=5)
    shuffled = [TEXTS[i] for i in document_order(len(TEXTS), 5)]
    assert pair(tmp_path / "out") == oracle(tmp_path / "oracle", shuffled, model)


@pytest.mark.usefixtures("small_pieces")
def test_unshuffled_without_second_names_of_a_file_is_the_same(tmp_path, model, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    sidecar, _ = run(jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out", model, seed=None)
    assert pair(tmp_path / "out") == oracle(tmp_path / "oracle", TEXTS, model)
    assert sidecar["bin_sha256"] == hashlib.sha256(pair(tmp_path / "out")[0]).hexdigest()


def test_order_is_a_permutation_fixed_for_ever():
    assert sorted(document_order(1000, 1)) == list(range(1000))
    assert not np.array_equal(document_order(1000, 1), document_order(1000, 2))
    assert document_order(8, 1234).tolist() == ORDER_OF_SEED_1234


# SplitMix64 in plain integers.
def splitmix(i: int, seed: int) -> int:
    z = (i * 0x9E3779B97F4A7C15 + seed * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


ORDER_OF_SEED_1234 = sorted(range(8), key=lambda i: splitmix(i, 1234))


def test_result_does_not_depend_on_workers(tmp_path, model, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 16)
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    with open(source, "a") as stream:
        stream.write("not json\n")
    one, _ = run(source, tmp_path / "one", model, workers=1)
    two, _ = run(source, tmp_path / "two", model, workers=2)
    assert pair(tmp_path / "one") == pair(tmp_path / "two")
    assert one == two
    rejects = [(tmp_path / f"{n}_text_document.side/rejects.jsonl").read_bytes() for n in ("one", "two")]
    assert rejects[0] == rejects[1] != b""


def test_workers_import_no_torch():
    code = "import sys, megatron_r1.preprocess.preprocess; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.usefixtures("small_pieces")
def test_packed_inputs_give_the_same_bytes(tmp_path, model):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    plain = jsonl(tmp_path / "in.jsonl", TEXTS).read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(plain))
    # Two frames, as parallel compressors write them.
    half = plain.index(b"\n", len(plain) // 2) + 1
    frames = [arrow.Codec("zstd").compress(part, asbytes=True) for part in (plain[:half], plain[half:])]
    (tmp_path / "in.jsonl.zst").write_bytes(b"".join(frames))
    parquet.write_table(arrow.table({"text": TEXTS, "n": range(300)}), tmp_path / "in.parquet")
    run(tmp_path / "in.jsonl", tmp_path / "plain", model)
    for ending in ("jsonl.gz", "jsonl.zst", "parquet"):
        run(tmp_path / f"in.{ending}", tmp_path / ending, model)
        assert pair(tmp_path / ending) == pair(tmp_path / "plain"), ending


@pytest.mark.parametrize("ending", ["gz", "zst", "parquet"])
def test_truncated_input_is_refused_and_leaves_nothing(tmp_path, model, ending):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source, out = tmp_path / f"in.jsonl.{ending}", tmp_path / "out"
    plain = jsonl(tmp_path / "in.jsonl", TEXTS).read_bytes()
    if ending == "parquet":
        parquet.write_table(arrow.table({"text": TEXTS}), source)
    else:
        packed = gzip.compress(plain) if ending == "gz" else arrow.Codec("zstd").compress(plain, asbytes=True)
        source.write_bytes(packed)
    source.write_bytes(source.read_bytes()[:-20])
    out.mkdir()
    with pytest.raises(ValueError, match=rf"in\.jsonl\.{ending} is damaged"):
        run(source, out / "x", model)
    assert list(out.iterdir()) == []


def test_several_inputs_and_keys(tmp_path, model):
    for name, part in (("a", TEXTS[:10]), ("b", TEXTS[10:20])):
        lines = [json.dumps({"text": t, "title": t[:11]}) + "\n" for t in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    run(inputs, tmp_path / "out", model, seed=None, json_keys=["text", "title"])
    assert pair(tmp_path / "out") == oracle(tmp_path / "texts", TEXTS[:20], model)
    assert pair(tmp_path / "out", "title") == oracle(tmp_path / "titles", [t[:11] for t in TEXTS[:20]], model)


BAD_LINES = [
    (b'{"text": "cut', "bad JSON: Unterminated string"),
    (b"nul", "bad JSON: Expecting value"),
    (b"[1, 2]", "bad JSON: a list where an object is expected"),
    (b"[" * 100_000, "bad JSON: nested too deep"),
    (b'{"body": "x"}', "missing key 'text': there is 'body'"),
    (b'{"a": 1, "b": 2}', "missing key 'text': there are 'a', 'b'"),
    (b"{}", "missing key 'text': there is none"),
    (b'{"text": null}', "non-string text: 'text' is NoneType"),
    (b'{"text": ["a"]}', "non-string text: 'text' is list"),
    (b'{"text": ""}', "empty document: 'text' is ''"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10: invalid start byte"),
    (b'{"text": "\\ud800"}', "invalid UTF-8: lone surrogate at character 0 of 'text'"),
]


def test_every_bad_line_is_quoted_with_its_place(tmp_path, model):
    lines = [json.dumps({"text": t}).encode() for t in TEXTS[:3]]
    for bad, _ in BAD_LINES:
        lines += [bad, json.dumps({"text": TEXTS[5]}).encode()]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))  # a byte order mark, and no last newline
    sidecar, said = run(source, tmp_path / "out", model, seed=None)
    kept = TEXTS[:3] + [TEXTS[5]] * len(BAD_LINES)
    assert pair(tmp_path / "out") == oracle(tmp_path / "oracle", kept, model)
    rejects = [json.loads(line) for line in (tmp_path / "out_text_document.side/rejects.jsonl").open()]
    assert [r["line"] for r in rejects] == [4 + 2 * i for i in range(len(BAD_LINES))]
    for reject, (line, reason) in zip(rejects, BAD_LINES, strict=True):
        assert reject["reason"].startswith(reason)
        assert reject["file"] == str(source)
        assert reject["excerpt"] == line[:200].decode("utf-8", "backslashreplace")
    assert sum(sidecar["rejected"].values()) == len(BAD_LINES)
    assert f"{len(BAD_LINES)} rejected, see" in said


@pytest.mark.usefixtures("small_pieces")
def test_rejects_beyond_the_limit_stop_the_run_which_goes_on_with_a_higher_one(tmp_path, model):
    source, out = jsonl(tmp_path / "in.jsonl", [*TEXTS, "", ""]), tmp_path / "out"
    with pytest.raises(ValueError, match=r"more than 1 documents rejected .*in\.jsonl:302: empty document"):
        run(source, out / "x", model, reject_limit=1)
    assert list(out.iterdir()) == [out / "x.partial"]
    sidecar, said = run(source, out / "x", model, reject_limit=2)
    assert sidecar["rejected"] == {"empty document": 2} and "going on after" in said
    run(source, tmp_path / "at once", model, reject_limit=2)
    assert pair(out / "x") == pair(tmp_path / "at once") and not (out / "x.partial").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["", "", ""],
            r"every document is rejected .*: 3, the first .*in\.jsonl:1: empty document",
        ),
        ([], r"no document in .*in\.jsonl: nothing is written"),
    ],
)
@pytest.mark.parametrize("keys", [["text"], ["text", "title"], ["title", "text"]])
def test_no_document_is_an_error_and_writes_no_pair(tmp_path, model, texts, message, keys):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t, "title": "a"}) + "\n" for t in texts))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "in.jsonl", out / "x", model, json_keys=keys)
    assert [path.name for path in out.iterdir()] == ["x_text_document.side"] * bool(texts)
    if texts:
        rejects = [json.loads(line) for line in (out / "x_text_document.side/rejects.jsonl").open()]
        assert [r["line"] for r in rejects] == [1, 2, 3]


def test_sidecar_says_what_was_made_and_from_what(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    sidecar, _ = run(source, tmp_path / "out", model)
    dataset = IndexedDataset(tmp_path / "out_text_document")
    assert (sidecar["documents"], sidecar["tokens"]) == (len(TEXTS), len(dataset.tokens))
    assert (sidecar["vocab_size"], sidecar["eod"], sidecar["dtype"]) == (330, 2, "uint16")
    assert [i["path"] for i in sidecar["inputs"]] == [str(source)]
    corpus = open_corpus("s", tmp_path / "out_text_document")
    assert corpus.tokenizer_hash == build_tokenizer(KIND, model).fingerprint()


def test_second_run_answers_at_once_and_a_changed_one_writes_again(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    run(source, tmp_path / "out", model)
    first, stamp = pair(tmp_path / "out"), (tmp_path / "out_text_document.bin").stat().st_mtime_ns
    os.utime(source)
    _, said = run(source, tmp_path / "out", model)
    assert "already done" in said
    assert (tmp_path / "out_text_document.bin").stat().st_mtime_ns == stamp
    for change in ({"seed": 9, "overwrite": True}, {"overwrite": True}):
        _, said = run(source, tmp_path / "out", model, **change)
        assert "already done" not in said
    assert pair(tmp_path / "out") == first
    jsonl(source, TEXTS[::-1])
    _, said = run(source, tmp_path / "out", model)
    assert "already done" not in said


def test_damaged_result_is_made_again(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    run(source, tmp_path / "out", model)
    first = pair(tmp_path / "out")
    os.truncate(tmp_path / "out_text_document.bin", 10)
    _, said = run(source, tmp_path / "out", model)
    assert "wrote" in said
    assert pair(tmp_path / "out") == first


def test_pair_of_another_tool_is_not_overwritten(tmp_path, model):
    first = oracle(tmp_path / "out", TEXTS[:2], model)
    with pytest.raises(ValueError, match="another tool made it"):
        run(jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out", model)
    assert pair(tmp_path / "out") == first


KILLED = """
import os, signal, sys
from megatron_r1.preprocess import documents, journal as module, store
from megatron_r1.preprocess.preprocess import preprocess
documents.PIECE_DOCUMENTS = 16
where, pieces, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None
# Two pieces a commit.
module.COMMIT_BYTES, module.COMMIT_SECONDS = 3000, 1e9
if where == "encoding":
    add = module.Journal.add
    def kill(journal, encoded):
        if journal.pieces == int(pieces):
            # As if killed within a write: more tokens than the journal knows of, and half a line.
            journal._files["text", "tokens"].write(b"torn")
            journal._files["text", "tokens"].flush()
            journal._log.write(b"[1, 2")
            journal._log.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(journal, encoded)
    module.Journal.add = kill
else:
    finalize = store.IndexedWriter.finalize
    def kill(*given):
        finalize(*given)
        os.kill(os.getpid(), signal.SIGKILL)
    store.IndexedWriter.finalize = kill
source, out, model = sys.argv[4:]
preprocess([source], out, "SentencePieceTokenizer", model, append_eod=True, seed=seed)
"""


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", [1234, None])
@pytest.mark.parametrize(
    ("where", "pieces", "kept"), [("encoding", 0, 0), ("encoding", 5, 4), ("sidecar", 19, 19)]
)
def test_killed_run_goes_on_to_the_same_bytes(tmp_path, model, where, pieces, kept, seed):
    source = jsonl(tmp_path / "in.jsonl", [*TEXTS[:40], "", *TEXTS[40:]])
    run(source, tmp_path / "whole", model, seed=seed)
    command = [sys.executable, "-c", KILLED, where, str(pieces), str(seed or 0)]
    command += [source, tmp_path / "out", model]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out_text_document.json").exists()
    sidecar, said = run(source, tmp_path / "out", model, seed=seed)
    assert [line for line in said.splitlines() if "going" in line] == [
        f"going on after {kept} pieces of an interrupted run"
    ] * (kept > 0)
    assert pair(tmp_path / "out") == pair(tmp_path / "whole")
    assert sidecar["rejected"] == {"empty document": 1}
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.usefixtures("small_pieces")
def test_bytes_lost_to_a_crash_are_encoded_again(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", [*TEXTS, ""])
    with pytest.raises(ValueError, match="more than 0 documents rejected"):
        run(source, tmp_path / "out", model, reject_limit=0)
    tokens = tmp_path / "out.partial/0.tokens"
    # Of the right size, as a file system may leave it that wrote the size first.
    half = tokens.stat().st_size // 2
    tokens.write_bytes(tokens.read_bytes()[:half] + bytes(tokens.stat().st_size - half))
    run(source, tmp_path / "whole", model)
    run(source, tmp_path / "out", model)
    assert pair(tmp_path / "out") == pair(tmp_path / "whole")


def test_workers_end_with_a_killed_run(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS * 1000)
    options = [
        "--input",
        source,
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        KIND,
        "--workers",
        "2",
    ]
    command = [sys.executable, "tools/preprocess_data.py", *options, "--tokenizer-model", model]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=path, stderr=subprocess.DEVNULL)

    def workers() -> list[psutil.Process]:
        return [p for p in psutil.Process(process.pid).children() if "spawn_main" in str(p.cmdline())]

    until(lambda: len(workers()) == 2)
    found = workers()
    process.kill()
    process.wait()
    until(lambda: not any(p.is_running() for p in found))


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_disk_full_is_said_and_leaves_no_pair(tmp_path, model):
    """A limit on the size of a file fails a write as a full disk does."""
    source, out = jsonl(tmp_path / "in.jsonl", TEXTS * 20), tmp_path / "out"
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    options = ["--input", source, "--output-prefix", out / "x", "--tokenizer-type", KIND]
    command = [sys.executable, "-c", code, "tools/preprocess_data.py", *options, "--tokenizer-model", model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "too large" in error
    assert list(out.iterdir()) == [out / "x.partial"]


class Full:
    """A file on a disk with room for so many bytes in all."""

    def __init__(self, stream, room: list[int]):
        self._stream, self._room = stream, room

    def write(self, data) -> int:
        self._room[0] -= len(memoryview(data).cast("B"))
        if self._room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._stream.write(data)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@pytest.mark.usefixtures("small_pieces")
def test_disk_full_at_any_moment_names_a_file_and_loses_nothing(tmp_path, model, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", ["", *TEXTS])
    room = [1 << 40]
    for module, name in (
        (journal, "_open"),
        (indexed, "open_exclusive"),
        (run_dir, "open_exclusive"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real: Full(real(*given), room))
    run(source, tmp_path / "in-order", model, seed=None)
    total_in_order, room[0] = (1 << 40) - room[0], 1 << 40
    run(source, tmp_path / "whole", model)
    total_shuffled, left = (1 << 40) - room[0], sorted(tmp_path.iterdir())

    def fails(seed: int | None) -> None:
        total = total_in_order if seed is None else total_shuffled
        # The journal, the tokens, the origins, the sidecar, the rejects, the index.
        for share in (*np.linspace(0, 0.99, 20), 1 - 40 / total):
            room[0] = int(total * share)
            with pytest.raises(OSError, match=r"No space left on device: .*/out") as raised:
                run(source, tmp_path / "out", model, seed=seed, overwrite=True)
            assert raised.value.errno == errno.ENOSPC
            room[0] = 1 << 40
            assert {*tmp_path.iterdir()} - {tmp_path / "out.partial"} == {*left}
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)

    fails(seed=1234)
    fails(seed=None)
    # In the second pass: what the first has encoded need not be encoded again.
    room[0] = int(0.9 * total_shuffled)
    with pytest.raises(OSError, match="No space left"):
        run(source, tmp_path / "out", model)
    room[0] = 1 << 40
    assert "going on after" in run(source, tmp_path / "out", model)[1]
    assert pair(tmp_path / "out") == pair(tmp_path / "whole")
    # What was there before stays whole.
    left = sorted(tmp_path.iterdir())
    fails(seed=5)
    assert "already done" in run(source, tmp_path / "out", model)[1]


def test_document_longer_than_an_index_can_say_is_rejected(model):
    """2^31 - 1 tokens with the end-of-document token; the array takes no memory."""

    class Huge(Encoder):
        def encode_batch(self, texts, utf8):
            lengths = np.array([int(text) for text in texts])
            return np.broadcast_to(np.uint32(1), lengths.sum()), lengths

    piece = Piece("in.jsonl", 0, 1, [b'{"text": "%d"}' % n for n in (3, 2**31 - 1, 2**31)], 1)
    tokenizer = build_tokenizer(KIND, model)
    [encoded] = encode_piece(Huge(tokenizer), piece, ["text"], append_eod=True)
    assert encoded.lengths.tolist() == [4]
    assert [(r["line"], r["reason"]) for r in encoded.rejects] == [
        (2, "2147483648 tokens, more than an index can say"),
        (3, "2147483649 tokens, more than an index can say"),
    ]


def test_second_run_at_once_waits_and_finds_the_work_done(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with store.exclusive(tmp_path / "out.partial", said.append):
            second = pool.submit(run, source, tmp_path / "out", model)
            time.sleep(0.3)
            assert not second.done()
        sidecar, log = second.result(timeout=20)
    assert log.startswith(f"waiting for another process that writes {tmp_path / 'out'}")
    assert sidecar["documents"] == len(TEXTS)
    assert not list(tmp_path.glob("*partial*"))


def test_command_line_mistakes_are_one_line_and_code_2(tmp_path, model):
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        tmp_path / "no.jsonl",
        "--output-prefix",
    ]
    command += [tmp_path / "x", "--tokenizer-type", KIND, "--tokenizer-model", model]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: input {tmp_path / 'no.jsonl'} does not exist\n"
