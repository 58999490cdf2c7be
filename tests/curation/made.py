"""Sources whose documents state their scores, pairs whose tokens are bytes, and models that read these."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.curation.request import CurationConfig, load
from megatron_r1.data.indexed import IndexedWriter
from megatron_r1.data.integrity import side_file
from megatron_r1.data.provenance import ORIGIN, text_hashes
from megatron_r1.system.files import write_json
from megatron_r1.system.yaml_io import format_yaml

WORDS = np.array([f"w{i}" for i in range(4000)])


def documents(seed: int, n: int, topic: str = "") -> list[dict[str, Any]]:
    """Documents of distinct words that state what each model gives them."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        q, j, d = rng.uniform(0, 5), rng.random(), rng.random()
        words = " ".join(WORDS[rng.integers(0, 4000, 30)])
        out.append({"text": f"q={q:.4f} j={j:.4f} d={d:.4f} {topic} {words}", "own": round(q, 4)})
    return out


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_pair(prefix: Path, texts: list[str], seed: int = 0) -> str:
    """A pair whose tokens are the texts' bytes, in another order than the texts'."""
    order = np.random.default_rng(seed).permutation(len(texts))
    texts = [texts[i] for i in order]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.uint16) as writer:
        for text in texts:
            writer.add_document(np.frombuffer(text.encode(), np.uint8).astype(np.uint16))
    about = {"tokenizer_type": "T", "tokenizer_fingerprint": "f", "vocab_size": 300, "eod": 299, "seed": 1}
    about |= {"dtype": "uint16", "documents": writer.num_documents, "tokens": writer.num_tokens}
    about |= {"append_eod": True, "inputs": [{"path": f"{prefix.name}.jsonl"}], "bin_sha256": writer.sha256}
    write_json(f"{prefix}.json", about)
    origins = np.zeros(len(texts), ORIGIN)
    origins["hash"], origins["line"] = text_hashes(text.encode() for text in texts), order + 1
    path = side_file(prefix, "docs.npy")
    path.parent.mkdir(exist_ok=True)
    np.save(path, origins)
    return str(prefix)


class Stated:
    """A model whose score stands in the text. Counts the texts that it was asked about."""

    def __init__(self, kind: str, identity: str = "a" * 64):
        self.identity, self.kind, self.asked = identity, kind, 0

    def __call__(self, texts) -> np.ndarray:
        if self.kind == "quality":
            return self._stated(texts, "q")
        self.asked += len(texts)
        return np.stack([_embedding(text) for text in texts])

    def judge(self, texts, prompt: str) -> np.ndarray:
        return self._stated(texts, "j" if "general" in prompt else "d")

    def _stated(self, texts, letter: str) -> np.ndarray:
        self.asked += len(texts)
        return np.array([float(re.search(rf"{letter}=([\d.]+)", text)[1]) for text in texts], np.float32)


def _embedding(text: str) -> np.ndarray:
    """Of the words that the text holds: equal words, equal embedding."""
    out = np.zeros(64, np.float32)
    for word in text.split()[3:]:
        out[hash_of(word) % 64] += 1
    return out / np.linalg.norm(out)


def hash_of(word: str) -> int:
    return int.from_bytes(text_hashes([word.encode()])[0, :4].tobytes(), "little")


def models(identity: str = "a" * 64):
    made: dict[str, Stated] = {}

    def make(config: CurationConfig, kind: str) -> Stated:
        return made.setdefault(kind, Stated(kind, identity))

    make.made = made  # type: ignore[attr-defined]
    return make


def request(folder: Path, sources: dict[str, dict[str, Any]], **changes: Any) -> CurationConfig:
    prompts = folder / "prompts"
    prompts.mkdir(exist_ok=True)
    for name in ("reasoning", "combined", *{d for s in sources.values() for d in s.get("domains", [])}):
        kind = "general" if name == "reasoning" else "special"
        (prompts / f"{name}.txt").write_text(f"{kind} {name}: {{document}}")
    tree = {
        "output": str(folder / "out"),
        "documents": 10,
        "pilot": 60,
        "most": 4000,
        "sources": sources,
        "quality": {"model": "Q", "threshold": 4.0},
        "judge": {"model": "J", "prompts": str(prompts), "keep": 0.5, "domain_keep": 0.8},
        "duplicates": {"near": 0.8},
        "probes": {"seq_length": 64, "max_document_tokens": 100},
        **changes,
    }
    path = folder / "request.yaml"
    path.write_text(format_yaml(tree))
    return load([str(path)])
