"""Which parameters count: `influence.layers` -> names of the model's parameters. No torch.

Names are megatron-core's, with layers numbered through the whole model whatever the pipeline. The tied
embedding is one parameter under one name: its two uses, look-up and head, are never told apart.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

EMBEDDING = "embedding.word_embeddings.weight"
_LINEAR = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
_KINDS = {"all": ("*",), "linear": tuple(f"*.{name}" for name in _LINEAR), "embedding": (EMBEDDING,)}


def parameter_names(num_layers: int) -> list[str]:
    """Every parameter of a model, in no particular layout."""
    layers = [f"decoder.layers.{n}.{name}" for n in range(num_layers) for name in (*_LINEAR, *_NORMS)]
    return [EMBEDDING, *layers, "decoder.final_layernorm.weight"]


def select(layers: str | Sequence[str], num_layers: int) -> list[str]:
    """Names that "all", "linear" (the layers' matrices), "embedding" or globs over names select.

    Raises ValueError, with near names, for a word that selects nothing.
    """
    names = parameter_names(num_layers)
    chosen: set[str] = set()
    words = [layers] if isinstance(layers, str) else list(layers)
    if not words:
        raise ValueError("influence.layers is empty; use all, linear, embedding or names")
    for word in words:
        found = {name for glob in _KINDS.get(word, (word,)) for name in fnmatch.filter(names, glob)}
        if not found:
            near = difflib.get_close_matches(word, [*_KINDS, *names], n=3, cutoff=0.4) or names[:3]
            raise ValueError(
                f"influence.layers={word!r} selects no parameter; near: {', '.join(near)}. Globs are matched "
                f"against whole names: *mlp*, decoder.layers.0.*"
            )
        chosen |= found
    return [name for name in names if name in chosen]
