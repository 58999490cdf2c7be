"""Data files of others, made to harm: each is refused in one line, in bounded time and memory."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.data import plan_file
from megatron_r1.data.keep import load_mask
from megatron_r1.data.npy import read_array, read_stream, write_array
from megatron_r1.data.provenance import ORIGIN
from tests.data import hostile
from tests.launch import ROOT


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = hostile.make(tmp_path_factory.mktemp("files"))
    for _, read in made.values():
        read()
    return made


@pytest.fixture
def no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _spoil(files: dict[str, Any], seeds: range) -> None:
    found = []
    for seed in seeds:
        for kind, (paths, read) in files.items():
            path = paths[seed % len(paths)]
            content = path.read_bytes()
            try:
                path.write_bytes(hostile.spoiled(content, seed))
                read()
            except (ValueError, OSError) as error:
                if len(str(error)) > 1500 or "\n" in str(error):
                    found.append(f"{kind} {seed}: message {error!s:.300}")
            except Exception as error:
                found.append(f"{kind} {seed} {path.name}: {error!r:.300}")
            finally:
                path.write_bytes(content)
    assert not found, "\n".join(found)


@pytest.mark.usefixtures("no_hang")
def test_spoiled_files_are_read_or_refused(files: dict[str, Any]) -> None:
    _spoil(files, range(40))


@pytest.mark.soak
def test_many_spoiled_files_are_read_or_refused(files: dict[str, Any]) -> None:
    _spoil(files, range(40, 3000))


def test_bombs_are_refused_at_once_and_with_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.data.bombs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ends = [line.split(" | ", 2) for line in done.stdout.splitlines()]
    assert len(ends) == 55
    assert [name for name, _, end in ends if not end.startswith("refused: ") or len(end) > 700] == []
    assert [(name, seconds) for name, seconds, _ in ends if float(seconds) > 20] == []


def test_genuine_arrays_of_other_writers_are_read(tmp_path: Path) -> None:
    """Axes in Fortran's order, types of one byte with an order, and the second version of the format."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    for mode in (None, "r"):
        assert np.array_equal(read_array(tmp_path / "f.npy", "float32", (None, 3), mode), array)  # type: ignore[arg-type]
    content = b"{'descr': '<b1', 'fortran_order': False, 'shape': (3,), }".ljust(117) + b"\n"
    path = tmp_path / "b.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + len(content).to_bytes(4, "little") + content + b"\1\0\1")
    assert read_array(path, bool, (3,)).tolist() == [True, False, True]
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(ValueError, match="truth values other than 0 and 1"):
        read_array(path, bool, (3,))


@pytest.mark.parametrize("shape", [(0,), (0, 2), (5,), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["bool", "uint64", "float32", ORIGIN], ids=str)
def test_arrays_are_written_as_numpy_writes_them(shape: tuple[int, ...], dtype: Any) -> None:
    array, ours, numpys = np.ones(shape, dtype), io.BytesIO(), io.BytesIO()
    write_array(ours, array)
    np.save(numpys, array)
    assert ours.getvalue() == numpys.getvalue()
    assert np.array_equal(
        read_stream(io.BytesIO(ours.getvalue()), len(ours.getvalue()), (dtype, shape)), array
    )


@pytest.mark.parametrize(
    ("stretches", "message"),
    [
        ([[0, 5], [4, 9]], "do not ascend"),
        ([[0, 5], [5, 9]], "do not ascend"),
        ([[5, 5]], "do not ascend"),
        ([[9, 4]], "do not ascend"),
        ([[-4, 9]], "not of tokens of"),
        ([[0, 2**62]], "not of tokens of"),
        ([[-(2**63), 2**63 - 1]], "not of tokens of"),
        ([0, 5], "its shape is"),
        ([[0, 5, 9]], "its shape is"),
    ],
    ids=str,
)
def test_stretches_lie_apart_in_order_and_in_the_source(
    tmp_path: Path, stretches: list[Any], message: str
) -> None:
    parts = {"windows": np.array([255, 1], np.uint8), "seq_length": 16, "count": 9, "corpus": ""}
    np.savez(tmp_path / "keep.npz", stretches=np.array(stretches, np.int64), **parts)
    with pytest.raises(
        ValueError, match=rf"keep\.npz\), for 9 windows of 16 tokens, is damaged: .*{message}"
    ):
        load_mask("web", 9, tmp_path / "keep.npz")


@pytest.mark.parametrize("seq_length", [0, -1])
def test_a_mask_of_no_length_is_damaged(tmp_path: Path, seq_length: int) -> None:
    parts = {"windows": np.array([1], np.uint8), "count": 3, "corpus": "", "seq_length": seq_length}
    np.savez(tmp_path / "keep.npz", stretches=np.array([[900, 999]]), **parts)
    with pytest.raises(ValueError, match="is damaged"):
        load_mask("web", 3, tmp_path / "keep.npz")


def test_an_archive_of_other_members_is_no_mask(tmp_path: Path) -> None:
    parts = {"windows": np.array([1], np.uint8), "count": 1, "corpus": "", "seq_length": 4}
    np.savez(tmp_path / "keep.npz", stretches=np.array([[0, 5]]), **parts)
    assert load_mask("web", 1, tmp_path / "keep.npz").seq_length == 4
    with zipfile.ZipFile(tmp_path / "keep.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("windows.npy", archive.read("windows.npy"))
    with pytest.raises(ValueError, match="its members are"):
        load_mask("web", 1, tmp_path / "keep.npz")
    for more in ({"other": np.zeros(1)}, {"../../x": np.zeros(1)}):
        np.savez(tmp_path / "keep.npz", stretches=np.array([[0, 5]]), **parts, **more)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="its members are"):
            load_mask("web", 1, tmp_path / "keep.npz")


def test_a_plan_with_a_value_of_another_kind_is_damaged(files: dict[str, Any]) -> None:
    """Every value of the text by a value of every other kind: ValueError in one short line, or a plan."""
    text = files["plan"][0][0].read_text()
    for place in range(len(list(hostile.leaves(json.loads(text))))):
        for value in hostile.KINDS:
            tree = json.loads(text)
            node, key = list(hostile.leaves(tree))[place]
            node[key] = value
            for read in (plan_file.from_json, plan_file.datasets_of):
                try:
                    read(json.dumps(tree))
                except (ValueError, OSError) as error:
                    assert len(str(error)) < 1500 and "\n" not in str(error), (place, value)
    for content in ("3", "[]", "", '{"data": [1]}', '{"data": {"a": 1}}', '{"phases": 3}'):
        with pytest.raises(ValueError, match=r"the plan is damaged|not a blend plan"):
            plan_file.from_json(content)
    with pytest.raises(ValueError, match=r"the plan is damaged \(data\.a is 1\); restore it"):
        plan_file.datasets_of('{"data": {"a": 1}}')
