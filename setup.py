"""Builds the C++ extension; everything else is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

HEADERS = [
    "cpu",
    "integer",
    "interrupt",
    "permute",
    "keep",
    "blend",
    "greedy_steps",
    "greedy",
    "plan",
    "gather",
    "divergence",
    "records",
]
HEADERS += ["arguments"]

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_r1._csrc",
            ["csrc/bindings.cpp"],
            include_dirs=["csrc"],
            depends=[f"csrc/{name}.hpp" for name in HEADERS],
            # Contraction would round w * i - n once where Megatron rounds it twice: another order.
            extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]
)
