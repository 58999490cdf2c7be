"""FILE.yaml of tools/curate_probes.py: which texts are judged, by which models, and how many are kept."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction as Ratio
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_r1.config import RESERVED
from megatron_r1.config_io import ConfigError, load_root
from megatron_r1.system.errors import require, rewording, suggest_path
from megatron_r1.system.fields import (
    ByName,
    Finite,
    PositiveInt,
    Section,
    Seed,
    Share,
    Text,
    Truth,
    limit,
    name_mistakes,
)

Fraction = Annotated[float, limit(lambda v: 0 < v <= 1, "must be above 0 and at most 1")]
SLACK = 1.25
"""Documents that the sample is drawn for, as a multiple of those needed. Duplicates drop out later."""


def exact(share: float) -> Ratio:
    """A share as it is written: 0.07 of 100 documents are 7, where 0.07 * 100 is above 7."""
    return Ratio(str(share))


@dataclass(frozen=True)
class TextSource(Section):
    """A training source as text, and the pair that was made of it."""

    text: list[Text]
    """Inputs as tools/preprocess_data.py reads them. `*` in a name stands for files."""
    prefix: Text
    """The source's pair, without `.bin` / `.idx`. Documents are found in it by the hash of their text."""
    key: Text = "text"
    """Key of the text in a line or row."""
    domains: list[Text] = field(default_factory=list)
    """Capabilities whose sets this source gives documents to. A source of none has a representative set."""
    score: Text | None = None
    """Key of a quality that the source has already, `a.b` within `a`. It takes the place of quality.model."""

    def keys(self) -> list[str]:
        return [self.key, *([self.score] if self.score else [])]


@dataclass(frozen=True)
class Quality(Section):
    """The first stage: a classifier of quality."""

    model: Text | None = "HuggingFaceFW/fineweb-edu-classifier@main"
    """Sequence classification or regression model; with `labelled`, a model of sentence embeddings."""
    threshold: Finite = 4.0
    """A document passes with a score above this."""
    tokens: PositiveInt = 512
    """Tokens that are read of a document."""
    label: Text | None = None
    """Of a classifier with several labels, the one whose probability is the score."""
    labelled: Text | None = None
    """JSONL of {text, score}, on which a head is trained."""
    language: Text | None = None
    """ISO 639-1 code. Documents of other languages are left out of the sample."""


@dataclass(frozen=True)
class Asked(Section):
    """Ask-LLM: the probability by which a language model says that a document belongs."""

    model: Text
    """Causal language model: a folder, a name on the hub, or a checkpoint of ours."""
    prompts: Text
    """Folder with reasoning.txt, combined.txt and CAPABILITY.txt."""
    tokens: PositiveInt = 1024
    """Tokens that are read of a document."""
    keep: Fraction = 0.1
    """Share that the general prompt keeps of each source."""
    domain_keep: Fraction = 1.0
    """Share that the prompt of its domain keeps of each source."""


@dataclass(frozen=True)
class Duplicates(Section):
    """Which documents of all sources count as the same. Equal ones always do."""

    near: Annotated[float, limit(lambda v: 0.05 <= v <= 1, "must be within 0.05 and 1")] | None = 0.8
    """Jaccard similarity of shingles of five words, from which two are near. None: not compared."""
    semantic: Text | None = None
    """Model of sentence embeddings. None: meanings are not compared."""
    tokens: PositiveInt = 256
    """Tokens that it reads of a document."""
    threshold: Share | None = None
    """Cosine from which two mean the same. None: calibrated on planted pairs."""


@dataclass(frozen=True)
class Decontamination(Section):
    """Evaluation items that no document may hold."""

    items: ByName[Text] = field(default_factory=dict)
    """Name -> JSONL of {question, answer}."""
    gold: list[Literal["humaneval", "mbpp", "gsm8k", "math500"]] = field(default_factory=list)
    """Benchmarks of installed packages (data/gold.py)."""


@dataclass(frozen=True)
class ProbeSets(Section):
    """The form of the sets."""

    seq_length: PositiveInt = 2048
    """`data.seq_length` of the training, for the keep masks."""
    max_document_tokens: PositiveInt = 2048
    """Tokens of one document."""
    end_documents: Truth = False
    """End each document by the end-of-document token, for data.cross_documents=false."""


@dataclass(frozen=True)
class CurationConfig(Section):
    """The root of FILE.yaml. A stage without its section is left out."""

    output: Text
    """Folder of all results, and of the work in progress."""
    sources: ByName[TextSource]
    documents: PositiveInt = 10_000
    """Documents of each representative set R_g, at most."""
    seed: Seed = 1234
    """Of the samples."""
    pilot: PositiveInt = 20_000
    """Documents of each source that are judged first. The size of the sample follows from them."""
    most: PositiveInt = 2_000_000
    """Documents of each source's sample, at most."""
    quality: Quality | None = None
    judge: Asked | None = None
    duplicates: Duplicates | None = field(default_factory=Duplicates)
    decontamination: Decontamination | None = None
    probes: ProbeSets = field(default_factory=ProbeSets)

    def needed(self, slack: float = 1.0) -> int:
        """Documents of a source that quality hands on at least: ten times `documents` by default."""
        shares = exact(self.judge.keep) * exact(self.judge.domain_keep) if self.judge else 1
        return math.ceil(self.documents * exact(slack) / shares)

    def domains(self) -> dict[str, list[str]]:
        """Capability -> its sources."""
        names = dict.fromkeys(domain for source in self.sources.values() for domain in source.domains)
        return {of: [name for name, s in self.sources.items() if of in s.domains] for of in names}

    def models(self) -> list[str]:
        """Kinds of jobs that load a model of their own."""
        uses = {
            "quality": self.quality and any(source.score is None for source in self.sources.values()),
            "judge": self.judge,
            "embed": self.duplicates and self.duplicates.semantic,
        }
        return [kind for kind, used in uses.items() if used]

    def files(self) -> list[Path]:
        """Prompts, labelled texts and evaluation items."""
        named = self.prompt_files()
        named += [Path(self.quality.labelled)] if self.quality and self.quality.labelled else []
        named += map(Path, self.decontamination.items.values() if self.decontamination else ())
        return list(dict.fromkeys(named))

    def prompt_files(self) -> list[Path]:
        return list(dict.fromkeys([*self.prompts("judge").values(), *self.prompts("domain").values()]))

    def prompts(self, kind: str) -> dict[str, Path]:
        """Source -> file of its prompt, "judge": the general one, "domain": that of its domains."""
        if self.judge is None:
            return {}
        names = {
            name: "reasoning" if kind == "judge" else "combined" if len(s.domains) > 1 else s.domains[0]
            for name, s in self.sources.items()
            if kind == "judge" or s.domains
        }
        return {name: Path(self.judge.prompts) / f"{prompt}.txt" for name, prompt in names.items()}


def load(arguments: Iterable[str]) -> CurationConfig:
    """From FILE.yaml and dotted overrides. Raises ConfigError with every mistake, also of missing files."""
    return load_root(CurationConfig, arguments, _cross_check, _check_whole)[0]


def _cross_check(fields: dict[str, Any], legal: bool) -> list[str]:
    """Mistakes between the fields that parsed."""
    sources, out = fields.get("sources"), list[str]()
    if sources is not None and not sources:
        out.append("sources: empty; name at least one")
    prefixes = dict[str, str]()
    for name, source in (sources or {}).items():
        path, domains = f"sources.{name}", source.domains
        if not source.text:
            out.append(f"{path}.text: empty; name at least one input")
        if (first := prefixes.setdefault(os.path.realpath(source.prefix), name)) != name:
            out.append(f"{path}.prefix={source.prefix} is that of {first}, too; a source has its own pair")
        wrong = name_mistakes(dict.fromkeys(domains), RESERVED)
        out += [f"{path}.domains: {domain}: {why}" for domain, why in wrong.items()]
        twice = [domain for domain, times in Counter(domains).items() if times > 1]
        out += [f"{path}.domains: {domain} stands there twice" for domain in twice]
    if legal and (pilot := fields.get("pilot", 1)) > (most := fields.get("most", pilot)):
        out.append(f"pilot={pilot} is above most={most}; raise most")
    return out


def _check_whole(config: CurationConfig) -> None:
    """Raise ConfigError for what only a whole configuration tells, and for files that are missing."""
    quality, out = config.quality, list[str]()
    for name, source in config.sources.items():
        if source.score and quality is None:
            out.append(
                f"sources.{name}.score is compared with quality.threshold, and quality is left out; "
                "add quality: {model: null, threshold: NUMBER}, or leave out the score"
            )
        if quality and quality.model is None and source.score is None:
            out.append(f"quality.model is null, and sources.{name} has no score; give one of the two")
    if quality and quality.labelled and (quality.label or quality.model is None):
        out.append("quality.labelled trains a head on the embeddings of quality.model, without a label")
    items, language = config.decontamination, quality.language if quality else None
    if items and not (items.items or items.gold):
        out.append("decontamination names neither items nor gold; name some, or leave the section out")
    if language:
        known = sorted(code for code, _ in require("py3langid", "quality.language").rank(""))
        if language not in known:
            out.append(f"quality.language={language} is none of {', '.join(known)}")
    # os.path's answers are no errors, however long the name.
    missing = [path for path in config.files() if not os.path.isfile(path)]
    out += [f"{path}: no such file{suggest_path(path)}" for path in missing]
    for path in (path for path in config.prompt_files() if path not in missing):
        with rewording(lambda error: f"{path} is not UTF-8: {error}", UnicodeDecodeError):  # noqa: B023
            times = path.read_text().count("{document}")
        if times != 1:
            out.append(f"{path} has {{document}} {times} times; it stands once, where the text goes")
    if out:
        raise ConfigError(out)
