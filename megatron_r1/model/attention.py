"""Core attention and norm for where Transformer Engine is absent; plugged in by the layer spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked for megatron-core's sequence-parallel gradient sum."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps)
        if config.sequence_parallel:
            self.weight.sequence_parallel = True  # type: ignore[attr-defined]


class SdpaAttention(MegatronModule):
    """Causal attention on `scaled_dot_product_attention`, which is flash attention on a GPU.

    Under context parallelism the keys and values of all ranks are gathered; a rank's queries are
    megatron-core's zigzag halves (chunks r and 2n-1-r of 2n), so a mask replaces the causal flag.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.context_group = getattr(pg_collection, "cp", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[s, b, heads, d] queries, [s, b, groups, d] keys and values -> [s, b, heads * d]."""
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError("packed sequences need Transformer Engine's attention")
        s, b, heads, d = query.shape
        mask = None
        ranks = self.context_group.size() if self.context_group is not None else 1
        if self.context_group is not None and ranks > 1:
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=self.context_group)
                for t in (key, value)
            )
            position = _zigzag_positions(s, ranks, query.device)
            mask = position.flatten()[None, :] <= position[self.context_group.rank()][:, None]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=k.shape[1] != heads,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


def _zigzag_positions(local: int, ranks: int, device: torch.device) -> Tensor:
    """[ranks, local] sequence positions that each context-parallel rank holds."""
    chunk = local // 2
    chunks = torch.arange(2 * ranks * chunk, device=device).view(2 * ranks, chunk)
    return torch.cat([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)
