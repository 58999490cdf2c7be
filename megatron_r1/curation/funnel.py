"""Hierarchical rejection sampling (section 2.1.1): the order of the stages, and what each of them keeps.

    sample      a random part of each source, as large as the pilot's pass rate asks for (sample.py)
    quality     a score above the threshold; of fewer than `needed`, the best `needed`
    judge       the best `judge.keep` of each source by the general prompt
    domain      the best `judge.domain_keep` by the prompt of the source's domain, or the combined one
    items       documents without evaluation items (decontaminate.py)
    near        the first of equal documents and near duplicates of all sources (dedup.py)
    semantic    the first of those that mean the same
    documents   the best `documents` of each source: R_g

"First" is by the source's name, then by score. Equal scores are in the order of the ids.

`advance` goes through all stages. Where scores of a model are missing it raises `work.Pending` with the jobs,
and starts over once they are there. All that took time is found on disk, so a launch that was killed goes on
in the same way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.curation.decontaminate import Items, Matcher
from megatron_r1.curation.outputs import STAGE, Outcome, Pair, open_pairs, write
from megatron_r1.curation.probes import record
from megatron_r1.curation.request import SLACK, CurationConfig, exact
from megatron_r1.curation.sample import Source, draw
from megatron_r1.curation.work import ID, Documents, Job, Pending, key_of, score, scores
from megatron_r1.data.indexed import identity_of
from megatron_r1.preprocess.documents import identity, open_inputs
from megatron_r1.run.stage import answered, read, standing
from megatron_r1.system.files import sha256, write_json
from megatron_r1.system.process import launch_number
from megatron_r1.system.terminal import say

FORMAT = 1
Make = Callable[[str], Any]
"""Kind of a job -> its model (of `models`, `quality`, `ask_llm`). "items" -> `decontaminate.Items`."""


def advance(config: CurationConfig, make: Make, workers: int = 1) -> Outcome:
    """Go through the stages. Raises Pending where scores are missing, ValueError as the stages do."""
    work = Path(config.output) / "work"
    pairs = open_pairs(config)
    out = Outcome(pairs, _sample(config, make, work, workers, pairs), {})
    for kind in ("judge", "domain") if config.judge else ():
        _ask(config, make, work, kind, out.sources)
    if config.decontamination:
        _decontaminate(make("items"), out)
    _drop_duplicates(config, make, work, out)
    for name, source in out.sources.items():
        best = source.ranked(source.left)[: config.documents]
        source.keep("documents", best, source.score_N)
        out.chosen[name] = best
    return out


def _sample(
    config: CurationConfig, make: Make, work: Path, workers: int, pairs: dict[str, Pair]
) -> dict[str, Source]:
    """Sample and quality, in two rounds: the pilot, and the rest, as large as its pass rate asks for."""
    quality, aim = config.quality, config.needed(SLACK)
    threshold = quality.threshold if quality else -math.inf
    want = dict.fromkeys(config.sources, min(config.pilot if quality else aim, config.most))
    rounds: dict[str, list[Documents]] = {name: [] for name in want}
    found: dict[str, list[np.ndarray]] = {name: [] for name in want}
    for _ in ("the pilot", "the rest"):
        new = {
            name: draw(name, config, work, n, next(iter(rounds[name]), None), workers)
            for name, n in want.items()
        }
        for name in new if not any(rounds.values()) else ():
            pairs[name].require(new[name])
        want = {}
        for name, values in _qualities(config, make, work, new).items():
            rounds[name].append(new[name])
            found[name].append(values)
            size, passed = len(values), int((values > threshold).sum())
            rate = passed / max(1, size)
            # Two standard deviations below what the pilot says: too few at the threshold would lower it.
            rate -= 2 * math.sqrt(rate * (1 - rate) / max(1, size))
            n = min(config.most - size, math.ceil((aim - passed) / max(rate, 1e-9)))
            if n > 0 and new[name].facts["share"] < 1:
                want[name] = n
    sources = {name: Source(name, of) for name, of in rounds.items()}
    for name, source in sources.items() if quality else ():
        source.scores["quality"] = score_N = np.concatenate(found[name])
        passed_M = np.flatnonzero(score_N > threshold)
        fallback = len(passed_M) < min(config.needed(), len(score_N))
        kept = source.ranked(source.left)[: config.needed()] if fallback else passed_M
        reached = float(score_N[kept].min()) if fallback else threshold
        source.keep("quality", kept, score_N, threshold=reached, fallback=fallback)
    return sources


def _qualities(
    config: CurationConfig, make: Make, work: Path, files: dict[str, Documents]
) -> dict[str, np.ndarray]:
    if config.quality is None:
        return {name: np.zeros(len(file), np.float32) for name, file in files.items()}
    own = {name: file for name, file in files.items() if config.sources[name].score}
    out = {name: file.column("score", np.float32) for name, file in own.items()}
    asked = {name: str(file.path) for name, file in files.items() if name not in own}
    jobs = [Job("quality", name, path, str(work), make("quality").identity) for name, path in asked.items()]
    return out | scores(jobs)


def _ask(config: CurationConfig, make: Make, work: Path, kind: str, sources: dict[str, Source]) -> None:
    assert config.judge is not None
    prompts, share = config.prompts(kind), config.judge.keep if kind == "judge" else config.judge.domain_keep
    jobs = [
        Job(kind, name, str(sources[name].file(work)), str(work), make(kind).identity, prompt.read_text())
        for name, prompt in prompts.items()
    ]
    for name, values in scores(jobs).items():
        source = sources[name]
        source.scores[kind][source.left] = values
        kept = source.ranked(source.left)[: math.ceil(exact(share) * len(source.left))]
        score_N = source.scores[kind]
        reached = float(score_N[kept].min()) if len(kept) else None
        source.keep(kind, kept, score_N, threshold=reached)


def _decontaminate(items: Items, out: Outcome) -> None:
    # Frequent n-grams are those of the sources, not of what the stages have chosen.
    beginnings = (row["text"] for s in out.sources.values() for row in s.rounds[0].read(0, "text"))
    matcher = Matcher(items, items.count(beginnings))
    for source in out.sources.values():
        hit = np.zeros(len(source.left), bool)
        for found in matcher(row["text"] for row in source.rows(source.left, "text")):
            hit[found.document] = True
            about = {"source": source.name, "id": source.ids_N[source.left[found.document]].decode()}
            out.hits.append(about | {k: v for k, v in vars(found).items() if k != "document"})
        source.keep("items", source.left[~hit])
    facts = {"items": items.identity, "hits": len(out.hits), **matcher.counts}
    out.facts["decontamination"] = {**facts, "left_out": matcher.passed_over()}


def _drop_duplicates(config: CurationConfig, make: Make, work: Path, out: Outcome) -> None:
    """Equal documents always, near and semantic duplicates as asked for."""
    from megatron_r1.curation.dedup import Pairs, calibrate, near_pairs, semantic_pairs

    asked = config.duplicates
    sources = [out.sources[name] for name in sorted(out.sources)]
    texts, ids = _in_order(sources)
    if not texts:
        raise ValueError(f"no document of {', '.join(out.sources)} is left for the sets; lower a threshold")
    _, first_U, same_N = np.unique(ids, return_index=True, return_inverse=True)
    first_N = first_U[same_N]
    copy = np.flatnonzero(first_N != np.arange(len(ids)))
    found = {"exact": Pairs(first_N[copy], copy, np.ones(len(copy), np.float32))}
    if asked and asked.near is not None:
        found["near"] = near_pairs(texts, asked.near)
    _keep_first("near", sources, ids, found, out)
    if asked is None or asked.semantic is None:
        return
    embed = make("embed")
    jobs = [Job("embed", s.name, str(s.file(work)), str(work), embed.identity) for s in sources]
    embedded = scores(jobs, None)
    E_ND = np.concatenate(
        [embedded[s.name][np.searchsorted(s.left, s.ranked(s.left))] for s in sources if len(s.left)]
    )
    texts, ids = _in_order(sources)
    if (threshold := asked.threshold) is None:
        calibration = calibrate(embed, texts, config.seed)
        threshold, out.facts["calibration"] = calibration.threshold, vars(calibration)
    found = {"semantic": semantic_pairs(E_ND, threshold)}
    _keep_first("semantic", sources, ids, found, out, threshold)


def _in_order(sources: list[Source]) -> tuple[list[str], np.ndarray]:
    """Texts and ids of what is left, by source and score."""
    texts, ids = list[str](), [np.zeros(0, ID)]
    for source in sources:
        of = {row["id"].encode(): row["text"] for row in source.rows(source.left, "id", "text")}
        ids.append(source.ids_N[source.ranked(source.left)])
        texts += [of[one] for one in ids[-1]]
    return texts, np.concatenate(ids)


def _keep_first(
    stage: str,
    sources: list[Source],
    ids: np.ndarray,
    found: dict[str, Any],
    out: Outcome,
    threshold: float | None = None,
) -> None:
    """Leave the first of each group that pairs of the documents, as of `_in_order`, join."""
    from megatron_r1.curation.dedup import first_of_each

    kept_N = first_of_each(len(ids), *found.values())
    names = np.repeat([s.name for s in sources], [len(s.left) for s in sources])
    for kind, pairs in found.items():
        for i, j, likeness in zip(pairs.first_P, pairs.second_P, pairs.likeness_P.tolist(), strict=True):
            ends = {"first": ids[i].decode(), "second": ids[j].decode()}
            of = {"first_source": str(names[i]), "second_source": str(names[j])}
            out.alike.append({"kind": kind, **of, **ends, "likeness": likeness})
        out.facts.setdefault("pairs", {})[kind] = len(pairs.first_P)
    for source in sources:
        ranked = source.ranked(source.left)
        source.keep(stage, ranked[kept_N[: len(ranked)]], threshold=threshold)
        kept_N = kept_N[len(ranked) :]


def read_items(config: CurationConfig) -> Items | None:
    """The evaluation items that no document may hold. Raises as `Items.read`."""
    asked = config.decontamination
    return Items.read(asked.items, asked.gold) if asked else None


def load_model(config: CurationConfig, kind: str) -> Any:
    """The model of a kind of job. Its weights are read when they are first needed."""
    from megatron_r1.curation import ask_llm, models, quality

    if kind == "judge" and (asked := config.judge):
        judge = ask_llm.Judge(asked.model, asked.tokens)
        for path in {*config.prompts("judge").values(), *config.prompts("domain").values()}:
            # A prompt that has no place, or a label that is no token, is told before any model has worked.
            judge.asked(path.read_text())
        return judge
    if kind == "embed" and (same := config.duplicates) and same.semantic:
        return models.Embedder(same.semantic, same.tokens)
    asked_of = config.quality
    assert asked_of is not None and asked_of.model is not None
    if asked_of.labelled:
        return quality.Head(asked_of.model, Path(asked_of.labelled), asked_of.tokens)
    return quality.Classifier(asked_of.model, asked_of.tokens, asked_of.label)


def curate(
    config: CurationConfig,
    *,
    workers: int = 1,
    share: tuple[int, int] | None = None,
    merge: bool = False,
    overwrite: bool = False,
    make: Callable[[CurationConfig, str], Any] = load_model,
    log: Callable[[str], None] = say,
) -> dict[str, Any] | None:
    """Go through the funnel, and write the results. Returns the manifest, None where work is left.

    Alone, or on the ranks of a torchrun, all is done. `share` (i, n): score chunks i, i + n, ... of the stage
    that waits for it, and return. `merge`: go on from the scores of such shards to the next stage that needs
    some. Every file is the same in either way, and a launch that was killed goes on where it was.

    Raises ValueError as the stages do, for results of another request without `overwrite`, and for shards
    before the first `merge`.
    """
    work = Path(config.output) / "work"
    waiting, asked = work / "waiting.json", key_of(config=dataclasses.asdict(config))

    @cache
    def model(kind: str) -> Any:
        if kind == "items":
            return read_items(config)
        return model("judge") if kind == "domain" else make(config, kind)

    if share is not None:
        if (prepared := read(waiting) or {}).get("config") != asked:
            what = "is of another FILE.yaml" if prepared else "is not there"
            raise ValueError(f"{waiting} {what}: run with --merge first, which prepares a stage for shards")
        left = Pending([Job(**job) for job in prepared["jobs"]])
        score(left.jobs, model, share)
        done, of = left.chunks()
        log(f"{left}: {done} of {of} chunks are scored{'' if done < of else '; run with --merge'}")
        return None
    # It imports torch.
    from megatron_r1.parallel import meeting

    rank, ranks = launch_number("RANK", 0), launch_number("WORLD_SIZE", 1)
    if merge and ranks > 1:
        raise ValueError("--merge goes with --shard; ranks of one launch go through all stages without it")
    with meeting(work, rank, ranks) as meet:
        while True:
            manifest, jobs = None, list[Job]()
            try:
                manifest = None if rank else _finish(config, model, workers, overwrite, log)
            except Pending as pending:
                jobs = pending.jobs
                write_json(waiting, {"config": asked, "jobs": [vars(job) for job in jobs]})
                if merge:
                    done, of = pending.chunks()
                    log(f"{pending}: {done} of {of} chunks are scored; run all --shard I/N, then --merge")
                    return None
            jobs = [Job(**job) for job in meet([vars(job) for job in jobs])]
            if not jobs:
                return manifest
            score(jobs, model, (rank, ranks), rank == 0)
            meet(None)


def _finish(
    config: CurationConfig, model: Make, workers: int, overwrite: bool, log: Callable[[str], None]
) -> dict[str, Any]:
    """The manifest: that which is there, or a new one. Raises Pending where scores are missing."""
    path = Path(config.output) / "manifest.json"
    request = _request(config, model)
    if path.exists() and not overwrite:
        way_out = "name another output, or replace the results with --overwrite"
        theirs = (read(path) or {}).get("request")
        if not isinstance(theirs, dict):
            raise ValueError(f"{path} is damaged, or another tool's; {way_out}")
        standing(theirs, request, lambda: True, f"{path} is of another request", way_out)
    if (manifest := answered(path, request)) is not None:
        log(f"already done: {path}")
        record(manifest, path.parent, STAGE, request["pairs"])
        return manifest
    return write(config, advance(config, model, workers), request)


def _request(config: CurationConfig, model: Make) -> dict[str, Any]:
    """All that decides the results."""
    inputs = {name: open_inputs(source.text) for name, source in config.sources.items()}
    return {
        "format": FORMAT,
        "curation": {k: v for k, v in dataclasses.asdict(config).items() if k != "output"},
        "inputs": {name: [identity(one) for one in of] for name, of in inputs.items()},
        "pairs": {source.prefix: identity_of(source.prefix) for source in config.sources.values()},
        "files": {str(path): sha256(path) for path in config.files()},
        "models": {kind: str(model(kind).identity) for kind in config.models()},
        # Read here, so that a package that is missing is told before any model has worked.
        "items": model("items").identity if config.decontamination else None,
    }
