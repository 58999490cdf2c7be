"""Hierarchical rejection sampling (section 2.1.1): the order of the stages, and what each of them keeps.

    sample      a random part of each source, as large as the pilot's pass rate asks for (sample.py)
    quality     a score above the threshold; of too few such documents, the best `needed`
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
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.curation.outputs import Outcome, record, write
from megatron_r1.curation.request import CurationConfig
from megatron_r1.curation.sample import Source, draw
from megatron_r1.curation.work import ID, Documents, Job, Pending, key_of, score, scores
from megatron_r1.data.indexed import identity_of
from megatron_r1.preprocess.documents import identity, open_inputs
from megatron_r1.run.stage import answered, read, standing
from megatron_r1.system.errors import rewording
from megatron_r1.system.files import sha256, write_json
from megatron_r1.system.json_io import parse_json
from megatron_r1.system.process import RunLock, launch_number
from megatron_r1.system.terminal import say

FORMAT = 1
Make = Callable[[str], Any]
"""Kind of a job -> its model (`models.Scorer`, for "judge" and "domain" `ask_llm.Judge`)."""


def advance(config: CurationConfig, make: Make, workers: int = 1) -> Outcome:
    """Go through the stages. Raises Pending where scores are missing, ValueError as the stages do."""
    work = Path(config.output) / "work"
    out = Outcome(_sample(config, make, work, workers), {})
    for kind in ("judge", "domain") if config.judge else ():
        _ask(config, make, work, kind, out.sources)
    if config.decontamination:
        _decontaminate(config, out)
    _drop_duplicates(config, make, work, out)
    for name, source in out.sources.items():
        best = source.ranked(source.left)[: config.documents]
        source.keep("documents", best, source.score_N)
        out.chosen[name] = best
    return out


def _sample(config: CurationConfig, make: Make, work: Path, workers: int) -> dict[str, Source]:
    """Sample and quality, in two rounds: the pilot, and the rest, as large as its pass rate asks for."""
    quality, needed, names = config.quality, config.needed(), list(config.sources)
    first = min(config.pilot if quality else needed, config.most)
    pilots = {name: draw(name, config, work, first, workers=workers) for name in names}
    rounds = {name: [pilot] for name, pilot in pilots.items()}
    found = {name: [values] for name, values in _qualities(config, make, work, pilots).items()}
    more = {}
    for name, pilot in pilots.items():
        passed = int((found[name][0] > quality.threshold).sum()) if quality else len(pilot)
        size, rate = len(pilot), passed / max(1, len(pilot))
        # Two standard deviations below what the pilot says: too few at the threshold would lower it.
        rate -= 2 * math.sqrt(rate * (1 - rate) / max(1, size))
        want = min(config.most - size, math.ceil((needed - passed) / max(rate, 1e-9)))
        if want > 0 and pilot.facts["share"] < 1:
            more[name] = draw(name, config, work, want, pilot, workers)
            rounds[name].append(more[name])
    for name, values in _qualities(config, make, work, more).items():
        found[name].append(values)
    sources = {name: Source.of(name, rounds[name]) for name in names}
    for name, source in sources.items() if quality else ():
        assert quality is not None
        source.scores["quality"] = score_N = np.concatenate(found[name])
        passed_M = np.flatnonzero(score_N > quality.threshold)
        fallback = len(passed_M) < needed and len(passed_M) < len(score_N)
        kept = source.ranked(source.left)[:needed] if fallback else passed_M
        reached = float(score_N[kept].min()) if fallback else quality.threshold
        source.keep("quality", kept, score_N, threshold=reached, fallback=fallback)
    return sources


def _qualities(
    config: CurationConfig, make: Make, work: Path, files: dict[str, Documents]
) -> dict[str, np.ndarray]:
    if config.quality is None:
        return {name: np.zeros(len(file), np.float32) for name, file in files.items()}
    own = {name: file for name, file in files.items() if config.sources[name].score}
    jobs = [
        Job.of("quality", name, file.path, work, make("quality").identity)
        for name, file in files.items()
        if name not in own
    ]
    out = {name: file.column("score", np.float32) for name, file in own.items()}
    return out | scores(jobs)


def _ask(config: CurationConfig, make: Make, work: Path, kind: str, sources: dict[str, Source]) -> None:
    assert config.judge is not None
    prompts, share = config.prompts(kind), config.judge.keep if kind == "judge" else config.judge.domain_keep
    jobs = [
        Job.of(kind, name, sources[name].file(work), work, make(kind).identity, prompt.read_text())
        for name, prompt in prompts.items()
    ]
    for name, values in scores(jobs).items():
        source = sources[name]
        source.scores[kind][source.left] = values
        kept = source.ranked(source.left)[: math.ceil(share * len(source.left))]
        score_N = source.scores[kind]
        reached = float(score_N[kept].min()) if len(kept) else None
        source.keep(kind, kept, score_N, threshold=reached)


def _decontaminate(config: CurationConfig, out: Outcome) -> None:
    from megatron_r1.curation.decontaminate import Common, Items, Matcher

    assert config.decontamination is not None
    items = Items.read(config.decontamination.items, config.decontamination.gold)
    # Frequent n-grams are those of the sources, not of what the stages have chosen.
    beginnings = (row["text"] for s in out.sources.values() for row in s.rounds[0].read(0, "text"))
    matcher = Matcher(items, Common(items, beginnings))
    for source in out.sources.values():
        hit = np.zeros(len(source.left), bool)
        for found in matcher(row["text"] for row in source.rows(source.left, "text")):
            hit[found.document] = True
            about = {"source": source.name, "id": source.ids_N[source.left[found.document]].decode()}
            out.hits.append(about | {k: v for k, v in vars(found).items() if k != "document"})
        source.keep("items", source.left[~hit])
    out.facts["decontamination"] = {"items": items.identity, "hits": len(out.hits), **matcher.counts}


def _drop_duplicates(config: CurationConfig, make: Make, work: Path, out: Outcome) -> None:
    """Equal documents always, near and semantic duplicates as asked for."""
    from megatron_r1.curation.dedup import Pairs, calibrate, near_pairs, semantic_pairs

    asked = config.duplicates
    sources = [out.sources[name] for name in sorted(out.sources)]
    texts, ids = _in_order(sources)
    _, first_U, same_N = np.unique(ids, return_index=True, return_inverse=True)
    first_N = first_U[same_N]
    copy = np.flatnonzero(first_N != np.arange(len(ids)))
    found = {"exact": Pairs(first_N[copy], copy, np.ones(len(copy), np.float32))}
    if asked and asked.near is not None:
        found["near"] = near_pairs(texts, asked.near)
    _keep_first("near", sources, found, out)
    if asked is None or asked.semantic is None:
        return
    embed = make("embed")
    jobs = [Job.of("embed", s.name, s.file(work), work, embed.identity) for s in sources]
    embedded = scores(jobs, None)
    E_ND = np.concatenate(
        [embedded[s.name][np.searchsorted(s.left, s.ranked(s.left))] for s in sources if len(s.left)]
    )
    texts, _ = _in_order(sources)
    if (threshold := asked.threshold) is None:
        calibration = calibrate(embed, texts, config.seed)
        threshold, out.facts["calibration"] = calibration.threshold, vars(calibration)
    found = {"semantic": semantic_pairs(E_ND, threshold)}
    _keep_first("semantic", sources, found, out, threshold)


def _in_order(sources: list[Source]) -> tuple[list[str], np.ndarray]:
    """Texts and ids of what is left, by source and score."""
    texts, ids = list[str](), [np.zeros(0, ID)]
    for source in sources:
        of = {row["id"].encode(): row["text"] for row in source.rows(source.left, "id", "text")}
        ids.append(source.ids_N[source.ranked(source.left)])
        texts += [of[one] for one in ids[-1]]
    return texts, np.concatenate(ids)


def _keep_first(
    stage: str, sources: list[Source], found: dict[str, Any], out: Outcome, threshold: float | None = None
) -> None:
    """Leave the first of each group that pairs of the documents, as of `_in_order`, join."""
    from megatron_r1.curation.dedup import first_of_each

    ids = np.concatenate([np.zeros(0, ID), *(s.ids_N[s.ranked(s.left)] for s in sources)])
    kept_N = first_of_each(len(ids), *found.values())
    names = np.repeat([s.name for s in sources], [len(s.left) for s in sources])
    for kind, pairs in found.items():
        for i, j, likeness in zip(pairs.first_P, pairs.second_P, pairs.likeness_P.tolist(), strict=True):
            ends = {"first": ids[i].decode(), "second": ids[j].decode()}
            of = {"first_source": str(names[i]), "second_source": str(names[j])}
            out.pairs.append({"kind": kind, **of, **ends, "likeness": likeness})
        out.facts.setdefault("pairs", {})[kind] = len(pairs.first_P)
    first = 0
    for source in sources:
        ranked = source.ranked(source.left)
        source.keep(stage, ranked[kept_N[first : first + len(ranked)]], threshold=threshold)
        first += len(ranked)


def load_model(config: CurationConfig, kind: str) -> Any:
    """The model of a kind of job. Its weights are read when they are first needed."""
    if kind == "quality":
        from megatron_r1.curation.quality import Classifier, Head

        quality = config.quality
        assert quality is not None and quality.model is not None
        if quality.labelled:
            return Head(quality.model, Path(quality.labelled), quality.tokens)
        return Classifier(quality.model, quality.tokens, quality.label)
    if kind == "embed":
        from megatron_r1.curation.models import Embedder

        assert config.duplicates is not None and config.duplicates.semantic is not None
        return Embedder(config.duplicates.semantic)
    from megatron_r1.curation.ask_llm import Judge

    assert config.judge is not None
    return Judge(config.judge.model, config.judge.tokens)


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
    folder = Path(config.output)

    @cache
    def model(kind: str) -> Any:
        return model("judge") if kind == "domain" else make(config, kind)

    waiting, asked = folder / "work" / "waiting.json", key_of(config=dataclasses.asdict(config))
    if share is not None:
        said = read(waiting) or {}
        if said.get("config") != asked:
            what = "of another FILE.yaml" if said else "not there"
            raise ValueError(
                f"{waiting} is {what}: run with --merge first, which prepares a stage for shards"
            )
        jobs = [Job(**job) for job in said["jobs"]]
        score(jobs, model, share)
        done, of = Pending(jobs).chunks()
        log(
            f"{Pending(jobs)}: {done} of {of} chunks are scored"
            + ("; run with --merge" if done == of else "")
        )
        return None
    rank, ranks = launch_number("RANK", 0), launch_number("WORLD_SIZE", 1)
    manifest: dict[str, Any] | None = None
    with _meeting(rank, ranks) as meet:
        lock = RunLock(folder / "work") if rank == 0 else None
        if lock:
            lock.take()
        while True:
            jobs = []
            if rank == 0:
                try:
                    manifest = _finish(config, model, workers, overwrite, log)
                except Pending as pending:
                    jobs = pending.jobs
                    write_json(waiting, {"config": asked, "jobs": [vars(job) for job in jobs]})
                    if merge:
                        log(f"{pending}: {pending.chunks()[1]} chunks; run --shard I/N for all, then --merge")
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
    folder, path = Path(config.output), Path(config.output) / "manifest.json"
    kinds = {
        "quality": config.quality and any(s.score is None for s in config.sources.values()),
        "judge": config.judge,
        "embed": config.duplicates and config.duplicates.semantic,
    }
    models = {kind: str(model(kind).identity) for kind, is_used in kinds.items() if is_used}
    request = {**request_of(config), "models": models}
    theirs = (read(path) or {}).get("request") if path.exists() else None
    if path.exists() and not overwrite:
        way_out = "name another output, or replace the results with --overwrite"
        if not isinstance(theirs, dict):
            raise ValueError(f"{path} is damaged, or another tool's; {way_out}")
        standing(theirs, request, lambda: True, f"{path} is of another request", way_out)
    manifest = answered(path, request)
    parts = (manifest or {}).get("parts")
    if (
        manifest
        and isinstance(parts, dict)
        and all(
            (folder / name).is_file() and sha256(folder / name) == digest for name, digest in parts.items()
        )
    ):
        log(f"already done: {path}")
        record(folder, manifest)
        return manifest
    return write(config, advance(config, model, workers), request, models)


def request_of(config: CurationConfig) -> dict[str, Any]:
    """All that decides the results, but the models' files."""
    named = [*config.prompts("judge").values(), *config.prompts("domain").values()]
    named += [Path(config.quality.labelled)] if config.quality and config.quality.labelled else []
    named += map(Path, config.decontamination.items.values() if config.decontamination else ())
    inputs = {name: [identity(one) for one in open_inputs(s.text)] for name, s in config.sources.items()}
    return {
        "format": FORMAT,
        "curation": {k: v for k, v in dataclasses.asdict(config).items() if k != "output"},
        "inputs": inputs,
        "pairs": {source.prefix: identity_of(source.prefix) for source in config.sources.values()},
        "files": {str(path): sha256(path) for path in named},
    }


@contextmanager
def _meeting(rank: int, ranks: int) -> Iterator[Callable[[Any], Any]]:
    """Where the ranks of a launch meet: a function that gives every rank the first rank's value.

    The first rank prepares for hours, so a store is what they wait at: a collective would time out.
    """
    if ranks == 1:
        yield lambda value: value
        return
    import torch.distributed as dist

    from megatron_r1 import backend
    from megatron_r1.parallel import launch_store

    backend.use_local_device(launch_number("LOCAL_RANK", 0), launch_number("LOCAL_WORLD_SIZE", 1))
    store, turns = launch_store(timedelta(days=30))[0], count()

    def meet(value: Any) -> Any:
        turn = next(turns)
        store.add(f"there/{turn}", 1)
        if rank:
            return parse_json(store.get(f"value/{turn}"), "a message between ranks")
        while store.add(f"there/{turn}", 0) < ranks:
            time.sleep(0.1)
        store.set(f"value/{turn}", json.dumps(value))
        return value

    with rewording(lambda error: f"the first rank has ended ({error!s:.200})", dist.DistError):
        yield meet
        # The first rank's process is the store.
        store.add("left", 1)
        while rank == 0 and store.add("left", 0) < ranks:
            time.sleep(0.1)
