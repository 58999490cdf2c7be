"""Triton's kernels compile for GPUs: a compiler that needs none makes their machine code."""

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
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_r1.backend import triton_kernels

ROTATION = {"GROUPS": 6, "QUERIES": 4, "HALF": 32, "HEADS": 32, "COLUMNS": 32, "NORM": True}
LOSS = {"V": 128256, "BLOCK": 8192}
CASES = [
    ("cross_entropy_kernel", {**LOSS, "STATISTICS": True, "RESIDUAL": True}, 16),
    ("cross_entropy_kernel", {**LOSS, "STATISTICS": True, "RESIDUAL": False}, 16),
    ("cross_entropy_kernel", {**LOSS, "STATISTICS": False, "RESIDUAL": True}, 16),
    ("swiglu_kernel", {"BLOCK": 1024}, 4),
    ("swiglu_backward_kernel", {"BLOCK": 1024}, 4),
    ("rotation_kernel", ROTATION, 4),
    ("rotation_backward_kernel", ROTATION, 4),
]
TYPES = {"label_ptr": "*i64", "z_loss": "fp32", "eps": "fp32"}
TYPES |= dict.fromkeys(("max_ptr", "sum_ptr", "picked_ptr", "turn_ptr"), "*fp32")
for name, constants, warps in CASES:
    kernel = getattr(triton_kernels, name)
    types = {
        arg: "constexpr" if arg in constants else TYPES.get(arg, "*bf16" if arg.endswith("_ptr") else "i32")
        for arg in kernel.arg_names
    }
    # As a launch finds them: pointers and strides are multiples of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t in ("*bf16", "i32")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    print(name, len(made.asm["cubin"]) > 0, ".v4.b32" in made.asm["ptx"])
"""


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_ahead_of_time(capability: int, tmp_path: Path) -> None:
    """For bf16 at a preset's widths; 128 bits a load or store show that Triton saw the rows' alignment."""
    environment = {
        **gpu.environment(visible=False),
        "TRITON_CACHE_DIR": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "_kernel" in line]
    assert len(lines) == 7 and all(line.endswith("True True") for line in lines), done.stdout
