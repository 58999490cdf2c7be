"""Runs the sections of gpu_speed.sh or gpu_correct.sh, each in a process of its own, and prints one table.

A section writes rows, each a line of JSON, and its output goes to a log. At its end, or when its time is
over, it is killed with all its descendants: they carry an environment variable that names the section,
whatever group they have put themselves into. The next section begins when none of them is alive. Where this
machine has eight cores or more, the next section imports its libraries meanwhile, and touches the GPU only
at its turn.

Without a GPU, or with --tiny, every section runs with a model of some thousand parameters. That shows that
the scripts work. Its figures mean nothing.

Imports nothing outside the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
MARK = "GPU_SECTION_MARK"
COLUMNS = {
    "ok": "ok",
    "ms": "ms",
    "spread": "least to most",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "multiple": "multiple",
    "peak_gib": "peak GiB",
}
"""Keys of rows that have a column of their own in the table. The others share the last one."""
NEEDED = {
    **{"torch": "torch", "numpy": "numpy", "megatron.core": "megatron-core", "pydantic": "pydantic"},
    **{"typing_inspection": "typing-inspection", "yaml": "pyyaml", "psutil": "psutil", "tqdm": "tqdm"},
    **{"xxhash": "xxhash", "packaging": "packaging", "setuptools": "setuptools"},
}
FOR_LAUNCHES = {"tensorboard": "tensorboard", "google.protobuf": "protobuf", "absl": "absl-py"}
"""Module -> package. Sections that launch tools/train.py need the second kind, too."""
CPU_SLOWER = 10
"""A section's time on a CPU, which others may use, too, in units of its time on a GPU."""
LEAST = 5.0
"""Seconds below which a section is not begun."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    name: str
    seconds: float
    """After which it is ended."""
    words: tuple[str, ...] = ()
    """Its command."""
    more: bool = False
    """Runs only where it is named, or with --all."""


SPEED = {
    "peers-950m": 110,
    "train-950m": 75,
    "influence-950m": 60,
    "arms-950m": 75,
    "tool-140m": 110,
    "peers-140m": 75,
    "train-140m": 45,
    "influence-140m": 75,
    "train-360m": 45,
    "documents-140m": 45,
    "peers-360m": 75,
    "kfac-950m": 240,
}
CORRECT = {
    "cpu-and-gpu": 90,
    "deterministic": 110,
    "sigterm": 90,
    "kernels": 60,
    "bf16-scores": 60,
    "gpu-tests": 240,
}
"""Section -> seconds, in the order of their worth: what comes last is what the time may not reach."""
KINDS = {"speed": SPEED, "correct": CORRECT}
MORE = {"kfac-950m"}


def sections(kind: str, slower: int = 1) -> list[Section]:
    """All of a script, in order; on a machine that is so many times slower."""
    words = sys.executable, str(HERE / {"speed": "gpu_bench.py", "correct": "gpu_check.py"}[kind])
    limits = KINDS[kind].items()
    return [Section(name, slower * seconds, (*words, name), name in MORE) for name, seconds in limits]


# ------------------------------------------------------------------------------------------ within a section


def say(what: str, **fields: Any) -> None:
    """A row of this section's table."""
    line = json.dumps({"what": what, **fields}, default=str)
    print("row", line, flush=True)
    if path := os.environ.get("GPU_ROWS"):
        with open(path, "a") as stream:
            stream.write(line + "\n")


@contextlib.contextmanager
def part(what: str) -> Iterator[None]:
    """The failure of one part is a row, and the next part runs."""
    try:
        yield
    except Exception as error:
        import traceback

        traceback.print_exc()
        say(what, ok=False, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def wait_for_turn() -> None:
    """Return when the section before is ended. Call it once everything is imported."""
    turn = os.environ.get("GPU_TURN")
    while turn and not os.path.exists(turn):
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------- the sections


class Running:
    """A section whose process has been started."""

    def __init__(self, section: Section, folder: Path, tiny: bool):
        self.section, self.mark = section, f"{section.name}.{os.getpid()}.{time.monotonic_ns()}"
        self.rows_path, self.turn = folder / f"{section.name}.rows", folder / f"{section.name}.turn"
        self.log = folder / f"{section.name}.log"
        environment = {
            **os.environ,
            MARK: self.mark,
            "GPU_ROWS": str(self.rows_path),
            "GPU_TURN": str(self.turn),
            "GPU_FOLDER": str(folder),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **({"GPU_TINY": "1"} if tiny else {}),
        }
        for path in (self.rows_path, self.turn):
            path.unlink(missing_ok=True)
        with open(self.log, "wb") as stream:
            self.process = subprocess.Popen(
                section.words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
                start_new_session=True,
            )
        self._read = 0

    def rows(self) -> list[Row]:
        """Whole rows that have not been returned before."""
        if not self.rows_path.exists():
            return []
        lines = self.rows_path.read_text().split("\n")[:-1]
        new, self._read = lines[self._read :], len(lines)
        return [json.loads(line) for line in new]

    def finish(self, seconds: float, tell: Callable[[Row], None]) -> Row:
        """Give it its turn, hand its rows to `tell`, end it after `seconds` at most. How it ended."""
        self.turn.touch()
        began, over = time.monotonic(), False
        while self.process.poll() is None and not over:
            time.sleep(0.05)
            over = time.monotonic() - began > seconds
            for row in self.rows():
                tell(row)
        status, alive = self.process.poll(), self.end()
        for row in self.rows():
            tell(row)
        took = f"{time.monotonic() - began:.0f} s"
        if over:
            why = f"over its time of {seconds:.0f} s, ended"
        elif status:
            why = f"status {status} after {took}: {self._last_line()}"
        else:
            why = f"ended by itself after {took}"
        if alive:
            why += f"; STILL ALIVE: {', '.join(map(str, alive))}, so later figures may be spoiled"
        return {"what": "section", "ok": not (over or status or alive), "note": why}

    def end(self) -> list[int]:
        """Kill the process and all its descendants. Those that are alive 10 s later."""
        until = time.monotonic() + 10
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while alive := marked(self.mark):
            for pid in alive:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > until:
                return alive
            time.sleep(0.02)
        return []

    def _last_line(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return (lines or ["no output"])[-1].strip()[:200]


def marked(mark: str) -> list[int]:
    """Processes that were started by one with this mark in its environment, or that are it."""
    found = []
    for path in glob.glob("/proc/[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in Path(path).read_bytes().split(b"\0"):
                found.append(int(path.split("/")[2]))
    return found


def run(
    chosen: Sequence[Section], head: Row, folder: Path, seconds: float, tiny: bool, ahead: bool
) -> list[Row]:
    """The rows of all sections, each printed as it comes.

    `seconds`: for all together; sections that it does not reach are told as not run. `ahead`: each section's
    process is started one section early, to import.
    """
    rows: list[Row] = []
    until = time.monotonic() + seconds
    started: dict[str, Running] = {}

    def start(section: Section) -> Running:
        if section.name not in started:
            started[section.name] = Running(section, folder, tiny)
        return started[section.name]

    try:
        for section, following in zip(chosen, [*chosen[1:], None], strict=True):

            def tell(row: Row, name: str = section.name) -> None:
                rows.append({**head, "section": name, **row})
                print(line(rows[-1]), flush=True)

            left = until - time.monotonic()
            if left < LEAST:
                tell({"what": "section", "ok": False, "note": f"not run: the {seconds:.0f} s are over"})
                continue
            running = start(section)
            if ahead and following:
                start(following)
            tell(running.finish(min(section.seconds, left), tell))
            del started[section.name]
    finally:
        for running in started.values():
            running.end()
    return rows


# -------------------------------------------------------------------------------------------------- the table


def line(row: Row) -> str:
    """A row by itself: card, commit, section, what, figures."""
    fields = [f"{key}={shown(value)}" for key, value in row.items() if key not in _PLACED]
    return " | ".join([*(str(row[key]) for key in _PLACED), " ".join(fields)])


_PLACED = ("card", "commit", "section", "what")


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def table(rows: Sequence[Row]) -> str:
    """All rows in Markdown. Columns that no row fills are left out."""
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    known = {*_PLACED, *columns}
    lines = [["card, commit", "section", "what", *columns.values(), "further"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        rest = "; ".join(f"{key} {shown(value)}" for key, value in row.items() if key not in known)
        cells = [shown(row[key]) if key in row else "" for key in columns]
        lines.append([f"{row['card']}, {row['commit']}", row["section"], row["what"], *cells, rest])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)


# ------------------------------------------------------------------------------------------------ the machine


def card() -> str | None:
    """The GPU that the sections see, or None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=name,power.limit,memory.used", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True)
    found = done.stdout.strip().splitlines()
    return found[0] if done.returncode == 0 and found else None


def commit() -> str:
    """The commit, with a + where files differ from it; without git a hash of the package's files."""
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError):
        done = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True)
        if done.returncode == 0:
            changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
            return done.stdout.strip() + ("+" if changed.strip() else "")
    digest = hashlib.sha256()
    for path in sorted((ROOT / "megatron_r1").rglob("*.py")):
        digest.update(path.read_bytes())
    return f"files {digest.hexdigest()[:9]}"


def versions() -> str:
    names = ("torch", "megatron-core", "triton", "transformers", "liger-kernel", "pydantic")
    out = [f"Python {sys.version.split()[0]}"]
    for name in names:
        try:
            out.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            out.append(f"no {name}")
    return ", ".join(out)


def missing(needed: dict[str, str]) -> list[str]:
    """Packages that this Python lacks."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ImportError:
            return False

    return [package for name, package in needed.items() if not found(name)]


def build_extension() -> None:
    """Build the C++ module in place where this Python has none: with g++ and the headers of pybind11.

    torch carries these headers.
    """
    name = f"_csrc{sysconfig.get_config_var('EXT_SUFFIX')}"
    target = ROOT / "megatron_r1" / name
    if target.exists():
        return
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    includes = [ROOT / "csrc", sysconfig.get_paths()["include"], Path(torch.origin).parent / "include"]
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden"]
    words = ["g++", *flags, *(f"-I{folder}" for folder in includes), str(ROOT / "csrc/bindings.cpp")]
    if shutil.which("g++") is None:
        sys.exit(f"error: {target.relative_to(ROOT)} is not there, and neither is g++, which would build it")
    print(f"building {target.relative_to(ROOT)}", flush=True)
    part = target.with_suffix(".partial")
    subprocess.run([*words, "-o", str(part)], check=True)
    part.replace(target)


def main() -> int:
    kinds = [f"sections of {kind}: {', '.join(limits)}" for kind, limits in KINDS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(kinds),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, help="gpu_speed.sh gives speed, gpu_correct.sh correct")
    parser.add_argument("section", nargs="*", help="sections to run (default: those that fit the time)")
    parser.add_argument("--all", action="store_true", help="all sections, whatever time they take")
    parser.add_argument("--seconds", type=float, default=285, help="for all sections (default: 285)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; so, too, where no GPU is")
    parser.add_argument("--output", type=Path, metavar="DIR", help="logs, profiles, rows (default: new)")
    options = parser.parse_args()
    gpu = card()
    tiny = options.tiny or gpu is None
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g} must be positive")
    known = {section.name: section for section in sections(options.kind, 1 if gpu else CPU_SLOWER)}
    if unknown := [name for name in options.section if name not in known]:
        parser.error(f"no section {unknown[0]}; there are {', '.join(known)}")
    advice = "install them, or name a folder that holds them in PYTHONPATH: pip install --no-deps --target"
    if lacks := missing(NEEDED):
        parser.error(f"this Python lacks {', '.join(lacks)}; {advice} DIR {' '.join(lacks)}")
    if lacks := missing(FOR_LAUNCHES):
        print(f"launches of tools/train.py will fail for lack of {', '.join(lacks)}; {advice} DIR ...")
    build_extension()
    every = [section for section in known.values() if options.all or not section.more]
    chosen = [known[name] for name in options.section] or every
    folder = (options.output or Path(tempfile.mkdtemp(prefix=f"gpu-{options.kind}-"))).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    # A launcher's SIGTERM must end the sections, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    head = {"card": (gpu or "CPU").split(",")[0] + (", tiny" if tiny else ""), "commit": commit()}
    print(f"{head['card']} | {head['commit']} | {datetime.date.today()} | {versions()}")
    print(f"{gpu or 'no GPU'} | {os.cpu_count()} cores | logs and profiles in {folder}", flush=True)
    seconds = 1e9 if options.all else options.seconds
    ahead = len(os.sched_getaffinity(0)) >= 8
    rows = run(chosen, head, folder, seconds, tiny, ahead)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.md").write_text(table(rows) + "\n")
    print(f"\n{table(rows)}")
    if late := [row["section"] for row in rows if str(row.get("note")).startswith("not run: the")]:
        print(f"\nnot reached: benchmarks/gpu_{options.kind}.sh {' '.join(late)}")
    return int(any(row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
