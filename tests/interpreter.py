"""Triton's interpreter runs the kernels for a GPU on a CPU, where triton is installed (tests/conftest.py)."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
KERNELS: list[Any] = [pytest.param(None, id="plain")]
"""What `linear_cross_entropy` takes: None, and the kernels where triton is. Else test_fused.py is skipped."""
if HAS_TRITON:
    from megatron_r1.backend import triton_kernels

    KERNELS.append(pytest.param(triton_kernels, id="kernels"))
