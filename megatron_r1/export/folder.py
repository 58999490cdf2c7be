"""Files of a Hugging Face folder: which of them hold its weights, and what stands in them. Imports no torch.

transformers reads model.safetensors, else the shards that model.safetensors.index.json names. A folder where
other readers would take other files, or in which index and shards disagree, is refused.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_r1.config import ModelConfig
from megatron_r1.export.config import Family
from megatron_r1.preprocess.auto_tokenizer import first_line
from megatron_r1.system.errors import brief, hub_name, require, rewording, shown, some
from megatron_r1.system.files import plain_name, regular, sha256
from megatron_r1.system.json_io import read_object

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOATS = ("F32", "BF16", "F16")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"}
_FILES = ["model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_SETTINGS = {".json", ".jinja", ".txt", ".model"}
MOST_JSON = 16 << 20
"""Bytes of a config.json, an index or a header of tensors. The header of 1,000 tensors has 100 KB."""
_MOST_TENSORS = 200_000


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    """As safetensors names it: F32, BF16, I8."""
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Tensor name -> what the headers say of it, over the files that count.

    Raises ValueError that names the file: none or several sets of weights, an adapter, a damaged or missing
    file, an index that disagrees with its shards.
    """
    if (directory / "adapter_config.json").is_file():
        fault = f"{directory} has adapter_config.json, so its weights change those of another model"
        raise ValueError(f"{fault}; merge the two and save the result")
    index, where = directory / INDEX, _weight_map(directory / INDEX)
    shards = {*where.values()}
    if os.path.lexists(directory / SINGLE):
        if shards - {SINGLE}:
            fault = f"{directory} has both {SINGLE} and {INDEX}, which names {min(shards - {SINGLE})}"
            raise ValueError(f"{fault}; remove the one that is left from another save")
        shards = {SINGLE}
    if not shards:
        there = f", but {names}" if (names := unread_files(directory)) else " nor other weights"
        way_out = "other formats become one by transformers' from_pretrained(...).save_pretrained(...)"
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}{there}; {way_out}")
    out: dict[str, Stored] = {}
    for file in sorted(shards):
        for name, stored in _header(directory / file).items():
            if name in out:
                both = f"{stored.file} and {out[name].file} both have {brief(name, 100)}"
                raise ValueError(f"{both}; which one is meant?")
            out[name] = stored
        if len(out) > _MOST_TENSORS:
            raise ValueError(f"{directory} has more than {_MOST_TENSORS:,} tensors; no model of ours has")
    for name in sorted(where.keys() | out.keys()) if where else ():
        there = out[name].file.name if name in out else "no file that it names"
        if where.get(name) != there:
            says = f"says {where[name]}" if name in where else "does not name it"
            is_in = f"{brief(name, 100)} is in {there}"
            raise ValueError(f"{index} disagrees with its files: {is_in}, and the index {says}")
    return out


def local_folder(model: str) -> Path:
    """The folder with a model's files: `model` itself, or the hub's by ORG/NAME@COMMIT.

    FileNotFoundError for neither, ValueError where the hub does not give it.
    """
    if (path := Path(model)).is_dir():
        return path
    missing = "name the model's folder, not the file" if path.is_file() else "no model at"
    repository, revision = hub_name(model, missing)
    hub = require("huggingface_hub", "a model of the hub")
    absent = f"{model} is no folder here, and the hub did not give it"
    way_out = f"fetch it by: hf download {repository} --revision {revision}"
    with rewording(lambda error: f"{absent}: {first_line(error)}; {way_out}", OSError, ValueError):
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=_FILES))


def content(folder: Path, stored: Mapping[str, Stored]) -> str:
    """SHA-256 over the weights of a model, its configuration and its tokenizer."""
    files = [path for path in folder.rglob("*") if path.suffix in _SETTINGS and path.is_file()]
    return identity(folder, stored.values(), files)[str(folder)]


def identity(
    folder: Path, stored: Iterable[Stored] | None = None, more: Iterable[Path] = ()
) -> dict[str, str]:
    """The folder -> SHA-256 over the SHA-256 of its files of tensors, by name, and of `more` of its files."""
    names = {one.file for one in (stored_tensors(folder).values() if stored is None else stored)}
    files = [f"{path.relative_to(folder)} {sha256(path)}\n" for path in sorted({*names, *more})]
    return {str(folder): hashlib.sha256("".join(files).encode()).hexdigest()}


def unread_files(directory: Path, read: Iterable[Stored] = ()) -> str:
    """Names of the other files of weights in the folder, in one line."""
    known = {one.file.name for one in read}
    names = sorted(path.name for path in directory.iterdir() if path.suffix in _WEIGHTS)
    return few([name for name in names if name not in known])


def few(names: Sequence[str]) -> str:
    """The first names in one line, and how many more there are."""
    return some([brief(name, 100) for name in names], most=16)


def shapes(model: ModelConfig, family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that config.json means."""
    heads, groups = (n * model.head_dim for n in (model.num_attention_heads, model.num_query_groups))
    mlp = "mlp" if family == "llama" else "feed_forward"
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    yield EMBEDDING, (model.vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (groups, hidden),
        "self_attn.v_proj": (groups, hidden),
        "self_attn.o_proj": (hidden, heads),
        "post_attention_layernorm": (hidden,),
        f"{mlp}.gate_proj": (ffn, hidden),
        f"{mlp}.up_proj": (ffn, hidden),
        f"{mlp}.down_proj": (hidden, ffn),
    }
    for n in range(model.num_layers):
        yield from ((f"model.layers.{n}.{name}.weight", shape) for name, shape in layer.items())
    yield "model.norm.weight", (hidden,)


def check_tensors(directory: Path, stored: Mapping[str, Stored], model: ModelConfig, family: Family) -> None:
    """Compare with the tensors that config.json means, before any memory is taken.

    Raises ValueError that names the tensors that are missing, left over, of another shape, or no floats that
    a checkpoint holds exactly.
    """
    numbers = sum(math.prod(one.shape) for one in stored.values())
    if model.parameters() > 10 * numbers or model.num_layers > len(stored):
        meant = f"{model.parameters():,} parameters in {model.num_layers:,} layers"
        held = f"{numbers:,} in {len(stored):,} tensors"
        raise ValueError(f"{directory}: config.json means {meant}, and the files hold {held}")
    expected = dict(shapes(model, family))
    wrong = [f"{name}: missing" for name in expected if name not in stored]
    for name, one in stored.items():
        if name not in expected and name != HEAD:
            # The frequencies follow from config.json; early releases stored them.
            if not name.endswith("rotary_emb.inv_freq"):
                wrong.append(f"{brief(name, 100)}: GPTModel has no place for it")
        elif one.dtype not in _FLOATS:
            wrong.append(f"{name}: {one.dtype} in {one.file.name}; weights are {', '.join(_FLOATS)}")
        elif one.shape != (shape := expected[EMBEDDING if name == HEAD else name]):
            wrong.append(f"{name}: shape {shown([*one.shape])}, expected {[*shape]}")
    if wrong:
        lines = some(wrong, "\n  ", 10)
        raise ValueError(f"{directory}: tensors do not fit config.json:\n  {lines}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Empty without an index."""
    if not os.path.lexists(index):
        return {}
    where = read_object(index, MOST_JSON).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} is damaged: it has no weight_map")
    for name, file in where.items():
        named = plain_name(file) and file.isprintable() and len(file) < 256
        if not named or not file.endswith(".safetensors"):
            mistake = f"{brief(name, 100)} is said to be in {shown(file)}"
            raise ValueError(f"{index}: {mistake}, which is no .safetensors beside it")
    return where


def _header(file: Path) -> dict[str, Stored]:
    way = "download it again, by git lfs pull where it is a pointer of git-lfs"
    try:
        # The library would wait for a pipe, and takes memory for a header of any size.
        with open(file, "rb", opener=regular) as plain_file:
            header = int.from_bytes(plain_file.read(8), "little")
            if header > min(MOST_JSON, os.fstat(plain_file.fileno()).st_size):
                raise SafetensorError(f"its header would have {header:,} bytes")
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            return {n: Stored(file, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{file} is missing, though {INDEX} or a link names it; download it") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged, or no safetensors ({error!s:.200}); {way}") from None
