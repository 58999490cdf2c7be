"""What the files of a teacher say of it, before any of its weights is read. Imports no torch of its own."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import ModelConfig
from megatron_r1.distill.vocabulary import Vocabulary, identity, vocabulary_of
from megatron_r1.export import origin
from megatron_r1.export.folder import MOST_JSON, content, local_folder, stored_tensors
from megatron_r1.preprocess.tokenizer import HuggingFace, Tokenizer, build_tokenizer
from megatron_r1.system.errors import rewording, shown
from megatron_r1.system.json_io import read_object

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Keys of config.json for the context, by kind of model."""
_WIDTHS = ("num_attention_heads", "n_head"), ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Described:
    """A teacher: a folder of Hugging Face, a name on the hub as ORG/NAME@COMMIT, or a checkpoint of a run.

    `bos`: id of the token before each text; "none"; "auto": the one that its tokenizer puts there, and none
    for a checkpoint, whose data had none. Raises FileNotFoundError for no model, and ValueError for one that
    is damaged, has a vocabulary smaller than its tokenizer's, or a `bos` that it has not.
    """

    longest: float
    """Most tokens of a sequence; inf: the files name no limit."""
    parameters: int
    """Each counted once."""

    def __init__(self, model: str, bos: str | int = "auto"):
        self.model, self._path = model, Path(model)
        self._own: ModelConfig | None = None
        if (self._path / checkpoint_files.META).is_file():
            with rewording(lambda error: f"{model} describes no model: {shown(str(error))}"):
                described = checkpoint_files.read_meta(self._path)["model"]
                self._own = TypeAdapter(ModelConfig).validate_python(described)
            self.tokenizer: Tokenizer = build_tokenizer(*origin.tokenizer_of(self._path))
            self.longest, rows = origin.context_of(self._path), self._own.vocab_size
            self.parameters = self._own.parameters()
        else:
            self._folder = local_folder(model)
            self._stored = stored_tensors(self._folder)
            config = read_object(self._folder / "config.json", MOST_JSON)
            # A model of text and images has one of its own for text.
            self._sizes: dict[str, Any] = config.get("text_config") or config
            self.tokenizer = HuggingFace(self._folder)
            self.longest = next((self._sizes[key] for key in _CONTEXT if self._sizes.get(key)), math.inf)
            rows = self._sizes.get("vocab_size", 0)
            self.parameters = sum(math.prod(one.shape) for one in self._stored.values())
        self.tokens = self.tokenizer.vocab_size
        if self.tokens > rows:
            raise ValueError(f"{model}: {self.tokens} tokens do not fit its vocabulary of {rows}")
        self.bos = self._leading() if bos == "auto" else None if bos == "none" else int(bos)
        if self.bos is not None and self.bos not in self.vocabulary:
            raise ValueError(f"objective.bos={bos} is no token of {model}; give another id, auto or none")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return vocabulary_of(self.tokenizer)

    @property
    def vocabulary_identity(self) -> str:
        return identity(self.vocabulary)

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint()

    @cached_property
    def identity(self) -> str:
        """That of a checkpoint, else SHA-256 over weights, configuration and tokenizer, which are read."""
        return checkpoint_files.identity(self._path) if self._own else content(self._folder, self._stored)

    def flops_per_token(self, seq_length: int) -> float:
        """FLOP of a forward pass of one token in a sequence: 2 per weight that multiplies, causal attention.

        Of routed experts those count that a token takes. The vocabulary counts once.
        """
        if self._own is not None:
            return self._own.flops_per_token(seq_length) / 3
        c, products, head = self._sizes, 0.0, 0
        routed = next((c[key] for key in _EXPERTS if c.get(key)), 1)
        for name, one in self._stored.items():
            numbers = math.prod(one.shape) if len(one.shape) > 1 else 0
            if c["vocab_size"] in one.shape:
                head = max(head, numbers)
            elif "embed" not in name:
                expert = "experts" in name and "shared" not in name
                products += numbers * (c.get("num_experts_per_tok", 1) / routed if expert else 1)
        heads, hidden, layers = (next((c[key] for key in keys if c.get(key)), 0) for keys in _WIDTHS)
        width = heads * (c.get("head_dim") or hidden // max(1, heads))
        return 2.0 * (products + head) + 2.0 * layers * width * seq_length

    def _leading(self) -> int | None:
        if self._own is not None:
            return None
        bare, whole = (self.tokenizer._model.encode("a", add_special_tokens=on).ids for on in (False, True))
        before = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
        if before > 1:
            fault = f"the tokenizer of {self.model} puts {whole[:before]} before a text"
            raise ValueError(f"{fault}; choose one as objective.bos, or none")
        return int(whole[0]) if before else None
