"""The results of a funnel: R_g and P_c as indexed datasets, keep masks, tables, a dataset card, the manifest.

    representative_SOURCE   R_g, the best document first
    probe_C, heldout_C      halves of P_c, the R_g of all sources of domain C: in turn by the documents' hash
    keep/SOURCE-HASH.npz    the source's documents that are in no R_g, for `phases.NAME.keep`
    documents/SOURCE.parquet  R_g as text, in datatrove's form
    scores.parquet          every score of every document of the samples, and how many stages it passed
    pairs.parquet, hits.parquet  duplicates, evaluation items
    curated.yaml            for the trainer
    README.md               the dataset card
    manifest.json           request, funnel with examples, models, SHA-256 of all files

Tokens are copied from the source's pair, where a document is found by the hash of its text. A document that
the pair lacks is in no set, and is counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np

from megatron_r1.curation.probes import SETS, PairSource, check_tokenizers, record, write_set
from megatron_r1.curation.request import CurationConfig
from megatron_r1.curation.sample import SCORES, Source
from megatron_r1.curation.work import ID, Documents, parquet_rows
from megatron_r1.data.indexed import IndexedDataset, document_starts, open_corpus, with_suffix
from megatron_r1.data.integrity import say_unchecked, side_file
from megatron_r1.data.keep import documents_mask
from megatron_r1.data.npy import write_array
from megatron_r1.data.provenance import ORIGIN, Provenance, read_provenance
from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.records import Corpus
from megatron_r1.run.stage import answer, read
from megatron_r1.system.errors import require, rewording, some
from megatron_r1.system.files import plain_name, replacing, write_text
from megatron_r1.system.json_io import mistake
from megatron_r1.system.terminal import say
from megatron_r1.system.yaml_io import format_yaml

STAGE = "curate probes"
"""Name in the ledger."""


@dataclass
class Outcome:
    """What the stages found. `hits` and `alike`: rows of hits.parquet and pairs.parquet."""

    pairs: dict[str, Pair]
    sources: dict[str, Source]
    chosen: dict[str, np.ndarray]
    """Source -> rows of R_g, the best first."""
    hits: list[dict[str, Any]] = field(default_factory=list)
    alike: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Of duplicates and decontamination, for the manifest."""


class Pair:
    """A source's pair, in which documents are found by the hash of their text."""

    def __init__(self, name: str, prefix: str):
        self.corpus: Corpus = open_corpus(name, prefix)
        self.origins: Provenance = read_provenance(prefix)
        lengths = np.diff(document_starts(self.corpus))
        dataset, sidecar = IndexedDataset(prefix, share=None), read_sidecar(prefix) or {}
        self.tokens = PairSource(name, name, dataset, sidecar, lengths, len(lengths))

    def require(self, sample: Documents) -> None:
        """Raise ValueError where it holds no document of the sample."""
        if not self.origins.among(_raw(sample.column("id", ID)).tolist()).any():
            none = f"{self.corpus.prefix} holds none of {len(sample)} of its documents"
            raise ValueError(
                f"sources.{self.corpus.name}: {none}; name the pair that was made of these inputs"
            )

    def places(self, ids_N: np.ndarray) -> np.ndarray:
        """The first document with each of these texts, [N] int64, -1 where there is none."""
        hash_N, out_N = _raw(ids_N), np.full(len(ids_N), -1)
        found_M = np.flatnonzero(self.origins.among(hash_N.tolist()))
        found_M16 = np.ascontiguousarray(self.origins.hashes[found_M])
        hash_M, first_M = np.unique(found_M16.view("S16").ravel(), return_index=True)
        there_N = np.isin(hash_N, hash_M)
        out_N[there_N] = found_M[first_M[np.searchsorted(hash_M, hash_N[there_N])]]
        return out_N


def open_pairs(config: CurationConfig) -> dict[str, Pair]:
    """Raises ValueError for pairs of two tokenizers and for damaged ones, OSError for missing ones."""
    pairs = {name: Pair(name, source.prefix) for name, source in config.sources.items()}
    check_tokenizers([pair.tokens for pair in pairs.values()], config.probes.end_documents)
    return pairs


def _raw(ids: np.ndarray) -> np.ndarray:
    """Ids as 16 bytes each."""
    return np.frombuffer(bytes.fromhex(ids.tobytes().decode()), "S16")


def write(config: CurationConfig, out: Outcome, request: dict[str, Any]) -> dict[str, Any]:
    """Write all results, the manifest last. Returns the manifest.

    Raises ValueError for a domain of which nothing is left.
    """
    folder, form, pairs = Path(config.output), config.probes, out.pairs
    say_unchecked([pair.corpus for pair in pairs.values()])
    place = {name: pair.places(out.sources[name].ids_N) for name, pair in pairs.items()}
    chosen = _in_pairs(out, place)
    sets = {f"representative_{name}": {name: rows} for name, rows in chosen.items()}
    facts: dict[str, Any] = {set_name: {"sources": [*of]} for set_name, of in sets.items()}
    for domain, members in config.domains().items():
        for half, kind in enumerate(SETS):
            of = {n: chosen[n][out.sources[n].halves(chosen[n]) == half] for n in members if n in chosen}
            if not any(map(len, of.values())):
                counts = ", ".join(f"{n} {len(chosen.get(n, ()))}" for n in members)
                fault = f"domain {domain} has no document for {kind}_{domain} (documents left: {counts})"
                raise ValueError(f"{fault}; raise documents or most, or lower a threshold of its sources")
            sets[f"{kind}_{domain}"] = of
            facts[f"{kind}_{domain}"] = {"capability": domain, "sources": members}
    masks = _masks(out, chosen, form.seq_length)
    _remove_earlier(folder)
    files = list[Path]()
    for set_name, of in sets.items():
        turns, prefix = list(_in_turn(of)), folder / set_name
        digests = ((n, row, bytes.fromhex(out.sources[n].ids_N[row].decode())) for n, row in turns)
        stretches = (
            pairs[n].tokens.stretch(int(place[n][row]), digest, form.max_document_tokens)
            for n, row, digest in digests
        )
        origins, inputs = _origins([(pairs[n], int(place[n][row])) for n, row in turns])
        first = next(iter(pairs.values())).tokens
        write_set(prefix, stretches, first, form.end_documents, facts[set_name] | {"inputs": inputs})
        files += [
            *(with_suffix(prefix, suffix) for suffix in (".bin", ".idx")),
            side_file(prefix, "docs.npy"),
        ]
        with replacing(files[-1]) as stream:
            write_array(stream, origins)
    for name, rows in chosen.items():
        files.append(folder / "documents" / f"{name}.parquet")
        parquet_rows(files[-1], out.sources[name].with_scores(rows))
    kept = dict[str, Path]()
    for name, mask in masks.items():
        kept[name] = folder / "keep" / f"{name}-{hashlib.sha256(mask).hexdigest()[:16]}.npz"
        with replacing(kept[name]) as stream:
            stream.write(mask)
    files += kept.values()
    _tables(folder, out, place)
    write_text(folder / "curated.yaml", _for_trainer(config, folder, kept))
    content: dict[str, Any] = {
        "models": request["models"],
        "funnel": {
            n: _funnel(of, len(out.chosen[n]) - len(chosen.get(n, ()))) for n, of in out.sources.items()
        },
        **out.facts,
        "sets": {set_name: {n: len(rows) for n, rows in of.items()} for set_name, of in sets.items()},
    }
    write_text(folder / "README.md", _card(config, content))
    tables = ("scores.parquet", "pairs.parquet", "hits.parquet", "curated.yaml", "README.md")
    files += [folder / name for name in tables]
    manifest = answer(folder / "manifest.json", request, files, **content)
    record(manifest, folder, STAGE, request["pairs"])
    return manifest


def _masks(out: Outcome, chosen: Mapping[str, np.ndarray], seq_length: int) -> dict[str, bytes]:
    """Keep masks without the documents chosen. A copy in another source would be trained on, too.

    Raises ValueError where a source has nothing left to train on.
    """
    aside = [h for name, rows in chosen.items() for h in _raw(out.sources[name].ids_N[rows]).tolist()]
    masks = {}
    for name, pair in out.pairs.items():
        kept_D = ~pair.origins.among(aside)
        with rewording(lambda error: f"{error}, or ask for fewer documents than its {len(kept_D)}"):  # noqa: B023
            if not kept_D.all():
                masks[name] = documents_mask(pair.corpus, kept_D, seq_length)
    return masks


def _remove_earlier(folder: Path) -> None:
    """Remove what an earlier manifest of ours lists, which comes last. Masks stay: a phase may name them."""
    manifest = folder / "manifest.json"
    earlier = read(manifest) or {}
    ours = not mistake(earlier, {"request": {"curation": dict}, "files": {str: str}})
    for name in earlier["files"] if ours else ():
        parts = name.split("/")
        if all(map(plain_name, parts)) and parts[0] != "keep":
            (path := folder.joinpath(*parts)).unlink(missing_ok=True)
            if path.suffix == ".bin":
                path.with_suffix(".json").unlink(missing_ok=True)
                shutil.rmtree(path.with_suffix(".side"), ignore_errors=True)
    manifest.unlink(missing_ok=True)


def _in_pairs(out: Outcome, place: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Source -> rows of R_g that the pair has. Sources without any are left out."""
    chosen = {}
    for name, rows in out.chosen.items():
        there = place[name][rows] >= 0
        if missing := int((~there).sum()):
            ids = some([one.decode() for one in out.sources[name].ids_N[rows[~there]]], most=3)
            lacks = f"{out.pairs[name].corpus.prefix} lacks {missing} of {len(rows)} documents ({ids})"
            say(f"warning: sources.{name}: {lacks}; they are in no set")
        if there.any():
            chosen[name] = rows[there]
        else:
            say(f"warning: sources.{name}: none of its documents is left, so it has no representative set")
    return chosen


def _in_turn(of: Mapping[str, np.ndarray]) -> Iterator[tuple[str, int]]:
    """Documents, one of each source in turn: a leading part of a set serves as well as the whole."""
    for turn in zip_longest(*([(name, int(row)) for row in rows] for name, rows in of.items())):
        yield from filter(None, turn)


def _origins(documents: Sequence[tuple[Pair, int]]) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Origins of documents of pairs, [documents] of ORIGIN, and the inputs that these number."""
    inputs, first = list[str](), dict[str, int]()
    for name, pair in {pair.corpus.name: pair for pair, _ in documents}.items():
        first[name] = len(inputs)
        # A pair may name no inputs.
        inputs += pair.origins.inputs or [f"{pair.corpus.prefix}"] * (int(pair.origins.files.max()) + 1)
    origin_D = np.empty(len(documents), ORIGIN)
    for origin, (pair, at) in zip(origin_D, documents, strict=True):
        of = pair.origins
        origin["hash"], origin["line"] = of.hashes[at], of.lines[at]
        origin["file"] = first[pair.corpus.name] + of.files[at]
    return origin_D, [{"path": path} for path in inputs]


def _tables(folder: Path, out: Outcome, place: Mapping[str, np.ndarray]) -> None:
    arrow, parquet = require("pyarrow", "curation"), require("pyarrow.parquet", "curation")

    def schema(texts: str, **numbers: Any) -> Any:
        return arrow.schema([*((name, arrow.string()) for name in texts.split()), *numbers.items()])

    hits = schema("source id set item part item_text document_text", score=arrow.float64())
    duplicates = schema("kind first_source first second_source second", likeness=arrow.float64())
    for name, columns, rows in (("hits", hits, out.hits), ("pairs", duplicates, out.alike)):
        with replacing(folder / f"{name}.parquet") as stream:
            parquet.write_table(arrow.Table.from_pylist(rows, columns), stream)
    kinds = dict.fromkeys(SCORES, arrow.float32())
    columns = schema("source id file", line=arrow.uint64(), **kinds, passed=arrow.int8())
    with replacing(folder / "scores.parquet") as stream, parquet.ParquetWriter(stream, columns) as writer:
        for name, source in out.sources.items():
            place_N, origins = place[name], out.pairs[name].origins
            inputs = np.array([*origins.inputs, None], object)
            # Beyond all inputs where the pair lacks the document, or names no inputs.
            file_N = np.where(place_N < 0, len(inputs), origins.files[place_N])
            table = {
                "source": [name] * len(place_N),
                "id": source.ids_N.astype(str),
                "file": inputs[np.minimum(file_N, len(inputs) - 1)],
                "line": arrow.array(origins.lines[place_N], mask=place_N < 0),
                **{kind: arrow.array(source.scores[kind], from_pandas=True) for kind in SCORES},
                "passed": source.last_N,
            }
            writer.write_table(arrow.table(table, schema=columns))


def _funnel(source: Source, missing: int) -> dict[str, Any]:
    facts = source.rounds[-1].facts
    counts, share = dict(facts["counts"]), facts["share"]
    read = counts.pop("read")
    about = {"documents": round(read / share), "read": read, "share_read": share, "left_out": counts}
    return {**about, "rejects": facts["rejects"], "missing_in_pair": missing, "stages": source.stages}


def _for_trainer(config: CurationConfig, folder: Path, masks: Mapping[str, Path]) -> str:
    """The trainer's configuration: sources, what to watch and what to score against; masks as a comment."""
    sources = {
        name: {"prefix": s.prefix, **({"domain": s.domains[0]} if len(s.domains) == 1 else {})}
        for name, s in config.sources.items()
    }
    sets = {kind: {c: str(folder / f"{kind}_{c}") for c in config.domains()} for kind in SETS}
    tree: dict[str, Any] = {"data": {"sources": sources, "probes": sets["heldout"]}}
    tree |= {"influence": {"directions": sets["probe"]}} if sets["probe"] else {}
    keep = format_yaml({"keep": {name: str(path) for name, path in masks.items()}})
    return _CURATED.format(tree=format_yaml(tree), keep=indent(keep, "#     "))


_CURATED = """# Written by tools/curate_probes.py; paths are relative to where it ran.
{tree}# Masks keep the representative sets out of training. Add them to every phase:
# phases:
#   NAME:
{keep}"""


def _card(config: CurationConfig, content: Mapping[str, Any]) -> str:
    """The dataset card, in Markdown."""
    funnel, sets = content["funnel"], content["sets"]
    stages = list(dict.fromkeys(s["stage"] for of in funnel.values() for s in of["stages"]))
    rows = [["source", "read", "of about", *stages]]
    for name, of in funnel.items():
        by_stage = {stage["stage"]: _cell(stage) for stage in of["stages"]}
        share = f"{of['documents']:,} ({of['share_read']:.2%})"
        rows.append([name, f"{of['read']:,}", share, *(by_stage.get(stage, "") for stage in stages)])
    counts = [[name, ", ".join(f"{n} {k:,}" for n, k in of.items())] for name, of in sets.items()]
    template = Path(__file__).with_name("card.md").read_text()
    return template.format(
        funnel=_markdown(rows),
        sets=_markdown([["set", "documents of each source"], *counts]),
        models="\n".join(f"- {kind}: {identity}" for kind, identity in content["models"].items()) or "None.",
        request=indent(format_yaml(dataclasses.asdict(config)), "    ", lambda line: True),
        prompts="".join(
            f"\n## Prompt {p.stem}\n\n{indent(p.read_text(), '    ')}\n" for p in config.prompt_files()
        ),
    )


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _cell(stage: dict[str, Any]) -> str:
    reached = "" if stage["threshold"] is None else f" ({stage['threshold']:.3g}{'*' * stage['fallback']})"
    return f"{stage['kept']:,}{reached}"
