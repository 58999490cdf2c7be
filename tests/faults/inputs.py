"""Inputs of the fault tests, all invented, and the tools as a user calls them, in this process."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.data.indexed import IndexedWriter
from tests.launch import ROOT

END = "<|endoftext|>"
KIND = "HuggingFaceTokenizer"
DOCUMENTS = [f"alpha beta {i} the delta of idea {i * i} made under red trees" for i in range(12)]
SPLIT = ["--no-shuffle", "--output-prefix"]


def fault(case: str, reason: str, **more: Any) -> pytest.MarkDecorator:
    """The mark of a test that states the right value where today's code gives another."""
    # Nothing but a wrong answer counts: an import that fails is no fault of `case`.
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"{case}: {reason}", **more)


# Tools


@dataclass(frozen=True)
class Answer:
    status: int
    """0 done, 2 a mistake of the user's, 1 a traceback."""
    text: str
    """Standard output and error, with names of files as from the test's own folder."""


class Tools:
    """Calls `tools/NAME.py` with a command line; `folder` is left out of what they print."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, tool: str, *words: object) -> Answer:
        status, text = call(tool, *words)
        return Answer(status, text.replace(f"{self.folder}/", ""))

    def preprocess(self, name: str, inputs: object, tokenizer: Path, *more: object) -> Answer:
        """Tokenize `inputs`, a file or several, to `folder`/`name`."""
        files = inputs if isinstance(inputs, list) else [inputs]
        model = ["--tokenizer-type", KIND, "--tokenizer-model", tokenizer]
        return self("preprocess_data", *SPLIT, self.folder / name, "--input", *files, *model, *more)


def call(tool: str, *words: object) -> tuple[int, str]:
    """Exit status of a tool, and what it prints. Raises where a part of the package is missing."""
    said, arguments = io.StringIO(), sys.argv
    sys.argv = [f"{tool}.py", *map(str, words)]
    status = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except (ImportError, NameError, AttributeError):
        raise
    except Exception:
        # As Python ends a script.
        status = 1
        said.write(traceback.format_exc())
    finally:
        sys.argv = arguments
    return status, said.getvalue()


def train(directory: Path, *words: object, ranks: int = 1) -> Answer:
    """tools/train.py on forked ranks: the highest status, and what all of them print."""
    from tests.distributed import on_ranks

    statuses, texts = zip(*on_ranks(ranks, _train, [str(word) for word in words]), strict=True)
    return Answer(max(statuses), "".join(texts).replace(f"{directory}/", ""))


def _train(words: Sequence[str]) -> tuple[int, str]:
    # Set, so that the tool does not start its process anew for it.
    os.environ.setdefault("GLIBC_TUNABLES", "")
    return call("train", *words)


# Texts


def jsonl(path: Path, texts: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(prefix: Path) -> tuple[dict[str, Any], list[int]]:
    """Sidecar and tokens of the key "text"."""
    sidecar = json.loads(Path(f"{prefix}_text_document.json").read_text())
    dtype = sidecar.get("dtype", "uint16")
    return sidecar, np.fromfile(f"{prefix}_text_document.bin", np.dtype(dtype)).tolist()


def bin_bytes(prefix: Path) -> bytes:
    return Path(f"{prefix}_text_document.bin").read_bytes()


def pair(prefix: Path, documents: int = 40, tokens: int = 25, vocabulary: int = 250) -> Path:
    """A dataset without a sidecar whose documents end in 0, and 0 stands nowhere else."""
    rng = np.random.default_rng(3)
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for _ in range(documents):
            writer.add_document(np.append(rng.integers(1, vocabulary, tokens - 1), 0).astype(np.uint16))
        writer.finalize()
    return prefix


# Tokenizers


def letters() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def added(token: str, number: int, special: bool = True) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, "special": special, **plain}


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json of 260 tokens: END, 256 bytes, "de", "al", "1a"."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = [END, *sorted(letters().values()), "de", "al", "1a"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "added_tokens": [added(END, 0)],
        "pre_tokenizer": {**level, "use_regex": True},
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [["d", "e"], ["a", "l"], ["1", "a"]],
        },
    }


def tokenizer_folder(folder: Path, model: dict[str, Any], end: object = END) -> Path:
    """tokenizer.json and a tokenizer_config.json whose eos_token is `end`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(model))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return folder


def plain_tokenizer(folder: Path) -> Path:
    return tokenizer_folder(folder, tokenizer())


def ranks(path: Path, *words: bytes) -> Path:
    """Tiktoken ranks: the 256 bytes, then `words`."""
    tokens = [*(bytes([byte]) for byte in range(256)), *words]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
    return path


# Weights

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def weights(seed: int = 0, vocabulary: int = 32) -> dict[str, Any]:
    """Random fp32 tensors of LLAMA's one layer."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, 16),
        f"{layer}.input_layernorm.weight": (16,),
        f"{layer}.mlp.down_proj.weight": (16, 24),
        f"{layer}.mlp.gate_proj.weight": (24, 16),
        f"{layer}.mlp.up_proj.weight": (24, 16),
        f"{layer}.post_attention_layernorm.weight": (16,),
        f"{layer}.self_attn.k_proj.weight": (8, 16),
        f"{layer}.self_attn.o_proj.weight": (16, 16),
        f"{layer}.self_attn.q_proj.weight": (16, 16),
        f"{layer}.self_attn.v_proj.weight": (8, 16),
        "model.norm.weight": (16,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def hf_folder(folder: Path, tensors: dict[str, Any] | None = None, **changes: object) -> Path:
    """A Hugging Face folder: LLAMA with `changes`, and `tensors` in one file."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    save_file(weights() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def add_shards(folder: Path, tensors: dict[str, Any], misplaced: str | None = None) -> None:
    """Two shards and their index, which names the wrong shard for `misplaced`."""
    from safetensors.torch import save_file

    names = sorted(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    if misplaced:
        where[misplaced] = files[files[0] == where[misplaced]]
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# Configurations

MODEL = (
    "model={num_layers: 1, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 2, "
    "num_query_groups: 1, head_dim: 16, vocab_size: 400}"
)


def run_words(run: Path, prefix: Path, steps: int = 3) -> list[str]:
    """A run of a small model on one dataset, 4 windows of 64 tokens a step."""
    return [
        MODEL,
        f"train={{run: '{run}', global_batch: 4, micro_batch: 2, precision: fp32}}",
        f"data={{seq_length: 64, sources: {{x: {{prefix: '{prefix}'}}}}}}",
        f"phases.one={{steps: {steps}, learning_rate: 1e-3}}",
    ]


def line_of(text: str, pattern: str) -> str:
    """The first line that matches; fails where there is none."""
    found = [line for line in text.splitlines() if re.search(pattern, line)]
    assert found, f"no line with {pattern!r} in:\n{text}"
    return found[0]
