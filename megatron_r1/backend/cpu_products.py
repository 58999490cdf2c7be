"""float32 matrix products on a CPU whose AVX-512 the default library leaves idle.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on other makers' processors: 96 GFLOP/s of
one EPYC core where oneDNN, which torch carries too and uses for bf16, reaches 210. `use_onednn` registers
a kernel for `aten::mm` on the CPU that takes oneDNN for large float32 products, so that megatron-core's
layers, autograd and this project's own code all use it. Both libraries round alike; results differ by a
few float32 roundings, and are the same again in every run of the same shapes and threads.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

_SMALL = 1 << 18
"""Multiplications below which the detour through Python costs more than it gains."""


def wanted() -> bool:
    """Whether MKL stays below this CPU's instructions: it has AVX-512 and another maker than Intel."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def use_onednn() -> None:
    """Large float32 products of this process go through oneDNN from now on, where that is `wanted`."""
    if not wanted():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, which is the purpose
        _LIBRARY.impl("mm", _product, "CPU")


_LIBRARY = torch.library.Library("aten", "IMPL")


def _product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    if a_MK.dim() != 2 or b_KN.dim() != 2:
        return torch.mm(a_MK, b_KN, out=a_MK.new_empty(0))  # which says what is wrong
    rows, inner = a_MK.shape
    columns = b_KN.shape[1]
    if (
        a_MK.dtype is torch.float32
        and b_KN.dtype is torch.float32
        and rows * inner * columns >= _SMALL
        and _is_plain(a_MK)
        and inner == len(b_KN)
    ):
        if not (b_KN.is_contiguous() or b_KN.t().is_contiguous()):
            b_KN = b_KN.contiguous()  # oneDNN's kernel for spaced rows here is a thousand times slower
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
    # The `out` variant has a kernel of its own, which is still torch's.
    return torch.mm(a_MK, b_KN, out=a_MK.new_empty(rows, columns))


def _is_plain(x: Tensor) -> bool:
    """Rows or columns lie apart and are contiguous: no broadcast, no overlap."""
    (rows, columns), (row, column) = x.shape, x.stride()
    return (column == 1 and row >= columns) or (row == 1 and column >= rows)
