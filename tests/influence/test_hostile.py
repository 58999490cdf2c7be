"""Score folders and caches of others, and names that lead elsewhere: refused in one line, nothing touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.config import Config
from megatron_r1.influence import store
from megatron_r1.influence.directions import DirectionCache
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.plan import Work
from megatron_r1.influence.query import open_query
from megatron_r1.influence.score import compute_influence, open_job
from megatron_r1.influence.store import ScoreStore, directory_of, read_scores, write_parquet
from tests import launch
from tests.distributed import RankFailedError, on_ranks
from tests.influence.test_score import changed, copied
from tests.mixture.mixture_scores import write_scores

NAMES = ("../../victim/owned", "/absolute", "..", ".", "a/b", "", "a\0b", ".hidden", "-x", "x" * 101)


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_is_no_name_has_no_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^source .*: a name has "):
        directory_of(tmp_path, 5, name)


def _written(run: Path, source: str = "a", step: int = 4, **said: Any) -> Path:
    told = {"capabilities": ["c"], "position": 0, **said}
    write_scores(run, step, source, np.ones((3, 1)), np.arange(3), np.full(3, 9), **told)
    return directory_of(run, step, source)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"capabilities": []}, "its shape is"),
        ({"capabilities": ["c", "c"]}, "capability 'c': some file systems take it for c"),
        ({"capabilities": ["step"]}, "capability 'step': the name of a column"),
        ({"capabilities": ["../x"]}, r"capability '\.\./x': a name has"),
        ({"capabilities": [3]}, r"capabilities\[0\] is 3"),
        ({"capabilities": ["c", "d"]}, "its shape is"),
        ({"position": True}, "position is True"),
        ({"position": 10**30}, "position is 10000"),
        ({"seq_length": "16"}, "seq_length is '16'"),
        ({"influence": {"unit": "page"}}, r"influence\.unit is 'page'"),
        ({"influence": {"loss": 1}}, r"influence\.loss is 1"),
        ({"influence": {"norms": "yes"}}, r"influence\.norms is 'yes'"),
        ({"direction_norms": {"c": "1"}}, r"direction_norms\.c is '1'"),
        ({"direction_norms": {"c": 10**400}}, r"direction_norms\.c is "),
        ({"weights": "w" * 10**6, "data": 3}, "data is 3"),
    ],
    ids=str,
)
def test_a_manifest_of_other_kinds_is_refused(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    _written(tmp_path, **said)
    for read in (lambda: read_scores(tmp_path), lambda: write_parquet(tmp_path, tmp_path / "x.parquet")):
        with pytest.raises(ValueError, match=rf"is damaged \({message}") as caught:
            read()
        assert len(str(caught.value)) < 800
    assert not list(tmp_path.glob("x.parquet*"))


def test_the_tool_refuses_a_crafted_folder_in_one_line(tmp_path: Path) -> None:
    directory = _written(tmp_path)
    np.save(directory / "scores.npy", np.array([[{}], [1], [2]], dtype=object))
    command = [sys.executable, "tools/export_scores.py", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=launch.ROOT, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "scores.npy is damaged (it holds '|O'" in done.stderr


def test_foreign_folders_of_steps_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = _written(tmp_path)
    for name in ("step_00000004.bak", "step_4", "step_x"):
        shutil.copytree(directory.parent, directory.parent.with_name(name))
    for _ in range(2):
        assert [(t.source, t.steps) for t in read_scores(tmp_path)] == [("a", (4,))]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all("is left alone" in line for line in told)


def _begin(directory: Path) -> ScoreStore:
    inputs = {"format": store.FORMAT, "step": 4, "source": "a", "position": 0, "capabilities": ["c"]}
    shapes = {"scores": (1,), "losses": ()}
    return ScoreStore(directory, inputs, np.arange(3), np.full(3, 9), shapes)


def test_only_what_a_killed_launch_left_is_removed(tmp_path: Path) -> None:
    directory = directory_of(tmp_path, 4, "a")
    left = directory.with_name(".a.tmp")
    left.mkdir(parents=True)
    (left / "scores.npy").write_text("mine")
    (left / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"\.a\.tmp is not what scoring leaves there"):
        _begin(directory)
    assert (left / "scores.npy").read_text() == (left / "notes.txt").read_text() == "mine"
    shutil.rmtree(left)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/scores.npy").write_text("mine")
    left.symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match=r"\.a\.tmp is not what scoring leaves there"):
        _begin(directory)
    assert (tmp_path / "victim/scores.npy").read_text() == "mine"
    left.unlink()
    left.mkdir()
    (left / "scores.npy").write_text("half")
    _begin(directory)
    assert not left.exists() and directory.is_dir()


def test_scores_are_not_written_through_a_link(tmp_path: Path) -> None:
    directory = directory_of(tmp_path, 4, "a")
    _begin(directory)
    victim = tmp_path / "victim.npy"
    (directory / "scores.npy").rename(victim)
    (directory / "scores.npy").symlink_to(victim)
    with pytest.raises(OSError, match=r"scores\.npy is a link"):
        _begin(directory)


def test_a_full_disk_leaves_no_folder_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(tmp_path, 4, "a")

    def full(stream: Any, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_array", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*\.a\.tmp/\w+\.npy'"):
        _begin(directory)
    assert not list(directory.parent.iterdir())


class _Subclass(torch.nn.Parameter):
    pass


def _spoil(path: Path, way: str) -> None:
    genuine: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    name, g = next(iter(genuine.items()))
    others: dict[str, Any] = {
        "shape": g[:1].clone(),
        "type": g.to(torch.complex64),
        "double": g.double(),
        "sparse": g.to_sparse(),
        "strides": torch.ones(1).expand(g.shape),
        "list": g.tolist(),
        "number": 3.0,
        "parameter": torch.nn.Parameter(g),
        "storage": torch.zeros(10**7)[: g.numel()].view(g.shape),
    }
    if way == "names":
        torch.save({"x": g, **genuine}, path)
    elif way == "none":
        torch.save([g], path)
    elif way == "legacy":
        torch.save(genuine, path, _use_new_zipfile_serialization=False)
    elif way == "packed":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    elif way == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif way == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        torch.save({**genuine, name: others[way]}, path)


def _caches(config: Config, root: Path) -> None:
    """A rank's body: a cache that is spoiled in each way is refused, and what is not its own stays."""
    job = open_job(config)
    work: Work = job.work
    from megatron_r1.parallel import process_groups

    with process_groups(work.config.parallel) as context:
        engine = Engine.build(work.config, work.data.eod, context)
        cache = DirectionCache(work, job.parts[2][0], engine)
        gradient = {name: torch.rand(shape) for name, shape in cache._shapes.items()}
        cache.save("code", gradient)
        path = cache._path("code")
        kept = path.read_bytes()
        loaded = cache.load("code")
        assert loaded is not None and all(torch.equal(loaded[name], g) for name, g in gradient.items())
        for way in (
            "shape", "type", "double", "sparse", "strides", "list", "number", "parameter", "storage",
            "names", "none", "legacy", "packed", "flipped",
        ):  # fmt: skip
            path.write_bytes(kept)
            _spoil(path, way)
            with pytest.raises(ValueError, match=r"tensor_0\.pipeline_0\.pt is damaged \("):
                cache.load("code")
        path.write_bytes(kept)
        mine, linked = cache._root / "mine", root / "linked"
        mine.mkdir()
        (mine / "notes.txt").write_text("mine")
        linked.mkdir()
        (linked / "tensor_0.pipeline_0.pt").write_text("mine")
        (cache._root / "link").symlink_to(linked)
        cache.clear()
        assert not path.exists() and (mine / "notes.txt").exists()
        assert (linked / "tensor_0.pipeline_0.pt").read_text() == "mine"


def test_a_spoiled_cache_of_directions_is_refused(trained: Config, tmp_path: Path) -> None:
    on_ranks(1, _caches, copied(trained, tmp_path), tmp_path)


def _ask(config: Config, output: Path) -> None:
    open_query(config, output, ["code"])


def test_a_query_refuses_crafted_projections(trained: Config, tmp_path: Path) -> None:
    few = {"method": "projected", "projection": 3, "examples": 5, "steps": [4]}
    config = changed(copied(trained, tmp_path), influence=few)
    on_ranks(1, compute_influence, config)
    directory = Path(config.train.run) / "influence/step_00000004/a"
    manifest = json.loads((directory / "manifest.json").read_text())
    for name, spoil, message in (
        ("scores.npy", b"\x93NUMPY\x01\x00", r"scores\.npy is damaged"),
        ("written.npy", b"", r"written\.npy is damaged"),
        ("manifest.json", b'{"x":' * 5000, r"manifest\.json is damaged \(nested deeper"),
        ("manifest.json", json.dumps({**manifest, "capabilities": 7}).encode(), "capabilities is 7"),
    ):
        kept = (directory / name).read_bytes()
        (directory / name).write_bytes(spoil)
        with pytest.raises(RankFailedError, match=message):
            on_ranks(1, _ask, config, tmp_path / "answers")
        (directory / name).write_bytes(kept)
    on_ranks(1, _ask, config, tmp_path / "answers")
    assert not (tmp_path / "answers").exists()
