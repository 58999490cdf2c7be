"""Loading of megatron-core's sharded checkpoints. Every layout loads the checkpoints of every other layout.

Every file is verified before it is used, and megatron-core's own reader is not: it unpickles what it finds.
`contents.py` reads the files as data, and here the numbers go to their places.
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.checkpoint.contents import Contents, read_contents
from megatron_r1.checkpoint.files import NOT_WEIGHTS, check_model, corruptions, raise_corrupt, read_meta
from megatron_r1.checkpoint.pickles import Span
from megatron_r1.checkpoint.shards import METADATA, rectangles_of
from megatron_r1.config import ModelConfig
from megatron_r1.parallel import gather_objects
from megatron_r1.records import TrainState
from megatron_r1.system.errors import rewording, shown

# isort: split
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base


def load_checkpoint(
    path: Path,
    gpt: Any,
    optimizer: Any | None,
    model: ModelConfig,
    but: Container[str] = (),
    expect: str | None = None,
) -> TrainState:
    """Fill the model, and the optimizer unless None, from a checkpoint of the same model, fields `but` aside.

    Every file is verified first, each by one rank. Raises ValueError on all ranks when the checkpoint is
    of another shape or has another identity than `expect`, or names the files that are missing, short,
    altered or not of a checkpoint.
    """
    meta = check_model(path, model, but, expect)
    mine = corruptions(path, meta["files"], dist.get_rank(), dist.get_world_size())
    raise_corrupt(path, [one for share in gather_objects(mine) for one in share])
    contents = read_contents(path, meta["files"])
    wanted: dict[str, Any] = {"model": gpt.sharded_state_dict()}
    if optimizer is None:
        gpt.load_state_dict(load_state(contents, wanted)["model"])
        return TrainState(**meta["state"])
    with torch.no_grad(), rectangles_of(optimizer):
        part = optimizer.sharded_state_dict(wanted["model"], is_loading=True, metadata=METADATA)
        loaded = load_state(contents, wanted | {"optimizer": part})
        gpt.load_state_dict(loaded["model"])
        unfit = KeyError, TypeError, AssertionError, NotImplementedError
        with rewording(lambda error: f"{path}: its optimizer's settings do not fit: {shown(error)}", *unfit):
            optimizer.load_state_dict(loaded["optimizer"])
    return TrainState(**meta["state"])


def load_weights(path: Path, gpt: Any, optimizer: Any, model: ModelConfig, expect: str | None = None) -> None:
    """Begin anew with a checkpoint's weights: Adam's state stays empty. Errors as of `load_checkpoint`."""
    load_checkpoint(path, gpt, None, model, NOT_WEIGHTS, expect)
    # The optimizer's main parameters are copies.
    optimizer.reload_model_params()


def contents_of(path: Path) -> Contents:
    """The content of a checkpoint by its small files. The numbers are not verified."""
    return read_contents(path, read_meta(path)["files"])


def load_state(contents: Contents, wanted: dict[str, Any]) -> dict[str, Any]:
    """`wanted`, a sharded state dict of megatron-core, with the tensors of a checkpoint in place.

    Every rank calls this. What is neither tensor nor setting stays that of `wanted`: Transformer Engine
    would unpickle its own. Raises ValueError on all ranks for a tensor that the checkpoint does not hold so.
    """
    wanted, kept, factories = load_preprocess(wanted)
    sharded, settings = extract_sharded_base(wanted)
    error = ""
    try:
        with ExitStack() as opened, torch.no_grad():
            files: dict[str, BinaryIO] = {}
            for shard in nested_values(sharded):
                if isinstance(shard, ShardedTensor):
                    _fill(shard, contents, files, opened)
        loaded = _settings(contents.common, settings, f"{contents.path}: settings")
    except (ValueError, OSError) as caught:
        error = str(caught)
    if errors := [one for one in gather_objects(error) if one]:
        raise ValueError(errors[0])
    merge(loaded, kept)
    merge(loaded, dict_list_map_inplace(lambda shard: shard.data, sharded))
    return apply_factory_merges(loaded, factories)


def _fill(shard: ShardedTensor, contents: Contents, files: dict[str, BinaryIO], opened: ExitStack) -> None:
    """Copy this rank's part of a tensor to where it belongs, from whatever pieces it was saved in."""
    where, stored = f"{contents.path}: {shard.key}", contents.tensors.get(shard.key)
    if stored is None:
        raise ValueError(f"{where} is not in this checkpoint")
    same = len(stored.size) == len(shard.global_shape) if shard.allow_shape_mismatch else False
    if stored.size != tuple(shard.global_shape) and not same:
        raise ValueError(f"{where} has the shape {stored.size}, and {tuple(shard.global_shape)} here")
    target = shard.data.detach()[(None,) * shard.prepend_axis_num]
    begin, size = tuple(shard.global_offset), tuple(target.shape)
    exact = [piece for piece in (stored.pieces.get(begin),) if piece is not None and piece.size == size]
    # What is still to come, where no piece has it all: those of others may overlap, and leave holes.
    left = torch.zeros([0] * len(size) if exact else size, dtype=torch.bool)
    left[tuple(slice(max(0, whole - o)) for o, whole in zip(begin, stored.size, strict=True))] = True
    for piece in exact or stored.pieces.values():
        # Of each axis: the first and the last element that both have.
        axes = zip(begin, size, piece.offset, piece.size, strict=True)
        both = [(max(o, p), min(o + n, p + m)) for o, n, p, m in axes]
        if any(low >= high for low, high in both):
            continue
        if piece.archive.file not in files:
            stream = open(contents.path / piece.archive.file, "rb")  # noqa: SIM115
            files[piece.archive.file] = opened.enter_context(stream)
        file = files[piece.archive.file]
        if whole := (piece.offset, piece.size, stored.dtype) == (begin, size, str(target.dtype)[6:]):
            whole = target.is_cpu and target.is_contiguous()
        place = contents.numbers(file, stored.dtype, piece)
        numbers = target if whole else torch.empty(piece.size, dtype=getattr(torch, stored.dtype))
        _read(file, place, numbers)
        if not whole:
            here, there = (
                tuple(slice(low - o, high - o) for (low, high), o in zip(both, offset, strict=True))
                for offset in (begin, piece.offset)
            )
            target[here].copy_(numbers[there])
            left[here] = False
    if left.any():
        raise ValueError(f"{where} is not in this checkpoint as a whole")


def _read(file: BinaryIO, place: Span, numbers: Tensor) -> None:
    file.seek(place.start)
    if file.readinto(numbers.reshape(-1).view(torch.uint8).numpy()) != place.length:  # type: ignore[attr-defined]
        raise ValueError(f"{place.file} ends too early")


def _settings(there: Any, ours: Any, where: str, more: bool = False) -> Any:
    """`there`, plain values of a checkpoint, of the kinds of `ours`, which this program would save.

    `more`: whether a mapping may have further numbers. Raises ValueError, naming the value.
    """
    if isinstance(ours, dict) and isinstance(there, dict):
        lost = [key for key, value in ours.items() if isinstance(value, (dict, list)) and key not in there]
        if lost:
            raise ValueError(f"{where}: {lost[0]} is missing")
        known = {key: ours.get(key) for key in there if more or key in ours}
        return {key: _settings(there[key], value, f"{where}: {key}") for key, value in known.items()}
    if isinstance(ours, list) and isinstance(there, list) and (ours or not there):
        return [_settings(v, ours[min(i, len(ours) - 1)], where, more=True) for i, v in enumerate(there)]
    if isinstance(ours, tuple) and isinstance(there, tuple) and len(ours) == len(there):
        return tuple(_settings(a, b, where) for a, b in zip(there, ours, strict=True))
    number = type(there) in (bool, int, float) and abs(there) < 1 << 62
    alike = ours is None or (
        isinstance(ours, bool) == isinstance(there, bool) and type(ours) in (bool, int, float)
    )
    if there is None or (number and alike) or (isinstance(there, str) and isinstance(ours, str)):
        return there
    raise ValueError(f"{where} is {shown(there)}, where {shown(ours)} is here")
