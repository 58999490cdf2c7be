"""The device, the process-group backend and the accelerators that exist: decided in this room alone.

Where CUDA exists, this file only answers questions. Where it does not, importing it lets the real
megatron-core run on the CPU (core_on_cpu.py).
"""

from __future__ import annotations

import importlib.util
import os
import resource
import warnings
from typing import Any

import torch

from megatron_r1.backend import core_on_cpu

HAS_CUDA = torch.cuda.is_available()
DISTRIBUTED_BACKEND = "nccl" if HAS_CUDA else "gloo"


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_CUDA else torch.device("cpu")


def use_local_device(rank: int, ranks: int) -> None:
    """Bind this process, `rank` of `ranks` on this machine, to its GPU or to its share of the cores."""
    if HAS_CUDA:
        torch.cuda.set_device(rank)
        return
    # torchrun sets OMP_NUM_THREADS=1 where nobody chose, whatever the machine has.
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is None or (chosen == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def place(module: torch.nn.Module) -> Any:
    """The module on this rank's device."""
    return module.to(device()) if HAS_CUDA else module


def peak_flops(precision: str) -> float | None:
    """Dense matrix FLOP/s of this device for `precision`, for MFU; None where it is not known."""
    if not HAS_CUDA or precision != "bf16":
        return None
    known = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12}
    name = torch.cuda.get_device_name()
    return next((flops for key, flops in known.items() if key in name), None)


def peak_memory() -> int:
    """Bytes this process has held at most: on the GPU, else in the machine's memory."""
    if HAS_CUDA:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory() -> int | None:
    """Bytes that tensors of this process can still have on the GPU; None on a CPU."""
    if not HAS_CUDA:
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def seed_model_parallel(seed: int) -> None:
    """Seed torch and megatron-core's tensor-parallel generators."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def has_transformer_engine() -> bool:
    """Transformer Engine's layers can be used: its torch part is there and so is a GPU."""
    return HAS_CUDA and _importable("transformer_engine") and _importable("transformer_engine.pytorch")


def has_triton() -> bool:
    """Kernels written in Triton can run."""
    return HAS_CUDA and _importable("triton")


def has_apex() -> bool:
    """NVIDIA Apex, not the unrelated package of that name."""
    return HAS_CUDA and _importable("amp_C") and _importable("apex.optimizers")


def describe(plain_layers: bool = False, trains: bool = True) -> str:
    """One line for the log: what runs here. `plain_layers`: as of `build_model`; `trains`: with Adam."""
    where = torch.cuda.get_device_name() if HAS_CUDA else f"CPU, {torch.get_num_threads()} threads a rank"
    engine = has_transformer_engine()
    layers = "Transformer Engine" if engine and not plain_layers else "megatron-core with torch SDPA"
    line = f"device {where} | collectives {DISTRIBUTED_BACKEND} | layers {layers}"
    adam = "Transformer Engine" if engine else "Apex" if has_apex() else "torch fused"
    return f"{line} | Adam {adam}" if trains else line


# `describe` says once what megatron-core warns of in each of its modules. Its calls of older torch names
# concern nobody who runs this.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    ".*torch.distributed.*is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    ".load_state_dict. is deprecated",
    "TypedStorage is deprecated",
    "Please use DTensor instead",
):
    warnings.filterwarnings("ignore", message=_message)
if not HAS_CUDA:
    core_on_cpu.activate()
