"""Genuine files of a run's data, small, and ways to spoil them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.data import plan_file
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, open_corpus, with_suffix
from megatron_r1.data.integrity import side_file
from megatron_r1.data.keep import load_mask, save_documents
from megatron_r1.data.provenance import ORIGIN, read_provenance
from megatron_r1.influence.store import check_inputs, read_scores
from megatron_r1.system.files import sha256, write_json
from tests.mixture.mixture_scores import write_scores

SEQ, DOCUMENTS = 16, 60
KINDS: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "../../x", "/etc/passwd", "a\0b", "\ud800", "y" * 100_000, [], [1], ["x"] * 3,
    [[]], {}, {"x": 1}, {"x": {"y": []}}, [None] * 1000,
]  # fmt: skip
"""Values of every kind that JSON has."""


def make(folder: Path) -> dict[str, tuple[list[Path], Callable[[], Any]]]:
    """Files by kind, and a reader of them. The reader raises nothing as long as they are as they were."""
    prefix, lengths = folder / "web", np.random.default_rng(0).integers(2, 40, DOCUMENTS)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.arange(length, dtype=np.uint16))
    inputs = [{"path": "a.jsonl", "sha256": "0" * 64}]
    counts = {"documents": DOCUMENTS, "tokens": int(lengths.sum()), "dtype": "uint16", "inputs": inputs}
    hashes = {"bin_sha256": writer.sha256, "idx_sha256": sha256(with_suffix(prefix, ".idx"))}
    told = {"seed": 1, "vocab_size": 64, "eod": 0, "append_eod": True, "tokenizer_fingerprint": "f" * 64}
    sidecar, origins = with_suffix(prefix, ".json"), side_file(prefix, "docs.npy")
    write_json(sidecar, {**counts, **hashes, **told})
    records = np.zeros(DOCUMENTS, ORIGIN)
    records["line"] = np.arange(DOCUMENTS) + 1
    np.save(origins, records)
    corpus = open_corpus("web", prefix)
    windows = corpus.windows(SEQ)
    save_documents(folder / "keep.npz", corpus, np.arange(DOCUMENTS) % 3 > 0, SEQ)
    np.save(folder / "keep.npy", np.packbits(np.arange(windows) % 2 == 0, bitorder="little"))
    plan = BlendPlan({"web": windows, "other": 9})
    plan.add_phase(0, [1, 3], max_epochs=4)
    plan.add_phase(40, {"web": 0.25, "other": 0.75}, {"web": 9.5}, {"web": str(folder / "keep.npy")})
    text = folder / "plan.json"
    text.write_text(plan_file.to_json(plan, {"web": "0" * 64, "other": "1" * 64}))
    run, scored = folder / "run", folder / "run/influence/step_00000004/web"
    said: dict[str, Any] = {
        "capabilities": ["code", "math"], "position": 0, "data": {"hash": "0"}, "directions": {"code": {}},
        "influence": {"unit": "window", "loss": "mean", "norms": True, "curvature": "adam"}, "seq_length": 16,
        "direction_norms": {"code": 1.0, "math": 2.0},
    }  # fmt: skip
    write_scores(run, 4, "web", np.ones((7, 2)), np.arange(7), np.full(7, SEQ), np.ones(7), **said)
    manifest = scored / "manifest.json"

    def follow() -> None:
        followed = plan_file.from_json(text.read_text("utf-8", "surrogateescape"))
        plan_file.datasets_of(text.read_text("utf-8", "surrogateescape"))
        followed.locate_range(0, 60)
        plan_file.to_json(followed)

    def pair() -> None:
        open_corpus("web", prefix)
        dataset = IndexedDataset(prefix)
        for document in range(dataset.num_documents):
            dataset.document(document)

    def scores() -> None:
        check_inputs(scored, json.loads((folder / "manifest.json").read_text()))
        for table in read_scores(run):
            assert np.isfinite(table.score_NCK).all() and (np.diff(table.example_N) > 0).all()

    (folder / "manifest.json").write_bytes(manifest.read_bytes())
    arrays = [
        scored / f"{name}.npy" for name in ("scores", "losses", "tokens", "examples", "norms", "written")
    ]
    return {
        "pair": (
            [with_suffix(prefix, s) for s in (".idx", ".bin")] + [side_file(prefix, "hashes.npy")],
            pair,
        ),
        "sidecar": ([sidecar], pair),
        "origins": ([origins], lambda: read_provenance(prefix)),
        "mask": ([folder / "keep.npz"], lambda: load_mask("web", windows, folder / "keep.npz")),
        "plain mask": ([folder / "keep.npy"], lambda: load_mask("web", windows, folder / "keep.npy")),
        "plan": ([text], follow),
        "scores": (arrays, scores),
        "manifest": ([manifest], scores),
    }


def spoiled(content: bytes, seed: int) -> bytes:
    """The bytes changed, cut, repeated or longer; JSON with a value of another kind."""
    pick = random.Random(seed)
    if content[:1] == b"{" and pick.random() < 0.8:
        tree = json.loads(content)
        places = list(leaves(tree))
        node, key = pick.choice(places)
        node[key] = pick.choice(KINDS)
        return json.dumps(tree).encode()
    way, at = pick.randrange(5), pick.randrange(len(content) + 1)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + pick.randbytes(pick.randrange(1, 40)) + content[at:]
    if way == 2:
        return content + content[at:]
    changed = bytearray(content)
    for _ in range(pick.choice((1, 1, 2, 8))):
        # More of them in headers and lists at the ends.
        near = pick.choice((len(changed), 200, 64))
        place = (
            pick.randrange(len(changed)) if near == len(changed) else pick.randrange(min(near, len(changed)))
        )
        place = place if pick.random() < 0.7 else len(changed) - 1 - place
        changed[place] = pick.choice(
            (0, 255, 128, pick.randrange(256), changed[place] ^ (1 << pick.randrange(8)))
        )
    return bytes(changed)


def leaves(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each value below a JSON value, as (what holds it, its key or number)."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from leaves(value)
