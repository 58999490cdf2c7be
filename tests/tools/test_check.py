"""`--check` says what a tool would do, and leaves every file as it was."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1 import config_io
from megatron_r1.preprocess.shards import merge
from megatron_r1.run import ledger
from tests import gold_packages
from tests.launch import ROOT
from tests.train import small

DOCUMENTS = 60


def call(tool: str, *words: object) -> str:
    """What the tool prints, in this process."""
    said, arguments = io.StringIO(), sys.argv
    sys.argv = [tool, *map(str, words)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    return said.getvalue()


def files(folder: Path) -> dict[str, tuple[int, int]]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts, and a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        texts = [
            f"{name} document {i} " + " ".join(f"word{(i * j) % 37}" for j in range(60))
            for i in range(DOCUMENTS)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    call("train_tokenizer", *tokenizer(folder))
    return folder


def tokenizer(folder: Path) -> list[Any]:
    output = folder / "tokenizer.model"
    return ["--input", folder / "a.jsonl", folder / "b.jsonl", "--vocab-size", 300, "--output", output]


def preprocess(folder: Path, name: str) -> list[Any]:
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model"]
    return ["--input", folder / f"{name}.jsonl", "--output-prefix", folder / name, *model]


def checked(folder: Path, tool: str, *words: object) -> str:
    before = files(folder)
    said = call(tool, *words, "--check")
    assert files(folder) == before
    return said


def test_of_the_tokenizer(data: Path) -> None:
    said = checked(data, "train_tokenizer", *tokenizer(data))
    assert f"{(data / 'a.jsonl').stat().st_size:,} bytes" in said and "300 tokens, is there" in said


def test_of_preprocessing_before_and_after(data: Path) -> None:
    assert "a_text_document.bin: is written" in checked(data, "preprocess_data", *preprocess(data, "a"))
    call("preprocess_data", *preprocess(data, "a"))
    said = checked(data, "preprocess_data", *preprocess(data, "a"))
    assert f"a_text_document.bin: done before, {DOCUMENTS} documents" in said
    other = checked(data, "preprocess_data", *preprocess(data, "a"), "--append-eod", "--overwrite")
    assert "of other inputs or options: is replaced" in other


def test_of_gold_answers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gold_packages.install(data / "packages", monkeypatch)
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", data / "tokenizer.model"]
    words = [*model, "--output-dir", data / "gold", "--sets", "mbpp", "gsm8k", "mbpp"]
    said = checked(data, "prepare_gold", *words)
    assert said.count("mbpp: 500 items") == 1 and "gsm8k: 1,319 items" in said
    call("prepare_gold", *words)
    assert checked(data, "prepare_gold", *words).count("already done") == 2
    (line,) = ledger.read(data / "gold")
    assert line["outputs"].keys() == {str(data / "gold" / name) for name in ("mbpp", "gsm8k")}
    assert "error" not in call("preprocess_data", "--verify", "--output-prefix", data / "gold" / "mbpp")


def test_of_merging_shards(data: Path) -> None:
    for shard in ("0/2", "1/2"):
        call("preprocess_data", *preprocess(data, "b"), "--shard", shard)
    said = checked(data, "preprocess_data", "--merge", "--output-prefix", data / "b")
    assert f"2 shards, {DOCUMENTS} documents" in said
    call("preprocess_data", "--merge", "--output-prefix", data / "b")
    folders = [
        data / f"b{part}_text_document.side"
        for part in ("_shard-00000-of-00002", "_shard-00001-of-00002", "")
    ]
    told = [line for folder in folders for line in ledger.read(folder)]
    assert [line["stage"] for line in told] == ["preprocess b", "preprocess b", "merge b"]
    parts = {value for line in told[:2] for value in line["outputs"].values()}
    text = hashlib.sha256((data / "b.jsonl").read_bytes()).hexdigest()
    assert set(told[2]["inputs"].values()) == parts | {text} and len(parts) == 2
    assert sum(s["documents"] for s in merge(data / "b", log=lambda line: None).values()) == DOCUMENTS


def test_of_curation_tells_the_split_that_is_then_made(data: Path) -> None:
    for name in ("a", "b"):
        call("preprocess_data", *preprocess(data, name))
    words: list[Any] = ["--output-dir", data / "probes", "--tokens-per-source", 200]
    words += ["--sources", *(f"{name}={data / name}_text_document" for name in ("a", "b"))]
    words += ["--capabilities", "code=a", "math=b"]
    said = checked(data, "curate_probes", *words)
    call("curate_probes", *words)
    made = json.loads((data / "probes" / "manifest.json").read_text())["sources"]
    for name in ("a", "b"):
        aside, left = made[name]["set_aside_documents"], made[name]["training_tokens"]
        assert f"{name}: {aside} of {DOCUMENTS} documents set aside" in said
        assert f"{left:,} tokens left to training" in said


def test_no_tool_imports_torch_before_it_is_asked_to_work(tmp_path: Path) -> None:
    """Every tool's own imports, and a check of training to its end, in a process that cannot import torch."""
    config = small.config(small.written(tmp_path), "run", 2)
    (tmp_path / "config.yaml").write_text(config_io.dump(config))
    script = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "for tool in sys.argv[2:]: runpy.run_path(tool)\n"
        "sys.argv = ['train.py', sys.argv[1], '--check']\n"
        "runpy.run_path('tools/train.py', run_name='__main__')"
    )
    tools = sorted(map(str, (ROOT / "tools").glob("*.py")))
    command = [sys.executable, "-c", script, tmp_path / "config.yaml", *tools]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "begins with random weights, 2 steps" in done.stdout, done.stderr
