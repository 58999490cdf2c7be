"""Documents set aside before training: probing sets P_c (Eq. 2) and held-out sets, by capability.

A source's documents are stored in a random order, so its last ones are a random sample of it. Training takes
the leading documents (`SourceConfig.documents`). The last ones are set aside. Two sets for each capability
are cut from them, with no document in both:

    probe_{capability}     gives the influence direction of the capability
    heldout_{capability}   is only evaluated, so data chosen by the probing set cannot flatter it

A document whose tokens are also those of a training document, of any source, enters neither set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config import RESERVED
from megatron_r1.data.indexed import (
    IndexedDataset,
    IndexedWriter,
    document_starts,
    identity_of,
    open_corpus,
    with_suffix,
)
from megatron_r1.data.integrity import say_unchecked
from megatron_r1.data.sidecar import gold_mistakes, read_sidecar
from megatron_r1.records import Corpus
from megatron_r1.run.stage import answer, answered, finish, read, standing
from megatron_r1.system.errors import suggest
from megatron_r1.system.fields import check_names
from megatron_r1.system.files import write_json, write_text
from megatron_r1.system.json_io import is_count, mistake
from megatron_r1.system.process import allow_open_files
from megatron_r1.system.terminal import Progress, say
from megatron_r1.system.yaml_io import format_yaml

FORMAT, _STAGE = 2, "set probes aside"
SETS = ("probe", "heldout")
_AT_ONCE = 1000
"""Documents hashed between two updates of the progress bar."""
SLACK = 1.25
"""Tokens set aside, as a multiple of what the two sets hold. Duplicates may drop out."""


@dataclass(frozen=True)
class PairSource:
    name: str
    capability: str | None
    dataset: IndexedDataset
    sidecar: dict[str, Any]
    lengths: np.ndarray
    """Tokens of each document, [documents], int64."""
    leading: int
    """Documents left to training. The rest is set aside."""

    def digest(self, document: int) -> bytes:
        # The mapped bytes: a document of others may have gigabytes.
        return hashlib.blake2b(self.dataset.document(document).data, digest_size=16).digest()

    def stretch(self, document: int, digest: bytes, most: int) -> np.ndarray:
        """At most so many tokens of a document, from a place that follows from its digest."""
        tokens = self.dataset.document(document)
        start = int.from_bytes(digest[:8], "little") % (max(0, len(tokens) - most) + 1)
        return tokens[start : start + most]

    def report(self) -> dict[str, Any]:
        tokens = self.dataset.tokens_before(self.leading)
        return {
            "capability": self.capability,
            "documents": len(self.lengths),
            "tokens": len(self.dataset.tokens),
            "training_documents": self.leading,
            "training_tokens": tokens,
            "set_aside_documents": len(self.lengths) - self.leading,
            "set_aside_tokens": len(self.dataset.tokens) - tokens,
        }


def curate_probes(
    sources: Mapping[str, str | Path],
    capabilities: Mapping[str, Sequence[str]],
    output_dir: str | Path,
    *,
    tokens_per_source: int = 32_768,
    fraction: float = 0.1,
    max_document_tokens: int = 2048,
    end_documents: bool = False,
    overwrite: bool = False,
    check: bool = False,
    log: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Write the sets, `split.yaml` (for the trainer) and `manifest.json`. Returns the manifest.

    `sources`: name -> prefix, all that training will draw from, in order. `capabilities`: name -> sources. A
    source of no capability is only split. Each set holds exactly `tokens_per_source` tokens of each of its
    sources. A document gives at most `max_document_tokens` of them: a stretch at a place that follows from
    the document's hash. `fraction` of a source's tokens is set aside, more where the sets need more.

    `end_documents`: the end-of-document token replaces the last token of each stretch, as
    `data.cross_documents=false` needs it. `check`: write nothing. The manifest then tells how each source
    would be split, and names no files.

    Sets of another request are replaced only with `overwrite`, or where only the datasets have changed since.

    Raises ValueError for names that are unknown or cannot be a file's, for a source that is too small, for
    tokenizers that differ and for sets of another request. Raises FileNotFoundError for a dataset that is not
    there.
    """
    output_dir = Path(output_dir)
    if not sources or not capabilities or tokens_per_source < 1 or max_document_tokens < 1:
        raise ValueError("give at least one source, one capability and one token a source and document")
    check_names("--sources: name", sources)
    check_names("--capabilities: name", capabilities, RESERVED)
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"fraction={fraction} to set aside; it must be between 0 and 0.5")
    of_capability = _capability_of_sources(sources, capabilities)
    corpora = [open_corpus(name, prefix) for name, prefix in sources.items()]
    say_unchecked(corpora)
    # Tokens and three parts of the index of each stay mapped, and a mapping holds a file.
    allow_open_files(4 * len(sources), "mapped files of datasets")
    request: dict[str, Any] = {
        "format": FORMAT,
        "sources": {n: {"prefix": str(p), "identity": identity_of(p)} for n, p in sources.items()},
        "capabilities": {name: list(members) for name, members in capabilities.items()},
        "tokens_per_source": tokens_per_source,
        "fraction": fraction,
        "max_document_tokens": max_document_tokens,
        **({"end_documents": True} if end_documents else {}),
    }
    inputs = {of["prefix"]: of["identity"] for of in request["sources"].values()}
    manifest_path = output_dir / "manifest.json"
    if manifest_path.exists() and not overwrite:
        _refuse_other(manifest_path, request)
    if (manifest := answered(manifest_path, request)) is not None and _is_whole(manifest, request):
        log(f"already done: {manifest_path}")
        if not check:
            record(manifest, output_dir, _STAGE, inputs)
        return manifest
    need = int(2 * tokens_per_source * SLACK)
    opened = [_divide(c, of_capability.get(c.name), fraction, need, max_document_tokens) for c in corpora]
    check_tokenizers(opened, end_documents)
    report = {source.name: source.report() for source in opened}
    if check:
        return {"request": request, "sources": report, "files": {}}
    members = [source for source in opened if source.capability]
    digests = {s.name: [s.digest(i) for i in range(s.leading, len(s.lengths))] for s in members}
    taken = dict.fromkeys(_copies_in_training(opened, digests), "in_training")
    stretches: dict[str, dict[str, list[np.ndarray]]] = {}
    for source in members:
        stretches[source.name], counts = _choose(
            source, digests[source.name], taken, tokens_per_source, max_document_tokens
        )
        report[source.name] |= counts
        copies, repeated = counts["dropped_in_training"], counts["dropped_repeated"]
        if copies or repeated:
            log(f"{source.name}: dropped {copies} documents that training holds too, {repeated} repeated")
    files: list[Path] = []
    manifest_path.unlink(missing_ok=True)
    for capability, names in capabilities.items():
        for kind in SETS:
            prefix = output_dir / f"{kind}_{capability}"
            # One of each source in turn, so that a leading part of the set serves as well as the whole.
            turns = zip_longest(*(stretches[name][kind] for name in names))
            in_turn = (stretch for turn in turns for stretch in turn if stretch is not None)
            facts = {"capability": capability, "sources": list(names)}
            write_set(prefix, in_turn, opened[0], end_documents, facts)
            files += [with_suffix(prefix, suffix) for suffix in (".bin", ".idx")]
    write_text(output_dir / "split.yaml", _split(opened, capabilities, output_dir))
    manifest = answer(manifest_path, request, [*files, output_dir / "split.yaml"], sources=report)
    record(manifest, output_dir, _STAGE, inputs)
    return manifest


def _refuse_other(manifest: Path, request: dict[str, Any]) -> None:
    """ValueError for a manifest of another request, or of another tool."""
    theirs = (read(manifest) or {}).get("request")
    if not isinstance(theirs, dict) or "capabilities" not in theirs:
        way_out = "name another --output-dir, or replace it with --overwrite"
        raise ValueError(f"{manifest} is damaged, or another tool's; {way_out}")
    # Sources in their order, as documents of the first come first.
    ours = {**request, "sources": [[name, of["prefix"]] for name, of in request["sources"].items()]}
    sources: Any = theirs.get("sources")
    listed = [[name, of.get("prefix")] for name, of in sources.items()] if _is_table(sources) else None
    standing({**theirs, "sources": listed}, ours, lambda: True, f"{manifest} is of another request", _WAY_OUT)


_WAY_OUT = "name another --output-dir, or replace the sets with --overwrite"
_COUNTS = ("documents", "training_documents", "training_tokens", "set_aside_documents", "set_aside_tokens")


def _is_table(value: Any) -> bool:
    return not mistake(value, {str: dict})


def _is_whole(manifest: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether a manifest that was read back holds the counts of each source."""
    sources: Any = manifest.get("sources")
    same = _is_table(sources) and list(sources) == list(request["sources"])
    return same and all(is_count(of.get(name)) for of in sources.values() for name in _COUNTS)


def record(manifest: dict[str, Any], directory: Path, stage: str, inputs: Mapping[str, str]) -> None:
    """Add the ledger line, which names datasets by their identity. `inputs`: prefix -> identity."""
    files = {directory / name: digest for name, digest in manifest["files"].items()}
    prefixes = [path.with_suffix("") for path in files if path.suffix == ".bin"]
    outputs = {str(prefix): identity_of(prefix) for prefix in prefixes}
    outputs |= {str(path): digest for path, digest in files.items() if path.suffix not in (".bin", ".idx")}
    finish(directory, stage, inputs=inputs, outputs=outputs)


def _capability_of_sources(
    sources: Mapping[str, str | Path], capabilities: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """The capability of each source that has one. Raises ValueError for an unknown source or one in two."""
    of_capability: dict[str, str] = {}
    for capability, members in capabilities.items():
        for name in members:
            if name not in sources:
                raise ValueError(f"capability {capability}: no source {name}{suggest(name, sources)}")
            if name in of_capability:
                others = f"in {of_capability[name]} and {capability}; one capability a source"
                where = f"twice in {capability}" if of_capability[name] == capability else others
                raise ValueError(f"source {name} is {where}")
            of_capability[name] = capability
        if not members:
            raise ValueError(f"capability {capability} has no source")
    return of_capability


def _divide(corpus: Corpus, capability: str | None, fraction: float, need: int, cap: int) -> PairSource:
    """Set the last documents of a corpus aside: `fraction` of its tokens, and `need` tokens for its sets."""
    name, prefix, sidecar = corpus.name, corpus.prefix, read_sidecar(corpus.prefix) or {}
    for fault in gold_mistakes(corpus):
        raise ValueError(f"source {name}: {fault}")
    if sidecar and sidecar.get("seed") is None:
        fault = f"source {name}: {prefix} keeps its input order, so its last documents are no random sample"
        raise ValueError(f"{fault}; preprocess it without --no-shuffle")
    lengths = np.diff(document_starts(corpus))
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
    return PairSource(name, capability, IndexedDataset(prefix, share=None), sidecar, lengths, leading)


def check_tokenizers(opened: Sequence[PairSource], end_documents: bool) -> None:
    """Raises ValueError for sources of two tokenizers, and for documents that cannot be ended."""
    first = opened[0]
    for source in opened:
        ours, theirs = (s.sidecar.get("tokenizer_fingerprint") for s in (first, source))
        if ours != theirs or source.dataset.dtype != first.dataset.dtype:
            fault = f"source {source.name} was tokenized by {str(theirs)[:12]} ({source.dataset.dtype})"
            other = f"{first.name} by {str(ours)[:12]} ({first.dataset.dtype})"
            raise ValueError(f"{fault}, {other}; use one tokenizer")
        eod = source.sidecar.get("eod") if source.sidecar.get("append_eod") else None
        ended = eod is not None and eod <= np.iinfo(source.dataset.dtype).max
        if end_documents and source.capability and not ended:
            raise ValueError(
                f"--end-documents: source {source.name} was preprocessed without --append-eod, or its "
                f"sidecar names no end token that it can hold; preprocess it again with --append-eod"
            )


def _copies_in_training(opened: Sequence[PairSource], digests: Mapping[str, Sequence[bytes]]) -> set[bytes]:
    """Digests that training documents have too. Reads only training documents of a digested length."""
    wanted = {digest for of_source in digests.values() for digest in of_source}
    lengths = np.unique(np.concatenate([s.lengths[s.leading :] for s in opened if s.name in digests]))
    alike = [np.flatnonzero(np.isin(source.lengths[: source.leading], lengths)) for source in opened]
    copies = set()
    with Progress("look for copies in training", sum(map(len, alike)), "documents") as bar:
        for source, documents in zip(opened, alike, strict=True):
            for first in range(0, len(documents), _AT_ONCE):
                some = documents[first : first + _AT_ONCE].tolist()
                copies |= wanted & {source.digest(i) for i in some}
                bar.advance(len(some))
    return copies


def _choose(
    source: PairSource, digests: Sequence[bytes], taken: dict[bytes, str], tokens: int, cap: int
) -> tuple[dict[str, list[np.ndarray]], dict[str, int]]:
    """Stretches of this source for each set, exactly `tokens` in each, and counts of its documents.

    Each document goes to the set with fewer tokens. `taken`: digest -> the reason for which no further
    document with it may enter a set. The documents chosen here are added.
    """
    stretches: dict[str, list[np.ndarray]] = {name: [] for name in SETS}
    have = dict.fromkeys(SETS, 0)
    dropped = {"in_training": 0, "repeated": 0}
    for i, digest in enumerate(digests, source.leading):
        if digest in taken:
            dropped[taken[digest]] += 1
            continue
        taken[digest] = "repeated"
        into = min(SETS, key=lambda name: have[name])
        length = min(int(source.lengths[i]), cap, tokens - have[into])
        if length:
            stretches[into].append(source.stretch(i, digest, length))
            have[into] += length
    if min(have.values()) < tokens:
        raise ValueError(
            f"source {source.name}: only {sum(have.values())} of {2 * tokens} tokens can be set aside "
            f"({dropped['in_training']} documents are in training too, {dropped['repeated']} repeated); "
            f"raise --fraction or take fewer --tokens-per-source"
        )
    counts = {f"{name}_documents": len(stretches[name]) for name in SETS}
    return stretches, counts | {f"dropped_{reason}": count for reason, count in dropped.items()}


def write_set(
    prefix: Path,
    stretches: Iterator[np.ndarray],
    like: PairSource,
    end_documents: bool,
    facts: Mapping[str, Any],
) -> None:
    """Write a pair of the tokenizer of `like`. Its sidecar holds `facts`."""
    with_suffix(prefix, ".json").unlink(missing_ok=True)
    with IndexedWriter(prefix, like.dataset.dtype) as writer:
        for stretch in stretches:
            if end_documents:
                stretch = np.append(stretch[:-1], stretch.dtype.type(like.sidecar["eod"]))
            writer.add_document(stretch)
    if like.sidecar:
        kept = ("tokenizer_type", "tokenizer_fingerprint", "vocab_size", "eod")
        sidecar = {
            **{key: like.sidecar[key] for key in kept if key in like.sidecar},
            "append_eod": end_documents,
            "dtype": like.dataset.dtype.name,
            **facts,
            "documents": writer.num_documents,
            "tokens": writer.num_tokens,
            "bin_sha256": writer.sha256,
            "idx_sha256": writer.idx_sha256,
        }
        write_json(with_suffix(prefix, ".json"), sidecar)


def _split(opened: Sequence[PairSource], capabilities: Mapping[str, Sequence[str]], output_dir: Path) -> str:
    """The trainer's configuration of this split: what to train on, what to watch, what to score against."""
    sources: dict[str, dict[str, Any]] = {}
    for s in opened:
        sources[s.name] = {"prefix": str(s.dataset.prefix), "documents": s.leading}
        sources[s.name] |= {"domain": s.capability} if s.capability else {}
    sets = {name: {c: str(output_dir / f"{name}_{c}") for c in capabilities} for name in SETS}
    data = {"sources": sources, "probes": sets["heldout"]}
    head = "# Written by tools/curate_probes.py; paths are relative to where it ran.\n"
    return head + format_yaml({"data": data, "influence": {"directions": sets["probe"]}})
