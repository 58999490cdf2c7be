"""Records that flow between rooms. They have no behaviour beyond their fields.

Axis letters, used as suffixes where a shape is not plain: B batch, S sequence, D hidden, V vocabulary,
N examples, C capabilities, K checkpoints, P projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CAPABILITIES = ("code", "math", "knowledge")


@dataclass(frozen=True)
class Gold:
    """Gold answers: the documents of a pair are a prompt and its answer (data/gold.py)."""

    name: str
    """Set of the benchmark, as gsm8k."""
    bytes: int
    """UTF-8 bytes of all answers."""
    prompt_tokens: tuple[int, ...]
    """Of each document, its tokens before the answer's."""


@dataclass(frozen=True)
class Corpus:
    """One indexed dataset (`PREFIX.bin`, `PREFIX.idx`), or the leading documents of one."""

    name: str
    prefix: Path
    documents: int
    """Documents that may be drawn; the rest of the pair is set aside (probing)."""
    tokens: int
    """Tokens of those documents."""
    dtype: str
    """NumPy name of the token type, "uint16" or "int32"."""
    tokenizer_hash: str | None
    """Fingerprint of the tokenizer that made it; None where no sidecar says (a pair from elsewhere)."""
    set_aside: int = 0
    """Tokens of the documents behind those."""
    doubt: str = ""
    """The reason why damage to its .bin may have gone unseen, or nothing."""
    gold: Gold | None = None
    """None: text, and no gold answers."""

    def windows(self, seq_length: int) -> int:
        """Windows of one epoch: window w is tokens [wS, wS+S], S inputs and S labels."""
        return max(0, (self.tokens - 1) // seq_length)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    position_BS: Tensor
    source_B: Tensor
    documents: Tensor | None = None
    """None: windows attend across documents. Else each token's document within its window, int32 [B, S]; on a
    device that attends documents end to end, where each begins, int32 [n + 1] (`backend.document_starts`)."""


@dataclass
class TrainState:
    """Progress of a run. `samples` alone is the data position."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    """History of the step guard, so that a resumed run judges steps as the interrupted one would."""
    teacher: dict[str, str] = field(default_factory=dict)
    """Teacher or cache that the phase learns from: path as configured -> identity."""


@dataclass(frozen=True)
class CheckpointRef:
    """A complete checkpoint on disk."""

    path: Path
    step: int


@dataclass(frozen=True)
class ScoreTable:
    """Influence scores of one source's representative set (Eq. 2)."""

    source: str
    capabilities: tuple[str, ...]
    steps: tuple[int, ...]
    """Checkpoints scored, in training order."""
    example_N: np.ndarray
    """Window (or document) numbers within the source."""
    length_N: np.ndarray
    """Tokens of each example, s(x) of Eq. 5."""
    score_NCK: np.ndarray
    """float32; positive: a step on the example lowers the capability's loss."""
