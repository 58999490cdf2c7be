"""The device, the process-group backend and the accelerators that exist: decided in this room alone.

Where CUDA exists, this file only answers questions. Where it does not, importing it lets the real
megatron-core run on the CPU (core_on_cpu.py).
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import resource
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

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


_VARLEN = "torch.nn.attention.varlen"
_SAME_BITS = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_NVLS_ENABLE": ("0",),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Variables that cuBLAS, NCCL and Transformer Engine read when they start -> values with which the same call
gives the same bits. NVLS sums within the switch, in an order of its own."""


def compute_deterministically() -> None:
    """The same calls on the same GPU give the same bits from here on. Call this before its first use.

    torch chooses attention other than cuDNN's, whose backward pass is not deterministic, and sums a look-up's
    gradient in order. RuntimeError in a call for which torch has no such form, ValueError for a variable of
    the environment that allows other forms. A CPU always gives the same bits, and nothing changes there.
    """
    if not HAS_CUDA:
        return
    for name, values in _SAME_BITS.items():
        if (value := os.environ.setdefault(name, values[0])) not in values:
            raise ValueError(
                f"train.deterministic=true, but {name}={value} in the environment lets bits differ from run "
                f"to run; unset it, or set it to {values[0]}"
            )
    torch.use_deterministic_algorithms(True)
    # torch would also fill new memory with NaN, in case that it is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def place(module: torch.nn.Module) -> Any:
    """The module on this rank's device."""
    return module.to(device()) if HAS_CUDA else module


@cache
def document_attention() -> Callable[..., torch.Tensor] | None:
    """torch's causal attention of documents laid end to end, or None where this device or torch has none.

    Called as varlen_attn: query [T, heads, d], key and value [T, groups, d], bf16, `document_starts` for
    queries and keys, the longest length for each; scale=. d is a multiple of 8 up to 256.
    """
    if not HAS_CUDA or torch.cuda.get_device_capability() < (8, 0) or not _importable(_VARLEN):
        return None
    function = importlib.import_module(_VARLEN).varlen_attn
    known = inspect.signature(function).parameters
    if "window_size" not in known:  # torch 2.10's, without a scale
        return None
    # Until torch asked, any number of key heads was taken that divides the heads.
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return partial(function, window_size=(-1, 0), **grouped)


def document_starts(number_BS: torch.Tensor) -> torch.Tensor:
    """Where each document begins in the rows laid end to end, and their end: int32 [n + 1].

    `number_BS`: each token's document, not falling along a row. On the CPU: counting waits for a device.
    """
    first_BS = torch.ones_like(number_BS, dtype=torch.bool)
    torch.ne(number_BS[:, 1:], number_BS[:, :-1], out=first_BS[:, 1:])
    starts = first_BS.flatten().nonzero()[:, 0].int()
    starts = torch.nn.functional.pad(starts, (0, 1), value=number_BS.numel())
    return starts.pin_memory() if number_BS.is_pinned() else starts


def fast_precision() -> Literal["fp32", "bf16"]:
    """bf16 where this device multiplies it faster than fp32: a GPU, and a CPU with AVX512-BF16 or AMX."""
    fast = HAS_CUDA or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


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


class Mark:
    """A point in this rank's work. It is reached once the device has done all that was enqueued before."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event(enable_timing=True) if HAS_CUDA else None
        if event:
            event.record()
        self._at: Any = event or time.perf_counter()

    def wait(self) -> None:
        """Until it is reached."""
        if HAS_CUDA:
            self._at.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """The device's time between two marks that are reached."""
        return float(earlier._at.elapsed_time(self._at) / 1e3 if HAS_CUDA else self._at - earlier._at)


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
    """This project's kernels (triton_kernels.py) can be compiled for this device."""
    return HAS_CUDA and _importable("triton")


def describe(plain_layers: bool = False) -> str:
    """One line for the log: what runs here. `plain_layers`: as of `build_model`."""
    where = torch.cuda.get_device_name() if HAS_CUDA else f"CPU, {torch.get_num_threads()} threads a rank"
    engine = has_transformer_engine() and not plain_layers
    layers = "Transformer Engine" if engine else "megatron-core with torch SDPA"
    line = f"device {where} | collectives {DISTRIBUTED_BACKEND} | layers {layers}"
    return f"{line} | deterministic" if torch.are_deterministic_algorithms_enabled() else line


def _says_other(message: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(message)


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
    # megatron-core 0.19, of files that nothing here uses but that it imports.
    "MimoModelConfig is experimental",
    "invalid escape sequence",
):
    warnings.filterwarnings("ignore", message=_message)
# What megatron-core 0.19 logs at every start, and why it stays so: 0.16 has no other model class; the layout
# that it computes is the one wanted; its other way to save needs a package.
for _logger, _message in (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
):
    logging.getLogger(f"megatron.core.{_logger}").addFilter(partial(_says_other, _message))
if not HAS_CUDA:
    core_on_cpu.activate()
