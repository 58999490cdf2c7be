"""Probing and held-out sets: disjoint from each other and from training, exact in size, repeatable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_r1.curation.probes import curate_probes
from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, open_corpus
from megatron_r1.system.files import write_json

ROOT = Path(__file__).parents[2]
CAPABILITIES = {"code": ["a", "b"], "knowledge": ["c"]}
OPTIONS = {"tokens_per_source": 200, "max_document_tokens": 50}


def write_source(prefix: Path, documents, fingerprint="f", seed=1) -> str:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    about = {"tokenizer_type": "T", "tokenizer_fingerprint": fingerprint, "vocab_size": 9000, "eod": 2}
    about |= {"seed": seed, "dtype": "uint16", "documents": writer.num_documents, "tokens": writer.num_tokens}
    write_json(f"{prefix}.json", {**about, "bin_sha256": writer.sha256})
    return str(prefix)


@pytest.fixture
def documents():
    """200 documents a source of 5 to 120 tokens; a token tells its source."""
    rng = np.random.default_rng(0)
    return {
        name: [base + rng.integers(0, 2000, rng.integers(5, 120)) for _ in range(200)]
        for name, base in (("a", 0), ("b", 2000), ("c", 4000), ("junk", 6000))
    }


def write_all(folder: Path, documents) -> dict[str, str]:
    return {name: write_source(folder / name, found) for name, found in documents.items()}


def stretches(folder: Path, name: str) -> list[list[int]]:
    dataset = IndexedDataset(folder / name)
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def is_within(stretch: list[int], document) -> bool:
    windows = range(len(document) - len(stretch) + 1)
    return any(list(document[i : i + len(stretch)]) == stretch for i in windows)


def test_sets_are_cut_from_what_training_does_not_see(tmp_path, documents):
    sources = write_all(tmp_path, documents)
    manifest = curate_probes(sources, CAPABILITIES, tmp_path / "out", **OPTIONS)
    for capability, members in CAPABILITIES.items():
        for stretch in stretches(tmp_path / "out", f"probe_{capability}"):
            name = next(n for n in members if stretch[0] // 2000 == list(documents).index(n))
            leading = manifest["sources"][name]["training_documents"]
            assert any(is_within(stretch, d) for d in documents[name][leading:])
            assert not any(is_within(stretch, d) for d in documents[name][:leading])


def test_no_document_is_in_both_sets(tmp_path, documents):
    curate_probes(write_all(tmp_path, documents), CAPABILITIES, tmp_path / "out", **OPTIONS)
    every = [d for found in documents.values() for d in found]

    def origins(name: str) -> set[int]:
        return {i for s in stretches(tmp_path / "out", name) for i, d in enumerate(every) if is_within(s, d)}

    for capability in CAPABILITIES:
        probe, heldout = origins(f"probe_{capability}"), origins(f"heldout_{capability}")
        assert probe and heldout and not probe & heldout


def test_each_set_holds_exactly_the_tokens_of_each_source_and_no_document_too_much(tmp_path, documents):
    curate_probes(write_all(tmp_path, documents), CAPABILITIES, tmp_path / "out", **OPTIONS)
    for set_name in ("probe", "heldout"):
        found = stretches(tmp_path / "out", f"{set_name}_code")
        source = np.concatenate(found) // 2000
        assert [int((source == k).sum()) for k in range(4)] == [200, 200, 0, 0]
        assert max(map(len, found)) <= 50
        # Sources take turns, so that a leading part represents both.
        assert [found[i][0] // 2000 for i in range(4)] == [0, 1, 0, 1]


def test_at_least_the_fraction_is_set_aside_of_every_source(tmp_path, documents):
    manifest = curate_probes(
        write_all(tmp_path, documents), CAPABILITIES, tmp_path / "out", fraction=0.2, **OPTIONS
    )
    for name, source in manifest["sources"].items():
        share = source["set_aside_tokens"] / source["tokens"]
        assert 0.2 <= share < 0.25, name
        assert source["training_tokens"] + source["set_aside_tokens"] == source["tokens"]


def test_more_than_the_fraction_is_set_aside_where_the_sets_need_it(tmp_path, documents):
    sources = write_all(tmp_path, documents)
    options = {"tokens_per_source": 900, "max_document_tokens": 50, "fraction": 0.01}
    manifest = curate_probes(sources, CAPABILITIES, tmp_path / "out", **options)
    assert manifest["sources"]["a"]["set_aside_tokens"] >= 1800
    assert manifest["sources"]["junk"]["set_aside_tokens"] < 300


def test_split_is_the_trainers_configuration(tmp_path, documents):
    sources = write_all(tmp_path, documents)
    manifest = curate_probes(sources, CAPABILITIES, tmp_path / "out", **OPTIONS)
    split = yaml.safe_load((tmp_path / "out" / "split.yaml").read_text())
    assert list(split["data"]["sources"]) == list(sources)
    for name, source in split["data"]["sources"].items():
        corpus = open_corpus(name, source["prefix"], source["documents"])
        assert corpus.tokens == manifest["sources"][name]["training_tokens"]
    assert split["data"]["sources"]["a"]["domain"] == "code"
    assert "domain" not in split["data"]["sources"]["junk"]
    for prefix in (*split["data"]["probes"].values(), *split["influence"]["directions"].values()):
        assert open_corpus("probe", prefix).tokenizer_hash == "f"


def test_documents_of_training_are_dropped_and_counted(tmp_path, documents):
    # One of the last of `a` is also the first of `junk`, another the first of `a` itself.
    documents["junk"][0], documents["a"][0] = documents["a"][-1], documents["a"][-2]
    # And the last of `b` comes twice.
    documents["b"][-2] = documents["b"][-1]
    said: list[str] = []
    manifest = curate_probes(
        write_all(tmp_path, documents), CAPABILITIES, tmp_path / "out", log=said.append, **OPTIONS
    )
    dropped = {
        n: (s.get("dropped_in_training"), s.get("dropped_repeated")) for n, s in manifest["sources"].items()
    }
    assert dropped == {"a": (2, 0), "b": (0, 1), "c": (0, 0), "junk": (None, None)}
    assert "a: dropped 2 documents that training holds too, 0 repeated" in said
    every = [
        s for c in CAPABILITIES for k in ("probe", "heldout") for s in stretches(tmp_path / "out", f"{k}_{c}")
    ]
    assert not any(is_within(s, documents["a"][0]) or is_within(s, documents["junk"][0]) for s in every)


def test_second_run_answers_at_once(tmp_path, documents):
    sources = write_all(tmp_path, documents)
    out, said = tmp_path / "out", []
    first = curate_probes(sources, CAPABILITIES, out, log=said.append, **OPTIONS)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*.*") if p.is_file()}
    assert curate_probes(sources, CAPABILITIES, out, log=said.append, **OPTIONS) == first
    assert said == [f"already done: {out / 'manifest.json'}"]
    (out / "probe_code.bin").unlink()
    assert curate_probes(sources, CAPABILITIES, out, **OPTIONS) == first
    assert {name: content for name, (_, content) in before.items()} == {
        p.name: p.read_bytes() for p in out.rglob("*.*") if p.is_file()
    }


def test_sets_of_another_request_are_replaced_only_when_asked_to(tmp_path, documents):
    sources, out = write_all(tmp_path, documents), tmp_path / "out"
    first = curate_probes(sources, CAPABILITIES, out, **OPTIONS)
    others = {**OPTIONS, "tokens_per_source": 100}
    with pytest.raises(ValueError, match=r"is of another request: tokens_per_source \(200 .*--overwrite"):
        curate_probes(sources, CAPABILITIES, out, **others)
    moved = {name: sources[name] for name in reversed(sources)}
    with pytest.raises(ValueError, match=r"is of another request: sources "):
        curate_probes(moved, CAPABILITIES, out, **OPTIONS)
    assert curate_probes(sources, CAPABILITIES, out, **OPTIONS) == first
    changed = curate_probes(sources, CAPABILITIES, out, overwrite=True, **others)
    assert changed["files"] != first["files"]
    # The same request over datasets that were made anew brings its sets up to date.
    write_source(tmp_path / "a", documents["a"][:-1])
    assert curate_probes(sources, CAPABILITIES, out, **others)["files"] != changed["files"]


def test_a_manifest_of_others_is_not_believed(tmp_path, documents):
    sources, out = write_all(tmp_path, documents), tmp_path / "out"
    first = curate_probes(sources, CAPABILITIES, out, **OPTIONS)
    manifest = out / "manifest.json"
    counts = first["sources"]
    wrong = (
        {},
        [],
        None,
        3,
        dict.fromkeys(counts, 3),
        {**counts, "a": {}},
        {**counts, "a": {"documents": "7"}},
        {**counts, "a": {**counts["a"], "documents": -7}},
        {**counts, "a": {**counts["a"], "training_tokens": 10**300}},
    )
    for value in wrong:
        write_json(manifest, {**first, "sources": value})
        assert curate_probes(sources, CAPABILITIES, out, check=True, **OPTIONS)["sources"] == {
            name: {key: of[key] for key in of if not key.startswith(("probe", "heldout", "dropped"))}
            for name, of in counts.items()
        }
    for files in ({"../c.idx": "0"}, {"/dev/zero": "0"}, {"": "0"}, [], {"probe_code.bin": []}):
        write_json(manifest, {**first, "files": files})
        assert curate_probes(sources, CAPABILITIES, out, **OPTIONS) == first


@pytest.mark.parametrize("content", ['{"mine": 1}', "[]", "[" * 100_000, "", '{"request": []}', "\0" * 20])
def test_a_manifest_of_another_tool_is_left_alone(tmp_path, documents, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged, or another tool's.*--overwrite"):
        curate_probes(write_all(tmp_path, documents), CAPABILITIES, out, **OPTIONS)
    assert [path.read_text() for path in out.iterdir()] == [content]


@pytest.mark.parametrize(
    "name", ["../x", "./../../x", "/x", "a/b", "..", ".", "", "-x", "x\n", "x\0", "é" * 60]
)
def test_names_stay_inside(tmp_path, documents, name):
    sources = write_all(tmp_path, documents)
    with pytest.raises(ValueError, match=r"--capabilities: name .*a name has"):
        curate_probes(sources, {name: ["a"]}, tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match=r"--sources: name .*a name has"):
        curate_probes({**sources, name: sources["a"]}, CAPABILITIES, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_source_too_small_says_what_to_do(tmp_path, documents):
    sources = write_all(tmp_path, documents)
    with pytest.raises(ValueError, match=r"source a: .* more than half of its .* fewer --tokens-per-source"):
        curate_probes(sources, CAPABILITIES, tmp_path / "out", tokens_per_source=5000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("capabilities", "message"),
    [
        ({"code": ["zzz"]}, "capability code: no source zzz; known: a, b, c, junk"),
        ({"code": ["a"], "math": ["a"]}, "source a is in code and math"),
        ({"code": []}, "capability code has no source"),
    ],
)
def test_capabilities_must_name_sources(tmp_path, documents, capabilities, message):
    with pytest.raises(ValueError, match=message):
        curate_probes(write_all(tmp_path, documents), capabilities, tmp_path / "out", **OPTIONS)


def test_two_tokenizers_are_refused(tmp_path, documents):
    sources = write_all(tmp_path, documents)
    write_source(tmp_path / "c", documents["c"], fingerprint="g")
    with pytest.raises(ValueError, match=r"source c was tokenized by g .* use one tokenizer"):
        curate_probes(sources, CAPABILITIES, tmp_path / "out", **OPTIONS)


def test_unshuffled_source_is_refused(tmp_path, documents):
    sources = write_all(tmp_path, documents)
    write_source(tmp_path / "b", documents["b"], seed=None)
    with pytest.raises(ValueError, match=r"source b: .* no random sample"):
        curate_probes(sources, CAPABILITIES, tmp_path / "out", **OPTIONS)


def test_command_line(tmp_path, documents):
    sources = [f"{name}={prefix}" for name, prefix in write_all(tmp_path, documents).items()]
    command = [
        sys.executable,
        "tools/curate_probes.py",
        "--output-dir",
        tmp_path / "out",
        "--sources",
        *sources,
    ]
    command += ["--tokens-per-source", "200", "--capabilities"]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*capabilities: str) -> subprocess.CompletedProcess[str]:
        words = [*command, *capabilities]
        return subprocess.run(words, cwd=ROOT, env=path, capture_output=True, text=True)

    wrong = run("code")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --capabilities 'code': not NAME=VALUE\n")
    right = run("code=a,b", "knowledge=c")
    assert right.returncode == 0, right.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["request"]["tokens_per_source"] == 200
    assert "probe_code.bin" in right.stdout
