"""Scores for other directions from stored projections (`projected`), without a pass over the examples.

Only a new capability's probing set passes through the model, at each checkpoint. Its direction is projected
as the examples' gradients were, and multiplied with projections.npy. The answers are scores in a directory of
their own, OUTPUT/influence/step_N/SOURCE/, in the store's format.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_r1.config import Config
from megatron_r1.influence.directions import CheckpointDirections, Launch, launch_note, record_left
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.methods import METHODS, Method
from megatron_r1.influence.plan import Job, Part
from megatron_r1.influence.score import open_job, rows_left
from megatron_r1.influence.store import (
    ScoreStore,
    check_inputs,
    directory_of,
    fingerprint,
    read_arrays,
    read_manifest,
)
from megatron_r1.parallel import holding, process_groups
from megatron_r1.records import CheckpointRef
from megatron_r1.run.layout import RunDir
from megatron_r1.system.process import exit_when_orphaned
from megatron_r1.system.terminal import is_first_rank

_ROWS = 256
"""Examples whose projections are in memory at a time."""


def open_query(config: Config, output: Path, capabilities: Sequence[str] | None = None) -> Job:
    """The work of scoring for `capabilities` (default: all of influence.directions) by a run's projections.

    Raises ValueError where projections are missing or of other inputs, and where `output` is a run or holds
    other answers.
    """
    if RunDir(output).config.exists() or RunDir(output).checkpoints.exists():
        raise ValueError(f"--output {output} is a training run; name a directory for the answers alone")
    if influence := config.influence:
        if influence.method != "projected":
            raise ValueError(f"influence.method={influence.method} stores no projections; use projected")
        known = influence.directions
        if unknown := [name for name in capabilities or () if name not in known]:
            raise ValueError(
                f"--capabilities {unknown}: not in influence.directions, which has {list(known)}"
            )
        asked = {name: known[name] for name in capabilities or known}
        config = dataclasses.replace(config, influence=dataclasses.replace(influence, directions=asked))
    job = open_job(config)
    parts = {step: [_answers(part, output) for part in scored] for step, scored in job.parts.items()}
    return dataclasses.replace(job, parts=parts)


def query_influence(job: Job, output: Path) -> None:
    """Write the missing answers of an `open_query`. Every rank of the launch calls this, in any layout."""
    killed = any(launch_note(job, ref).is_file() for ref in job.refs)
    if not killed and not any(part.left() for part in job.all_parts()):
        if is_first_rank():
            print(f"{output}: asked before, steps {job.work.steps}", flush=True)
        return
    exit_when_orphaned()
    with process_groups(job.work.config.parallel) as context, holding(RunDir(output).influence, context):
        engine = Engine.build(job.work.config, job.work.data.eod, context)
        for ref in job.refs if context.leads else ():
            record_left(job, ref)
        for ref in job.refs:
            if rows_left(job.parts[ref.step]):
                _ask(job, engine, ref)
        context.announce(f"{output}: {', '.join(job.work.influence.directions)}, steps {job.work.steps}")


def _answers(part: Part, output: Path) -> Part:
    """The part of the answers to a part with projections.

    Raises ValueError where the projections are incomplete or of other inputs, and where other answers are
    in the answers' directory.
    """
    projected = part.directory
    if (theirs := read_manifest(projected)) is not None:
        # Projections do not depend on the directions that were scored at first.
        same = part.inputs | {key: theirs[key] for key in ("capabilities", "directions")}
        check_inputs(projected, same, "score in another train.run with influence.method=projected")
    if part.left() or not (projected / "projections.npy").is_file():
        raise ValueError(
            f"{projected} holds no complete projections; score with influence.method=projected first, or let "
            f"influence.steps name the checkpoints that have them"
        )
    kept = fingerprint(projected / "projections.npy")
    inputs = {**part.inputs, "projections": kept, "projected_in": str(projected)}
    directory = directory_of(output, part.step, part.corpus.name)
    check_inputs(directory, inputs, "name another --output")
    return dataclasses.replace(part, directory=directory, inputs=inputs)


def _ask(job: Job, engine: Engine, ref: CheckpointRef) -> None:
    """Every source at one checkpoint."""
    began = time.time()
    launch = Launch("influence query", job, ref, engine.context, began)
    at = CheckpointDirections(engine, job, ref, launch)
    method = METHODS[job.work.influence.method](at.directions, engine)
    if engine.context.leads:
        for part in job.parts[ref.step]:
            _write(part, at.norms, method)
    at.finish()


def _write(part: Part, direction_norms: dict[str, float], method: Method) -> None:
    """Projections times directions, in float64 as the first scores."""
    projected, names = Path(part.inputs["projected_in"]), ("projections", "losses", "tokens")
    stored = read_arrays(projected, read_manifest(projected) or {}, names)
    if stored["projections"].shape[1] != method.width:
        raise ValueError(f"{projected / 'projections.npy'} is damaged (its shape); score {projected} again")
    shapes = {"scores": (len(direction_norms),), "losses": ()}
    inputs = {**part.inputs, "direction_norms": direction_norms}
    store = ScoreStore(part.directory, inputs, part.example_N, stored["tokens"], shapes)
    for first in range(0, len(part.example_N), _ROWS):
        row_NP = torch.from_numpy(stored["projections"][first : first + _ROWS].astype(np.float64))
        scores = method.results(row_NP)["scores"].float().numpy()
        if not np.isfinite(scores).all():
            raise ValueError(f"{projected / 'projections.npy'} is not finite; score {projected} again")
        store.write(first, {"scores": scores, "losses": stored["losses"][first : first + _ROWS]})
