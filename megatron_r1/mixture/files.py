"""A mixture as a table, and as the files that the trainer and the report read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config import Config, MixConfig
from megatron_r1.influence.store import Scored, hashes_of
from megatron_r1.mixture.masks import mask_files
from megatron_r1.mixture.mixture import Mixture
from megatron_r1.run.stage import finish
from megatron_r1.system.files import replacing, sha256, write_json, write_text
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
    lines.append(
        "predicted gain per token, first order (least: the worst capability's share of its own best)"
    )
    for name, weight_G in mixes.items():
        gain_C, least = mixture.gains(weight_G), mixture.least_share(weight_G)
        values = _numbers([*gain_C, gain_C @ mixture.alpha_CK.sum(1)])
        share = "" if math.isnan(least) else f"{least:6.1%}"
        space = " " * (8 if mixture.masks else 0)
        lines.append(f"{name:{width}s}  least   {share:>6s}{space}  {values}")
    for mask in mixture.masks.values():
        lines.append(
            f"keep {mask.corpus.name}: {mask.helpful} of {mask.scored} scored examples help at step "
            f"{mixture.steps[-1]}; {mask.share:.1%} of its windows may be drawn"
        )
    return "\n".join(lines)


def _numbers(values: list[Any]) -> str:
    return "  ".join(f"{value:11.4g}" for value in values)


def write(mixture: Mixture, used: list[Scored], config: Config, output: Path) -> None:
    """Write the phase for the trainer, a .json beside it that explains the phase, and the masks in `keep/`.

    The phase is written last, after all files that it names. Then the run's ledger gets a line. Raises
    ValueError for an `output` that the .json would replace.
    """
    mix, beside, masks = config.mix, output.with_suffix(".json"), mixture.masks
    assert mix is not None
    if output == beside:
        raise ValueError(f"--output {output}: name a .yaml file; the .json beside it is written too")
    files = mask_files(masks, output.parent / "keep", config.data.seq_length)
    phase: dict[str, Any] = {"weights": {name: round(weight, 9) for name, weight in mixture.weights.items()}}
    if mix.max_epochs is not None:
        phase["max_epochs"] = mixture.max_epochs
    if files:
        phase["keep"] = {name: str(path) for name, (path, _) in files.items()}
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
        "scores": {
            _name(s, mix): {
                "scores_sha256": hashes[str(s.directory)],
                **{k: s.manifest.get(k) for k in _IDENTITIES},
            }
            for s in used
        },
    }
    for path, content in files.values():
        # An earlier phase may refer to the same file.
        if not path.is_file() or path.read_bytes() != content:
            with replacing(path) as stream:
                stream.write(content)
    write_json(beside, report)
    head = f"# From influence at steps {list(mixture.steps)}; {beside.name} says what is behind it.\n"
    tree = {"phases": {mixture.phase: phase}}
    write_text(output, head + format_yaml(tree, allow_unicode=True))
    outputs = {str(path): sha256(path) for path in (output, beside, *(path for path, _ in files.values()))}
    finish(Path(config.train.run), f"mix {mixture.phase}", inputs=hashes, outputs=outputs)


def _name(part: Scored, mix: MixConfig) -> str:
    """STEP/SOURCE, or the whole path where there are several runs."""
    return str(part.directory) if mix.runs else f"{part.directory.parent.name}/{part.directory.name}"
