"""Samples of text: every document equally likely, whatever the files; the same for any number of workers."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_r1.curation.sample import Parts, _read, draw
from megatron_r1.curation.work import ID, Documents
from megatron_r1.data.provenance import text_hashes
from megatron_r1.preprocess.documents import open_inputs
from tests.curation.made import documents, request, write_lines


def hex_of(texts: list[str]) -> list[str]:
    return [row.tobytes().hex() for row in text_hashes(text.encode() for text in texts)]


def write_as(kind: str, folder: Path, rows: list[dict]) -> str:
    lines = Path(write_lines(folder / f"{kind}.jsonl", rows))
    if kind == "jsonl":
        return str(lines)
    if kind == "gz":
        packed = folder / "in.jsonl.gz"
        packed.write_bytes(gzip.compress(lines.read_bytes()))
        return str(packed)
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet", row_group_size=37)
    return str(folder / "in.parquet")


def sources(text: list[str], **more) -> dict:
    return {"a": {"text": text, "prefix": "none", **more}}


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet"])
def test_all_parts_together_hold_every_document_once(tmp_path, kind):
    rows = documents(0, 400)
    config = request(tmp_path, sources([write_as(kind, tmp_path, rows)], score="own"))
    drawn = draw("a", config, tmp_path / "work", 10_000)
    found = list(drawn.rows())
    assert sorted(row["id"] for row in found) == sorted(hex_of([row["text"] for row in rows]))
    own = {row["text"]: row["own"] for row in rows}
    assert all(row["metadata"]["score"] == own[row["text"]] for row in found)
    assert drawn.facts["share"] == 1.0 and drawn.facts["counts"] == {"read": 400}


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet"])
def test_each_document_is_as_likely_as_the_others(tmp_path, kind):
    """Over seeds, a tenth of the file is drawn as often as another, whatever the length of its documents."""
    rows = documents(0, 600)
    for row in rows[:60]:
        row["text"] += " long" * 300
    inputs = open_inputs([write_as(kind, tmp_path, rows)])
    place = {text: i for i, text in enumerate(hex_of([row["text"] for row in rows]))}
    config = request(tmp_path, sources([inputs[0].name]))
    of_tenth, drawn = Counter(), 0
    for seed in range(40):
        parts = Parts(inputs, seed)
        tasks = parts.tasks(inputs, 0, len(parts) // 3)
        for number, some in enumerate(tasks):
            path = tmp_path / f"{seed}-{number}.parquet"
            _read("a", config.sources["a"], None, some, path)
            ids = [row["id"] for row in Documents(path).rows("id")]
            of_tenth.update(place[one] // 60 for one in ids)
            drawn += len(ids)
    share_T = np.array([of_tenth[t] for t in range(10)]) / (40 * 60)
    expected = drawn / (40 * 600)
    # Parts are drawn together: a tenth of a file has few of them. The first tenth's have few documents.
    assert 0.2 < expected < 0.45
    assert np.abs(share_T - expected).max() < 0.13, share_T
    assert abs(share_T[0] - expected) < 0.13


def test_two_rounds_share_no_document_and_a_seed_decides_which(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", documents(0, 4000))
    config = request(tmp_path, sources([path]))
    pilot = draw("a", config, tmp_path / "work", 100)
    rest = draw("a", config, tmp_path / "work", 700, pilot)
    first, second = ({*one.column("id", ID).tolist()} for one in (pilot, rest))
    assert 100 <= len(first) < 700 <= len(second) < 1500
    assert not first & second
    assert rest.facts["counts"]["read"] == len(first) + len(second)
    size = Path(path).stat().st_size
    read = sum(len(json.dumps({"text": r["text"], "own": 0.0})) for one in (pilot, rest) for r in one.rows())
    assert rest.facts["share"] == pytest.approx(read / size, rel=0.05)
    other = draw("a", request(tmp_path, sources([path]), seed=7), tmp_path / "work", 100)
    assert len(first & {*other.column("id", ID).tolist()}) < len(first) / 2


def test_a_sample_has_at_most_so_many_documents(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", documents(0, 1000))
    config = request(tmp_path, sources([path]), most=150, pilot=100)
    pilot = draw("a", config, tmp_path / "work", 100)
    assert len(pilot) + len(draw("a", config, tmp_path / "work", 900, pilot)) == 150


def test_the_bytes_do_not_depend_on_workers(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", documents(0, 3000))
    gz = tmp_path / "more.jsonl.gz"
    gz.write_bytes(gzip.compress(Path(write_lines(tmp_path / "m.jsonl", documents(1, 3000))).read_bytes()))
    config = request(tmp_path, sources([path, str(gz)]))
    found = []
    for workers in (1, 2):
        drawn = draw("a", config, tmp_path / str(workers), 900, workers=workers)
        found.append(hashlib.sha256(drawn.path.read_bytes()).hexdigest())
        assert [*(tmp_path / str(workers)).glob("draw-*")] == []
        assert {row["metadata"]["file"] for row in drawn.rows("metadata")} == {path, str(gz)}
    assert found[0] == found[1]


def test_packed_files_take_turns(tmp_path):
    """The parts of sixteen files come before those of the next sixteen: few files are read whole."""
    paths = []
    for n in range(40):
        packed = tmp_path / f"{n:02d}.jsonl.gz"
        packed.write_bytes(gzip.compress(Path(write_lines(tmp_path / "l", documents(n, 60))).read_bytes()))
        paths.append(packed)
    parts = Parts(open_inputs(paths), 3)
    per_file = Counter(parts.input_P.tolist())
    first = Counter(parts.input_P[: len(parts) // 3].tolist())
    assert len(per_file) == 40 and len(first) <= 17
    assert len(parts.tasks(open_inputs(paths), 0, len(parts) // 3)) == len(first)


def test_repeated_documents_and_other_languages_are_left_out_and_counted(tmp_path):
    english = "This is a sentence in English about the weather of the north, number"
    german = "Dies ist ein deutscher Satz \u00fcber das Wetter im Norden und die Nummer"
    rows = [{"text": f"{english} {i % 30}"} for i in range(50)]
    rows += [{"text": f"{german} {i}"} for i in range(20)]
    path = write_lines(tmp_path / "in.jsonl", rows)
    config = request(tmp_path, sources([path]), quality={"model": "Q", "language": "en"})
    drawn = draw("a", config, tmp_path / "work", 1000)
    assert sorted(r["text"] for r in drawn.rows()) == sorted(f"{english} {i}" for i in range(30))
    assert drawn.facts["counts"] == {"read": 70, "other_language": 20, "repeated": 20}


def test_a_score_may_lie_deeper_and_must_be_a_number(tmp_path):
    rows = [{"text": f"t{i}", "about": {"edu": i / 7}} for i in range(9)]
    rows += [{"text": "x", "about": {"edu": "high"}}, {"text": "y"}, {"text": "z", "about": {"edu": True}}]
    rows += [{"text": "v", "about": {"edu": 1e39}}]
    config = request(tmp_path, sources([write_lines(tmp_path / "in.jsonl", rows)], score="about.edu"))
    drawn = draw("a", config, tmp_path / "work", 1000)
    assert {r["text"]: r["metadata"]["score"] for r in drawn.rows()} == {f"t{i}": i / 7 for i in range(9)}
    assert drawn.facts["counts"]["rejected"] == 4
    assert [r["reason"] for r in drawn.facts["rejects"]] == [
        "no score: 'about.edu' is 'high'",
        "no score: 'about.edu' is None",
        "no score: 'about.edu' is True",
        "no score: 'about.edu' is 1e+39",
    ]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_score_in_a_struct_of_a_table_is_read(tmp_path, kind):
    """datatrove's form."""
    rows = [{"text": f"t{i}", "metadata": {"edu": i / 7, "url": "u"}} for i in range(9)]
    rows += [{"text": "none", "metadata": None}, {"text": "null", "metadata": {"edu": None, "url": "u"}}]
    if kind == "parquet":
        path = write_as("parquet", tmp_path, rows)
    else:
        datasets, path = pytest.importorskip("datasets"), str(tmp_path / "saved")
        datasets.Dataset.from_list(rows).save_to_disk(path)
    drawn = draw("a", request(tmp_path, sources([path], score="metadata.edu")), tmp_path / "work", 1000)
    assert {r["text"]: r["metadata"]["score"] for r in drawn.rows()} == {f"t{i}": i / 7 for i in range(9)}
    assert drawn.facts["counts"] == {"read": 11, "rejected": 2}
    with pytest.raises(ValueError, match=r"no column 'metadata\.edy'; it has text, metadata, metadata\.edu"):
        draw("a", request(tmp_path, sources([path], score="metadata.edy")), tmp_path / "work", 10)


def test_a_damaged_sample_is_made_again_once_it_is_removed(tmp_path):
    config = request(tmp_path, sources([write_lines(tmp_path / "in.jsonl", documents(0, 50))]))
    drawn = draw("a", config, tmp_path / "work", 10)
    whole = drawn.path.read_bytes()
    drawn.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"sample-a-\w+\.parquet is damaged .*; remove it, and run"):
        list(draw("a", config, tmp_path / "work", 10).rows())
    drawn.path.unlink()
    assert draw("a", config, tmp_path / "work", 10).path.read_bytes() == whole
    drawn.path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"sample-a-\w+\.json is damaged .*; remove it, and run"):
        draw("a", config, tmp_path / "work", 10)


def test_inputs_without_the_key_are_one_error(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"body": "x"}] * 20)
    config = request(tmp_path, sources([path]))
    with pytest.raises(
        ValueError, match=r"sources\.a: no document in 1 inputs \(20 rejected.*missing key 'text'"
    ):
        draw("a", config, tmp_path / "work", 10)
    table = write_as("parquet", tmp_path, [{"body": "x"}])
    with pytest.raises(ValueError, match="has no column 'text'; it has body"):
        draw("a", request(tmp_path, sources([table])), tmp_path / "work", 10)
