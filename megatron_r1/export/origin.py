"""Facts that lie around a checkpoint and not in it. Imports no torch.

A run has a context and a tokenizer. An imported checkpoint has the context and the special tokens of its
Hugging Face folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_r1.checkpoint.files import read_meta
from megatron_r1.config_io import read_tree
from megatron_r1.data.indexed import identity_of, with_suffix
from megatron_r1.data.integrity import side_file
from megatron_r1.data.plan_file import datasets_of
from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.export.folder import MOST_JSON
from megatron_r1.run import ledger
from megatron_r1.run.layout import RunDir
from megatron_r1.system.errors import shown
from megatron_r1.system.json_io import read_object
from megatron_r1.system.terminal import say

IMPORTED, CONTEXT = "huggingface.json", "max_position_embeddings"
"""Beside an imported checkpoint: the keys of config.json that a checkpoint has no place for."""


def imported(source: Path) -> dict[str, Any]:
    """The content of `IMPORTED`, context and ids of special tokens. Empty for a run's checkpoint."""
    path = source.resolve().parent / IMPORTED
    kept = read_object(path, MOST_JSON) if os.path.lexists(path) else {}
    for name, value in kept.items():
        tokens = value if isinstance(value, list) and name != CONTEXT else [value]
        if value is not None and not all(type(one) is int and abs(one) < 1 << 63 for one in tokens):
            raise ValueError(f"{path}: {shown(name)} is {shown(value)}, where ids stand; import again")
    return kept


def context_of(source: Path) -> int:
    """Longest sequence, tokens: `data.seq_length` of the run that RUN/checkpoints/step_N lies in, or the
    context that the checkpoint was imported with.

    Raises ValueError where neither says one, and for no complete checkpoint.
    """
    read_meta(source)
    context = imported(source).get(CONTEXT) or _section_of_run(source, "data").get("seq_length")
    if not isinstance(context, int) or context < 1:
        raise ValueError(f"{source} lies in no run that says its data.seq_length; give --context TOKENS")
    return context


def compare_tokenizer(source: Path, plan: str, fingerprint: str) -> None:
    """Raise ValueError where the data of the checkpoint's run was made with another tokenizer.

    `plan`: the checkpoint's data plan, whose identities tell whether a dataset is still the one trained on.
    Says so where no dataset tells its tokenizer.
    """
    identities, absent = datasets_of(plan), list[str]()
    for name, prefix in _datasets_of_run(source).items():
        if not with_suffix(prefix, ".idx").is_file():
            absent.append(str(prefix))
            continue
        sidecar = read_sidecar(prefix) or {}
        made_with = sidecar.get("tokenizer_fingerprint")
        # Of a pair without hashes, a hash of sampled tokens follows after a "+".
        trained_on = str(identities.get(name, "")).partition("+")[0]
        if made_with is None or trained_on not in ("", identity_of(prefix)):
            continue
        if made_with != fingerprint:
            raise ValueError(
                f"the tokenizer {fingerprint[:12]} is not the run's: by {prefix}.json its data was "
                f"made with {sidecar.get('tokenizer_type')} {made_with[:12]}; name that, or none"
            )
        return
    why = f"{absent[0]}.idx is not there" if absent else f"no dataset of the run of {source} tells its own"
    say(f"the tokenizer is not compared with the run's data: {why}")


def tokenizer_of(source: Path) -> tuple[str, str]:
    """Kind and path of the tokenizer that made the data of the checkpoint's run, by the ledgers of its data.

    ValueError where none of them names one.
    """
    for prefix in _datasets_of_run(source).values():
        if named := tokenizer_of_pair(prefix, _start_of(source)):
            return named
    way_out = (
        f"convert it by tools/convert_checkpoint.py --to hf {source} FOLDER --tokenizer-type KIND "
        f"--tokenizer-model MODEL, and name FOLDER"
    )
    raise ValueError(f"no dataset of the run of {source} tells where its tokenizer lies; {way_out}")


def tokenizer_of_pair(prefix: str | Path, start: Path = Path()) -> tuple[str, str] | None:
    """Kind and path of the tokenizer that made a pair, by its sidecar and its ledger; None: they name none.

    `start`: where relative paths begin.
    """
    sidecar = read_sidecar(prefix) or {}
    for line in ledger.read(side_file(prefix, "ledger.jsonl").parent):
        for path, fingerprint in line["inputs"].items():
            if fingerprint == sidecar.get("tokenizer_fingerprint"):
                return sidecar["tokenizer_type"], str(start / path)
    return None


def _start_of(source: Path) -> Path:
    """The folder that relative paths of the checkpoint's run begin in: that of its launch."""
    root = source.resolve().parent.parent
    parts = Path(str(_section_of_run(source, "train").get("run") or "")).parts
    relative = parts and not Path(*parts).is_absolute() and root.parts[-len(parts) :] == parts
    return Path(*root.parts[: -len(parts)]) if relative else Path()


def _datasets_of_run(source: Path) -> dict[str, Path]:
    """The prefix of each source."""
    start, sources = _start_of(source), _section_of_run(source, "data").get("sources")
    specs = sources.items() if isinstance(sources, dict) else ()
    return {name: start / str(s.get("prefix") if isinstance(s, dict) else s) for name, s in specs}


def _section_of_run(source: Path, name: str) -> dict[str, Any]:
    """A section of the run's configuration. Empty where the checkpoint lies in no run."""
    config, mistakes = RunDir(source.resolve().parent.parent).config, list[str]()
    section = read_tree(config, mistakes).get(name) if config.is_file() else None
    if mistakes:
        raise ValueError(f"{mistakes[0]}; it is the run's configuration")
    return section if isinstance(section, dict) else {}
