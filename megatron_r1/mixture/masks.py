"""Keep masks from scores (Eq. 6), as files that the data plan reads. No torch.

    D_t = { x : I(x; theta_t) > 0 },    I(x; theta_t) = sum_c alpha_c score_c(x; theta_t)

theta_t is the current model: the last of the scored checkpoints. Eq. 6 drops examples that are known not to
help. Examples that were not scored are kept by default. `mix.keep_unscored: false` drops them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config import MixConfig
from megatron_r1.data.keep import kept_stretches, kept_windows, load_mask, mask_file, require_made_for
from megatron_r1.influence.store import Scored, dataset_identity
from megatron_r1.mixture.weights import checkpoint_weights, scale_of
from megatron_r1.records import Corpus, ScoreTable


@dataclass(frozen=True)
class KeepMask:
    """Windows of one source that may still be drawn."""

    corpus: Corpus
    scored: int
    helpful: int
    """Scored examples above the threshold."""
    windows: np.ndarray
    """bool [windows]."""
    stretch_N2: np.ndarray | None
    """Tokens whose labels count, of a mask over documents (data/keep.py)."""

    @property
    def share(self) -> float:
        """Share of the source's windows that may be drawn."""
        return float(self.windows.mean())


def joint_scores(tables: Sequence[ScoreTable], mix: MixConfig) -> list[np.ndarray]:
    """I(x; theta_t) of every table's examples at its last checkpoint, float64 [N] each.

    `mix.scale: zscore` divides a capability's scores by their spread. Their zero stays, so that a score keeps
    its sign.
    """
    weight_C = checkpoint_weights(mix, tables[0].capabilities, tables[0].steps).sum(1)
    _, scale_CK = scale_of(tables, mix)
    return [(t.score_NCK[:, :, -1] / scale_CK[:, -1]) @ weight_C for t in tables]


def make_masks(
    tables: Sequence[ScoreTable],
    used: Sequence[Scored],
    corpora: Sequence[Corpus],
    mix: MixConfig,
    seq_length: int,
    before: Mapping[str, str],
) -> dict[str, KeepMask]:
    """Source -> its mask. `before`: masks that the phase names already. All that they drop stays dropped.

    Raises ValueError for scores of other windows or data, and where no example helps any more.
    """
    latest = {s.manifest["source"]: s.manifest for s in used if s.step == tables[0].steps[-1]}
    by_name = {corpus.name: corpus for corpus in corpora}
    masks = {}
    for table, joint_N in zip(tables, joint_scores(tables, mix), strict=True):
        corpus, manifest = by_name[table.source], latest[table.source]
        unit = manifest.get("influence", {}).get("unit", "window")
        _check(corpus, manifest, unit, seq_length)
        total = corpus.documents if unit == "document" else corpus.windows(seq_length)
        if len(table.example_N) and table.example_N.max() >= total:
            raise ValueError(f"scores of {table.source} name {unit}s beyond its {total}; score it again")
        kept = np.full(total, mix.keep_unscored)
        kept[table.example_N] = joint_N > mix.keep_above
        helpful = int(kept[table.example_N].sum())
        windows, stretch_N2 = kept, None
        if unit == "document":
            windows = np.ones(corpus.windows(seq_length), bool)
            if not kept.all():
                stretch_N2 = kept_stretches(corpus, kept)
                windows = kept_windows(stretch_N2, len(windows), seq_length)
        mask = KeepMask(corpus, len(table.example_N), helpful, windows, stretch_N2)
        if table.source in before:
            mask = _and_before(mask, before[table.source], seq_length)
        masks[table.source] = mask
    if not any(mask.windows.any() for mask in masks.values()):
        above = f"above mix.keep_above={mix.keep_above} at step {tables[0].steps[-1]}"
        end = "nothing is left to train on: here Eq. 7 ends"
        raise ValueError(f"no scored example has influence {above}, and {end}")
    return masks


def _check(corpus: Corpus, manifest: Mapping[str, Any], unit: str, seq_length: int) -> None:
    scored_with = manifest.get("seq_length", seq_length)
    if unit == "window" and scored_with != seq_length:
        fault = f"scores of {corpus.name} are of windows of {scored_with} tokens"
        way_out = f"score again at {seq_length}"
        raise ValueError(f"{fault}, data.seq_length={seq_length} cuts others; {way_out}")
    if manifest.get("data", {}).get("hash") != dataset_identity(corpus.prefix, manifest["format"]):
        raise ValueError(f"{corpus.prefix} has changed since {corpus.name} was scored; score it again")


def _and_before(mask: KeepMask, path: str, seq_length: int) -> KeepMask:
    """The windows and labels that both `mask` and the mask in a file keep."""
    earlier = load_mask(mask.corpus.name, len(mask.windows), path)
    require_made_for(earlier, mask.corpus.prefix, seq_length)
    bits = np.unpackbits(earlier.packed, count=len(mask.windows), bitorder="little").astype(bool)
    stretches = [s for s in (mask.stretch_N2, earlier.stretch_N2) if s is not None]
    stretch_N2 = _overlap(*stretches) if len(stretches) == 2 else next(iter(stretches), None)
    return dataclasses.replace(mask, windows=mask.windows & bits, stretch_N2=stretch_N2)


def _overlap(a_N2: np.ndarray, b_N2: np.ndarray) -> np.ndarray:
    """The tokens in a stretch of both: int64 [n, 2]. Each list is ascending, its stretches apart."""
    edge_M = np.unique(np.concatenate((a_N2, b_N2)))
    # A token lies in a stretch where an odd number of the list's ends are at or before it.
    inside_2M = [np.searchsorted(list_N2.ravel(), edge_M, side="right") % 2 == 1 for list_N2 in (a_N2, b_N2)]
    begin = np.flatnonzero(inside_2M[0] & inside_2M[1])
    return np.stack((edge_M[begin], edge_M[begin + 1]), axis=1)


def mask_files(masks: dict[str, KeepMask], directory: Path, seq_length: int) -> dict[str, tuple[Path, bytes]]:
    """Source -> path of its mask's file, SOURCE-HASH.npy or .npz, and the file's content.

    Masks that keep everything or nothing have no file. The hash is of the content, so that a file that an
    earlier phase names is never altered.
    """
    out = {}
    for name, mask in masks.items():
        if mask.windows.any() and not (mask.windows.all() and mask.stretch_N2 is None):
            content = mask_file(mask.corpus, mask.windows, mask.stretch_N2, seq_length)
            suffix = ".npy" if mask.stretch_N2 is None else ".npz"
            out[name] = directory / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}{suffix}", content
    return out
