"""The one reader of `.npy` files. A file gives an array of the type and shape asked for, or one ValueError.

NumPy's own reader allocates what a header claims, and builds any type that it names. Here a header is
compared with what the caller expects, and with the bytes that are there, before either.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import psutil

from megatron_r1.system.errors import shown
from megatron_r1.system.files import ours, regular

Axes = tuple[int | None, ...]
"""A shape; None for an axis of any length."""
Kind = tuple[Any, Axes]
"""A type and a shape. The type `str` is text of up to 999 characters."""
Mode = Literal["r", "r+"] | None
"""How an array is mapped; None: it is read."""
MOST_HEADER = 4096
"""Bytes of a header. NumPy writes 128 for all but records of many fields."""
_HEADER = re.compile(
    r"\{'descr': *(\S.*?), *'fortran_order': *(True|False), *"
    r"'shape': *\(((?:\d{1,18}L?, ?)*(?:\d{1,18})?)\),? *\}\s*"
)
_NAMES = {repr(np.dtype(code).str): np.dtype(code).name for code in "?bBhHiIlLfd"}
_LARGE = 1 << 30


def require_memory(size: int) -> None:
    """Raise ValueError for bytes that would take more than half of the memory that is free."""
    if size > _LARGE and size > psutil.virtual_memory().available // 2:
        raise ValueError(f"it takes {size:,} bytes, more than half of the memory that is free")


def read_array(path: str | Path, dtype: Any, shape: Axes, mode: Mode = None) -> np.ndarray:
    """The array in a file; mapped with a `mode`, of which "r+" opens no link.

    Raises OSError. Raises ValueError, without the file's name, for all else than such an array.
    """
    with open(path, "r+b" if mode == "r+" else "rb", opener=ours if mode == "r+" else regular) as stream:
        return read_stream(stream, os.fstat(stream.fileno()).st_size, (dtype, shape), mode=mode)


def read_stream(stream: IO[bytes], size: int, *wanted: Kind, mode: Mode = None) -> np.ndarray:
    """The array in a stream of `size` bytes, of one of the kinds `wanted`. ValueError for all else."""
    descr, shape, order, begin = _header(stream)
    of_type = [(dtype, axes) for dtype, axes in wanted if _is(descr, dtype)]
    if not of_type:
        found = _NAMES.get(descr, f"{descr:.100}")
        meant = " or ".join(f"{_name(dtype)} {_axes(axes)}" for dtype, axes in wanted)
        raise ValueError(f"it holds {found} {shown(list(shape))}, not {meant}")
    if not any(_has(shape, axes) for _, axes in of_type):
        raise ValueError(f"its shape is {shown(list(shape))}, not {_axes(of_type[0][1])}")
    dtype = np.dtype(descr.strip("'") if of_type[0][0] is str else of_type[0][0])
    needed = begin + math.prod(shape) * dtype.itemsize
    if size != needed:
        raise ValueError(f"{needed:,} bytes by its header, and {size:,} are there")
    if mode is None:
        require_memory(size)
        flat = np.empty(math.prod(shape), dtype)
        # A stream of an archive compares its checksum when nothing is left.
        if stream.readinto(flat.view(np.uint8)) != flat.nbytes or stream.read(1):  # type: ignore[attr-defined]
            raise ValueError("it is truncated")
        array = flat.reshape(shape, order=order)
    elif not math.prod(shape):  # Nothing cannot be mapped.
        array = np.empty(shape, dtype)
    else:
        array = np.memmap(stream, dtype, mode, begin, shape, order)
    if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("it holds truth values other than 0 and 1")
    return array


def write_array(stream: IO[bytes], array: np.ndarray) -> None:
    """Write an array of at least one axis, as `np.save` does. A full disk is the system's error, with its
    number, which NumPy's own writer loses."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    stream.write(array.reshape(-1).view(np.uint8).data)


def _header(stream: IO[bytes]) -> tuple[str, tuple[int, ...], Literal["C", "F"], int]:
    """Type as it is written, shape, order of the axes, and the byte at which the values begin."""
    start = stream.read(8)
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}.get(start)
    if width is None:
        raise ValueError("it is no .npy file")
    length = int.from_bytes(stream.read(width), "little")
    text = stream.read(min(length, MOST_HEADER)).decode("latin1")
    parts = _HEADER.fullmatch(text)
    if parts is None or len(text) != length:
        raise ValueError(f"its header is not one that NumPy writes: {shown(text)}")
    shape = tuple(int(number) for number in re.findall(r"\d+", parts[3]))
    return parts[1], shape, "F" if parts[2] == "True" else "C", len(start) + width + length


def _is(descr: str, dtype: Any) -> bool:
    if dtype is str:
        return re.fullmatch(r"'<U\d{1,3}'", descr) is not None
    # Of types of one byte some writers name an order.
    written = re.sub(r"(?<=')[<>=](?=\w1')", "|", descr)
    return written == repr(np.lib.format.dtype_to_descr(np.dtype(dtype)))


def _has(shape: tuple[int, ...], meant: Axes) -> bool:
    fits = [want in (None, have) for have, want in zip(shape, meant, strict=False)]
    return len(shape) == len(meant) and all(fits)


def _name(dtype: Any) -> str:
    return "text" if dtype is str else str(np.dtype(dtype))


def _axes(meant: Axes) -> str:
    return f"[{', '.join('any' if axis is None else str(axis) for axis in meant)}]"
