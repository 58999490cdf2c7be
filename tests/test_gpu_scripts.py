"""benchmarks/gpu_speed.sh and gpu_correct.sh: how sections run, and each with a tiny model on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_sections  # noqa: E402
from gpu_sections import Section, table  # noqa: E402

HEAD = {"card": "none", "commit": "abc"}
WITHIN = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu_sections import say, wait_for_turn
"""
GOOD = WITHIN + "wait_for_turn()\nsay('speed', ms=1.5, kernels='none')"
BAD = WITHIN + "say('begun', ms=1.0)\nraise ValueError('no such kernel')"
# A child in a session of its own, which a kill of the section's group does not reach.
LONG = WITHIN + (
    "say('begun', ms=2.0)\n"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    "open(os.environ['GPU_FOLDER'] + '/child', 'w').write(str(p.pid))\n"
    "time.sleep(600)"
)


def section(name: str, program: str, seconds: float = 60) -> Section:
    return Section(name, seconds, (sys.executable, "-c", program))


def run(folder: Path, *chosen: Section, seconds: float = 200, ahead: bool = False) -> list[dict[str, Any]]:
    return gpu_sections.run(chosen, HEAD, folder, seconds, True, ahead)


def of(rows: list[dict[str, Any]], name: str, what: str) -> dict[str, Any]:
    (row,) = [row for row in rows if (row["section"], row["what"]) == (name, what)]
    return row


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failing_section_is_told_and_the_others_run(
    tmp_path: Path, ahead: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, section("bad", BAD), section("good", GOOD), ahead=ahead)
    ended = of(rows, "bad", "section")
    assert ended["ok"] is False and "status 1" in ended["note"] and "no such kernel" in ended["note"]
    # What it measured before counts.
    assert of(rows, "bad", "begun")["ms"] == 1.0
    assert of(rows, "good", "speed")["ms"] == 1.5 and of(rows, "good", "section")["ok"] is True
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) == 4
    assert all(line.startswith("none | abc | ") for line in printed)
    cells = [line.split(" | ") for line in table(rows).splitlines()]
    assert len({len(row) for row in cells}) == 1 and len(cells) == 2 + len(rows)


@pytest.mark.parametrize("script", ["gpu_speed.sh", "gpu_correct.sh"])
def test_help_lists_every_section(script: str) -> None:
    words = ["bash", str(BENCHMARKS / script), "--help"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    kind = script.removeprefix("gpu_").removesuffix(".sh")
    for section in gpu_sections.sections(kind):
        assert section.name in done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["train-140"], "no section train-140; there are peers-950m, train-950m"),
        (["--seconds", "0"], "--seconds 0 must be positive"),
        (["--seconds", "nan"], "--seconds nan must be positive"),
        (["--output", __file__], "--output: "),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_sections.py", "speed", *words])
    with pytest.raises(SystemExit) as end:
        gpu_sections.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and said in err and out == ""


def test_a_section_over_its_time_is_ended_with_its_descendants(tmp_path: Path) -> None:
    began = time.monotonic()
    rows = run(tmp_path, section("long", LONG, 4), section("good", GOOD))
    assert time.monotonic() - began < 60
    ended = of(rows, "long", "section")
    assert ended["ok"] is False and "over its time of 4 s" in ended["note"] and "ALIVE" not in ended["note"]
    assert not _lives(int((tmp_path / "child").read_text()))
    assert of(rows, "good", "section")["ok"] is True


def test_a_process_that_is_left_behind_is_ended_before_the_next_section(tmp_path: Path) -> None:
    look = WITHIN + "say('seen', lives=os.path.exists('/proc/%s/exe' % open('%s/child').read()))"
    look = look.replace("%s/child", f"{tmp_path}/child")
    rows = run(tmp_path, section("stray", LONG.removesuffix("time.sleep(600)")), section("look", look))
    assert of(rows, "stray", "section")["ok"] is True
    assert of(rows, "look", "seen")["lives"] is False


def test_sections_that_the_time_does_not_reach_are_told(tmp_path: Path) -> None:
    rows = run(tmp_path, section("good", GOOD), section("late", GOOD), seconds=gpu_sections.LEAST + 0.01)
    assert of(rows, "good", "section")["ok"] is True
    assert "not run" in of(rows, "late", "section")["note"] and of(rows, "late", "section")["ok"] is False


def test_a_section_that_is_started_ahead_waits_for_its_turn(tmp_path: Path) -> None:
    first = WITHIN + "time.sleep(2)\nsay('ends', at=time.monotonic())"
    second = WITHIN + "wait_for_turn()\nsay('begins', at=time.monotonic())"
    rows = run(tmp_path, section("first", first), section("second", second), ahead=True)
    assert of(rows, "second", "begins")["at"] > of(rows, "first", "ends")["at"]


PROGRAM = """
import json, sys
from pathlib import Path
import gpu_bench, gpu_check

root, others = Path(sys.argv[1]), json.loads(sys.argv[2])
print("names", json.dumps([[*gpu_bench.SECTIONS], [*gpu_check.SECTIONS]]))
for number, other in enumerate(others):
    for name, line in (("one", others[0]), (f"other{number}", other)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
    gpu_check.compare(f"other{number}", root / f"other{number}", root / "one")
for name in sys.argv[3:]:
    (gpu_bench.SECTIONS | gpu_check.SECTIONS)[name]()
"""
STEP = {"step": 1, "loss": 2.0, "grad_norm": 1.0}
OTHERS = {
    "equal": {},
    "within": {"loss": 2.00002},
    "loss": {"loss": 2.0001},
    "norm": {"grad_norm": 1.01},
    "steps": {"step": 2},
    "nan": {"loss": float("nan")},
}
WITHOUT_LAUNCHES = (
    *("train-140m", "arms-950m", "influence-140m", "documents-140m", "kfac-950m"),
    *("kernels", "bf16-scores"),
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One process for all: its imports take most of the time."""
    folder = tmp_path_factory.mktemp("sections")
    path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": path, "GPU_TINY": "1", "GPU_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
    others = json.dumps([STEP | other for other in OTHERS.values()])
    command = [sys.executable, "-c", PROGRAM, str(folder), others, *WITHOUT_LAUNCHES]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def rows_in(printed: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line[4:]) for line in printed if line.startswith("row ")]


def test_every_section_of_the_scripts_is_one_of_the_programs(printed: list[str]) -> None:
    (names,) = [json.loads(line[6:]) for line in printed if line.startswith("names ")]
    assert [set(each) for each in names] == [set(gpu_sections.SPEED), set(gpu_sections.CORRECT)]


def test_a_run_that_differs_is_no_success(printed: list[str]) -> None:
    ok = [row["ok"] for row in rows_in(printed) if row["what"].startswith("other")]
    assert dict(zip(OTHERS, ok, strict=True)) == {name: name in ("equal", "within") for name in OTHERS}


def test_sections_measure_a_tiny_model(printed: list[str]) -> None:
    rows = [row for row in rows_in(printed) if not row["what"].startswith("other")]
    assert [row for row in rows if "error" in row or row.get("ok") is False] == []
    assert {row["what"] for row in rows} >= {
        "ours 2 x 2", "profile of 140m 2 x 2", "plain kernels", "megatron-core's fusions",
        "forward and backward", "wgrad-dot", "ghost", "lowrank", "projected", "kfac, decompositions",
        "datainf, an example", "documents apart / whole windows", "plain, bf16", "scores, bf16",
    }  # fmt: skip
    (ours,) = [row for row in rows if row["what"] == "ours 2 x 2"]
    assert ours["tokens_per_s"] == pytest.approx(4 * 64 / (ours["ms"] / 1e3), rel=0.01)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["speed", "correct"])
def test_the_scripts_run_on_a_cpu(kind: str, tmp_path: Path) -> None:
    """All sections, launches and transformers, too; some minutes."""
    done = subprocess.run(
        [str(BENCHMARKS / f"gpu_{kind}.sh"), "--all", "--output", str(tmp_path)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    ended = [row["section"] for row in rows if row["what"] == "section" and row["ok"]]
    assert ended == [*(gpu_sections.SPEED if kind == "speed" else gpu_sections.CORRECT)]
    assert [row for row in rows if "error" in row] == []


def _lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
