"""Weights of a whole GPTModel (one rank) to and from Hugging Face's layout and files.

Every Hugging Face tensor is a view of one of our parameters: rows of `linear_qkv` lie by query group, those
of `linear_fc1` gate before up, and where the other class turns neighbouring pairs of a head instead of its
halves, component i of half h stands at 2 i + h. One table of views (`views`) thus serves both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1.config import ModelConfig
from megatron_r1.export.config import Family
from megatron_r1.export.folder import EMBEDDING, HEAD, INDEX, SINGLE, Stored, shapes
from megatron_r1.system.files import naming, sync, write_json
from megatron_r1.system.terminal import Progress

SHARD_BYTES = 5_000_000_000


def views(gpt: Any, model: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Hugging Face name -> view of our parameter whose elements, row by row, are that tensor's.

    `gpt`: GPTModel of one rank with megatron-core's own layers (`build_model(..., plain_layers=True)`).
    """
    params = {name: param.detach() for name, param in gpt.named_parameters()}
    groups, d, h = model.num_query_groups, model.head_dim, model.hidden_size
    queries = model.num_attention_heads // groups

    def turned(heads: Tensor) -> Tensor:
        """[groups, heads, d, h] in the family's order of a head's components."""
        return heads if family == "llama" else heads.unflatten(2, (2, d // 2)).transpose(2, 3)

    whole = ("input_layernorm", "self_attention.linear_proj", "pre_mlp_layernorm", "mlp.linear_fc2")
    # In the order of `shapes`, which has their names.
    out = [params["embedding.word_embeddings.weight"]]
    for n in range(model.num_layers):
        layer = f"decoder.layers.{n}"
        qkv = params[f"{layer}.self_attention.linear_qkv.weight"].view(groups, queries + 2, d, h)
        q, k, v = qkv.split([queries, 1, 1], dim=1)
        gate, up = params[f"{layer}.mlp.linear_fc1.weight"].chunk(2)
        norm, projection, mlp_norm, down = (params[f"{layer}.{name}.weight"] for name in whole)
        out += [norm, turned(q), turned(k), v, projection, mlp_norm, gate, up, down]
    out.append(params["decoder.final_layernorm.weight"])
    assert sum(view.numel() for view in out) == sum(param.numel() for param in params.values())
    return {name: view for (name, _), view in zip(shapes(model, family), out, strict=True)}


def tensors(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors on the CPU; copies only where the layout differs."""
    # A matrix has the columns of ours, a norm its length.
    sizes = {name: (-1, view.shape[-1]) if view.dim() > 1 else (-1,) for name, view in views.items()}
    return {name: view.contiguous().view(sizes[name]).cpu() for name, view in views.items()}


def save(views: Mapping[str, Tensor], directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the views as safetensors into `directory`, in files of at most `shard_bytes` each, and their
    index where there are several.

    Takes the memory of one file's queries and keys. A larger tensor gets a file of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, view in views.items():
        if shards[-1] and sum(v.nbytes for v in shards[-1].values()) + view.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = view
    files: dict[str, str] = {}
    with Progress("write", len(views), "tensors") as bar:
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1
            file = directory / (SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            try:
                save_file(tensors(shard), file, metadata={"format": "pt"})
            except SafetensorError as error:  # Also for a full disk.
                raise OSError(f"{file} cannot be written: {error}") from None
            # safetensors lets the owner alone read it.
            file.chmod(directory.stat().st_mode & 0o666)
            with naming(file):
                sync(file)
            files |= dict.fromkeys(shard, file.name)
            bar.advance(len(shard))
    if len(shards) > 1:
        total = sum(view.nbytes for view in views.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


@torch.no_grad()
def load(views: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Fill the views from the tensors that `stored_tensors` found and `check_tensors` compared, one tensor in
    memory at a time.

    Raises ValueError for numbers that are not finite, and where the output layer is not the embedding.
    """
    by_file: dict[Path, list[str]] = {}
    for name in views:
        by_file.setdefault(stored[name].file, []).append(name)
    with Progress("read", len(views), "tensors") as bar:
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    views[name].copy_(opened.get_tensor(name).view(views[name].shape))
                    require_finite(name, views[name], file)
                    bar.advance()
    if HEAD in stored:
        head, embedding = (_tensor(stored[name].file, name) for name in (HEAD, EMBEDDING))
        widest = torch.promote_types(head.dtype, embedding.dtype)
        if not torch.equal(head.to(widest), embedding.to(widest)):
            where = stored[HEAD].file.parent
            raise ValueError(f"{where}: {HEAD} is not {EMBEDDING}; only tied embeddings are supported")


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return cast(Tensor, opened.get_tensor(name))


def require_finite(name: str, tensor: Tensor, where: Path) -> None:
    """Raise ValueError for NaN and infinite numbers."""
    if wrong := tensor.numel() - int(tensor.isfinite().sum()):
        raise ValueError(f"{where}: {wrong} of the {tensor.numel()} numbers of {name} are NaN or infinite")


def holds_more_than_bf16(views: Mapping[str, Tensor]) -> bool:
    """Whether bf16 would round a number: megatron-core's own norms are float32 in a bf16 model."""
    return any(not torch.equal(view, view.bfloat16().to(view.dtype)) for view in views.values())
