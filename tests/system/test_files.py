"""Files that appear whole, and names that stay in their folder."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_r1.system import files
from megatron_r1.system.files import beside, open_exclusive, ours, plain_name, regular, write_text
from tests.launch import ROOT


@pytest.mark.parametrize(
    "name", ["a", "__0_0.distcp", ".metadata", "model-00001-of-00002.safetensors", "...", "a\\b"]
)
def test_a_plain_name_is_of_a_file_beside(name: str) -> None:
    assert beside(Path("folder/index.json"), name) == Path("folder") / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/x", "a/b", "./a", "a/", "a\0", None, 3, ["a"], "../" * 400]
)
def test_any_other_is_refused_by_the_file_that_names_it(name: object) -> None:
    assert not plain_name(name)
    with pytest.raises(ValueError, match=r"^folder/index.json names ") as caught:
        beside(Path("folder/index.json"), name)
    assert len(str(caught.value)) < 300


def _link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def _pipe(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, victim: Path) -> None:
    path.mkdir()


_TRAPS = pytest.mark.parametrize(
    ("lay", "kind"), [(_link, "a link"), (_hard_link, "hard link"), (_pipe, "a pipe"), (_folder, "a folder")]
)


@_TRAPS
def test_a_writer_touches_no_file_of_others(tmp_path: Path, lay: Callable[..., None], kind: str) -> None:
    victim, out, partial = (tmp_path / name for name in ("victim", "out.yaml", "out.yaml.partial"))
    victim.write_text("precious")
    lay(partial, victim)
    before = partial.lstat()
    for write in (lambda: write_text(out, "x"), lambda: open_exclusive(partial)):
        with pytest.raises(OSError, match=f"out.yaml.partial is .*{kind}.*move it away$"):
            write()
    for mode in ("ab", "wb", "r+b", "a+"):
        with pytest.raises(OSError, match=kind):
            open(partial, mode, opener=ours).close()
    assert victim.read_text() == "precious" and not out.exists()
    after = partial.lstat()
    assert (after.st_ino, after.st_mode, after.st_nlink) == (before.st_ino, before.st_mode, before.st_nlink)


def test_a_link_under_the_final_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.symlink_to(victim)
    write_text(out, "x")
    assert victim.read_text() == "precious" and out.read_text() == "x" and not out.is_symlink()


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("half of it")
    write_text(tmp_path / "out", "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "x"}


def test_a_writer_says_what_lies_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"folder is a folder, where a file is written; name another"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(OSError, match=r"file/a/b cannot be made, because .*/file is no folder; name another"):
        write_text(tmp_path / "file/a/b/out", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_pipe_is_no_input_that_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    for path in (tmp_path / "x", Path("/dev/zero")):
        with pytest.raises(OSError, match="is no regular file"):
            open(path, "rb", opener=regular).close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_folders_that_cannot_be_flushed_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(files, "_told", [])
    _failing_fsync(monkeypatch, number, folders=True)
    for name in ("a", "b"):
        write_text(tmp_path / name, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert capsys.readouterr().err.count("no folder is flushed") == 1


@pytest.mark.parametrize(
    ("number", "folders"), [(errno.EINVAL, False), (errno.EIO, True), (errno.EIO, False)]
)
def test_other_failures_to_flush_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folders: bool
) -> None:
    _failing_fsync(monkeypatch, number, folders)
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a", "a")
    assert caught.value.errno == number and (number == errno.EINVAL or str(tmp_path) in str(caught.value))
    assert not (tmp_path / "a.partial").exists()


def _failing_fsync(monkeypatch: pytest.MonkeyPatch, number: int, folders: bool) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_no_space_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on a file's size stands for a full disk."""
    script = """
import resource, signal, sys
from pathlib import Path
from megatron_r1.system.files import replacing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    with replacing(Path(sys.argv[1])) as stream:
        stream.write(b"x" * int(sys.argv[2]))
except OSError as error:
    print(error)
"""
    for size in (101, 10_000_000):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "out"), str(size)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"[Errno 27] File too large: '{tmp_path / 'out'}'\n"
        assert list(tmp_path.iterdir()) == []


def test_files_keep_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "new/out", "x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", tmp_path / "new/out")] == [
        0o700,
        0o600,
    ]
