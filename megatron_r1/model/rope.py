"""Rotary frequencies for a context longer than the one first trained with."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_r1.config import RopeScaling


def scaled_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies [head_dim / 2], radians a token, slowed as `scaling` says.

    linear: f / factor. llama3: f (s + (1 - s) / factor), where s rises from 0 to 1 with the number of
    turns over the original context, L f / 2 pi, between low_freq_factor and high_freq_factor.
    """
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * inv_freq / scaling.factor + share * inv_freq
