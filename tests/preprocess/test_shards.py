"""Shards together are one run without shards, to the byte; and what keeps them from being joined."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.indexed import IndexedDataset
from megatron_r1.preprocess import documents
from megatron_r1.preprocess.documents import cut, open_input
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.shards import merge, parse_shard
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece

ROOT = Path(__file__).parents[2]
KIND = "SentencePieceTokenizer"
TEXTS = [f"Document {i}: {'words and  spaces ' * (i % 7)}\n\tline {i * i}" for i in range(300)]
ENDINGS = ("text_document.bin", "text_document.idx", "text_document.side/docs.npy", "text_document.json")


def jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train_sentencepiece([jsonl(folder / "text.jsonl", TEXTS)], folder / "sp.model", vocab_size=330)
    return folder / "sp.model"


@pytest.fixture
def inputs(tmp_path) -> list[Path]:
    """Every kind, an empty one and bad lines among them."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    jsonl(tmp_path / "a.jsonl", [*TEXTS[:50], "", *TEXTS[50:100]])
    packed = jsonl(tmp_path / "b.jsonl", ["", *TEXTS[100:150]])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    parquet.write_table(
        arrow.table({"text": [*TEXTS[150:220], ""]}), tmp_path / "c.parquet", row_group_size=30
    )
    (tmp_path / "empty.jsonl").write_bytes(b"")
    jsonl(tmp_path / "d.jsonl", [*TEXTS[220:], "", ""])
    names = ("a.jsonl", "b.jsonl.gz", "empty.jsonl", "c.parquet", "d.jsonl")
    return [tmp_path / name for name in names]


def quiet(line: str) -> None:
    pass


def shards(inputs, prefix, model, count, **options) -> None:
    for index in range(count):
        options = {"append_eod": True, "log": quiet, **options}
        preprocess(inputs, prefix, KIND, model, shard=(index, count), **options)


@pytest.mark.parametrize(("count", "seed"), [(1, 3), (2, None), (3, 3), (7, 3), (40, 3)])
def test_merged_is_the_unsharded_run(tmp_path, model, inputs, count, seed):
    preprocess(inputs, tmp_path / "one", KIND, model, seed=seed, append_eod=True, log=quiet)
    shards(inputs, tmp_path / "out", model, count, seed=seed)
    merge(tmp_path / "out", log=quiet)
    for ending in (*ENDINGS, "text_document.side/rejects.jsonl"):
        assert (tmp_path / f"out_{ending}").read_bytes() == (tmp_path / f"one_{ending}").read_bytes(), ending
    assert not list(tmp_path.glob("*partial*"))
    said: list[str] = []
    merge(tmp_path / "out", log=said.append)
    assert said == [f"already done: {tmp_path / 'out'}_text_document.bin"]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=6).filter(lambda b: b"\n" not in b), max_size=12),
    ended=st.booleans(),
    count=st.integers(1, 6),
)
def test_every_line_is_in_one_shard(tmp_path_factory, lines, ended, count):
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ended)
    source = open_input(path)
    found, numbers = [], []
    for index in range(count):
        [(lo, hi)] = cut([source], (index, count))
        for piece in source.pieces(0, ["text"], lo, hi):
            found += piece.rows
            numbers.append(piece.first)
    assert b"".join(found) == path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    assert all(first == 1 for first in numbers)


def test_killed_shard_goes_on_and_the_others_are_not_touched(tmp_path, model, inputs, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_DOCUMENTS", 16)
    preprocess(inputs, tmp_path / "one", KIND, model, append_eod=True, log=quiet)
    shards(inputs, tmp_path / "out", model, 3)
    with pytest.raises(FileNotFoundError, match=r"shard-00001-of-00003.* run --shard 1/3 again"):
        for path in tmp_path.glob("out_shard-00001-of-00003_text_document.*"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
        merge(tmp_path / "out", log=quiet)
    stamp = (tmp_path / "out_shard-00000-of-00003_text_document.bin").stat().st_mtime_ns
    shards(inputs, tmp_path / "out", model, 3)
    assert (tmp_path / "out_shard-00000-of-00003_text_document.bin").stat().st_mtime_ns == stamp
    merge(tmp_path / "out", log=quiet)
    for ending in ENDINGS:
        assert (tmp_path / f"out_{ending}").read_bytes() == (tmp_path / f"one_{ending}").read_bytes()


def test_merging_fetches_nothing_that_a_sidecar_names(tmp_path, model, monkeypatch):
    datasets = pytest.importorskip("datasets")
    shards([jsonl(tmp_path / "in.jsonl", TEXTS)], tmp_path / "out", model, 2)
    for path in tmp_path.glob("out_shard-*_document.json"):
        sidecar = json.loads(path.read_text())
        sidecar["inputs"][0]["path"] = "hf:org/name@main"
        path.write_text(json.dumps(sidecar))
    for target in ("load_dataset", "load_from_disk"):
        monkeypatch.setattr(datasets, target, lambda *_, **__: pytest.fail("datasets was asked"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    merge(tmp_path / "out", log=quiet)
    assert json.loads((tmp_path / "out_text_document.json").read_text())["inputs"][0]["sha256"] is None


def test_merging_removes_claims_and_nothing_of_others(tmp_path, model):
    shards([jsonl(tmp_path / "in.jsonl", TEXTS)], tmp_path / "out", model, 2)
    mine, theirs, other = (tmp_path / f"out.array-{name}" for name in ("7", "data", "link"))
    mine.mkdir()
    theirs.mkdir()
    for folder in (mine, theirs):
        (folder / "0").symlink_to("3")
    (theirs / "notes").write_text("kept")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/1").symlink_to("3")
    other.symlink_to(tmp_path / "far")
    merge(tmp_path / "out", log=quiet)
    assert not mine.exists()
    assert (theirs / "notes").read_text() == "kept"
    assert (tmp_path / "far/1").is_symlink() and other.is_symlink()


def test_inputs_may_be_gone_when_shards_are_merged(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    shards([source], tmp_path / "out", model, 2)
    source.unlink()
    sidecar = merge(tmp_path / "out", log=quiet)[f"{tmp_path / 'out'}_text_document"]
    assert (sidecar["documents"], sidecar["inputs"][0]["sha256"]) == (len(TEXTS), None)


def test_shards_of_other_options_are_refused(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    with pytest.raises(FileNotFoundError, match="no shards there"):
        merge(tmp_path / "out", log=quiet)
    for index, seed in ((0, 1), (1, 2)):
        preprocess([source], tmp_path / "out", KIND, model, shard=(index, 2), seed=seed, log=quiet)
    with pytest.raises(ValueError, match="differ in seed: 2 and 1"):
        merge(tmp_path / "out", log=quiet)
    # At once: a merge would refuse both kinds.
    with pytest.raises(ValueError, match=r"--shard 0/3: .*out has shards of 2"):
        preprocess([source], tmp_path / "out", KIND, model, shard=(0, 3), seed=1, log=quiet)


def test_a_shard_under_the_name_of_another_is_refused(tmp_path, model):
    shards([jsonl(tmp_path / "in.jsonl", ["", *TEXTS])], tmp_path / "out", model, 2)
    first, second = (f"out_shard-0000{i}-of-00002_text_document" for i in (0, 1))
    (tmp_path / f"{first}.side/rejects.jsonl").rename(tmp_path / "rejects.jsonl")
    with pytest.raises(FileNotFoundError, match=r"rejects\.jsonl is missing, with 1 rejects"):
        merge(tmp_path / "out", log=quiet)
    (tmp_path / f"{first}.side/rejects.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"rejects\.jsonl is damaged: it has the line"):
        merge(tmp_path / "out", log=quiet)
    (tmp_path / "rejects.jsonl").rename(tmp_path / f"{first}.side/rejects.jsonl")
    about = json.loads((tmp_path / f"{first}.json").read_text())
    (tmp_path / f"{first}.json").write_text(json.dumps({**about, "lines": []}))
    with pytest.raises(ValueError, match="lines of 0 inputs"):
        merge(tmp_path / "out", log=quiet)
    (tmp_path / f"{first}.json").write_text(json.dumps(about))
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(tmp_path / f"{first}{suffix}", tmp_path / f"{second}{suffix}")
    with pytest.raises(ValueError, match=rf"{second}\.json is of another shard: it says shard \[0, 2\]"):
        merge(tmp_path / "out", log=quiet)


def test_truncated_shard_is_refused(tmp_path, model):
    shards([jsonl(tmp_path / "in.jsonl", TEXTS)], tmp_path / "out", model, 2)
    os.truncate(tmp_path / "out_shard-00001-of-00002_text_document.bin", 100)
    with pytest.raises(ValueError, match=r"shard-00001-of-00002_text_document\.bin is damaged at offset 100"):
        merge(tmp_path / "out", log=quiet)


def test_rejects_of_all_shards_are_counted(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", ["", *TEXTS, ""])
    shards([source], tmp_path / "out", model, 2, reject_limit=1)
    with pytest.raises(ValueError, match="have 2 rejects for key 'text', more than 1"):
        merge(tmp_path / "out", reject_limit=1, log=quiet)


def test_shards_without_any_document_are_not_merged(tmp_path, model):
    shards([jsonl(tmp_path / "in.jsonl", [""] * 4)], tmp_path / "out", model, 2)
    left = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"every document is rejected for key 'text'.*: 4, the first"):
        merge(tmp_path / "out", log=quiet)
    made = set(tmp_path.iterdir()) - set(left)
    assert made == {tmp_path / "out_text_document.side"}
    assert [json.loads(line)["line"] for line in (made.pop() / "rejects.jsonl").open()] == [1, 2, 3, 4]


def test_which_shard_we_are():
    assert parse_shard("3/16") == (3, 16)
    assert parse_shard("env", {"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0"}) == (1, 4)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}
    assert parse_shard("env", array) == (6, 8)
    assert parse_shard("env", {"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}) == (2, 3)
    for wrong in ("3", "a/b", "-1/2", "2/2", "0/0", "env"):
        with pytest.raises(ValueError, match="--shard"):
            parse_shard(wrong, {})
    odd = {f"SLURM_ARRAY_TASK_{k}": v for k, v in zip(("ID", "COUNT", "MAX", "STEP"), "1342", strict=True)}
    for variables in ({"RANK": "x", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, odd):
        with pytest.raises(ValueError, match=r"--shard env: .*give --shard I/N"):
            parse_shard("env", variables)


def tasks(ids: list[int], step: int = 1, job: str = "7") -> list[dict[str, str]]:
    """The variables of each task of a job array, as Slurm sets them."""
    shared = {"COUNT": len(ids), "MIN": min(ids), "MAX": max(ids), "STEP": step}
    return [
        {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in {**shared, "ID": task}.items()}
        | {"SLURM_ARRAY_JOB_ID": job}
        for task in ids
    ]


@pytest.mark.parametrize(
    ("ids", "step"),
    [([0, 1, 2], 1), ([5, 6, 7, 8, 9], 1), ([0, 2, 4], 2), ([1, 8, 15], 7), ([3], 1), ([4, 14], 10)],
)
def test_a_task_of_an_array_with_a_step_is_its_place_in_it(ids, step):
    found = [parse_shard("env", variables) for variables in tasks(ids, step)]
    assert found == [(place, len(ids)) for place in range(len(ids))]


@pytest.mark.parametrize("ids", [[1, 3, 7], [2, 4, 6], [1, 3, 5, 7, 20], [0, 1, 4], [9, 2, 30, 4]])
def test_tasks_of_any_other_array_take_a_shard_each(tmp_path, ids):
    prefix = tmp_path / "out"
    with pytest.raises(ValueError, match=r"have no common step.*give --shard I/N"):
        parse_shard("env", tasks(ids)[0])
    # As they come, each twice: a task that is requeued goes on with its shard.
    found = [parse_shard("env", variables, prefix) for variables in tasks(ids)[::-1]]
    again = [parse_shard("env", variables, prefix) for variables in tasks(ids)]
    assert sorted(found) == [(place, len(ids)) for place in range(len(ids))]
    assert again == found[::-1]
    # Another array begins anew.
    assert parse_shard("env", tasks(ids, job="8")[-1], prefix) == (0, len(ids))


def test_shards_of_an_array_without_a_step_are_merged(tmp_path, model):
    source, prefix = jsonl(tmp_path / "in.jsonl", ["", *TEXTS]), tmp_path / "out"
    source.write_text(source.read_text().replace("}\n{", "}\n\n{"))
    preprocess([source], tmp_path / "one", KIND, model, log=quiet)
    for variables in tasks([2, 3, 7])[::-1]:
        preprocess([source], prefix, KIND, model, shard=parse_shard("env", variables, prefix), log=quiet)
    merge(prefix, log=quiet)
    for ending in (*ENDINGS, "text_document.side/rejects.jsonl"):
        assert (tmp_path / f"out_{ending}").read_bytes() == (tmp_path / f"one_{ending}").read_bytes(), ending
    assert json.loads((tmp_path / "out_text_document.json").read_text())["skipped"] == {"blank line": 300}
    assert not list(tmp_path.glob("out.array*"))


def test_a_pair_of_another_request_is_not_merged_over(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    preprocess([source], tmp_path / "out", KIND, model, seed=1, log=quiet)
    shards([source], tmp_path / "out", model, 2)
    with pytest.raises(ValueError, match=r"another request: .*seed.*--overwrite"):
        merge(tmp_path / "out", log=quiet)
    merge(tmp_path / "out", overwrite=True, log=quiet)


def test_command_lines_under_torchrun(tmp_path, model):
    """Rank and world size from the environment; every rank tells its own mistakes."""
    source = jsonl(tmp_path / "in.jsonl", TEXTS)

    def run(*options, **environment) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/preprocess_data.py", "--output-prefix", tmp_path / "out", *options]
        path = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)

    options = ["--input", source, "--tokenizer-type", KIND, "--tokenizer-model", model, "--shard", "env"]
    for rank in ("0", "1"):
        done = run(*options, RANK=rank, WORLD_SIZE="2")
        assert done.returncode == 0, done.stderr
    bad = run(*options[:3], "Nothing", *options[4:], RANK="1", WORLD_SIZE="2")
    assert (bad.returncode, bad.stderr[:7]) == (2, "error: ")
    done = run("--merge")
    assert done.returncode == 0, done.stderr
    assert IndexedDataset(tmp_path / "out_text_document").num_documents == len(TEXTS)
    assert run("--merge", *options[:2]).returncode == run().returncode == 2
