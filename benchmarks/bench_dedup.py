"""Near and semantic duplicates: ours against datasketch 2.0.0 and against the bare product, on one thread.

    pip install datasketch==2.0.0
    OMP_NUM_THREADS=1 python benchmarks/bench_dedup.py [--documents 5000] [--repeats 5] [--model FOLDER]

Near: pieces of 2 kB of the sources of Python and its packages, and copies of a tenth of them with 1 % of
the words replaced. Theirs is MinHash.bulk with xxh3 and MinHashLSH of the same bands: insert, and query, of
each document. It returns candidates, and the output says how many reach the threshold. Ours compares its
candidates in the measured time. Floor: 3 times the documents of a processor second, and within one percent
the same recall of copies that reach the threshold by plain sets of shingles.

Semantic: random embeddings of 384 numbers, and a near copy of a hundredth of them. The peer is the product of
all pairs alone, in the same blocks, which finds nothing. Floors: 0.8 of its rate, and recall 1.0 against a
plain search in float64. With --model, a folder of an embedding model, 500 texts are embedded, too. Floor:
embedding takes 0.95 of the time.

The arms take turns. Figures are of processor time, and ratios are medians over the turns with their range.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from megatron_r1.backend import cpu_products
from megatron_r1.curation.dedup import Pairs, lsh_bands, near_pairs, semantic_pairs

THRESHOLD, COSINE, D, BLOCK = 0.8, 0.95, 384, 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--embeddings", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="folder or name of an embedding model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    texts = sources(options.documents, random)
    near(texts, random, options.repeats)
    semantic(options.embeddings, random, options.repeats)
    if options.model:
        embedded(texts, options.model)


def sources(n: int, random: np.random.Generator) -> list[str]:
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"), key=str):
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts += [text[i : i + 2000] for i in range(0, len(text) - 1999, 2000)]
    return [texts[i] for i in random.permutation(len(texts))[:n]]


def near(texts: list[str], random: np.random.Generator, repeats: int) -> None:
    try:
        from datasketch import MinHash, MinHashLSH
    except ModuleNotFoundError:
        print("near: left out: pip install datasketch==2.0.0")
        return
    originals = random.choice(len(texts), len(texts) // 10, replace=False).tolist()
    pool = [word for text in texts[:100] for word in re.findall(r"\w+", text)]
    copies = []
    for i in originals:
        parts = re.split(r"(\w+)", texts[i])
        for at in random.choice(len(parts) // 2, max(1, len(parts) // 200), replace=False):
            parts[2 * at + 1] = pool[random.integers(len(pool))]
        copies.append("".join(parts))
    planted = [(i, len(texts) + k) for k, i in enumerate(originals)]
    texts = texts + copies
    bands, rows = lsh_bands(THRESHOLD)

    def shingles() -> list[set[bytes]]:
        split = [re.findall(r"\w+", text.lower()) for text in texts]
        return [{" ".join(w[i : i + 5]).encode() for i in range(max(1, len(w) - 4))} for w in split]

    def theirs() -> list[tuple[int, int]]:
        sets = clocked(shingles, "datasketch, its shingles")
        signatures = MinHash.bulk(
            sets, num_perm=bands * rows, hashfunc=lambda b: xxh3_64_intdigest(b) & 0xFFFFFFFF
        )
        index = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
        for i, signature in enumerate(signatures):
            index.insert(i, signature)
        found = [index.query(signature) for signature in signatures]
        return [(i, j) for i, others in enumerate(found) for j in others if i < j]

    for _ in range(repeats):
        candidates = clocked(theirs, "datasketch")
        pairs = clocked(lambda: near_pairs(texts, THRESHOLD), "ours")
    sets = shingles()
    like = {(i, j) for i, j in candidates if len(sets[i] & sets[j]) >= THRESHOLD * len(sets[i] | sets[j])}
    true = [(i, j) for i, j in planted if len(sets[i] & sets[j]) >= THRESHOLD * len(sets[i] | sets[j])]
    group = labels(len(texts), pairs)
    recall = [
        sum(test) / len(true)
        for test in ([group[i] == group[j] for i, j in true], [pair in like for pair in true])
    ]
    megabytes = sum(map(len, texts)) / 1e6
    print(f"near: {len(texts)} documents, {megabytes:.1f} MB, {bands} bands of {rows}")
    for name in ("ours", "datasketch", "datasketch, its shingles"):
        seconds = statistics.median(TIMES[name])
        print(f"  {name:25} {len(texts) / seconds:8.0f} documents/s {megabytes / seconds:6.1f} MB/s")
    print(f"  recall of {len(true)} planted copies: ours {recall[0]:.3f}, datasketch {recall[1]:.3f}")
    print(f"  datasketch's candidates that reach the threshold: {len(like)} of {len(candidates)}")
    ratio("near, documents a second, ours / datasketch (floor 3)", "datasketch", "ours")
    TIMES["datasketch, no shingles"] = [
        a - b for a, b in zip(TIMES["datasketch"], TIMES["datasketch, its shingles"], strict=True)
    ]
    ratio("near, ours whole / datasketch without its shingles", "datasketch, no shingles", "ours")


def semantic(n: int, random: np.random.Generator, repeats: int) -> None:
    cpu_products.use_onednn()
    e = random.standard_normal((n, D), dtype=np.float32)
    copies = n // 100
    e[-copies:] = e[:copies] + 0.2 * random.standard_normal((copies, D), dtype=np.float32)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    E = torch.from_numpy(e)

    def product() -> None:
        for i in range(0, n, BLOCK):
            for j in range(i, n, BLOCK):
                torch.mm(E[i : i + BLOCK], E[j : j + BLOCK].t())

    for _ in range(repeats):
        clocked(product, "product")
        pairs = clocked(lambda: semantic_pairs(e, COSINE, BLOCK), "semantic")
    true = set()
    for i in range(0, n, BLOCK):
        of, at = np.nonzero(e[i : i + BLOCK].astype(np.float64) @ e.T.astype(np.float64) >= COSINE)
        true |= {(int(a), int(b)) for a, b in zip(of + i, at, strict=True) if a < b}
    group = labels(n, pairs)
    found = sum(group[i] == group[j] for i, j in true) / len(true)
    seconds = statistics.median(TIMES["semantic"])
    print(f"semantic: {n} x {D}, {n / seconds:.0f} documents/s, {n * n * D / seconds / 1e9:.0f} GFLOP/s")
    print(f"  recall of {len(true)} pairs of a search in float64: {found:.4f}")
    ratio("semantic, rate, ours / the bare product (floor 0.8)", "product", "semantic")


def embedded(texts: list[str], model: str) -> None:
    from megatron_r1.curation.models import Embedder

    embed = Embedder(model)
    some = texts[:500]
    e = clocked(lambda: embed(some), "embed")
    # Embedding grows with the documents and the search with their square: both at as many as are there.
    repeated = np.resize(e, (len(texts), e.shape[1]))
    repeated += 0.05 * np.random.default_rng(0).standard_normal(repeated.shape, dtype=np.float32)
    repeated /= np.linalg.norm(repeated, axis=1, keepdims=True)
    clocked(lambda: semantic_pairs(repeated, COSINE), "search")
    seconds, search = TIMES["embed"][0] / len(some), TIMES["search"][0] / len(texts)
    print(
        f"embedding: {1 / seconds:.1f} documents/s; share of the time at {len(texts)} documents "
        f"{seconds / (seconds + search):.4f} (floor 0.95)"
    )


TIMES: dict[str, list[float]] = {}
"""Processor seconds of each arm, a turn."""
T = TypeVar("T")


def clocked(do: Callable[[], T], name: str) -> T:
    start = time.process_time()
    result = do()
    TIMES.setdefault(name, []).append(time.process_time() - start)
    return result


def labels(n: int, pairs: Pairs) -> list[int]:
    group = list(range(n))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, j in zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True):
        group[max(root(i), root(j))] = min(root(i), root(j))
    return [root(i) for i in range(n)]


def ratio(what: str, peer: str, ours: str) -> None:
    ratios = sorted(a / b for a, b in zip(TIMES[peer], TIMES[ours], strict=True))
    print(f"  {what}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
