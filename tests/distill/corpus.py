"""A tiny teacher of Hugging Face, two pairs of its tokenizer that share documents, and a configuration."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.open import OpenData, open_data
from megatron_r1.preprocess.preprocess import preprocess
from tests.curation import tiny
from tests.launch import TINY_MODEL

SEQ = 32
COMMON = tiny.texts(8, seed=3)
"""Documents of both sources."""
RARE = "q"
"""A token of the last document alone."""
TEXTS = {
    "a": [*tiny.texts(24, seed=1), *COMMON],
    # One is longer than a piece, and than a block of records.
    "b": [*COMMON, *tiny.texts(16, seed=2), " ".join([*tiny.texts(60, seed=4), RARE])],
}


def written(root: Path) -> Path:
    """root/teacher, and the pairs root/a and root/b, in the order of TEXTS."""
    tokenizer = tiny.byte_pairs(root / "teacher", begins=True)
    tiny.llama(root / "teacher", len(tokenizer))
    for name, texts in TEXTS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        pair(root, name, name)
    return root


def pair(root: Path, text: str, name: str, append_eod: bool = True) -> str:
    kind, teacher = "HuggingFaceTokenizer", root / "teacher"
    made = preprocess(
        [root / f"{text}.jsonl"],
        root / name,
        kind,
        teacher,
        append_eod=append_eod,
        seed=None,
        log=lambda line: None,
    )
    return str(next(iter(made)))


def words(root: Path, *more: str) -> list[str]:
    """Of a run of 4 steps whose phase is distilled from root/teacher by way of root/cache."""
    sources = ", ".join(f"{name}: {{prefix: '{root}/{name}_text_document'}}" for name in TEXTS)
    return [
        *TINY_MODEL,
        "model.vocab_size=512",
        f"train={{run: '{root}/run', global_batch: 4, micro_batch: 2, precision: fp32}}",
        f"data={{seq_length: {SEQ}, cross_documents: false, sources: {{{sources}}}}}",
        "phases.mid={steps: 4}",
        f"phases.mid.objective={{name: kd, teacher: '{root}/teacher', cache: '{root}/cache'}}",
        *more,
    ]


def opened(root: Path, *more: str) -> tuple[Config, OpenData]:
    return config_io.load_with(words(root, *more), lambda config: open_data(config, use="mix"))
