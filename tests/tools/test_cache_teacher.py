"""tools/cache_teacher.py: what it would write, shards, the ledger, mistakes before any work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_r1.distill.cache import Cache
from megatron_r1.distill.documents import choose
from megatron_r1.run import ledger
from tests.distill import corpus
from tests.launch import ROOT


def call(*words: object) -> str:
    """What the tool prints, in this process. SystemExit for a mistake."""
    said, arguments = io.StringIO(), sys.argv
    sys.argv = ["tools/cache_teacher.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / "tools" / "cache_teacher.py"), run_name="__main__")
    except SystemExit as end:
        raise SystemExit(f"{end.code}: {said.getvalue()}") from None
    finally:
        sys.argv = arguments
    return said.getvalue()


def mistake(*words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*words)
    assert str(caught.value).startswith("2: ") and "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.written(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def words(root: Path, tmp_path: Path) -> list[str]:
    return [*corpus.words(root, f"phases.mid.objective.cache={tmp_path}/cache"), "--phase", "mid"]


def tokens(root: Path) -> tuple[int, int]:
    of = choose(*corpus.opened(root), "mid").by_source()
    return of["a"], of["b"]


def test_a_cache_is_written_once_and_told(root: Path, words: list[str], tmp_path: Path) -> None:
    folder, (a, b) = tmp_path / "cache", tokens(root)
    said = call(*words, "--check")
    assert f"a: {a:,} tokens, 0 of them there" in said and f"{a + b:,} tokens of 49 documents" in said
    assert f"{(a + b) * 46 / 1e9:.3g} GB at 46 bytes" in said and not folder.exists()
    said = call(*words)
    assert f"a: records of {a:,} of {a:,} tokens" in said and "records of 49 of 49 documents" in said
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.kd")}
    assert f"a: {a:,} tokens, {a:,} of them there" in call(*words, "--check")
    call(*words)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.kd")} == before
    (line,) = ledger.read(folder)
    assert line["stage"] == "cache teacher" and (line["tokens"], line["devices"]) == (a + b, 1)
    cache = Cache(folder)
    assert line["outputs"] == {str(folder): cache.identity}
    assert line["inputs"][str(root / "teacher")] == cache.header.teacher and len(line["inputs"]) == 3


def test_a_new_source_adds_what_the_cache_lacks(root: Path, words: list[str], tmp_path: Path) -> None:
    folder, (a, b) = tmp_path / "cache", tokens(root)
    said = call(*words, "--sources", "a")
    assert "records of 32 of 32 documents" in said and "b:" not in said
    said = call(*words, "--check")
    assert f"b: {b:,} tokens, 0 of them there" in said and "17 documents" in said
    call(*words)
    lines = ledger.read(folder)
    assert [line["tokens"] for line in lines] == [a, b]
    assert len(list(folder.glob("part-*.kd"))) == 2 and len(list(folder.glob("index-*.kd"))) == 1
    planned = choose(*corpus.opened(root), "mid", planned=True)
    assert f"a: {planned.by_source()['a']:,} tokens" in call(*words, "--planned", "--check")


def test_shards_and_their_merge(
    root: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    call(*words, "--shard", "1/3")
    call(*words, "--shard", "0/3")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    said = call(*words, "--merge")
    assert "records of 49 of 49" not in said
    call(*words, "--shard", "env")
    assert "records of 49 of 49 documents" in call(*words, "--merge")
    lines = ledger.read(folder)
    shards = [line for line in lines if line["stage"] == "cache teacher shard"]
    assert sum(line["tokens"] for line in shards) == sum(tokens(root)) and len(shards) == 3
    made = {value for line in shards for value in line["outputs"].values()}
    assert made < set(lines[-1]["inputs"].values()) and lines[-1]["tokens"] == 0
    assert lines[-1]["outputs"] == {str(folder): Cache(folder).identity}
    assert "take one process" in mistake(*words, "--merge", "--shard", "0/3")


def test_estimate_and_judge_write_no_records(root: Path, words: list[str], tmp_path: Path) -> None:
    folder, (a, b) = tmp_path / "cache", tokens(root)
    said = call(*words, "--estimate", "--sample", 100, "--tflops", "1e-6")
    assert "bytes by a sample; hours at --tflops" in said and not folder.exists()
    flop = 60928.0
    assert f"a: {a:,} tokens, " in said and f"{a * flop / 1e6 / 3600:.3g} hours" in said
    assert "hours by a sample on this device" in call(*words, "--estimate", "--sample", 100)
    absent = [*words, "phases.mid.objective.teacher=not/here"]
    assert "say phases.mid.objective.parameters=N and --tflops" in mistake(*absent, "--estimate")
    said = call(*absent, "--estimate", "phases.mid.objective.parameters=8000000000", "--tflops", 400)
    hours = (a + b) * 16e9 / 4e14 / 3600
    assert f"together: {a + b:,} tokens, {(a + b) * 46 / 1e9:.3g} GB, {hours:.3g} hours" in said
    assert "bytes at 46 a token; hours at --tflops" in said
    assert "tokens of 49 documents" in call(*absent, "--check")
    said = call(*words, "--judge", "--sample", 100)
    result = json.loads((folder / "judge.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["judge.json"]
    assert f"{result['sources']['a']['with_bos']:.4f}" in said and "timed on this one" in said
    # A teacher beside the student is judged, too.
    (folder / "judge.json").unlink()
    again = call(*words, "--judge", "--sample", 100, "phases.mid.objective.cache=null", "--tflops", 1)
    assert again.splitlines()[1:4] == said.splitlines()[1:4] and not list(folder.iterdir())
    call(*words, "--sources", "a")


def test_check_imports_no_torch(words: list[str]) -> None:
    """Also where a cache is there."""
    call(*words, "--sources", "a")
    script = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "runpy.run_path('tools/cache_teacher.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", script, *words, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "17 documents" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--phase", "other"], "--phase 'other': the phases are mid"),
        (["phases.mid.objective=null"], "phases.mid.objective names no teacher"),
        (["phases.mid.objective.teacher=null"], "phases.mid.objective names no teacher"),
        (["phases.mid.objective.cache=null"], "phases.mid.objective names no cache, the folder"),
        (["--sources", "a,c"], "--sources 'c': phases.mid draws from a, b"),
        (["--context", "512"], "the context of {root}/teacher is 512 tokens, one of them before each text; "
         "lower it to 511"),
        (["--draws", "300"], "at most 256"),
        (["--shard", "3/3"], "write I/N"),
        (["--merge"], "holds no teacher cache"),
        (["phases.mid.objective.teacher={root}/other"], "has the ids of another vocabulary than the teacher"),
        (["phases.mid.objective.teacher=not/here"], "not/here"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message_before_any_work(
    root: Path, words: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    if not (other := root / "other").exists():
        # As large, and other ids: two of the tokenizer's words change places.
        shutil.copytree(root / "teacher", other)
        spec = json.loads((other / "tokenizer.json").read_text())
        vocabulary = spec["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (other / "tokenizer.json").write_text(json.dumps(spec))
    said = mistake(*words, *(word.format(root=root) for word in more))
    assert message.format(root=root) in said
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_another_header_is_refused(root: Path, words: list[str], tmp_path: Path) -> None:
    call(*words, "--sources", "a")
    for more, what in (
        (["--draws", "20"], "draws (50 there, 20 here)"),
        (["--top-k", "4"], "top_k (None there, 4 here)"),
        (["--seed", "5"], "seed (1234 there, 5 here)"),
        (["--context", "64"], "context (511 there, 64 here)"),
        (["phases.mid.objective.temperature=2"], "temperature (1.0 there, 2.0 here)"),
        (["phases.mid.objective.bos=none"], "bos (0 there, None here)"),
    ):
        for mode in ([], ["--check"], ["--estimate"]):
            said = mistake(*words, *more, *mode)
            assert what in said and "is a cache of another header" in said
    shutil.copytree(root / "teacher", tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    said = mistake(*words, f"phases.mid.objective.teacher={tmp_path}/teacher")
    assert "teacher (" in said and "vocabulary" not in said


def test_a_pair_without_provenance_is_refused(root: Path, words: list[str], tmp_path: Path) -> None:
    for path in root.glob("a_text_document*"):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    (tmp_path / "a_text_document.side" / "docs.npy").unlink()
    said = mistake(*words, f"data.sources.a.prefix={tmp_path}/a_text_document")
    assert "docs.npy does not exist; tools/preprocess_data.py writes it" in said
    assert not (tmp_path / "cache").exists()


def test_too_little_disk_is_told_before_anything_is_written(
    root: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(tokens(root)) * 46
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=need - 1, f_frsize=1))
    said = mistake(*words)
    assert f"{sum(tokens(root)):,} tokens of 46.0 bytes" in said and "are free; make room" in said
    assert not (tmp_path / "cache" / "header.json").exists()
    assert np.array_equal(list((tmp_path / "cache").glob("*.kd")), [])
