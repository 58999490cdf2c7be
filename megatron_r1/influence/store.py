"""Scores on disk: RUN/influence/step_N/SOURCE/, plain NumPy files that any program can map. No torch.

    scores.npy     float32 [N, C]   score of each example for each capability
    losses.npy     float32 [N]      mean label loss of each example, nats
    tokens.npy     int32 [N]        labels of each example, s(x) of Eq. 5
    examples.npy   int64 [N]        window or document number within the source, ascending
    norms.npy      float32 [N]      |grad l(x)|, where influence.norms is set
    written.npy    bool [N]         rows that hold results; the others are 0
    manifest.json  what the scores were computed from: format, capabilities, and the identities of checkpoint,
                   dataset and probing sets that ledgers have ("weights", "data", "directions")

The directory appears whole, by a rename. Rows are flushed to disk before their flags in written.npy are,
so that a flag never promises what is not there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_r1.config import RESERVED
from megatron_r1.data.indexed import identity_of, with_suffix
from megatron_r1.data.npy import read_array, write_array
from megatron_r1.records import ScoreTable
from megatron_r1.run.layout import RunDir
from megatron_r1.run.stage import Standing, standing
from megatron_r1.system.errors import require, shown, suggest_path
from megatron_r1.system.fields import check_names, name_mistakes
from megatron_r1.system.files import json_bytes, make_folder, naming, replacing, sha256, sync
from megatron_r1.system.json_io import mistake, read_object
from megatron_r1.system.terminal import Progress, say

FORMAT = 3
_FORMER = 2
"""An earlier format with the same scores. Its hashes of datasets and weights are of files, not identities.
Scores of this format are read, but not continued."""
_KIND = {
    "source": str,
    "step": int,
    "position": int,
    "capabilities": [str],
    "weights?": str,
    "data?": dict,
    "directions?": dict,
    "direction_norms?": {str: float},
    "seq_length?": int,
    "influence?": {
        "unit?": ("window", "document"),
        "loss?": ("mean", "sum"),
        "norms?": bool,
        "curvature?": str,
    },
}
"""Keys of a manifest that are read somewhere, and the kinds of their values."""
_MOST_BYTES, _MOST_CAPABILITIES = 16 << 20, 10_000
"""Of a manifest."""
_TYPES = {"tokens": "int32", "examples": "int64", "written": "bool"}
"""Types of the files that do not hold float32."""
_AXES = {"scores": 2, "token_scores": 3, "projections": 2}
"""Axes of the files that have more than the examples'."""
_FILES = {f"{name}.npy" for name in ("losses", "norms", *_TYPES, *_AXES)} | {"manifest.json"}
AGAIN = "remove its folder and score again"
_NOTES = {"position", "direction_norms", "projected_in"}
"""Keys of the manifest that change no score, or follow from others."""
_WHOLE = 1 << 26
_SAMPLES, _SAMPLE = 1024, 1 << 16


def fingerprint(path: Path) -> str:
    """Hash of a file's size and contents. A file above 64 MiB is sampled: 1024 even samples of 64 KiB.

    Retrained weights differ in every sample. A corpus that was edited in one place differs in its index.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def dataset_identity(prefix: Path, form: int = FORMAT) -> str:
    """Identity of a dataset in manifests of format `form`."""
    if form == FORMAT:
        return identity_of(prefix)
    digest = hashlib.sha256()
    for path in (with_suffix(prefix, ".bin"), with_suffix(prefix, ".idx")):
        digest.update(f"{path.name} {fingerprint(path)}\n".encode())
    return digest.hexdigest()


def directory_of(run: Path, step: int, source: str) -> Path:
    """Directory of a source's scores. ValueError for a source that is no name, and could lead elsewhere."""
    check_names("source", [source])
    return RunDir(run).influence / f"step_{step:08d}" / source


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory of scores, None without one. Raises ValueError if damaged or unknown."""
    path, again = directory / "manifest.json", f"remove {directory} and score again"
    if not path.is_file():
        if directory.exists():
            raise ValueError(f"{directory} has no manifest.json, and nothing says what it holds; {again}")
        return None
    try:
        manifest = read_object(path, _MOST_BYTES)
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path} is damaged ({why}); {again}") from None
    if (form := manifest.get("format")) not in (FORMAT, _FORMER):
        raise ValueError(f"{path} has format {shown(form)}, where {_FORMER} and {FORMAT} are known; {again}")
    if wrong := mistake(manifest, _KIND) or " has too many capabilities" * (
        len(manifest["capabilities"]) > _MOST_CAPABILITIES
    ):
        where = f"it{wrong}".removeprefix("it.")
        raise ValueError(f"{path} is damaged ({where}); {again}")
    for name, why in name_mistakes(manifest["capabilities"], RESERVED).items():
        raise ValueError(f"{path} is damaged (capability {shown(name)}: {why}); {again}")
    place = f"step_{manifest['step']:08d}", manifest["source"]
    if place != directory.parts[-2:]:
        place_of = f"{place[0]}/{place[1]:.200}"
        raise ValueError(f"{path} is of {place_of}: its folder was copied or renamed; {again}")
    return manifest


def manifests(folder: Path) -> dict[Path, dict[str, Any]]:
    """Directory of scores below a checkpoint's folder -> its manifest. Half-written ones are left out."""
    found = {path.parent: read_manifest(path.parent) for path in sorted(folder.glob("[!.]*/manifest.json"))}
    return {directory: manifest for directory, manifest in found.items() if manifest}


def check_inputs(directory: Path, inputs: Mapping[str, Any], way_out: str | None = None) -> Standing:
    """Standing of the scores of these inputs. `way_out`: advice of the error, by default to remove scores.

    Raises ValueError where `directory` holds scores of other inputs, and names the differences. Raises
    ValueError for scores of an earlier version, whose inputs cannot be compared.
    """
    manifest = read_manifest(directory)
    way_out = way_out or f"remove {directory.parent.parent}/step_* to score again, or use another train.run"
    if manifest is not None and manifest["format"] != FORMAT:
        raise ValueError(
            f"{directory} holds scores of an earlier version (format {manifest['format']}, where {FORMAT} is "
            f"written), which mixing and the report read and scoring cannot continue; {way_out}"
        )

    def whole() -> bool:
        assert manifest is not None
        norms = ("norms",) if manifest.get("influence", {}).get("norms") else ()
        arrays = read_arrays(directory, manifest, ("scores", "losses", "tokens", *norms))
        return bool(arrays["written"].all())

    return standing(manifest, inputs, whole, f"{directory} holds scores of other inputs", way_out, _NOTES)


class ScoreStore:
    """Writer of the scores of one source at one checkpoint. One process writes."""

    def __init__(
        self,
        directory: Path,
        inputs: Mapping[str, Any],
        example_N: np.ndarray,
        length_N: np.ndarray,
        shapes: Mapping[str, tuple[int, ...]],
    ):
        """Open `directory`, or create it for these examples.

        `inputs` become the manifest. `shapes`: shape of an example's entry in each file of results, float32.
        Raises ValueError where the directory holds scores of other inputs.
        """
        check_inputs(directory, inputs)
        n = len(example_N)
        if not directory.exists():
            arrays = {name: np.zeros((n, *shape), np.float32) for name, shape in shapes.items()}
            arrays["tokens"], arrays["examples"] = length_N.astype(np.int32), example_N.astype(np.int64)
            _lay_out(directory, inputs, {**arrays, "written": np.zeros(n, bool)})
        if not np.array_equal(_array(directory, "examples", mode="r"), example_N):
            raise ValueError(f"{directory / 'examples.npy'} names other examples than its manifest; {AGAIN}")
        self._results = {name: _array(directory, name, n, shape, "r+") for name, shape in shapes.items()}
        self._written = _array(directory, "written", n, mode="r+")

    def missing(self, first: int, last: int) -> bool:
        """Whether any of the rows [first, last) is still to be computed."""
        return not bool(self._written[first:last].all())

    def write(self, first: int, results: Mapping[str, np.ndarray]) -> int:
        """Fill the rows from `first` on, but those already written. Returns how many are new."""
        rows = np.arange(first, first + len(results["scores"]))
        new = ~np.asarray(self._written[rows])
        for name, array in self._results.items():
            array[rows[new]] = results[name][new]
            array.flush()
        self._written[rows] = True
        self._written.flush()
        return int(new.sum())


def _lay_out(directory: Path, inputs: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    temporary = directory.with_name(f".{directory.name}.tmp")
    _remove_unfinished(temporary)
    try:
        make_folder(directory.parent)
        temporary.mkdir()
        for name, array in arrays.items():
            path = temporary / f"{name}.npy"
            with naming(path), open(path, "xb") as stream:
                write_array(stream, array)
        path = temporary / "manifest.json"
        with naming(path), open(path, "xb") as stream:
            stream.write(json_bytes(inputs))
        for path in temporary.iterdir():
            sync(path)
        os.rename(temporary, directory)
    except BaseException:
        _remove_unfinished(temporary)
        raise
    sync(directory.parent)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed launch has left of `_lay_out`. Raises ValueError where anything else is there."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not {path.name for path in folder.iterdir()} <= _FILES:
        raise ValueError(f"{folder} is not what scoring leaves there when it is killed; move it away")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def hashes_of(directories: Iterable[Path]) -> dict[str, str]:
    """Directory of scores -> their identity, the hash of scores.npy."""
    return {str(directory): sha256(directory / "scores.npy") for directory in directories}


def rows_written(directory: Path, rows: int) -> int:
    """Number of examples, of `rows`, with scores; 0 without a directory."""
    return int(_array(directory, "written", rows, mode="r").sum()) if directory.exists() else 0


@dataclass(frozen=True)
class Scored:
    """A complete directory of scores."""

    directory: Path
    step: int
    manifest: dict[str, Any]

    def array(self, name: str) -> np.ndarray:
        """Raises ValueError, with the file, where it is missing, misshapen or not finite."""
        return np.asarray(read_arrays(self.directory, self.manifest, (name,), None)[name])


def read_arrays(
    directory: Path, manifest: Mapping[str, Any], names: Iterable[str], mode: Literal["r"] | None = "r"
) -> dict[str, Any]:
    """Arrays by name, with `examples` and `written`. Raises ValueError where they do not fit each other, and
    where the numbers of an example are not finite."""
    example_N = _array(directory, "examples", mode=mode)
    if (np.diff(example_N) <= 0).any() or (example_N < 0).any():
        raise ValueError(f"{directory / 'examples.npy'} is damaged (numbers do not ascend); {AGAIN}")
    columns, rows = {"scores": (len(manifest["capabilities"]),)}, len(example_N)
    arrays = {name: _array(directory, name, rows, columns.get(name), mode) for name in ("written", *names)}
    negative = {"tokens": "no numbers of tokens", "norms": "negative norms"}
    for name, array in arrays.items():
        if name in negative and (array < 0).any():
            raise ValueError(f"{directory / f'{name}.npy'}: {negative[name]}; {AGAIN}")
        if name in ("scores", "losses", "norms", "token_scores"):
            bad_N = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim))) & arrays["written"]
            if bad_N.any():
                example = example_N[bad_N.argmax()]
                raise ValueError(
                    f"{directory / f'{name}.npy'}: {name} of {manifest['source']} are not finite, first of "
                    f"example {example}; {AGAIN}"
                )
    return {"examples": example_N, **arrays}


def _array(
    directory: Path,
    name: str,
    rows: int | None = None,
    columns: tuple[int | None, ...] | None = None,
    mode: Literal["r", "r+"] | None = None,
) -> Any:
    """An array of a directory of scores, of so many rows and columns, mapped with a `mode`."""
    path, dtype = directory / f"{name}.npy", _TYPES.get(name, "float32")
    if columns is None:
        columns = (None,) * (_AXES.get(name, 1) - 1)
    try:
        return read_array(path, dtype, (rows, *columns), mode)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {AGAIN}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from None


@cache
def _say_foreign(folder: Path) -> None:
    say(f"{folder} is no folder of scores by its name, and is left alone")


def scored(run: Path, only: Collection[str] | None = None) -> dict[str, list[Scored]]:
    """Source -> its complete checkpoints in training order; sources in the order of the configuration.

    Only checkpoints at which every scored source (of `only`, where given) is complete.
    """
    by_step: dict[int, list[Scored]] = {}
    for folder in sorted(RunDir(run).influence.glob("step_*")):
        if not re.fullmatch(r"step_\d{8,}", folder.name):
            _say_foreign(folder)
            continue
        for directory, manifest in manifests(folder).items():
            if only is None or manifest["source"] in only:
                by_step.setdefault(manifest["step"], []).append(Scored(directory, manifest["step"], manifest))
    sources = {s.manifest["source"]: s.manifest["position"] for step in by_step.values() for s in step}
    complete = [
        step
        for step in by_step.values()
        if len(step) == len(sources) and all(s.array("written").all() for s in step)
    ]
    return {
        name: [s for step in complete for s in step if s.manifest["source"] == name]
        for name in sorted(sources, key=lambda name: (sources[name], name))
        if complete
    }


def read_scores(run: Path, only: Collection[str] | None = None) -> list[ScoreTable]:
    """The scores of every source (of `only`), in the order of the configuration; empty where none are
    complete.

    Raises ValueError where checkpoints were scored for different capabilities or examples.
    """
    tables = []
    for source, checkpoints in scored(run, only).items():
        first = checkpoints[0]
        capabilities, example_N = first.manifest["capabilities"], first.array("examples")
        length_N = first.array("tokens")
        for other in checkpoints[1:]:
            same = other.manifest["capabilities"] == capabilities
            same = same and np.array_equal(other.array("examples"), example_N)
            if not same or not np.array_equal(other.array("tokens"), length_N):
                raise ValueError(
                    f"{other.directory} holds other capabilities or examples than {first.directory}; "
                    f"remove one of the two checkpoints and score again"
                )
        steps = tuple(s.step for s in checkpoints)
        score_NCK = np.stack([s.array("scores") for s in checkpoints], axis=2)
        tables.append(ScoreTable(source, tuple(capabilities), steps, example_N, length_N, score_NCK))
    return tables


COLUMNS = {
    "step": "int64",
    "source": "string",
    "example": "int64",
    "tokens": "int32",
    "loss": "float32",
    "norm": "float32",
}


def write_parquet(run: Path, output: Path, check: bool = False) -> int:
    """Write every complete score under `run`: a row for each (source, step, example). Returns how many.

    Columns: step, source, example (window or document number), tokens (labels), loss (nats), and a float32
    for each capability. A column norm is added where any norm is stored, and holds nulls for the others. A
    row group is one source at one step, and no more is in memory. `check`: only count. `output` is whole or
    not there. Raises ValueError where no scores are complete, where checkpoints were scored for different
    capabilities, and where pyarrow is missing.
    """
    pyarrow, parquet = (require(module, "Parquet", "datasets") for module in ("pyarrow", "pyarrow.parquet"))
    parts = [part for checkpoints in scored(run).values() for part in checkpoints]
    if not parts:
        raise ValueError(
            f"{RunDir(run).influence}: no complete influence scores; see tools/compute_influence.py"
            f"{suggest_path(run)}"
        )
    capabilities: list[str] = parts[0].manifest["capabilities"]
    for part in parts:
        if part.manifest["capabilities"] != capabilities:
            raise ValueError(
                f"{part.directory} holds scores for {part.manifest['capabilities']}, {parts[0].directory} "
                f"for {capabilities}; a table has one set of columns: remove one of the two and score again"
            )
    rows = sum(len(part.array("examples")) for part in parts)
    if check:
        return rows
    with_norms = [part for part in parts if (part.directory / "norms.npy").is_file()]
    columns = {name: kind for name, kind in COLUMNS.items() if with_norms or name != "norm"}
    schema = pyarrow.schema([*columns.items(), *((name, "float32") for name in capabilities)])
    with (
        replacing(output) as stream,
        parquet.ParquetWriter(stream, schema) as writer,
        Progress("export", len(parts), "row groups") as bar,
    ):
        for part in parts:
            example_N, score_NC = part.array("examples"), part.array("scores")
            values: dict[str, Any] = {
                "step": np.full(len(example_N), part.step),
                "source": [part.manifest["source"]] * len(example_N),
                "example": example_N,
                "tokens": part.array("tokens"),
                "loss": part.array("losses"),
                "norm": part.array("norms") if part in with_norms else [None] * len(example_N),
                **{name: score_NC[:, c] for c, name in enumerate(capabilities)},
            }
            writer.write_table(pyarrow.table({name: values[name] for name in schema.names}, schema))
            bar.advance()
    return rows
