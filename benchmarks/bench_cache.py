"""Writing a teacher's cache against the teacher's forward pass alone: 1.03 x of it on a CPU is the bound.

python benchmarks/bench_cache.py [--teacher FOLDER] [--tokens 16384] [--turns 5] [--threads 1]

The teacher is a folder of Hugging Face and reads Python's own modules, or it has SmolLM2-135M's shape, random
weights and random ids, whose distributions are flat: each of 50 points is an id of its own, which is the most
work. Documents have 16 to 2,048 tokens. Both sides compute the logits of the same documents in bfloat16. One
leaves it at that, the other draws, packs and writes a part. Measured in turns in one process, processor
seconds. The medians are printed, and median and range of the turns' ratios. A bound that is missed stays in
the line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_r1.data.provenance import text_hashes
from megatron_r1.distill.cache import write_part
from megatron_r1.distill.documents import Documents
from megatron_r1.distill.draws import Header
from megatron_r1.distill.teacher import Teacher
from megatron_r1.distill.write import records

BOUND, LONGEST = 1.03, 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, help="folder of Hugging Face, as SmolLM2-135M-Instruct's")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.teacher or random_teacher(Path(temporary) / "teacher")
        teacher = Teacher(str(folder), "bf16")
        rows = cut(texts(folder) if options.teacher else random_ids(teacher.tokens), options.tokens)
        measure(teacher, rows, Path(temporary), options.turns)


def random_teacher(folder: Path) -> Path:
    """SmolLM2-135M's shape, and a tokenizer of as many tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*letters, *(f"word{i}" for i in range(49152 - len(letters)))])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="word0").save_pretrained(folder)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=8192)
    cast(Any, LlamaForCausalLM(config)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def random_ids(tokens: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    while True:
        yield generator.integers(0, tokens, LONGEST)


def texts(folder: Path) -> Iterator[np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for path in sorted(Path(argparse.__file__).parent.glob("*.py")):
        yield np.array(tokenizer(path.read_text()[:20000])["input_ids"], np.int64)


def cut(documents: Iterator[np.ndarray], tokens: int) -> list[np.ndarray]:
    """The beginnings of documents, of 16 to `LONGEST` tokens, so many that they have `tokens` together."""
    generator, out = np.random.default_rng(1), list[np.ndarray]()
    while (left := tokens - sum(map(len, out))) > 0:
        most = int(np.exp(generator.uniform(np.log(16), np.log(LONGEST))))
        out.append(next(documents)[: min(most, left)])
    return out


def measure(teacher: Teacher, rows: list[np.ndarray], folder: Path, turns: int) -> None:
    hash_DH, every = text_hashes(row.tobytes() for row in rows), np.arange(len(rows))
    of = {"tokens": lambda numbers: [rows[d] for d in numbers], "hash_DH": hash_DH, "name": str}
    documents = cast(Documents, SimpleNamespace(**of))
    header = Header("t", "v", teacher.tokens, 1.0, 50, None, 1234, teacher.bos, LONGEST)
    paths = list[Path]()

    def forward() -> None:
        for _ in teacher.logits(rows):
            pass

    def writing() -> None:
        paths.append(write_part(folder, header, records(teacher, header, documents, every)))

    forward()
    seconds, count, size = list[tuple[float, float]](), sum(map(len, rows)), 0
    for turn in range(turns):
        pair, acts = [0.0, 0.0], [(0, forward), (1, writing)]
        for which, act in acts[:: -1 if turn % 2 else 1]:
            begun = time.process_time()
            act()
            pair[which] = time.process_time() - begun
        seconds.append((pair[0], pair[1]))
        size = paths[-1].stat().st_size
        paths[-1].unlink()
    ratio = [b / a for a, b in seconds]
    alone, both = (statistics.median(times) * 1e6 / count for times in zip(*seconds, strict=True))
    print(f"teacher of {teacher.parameters:,} parameters, {count:,} tokens of {len(rows)} documents, "
          f"{torch.get_num_threads()} thread, {turns} turns")  # fmt: skip
    print(
        f"forward alone {alone:.0f} us a token, with draws and writing {both:.0f}, {size / count:.1f} bytes"
    )
    told = f"{statistics.median(ratio):.3f} ({min(ratio):.3f} to {max(ratio):.3f})"
    print(f"ratio {told}, bound {BOUND}: {'held' if statistics.median(ratio) <= BOUND else 'missed'}")


if __name__ == "__main__":
    main()
