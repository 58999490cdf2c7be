"""Core attention and norm for where Transformer Engine is absent; plugged in by the layer spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1 import backend

# isort: split
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_r1.backend.cpu_attention import causal_attention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked for megatron-core's sequence-parallel gradient sum."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps)
        if config.sequence_parallel:
            self.weight.sequence_parallel = True  # type: ignore[attr-defined]


class SdpaAttention(MegatronModule):
    """Causal attention: `scaled_dot_product_attention`, which is flash attention on a GPU, or cpu_attention.

    Under context parallelism the keys and values of all ranks are gathered; a rank's queries are
    megatron-core's zigzag halves (chunks r and 2n-1-r of 2n), so a mask replaces the causal flag.

    megatron-core hands `attention_mask` through untouched; here it is None or `Batch.documents`: the document
    number of each token of this rank's sequences, int [b, s], not falling along a row, or int32 [n + 1] where
    each document begins. Then no token sees another document. On a CPU and by `backend.document_attention`
    each document is attended by itself, which also saves the work between documents. Elsewhere, in fp32 on a
    GPU and under context parallelism, a mask of [b, s, s] is built.
    """

    def __init__(
        self,
        config: Any,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
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
            raise NotImplementedError(
                "packed_seq_params and attention_bias need Transformer Engine's attention"
            )
        s, b, heads, d = query.shape
        segment, mask = attention_mask, None
        if segment is not None and segment.dim() == 1:
            if query.dtype == torch.bfloat16 and d % 8 == 0 and d <= 256:
                return self._end_to_end(query, key, value, segment)
            tokens = torch.arange(b * s, device=query.device, dtype=torch.int32)
            segment = torch.bucketize(tokens, segment, right=True).view(b, s)
        key_segment = segment
        group = self.context_group
        if group is not None and group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=group) for t in (key, value)
            )
            position = _zigzag_positions(s, group.size(), query.device)
            mask = position.flatten()[None, :] <= position[group.rank()][:, None]
            if segment is not None:
                key_segment = gather_from_sequence_parallel_region(segment.t().contiguous(), group=group).t()
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if segment is not None and mask is None and q.device.type == "cpu":
            out = self._by_document(q, k, v, segment)
        else:
            if segment is not None and key_segment is not None:
                causal = torch.ones(s, s, dtype=torch.bool, device=q.device).tril() if mask is None else mask
                mask = (causal & (segment[:, :, None] == key_segment[:, None, :]))[:, None]
            out = self._attend(q, k, v, mask)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[b, heads, s, d]; causal unless a mask says what is seen."""
        dropout = self.dropout if self.training else 0.0
        if mask is None and q.device.type == "cpu" and dropout == 0.0:
            return causal_attention(q, k, v, self.scale or q.shape[-1] ** -0.5)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )

    def _end_to_end(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
        s, b, heads, d = query.shape
        attend = backend.document_attention()
        assert attend is not None and self.dropout == 0.0
        q, k, v = (t.transpose(0, 1).reshape(b * s, -1, d) for t in (query, key, value))
        # No document is longer than a row; how long the longest is, the host would have to wait for.
        out = attend(q, k, v, starts, starts, s, s, scale=self.scale)
        return out.view(b, s, heads * d).transpose(0, 1).contiguous()

    def _by_document(self, q: Tensor, k: Tensor, v: Tensor, segment: Tensor) -> Tensor:
        rows = []
        for row, segment_S in enumerate(segment):
            lengths = torch.unique_consecutive(segment_S, return_counts=True)[1].tolist()
            q_n, k_n, v_n = (t[row : row + 1].split(lengths, dim=2) for t in (q, k, v))
            parts = [self._attend(*part, mask=None) for part in zip(q_n, k_n, v_n, strict=True)]
            rows.append(torch.cat(parts, dim=2))
        return torch.cat(rows)


def _zigzag_positions(local: int, ranks: int, device: torch.device) -> Tensor:
    """[ranks, local] sequence positions that each context-parallel rank holds."""
    chunk = local // 2
    chunks = torch.arange(2 * ranks * chunk, device=device).view(2 * ranks, chunk)
    return torch.cat([chunks[:ranks], chunks[ranks:].flip(0)], dim=1)
