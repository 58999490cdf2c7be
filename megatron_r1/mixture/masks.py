"""Keep masks from scores (Eq. 6), as files that the data plan reads. No torch.

    D_t = { x : I(x; theta_t) > 0 },    I(x; theta_t) = sum_c alpha_c score_c(x; theta_t)

theta_t is the current model: the last of the scored checkpoints. Examples that were not scored are kept by
default, for Eq. 6 drops what is known not to help; `mix.keep_unscored: false` drops them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_r1.config import MixConfig
from megatron_r1.data.keep import kept_stretches, kept_windows, load_mask, mask_file
from megatron_r1.influence.store import Scored, dataset_identity
from megatron_r1.mixture.weights import checkpoint_weights, scale_of
from megatron_r1.records import Corpus, ScoreTable
from megatron_r1.system.files import replacing


@dataclass(frozen=True)
class KeepMask:
    """What one source may still draw."""

    corpus: Corpus
    scored: int
    helpful: int
    """Of the scored examples, those above the threshold."""
    windows: np.ndarray
    """bool [windows]."""
    stretch_N2: np.ndarray | None
    """Of a mask over documents: tokens whose labels count (see data/keep.py)."""

    @property
    def share(self) -> float:
        """Share of the source's windows that may be drawn."""
        return float(self.windows.mean())


def joint_scores(tables: Sequence[ScoreTable], mix: MixConfig) -> list[np.ndarray]:
    """I(x; theta_t) of every table's examples at its last checkpoint, float64 [N] each.

    `mix.scale: zscore` divides a capability's scores by their spread and leaves their zero where it is: an
    example that helps still counts as one.
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
    """Source -> its mask. `before`: files that the phase names already; what they drop stays dropped.

    Raises ValueError where the scores are of other windows or data, or where nothing helps any more.
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
        if unit == "document" and not kept.all():
            stretch_N2 = kept_stretches(corpus, kept)
            windows = kept_windows(stretch_N2, len(windows), seq_length)
        mask = KeepMask(corpus, len(table.example_N), helpful, windows, stretch_N2)
        if table.source in before:
            mask = _and_before(mask, before[table.source])
        masks[table.source] = mask
    if not any(mask.windows.any() for mask in masks.values()):
        raise ValueError(
            f"no scored example has influence above mix.keep_above={mix.keep_above} at step "
            f"{tables[0].steps[-1]}, and nothing is left to train on: here Eq. 7 ends"
        )
    return masks


def _check(corpus: Corpus, manifest: Mapping[str, object], unit: object, seq_length: int) -> None:
    scored_with = manifest.get("seq_length", seq_length)
    if unit == "window" and scored_with != seq_length:
        raise ValueError(
            f"scores of {corpus.name} are of windows of {scored_with} tokens, data.seq_length={seq_length} "
            f"cuts others; score again at {seq_length}"
        )
    data = manifest["data"]
    assert isinstance(data, dict)
    form = manifest["format"]
    assert isinstance(form, int)
    if data["hash"] != dataset_identity(corpus.prefix, form):
        raise ValueError(f"{corpus.prefix} has changed since {corpus.name} was scored; score it again")


def _and_before(mask: KeepMask, path: str) -> KeepMask:
    """`mask`, less what the file drops."""
    there = load_mask(mask.corpus.name, len(mask.windows), path)
    bits = np.unpackbits(there.packed, count=len(mask.windows), bitorder="little").astype(bool)
    windows, stretch_N2 = mask.windows & bits, mask.stretch_N2
    if there.stretch_N2 is not None:
        stretch_N2 = there.stretch_N2 if stretch_N2 is None else _overlap(stretch_N2, there.stretch_N2)
    return dataclasses.replace(mask, windows=windows, stretch_N2=stretch_N2)


def _overlap(a_N2: np.ndarray, b_N2: np.ndarray) -> np.ndarray:
    """What lies in a stretch of both: int64 [n, 2]. Each list is ascending, its stretches apart."""
    first = np.searchsorted(b_N2[:, 1], a_N2[:, 0], side="right")
    last = np.searchsorted(b_N2[:, 0], a_N2[:, 1], side="left")
    pairs = [
        (max(begin, int(b_N2[j, 0])), min(end, int(b_N2[j, 1])))
        for (begin, end), lo, hi in zip(a_N2.tolist(), first.tolist(), last.tolist(), strict=True)
        for j in range(lo, hi)
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def mask_files(
    masks: Mapping[str, KeepMask], directory: Path, seq_length: int
) -> dict[str, tuple[Path, bytes]]:
    """Source -> where its mask belongs, SOURCE-HASH.npy or .npz, and what that file holds; without masks that
    keep everything or nothing.

    The hash is of what the file says, so a file that an earlier phase refers to is never altered.
    """
    out = {}
    for name, mask in masks.items():
        if mask.windows.any() and not (mask.windows.all() and mask.stretch_N2 is None):
            content = mask_file(mask.corpus, mask.windows, mask.stretch_N2, seq_length)
            suffix = ".npy" if mask.stretch_N2 is None else ".npz"
            out[name] = directory / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}{suffix}", content
    return out


def save(path: Path, content: bytes) -> None:
    """A file that is there already and whole is left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    with replacing(path) as stream:
        stream.write(content)
