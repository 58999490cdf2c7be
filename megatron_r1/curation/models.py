"""Sentence embeddings of documents by a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_r1.export.folder import MOST_JSON
from megatron_r1.export.pretrained import Pretrained
from megatron_r1.system.errors import shown
from megatron_r1.system.json_io import mistake, read_json, read_object

_MODULES = {"Transformer", "Pooling", "Normalize"}
_TAKES_FIRST = {"mean": False, "mean_tokens": False, "cls": True, "cls_token": True}
"""Way of pooling -> whether it takes the first token. sentence-transformers has written either name."""


class Embedder(Pretrained):
    """Sentence embeddings: the mean over a text's tokens, or its first one's where 1_Pooling says so."""

    unused = ("pooler.",)

    def __init__(self, model: str, tokens: int = 256):
        super().__init__(model, tokens)
        modules, pooling = self._folder / "modules.json", self._folder / "1_Pooling" / "config.json"
        listed = read_json(modules, MOST_JSON) if modules.is_file() else []
        form = read_object(pooling, MOST_JSON) if pooling.is_file() else {"pooling_mode": "mean"}
        if wrong := mistake(listed, [{"type": str}]):
            raise ValueError(f"{modules}: a module{wrong}; take another model")
        modes = [key.partition("mode_")[2] for key, value in form.items() if value is True and "mode_" in key]
        mode = str(form.get("pooling_mode") or ", ".join(modes))
        kinds = {one["type"].split(".")[-1] for one in listed}
        if kinds - _MODULES or mode not in _TAKES_FIRST:
            fault = f"{self.model}: modules {sorted(kinds)}, pooling by {shown(mode)}"
            raise ValueError(f"{fault}; a transformer with pooling by mean or cls is read")
        self._first = _TAKES_FIRST[mode]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32, rows of norm 1."""

        def forward(ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
            hidden_BSD = self.network(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state.float()
            # The norm makes a sum as good as a mean.
            sum_BD = hidden_BSD[:, 0] if self._first else (hidden_BSD * mask_BS[..., None]).sum(1)
            return torch.nn.functional.normalize(sum_BD)

        return self.run(self.encode(texts), forward)
