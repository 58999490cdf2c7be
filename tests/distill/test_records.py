"""Records of windows: the same bytes for a document's label, whatever else of a run changes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.config import ParallelConfig
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.indexed import IndexedWriter, open_corpus
from megatron_r1.data.integrity import side_file
from megatron_r1.data.loader import BatchLoader
from megatron_r1.data.provenance import ORIGIN, text_hashes
from megatron_r1.distill.cache import BLOCK, Cache, merge, write_part
from megatron_r1.distill.draws import Header, draw, pack, unpack
from megatron_r1.distill.records import WindowRecords
from megatron_r1.parallel import ParallelContext, process_groups
from megatron_r1.records import Batch, Corpus
from megatron_r1.train.batches import StepBatches, micro_batches
from tests.distributed import on_ranks

HEADER = Header("teacher", "ids", 97, 1.0, 50, None, 7, None, 4096)
EOD = 0
Label = tuple[bytes, int]


def text(source: str, n: int) -> tuple[bytes, np.ndarray]:
    """Hash and tokens of a document; the second of each source is the same text, and the third is long."""
    random = np.random.default_rng([len(source), n] if n != 1 else [99])
    length = 2300 if n == 2 else int(random.integers(1, 60))
    tokens = np.append(random.integers(1, 97, length - 1), EOD)
    return text_hashes([tokens.tobytes()])[0].tobytes(), tokens


COUNT = {"web": 60, "maths": 40}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Corpus], Path, dict[Label, Any]]:
    """Two pairs, a cache of all their documents, and the cache as a dictionary."""
    folder = tmp_path_factory.mktemp("records")
    HEADER.write(folder / "cache")
    oracle: dict[Label, Any] = {}
    corpora = []
    for source, count in COUNT.items():
        origins, blocks = np.zeros(count, ORIGIN), []
        with IndexedWriter(folder / source, np.uint16) as writer:
            for n in range(count):
                hash, tokens = text(source, n)
                writer.add_document(tokens.astype(np.uint16))
                origins[n] = np.frombuffer(hash, np.uint8), 0, n + 1
                blocks += list(blocks_of(hash, len(tokens), oracle))
        side_file(folder / source, "docs.npy").parent.mkdir(exist_ok=True)
        np.save(side_file(folder / source, "docs.npy"), origins)
        write_part(folder / "cache", HEADER, blocks)
        corpora.append(open_corpus(source, folder / source))
    return corpora, folder / "cache", oracle


def blocks_of(hash: bytes, length: int, oracle: dict[Label, Any]) -> Iterator[tuple[bytes, int, int, bytes]]:
    seed = int.from_bytes(hash[:4], "little")
    logits = torch.randn(length, 97, generator=torch.Generator().manual_seed(seed)) * 3
    for first in range(0, length, BLOCK):
        rows = min(BLOCK, length - first)
        body = pack(HEADER, draw(logits[first : first + rows], HEADER, hash, first))
        ids, shares, distinct, entropies = unpack(HEADER, body, rows)
        at = 0
        for r, k in enumerate(distinct.tolist()):
            oracle[hash, first + r] = list(
                zip(ids[at : at + k].tolist(), shares[at : at + k].tolist(), strict=True)
            )
            oracle[hash, first + r].append(float(entropies[r]))
            at += k
        yield hash, first, length, body


def stream(source: str) -> list[Label]:
    """Document and offset of each token of a source, in plain Python."""
    found = (text(source, n) for n in range(COUNT[source]))
    return [(hash, offset) for hash, tokens in found for offset in range(len(tokens))]


STREAM = {source: stream(source) for source in COUNT}


def served(batch: Batch, plan: BlendPlan, sample_N: np.ndarray, seq_length: int) -> dict[Label, Any]:
    """What a batch has for each label; the places are looked up in plain Python."""
    found, names = {}, list(plan.sources)
    assert batch.teacher is not None
    ids_BSK, share_BSK = batch.teacher.ids_BSK.tolist(), batch.teacher.share_BSK.tolist()
    for row, sample in enumerate(sample_N.tolist()):
        source, _, window = plan.locate(sample)
        for s in range(seq_length):
            entries = [(i, p) for i, p in zip(ids_BSK[row][s], share_BSK[row][s], strict=True) if p]
            label = STREAM[names[source]][window * seq_length + s]
            found[label] = [*entries, float(batch.teacher.entropy_BS[row, s])]
            assert batch.loss_mask_BS[row, s] == 1
    return found


def loader(
    corpora: list[Corpus], folder: Path, weights: dict[str, int], seq_length: int
) -> tuple[BatchLoader, BlendPlan]:
    made = BlendPlan({c.name: c.windows(seq_length) for c in corpora})
    made.add_phase(0, weights)
    found = BatchLoader(made, corpora, seq_length, eod=EOD)
    found.records = WindowRecords(Cache(folder), corpora[::-1], list(made.sources), seq_length)
    return found, made


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"corpora": -1},
        {"seq_length": 17},
        {"seq_length": 1500},
        {"merged": True},
    ],
    ids=str,
)
def test_a_label_has_the_same_record_whatever_changes(
    data: tuple[list[Corpus], Path, dict[Label, Any]], change: dict[str, Any], tmp_path: Path
) -> None:
    """Order of sources, packing, an index: each label's record is the one in the dictionary."""
    corpora, folder, oracle = data
    corpora = corpora[:: change.get("corpora", 1)]
    seq_length = change.get("seq_length", 32)
    if change.get("merged"):
        shutil.copytree(folder, tmp_path / "merged")
        folder = tmp_path / "merged"
        merge(folder)
    batches, plan = loader(corpora, folder, {"web": 3, "maths": 1}, seq_length)
    seen: dict[Label, Any] = {}
    for sample_N in np.arange(max(1, min(240, 240 * 32 // seq_length) // 6) * 6).reshape(-1, 6):
        seen |= served(batches.batch(sample_N), plan, sample_N, seq_length)
    assert len(seen) > 1500 and {key: oracle[key] for key in seen} == seen


def test_labels_without_a_record_do_not_count(
    data: tuple[list[Corpus], Path, dict[Label, Any]], tmp_path: Path
) -> None:
    """A cache of the first pair's documents alone: of the second the shared document is known."""
    corpora, _, _ = data
    HEADER.write(tmp_path)
    write_part(
        tmp_path,
        HEADER,
        [b for n in range(60) for h, t in [text("web", n)] for b in blocks_of(h, len(t), {})],
    )
    batches, plan = loader(corpora, tmp_path, {"web": 1, "maths": 1}, 32)
    known = {text("web", n)[0] for n in range(60)}
    counts = {True: 0, False: 0}
    for sample in range(120):
        batch = batches.batch(np.array([sample]))
        source, _, window = plan.locate(sample)
        labels = STREAM[list(plan.sources)[source]][window * 32 : window * 32 + 32]
        want = [hash in known for hash, _ in labels]
        assert batch.loss_mask_BS[0].tolist() == want
        assert batch.teacher is not None and (batch.teacher.share_BSK[0].sum(-1) > 0).tolist() == want
        for there in want:
            counts[there] += 1
    assert min(counts.values()) > 500


def test_a_document_of_another_length(
    data: tuple[list[Corpus], Path, dict[Label, Any]], tmp_path: Path
) -> None:
    corpora, _, _ = data
    HEADER.write(tmp_path)
    hash, tokens = text("web", 0)
    write_part(tmp_path, HEADER, blocks_of(hash, len(tokens) + 1, {}))
    records = WindowRecords(Cache(tmp_path), corpora, ["maths", "web"], 32)
    fault = f"{hash.hex()} has {len(tokens)} tokens, and {len(tokens) + 1} in the cache"
    with pytest.raises(ValueError, match=fault):
        records(np.array([1]), np.array([0]))


def test_a_pair_without_provenance(data: tuple[list[Corpus], Path, dict[Label, Any]], tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "bare", np.uint16) as writer:
        writer.add_document(np.arange(40, dtype=np.uint16))
    corpus = open_corpus("bare", tmp_path / "bare")
    with pytest.raises(ValueError, match=r"source 'bare' says no document's hash.*preprocess_data.py"):
        WindowRecords(Cache(data[1]), [corpus], ["bare"], 8)


def test_documents_and_sequences_without_tokens(
    data: tuple[list[Corpus], Path, dict[Label, Any]], tmp_path: Path
) -> None:
    """Empty documents at both ends and between others have no label."""
    lengths = [0, 0, 5, 0, 3, 1, 0, 0, 9, 0]
    origins = np.zeros(len(lengths), ORIGIN)
    with IndexedWriter(tmp_path / "gaps", np.uint16) as writer:
        for n, length in enumerate(lengths):
            writer.add_document(np.full(length, 3, np.uint16))
            origins[n] = np.full(16, n, np.uint8), 0, 1
    side_file(tmp_path / "gaps", "docs.npy").parent.mkdir(exist_ok=True)
    np.save(side_file(tmp_path / "gaps", "docs.npy"), origins)
    places = WindowRecords(Cache(data[1]), [open_corpus("gaps", tmp_path / "gaps")], ["gaps"], 4)._places[0]
    want = [(n, offset, length) for n, length in enumerate(lengths) for offset in range(length)]
    for tokens in (1, 2, 4, 7, 18):
        for first in range(0, 18 - tokens + 1):
            hash_DH, first_D, last_D, length_D = places.of_window(first, tokens)
            got = [
                (int(hash[0]), offset, int(length))
                for hash, lo, hi, length in zip(hash_DH, first_D, last_D, length_D, strict=True)
                for offset in range(lo, hi)
            ]
            assert got == want[first : first + tokens]


def _ranks(corpora: list[Corpus], folder: Path) -> list[Any]:
    """Whole tokens, tokens and records of this rank's micro-batches of samples 0 to 7."""
    with process_groups(ParallelConfig(context=2)) as context:
        batches, _ = loader(corpora, folder, {"web": 3, "maths": 1}, 32)
        found = []
        for batch in micro_batches(batches, 0, 8, 2, context):
            assert batch.teacher is not None and batch.whole_BS is not None
            fields = batch.whole_BS, batch.tokens_BS, *vars(batch.teacher).values()
            found.append([field.numpy() for field in fields])
        _check_unreadable(batches, corpora, context)
        return found


def _check_unreadable(batches: BatchLoader, corpora: list[Corpus], context: ParallelContext) -> None:
    """A step whose records cannot be read goes on without labels, and its batches have records of nothing."""
    train = SimpleNamespace(global_batch=8, micro_batch=2)
    config: Any = SimpleNamespace(
        train=train,
        phases={},
        data=SimpleNamespace(seq_length=32),
        model=SimpleNamespace(vocab_size=97),
    )
    data: Any = SimpleNamespace(plan=batches.plan, corpora=corpora, eod=EOD)
    step = StepBatches(config, data, context)

    def damaged(source_N: np.ndarray, window_N: np.ndarray) -> Any:
        raise ValueError("a block is damaged")

    step.records = damaged
    made = list(step.of_step(0))
    assert str(step.errors[0]) == "a block is damaged" and len(made) == step.passes
    for batch in made:
        assert batch.teacher is not None and not batch.loss_mask_BS.any()
        assert batch.teacher.ids_BSK.shape == batch.teacher.share_BSK.shape == (2, 16, 1)
        assert not batch.teacher.share_BSK.any() and batch.teacher.ids_BSK.dtype == torch.int32


def test_context_parallelism_cuts_records_as_tokens(
    data: tuple[list[Corpus], Path, dict[Label, Any]],
) -> None:
    corpora, folder, _ = data
    batches, _ = loader(corpora, folder, {"web": 3, "maths": 1}, 32)
    found = on_ranks(2, _ranks, corpora, folder)
    for n in range(4):
        batch = batches.batch(np.arange(2 * n, 2 * n + 2))
        assert batch.teacher is not None and batch.teacher.share_BSK.count_nonzero() > 64
        for rank, parts in enumerate(([0, 3], [1, 2])):
            column = np.concatenate([np.arange(8 * part, 8 * part + 8) for part in parts])
            whole, tokens, *records = found[rank][n]
            assert np.array_equal(whole, batch.tokens_BS)
            assert np.array_equal(tokens, batch.tokens_BS[:, column])
            for got, want in zip(records, vars(batch.teacher).values(), strict=True):
                assert np.array_equal(got, want[:, column])
