"""Checkpoints to and from Hugging Face's folders (docs/convert.md)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from megatron_r1 import backend  # (backend before megatron.core)
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.export import config as hf_config
from megatron_r1.export import weights as hf
from megatron_r1.export.tokenizer import TokenizerFiles
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from megatron_r1.records import TrainState
from megatron_r1.run.layout import RunDir
from megatron_r1.run.stage import finish, require_empty
from megatron_r1.system.errors import suggest_path
from megatron_r1.system.files import sha256, sync, write_json
from megatron_r1.system.yaml_io import read_yaml

# isort: split
from megatron.core import dist_checkpointing

Precision = Literal["fp32", "bf16"]
_TORCH_NAME = {"fp32": "float32", "bf16": "bfloat16"}


def to_hf(
    source: Path,
    target: Path,
    context: int | None = None,
    precision: Precision | None = None,
    tokenizer: TokenizerFiles | None = None,
    check: bool = False,
) -> str:
    """Write the checkpoint `source`, of whatever layout, as a folder that `from_pretrained` reads.

    `context`: longest sequence, tokens; None: `data.seq_length` of the checkpoint's run. `precision`: of the
    written weights; None: as they are stored. `check`: write nothing. Returns a line that describes it.
    Takes one process and at most twice the memory of the weights. The folder appears whole or not at all.
    Raises ValueError for a damaged checkpoint, a `target` that holds something, or a tokenizer that does
    not fit.
    """
    model = TypeAdapter(ModelConfig).validate_python(checkpoint_files.read_meta(source)["model"])
    if context is not None and context < 1:
        raise ValueError(f"--context {context}: the longest sequence has at least one token")
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model of {source} {model.vocab_size}; "
            f"name the tokenizer that it was trained with"
        )
    precision = precision or _stored_precision(source)
    end_of_text = tokenizer.end_of_text if tokenizer else None
    config = hf_config.to_hf(model, context or _context(source), _TORCH_NAME[precision], end_of_text)
    positions = f"{config['model_type']}, {config['max_position_embeddings']} positions"
    summary = _summary(model, precision, positions)
    require_empty(target)
    if check:
        return summary
    with _appearing(target) as folder, process_groups(ParallelConfig()):
        gpt = _empty_model(model, precision)
        load_checkpoint(source, gpt, None, model)
        hf.save(hf.views(gpt, model, config["model_type"]), folder)
        write_json(folder / "config.json", config)
        ends = {} if end_of_text is None else {"eos_token_id": end_of_text}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
        for name, content in (tokenizer.files if tokenizer else {}).items():
            (folder / name).write_bytes(content)
            sync(folder / name)
    inputs = {str(source): checkpoint_files.identity(source)}
    finish(target.parent, "convert to Hugging Face", inputs=inputs, outputs=_weights(target))
    return summary


def to_megatron(source: Path, target: Path, precision: Precision | None = None, check: bool = False) -> str:
    """Write the weights of a Hugging Face folder as the checkpoint `target`/step_00000000.

    Returns a line that describes the model. `check`: write nothing. `precision`: of the weights; None: bf16
    where they are stored so, else fp32. Raises ValueError naming every field and tensor that GPTModel has no
    place for, or for a `target` that holds something.
    """
    try:
        described = hf_config.from_hf(json.loads((source / "config.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{source} has no config.json; name a folder as save_pretrained writes it{suggest_path(source)}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{source / 'config.json'}: {error}") from None
    require_empty(target)
    model = described.model
    precision = precision or ("bf16" if hf.stored_dtype(source) == "BF16" else "fp32")
    summary = _summary(model, precision, f"from {described.family}")
    if check:
        return summary
    with process_groups(ParallelConfig()):
        gpt = _empty_model(model, precision)
        hf.load(hf.views(gpt, model, described.family), source)
        path = save_checkpoint(target, gpt, None, TrainState(0, 0, 0), model, "imported", plan="{}").path
    outputs = {str(path): checkpoint_files.identity(path)}
    finish(target, "convert from Hugging Face", inputs=_weights(source), outputs=outputs)
    return summary


def _weights(folder: Path) -> dict[str, str]:
    """The folder -> SHA-256 over the SHA-256 of its files of tensors, by name."""
    files = [f"{path.name} {sha256(path)}\n" for path in sorted(folder.glob("*.safetensors"))]
    return {str(folder): hashlib.sha256("".join(files).encode()).hexdigest()}


def _summary(model: ModelConfig, precision: str, more: str) -> str:
    size = f"{model.parameters():,} parameters, {model.num_layers} layers, vocabulary {model.vocab_size:,}"
    return f"{size}, {precision}, {more}"


def _empty_model(model: ModelConfig, precision: Precision) -> Any:
    backend.seed_model_parallel(0)
    return build_model(model, ParallelConfig(), precision, 1, plain_layers=True, initialise=False)


def _stored_precision(source: Path) -> Precision:
    stored = dist_checkpointing.load_tensors_metadata(str(source))
    return "bf16" if stored["embedding.word_embeddings.weight"].dtype.itemsize == 2 else "fp32"


def _context(source: Path) -> int:
    """Longest sequence of the run that a checkpoint RUN/checkpoints/step_N lies in."""
    config = RunDir(source.resolve().parent.parent).config
    if not config.is_file():
        raise ValueError(f"{source} lies in no run that says its data.seq_length; give --context TOKENS")
    length = ((read_yaml(config).tree or {}).get("data") or {}).get("seq_length")
    if type(length) is not int or length < 1:
        raise ValueError(f"{config}: data.seq_length={length} is no number of tokens; give --context TOKENS")
    return length


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when the block ends well; on any error nothing is left."""
    require_empty(target)
    folder = target.absolute().with_name(f".{target.absolute().name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        sync(folder)
        os.replace(folder, target)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
