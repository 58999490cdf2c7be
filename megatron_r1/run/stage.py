"""A stage of the work: whether it is done, may go on, or is refused; and its line in a ledger.

A stage reads files and makes files. Its request names all that decides the result, in nested dictionaries
of JSON values. The stage keeps the request beside the result, in a file that is written last. A new stage:

    def fold(text: Path, output: Path, width: int) -> None:
        request = {"format": 1, "text": sha256(text), "width": width}
        if answered(output / "manifest.json", request) is None:
            write_text(output / "folded.txt", textwrap.fill(text.read_text(), width))
            answer(output / "manifest.json", request, [output / "folded.txt"])
        made = {str(output / "folded.txt"): sha256(output / "folded.txt")}
        finish(output, "fold", inputs={str(text): request["text"]}, outputs=made)

Ledgers, data plans and score manifests know things by the same identities, so that a result can be followed
to its text: a file by its SHA-256, a dataset by `data.indexed.identity_of`, a checkpoint by
`checkpoint.files.identity`, a tokenizer by its fingerprint, scores by the SHA-256 of scores.npy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_r1.run import ledger
from megatron_r1.run.ledger import Hashes
from megatron_r1.system.errors import brief, some
from megatron_r1.system.files import plain_name, sha256, write_json
from megatron_r1.system.json_io import read_object

Request = Mapping[str, Any]
"""All that decides a stage's result, by name."""


class Standing(Enum):
    """Where a stage stands."""

    NEW = "nothing is there"
    OTHER = "the result of another request is there"
    GO_ON = "a part of the result is there"
    DONE = "the whole result is there"


def standing(
    theirs: Request | None,
    ours: Request,
    whole: Callable[[], bool],
    refusal: str | None = None,
    way_out: str = "",
    notes: Collection[str] = (),
) -> Standing:
    """Compare the request whose result is there (None: nothing is there) with ours.

    `whole`: whether all of the result is there, asked only of our request's. `notes`: first-level keys that
    decide nothing. Where a stage must not replace the result of another request, `refusal` is the beginning
    of the ValueError that this raises, and `way_out` what a user may do instead of restoring what differs.
    """
    if theirs is None:
        return Standing.NEW
    if changed := differences(theirs, ours, notes):
        if refusal is None:
            return Standing.OTHER
        raise ValueError(f"{refusal}: {some(changed, most=20)}. Restore these, or {way_out}")
    return Standing.DONE if whole() else Standing.GO_ON


def differences(theirs: Request, ours: Request, notes: Collection[str] = ()) -> list[str]:
    """The differences of two requests, each as `key.of.it (value there, value here)`."""
    there, here = _flat(theirs), _flat(ours)
    return [
        f"{brief(key)} ({there.get(key, 'nothing')!s:.20} there, {here.get(key, 'nothing')!s:.20} here)"
        for key in dict.fromkeys([*here, *there])
        if key.split(".")[0] not in notes and there.get(key) != here.get(key)
    ]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    leaves = ((f"{path}.{key}" if path else str(key), leaf) for key, leaf in tree.items())
    return {k: v for name, leaf in leaves for k, v in _flat(leaf, name).items()}


def read(record: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where the file is missing or damaged."""
    try:
        return read_object(record)
    except (OSError, ValueError):
        return None


def answered(manifest: Path, request: Request) -> dict[str, Any] | None:
    """The manifest that `answer` has written, if it is of this request and its files are as they were."""
    content = read(manifest) or {}

    def whole() -> bool:
        # A manifest that lists no files is never whole.
        files = content.get("files") or {manifest.name: None}
        if not isinstance(files, dict) or not all(plain_name(p) for f in files for p in str(f).split("/")):
            return False
        paths = {manifest.parent / name: digest for name, digest in files.items()}
        return all(path.is_file() and sha256(path) == digest for path, digest in paths.items())

    return content if standing(content.get("request"), request, whole) is Standing.DONE else None


def answer(manifest: Path, request: Request, files: Iterable[Path], **facts: Any) -> dict[str, Any]:
    """Write the manifest of a result: request, facts, SHA-256 of each file, beside it or in folders there."""
    names = {path.relative_to(manifest.parent).as_posix(): path for path in files}
    content = {"request": request, **facts, "files": {name: sha256(path) for name, path in names.items()}}
    write_json(manifest, content)
    return content


def require_empty(target: Path) -> None:
    """Raise ValueError where a folder to write is a file, lies below one, or holds something."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; name another, or remove it")
    there = next(parent for parent in target.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{target} cannot be made, because {there} is a file; name another folder")


def finish(
    directory: Path, name: str, *, inputs: Hashes, outputs: Hashes, again: bool = False, **line: Any
) -> None:
    """Add the line of a finished stage to `directory`/ledger.jsonl. Inputs and outputs: path -> identity.

    `line`: as of `ledger.append`. No line is added if one of this name has the same outputs: the stage then
    found its result and did not make it. `again` adds the line all the same, for stages whose time counts
    each time.
    """
    lines = [] if again else ledger.read(directory)
    if not any(line["stage"] == name and line["outputs"] == outputs for line in lines):
        ledger.append(directory, name, inputs=inputs, outputs=outputs, **line)


def note_launch(note: Path, **line: Any) -> None:
    """Keep in the file `note` the arguments that `finish` would get, but outputs, for a launch that goes on.

    Long stages call this as they go, and `record_launch` at their end. The next launch calls `record_launch`
    at its beginning, for one that was killed.
    """
    write_json(note, line)


def record_launch(note: Path, directory: Path, outputs: Hashes) -> None:
    """Add the line in `note`, where there is one, to `directory`/ledger.jsonl, and remove the note."""
    line = read(note)
    # A note that was damaged since is none.
    with suppress(TypeError, OverflowError):
        if line is not None:
            finish(directory, outputs=outputs, again=True, **line)
    note.unlink(missing_ok=True)
