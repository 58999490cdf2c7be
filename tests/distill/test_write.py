"""The teacher cache is written: which documents, by which writer, what is in a record, and after any end."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_r1.config import ParallelConfig
from megatron_r1.data.indexed import IndexedDataset, document_starts
from megatron_r1.data.keep import save_documents
from megatron_r1.data.provenance import read_provenance
from megatron_r1.distill import write
from megatron_r1.distill.cache import BLOCK, Cache, merge
from megatron_r1.distill.documents import Documents, choose
from megatron_r1.distill.draws import Header, draw, pack, unpack
from megatron_r1.distill.open import teachers
from megatron_r1.distill.teacher import Teacher
from megatron_r1.export import pretrained
from megatron_r1.parallel import process_groups
from megatron_r1.train.batches import StepBatches, rank_samples
from tests.distill import corpus
from tests.distributed import on_ranks, start_ranks
from tests.launch import ROOT, wait_for

CONTEXT = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.written(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def teacher(root: Path) -> Teacher:
    return Teacher(str(root / "teacher"), "fp32")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence is a batch of its own, so that its logits do not depend on others. Parts are small."""
    monkeypatch.setattr(pretrained, "BATCH_TOKENS", 1)
    monkeypatch.setattr(write, "PART", 500)


def header(teacher: Teacher, **more: Any) -> Header:
    asked = {
        "draws": 50,
        "top_k": None,
        "seed": 7,
        "bos": teacher.bos,
        "context": CONTEXT,
        "temperature": 1.0,
    }
    return Header(teacher=teacher.identity, vocabulary="v", tokens=teacher.tokens, **{**asked, **more})


def held(folder: Path, documents: Documents) -> dict[bytes, tuple[bytes, ...]]:
    """Hash of each document that is there -> all that is read of its records."""
    cache, out = Cache(folder), {}
    for d in np.flatnonzero(write.covered(folder, documents)):
        key = documents.hash_DH[d].tobytes()
        out[key] = tuple(array.tobytes() for array in cache.read(key, 0, int(documents.length_D[d])))
    return out


@pytest.fixture(scope="module")
def documents(root: Path) -> Documents:
    return choose(*corpus.opened(root), "mid")


@pytest.fixture(scope="module")
def whole(teacher: Teacher, documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all documents by one writer, its sequences each by itself."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "BATCH_TOKENS", 1)
        header(teacher).write(folder)
        write.write(documents, teacher, header(teacher), folder, show=False)
    return folder


def drawn_by(config: Any, data: Any, planned: bool) -> list[set[bytes]]:
    """By plain loops: hashes of the documents of each source with an input in a window that is wanted."""
    out, windows = [], [set[int]() for _ in data.corpora]
    for i in range(4 * 4) if planned else ():
        source, _, window = data.plan.locate(i)
        windows[source].add(window)
    for k, one in enumerate(data.corpora):
        mask = data.plan.phases[0].keep.get(one.name)
        kept = (
            range(one.windows(corpus.SEQ))
            if mask is None
            else np.flatnonzero(np.unpackbits(mask.packed, bitorder="little"))
        )
        hashes, edges, there = read_provenance(one.prefix).hashes, document_starts(one), set[bytes]()
        wanted = windows[k] if planned else {int(w) for w in kept}
        for d, (begin, end) in enumerate(pairwise(edges)):
            tail = mask is None and not planned and end > one.windows(corpus.SEQ) * corpus.SEQ
            if tail or any(p // corpus.SEQ in wanted for p in range(begin, end)):
                there.add(hashes[d].tobytes())
        out.append(there)
    return out


def hashes(documents: Documents) -> list[bytes]:
    return [row.tobytes() for row in documents.hash_DH]


def test_each_text_of_the_phase_is_there_once(root: Path, documents: Documents) -> None:
    config, data = corpus.opened(root)
    a, b = drawn_by(config, data, planned=False)
    assert len(a & b) == len(corpus.COMMON) and sorted(hashes(documents)) == sorted(a | b)
    # The tokens are those of the text: the first of both sources has them.
    assert documents.source_D.tolist() == sorted(documents.source_D.tolist())
    assert documents.by_source() == {
        "a": documents.length_D[: len(a)].sum(),
        "b": documents.length_D[len(a) :].sum(),
    }
    streams = [IndexedDataset(one.prefix) for one in data.corpora]
    numbers = np.array([len(documents) - 1, 0])
    last, first = documents.tokens(numbers)
    np.testing.assert_array_equal(first, streams[0].document(0))
    np.testing.assert_array_equal(last, streams[1].document(streams[1].num_documents - 1))
    name = f"document {streams[1].num_documents - 1} of source 'b' ({data.corpora[1].prefix})"
    assert documents.name(len(documents) - 1) == name


def test_of_planned_masked_and_named_sources(root: Path, tmp_path: Path) -> None:
    config, data = corpus.opened(root)
    found = hashes(choose(config, data, "mid", planned=True))
    assert sorted(found) == sorted(set.union(*drawn_by(config, data, planned=True)))
    assert 0 < len(found) < len(choose(config, data, "mid"))
    # A mask over windows.
    np.save(tmp_path / "a.npy", np.arange(data.corpora[0].windows(corpus.SEQ)) % 3 == 0)
    masked = corpus.opened(root, f"phases.mid.keep={{a: '{tmp_path}/a.npy'}}")
    of_a, of_b = drawn_by(*masked, planned=False)
    assert sorted(hashes(choose(*masked, "mid"))) == sorted(of_a | of_b)
    assert set(hashes(choose(*masked, "mid", ["a"]))) == of_a and 0 < len(of_a) < 32
    both = set.union(*drawn_by(*masked, planned=True))
    assert set(hashes(choose(*masked, "mid", planned=True))) == both
    # A mask over documents: a window of a dropped document may be drawn all the same.
    kept_D = np.arange(data.corpora[0].documents) % 2 == 0
    save_documents(tmp_path / "a.npz", data.corpora[0], kept_D, corpus.SEQ)
    masked = corpus.opened(root, f"phases.mid.keep={{a: '{tmp_path}/a.npz'}}")
    ours = {row.tobytes() for row in read_provenance(data.corpora[0].prefix).hashes[kept_D]}
    assert set(hashes(choose(*masked, "mid", ["a"]))) == ours & drawn_by(*masked, planned=False)[0]
    weighted = corpus.opened(root, "phases.mid.weights={b: 1.0}")
    assert set(hashes(choose(*weighted, "mid"))) == drawn_by(*weighted, planned=False)[1]
    with pytest.raises(ValueError, match=r"--sources 'a': phases\.mid draws from b"):
        choose(*weighted, "mid", ["a"])


def test_writers_of_shards_and_ranks_share_all_documents(documents: Documents) -> None:
    shards, ranks, seen = 3, 2, list[bytes]()
    for place in range(shards):
        own = set(hashes(documents.of_writer(place, shards)))
        for rank in range(ranks):
            mine = hashes(documents.of_writer(rank * shards + place, ranks * shards))
            assert set(mine) <= own
            seen += mine
    assert sorted(seen) == sorted(hashes(documents))


def test_a_record_is_of_the_first_piece_that_has_it() -> None:
    for context in range(1, 20):
        begins = np.arange(100) * (context - context // 4)
        for length in range(1, 60):
            of = {
                o: (begin, min(length, begin + context))
                for begin, first, end in write.pieces(length, context)
                for o in range(first, end)
            }
            assert list(of) == list(range(length))
            for o, (begin, end) in of.items():
                first = begins[(begins <= o) & (o < begins + context)][0]
                assert (begin, end) == (first, min(length, first + context))


def test_records_are_draws_from_the_teachers_own_distribution(
    root: Path, teacher: Teacher, documents: Documents, tmp_path: Path
) -> None:
    """Against transformers, a document at a time. One document has several pieces and blocks."""
    made = header(teacher, temperature=1.5)
    made.write(tmp_path)
    write.write(documents, teacher, made, tmp_path, show=False)
    plain: Any = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32).eval()
    cache, equal, count = Cache(tmp_path), 0, 0
    assert int(documents.length_D.max()) > max(BLOCK, 2 * CONTEXT)
    for d, tokens in enumerate(documents.tokens(np.arange(len(documents)))):
        key, rows = documents.hash_DH[d].tobytes(), []
        for begin, first, end in write.pieces(len(tokens), CONTEXT):
            ids = torch.tensor([[0, *tokens[begin:end].tolist()]])
            with torch.no_grad():
                rows.append(plain(input_ids=ids).logits[0, 1 + first - begin :, : teacher.tokens])
        logits_NV = torch.cat(rows)
        assert len(logits_NV) == len(tokens)
        ids_NK, share_NK, entropy_N = cache.read(key, 0, len(tokens))
        share_NV = (logits_NV.double() / 1.5).softmax(-1)
        np.testing.assert_allclose(entropy_N, torch.special.entr(share_NV).sum(-1), rtol=2e-3)
        ours = unpack(made, pack(made, draw(logits_NV, made, key, 0)), len(tokens))
        for n, (ids, share) in enumerate(
            zip(np.split(ours[0], edges := ours[2].cumsum()[:-1]), np.split(ours[1], edges), strict=True)
        ):
            there = share_NK[n] > 0
            same = np.array_equal(ids_NK[n][there], ids) and np.array_equal(share_NK[n][there], share)
            equal, count = equal + same, count + 1
    # A point may fall on another side where batches round otherwise.
    assert count == documents.total and equal > 0.99 * count


def test_bytes_do_not_depend_on_writers_and_their_order(
    exact: None, teacher: Teacher, documents: Documents, whole: Path, tmp_path: Path
) -> None:
    made = header(teacher)
    made.write(tmp_path)
    for writer in (2, 0, 1):
        write.write(documents.of_writer(writer, 3), teacher, made, tmp_path, show=False)
        share = documents.only(~write.covered(tmp_path, documents))
        assert len(share) < len(documents)
    assert len(list(tmp_path.glob("part-*.kd"))) >= 5 and len(list(whole.glob("part-*.kd"))) == 1
    assert held(tmp_path, documents) == held(whole, documents) and len(held(whole, documents)) == len(
        documents
    )
    merge(tmp_path)
    assert held(tmp_path, documents) == held(whole, documents)


def test_top_k_records_are_written_too(teacher: Teacher, documents: Documents, tmp_path: Path) -> None:
    made = header(teacher, draws=None, top_k=8)
    made.write(tmp_path)
    write.write(documents, teacher, made, tmp_path, show=False)
    ids_NK, share_NK, _ = Cache(tmp_path).read(hashes(documents)[0], 0, int(documents.length_D[0]))
    (logits_NV,) = (rows for _, _, rows in teacher.logits(documents.tokens(np.array([0]))))
    best = logits_NV.softmax(-1).topk(8)
    np.testing.assert_array_equal(np.sort(ids_NK), best.indices.sort(-1).values)
    np.testing.assert_allclose(share_NK.sum(-1), best.values.sum(-1), rtol=1e-3)


def served(root: Path, folder: Path, ranks: int, rank: int, first: int, more: list[str]) -> dict[Any, Any]:
    """(source, token of its stream) -> entries and entropy of the record that the trainer's batches have."""
    objective = f"phases.mid.objective={{name: kd, cache: '{folder}'}}"
    config, data = corpus.opened(root, "phases.mid.objective=null", objective, *more)
    context: Any = SimpleNamespace(data_rank=rank, data_size=ranks, first_of_copy=True)
    batches, found = StepBatches(config, data, context), dict[Any, Any]()
    batches.records = teachers(config, data)["mid"].records
    size, seq_length, names = config.train.global_batch, config.data.seq_length, list(data.plan.sources)
    for step in range(first, config.phase_steps("mid")):
        samples = iter(rank_samples(step * size, size, config.train.micro_batch, context).tolist())
        for batch in batches.of_step(step * size):
            assert batch.teacher is not None and batch.loss_mask_BS.all()
            for ids_SK, share_SK, entropy_S in zip(
                *map(torch.Tensor.tolist, vars(batch.teacher).values()), strict=True
            ):
                source, _, window = data.plan.locate(next(samples))
                for s, (ids, shares, entropy) in enumerate(zip(ids_SK, share_SK, entropy_S, strict=True)):
                    entries = {i: share for i, share in zip(ids, shares, strict=True) if share}
                    found[names[source], window * seq_length + s] = entries, entropy
        assert not batches.errors
    return found


@pytest.fixture(scope="module")
def labels(root: Path, whole: Path) -> dict[Any, Any]:
    """(source, token of its stream) -> entries and entropy of its record, by plain loops over documents."""
    _, data = corpus.opened(root)
    cache, want = Cache(whole), dict[Any, Any]()
    for one in data.corpora:
        edges = document_starts(one).tolist()
        for key, (begin, end) in zip(read_provenance(one.prefix).hashes, pairwise(edges), strict=True):
            rows = map(np.ndarray.tolist, cache.read(key.tobytes(), 0, end - begin))
            for at, (ids, shares, entropy) in enumerate(zip(*rows, strict=True), begin):
                entries = {i: share for i, share in zip(ids, shares, strict=True) if share}
                want[one.name, at] = entries, entropy
    return want


@pytest.mark.parametrize(
    ("more", "ranks", "first"),
    [
        ("", 1, 0),
        ("phases.mid.weights={a: 1, b: 9}", 1, 0),
        ("train.global_batch=8", 1, 0),
        ("train.micro_batch=1", 1, 0),
        ("train.micro_batch=1", 4, 0),
        ("data.seq_length=48", 1, 0),
        ("data.seq_length=1100", 1, 0),
        ("model.hidden_size=64", 1, 0),
        ("data.seed=99", 1, 0),
        ("", 1, 2),
    ],
)
def test_the_trainers_batches_have_the_same_records(
    root: Path, whole: Path, labels: dict[Any, Any], more: str, ranks: int, first: int
) -> None:
    """Mixture, batch, ranks, packing, student, shuffling and the step that a run goes on from, one by one."""
    words, found = ["phases.mid.steps=6", more][: 1 + bool(more)], dict[Any, Any]()
    with process_groups(ParallelConfig()):
        for rank in range(ranks):
            found |= served(root, whole, ranks, rank, first, words)
    assert len(found) > 400 and {name for name, _ in found} == {"a", "b"}
    assert found == {label: labels[label] for label in found}


class Killed(BaseException):
    pass


def test_an_end_at_any_part_loses_that_part_alone(
    exact: None,
    teacher: Teacher,
    documents: Documents,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = list(write.groups(documents.length_D))
    assert len(parts) > 3 and np.concatenate(parts).tolist() == list(range(len(documents)))
    write_part = write.write_part
    for last in range(len(parts)):
        folder, left = tmp_path / str(last), last
        header(teacher).write(folder)

        def until_killed(*words: Any) -> Path:
            nonlocal left
            if left == 0:
                next(iter(words[2]))
                raise Killed
            left -= 1
            return write_part(*words)

        monkeypatch.setattr(write, "write_part", until_killed)
        with pytest.raises(Killed):
            write.write(documents, teacher, header(teacher), folder, show=False)
        monkeypatch.setattr(write, "write_part", write_part)
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*.kd")}
        assert len(before) == last
        write.write(documents, teacher, header(teacher), folder, show=False)
        assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*.kd")}.items()
        assert held(folder, documents) == held(whole, documents)


def tool(words: list[str], pause: float = 0) -> None:
    """tools/cache_teacher.py on this rank, with small parts and batches, and a pause after each part."""
    pretrained.BATCH_TOKENS, write.PART, write_part = 1, 100, write.write_part

    def slowly(*of: Any) -> Path:
        path = write_part(*of)
        time.sleep(pause)
        return path

    write.write_part = slowly
    sys.argv = ["tools/cache_teacher.py", *words]
    runpy.run_path(str(ROOT / "tools" / "cache_teacher.py"), run_name="__main__")


def test_ranks_that_were_killed_go_on(root: Path, whole: Path, documents: Documents, tmp_path: Path) -> None:
    """Two ranks of a shard end by SIGKILL after their first parts. The same command writes the rest of it."""
    folder, own = root / "cache", documents.of_writer(1, 2)
    words = [*corpus.words(root), "--phase", "mid", "--seed", "7", "--context", str(CONTEXT)]
    children, _ = start_ranks(2, tmp_path, tool, [*words, "--shard", "1/2"], 0.3)
    wait_for(lambda: bool(list(folder.glob("part-*.kd"))), "a part")
    for child in children:
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.kd")}
    there = int(own.length_D[write.covered(folder, own)].sum())
    assert before and there < own.total
    time.sleep(0.01)
    on_ranks(2, tool, [*words, "--shard", "1/2"])
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("part-*.kd")}.items()
    assert write.covered(folder, documents).sum() == len(own) and not list(folder.glob("index-*.kd"))
    (line,) = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    assert (line["devices"], line["tokens"]) == (2, own.total - there)
    on_ranks(1, tool, words)
    assert len(list(folder.glob("index-*.kd"))) == 1
    assert held(folder, documents) == held(whole, documents)


def test_logits_that_are_not_finite_end_it_before_their_part(
    exact: None, root: Path, documents: Documents, tmp_path: Path
) -> None:
    damaged = Teacher(str(root / "teacher"), "fp32")
    tokens = documents.tokens(np.arange(len(documents)))
    seen = np.unique(np.concatenate([np.unique(of) for of in tokens[:-1]]))
    rare = int(np.setdiff1d(tokens[-1], seen)[0])
    with torch.no_grad():
        damaged.network.get_input_embeddings().weight[rare] = torch.nan
    header(damaged).write(tmp_path)
    message = rf"document {len(corpus.TEXTS['b']) - 1} of source 'b' \(.*\): .* are not finite"
    with pytest.raises(ValueError, match=message):
        write.write(documents, damaged, header(damaged), tmp_path, show=False)
    there = write.covered(tmp_path, documents)
    assert not there[-1] and there[:20].all() and not list(tmp_path.glob("*.partial"))


def test_too_little_disk_is_found_before_a_part_and_by_what_was_measured(
    exact: None, teacher: Teacher, documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [documents.total * write.BYTES]

    def statvfs(path: Path) -> SimpleNamespace:
        assert Path(path).is_dir()
        return SimpleNamespace(f_bavail=free[0], f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)
    header(teacher).write(tmp_path)
    # The records of a teacher that knows nothing are larger than expected, as the first part tells.
    with pytest.raises(OSError, match=r"tokens of \d+\.\d bytes take .* GB, and .* GB are free; make room"):
        write.write(documents, teacher, header(teacher), tmp_path, show=False)
    assert len(list(tmp_path.iterdir())) == 2
    free[0] -= 1
    with pytest.raises(OSError, match=r"tokens of 46\.0 bytes"):
        write.require_space(tmp_path / "not" / "there", documents.total, write.BYTES)
    # Another rank takes as much.
    free[0] = 10**9
    left = documents.only(~write.covered(tmp_path, documents)).total
    free[0] = round(1.5 * left * write.expected(50, None))
    with pytest.raises(OSError, match="are free"):
        write.write(documents, teacher, header(teacher), tmp_path, ranks=2, show=False)
