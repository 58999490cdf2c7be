"""Pretrained models that read text: which files count, and batches by length.

A model is a folder as save_pretrained writes it, a name on the Hugging Face hub with its commit, or a
checkpoint of a run. Code that comes with a model is never run, and weights are read from safetensors alone.
Control tokens that a document spells stay text.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_r1 import backend
from megatron_r1.checkpoint.files import META
from megatron_r1.export.folder import identity, stored_tensors
from megatron_r1.export.origin import tokenizer_of
from megatron_r1.preprocess.auto_tokenizer import first_line
from megatron_r1.system.errors import hub_name, require, rewording, some
from megatron_r1.system.process import launch_number

CHARACTERS = 8
"""A document is cut to so many characters for each token that is read, before it is tokenized."""
BATCH_TOKENS = 8192
"""Tokens of a batch, padding and the instruction's keys counted."""
_FILES = ["model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_SETTINGS = {".json", ".jinja", ".txt", ".model"}
_READ_PADDING = {"convbert", "fnet"}
"""Kinds of models that mix a text with its padding, so that its result depends on the texts beside it."""


class Pretrained:
    """A model on this rank's device, with its tokenizer. Its weights are read when they are first needed.

    `tokens`: the first tokens of a document that are read, with the model's own, such as [CLS]. Weights and
    activations have `backend.fast_precision()`. Raises FileNotFoundError for no model, and ValueError for one
    that the hub does not give, that is damaged, takes fewer tokens, reads padding, or comes with code.
    """

    automatic = "AutoModel"
    """The class of transformers that makes the model."""
    unused: tuple[str, ...] = ()
    """How the names of weights begin that the files may lack."""

    def __init__(self, model: str, tokens: int, **settings: Any):
        self._library = require("transformers", "a model that judges text", "-e '.[hf]'")
        self._library.utils.logging.disable_progress_bar()
        self.model, self.tokens, self._settings = model, tokens, {**settings, "tokens": tokens}
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[backend.fast_precision()]
        # A temporary folder lives as long as this object.
        self._folder, self._held = _folder_of(model)
        self._stored = stored_tensors(self._folder)
        with self._fails_to("load"):
            self.config = self._from_folder("AutoConfig")
            self.tokenizer = self._from_folder("AutoTokenizer")
        # A model of text and images has one of its own for text.
        self._sizes = c = self.config.get_text_config()
        if not self.tokenizer.is_fast or len(self.tokenizer) > c.vocab_size:
            fault = f"{len(self.tokenizer)} tokens of {type(self.tokenizer).__name__}"
            raise ValueError(f"{model}: {fault} do not fit its vocabulary of {c.vocab_size}")
        # RoBERTa counts positions by it, and classifiers of decoders find a sequence's end.
        self._pad = max(0, getattr(c, "pad_token_id", None) or 0)
        # Most tokens of a sequence.
        self.longest = min(getattr(c, "max_position_embeddings", math.inf), self.tokenizer.model_max_length)
        if not 0 < tokens <= self.longest:
            raise ValueError(f"tokens={tokens}: {model} takes 1 to {self.longest}")
        if c.model_type in _READ_PADDING:
            raise ValueError(
                f"{model}: scores of {c.model_type} depend on the texts beside; take another model"
            )

    def _from_folder(self, name: str, **more: Any) -> Any:
        maker = getattr(self._library, name)
        return maker.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False, **more)

    def _fails_to(self, act: str) -> AbstractContextManager[None]:
        cannot = f"{self.model}: transformers {self._library.__version__} does not {act} it so"
        return rewording(lambda error: f"{cannot}: {first_line(error)}; take another model", Exception)

    @cached_property
    def network(self) -> Any:
        """The module, in eval mode."""
        how = {"use_safetensors": True, "output_loading_info": True}
        with self._fails_to("load"):
            network, report = self._from_folder(self.automatic, dtype=self._dtype, **how)
        # transformers would draw them at random.
        if absent := sorted(n for n in report["missing_keys"] if not n.startswith(self.unused)):
            fault = f"its files lack {some(absent, most=2)} of {type(network).__name__}"
            raise ValueError(f"{self.model}: {fault}; name a model that was trained for this")
        return backend.place(network.eval())

    @cached_property
    def identity(self) -> str:
        """SHA-256 over weights, configuration, tokenizer and settings."""
        files = [p for p in self._folder.rglob("*") if p.suffix in _SETTINGS and p.is_file()]
        (content,) = identity(self._folder, self._stored.values(), files).values()
        settings = json.dumps([type(self).__name__, self._settings], sort_keys=True)
        return hashlib.sha256(f"{content} {settings}".encode()).hexdigest()

    def flops(self, tokens: float) -> float:
        """Operations of a dense model for a document of so many tokens."""
        c, tokens = self._sizes, min(tokens, self.tokens)
        with self._fails_to("count"):
            heads, layers = c.num_attention_heads, c.num_hidden_layers
        width = heads * (getattr(c, "head_dim", 0) or c.hidden_size // heads)
        # Embeddings are looked up, and the logits of a vocabulary are not computed.
        shapes = [one.shape for name, one in self._stored.items() if "embed" not in name]
        products = sum(math.prod(s) for s in shapes if len(s) > 1 and c.vocab_size not in s)
        return tokens * (2.0 * products + 4.0 * layers * width * tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with the model's own tokens, at most `tokens` in all; of no text, padding."""
        fast = self.tokenizer.backend_tokenizer
        fast.encode_special_tokens = True
        fast.no_padding()
        fast.enable_truncation(self.tokens)
        return [one.ids or [self._pad] for one in fast.encode_batch_fast(cut(texts, self.tokens))]

    def run(self, ids: Sequence[Sequence[int]], forward: Forward, before: int = 0) -> np.ndarray:
        """Results of `forward` for sequences of ids, float32, in their order. `before`: keys before each.

        ValueError for a model that cannot be run so, and for results that are not finite.
        """
        length_N, results = np.array([len(one) for one in ids], dtype=np.int64), list[torch.Tensor]()
        order = list(batches(length_N, BATCH_TOKENS, before))
        # Loaded outside: its errors name themselves.
        assert self.network is not None
        with torch.inference_mode(), self._fails_to("run"):
            for batch in order:
                mask_BS = np.arange(length_N[batch[0]]) < length_N[batch, None]
                ids_BS = np.full(mask_BS.shape, self._pad, dtype=np.int64)
                ids_BS[mask_BS] = np.concatenate([ids[n] for n in batch])
                both = (torch.from_numpy(array).to(backend.device()) for array in (ids_BS, mask_BS))
                results.append(forward(*both).float())
        found = torch.cat(results).cpu().numpy() if results else np.zeros(0, np.float32)
        if not np.isfinite(found).all():
            fault = f"results in {self._dtype} for {len(found)} texts are not all finite"
            raise ValueError(f"{self.model}: {fault}; its weights are damaged, or too large for it")
        # The place of each text among the batches.
        return found[np.argsort(np.concatenate(order))] if results else found


Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids [B, S], mask [B, S], False at the padding on the right) -> [B, ...]."""


def cut(texts: Sequence[str], tokens: int) -> list[str]:
    """The beginning of each text, as tokenizing takes the length of all of it."""
    return [text[: CHARACTERS * tokens] for text in texts]


def batches(length_N: np.ndarray, budget: int, before: int = 0) -> Iterator[np.ndarray]:
    """Indices of the sequences of each batch, from the longest on.

    Rows, times `before` and the longest of them, stay within `budget`. A batch has at least one.
    """
    order = np.argsort(-length_N, kind="stable")
    while len(order):
        rows = max(1, budget // max(1, before + int(length_N[order[0]])))
        yield order[:rows]
        order = order[rows:]


def _folder_of(model: str) -> tuple[Path, object]:
    """The folder with a model's files, and the object that it lives as long as."""
    path = Path(model)
    if (path / META).is_file():
        if dist.is_initialized() or launch_number("WORLD_SIZE", 1) > 1:
            way_out = f"convert it beforehand by tools/convert_checkpoint.py --to hf {path} FOLDER"
            raise ValueError(f"{path} is a checkpoint, which a launch of ranks does not convert; {way_out}")
        # These need megatron-core, whose import takes seconds.
        from megatron_r1.export.convert import to_hf
        from megatron_r1.export.tokenizer import tokenizer_files

        held = tempfile.TemporaryDirectory(prefix="checkpoint-")
        target, tokenizer = Path(held.name, "hf"), tokenizer_files(*tokenizer_of(path))
        to_hf(path, target, tokenizer=tokenizer)
        return target, held
    if path.is_dir():
        return path, None
    repository, revision = hub_name(model, "no model at")
    hub = require("huggingface_hub", "a model of the hub")
    absent = f"{model} is no folder here, and the hub did not give it"
    way_out = f"fetch it by: hf download {repository} --revision {revision}"
    with rewording(lambda error: f"{absent}: {first_line(error)}; {way_out}", OSError, ValueError):
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=_FILES)), None
