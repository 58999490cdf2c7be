"""Checkpoints to and from Hugging Face's folders (docs/convert.md)."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import psutil
from pydantic import TypeAdapter

from megatron_r1 import backend  # (backend before megatron.core)
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.contents import ITEMSIZE
from megatron_r1.checkpoint.load import contents_of, load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.export import config as hf_config
from megatron_r1.export import origin
from megatron_r1.export import weights as hf
from megatron_r1.export.folder import (
    MOST_JSON,
    check_tensors,
    few,
    identity,
    stored_tensors,
    unread_files,
)
from megatron_r1.export.tokenizer import TokenizerFiles
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from megatron_r1.run.stage import finish, require_empty
from megatron_r1.system.errors import rewording, shown, suggest_path
from megatron_r1.system.files import naming, open_exclusive, sync, write_json
from megatron_r1.system.json_io import read_object
from megatron_r1.system.terminal import say
from megatron_r1.system.yaml_io import format_yaml

Precision = Literal["fp32", "bf16"]
_MARK = ".conversion"
_TORCH_NAME = {"fp32": "float32", "bf16": "bfloat16"}


def to_hf(
    source: Path,
    target: Path,
    context: int | None = None,
    precision: Precision | None = None,
    tokenizer: TokenizerFiles | None = None,
    check: bool = False,
    expect: str | None = None,
) -> str:
    """Write the checkpoint `source`, of whatever layout, as a folder that `from_pretrained` reads.

    `context`: longest sequence, tokens; None: that of the checkpoint's run, or of its import. `precision`: of
    the written weights; None: as they are stored. `check`: write nothing. `expect`: identity that
    the checkpoint must have. Returns a line that describes it. Takes one process and at most twice the memory
    of the weights. The folder appears whole or not at all. Raises ValueError for a damaged checkpoint,
    weights that are not finite, a `target` that holds something, or a tokenizer that does not fit or did not
    make the run's data.
    """
    if context is not None and context < 1:
        raise ValueError(f"--context {context}: the longest sequence has at least one token")
    meta = checkpoint_files.read_meta(source, expect)
    checkpoint_files.raise_corrupt(source, checkpoint_files.corruptions(source, meta["files"]))
    with rewording(lambda error: f"{source} describes no model: {shown(str(error))}"):
        model = TypeAdapter(ModelConfig).validate_python(meta["model"])
    held = sum(size for size, _ in meta["files"].values())
    if 2 * (numel := model.parameters()) > held:
        raise ValueError(f"{source} describes {numel:,} parameters, and its files have {held:,} bytes")
    context = context or origin.context_of(source)
    special = {key: value for key, value in origin.imported(source).items() if key in hf_config.SPECIAL}
    if tokenizer is not None:
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model of {source} {model.vocab_size}; "
                f"name the tokenizer that it was trained with"
            )
        origin.compare_tokenizer(source, meta["plan"], tokenizer.fingerprint)
        special = tokenizer.special
    require_empty(target)
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"{target} lies in the checkpoint {source} and would spoil it; name another folder")
    stored = precision or _stored_precision(source)
    config = hf_config.to_hf(model, context, _TORCH_NAME[stored], special)
    summary = _summary(model, stored, f"{config['model_type']}, {context} positions")
    if check:
        return summary
    with _appearing(target) as folder, process_groups(ParallelConfig()):
        gpt = _empty_model(model, stored)
        load_checkpoint(source, gpt, None, model, expect=expect)
        views = hf.views(gpt, model, config["model_type"])
        for name, view in views.items():
            hf.require_finite(name, view, source)
        hf.save(views, folder)
        # transformers takes all weights in this type.
        if precision is None and stored == "bf16" and hf.holds_more_than_bf16(views):
            config["torch_dtype"] = _TORCH_NAME["fp32"]
        write_json(folder / "config.json", config)
        named = {key: value for key, value in special.items() if value is not None}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **named})
        for name, content in (tokenizer.files if tokenizer else {}).items():
            with naming(folder / name):
                (folder / name).write_bytes(content)
            sync(folder / name)
    inputs = {str(source): checkpoint_files.identity(source)}
    finish(target.parent, "convert to Hugging Face", inputs=inputs, outputs=identity(target))
    return summary


def to_megatron(source: Path, target: Path, precision: Precision | None = None, check: bool = False) -> str:
    """Write the weights of a Hugging Face folder as the checkpoint `target`/step_00000000.

    Returns a line that describes the model, and the `model:` section of a configuration below it. `check`:
    write nothing, and read no numbers. `precision`: None takes bf16 where all matrices are stored so, else
    fp32, which rounds nothing. The folder appears whole or not at all. Raises ValueError naming every field
    and tensor that GPTModel has no place for, or for a `target` that holds something.
    """
    absent = f"{source} has no config.json; name a folder as save_pretrained writes it{suggest_path(source)}"
    with rewording(lambda _: absent, FileNotFoundError, NotADirectoryError):
        config = read_object(source / "config.json", MOST_JSON)
    with rewording(lambda error: f"{source / 'config.json'}: {error}"):
        described = hf_config.from_hf(config)
    require_empty(target)
    model, stored = described.model, stored_tensors(source)
    check_tensors(source, stored, model, described.family)
    if described.ignored:
        keys = few(described.ignored)
        say(f"{source / 'config.json'}: not used, as in transformers' {described.family}: {keys}")
    if unread := unread_files(source, stored.values()):
        say(f"{source}: not read, as by transformers: {unread}")
    # Norms are float32 in either model.
    matrices = {one.dtype for one in stored.values() if len(one.shape) > 1}
    precision = precision or ("bf16" if matrices == {"BF16"} else "fp32")
    section = format_yaml({"model": dataclasses.asdict(model)}).rstrip()
    summary = f"{_summary(model, precision, f'from {described.family}')}\n{section}"
    if check:
        return summary
    with _appearing(target) as folder, process_groups(ParallelConfig()):
        gpt = _empty_model(model, precision)
        hf.load(hf.views(gpt, model, described.family), stored)
        save_checkpoint(folder, gpt, None, TrainState(0, 0, 0), model, "imported", plan="{}")
        write_json(folder / origin.IMPORTED, {origin.CONTEXT: described.context, **described.special})
    path = checkpoint_files.step_path(target, 0)
    outputs = {str(path): checkpoint_files.identity(path)}
    inputs = identity(source, stored.values())
    finish(target, "convert from Hugging Face", inputs=inputs, outputs=outputs)
    return summary


def _summary(model: ModelConfig, precision: str, more: str) -> str:
    size = f"{model.parameters():,} parameters, {model.num_layers} layers, vocabulary {model.vocab_size:,}"
    return f"{size}, {precision}, {more}"


def _empty_model(model: ModelConfig, precision: Precision) -> Any:
    size, memory = model.parameters() * (2 if precision == "bf16" else 4), psutil.virtual_memory().total
    if size > memory:
        raise ValueError(f"the model takes {size:,} bytes of memory, and this machine has {memory:,}")
    backend.seed_model_parallel(0)
    return build_model(model, ParallelConfig(), precision, 1, plain_layers=True, initialise=False)


def _stored_precision(source: Path) -> Precision:
    """fp32 if any matrix is stored so. Norms may be float32 in either."""
    stored = contents_of(source).tensors
    matrices = [n for n in stored if n.startswith(("embedding.", "decoder.")) and "norm" not in n]
    return "fp32" if any(ITEMSIZE[stored[name].dtype] > 2 for name in matrices) else "bf16"


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when the block ends well; on any error nothing is left.

    Conversions to one target take turns, and then find it filled. What a killed one left is removed. Raises
    ValueError where another's file or folder has the name of the one to fill.
    """
    # Where it is a link, the folder that it leads to.
    target = target.resolve()
    folder = target.with_name(f".{target.name}.partial")
    # Tells our folders from others, and holds the lock.
    mark = folder / _MARK
    ours = mark.is_file() or (folder.is_dir() and not any(folder.iterdir()))
    if os.path.lexists(folder) and (folder.is_symlink() or not ours):
        raise ValueError(f"{folder} was not made by a conversion, which would fill it; move it away")
    with _locked(mark, f"another conversion writes {target}; this one waits for it"):
        try:
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path != mark:
                    path.unlink()
            require_empty(target)
            yield folder
            sync(folder)
            os.replace(folder, target)
            (target / _MARK).unlink()
            sync(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _locked(mark: Path, waiting: str) -> IO[bytes]:
    while True:
        # The holder takes the folder away with the file.
        with suppress(FileNotFoundError):
            return open_exclusive(mark, lambda: say(waiting))
