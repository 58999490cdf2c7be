"""The quickstart's own pipeline at a small size: real text, real launches, and kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_r1.run import ledger
from megatron_r1.system.files import sha256
from tests import launch

STAGES, TRAINS, SCORES, TRAINS_ON = 16, 11, 12, 14
ENDS = ("checkpoints/step_00000036", "control/checkpoints/step_00000036")


def command(run: Path) -> list[str]:
    return [sys.executable, "examples/quickstart/run.py", "--run", str(run), "--size", "small"]


def make(run: Path) -> list[str]:
    """As a user starts it; `-o`: the environment these tests run in is set up already."""
    arguments = [f"VENV={sys.prefix}", f"ARGS=--run {run} --size small"]
    return ["make", "-o", f"{sys.prefix}/.core", "quickstart", *arguments]


@pytest.fixture(scope="module")
def listened() -> set[str]:
    """Addresses at which a process of the whole quickstart has accepted connections."""
    return set()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, listened: set[str]) -> Path:
    """A run without a cut; beside it `tokenized`, a copy of what it was before the model trained."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    log, tokenized = run.parent / "log", run.parent / "tokenized"
    process = launch.start(command(run), log)
    while process.poll() is None:
        family = launch.family(process.pid)
        listened.update(*map(launch.listeners, family))
        if not tokenized.exists() and title(TRAINS) in log.read_text(errors="replace"):
            _signal(family, signal.SIGSTOP)
            shutil.copytree(run, tokenized)
            _signal(family, signal.SIGCONT)
        time.sleep(0.3)
    assert process.returncode == 0, log.read_text()[-6000:]
    return run


def assert_same_run(run: Path, whole: Path, *checkpoints: str) -> None:
    """Weights, optimizer state, scores and mixture, bit for bit."""
    for checkpoint in checkpoints:
        launch.assert_same_tensors(run / checkpoint, whole / checkpoint)
    assert (run / "mix.yaml").read_bytes() == (whole / "mix.yaml").read_bytes()
    scores = sorted(p.relative_to(whole) for p in whole.glob("influence/*/*/scores.npy"))
    assert len(scores) == 2 * 7
    for path in scores:
        assert np.array_equal(np.load(run / path), np.load(whole / path)), path


def test_the_poor_source_ranks_last(whole: Path) -> None:
    mix = json.loads((whole / "mix.json").read_text())
    density = {name: row["rho"] for name, row in mix["sources"].items()}
    assert len(density) == 7
    assert min(density, key=lambda name: density[name]) == "base64"
    weights = {name: row["weight"] for name, row in mix["sources"].items()}
    assert weights["base64"] == min(weights.values()) and max(weights.values()) > weights["base64"]


def test_no_other_machine_can_connect_to_it(whole: Path, listened: set[str]) -> None:
    assert listened == {"127.0.0.1"}


def test_the_run_goes_on_with_the_new_weights(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 37))
    mix = json.loads((whole / "mix.json").read_text())["sources"]
    for name, row in mix.items():
        assert lines[-1]["mix_target"][name] == pytest.approx(row["weight"], abs=1e-6)
    control = [json.loads(line) for line in (whole / "control/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in control] == list(range(25, 37))
    assert set(control[-1]["probe_nll"]) == {"code", "math", "knowledge"}


def test_the_report_and_tensorboard_are_there(whole: Path) -> None:
    page = (whole / "reports/index.html").read_text()
    assert all(name in page for name in ("base64", "gcide", "sympy", "knowledge"))
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert list((whole / "tb").glob("events.*"))


def test_the_ledgers_tell_every_stage_from_the_first_text_on(whole: Path) -> None:
    """By hashes alone: what a stage has read is what another one made."""
    lines = [*ledger.lineage(whole), *ledger.read(whole)]
    tokenized = [f"preprocess {path.stem}" for path in (whole / "text").glob("*.jsonl")]
    scored = [f"influence step {step}" for step in (16, 24)]
    trained = ["train tokenizer", "train uniform", "train influence"]
    assert len(tokenized) == 7
    assert sorted(line["stage"] for line in lines) == sorted(
        ["gather text", "set probes aside", *tokenized, *trained, *scored, "mix influence"]
    )
    made = {value for line in lines for value in line["outputs"].values()}
    given = {path for line in lines for path, value in line["inputs"].items() if value not in made}
    assert given == {
        f"examples/{name}.yaml" for name in ("models/tiny", "quickstart/train", "quickstart/phase2")
    }
    text = whole / "text" / "gcide.jsonl"
    assert hashlib.sha256(text.read_bytes()).hexdigest() in made
    assert all(line["device_hours"] > 0 for line in lines)


def test_a_mixture_is_followed_by_hashes_to_its_text(whole: Path) -> None:
    """mix.yaml -> mix.json -> scores -> checkpoint, dataset and probing sets -> text."""
    lines = [*ledger.lineage(whole), *ledger.read(whole)]
    maker = {value: line for line in lines for value in line["outputs"].values()}

    def read(line: dict[str, Any]) -> set[str]:
        return set(line["inputs"].values())

    mixed = maker[sha256(whole / "mix.yaml")]
    assert sha256(whole / "mix.json") in mixed["outputs"].values()
    behind = json.loads((whole / "mix.json").read_text())["scores"]
    assert len(behind) == 2 * 7
    for where, found in behind.items():
        manifest = json.loads((whole / "influence" / where / "manifest.json").read_text())
        assert found["weights"] == manifest["weights"] and found["data"] == manifest["data"]
        weights, data = manifest["weights"], manifest["data"]["hash"]
        probes = [of["hash"] for of in manifest["directions"].values()]
        scored = maker[found["scores_sha256"]]
        assert scored["stage"] == f"influence step {manifest['step']}"
        assert found["scores_sha256"] in read(mixed) and {weights, data, *probes} <= read(scored)
        trained = maker[weights]
        assert trained["stage"] == "train uniform" and data in read(trained)
        plan = json.loads((whole / "plan.json").read_text())["data"]
        assert plan[manifest["source"]] == data
        assert {maker[probe]["stage"] for probe in probes} == {"set probes aside"}
        assert all(data in read(maker[probe]) for probe in probes)
        tokenized = maker[data]
        assert tokenized["stage"] == f"preprocess {manifest['source']}"
        text = sha256(whole / "text" / f"{manifest['source']}.jsonl")
        assert text in read(tokenized) and maker[text]["stage"] == "gather text"


def test_a_second_run_answers_at_once(whole: Path, tmp_path: Path) -> None:
    text = launch.finish(command(whole), tmp_path / "log")
    assert text.count("done before") == STAGES
    assert launch.seconds_in(text) < 5


def test_killed_twice_it_goes_on(whole: Path) -> None:
    """make alone while the model trains, whose ranks must not write on; then all processes at once.

    From the tokenized text on, in the place of the whole run: its path is in every stage's command. It ends
    with the mixture, all of what the kills can have changed.
    """
    run, kept = whole, whole.parent / "whole"
    run.rename(kept)
    try:
        (whole.parent / "tokenized").rename(run)
        kill_in_stage(TRAINS, run, "make", begun=(run / "checkpoints/step_00000008").exists)
        kill_in_stage(SCORES, run, "group", begun=lambda: any(run.glob("influence/*/*/scores.npy")))
        kill_in_stage(TRAINS_ON, run, "group")
        logs = {n: (run.parent / f"killed in {n}").read_text() for n in (TRAINS, SCORES, TRAINS_ON)}
        before = {n: len(re.findall(r"(?m)^\[\d+/16\] .*: done before$", log)) for n, log in logs.items()}
        assert before == {TRAINS: TRAINS - 1, SCORES: TRAINS - 1, TRAINS_ON: SCORES - 1}
        assert_same_run(run, kept, "checkpoints/step_00000024")
    finally:
        shutil.rmtree(run)
        kept.rename(run)


def title(number: int) -> str:
    return f"[{number}/{STAGES}] "


def kill_in_stage(
    number: int, run: Path, kind: str, delay: float = 0.0, begun: Callable[[], bool] = lambda: True
) -> None:
    """Start, and kill so many seconds after a stage has `begun`."""
    log = run.parent / f"killed in {number}"
    process = launch.start(make(run) if kind == "make" else command(run), log)
    launch.wait_for(lambda: title(number) in log.read_text(errors="replace"), title(number), seconds=300)
    launch.wait_for(begun, f"what {title(number)}leaves")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=delay)
    if kind == "group":
        _kill_session(process.pid)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _kill_session(leader: int) -> None:
    """All that descends from the leader, at once: torchrun puts its ranks into groups of their own."""
    family = launch.family(leader)
    _signal(family, signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)


def _signal(family: list[psutil.Process], number: signal.Signals) -> None:
    for member in family:
        # It may have ended meanwhile.
        with suppress(psutil.Error):
            member.send_signal(number)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["group", "make"])
@pytest.mark.parametrize("number", range(1, STAGES + 1))
def test_killed_in_any_stage_it_goes_on(number: int, kind: str, whole: Path, tmp_path: Path) -> None:
    longest = 14.0 if number in (TRAINS, SCORES, TRAINS_ON, TRAINS_ON + 1) else 0.6
    # Nothing follows the last stage: it is killed as it begins, or there is nothing left to kill.
    delay = random.Random(number).uniform(0.0, longest) if number < STAGES else 0.0
    run = tmp_path / "run"
    kill_in_stage(number, run, kind, delay)
    launch.finish(make(run) if kind == "make" else command(run), tmp_path / "log")
    assert_same_run(run, whole, *ENDS)
