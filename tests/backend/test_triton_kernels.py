"""Triton's kernels compile for GPUs: as far as a launch goes without one, to the machine code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import gpu
from tests.interpreter import needs_triton
from tests.launch import ROOT

COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from megatron_r1.backend import triton_divergence, triton_kernels as kernels


class Device:
    # All that a launch asks of a GPU before it runs there.
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


made, run = [], JITFunction.run
JITFunction.run = lambda self, *words, **named: made.append(run(self, *words, **{**named, "warmup": True}))
driver.set_active(Device())
bf16 = torch.bfloat16
logit_NV, number_N = torch.empty(8, 128256, dtype=bf16), torch.empty(8)
label_N = torch.zeros(8, dtype=torch.int64)
kernels.row_statistics(logit_NV, label_N, True, 0.0)
kernels.row_statistics(logit_NV, label_N, False, 0.0)
kernels.to_residual(logit_NV, label_N, number_N, number_N, number_N)
x = torch.empty(8, 2, 2 * 6144, dtype=bf16)
kernels.swiglu(x, kernels.swiglu(x))
qkv_SBGHD, turn_SD = torch.empty(8, 2, 6, 6, 64, dtype=bf16), torch.empty(8, 64)
for eps in (None, 1e-5):
    query, key = kernels.rotate(qkv_SBGHD, turn_SD, eps)
    kernels.rotate_backward(qkv_SBGHD, turn_SD, eps, (query, key, key))
for teacher_NV, one_N in ((torch.empty_like(logit_NV), None), (None, number_N)):
    triton_divergence.statistics(logit_NV, teacher_NV, 1.0)
    numbers = number_N, number_N, 1.0, number_N, number_N, one_N
    triton_divergence.gradient(logit_NV, teacher_NV, *numbers)
for kernel in made:
    print(kernel.metadata.name, len(kernel.asm["cubin"]) > 0, ".v4.b32" in kernel.asm["ptx"])
"""


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_every_launch_compiles(capability: int, tmp_path: Path) -> None:
    """For bf16 at a preset's widths; 128 bits a load or store show that Triton saw the rows' alignment."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**gpu.environment(visible=False), "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "_kernel" in line]
    assert len(lines) == 13 and all(line.endswith("True True") for line in lines), done.stdout
