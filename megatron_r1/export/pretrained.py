"""Pretrained models that read text: which files count, and batches by length.

A model is a folder as save_pretrained writes it, a name on the Hugging Face hub with its commit, or a
checkpoint of a run. Code that comes with a model is never run, and weights are read from safetensors alone.
Control tokens that a document spells stay text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
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
from megatron_r1.export.folder import content, local_folder, stored_tensors
from megatron_r1.export.origin import tokenizer_of
from megatron_r1.parallel import gather_objects
from megatron_r1.preprocess.auto_tokenizer import first_line
from megatron_r1.system.errors import require, rewording, some
from megatron_r1.system.process import launch_number

CHARACTERS = 8
"""A document is cut to so many characters for each token that is read, before it is tokenized."""
BATCH_TOKENS = 8192
"""Tokens of a batch, padding and the instruction's keys counted."""
_READ_PADDING = {"convbert", "fnet"}
"""Kinds of models that mix a text with its padding, so that its result depends on the texts beside it."""


class Pretrained:
    """A model on this rank's device, with its tokenizer. Its weights are read when they are first needed.

    `tokens`: the first tokens of a document that are read, with the model's own, such as [CLS]. `precision`:
    of weights and activations; None: `backend.fast_precision()`. `together`: every rank of the launch makes
    this one now, and a checkpoint is converted once a machine.

    Raises FileNotFoundError for no model, and ValueError for one that the hub does not give, that is damaged,
    takes fewer tokens, reads padding, or comes with code.
    """

    automatic = "AutoModel"
    """The class of transformers that makes the model."""
    unused: tuple[str, ...] = ()
    """How the names of weights begin that the files may lack."""

    def __init__(
        self,
        model: str,
        tokens: int,
        *,
        precision: str | None = None,
        together: bool = False,
        **settings: Any,
    ):
        self._library = require("transformers", "a pretrained model", "-e '.[hf]'")
        self._library.utils.logging.disable_progress_bar()
        self.model, self.reads, self._settings = model, tokens, {**settings, "tokens": tokens}
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision or backend.fast_precision()]
        # A temporary folder lives as long as this object.
        self._folder, self._held = _folder_of(model, together)
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
        settings = json.dumps([type(self).__name__, self._settings], sort_keys=True)
        whole = f"{content(self._folder, self._stored)} {settings}"
        return hashlib.sha256(whole.encode()).hexdigest()

    def flops(self, tokens: float) -> float:
        """Operations of a dense model for a document of so many tokens."""
        c, tokens = self._sizes, min(tokens, self.reads)
        with self._fails_to("count"):
            heads, layers = c.num_attention_heads, c.num_hidden_layers
        width = heads * (getattr(c, "head_dim", 0) or c.hidden_size // heads)
        # Embeddings are looked up, and the logits of a vocabulary are not computed.
        shapes = [one.shape for name, one in self._stored.items() if "embed" not in name]
        products = sum(math.prod(s) for s in shapes if len(s) > 1 and c.vocab_size not in s)
        return tokens * (2.0 * products + 4.0 * layers * width * tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with the model's own tokens, at most `reads` in all; of no text, padding."""
        fast = self.tokenizer.backend_tokenizer
        fast.encode_special_tokens = True
        fast.no_padding()
        fast.enable_truncation(self.reads)
        return [one.ids or [self._pad] for one in fast.encode_batch_fast(cut(texts, self.reads))]

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


def convert(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint with the tokenizer of its run's data as a folder of Hugging Face."""
    # These need megatron-core, whose import takes seconds.
    from megatron_r1.export.convert import to_hf
    from megatron_r1.export.tokenizer import tokenizer_files

    to_hf(checkpoint, target, tokenizer=tokenizer_files(*tokenizer_of(checkpoint)))


def _folder_of(model: str, together: bool) -> tuple[Path, object]:
    """The folder with a model's files, and the object that it lives as long as.

    `together`: every rank calls this. The folder then lives as long as the object of the machine's first one.
    """
    path = Path(model)
    if not (path / META).is_file():
        return local_folder(model), None
    launched = dist.is_initialized() or launch_number("WORLD_SIZE", 1) > 1
    if launched and not together:
        way_out = f"convert it beforehand by tools/convert_checkpoint.py --to hf {path} FOLDER"
        raise ValueError(f"{path} is a checkpoint, which a launch of ranks does not convert; {way_out}")
    held = tempfile.TemporaryDirectory(prefix="checkpoint-")
    target = Path(held.name, "hf")
    if not launched:
        convert(path, target)
        return target, held
    mine = {"machine": socket.gethostname(), "folder": "", "error": ""}
    if launch_number("LOCAL_RANK", 0) == 0:
        mine |= {"folder": str(target), "error": _converted_by_child(path, target)}
    every = gather_objects(mine)
    for one in every:
        if one["error"]:
            raise ValueError(one["error"])
    (folder,) = (one["folder"] for one in every if one["folder"] and one["machine"] == mine["machine"])
    return Path(folder), held


_LAUNCH = re.compile("RANK|WORLD_SIZE|LOCAL_.*|MASTER_.*|GROUP_.*|ROLE_.*|TORCHELASTIC_.*")
"""Variables of torchrun, by which a process takes itself for a rank."""


def _converted_by_child(checkpoint: Path, target: Path) -> str:
    """`convert` in a process of its own, which may have process groups of its own. Returns its error."""
    root = str(Path(__file__).parents[2])
    others = {name: value for name, value in os.environ.items() if not _LAUNCH.fullmatch(name)}
    others["PYTHONPATH"] = os.pathsep.join([root, others.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    call = f"from pathlib import Path; from {__name__} import convert; import sys"
    code = f"{call}; convert(*map(Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(checkpoint), str(target)]
    done = subprocess.run(command, env=others, capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return f"{checkpoint} is not converted: {last.removeprefix('ValueError: ')}" if done.returncode else ""
