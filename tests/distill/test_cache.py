"""The teacher's cache against plain Python: draws, records, parts, damage."""

import errno
import json
import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.distill import cache as module
from megatron_r1.distill import draws
from megatron_r1.distill.cache import BLOCK, Cache, merge, write_part
from megatron_r1.distill.draws import Drawn, Header, draw, draw_on_device, pack, uniforms, unpack
from megatron_r1.model.divergence import SparseTarget, linear_divergence

TINY = Header("teacher", "ids", 300, 1.0, 50, None, 7, None, 4096)
TOP = replace(TINY, draws=None, top_k=12)


def name_of(n: int) -> bytes:
    return np.random.default_rng([3, n]).integers(0, 256, 16, dtype=np.uint8).tobytes()


def logits(rows: int, tokens: int, seed: int = 0, width: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)) * width


def softmax(logits_NV: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    z_NV = logits_NV.double().numpy() / temperature
    p_NV = np.exp(z_NV - z_NV.max(1, keepdims=True))
    return np.asarray(p_NV / p_NV.sum(1, keepdims=True))


def as_rows(drawn: Drawn) -> list[dict[int, int]]:
    """Count by id of each record."""
    edge = np.append(0, drawn.distinct_N.cumsum())
    pairs = list(zip(drawn.id_E.tolist(), drawn.count_E.tolist(), strict=True))
    return [dict(pairs[lo:hi]) for lo, hi in pairwise(edge)]


# -- draws


@pytest.mark.parametrize(("tokens", "dtype"), [(2, "float32"), (300, "float32"), (20_001, "bfloat16")])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_draws_are_points_of_the_cumulated_distribution(tokens: int, dtype: str, temperature: float) -> None:
    """In plain float64. A point that rounding moves over an edge may fall on the neighbour with mass."""
    header = replace(TINY, tokens=tokens, temperature=temperature)
    # Padding with the largest logits of all is not drawn.
    padded_NV = torch.cat((logits(64, tokens), torch.full((64, 5), 99.0)), 1).to(getattr(torch, dtype))
    drawn = draw(padded_NV, header, name_of(1), 1000)
    p_NV = softmax(padded_NV[:, :tokens], temperature)
    point_NK = (uniforms(7, name_of(1), 1000, 64)[:, None] + np.arange(50)) / 50
    wrong = 0
    for n, got in enumerate(as_rows(drawn)):
        assert sum(got.values()) == 50
        want = np.searchsorted(p_NV[n].cumsum(), point_NK[n], side="right")
        wrong += int((np.repeat(list(got), list(got.values())) != want).sum())
        assert list(got) == sorted(got)
    assert wrong <= 2
    entropy_N = -(p_NV * np.log(np.maximum(p_NV, 1e-300))).sum(1)
    assert np.abs(drawn.entropy_N - entropy_N).max() < 2e-6


def test_torch_draws_what_the_cpu_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for other devices, in chunks of rows."""
    monkeypatch.setitem(draws._AT_ONCE, "cpu", 3000)
    z_NV, u_N = logits(100, 300), uniforms(1, name_of(0), 0, 100)
    id_NK, entropy_N = draw_on_device(z_NV, 1.5, u_N, 50)
    drawn = draw(z_NV, replace(TINY, temperature=1.5, seed=1), name_of(0), 0)
    want = np.concatenate([np.repeat(list(r), list(r.values())) for r in as_rows(drawn)]).reshape(100, 50)
    assert (id_NK != want).sum() <= 2
    assert np.abs(entropy_N - drawn.entropy_N).max() < 2e-6


def test_counts_are_unbiased() -> None:
    """Mean counts of 4,000 records of one distribution against n p, each within 4.5 of its standard errors.

    A count of a record is n p rounded down or up, so that the variance is known: f (1 - f), f the fraction.
    """
    z_NV = logits(1, 40, width=2.0).expand(4000, 40)
    expected_V = 50 * softmax(z_NV[:1])[0]
    total_V, each = np.zeros(40), []
    for row in as_rows(draw(z_NV, replace(TINY, tokens=40), name_of(5), 0)):
        count_V = np.array([row.get(v, 0) for v in range(40)])
        assert np.abs(count_V - expected_V).max() < 1
        total_V += count_V
        each.append(count_V)
    fraction_V = expected_V % 1
    error_V = np.sqrt(fraction_V * (1 - fraction_V) / 4000)
    assert np.abs((total_V / 4000 - expected_V) / error_V).max() < 4.5
    # The records are independent of one another: neighbours do not correlate.
    centred_NV = np.array(each) - expected_V
    assert np.abs((centred_NV[1:] * centred_NV[:-1]).mean(0) / error_V**2 / 4000).max() < 4.5 / math.sqrt(
        4000
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_gradient_is_the_exact_one(temperature: float, tmp_path: Path) -> None:
    """Of the trainer's loss by the student's hidden state, and the loss, over 3,000 records of a file."""
    header, n = replace(TINY, tokens=60, temperature=temperature), 3000
    teacher_1V, hidden_1D, weight_VD, bias_V1 = (
        logits(*shape, seed=k).double() for k, shape in enumerate(((1, 60), (1, 5), (64, 5), (64, 1)))
    )
    weight_VD = torch.cat((weight_VD, bias_V1), 1)
    hidden_ND = torch.cat((hidden_1D, torch.ones(1, 1)), 1).repeat(n, 1).requires_grad_()
    header.write(tmp_path)
    blocks = []
    for first in range(0, n, BLOCK):
        rows = teacher_1V.float().expand(min(BLOCK, n - first), 60)
        blocks.append((name_of(9), first, n, pack(header, draw(rows, header, name_of(9), first))))
    write_part(tmp_path, header, blocks)
    target = SparseTarget(*map(torch.from_numpy, Cache(tmp_path).read(name_of(9), 0, n)), tail=False)
    label_N, count_N = torch.full((n,), 3), torch.ones(n)
    how: dict[str, Any] = {"tokens": 60, "temperature": temperature, "weight": 0.75}
    total, loss_N, _ = linear_divergence(hidden_ND, weight_VD, label_N, count_N, target, **how)
    total.backward()
    # Plain, of the whole distribution.
    one_1D = hidden_ND.detach()[:1].requires_grad_()
    z_1V, p_1V = one_1D @ weight_VD[:60].t(), (teacher_1V / temperature).softmax(1)
    kl = (p_1V * (p_1V.log() - (z_1V / temperature).log_softmax(1))).sum()
    exact = 0.75 * temperature**2 * kl - 0.25 * z_1V.log_softmax(1)[0, 3]
    exact.backward()
    assert hidden_ND.grad is not None and one_1D.grad is not None
    error_D = hidden_ND.grad.std(0) / math.sqrt(n)
    assert (hidden_ND.grad.mean(0) - one_1D.grad[0]).abs().div(error_D).max() < 4.5
    # The interval is narrow: a fiftieth of the gradient's length.
    assert error_D.max() < one_1D.grad.norm() / 50
    # The entropy of a record is rounded to 10 bits.
    error = loss_N.std() / math.sqrt(n)
    assert abs(loss_N.mean() - exact) < 4.5 * error + 0.75 * temperature**2 * 0.004


def test_a_record_depends_on_seed_document_and_offset_alone() -> None:
    z_NV = logits(90, 300)
    whole = as_rows(draw(z_NV, TINY, name_of(2), 40))
    threads = torch.get_num_threads()
    for cut in (1, 7, 64):
        torch.set_num_threads(1 + cut % 2)
        parts = [draw(z_NV[n : n + cut], TINY, name_of(2), 40 + n) for n in range(0, 90, cut)]
        assert [row for part in parts for row in as_rows(part)] == whole
    torch.set_num_threads(threads)
    for other in (
        draw(z_NV, replace(TINY, seed=8), name_of(2), 40),
        draw(z_NV, TINY, name_of(3), 40),
        draw(z_NV, TINY, name_of(2), 41),
    ):
        assert sum(a != b for a, b in zip(as_rows(other), whole, strict=True)) > 80


def test_logits_of_another_vocabulary() -> None:
    for header in (TINY, TOP):
        with pytest.raises(ValueError, match="logits of 299 tokens, where the cache has 300"):
            draw(logits(2, 299), header, name_of(1), 0)


def test_certain_and_masked_ids() -> None:
    """An id of probability 1, ids of probability 0, and logits that lie far apart."""
    z_NV = torch.full((3, 300), -math.inf)
    z_NV[0, 299] = z_NV[1, 0] = z_NV[2, 17] = 5.0
    z_NV[2, 130] = 5.0
    first, second, third = as_rows(draw(z_NV, TINY, name_of(1), 0))
    assert (first, second) == ({299: 50}, {0: 50})
    assert third == {17: 25, 130: 25}
    assert as_rows(draw(torch.tensor([[-3e4, 3e4]]), replace(TINY, tokens=2), name_of(1), 0)) == [{1: 50}]


@pytest.mark.parametrize("header", [TINY, TOP])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(header: Header, bad: float) -> None:
    z_NV = logits(5, 300)
    z_NV[3, 200] = bad
    with pytest.raises(ValueError, match=f"behind token 13 of document {name_of(1).hex()} are not finite"):
        draw(z_NV, header, name_of(1), 10)


def test_top_k_is_the_largest_and_leaves_the_tail() -> None:
    z_NV = logits(50, 300)
    header = replace(TOP, temperature=2.0)
    drawn = draw(z_NV, header, name_of(1), 0)
    id_E, share_E, distinct_N, entropy_N = unpack(header, pack(header, drawn), 50)
    p_NV = softmax(z_NV, 2.0)
    for n, (ids, shares) in enumerate(zip(id_E.reshape(50, 12), share_E.reshape(50, 12), strict=True)):
        assert ids.tolist() == sorted(np.argsort(-p_NV[n])[:12].tolist())
        # Rounded down, so that the tail is never negative.
        assert (shares <= p_NV[n, ids] * (1 + 1e-6)).all()
        assert (shares >= p_NV[n, ids] * 0.999).all()
    assert (distinct_N == 12).all()
    assert np.abs(entropy_N + (p_NV * np.log(p_NV)).sum(1)).max() < 0.005


# -- records


@pytest.mark.parametrize("tokens", [2, 300, 49_152, 65_537, 128_256, 151_936, 1 << 24])
@pytest.mark.parametrize("draws", [1, 2, 50, 64, 256])
def test_records_come_back(tokens: int, draws: int) -> None:
    """Any counts, ids at both ends of the vocabulary, entropies within half a step."""
    random = np.random.default_rng(tokens + draws)
    header, rows = replace(TINY, tokens=tokens, draws=draws), []
    for _ in range(40):
        ids = random.choice(min(tokens, 1000), random.integers(1, min(tokens, draws) + 1), replace=False)
        ids = np.unique(np.where(ids % 2, ids, tokens - 1 - ids))
        counts = 1 + random.multinomial(draws - len(ids), np.ones(len(ids)) / len(ids))
        rows.append(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    entropy_N = random.uniform(0, math.log(tokens), 40).astype(np.float32)
    ids, counts = ([x for row in rows for x in of(row)] for of in (dict.keys, dict.values))
    drawn = Drawn(np.array(ids), np.array(counts), np.array([len(row) for row in rows]), entropy_N)
    id_E, share_E, distinct_N, back_N = unpack(header, pack(header, drawn), 40)
    assert as_rows(Drawn(id_E, np.rint(share_E * draws).astype(int), distinct_N, back_N)) == rows
    steps = (1 << 16 - (min(draws, tokens) - 1).bit_length()) - 1
    assert np.abs(np.sqrt(back_N) - np.sqrt(entropy_N)).max() < 0.51 * math.sqrt(math.log(tokens)) / steps


def test_a_record_is_as_small_as_promised() -> None:
    """16 ids of which 4 are drawn more than once, as of SmolLM2 on code, at the ids of Llama 3."""
    header = replace(TINY, tokens=128_256)
    ids = np.arange(16) * 8000
    counts = np.array([25, 8, 4, 2, *[1] * 11, 0])
    counts[-1] = 50 - counts.sum()
    n = 1000
    drawn = Drawn(np.tile(ids, n), np.tile(counts, n), np.full(n, 16), np.full(n, 2.0, np.float32))
    assert len(pack(header, drawn)) <= 46 * n


# -- files


def documents(
    header: Header, lengths: list[int]
) -> tuple[list[tuple[bytes, int, int, bytes]], dict[Any, Any]]:
    """Blocks of documents, and their records: (hash, offset) -> ({id: count}, entropy)."""
    blocks, records = [], {}
    for n, length in enumerate(lengths):
        for first in range(0, length, BLOCK):
            rows = min(BLOCK, length - first)
            drawn = draw(logits(rows, header.tokens, seed=100 * n + first), header, name_of(n), first)
            body = pack(header, drawn)
            blocks.append((name_of(n), first, length, body))
            ids, shares, distinct, entropy = unpack(header, body, rows)
            edge = np.append(0, distinct.cumsum())
            for r in range(rows):
                part = slice(edge[r], edge[r + 1])
                entries = dict(zip(ids[part].tolist(), shares[part].tolist(), strict=True))
                records[name_of(n), first + r] = entries, float(entropy[r])
    return blocks, records


LENGTHS = [5, 1, 1024, 1025, 2600, 40]


@pytest.fixture(scope="module")
def made() -> tuple[list[tuple[bytes, int, int, bytes]], dict[Any, Any]]:
    return documents(TINY, LENGTHS)


def write(folder: Path, blocks: list[tuple[bytes, int, int, bytes]], parts: int = 3) -> Path:
    """The blocks in parts, by document."""
    TINY.write(folder)
    for k in range(parts):
        write_part(folder, TINY, [b for b in blocks if int.from_bytes(b[0][:4], "little") % parts == k])
    return folder


def read_all(cache: Cache, lengths: list[int] = LENGTHS) -> dict[Any, Any]:
    """Every record of every document, read in stretches that cross blocks."""
    found = {}
    for n, length in enumerate(lengths):
        for first in range(0, length, 700):
            ids, shares, entropy = cache.read(name_of(n), first, min(length, first + 700))
            for r in range(len(ids)):
                entries = {i: s for i, s in zip(ids[r].tolist(), shares[r].tolist(), strict=True) if s}
                found[name_of(n), first + r] = entries, float(entropy[r])
    return found


def test_all_records_are_served(tmp_path: Path, made: Any) -> None:
    """From parts in memory, from a merged index, and from one beside newer parts, the same."""
    blocks, records = made
    write(tmp_path, blocks)
    assert read_all(Cache(tmp_path)) == records
    identity = Cache(tmp_path).identity
    index = merge(tmp_path)
    cache = Cache(tmp_path)
    assert [len(keys) for keys, _ in cache.tables] == [len(blocks)] and cache.identity == identity
    assert read_all(cache) == records
    more, others = documents(TINY, [*LENGTHS, 60])
    write_part(tmp_path, TINY, more[-1:])
    cache = Cache(tmp_path)
    assert [len(keys) for keys, _ in cache.tables] == [len(blocks), 1]
    # The header's part is the same.
    assert cache.identity != identity and cache.identity[:33] == identity[:33] and identity[32] == "+"
    assert read_all(cache) == records
    ids, _, entropy = cache.read(name_of(len(LENGTHS)), 3, 60)
    assert float(entropy[0]) == others[name_of(len(LENGTHS)), 3][1] and len(ids) == 57
    assert merge(tmp_path) != index and not index.exists() and len(Cache(tmp_path).tables) == 1
    assert read_all(Cache(tmp_path)) == records


def test_parts_do_not_depend_on_the_order_of_documents(tmp_path: Path, made: Any) -> None:
    one, two = (write(tmp_path / name, blocks) for name, blocks in (("a", made[0]), ("b", made[0][::-1])))
    assert {p.name: p.read_bytes() for p in one.glob("*.kd")} == {
        p.name: p.read_bytes() for p in two.glob("*.kd")
    }
    # A document that comes twice is there once.
    path = write_part(tmp_path / "a", TINY, [*made[0], *made[0]])
    assert path.name == write_part(tmp_path / "b", TINY, made[0]).name


def test_a_partial_cache_says_what_it_lacks(tmp_path: Path, made: Any) -> None:
    blocks, records = made
    TINY.write(tmp_path)
    hash_DH = np.frombuffer(b"".join(name_of(n) for n in range(len(LENGTHS))), np.uint8).reshape(-1, 16)
    length_D = np.array(LENGTHS)
    assert Cache(tmp_path).has(hash_DH, length_D).tolist() == [0] * len(LENGTHS)
    write_part(tmp_path, TINY, [b for b in blocks if b[0] in (name_of(0), name_of(4)) and b[1] != BLOCK])
    cache = Cache(tmp_path)
    assert cache.has(hash_DH, length_D).tolist() == [5, 0, 0, 0, 2600 - BLOCK, 0]
    first_D, last_D = np.array([1, 0, 1000]), np.array([4, 1, 2100])
    _, shares, entropy, known = cache.gather(hash_DH[[0, 1, 4]], first_D, last_D)
    want = [True] * 3 + [False] + [1000 <= o < 1024 or o >= 2048 for o in range(1000, 2100)]
    assert known.tolist() == want and not shares[~known].any() and not entropy[~known].any()
    assert np.allclose(shares[known].sum(1), 1)
    assert float(entropy[0]) == records[name_of(0), 1][1]
    with pytest.raises(KeyError, match=f"no records 0 to 1 of document {name_of(1).hex()}"):
        cache.read(name_of(1), 0, 1)


def test_another_length_is_another_document(tmp_path: Path, made: Any) -> None:
    cache = Cache(write(tmp_path, made[0]))
    hash_DH = np.frombuffer(name_of(0), np.uint8)[None]
    with pytest.raises(
        ValueError, match=f"{name_of(0).hex()} has 6 tokens, and 5 in the cache .*preprocess it"
    ):
        cache.has(hash_DH, np.array([6]))
    with pytest.raises(ValueError, match="has 6 tokens, and 5 in the cache"):
        cache.gather(hash_DH, np.array([0]), np.array([3]), np.array([6]))
    # Records that a document of this hash does not have, where nobody says its length.
    assert cache.gather(hash_DH, np.array([3]), np.array([9]))[3].tolist() == [False] * 6


@pytest.mark.parametrize(
    "change",
    [
        dict(teacher="other"),
        dict(vocabulary="other"),
        dict(tokens=301),
        dict(temperature=2.0),
        dict(draws=49),
        dict(seed=8),
        dict(bos=0),
        dict(context=512),
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_header_is_refused(tmp_path: Path, change: dict[str, Any], made: Any) -> None:
    TINY.write(tmp_path)
    replace(TINY, temperature=1).write(tmp_path)
    assert replace(TINY, temperature=1).digest == Header.read(tmp_path).digest
    ((field, value),) = change.items()
    with pytest.raises(ValueError, match=rf"another header: {field} \(.* there, {value} here\)"):
        replace(TINY, **change).write(tmp_path)
    assert Header.read(tmp_path) == TINY
    # A part that came from another folder is one of another header.
    other = tmp_path / "other"
    replace(TINY, **change).write(other)
    path = write_part(other, replace(TINY, **change), made[0][:1])
    path.rename(tmp_path / path.name)
    with pytest.raises(ValueError, match=f"{path.name} is of another cache"):
        Cache(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(draws=None), "give draws, or top_k"),
        (dict(top_k=5), "give draws, or top_k"),
        (dict(draws=257), "must be from 1 to 256"),
        (dict(tokens=1), "must be from 2"),
        (dict(tokens=1 << 60), "must be from 2"),
        (dict(format=2), "format"),
        (dict(more=1), "more"),
        (dict(seed="7"), "seed"),
    ],
)
def test_damaged_headers(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "header.json").write_text(json.dumps({**vars(TINY), **change}))
    with pytest.raises(ValueError, match=f"header.json is damaged: (.|\n)*{message}"):
        Cache(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no teacher cache"):
        Cache(tmp_path / "none")


@pytest.mark.parametrize("merged", [False, True])
def test_flipped_bytes_are_named(tmp_path: Path, merged: bool) -> None:
    """40 bytes, spread over every region of a file: none is served, and the error names file and block."""
    lengths = [5, 1, 1100, 60]
    blocks, records = documents(TINY, lengths)
    write(tmp_path, blocks, parts=1)
    if merged:
        merge(tmp_path)
    path = next(tmp_path.glob("index-*.kd" if merged else "part-*.kd"))
    places = [path] * 20 + [next(tmp_path.glob("part-*.kd"))] * 20
    named = 0
    for n, place in enumerate(places):
        good = place.read_bytes()
        table = len(blocks) * 48 + 32
        regions = [(0, 16), (16, 32), (32, 39), (39, len(good) - table), (len(good) - table, len(good))]
        lo, hi = regions[n % 5]
        at = lo + (n * 7919) % (hi - lo)
        place.write_bytes(good[:at] + bytes([good[at] ^ (1 << n % 8)]) + good[at + 1 :])
        try:
            assert read_all(Cache(tmp_path), lengths) == records
            # With an index over it, a part's own front and index are not read.
            assert merged and place.name.startswith("part-") and n % 5 != 3
        except ValueError as error:
            named += 1
            assert place.name in str(error), error
            if place.name.startswith("part-") and n % 5 == 3:
                block = next(
                    b
                    for b in blocks
                    if b[3] in good and good.index(b[3]) <= at < good.index(b[3]) + len(b[3])
                )
                assert f"block {block[1] // BLOCK} of document {block[0].hex()}" in str(error)
        place.write_bytes(good)
    assert named == (24 if merged else 40)


def test_truncated_parts_and_hostile_sizes(tmp_path: Path, made: Any) -> None:
    write(tmp_path, made[0], parts=1)
    path = next(tmp_path.glob("part-*.kd"))
    good = path.read_bytes()
    tail = len(good) - 32
    for content in (
        b"",
        good[:10],
        good[:39],
        good[: len(good) // 2],
        good[:-1],
        good[:tail] + (2**63).to_bytes(8, "little") + good[tail + 8 :],
        good[: tail + 8] + (2**64 - 1).to_bytes(8, "little") + good[tail + 16 :],
        good[:32] + b"\xff" * 4 + good[36:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is truncated, or its index damaged; remove it"):
            Cache(tmp_path)
    # An index whose places lie anywhere, with the hash of its own content: nothing is allocated for it.
    path.write_bytes(good)
    for change in ({"begin": 2**64 - 1}, {"bytes": 2**32 - 1}, {"tokens": 2**32 - 1}):
        cache = Cache(tmp_path)
        for field, value in change.items():
            cache.tables[0][1][field] = value
        with pytest.raises(ValueError, match=f"{path.name}: block . of document"):
            read_all(cache)
    # Under an index a part is opened when a block of it is read.
    path.write_bytes(good)
    merge(tmp_path)
    path.write_bytes(good[:100])
    with pytest.raises(ValueError, match=f"{path.name}: block . of document .* is damaged or missing"):
        read_all(Cache(tmp_path))
    cache = Cache(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}'; restore it, or run"):
        read_all(cache)
    with pytest.raises(FileNotFoundError, match=f"{path.name} does not exist, which index-.*--merge"):
        Cache(tmp_path)


def test_a_disk_that_fails_is_named(tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(write(tmp_path, made[0], parts=1))

    def pread(*place: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(OSError, match=cache.parts[0].name):
        cache.read(name_of(0), 0, 1)


def test_what_is_no_block_is_not_written(tmp_path: Path, made: Any) -> None:
    TINY.write(tmp_path)
    hash, _, tokens, body = made[0][0]
    for block in ((hash, 3, tokens, body), (hash, 0, tokens + 1, body), (hash, 0, tokens, body + b"\0")):
        with pytest.raises(ValueError, match=r"are not 6 records|are not 5 records|no block of a document"):
            write_part(tmp_path, TINY, [block])
    assert [path.name for path in tmp_path.iterdir()] == ["header.json"]


def test_few_files_are_open_at_once(tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OPEN", 8)
    TINY.write(tmp_path)
    body = made[0][0][3]
    for n in range(20):
        write_part(tmp_path, TINY, [(name_of(1000 + n), 0, LENGTHS[0], body)])
    before = len(os.listdir("/proc/self/fd"))
    cache = Cache(tmp_path)
    for n in range(20):
        cache.read(name_of(1000 + n), 0, 2)
    assert len(os.listdir("/proc/self/fd")) == before + 8
    del cache
    assert len(os.listdir("/proc/self/fd")) == before
