"""Documents set aside before training: probing sets P_c (Eq. 2) and held-out sets, by capability.

A source's documents are stored in a random order, so its last ones are a random sample of it. They are
set aside; training takes the leading ones (`SourceConfig.documents`). For each capability, two sets are
cut from what is set aside, with no document in both:

    probe_{capability}     gives the influence direction of the capability
    heldout_{capability}   only ever evaluated: choosing data by the one cannot flatter the other

A document whose tokens also occur as a training document, of any source, enters neither set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_r1.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    identity_of,
    open_corpus,
    read_sidecar,
    with_suffix,
)
from megatron_r1.run.stage import answer, answered, finish
from megatron_r1.system.errors import suggest, suggest_path
from megatron_r1.system.files import write_json, write_text
from megatron_r1.system.terminal import Progress, say

FORMAT = 2
SETS = ("probe", "heldout")
_AT_ONCE = 1000
"""Documents that are hashed between two looks at the clock."""
SLACK = 1.25
"""What is set aside, over what the two sets need: duplicates may drop out."""


@dataclass(frozen=True)
class _Source:
    name: str
    capability: str | None
    dataset: IndexedDataset
    sidecar: dict[str, Any]
    lengths: np.ndarray
    """Tokens of each document, [documents], int64."""
    leading: int
    """Documents left to training; the rest is set aside."""


def curate_probes(
    sources: Mapping[str, str | Path],
    capabilities: Mapping[str, Sequence[str]],
    output_dir: str | Path,
    *,
    tokens_per_source: int = 32_768,
    fraction: float = 0.1,
    max_document_tokens: int = 2048,
    end_documents: bool = False,
    check: bool = False,
    log: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Write the sets, `split.yaml` (for the trainer) and `manifest.json`; returns the manifest.

    end_documents: the last token of what is cut out of a document becomes the end-of-document token, as
    `data.cross_documents=false` needs it. check: write nothing; the manifest then says how each source would
    be split, and names no files.

    sources: name -> prefix, all that training will draw from, in order. capabilities: name -> its sources;
    a source may be in none, and is then only split. Each set holds exactly `tokens_per_source` tokens of
    each of its sources, at most `max_document_tokens` of a document (a stretch at a place given by the
    document's hash). `fraction` of a source's tokens is set aside, more where the sets need more.
    Errors: ValueError (names, too small a source, tokenizers that differ), FileNotFoundError.
    """
    output_dir = Path(output_dir)
    of_capability = _checked(sources, capabilities, tokens_per_source, fraction, max_document_tokens)
    request = {
        "format": FORMAT,
        "sources": {name: _describe_source(prefix) for name, prefix in sources.items()},
        "capabilities": {name: list(members) for name, members in capabilities.items()},
        "tokens_per_source": tokens_per_source,
        "fraction": fraction,
        "max_document_tokens": max_document_tokens,
        **({"end_documents": True} if end_documents else {}),
    }
    manifest_path = output_dir / "manifest.json"
    if (manifest := answered(manifest_path, request)) is not None:
        log(f"already done: {manifest_path}")
        if not check:
            _tell(manifest, output_dir)
        return manifest
    need = int(2 * tokens_per_source * SLACK)
    opened = [
        _open(name, prefix, of_capability.get(name), fraction, need, max_document_tokens)
        for name, prefix in sources.items()
    ]
    _same_tokenizer(opened)
    if end_documents:
        _can_be_ended(opened)
    if check:
        return {"request": request, "sources": {s.name: _describe(s) for s in opened}, "files": {}}
    digests = {s.name: _digests_set_aside(s) for s in opened if s.capability}
    in_training = _found_in_training(opened, {d for found in digests.values() for d in found})
    manifest_path.unlink(missing_ok=True)
    report: dict[str, Any] = {s.name: _describe(s) for s in opened}
    taken: set[bytes] = set()
    stretches: dict[str, dict[str, list[np.ndarray]]] = {}
    for source in opened:
        if source.capability is None:
            continue
        chosen = _choose(
            source, digests[source.name], in_training, taken, tokens_per_source, max_document_tokens
        )
        stretches[source.name], counts = chosen
        report[source.name] |= counts
        if counts["dropped_in_training"] or counts["dropped_repeated"]:
            log(
                f"{source.name}: dropped {counts['dropped_in_training']} documents that training holds too, "
                f"{counts['dropped_repeated']} repeated"
            )
    files = []
    for capability, members in capabilities.items():
        for name in SETS:
            prefix = output_dir / f"{name}_{capability}"
            parts = [stretches[m][name] for m in members]
            _write_set(prefix, capability, parts, members, opened[0], end_documents)
            files.append(with_suffix(prefix, ".bin"))
    write_text(output_dir / "split.yaml", _split(opened, capabilities, output_dir))
    manifest = answer(manifest_path, request, [*files, output_dir / "split.yaml"], sources=report)
    _tell(manifest, output_dir)
    return manifest


def _tell(manifest: dict[str, Any], directory: Path) -> None:
    """The ledger line: datasets by their identity, as those who read them know them."""
    made = {directory / name: digest for name, digest in manifest["files"].items()}
    sets = [str(path.with_suffix("")) for path in made if path.suffix == ".bin"]
    finish(
        directory,
        "set probes aside",
        inputs={of["prefix"]: of["identity"] for of in manifest["request"]["sources"].values()},
        outputs={
            **{prefix: identity_of(prefix) for prefix in sets},
            **{str(path): digest for path, digest in made.items() if path.suffix != ".bin"},
        },
    )


def _checked(
    sources: Mapping[str, str | Path],
    capabilities: Mapping[str, Sequence[str]],
    tokens_per_source: int,
    fraction: float,
    max_document_tokens: int,
) -> dict[str, str]:
    """The capability of each source that has one."""
    if not sources or not capabilities or tokens_per_source < 1 or max_document_tokens < 1:
        raise ValueError("give at least one source, one capability and one token a source and document")
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"fraction={fraction} to set aside; it must be between 0 and 0.5")
    of_capability: dict[str, str] = {}
    for capability, members in capabilities.items():
        for name in members:
            if name not in sources:
                raise ValueError(f"capability {capability}: no source {name}{suggest(name, sources)}")
            if name in of_capability:
                raise ValueError(
                    f"source {name} is in {of_capability[name]} and {capability}; one capability a source"
                )
            of_capability[name] = capability
        if not members:
            raise ValueError(f"capability {capability} has no source")
    return of_capability


def _describe_source(prefix: str | Path) -> dict[str, str]:
    """Of the request. Raises FileNotFoundError where a file of the pair is missing."""
    for path in (with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; run tools/preprocess_data.py first{suggest_path(path)}"
            )
    return {"prefix": str(prefix), "identity": identity_of(prefix)}


def _open(
    name: str, prefix: str | Path, capability: str | None, fraction: float, need: int, cap: int
) -> _Source:
    open_corpus(name, prefix)
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix) or {}
    if sidecar and sidecar.get("seed") is None:
        raise ValueError(
            f"source {name}: {prefix} keeps its input order, so its last documents are no random sample; "
            f"preprocess it without --no-shuffle"
        )
    starts = np.append(dataset.pointers // dataset.dtype.itemsize, len(dataset.tokens))
    lengths = np.diff(starts[dataset.documents])
    total = int(lengths.sum())
    # Counted from the end: documents until the fraction is reached, and until the sets have enough.
    backwards = lengths[::-1]
    aside = int(np.searchsorted(np.cumsum(backwards), fraction * total)) + 1 if fraction and total else 0
    if capability is not None:
        aside = max(aside, int(np.searchsorted(np.cumsum(np.minimum(backwards, cap)), need)) + 1)
    leading = max(0, len(lengths) - aside)
    if int(lengths[:leading].sum()) * 2 < total:
        raise ValueError(
            f"source {name}: its probing and held-out sets need the last {min(aside, len(lengths))} of "
            f"{len(lengths)} documents, more than half of its {total} tokens; "
            f"take fewer --tokens-per-source or a larger source"
        )
    return _Source(name, capability, dataset, sidecar, lengths, leading)


def _same_tokenizer(opened: Sequence[_Source]) -> None:
    first = opened[0]
    for source in opened[1:]:
        ours, theirs = (s.sidecar.get("tokenizer_fingerprint") for s in (first, source))
        if ours != theirs or source.dataset.dtype != first.dataset.dtype:
            raise ValueError(
                f"source {source.name} was tokenized by {str(theirs)[:12]} ({source.dataset.dtype}), "
                f"{first.name} by {str(ours)[:12]} ({first.dataset.dtype}); use one tokenizer"
            )


def _can_be_ended(opened: Sequence[_Source]) -> None:
    for source in opened:
        if source.capability and not source.sidecar.get("append_eod"):
            raise ValueError(
                f"--end-documents: source {source.name} was preprocessed without --append-eod, so its own "
                f"documents have no end either; preprocess it again with --append-eod"
            )


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def _digests_set_aside(source: _Source) -> list[bytes]:
    return [_digest(source.dataset.document(i)) for i in range(source.leading, len(source.lengths))]


def _found_in_training(opened: Sequence[_Source], wanted: set[bytes]) -> set[bytes]:
    """Those of the wanted documents that training holds. Only documents of a wanted length are read."""
    lengths = np.unique(
        np.concatenate([s.lengths[s.leading :] for s in opened if s.capability] or [np.empty(0, np.int64)])
    )
    alike = [np.flatnonzero(np.isin(source.lengths[: source.leading], lengths)) for source in opened]
    found = set()
    with Progress("look for copies in training", sum(map(len, alike)), "documents") as bar:
        for source, documents in zip(opened, alike, strict=True):
            for first in range(0, len(documents), _AT_ONCE):
                some = documents[first : first + _AT_ONCE].tolist()
                found |= wanted & {_digest(source.dataset.document(i)) for i in some}
                bar.advance(len(some))
    return found


def _choose(
    source: _Source,
    digests: Sequence[bytes],
    in_training: set[bytes],
    taken: set[bytes],
    tokens: int,
    cap: int,
) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]]:
    """Stretches of this source for each set, exactly `tokens` in each; documents go to the emptier set."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in SETS}
    have = dict.fromkeys(SETS, 0)
    repeated = training = 0
    for i, digest in enumerate(digests, source.leading):
        if digest in in_training:
            training += 1
            continue
        if digest in taken:
            repeated += 1
            continue
        taken.add(digest)
        into = min(SETS, key=lambda name: have[name])
        length = min(int(source.lengths[i]), cap, tokens - have[into])
        start = int.from_bytes(digest[:8], "little") % (int(source.lengths[i]) - length + 1)
        if length:
            found[into].append(source.dataset.document(i)[start : start + length])
            have[into] += length
    if min(have.values()) < tokens:
        raise ValueError(
            f"source {source.name}: only {sum(have.values())} of {2 * tokens} tokens can be set aside "
            f"({training} documents are in training too, {repeated} repeated); raise --fraction or take "
            f"fewer --tokens-per-source"
        )
    counts: dict[str, Any] = {f"{name}_documents": len(found[name]) for name in SETS}
    return found, counts | {"dropped_in_training": training, "dropped_repeated": repeated}


def _describe(source: _Source) -> dict[str, Any]:
    leading = source.dataset.tokens_before(source.leading)
    return {
        "capability": source.capability,
        "documents": len(source.lengths),
        "tokens": len(source.dataset.tokens),
        "training_documents": source.leading,
        "training_tokens": leading,
        "set_aside_documents": len(source.lengths) - source.leading,
        "set_aside_tokens": len(source.dataset.tokens) - leading,
    }


def _write_set(
    prefix: Path,
    capability: str,
    by_source: Sequence[list[np.ndarray]],
    members: Sequence[str],
    like: _Source,
    end_documents: bool,
) -> None:
    # One of each source in turn, so that a leading part of the set serves as well as the whole.
    mixed: Iterator[np.ndarray] = (s for turn in zip_longest(*by_source) for s in turn if s is not None)
    with_suffix(prefix, ".json").unlink(missing_ok=True)
    with IndexedWriter(prefix, like.dataset.dtype) as writer:
        for stretch in mixed:
            if end_documents:
                stretch = stretch.copy()
                stretch[-1] = like.sidecar["eod"]
            writer.add_document(stretch)
    kept = ("tokenizer_type", "tokenizer_fingerprint", "vocab_size", "eod")
    if not like.sidecar:
        return
    write_json(
        with_suffix(prefix, ".json"),
        {
            **{key: like.sidecar[key] for key in kept},
            "append_eod": end_documents,
            "dtype": like.dataset.dtype.name,
            "capability": capability,
            "sources": list(members),
            "documents": writer.num_documents,
            "tokens": writer.num_tokens,
            "bin_sha256": writer.sha256,
        },
    )


def _split(opened: Sequence[_Source], capabilities: Mapping[str, Sequence[str]], output_dir: Path) -> str:
    """The trainer's configuration of this split: what to train on, what to watch, what to score against."""
    sources = {
        s.name: {"prefix": str(s.dataset.prefix), "documents": s.leading}
        | ({"domain": s.capability} if s.capability else {})
        for s in opened
    }
    sets = {name: {c: str(output_dir / f"{name}_{c}") for c in capabilities} for name in SETS}
    split = {
        "data": {"sources": sources, "probes": sets["heldout"]},
        "influence": {"directions": sets["probe"]},
    }
    head = "# Written by tools/curate_probes.py; paths are relative to where it ran.\n"
    return head + yaml.safe_dump(split, sort_keys=False)
