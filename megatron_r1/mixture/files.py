"""A mixture as a table, and as the files that the trainer and the report read."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.checkpoint.files import complete_checkpoints
from megatron_r1.config import Config, MixConfig
from megatron_r1.influence.store import Scored, hashes_of
from megatron_r1.mixture.masks import mask_files
from megatron_r1.mixture.mixture import Mixture
from megatron_r1.run.layout import RunDir
from megatron_r1.run.stage import finish
from megatron_r1.system.files import json_bytes, on_disk, remove_if_empty, replacing, sha256
from megatron_r1.system.yaml_io import format_yaml

_IDENTITIES = ("format", "weights", "data")
"""Entries of a score manifest that identify the checkpoint and the dataset."""


def table(mixture: Mixture) -> str:
    """Sources by rho: weight, epochs, share that masks keep, rho of each capability and their mean.

    Below, in the same columns, the predicted gain of this mixture and its rivals for each capability.
    """
    mixes = {"this mixture": np.array(list(mixture.weights.values())), **mixture.rivals}
    width = max(len(name) for name in (*mixture.sources, *mixes, "source"))
    kept = f"  {'kept':>6s}" if mixture.masks else ""
    columns = "  ".join(f"{c[:11]:>11s}" for c in (*mixture.capabilities, "together"))
    lines = [
        f"phase {mixture.phase}, from influence at steps {list(mixture.steps)} (rho per capability, Eq. 5)",
        f"{'source':{width}s}  weight  epochs{kept}  {columns}",
    ]
    order = sorted(range(len(mixture.sources)), key=lambda g: (-mixture.rho_G[g], g))
    for g in order:
        name = mixture.sources[g]
        values = _numbers([*mixture.rho_GC[g], mixture.rho_G[g]])
        weight, epochs = mixture.weights[name], mixture.epochs[name]
        share = f"  {mixture.masks[name].share:6.1%}" if mixture.masks else ""
        lines.append(f"{name:{width}s}  {weight:6.1%}  {epochs:6.2f}{share}  {values}")
    least_of = "the worst capability's share of its own best"
    lines.append(f"predicted gain per token, first order (least: {least_of})")
    for name, weight_G in mixes.items():
        gain_C, least = mixture.gains(weight_G), mixture.least_share(weight_G)
        values = _numbers([*gain_C, gain_C @ mixture.alpha_CK.sum(1)])
        share = "" if math.isnan(least) else f"{least:6.1%}"
        space = " " * (8 if mixture.masks else 0)
        lines.append(f"{name:{width}s}  least   {share:>6s}{space}  {values}")
    lines += [
        f"keep {mask.corpus.name}: {mask.helpful} of {mask.scored} scored examples help at step "
        f"{mixture.steps[-1]}; {mask.share:.1%} of its windows may be drawn"
        for mask in mixture.masks.values()
    ]
    return "\n".join(lines)


def _numbers(values: list[Any]) -> str:
    return "  ".join(f"{value:11.4g}" for value in values)


def write(mixture: Mixture, used: list[Scored], config: Config, output: Path) -> None:
    """Write the phase for the trainer, a .json beside it that explains the phase, and the masks in `keep/`.

    The phase is written last, after all files that it names, and an error leaves none of them. Then the run's
    ledger gets a line. Raises ValueError for an `output` that the .json would replace, and for a phase that
    the run has trained.
    """
    mix, beside, masks = config.mix, output.with_suffix(".json"), mixture.masks
    assert mix is not None
    if output == beside:
        raise ValueError(f"--output {output}: name a .yaml file; the .json beside it is written too")
    files = mask_files(masks, output.parent / "keep", config.data.seq_length)
    phase: dict[str, Any] = {"weights": {name: round(weight, 9) for name, weight in mixture.weights.items()}}
    phase |= {} if mix.max_epochs is None else {"max_epochs": mixture.max_epochs}
    phase |= {"keep": {name: str(path) for name, (path, _) in files.items()}} if files else {}
    hashes = hashes_of(s.directory for s in used)
    report: dict[str, Any] = {
        "phase": mixture.phase,
        "mix": dataclasses.asdict(mix),
        "steps": list(mixture.steps),
        "capabilities": list(mixture.capabilities),
        "alpha": mixture.alpha_CK.tolist(),
        "sources": {
            name: {
                "weight": mixture.weights[name],
                "rho": float(mixture.rho_G[g]),
                "rho_by_capability": dict(zip(mixture.capabilities, mixture.rho_GC[g].tolist(), strict=True)),
                "epochs": mixture.epochs[name],
                **({"kept": masks[name].share, "helpful": masks[name].helpful} if masks else {}),
            }
            for g, name in enumerate(mixture.sources)
        },
        "scores": {_name(s, mix): {"scores_sha256": hashes[str(s.directory)]} for s in used},
    }
    for s in used:
        report["scores"][_name(s, mix)] |= {key: s.manifest.get(key) for key in _IDENTITIES}
    head = f"# From influence at steps {list(mixture.steps)}; {beside.name} says what is behind it.\n"
    text = (head + format_yaml({"phases": {mixture.phase: phase}}, allow_unicode=True)).encode()
    _check_untrained(config, mixture.phase, output, text)
    made: list[Path] = []
    try:
        for path, content in files.values():
            # An earlier phase may refer to the same file.
            if not _holds(path, content):
                made += [] if os.path.lexists(path) else [path]
                with replacing(path) as stream:
                    stream.write(content)
        # Both are on disk before the first has its name.
        with replacing(output) as last:
            last.write(text)
            on_disk(last)
            with replacing(beside) as stream:
                stream.write(json_bytes(report))
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        remove_if_empty(output.parent / "keep")
        raise
    outputs = {str(path): sha256(path) for path in (output, beside, *(path for path, _ in files.values()))}
    finish(Path(config.train.run), f"mix {mixture.phase}", inputs=hashes, outputs=outputs)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _check_untrained(config: Config, phase: str, output: Path, text: bytes) -> None:
    """Raise ValueError where train.run has trained a part of the phase, and by another file than this."""
    names, run = list(config.phases), RunDir(Path(config.train.run))
    start = sum(map(config.phase_steps, names[: names.index(phase)]))
    trained = max((ref.step for ref in complete_checkpoints(run.checkpoints)), default=0)
    if trained > start and not _holds(output, text):
        raise ValueError(
            f"mix.phase={phase} begins at step {start}, and {config.train.run} is trained to step {trained}: "
            f"it goes on only with what that phase began with. Weigh a later phase; or name a new train.run, "
            f"and in mix.runs this one, by capability"
        )


def _name(part: Scored, mix: MixConfig) -> str:
    """STEP/SOURCE, or the whole path where there are several runs."""
    return str(part.directory) if mix.runs else f"{part.directory.parent.name}/{part.directory.name}"
